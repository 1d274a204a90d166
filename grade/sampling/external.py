"""Rollouts from elsewhere: token ids that another engine sampled, as lines of JSON (`--rollout.source FILE`).

    {"prompt": [11, 42, 7], "response": [5, 99, 2]}

One response a line, in the order of the steps; samples of one prompt stand next to each other. The local rules `rao`,
`straight_through` and `reinmax` need nothing of the draw but its tokens, so the update has the distribution it would
have had with the trainer's own sampling, if the other engine samples as that does: from the policy as it is now, at
temperature 1, among its top_k candidates. A file made beforehand is on-policy for its first step only; a named pipe is
read as steps need it, so an engine that keeps it open and loads checkpoints/last in between can keep up
(train.save_every 1). Each of its lines is waited for rollout.timeout seconds, and a stop is heard meanwhile.

The candidates are found again, by one parallel pass. Token ids that are not among them take the last place and are
counted (`off_support`): a few come from rounding, many from another model, temperature or truncation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from grade.config import GenerationConfig, RolloutConfig
from grade.errors import GradeError, RolloutFailed, reason_of
from grade.model.passes import fed_embeddings, policy_pass
from grade.model.policy import Policy
from grade.rollout import Rollout, pad_prompts
from grade.sampling.draw import Sampling, suppressed_ids
from grade.sampling.lines import MOST_BYTES, Silent, TooLong, lines_of
from grade_kernels import linear_gumbel_topk, place_tokens

_CONDITIONAL_DRAW = 1  # draw 0 is the sampler's own


class Response(NamedTuple):
    """A response from elsewhere: token ids."""

    prompt: list[int]
    tokens: list[int]


class RolloutSource:
    """The file of rollout.source.

    Args:
        longest_prompt: task.prompt_max_tokens.
        timeout: rollout.timeout, seconds.
        needed: responses of the whole run, over all processes.
        processes: that read it.

    Attributes:
        should_stop: asked while a line is waited for; once it says so, `rollout` raises StopAsked.

    Raises:
        GradeError: the file is not there, it is a pipe that several processes would read, a line cannot be used with
            this policy and these settings, or a regular file holds fewer responses than the run needs, or does not have
            those of a prompt next to each other. A regular file is read once to find out.
    """

    def __init__(
        self,
        path: Path,
        policy: Policy,
        generation: GenerationConfig,
        *,
        longest_prompt: int,
        timeout: float,
        needed: int,
        processes: int = 1,
    ):
        self.path, self.policy, self.timeout = path, policy, timeout
        self._limits = Limits(policy, generation, longest_prompt)
        self.should_stop: Callable[[], bool] = lambda: False
        if not self.path.exists() or self.path.is_dir():
            raise GradeError(f"rollout.source: there is no file {self.path}. Name one, or null to sample here.")
        self.is_pipe = not self.path.is_file()
        if self.is_pipe and processes > 1:
            raise GradeError(
                f"rollout.source: {self.path} is a pipe, which only one process can read. Use a file, or one process."
            )
        if not self.is_pipe:
            found, first = 0, list[int]()
            for found, response in enumerate(self._responses(), start=1):
                if (found - 1) % generation.samples_per_prompt == 0:
                    first = response.prompt
                elif found <= needed and response.prompt != first:  # here, where every process finds it
                    raise self._apart(generation.samples_per_prompt)
            if found < needed:
                raise GradeError(
                    f"rollout.source: {self.path} holds {found} responses, the run needs {needed} (train.steps * "
                    "train.batch_size * train.accumulation_steps). Lower train.steps or add responses."
                )
        self._lines = self._responses()

    def skip(self, count: int) -> None:
        """Leave out the next `count` responses: another process' share, or what a resumed run has used."""
        next(islice(self._lines, count, count), None)

    def rollout(self, count: int, sampling: Sampling, *, seed: int, first_rows: Tensor, copies: int) -> Rollout:
        """The next `count` responses, as if they had been sampled here; arguments as in `grade.sampling.sample.sample`.

        Raises:
            RolloutFailed: a pipe ended, was silent for rollout.timeout, or holds a line that cannot be used.
            StopAsked: `should_stop` said so while nothing came.
        """
        responses = list(islice(self._lines, count))
        if len(responses) < count:
            raise RolloutFailed(
                f"rollout.source: {self.path} ended {count - len(responses)} responses early. Go on with "
                "--train.resume auto once there are more."
            )
        for first in range(0, count, copies):
            if any(r.prompt != responses[first].prompt for r in responses[first : first + copies]):
                raise self._apart(copies)
        return recreate(self.policy, responses, sampling, seed=seed, first_rows=first_rows, copies=copies)

    def _apart(self, copies: int) -> RolloutFailed:
        return RolloutFailed(
            f"rollout.source: {self.path} does not have the {copies} responses of a prompt next to each other. "
            "Order them so, or lower generation.samples_per_prompt to 1."
        )

    def _responses(self) -> Iterator[Response]:
        where = f"rollout.source: {self.path}"
        lines = lines_of(self.path, timeout=self.timeout, should_stop=lambda: self.should_stop())
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield self._read(line.decode("utf-8"), number)
        except Silent as silence:
            raise RolloutFailed(
                f"{where} {silence} in rollout.timeout={self.timeout:g} seconds. See whether the "
                "engine that writes it still runs, or raise rollout.timeout. Go on with "
                "--train.resume auto."
            ) from None
        except TooLong:
            raise RolloutFailed(
                f"{where} has a line of more than {MOST_BYTES} bytes without an end. Write one response a line."
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise RolloutFailed(
                f"{where} cannot be read as text ({reason_of(error)}). Name a file of JSON lines, or a pipe."
            ) from error

    def _read(self, line: str, number: int) -> Response:
        where = f"rollout.source: line {number} of {self.path}"
        try:
            record = json.loads(line)
            prompt, tokens = record["prompt"], record["response"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RolloutFailed(
                f'{where} is not of the form {{"prompt": [ids], "response": [ids]}} ({error!r}). Mend it.'
            ) from error
        response = Response(prompt, tokens)
        self._limits.check(where, response)
        return response


class Limits:
    """What a response from elsewhere may be.

    Args:
        longest_prompt: task.prompt_max_tokens.
    """

    def __init__(self, policy: Policy, generation: GenerationConfig, longest_prompt: int):
        self._generation, self._longest_prompt = generation, longest_prompt
        self._known = torch.ones(policy.vocab_size, dtype=torch.bool)
        self._known[policy.suppressed.cpu()] = False
        self._ends = set(policy.eos_ids.tolist())

    def check(self, where: str, response: Response) -> None:
        """Refuse ids that the policy could not have sampled, and lengths that its settings rule out.

        Args:
            where: begins the message.

        Raises:
            RolloutFailed: with what is wrong.
        """
        for name, ids in (("prompt", response.prompt), ("response", response.tokens)):
            if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
                raise RolloutFailed(f"{where}: its {name} is not a list of one or more token ids. Mend it.")
            wrong = next((i for i in ids if not 0 <= i < len(self._known) or not self._known[i]), None)
            if wrong is not None:
                raise RolloutFailed(
                    f"{where}: its {name} has the id {wrong}, which the tokenizer of model.name does not "
                    "know. Sample with the same tokenizer."
                )
        self._check_length(where, response.prompt, response.tokens)

    def _check_length(self, where: str, prompt: list[int], tokens: list[int]) -> None:
        generation, most = self._generation, self._longest_prompt
        if len(prompt) > most:
            raise RolloutFailed(
                f"{where}: its prompt has {len(prompt)} tokens, task.prompt_max_tokens is {most}. Raise that."
            )
        if len(tokens) > generation.max_new_tokens:
            raise RolloutFailed(
                f"{where}: its response has {len(tokens)} tokens, generation.max_new_tokens is "
                f"{generation.max_new_tokens}. Raise that or cut the response."
            )
        ends = [] if generation.ignore_eos else [i for i, token in enumerate(tokens) if token in self._ends]
        if ends and ends[0] < len(tokens) - 1:
            raise RolloutFailed(f"{where}: its response goes on after an end-of-sequence token. Cut it there.")
        if not ends and len(tokens) < generation.max_new_tokens:
            raise RolloutFailed(
                f"{where}: its response stops after {len(tokens)} tokens without an end, before "
                f"generation.max_new_tokens={generation.max_new_tokens}. Sample as many, and keep the end-of-sequence "
                "token of those that end."
            )
        if ends and len(tokens) < generation.min_new_tokens:
            raise RolloutFailed(
                f"{where}: its response ends after {len(tokens)} tokens, generation.min_new_tokens is "
                f"{generation.min_new_tokens}. Set it to what the responses were sampled with."
            )


def recreate(
    policy: Policy, responses: Sequence[Response], sampling: Sampling, *, seed: int, first_rows: Tensor, copies: int = 1
) -> Rollout:
    """The rollout that `grade.sampling.sample.sample` would have made, had it drawn these tokens.

    Args:
        responses: B of them; those of one prompt next to each other, `copies` each.
        first_rows: [B] int64, noise row of each response's first token.

    Returns:
        A rollout whose candidates are the policy's as it is now; relaxed weights are drawn conditional on the tokens.
    """
    return recreate_with_states(policy, responses, sampling, seed=seed, first_rows=first_rows, copies=copies)[0]


@torch.no_grad()
def recreate_with_states(
    policy: Policy, responses: Sequence[Response], sampling: Sampling, *, seed: int, first_rows: Tensor, copies: int = 1
) -> tuple[Rollout, Tensor]:
    """The same, and the policy's states [B, S, d] that predict the tokens."""
    ids, prompt_mask = pad_prompts([r.prompt for r in responses], policy.pad_id, policy.device)
    flipped, flipped_mask = pad_prompts([r.tokens[::-1] for r in responses], policy.pad_id, policy.device)
    tokens, mask = flipped.flip(1), flipped_mask.flip(1)  # [B, S], padding behind
    rows = first_rows[:, None] + torch.arange(tokens.shape[1], device=first_rows.device)
    blank = tokens.new_zeros(*tokens.shape, min(sampling.top_k, policy.vocab_size))
    rollout = Rollout(
        ids,
        prompt_mask,
        tokens,
        mask,
        blank,
        torch.ones(tokens.shape, device=policy.device),
        rows,
        min_new_tokens=sampling.min_new_tokens,
        ignore_eos=sampling.ignore_eos,
        seed=seed,
        samples_per_prompt=copies,
        missed=torch.zeros_like(mask),
    )
    hidden = policy_pass(policy, rollout, fed_embeddings(rollout, policy.embedding, policy.embedding_scale))
    early = max(sampling.min_new_tokens - 1, 0)  # columns where end-of-sequence could not be chosen
    for columns in (slice(0, early), slice(early, None)):
        here = torch.zeros_like(mask)
        here[:, columns] = mask[:, columns]
        if here.any():
            suppress = suppressed_ids(policy, sampling.min_new_tokens, sampling.ignore_eos)(columns.start)
            _fill(policy, rollout, hidden, here, sampling, suppress)
    return rollout, hidden


def _fill(policy: Policy, rollout: Rollout, hidden: Tensor, here: Tensor, sampling: Sampling, suppress: Tensor) -> None:
    """Candidates and relaxed weights of the tokens `here` [B, S] bool, in place."""
    draw = partial(
        linear_gumbel_topk,
        hidden[here],
        policy.head,
        tau=sampling.tau,
        seed=rollout.seed,
        rows=rollout.rows[here],
        suppress=suppress,
    )
    support = draw(k=rollout.indices.shape[-1]).indices
    assert rollout.missed is not None  # as `recreate` has made it
    placed, rollout.missed[here] = place_tokens(support, rollout.tokens[here])
    drawn = draw(indices=placed, tokens=rollout.tokens[here], draw=_CONDITIONAL_DRAW)
    rollout.indices[here] = placed
    chosen = placed == rollout.tokens[here][:, None]
    rollout.token_weight[here] = (drawn.weights * chosen).sum(-1).to(rollout.token_weight.dtype)


def rollout_source(
    rollout: RolloutConfig,
    policy: Policy,
    generation: GenerationConfig,
    *,
    longest_prompt: int,
    needed: int,
    processes: int = 1,
) -> RolloutSource | None:
    """The source that the settings name; None where responses are sampled here. Arguments as of `RolloutSource`."""
    if rollout.source is None or rollout.engine != "here":
        return None
    return RolloutSource(
        Path(rollout.source),
        policy,
        generation,
        longest_prompt=longest_prompt,
        timeout=rollout.timeout,
        needed=needed,
        processes=processes,
    )
