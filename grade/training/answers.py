"""Responses to a person's prompts, of a run's policy and of its base model, sampled as the run's evaluation does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from grade.config import Config
from grade.errors import GradeError
from grade.model.policy import Policy
from grade.model.pretrained import context_of
from grade.rollout import pad_prompts
from grade.sampling.sample import sample
from grade.tasks import task_of
from grade.training.evaluation import evaluation_sampling, text_of


class Answer(NamedTuple):
    """A response of the policy to a prompt and, if it was asked for, the base model's with the same noise."""

    prompt: str
    policy: str
    base: str | None


class Answers:
    """Samples responses; every one has noise of its own, and the same prompts in the same order the same responses.

    Args:
        config: the run's settings; `seed` keys the noise.
        base: let the base model answer too.
        samples: responses per prompt.
        max_new_tokens: longest response; None: as in training.
        chat: a prompt is a user's message, for the chat template.
    """

    def __init__(
        self,
        config: Config,
        policy: Policy,
        *,
        base: bool = False,
        samples: int = 1,
        max_new_tokens: int | None = None,
        chat: bool = False,
    ):
        self.chat = chat or config.tokenizer.chat
        self.config, self.policy, self.base, self.samples = config, policy, base, samples
        sampling = evaluation_sampling(config.evaluation, config.generation)
        longest = max_new_tokens or sampling.max_new_tokens
        least = min(sampling.min_new_tokens, longest)
        self.sampling = replace(sampling, max_new_tokens=longest, min_new_tokens=least)
        self.drawn = 0  # responses so far

    def to(self, prompts: Sequence[str]) -> Iterator[Answer]:
        """The responses to some prompts, `samples` after each other for each.

        Raises:
            GradeError: a prompt is empty, too long for the model, or not of the run's task.
        """
        rows = [self._ids(prompt) for prompt in prompts]
        for chosen, copies in self._batches(len(rows)):
            trained = self._sampled(rows[chosen], copies, adapters=True)
            untrained = self._sampled(rows[chosen], copies, adapters=False) if self.base else [None] * len(trained)
            self.drawn += len(trained)
            repeated = [prompt for prompt in prompts[chosen] for _ in range(copies)]
            yield from map(Answer, repeated, trained, untrained)

    def texts(self, rows: Sequence[list[int]], *, adapters: bool) -> list[str]:
        """Responses of the policy, or of the base model, to prompts of token ids: `samples` in a row for each."""
        found: list[str] = []
        for chosen, copies in self._batches(len(rows)):
            some = self._sampled(rows[chosen], copies, adapters=adapters)
            self.drawn += len(some)
            found += some
        return found

    def _batches(self, prompts: int) -> Iterator[tuple[slice, int]]:
        """Which prompts are answered together, and how often: evaluation.batch_size responses at most."""
        most = self.config.evaluation.batch_size
        together = max(most // self.samples, 1)
        for start in range(0, prompts, together):
            for done in range(0, self.samples, most):
                yield slice(start, start + together), min(most, self.samples - done)

    def _sampled(self, rows: Sequence[list[int]], copies: int, *, adapters: bool) -> list[str]:
        policy = self.policy
        ids, mask = pad_prompts(rows, policy.pad_id, policy.device)
        numbers = self.drawn + torch.arange(len(rows) * copies, device=policy.device)
        rollout = sample(
            policy,
            ids,
            mask,
            self.sampling,
            seed=self.config.seed,
            adapters=adapters,
            first_rows=numbers * self.sampling.max_new_tokens,
            samples_per_prompt=copies,
        )
        return [text_of(policy, rollout.tokens[i], rollout.mask[i]) for i in range(len(rollout))]

    def _ids(self, prompt: str) -> list[int]:
        """A prompt as the run's task writes it."""
        settings, chat = self.config.task, replace(self.config.tokenizer, chat=self.chat)
        ids = task_of(settings.name).task.prompt_of(prompt, self.policy.tokenizer, settings, chat)
        if not ids:
            raise GradeError(f"the prompt {prompt!r} has no text that the model could continue.")
        context = context_of(self.policy.config)
        if context is not None and len(ids) + self.sampling.max_new_tokens > context:
            raise GradeError(
                f"a prompt of {len(ids)} tokens and {self.sampling.max_new_tokens} new ones exceed the context of "
                f"{self.config.model.name}, {context} tokens. Shorten it, or lower --max_new_tokens."
            )
        return ids
