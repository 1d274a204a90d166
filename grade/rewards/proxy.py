"""A proxy of a program: a head on the frozen base that estimates what the program says of the base's own responses.

A program that judges responses has no gradient. The proxy has one, and is trained on what a run starts from: responses
that the frozen base samples with the run's own settings, to prompts that are in no other split, labelled by the
program. It is kept as every head is (`grade.rewards.head_training`), and stands beside the program in a sum
(`grade.rewards.weighted`), in which it counts for training alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from grade.config import GenerationConfig
from grade.errors import GradeError
from grade.rewards.base import RewardFunction
from grade.rewards.head_fitting import HeadData, Judged, fit_head
from grade.rewards.head_training import HeadTraining
from grade.rewards.shared import RewardHead
from grade.rollout import pad_prompts
from grade.sampling.draw import Sampling, sampling_of
from grade.sampling.sample import sample
from grade.seeds import derived_seed
from grade.tasks.base import sha256_of
from grade.terminal import counted

_TOGETHER = 256
"""Responses that are sampled together."""
_FIRST_ROW = {"reward": 0, "validation": 2**40}
"""Of the noise: far apart, so that no row is shared between the splits."""


@dataclass(frozen=True)
class ProxyTraining(HeadTraining):
    """What a proxy comes from, and where it is kept.

    Args:
        settings, judged, output_dir, policy: as of `HeadTraining`.
        task: its prompts of "reward" are learnt from, and those of "validation" are tested on.
        program: judges the responses, and is what the proxy estimates.
        generation: of the run, which says how responses are sampled.
    """

    KIND: ClassVar[str] = "proxy"

    program: RewardFunction
    generation: GenerationConfig

    def identity(self) -> dict[str, Any]:
        """What the proxy depends on, by content: its model, its prompts, how they were answered and who judged."""
        described = self.task.describe()
        del described["splits"]
        prompts = {split: self.task.prompts(split, self.policy.tokenizer) for split in _FIRST_ROW}
        return {
            **self._fitting(),
            "sampling": asdict(self._sampling),
            "prompts_sha256": {split: sha256_of(map(str, rows)) for split, rows in prompts.items()},
            "program": {"reward": self.program.identity(), **described},
        }

    def _deciding(self) -> dict[str, Any]:
        chosen = super()._deciding()
        del chosen["max_tokens"]  # a response is judged, and read, as a whole
        return {**chosen, "proxy_samples": self.settings.proxy_samples}

    @property
    def _sampling(self) -> Sampling:
        return sampling_of(self.generation)

    def train(self) -> tuple[RewardHead, dict[str, Any]]:
        """Learn from the responses to "reward", and report on those to "validation"; as `fit_head`, with the mean of
        the program's rewards in either.

        Raises:
            GradeError: there are no prompts, or the program says the same of all responses.
        """
        learnt, held_out = self._responses("reward"), self._responses("validation")
        rewards = {response.reward for response in learnt}
        if len(rewards) < 2:
            raise GradeError(
                f"reward.proxy: {self.program.raises} is {rewards.pop():g} for each of {len(learnt)} responses of the "
                "base model, so that a proxy has nothing to learn. Raise task.reward_examples or reward.proxy_samples, "
                "or use an easier task or a model that earns some of it."
            )
        yes_or_no = rewards | {response.reward for response in held_out} == {0.0, 1.0}
        data = HeadData("classes" if yes_or_no else "numbers", learnt, held_out)
        head, report = fit_head(self.policy, self.settings, data, judged=self.judged)
        means = {
            name: sum(response.reward for response in part) / len(part)
            for name, part in (("trained_on", learnt), ("held_out", held_out))
        }
        return head, {**report, "unit": "responses", "mean_reward": means}

    def _responses(self, split: str) -> Sequence[Judged]:
        """`reward.proxy_samples` responses of the frozen base to every prompt of a split, judged; the same at every
        call."""
        policy, sampling, samples = self.policy, self._sampling, self.settings.proxy_samples
        prompts = self.task.prompts(split, policy.tokenizer)
        seed = derived_seed(self.settings.seed, *b"proxy")
        at_once, found = max(_TOGETHER // samples, 1), []
        starts = [range(i, min(i + at_once, len(prompts))) for i in range(0, len(prompts), at_once)]
        for numbers in counted(f"Responses for the proxy, {split} prompts", starts, len):
            ids, mask = pad_prompts([prompts[i] for i in numbers], policy.pad_id, policy.device)
            first = torch.arange(numbers.start * samples, numbers.stop * samples, device=policy.device)
            rollout = sample(
                policy,
                ids,
                mask,
                sampling,
                seed=seed,
                first_rows=_FIRST_ROW[split] + first * sampling.max_new_tokens,
                samples_per_prompt=samples,
                adapters=False,
            ).of(split, list(numbers))
            said = self.program.score(rollout).tolist()
            answers = zip(rollout.real_prompts(), rollout.real_tokens(), said, strict=True)
            found += [
                Judged([*prompt, *response], numbers.start + i // samples, reward)
                for i, (prompt, response, reward) in enumerate(answers)
            ]
        return found
