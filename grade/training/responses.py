"""The responses of a training step: to which prompts, sampled here, read or asked for elsewhere, and from which noise.

They follow from (seed, step) alone, so a resumed run repeats the uninterrupted one, and neither batches nor processes
change them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from grade.config import GenerationConfig
from grade.model.policy import Policy
from grade.rollout import Rollout, pad_prompts
from grade.sampling.decode import Decoding
from grade.sampling.draw import Sampling
from grade.sampling.engine import Request
from grade.sampling.engine_rollouts import EngineRollouts
from grade.sampling.external import RolloutSource
from grade.sampling.sample import sample
from grade.seeds import derived_seed, epoch_seed


def prompt_numbers(step: int, per_step: int, count: int, seed: int) -> list[int]:
    """Numbers of the prompts of a step: a fresh permutation of all `count` in every epoch, from (seed, epoch)."""
    numbers: list[int] = []
    position = step * per_step
    while len(numbers) < per_step:
        epoch, offset = divmod(position + len(numbers), count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch_seed(seed, epoch)))
        numbers += order[offset : offset + per_step - len(numbers)].tolist()
    return numbers


def prompts_together(generation: GenerationConfig, responses: int) -> int:
    """Prompts whose samples are drawn at the same time, where there are `responses` to draw."""
    return max(generation.batch_size or responses, generation.samples_per_prompt) // generation.samples_per_prompt


@dataclass
class Responses:
    """One process' share of every step's responses.

    Args:
        prompts: token ids of the training split.
        source: of another engine's responses, in a file or a pipe.
        engine: samples each step's responses elsewhere. Without both they are sampled here, by `decoding`.
        per_step: responses of a step, on all processes.
        process, processes: which this is, of how many.
    """

    policy: Policy
    prompts: Sequence[list[int]]
    decoding: Decoding
    source: RolloutSource | None
    engine: EngineRollouts | None
    generation: GenerationConfig
    seed: int
    per_step: int
    process: int
    processes: int

    def of_step(self, step: int, sampling: Sampling) -> Iterator[Rollout]:
        """At most generation.batch_size at a time."""
        copies, source, device = self.generation.samples_per_prompt, self.source, self.policy.device
        numbers, first, share = self._share(step)
        sampled = [] if self.engine is None else self.engine.sampled(step, self._requests)
        together = prompts_together(self.generation, share * copies)
        if source is not None:
            source.skip(first * copies)
        for start in range(first, first + share, together):
            stop = min(start + together, first + share)
            responses = step * self.per_step + torch.arange(start * copies, stop * copies, device=device)
            rows = responses * self.generation.max_new_tokens
            if source is not None:
                yield source.rollout(len(responses), sampling, copies=copies, seed=self.seed, first_rows=rows)
                continue
            if self.engine is not None:
                some = sampled[(start - first) * copies : (stop - first) * copies]
                rollout = self.engine.rollout(some, sampling, copies=copies, seed=self.seed, first_rows=rows)
                yield rollout.of("policy", numbers[start:stop])
                continue
            ids, mask = pad_prompts([self.prompts[n] for n in numbers[start:stop]], self.policy.pad_id, device)
            yield sample(
                self.policy,
                ids,
                mask,
                sampling,
                samples_per_prompt=copies,
                decoding=self.decoding,
                seed=self.seed,
                first_rows=rows,
            ).of("policy", numbers[start:stop])
        if source is not None:
            source.skip((len(numbers) - first - share) * copies)

    def measures(self) -> dict[str, float]:
        """What the last step's responses say of the engine that sampled them; all processes ask together."""
        return {} if self.engine is None else self.engine.measures()

    def _share(self, step: int) -> tuple[list[int], int, int]:
        """(numbers of a step's prompts, the first of this process, how many it has)."""
        copies = self.generation.samples_per_prompt
        numbers = prompt_numbers(step, self.per_step // copies, len(self.prompts), self.seed)
        share = len(numbers) // self.processes
        return numbers, self.process * share, share

    def _requests(self, step: int) -> list[Request]:
        """What an engine is asked for in a step: each response with a seed of its own, from (seed, step, response)."""
        copies = self.generation.samples_per_prompt
        numbers, first, share = self._share(step)
        return [
            Request(self.prompts[numbers[response // copies]], derived_seed(self.seed, step, response))
            for response in range(first * copies, (first + share) * copies)
        ]
