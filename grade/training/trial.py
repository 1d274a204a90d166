"""One step of a run and one batch of its evaluation, for what they hold in memory: nothing is updated or kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import torch

from grade.config import Config
from grade.config.methods import micro_batch_size
from grade.machine import free_bytes
from grade.memory.peak import peak_bytes
from grade.memory.plan import MemoryPlan, Peaks, Sizes, plan
from grade.methods import make_method
from grade.methods.services import Services
from grade.model.policy import Policy
from grade.replay.score import score
from grade.rewards.reward import Reward
from grade.rollout import Rollout, pad_prompts
from grade.sampling.draw import Sampling
from grade.sampling.sample import sample
from grade.training.evaluation import evaluation_sampling, score_settings


class _Enough(Exception):
    """A step has come as far as its first update."""


@dataclass(frozen=True)
class Trial:
    """The longest step that a run may have, as `grade.memory.plan` asks for it.

    Args:
        prompts, evaluated: token ids of the prompts of training, and of the largest split that is evaluated.
    """

    policy: Policy
    reward: Reward
    config: Config
    prompts: Sequence[list[int]]
    evaluated: Sequence[list[int]]

    @property
    def batches(self) -> dict[str, int]:
        """Responses that are sampled, differentiated and evaluated together."""
        config = self.config
        responses = config.train.batch_size * config.train.accumulation_steps
        return {
            "rollout": prompts_together(config, responses) * config.generation.samples_per_prompt,
            "passes": micro_batch_size(config.method, config.train.batch_size, responses),
            "evaluation": min(config.evaluation.batch_size, len(self.evaluated)),
        }

    def __call__(self, length: int, *, recompute: bool) -> Peaks:
        """The peaks of responses that all have `length` tokens. The run goes on as if nothing had happened: torch's
        generators are put back, and gradients and what a method keeps are dropped."""
        device = self.policy.device
        generation = replace(self.config.generation, max_new_tokens=length, min_new_tokens=0, ignore_eos=True)
        # GRPO passes over responses that nothing moves; a KL moves all.
        method = replace(self.config.method, kl_coef=self.config.method.kl_coef or 1.0)
        config = replace(self.config, generation=generation, method=method)
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                found = self._peaks(config, recompute)
        finally:
            for parameter in self.policy.parameters():
                parameter.grad = None
        moments = 2 * sum(p.nbytes for p in self.policy.parameters())  # of AdamW, beside every step but the first
        # A compiled step keeps its cache.
        always = moments + (found["rollout"] if config.rollout.compile and config.rollout.source is None else 0)
        return {name: size + (moments if name == "rollout" else always) for name, size in found.items()}

    def _peaks(self, config: Config, recompute: bool) -> Peaks:
        train, copies, device = config.train, config.generation.samples_per_prompt, self.policy.device
        method = make_method(
            self.policy, self.reward, config.method, config.generation, train, Services(), seed=config.seed,
            checkpoint=recompute,
        )
        responses = train.batch_size * train.accumulation_steps
        prompts, together = mixed(self.prompts, responses // copies), prompts_together(config, responses)

        def sampled() -> list[Rollout]:
            starts = range(0, len(prompts), together)
            return [self._sampled(prompts[i: i + together], method.sampling(0), copies) for i in starts]

        def enough() -> NoReturn:
            raise _Enough

        def passes() -> None:
            try:
                method.step(rollouts, 0, enough)
            except _Enough:
                pass

        def evaluated() -> None:
            prompts = mixed(self.evaluated, self.batches["evaluation"])
            score(self.policy, self.reward, self._sampled(prompts, evaluation_sampling(config)),
                  score_settings(config, device))

        rollouts, rollout = peak_bytes(sampled, device)
        waiting = sum(t.nbytes for r in rollouts for t in vars(r).values() if isinstance(t, torch.Tensor))
        passed = waiting + peak_bytes(passes, device)[1]
        rollouts.clear()
        return {"rollout": rollout, "passes": passed, "evaluation": peak_bytes(evaluated, device)[1]}

    def _sampled(self, prompts: list[list[int]], sampling: Sampling, copies: int = 1) -> Rollout:
        ids, mask = pad_prompts(prompts, self.policy.pad_id, self.policy.device)
        rows = torch.arange(len(prompts) * copies, device=self.policy.device) * sampling.max_new_tokens
        return sample(self.policy, ids, mask, sampling, seed=0, first_rows=rows, samples_per_prompt=copies)


def prompts_together(config: Config, responses: int) -> int:
    """Prompts that a process with `responses` of a step samples responses to at a time."""
    return max((config.generation.batch_size or responses) // config.generation.samples_per_prompt, 1)


def mixed(prompts: Sequence[list[int]], count: int) -> list[list[int]]:
    """`count` prompts, long and short ones by turns: padding, where there is any, costs some kernels of attention."""
    order = sorted(prompts, key=len, reverse=True)
    turns = [(number // 2) % len(order) for number in range(count)]
    return [order[-1 - turn if number % 2 else turn] for number, turn in enumerate(turns)]


def memory_plan(
    trial: Trial, processes: int, any_process: Callable[[bool], bool]
) -> MemoryPlan:
    """`grade.memory.plan.plan` for a run of this many processes on its machine."""
    config, device = trial.config, trial.policy.device
    longest = max(map(len, [*trial.prompts, *trial.evaluated]))
    sizes = Sizes(
        longest, config.generation.max_new_tokens, trial.batches, config.method.head_chunk_bytes(device.type),
        trial.policy.can_checkpoint,
    )
    return plan(trial, config, sizes, free_bytes(device, processes), any_process)
