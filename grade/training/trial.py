"""One step of a run and one batch of its evaluation, for what they hold in memory: nothing is updated or kept."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch

from grade.config import Config, TrainConfig
from grade.config.methods import DIFFERENTIATING, micro_batch_size
from grade.errors import GradeError, reason_of
from grade.machine import free_bytes, is_out_of_memory
from grade.memory.peak import peak_bytes
from grade.memory.plan import MemoryPlan, Peaks, Sizes, plan
from grade.methods import make_method
from grade.methods.services import Services
from grade.model.policy import Policy
from grade.model.sharding import Sharding
from grade.processes import failing_together as failing_in_all
from grade.replay.score import score
from grade.rewards.base import Reward
from grade.rollout import Rollout, pad_prompts
from grade.sampling.draw import Sampling
from grade.sampling.sample import sample
from grade.training.evaluation import evaluation_sampling, score_settings
from grade.training.responses import prompts_together


class _Enough(Exception):
    """A step has come as far as its first update."""


@dataclass(frozen=True)
class Trial:
    """The longest step that a run may have, as `grade.memory.plan` asks for it.

    Args:
        prompts, evaluated: token ids of the prompts of training, and of the largest split that is evaluated.
        split: the name of the latter, for rewards that read the data's other columns; None: prompts have none.
        failing_together: of processes that make the passes of a trial together (`grade.methods.services.Services`).
    """

    policy: Policy
    reward: Reward
    config: Config
    prompts: Sequence[list[int]]
    evaluated: Sequence[list[int]]
    split: str | None = None
    failing_together: Callable[[], AbstractContextManager] = nullcontext

    @property
    def batches(self) -> dict[str, int]:
        """Responses of a step, and those that are sampled, differentiated and evaluated together."""
        config = self.config
        responses = config.train.batch_size * config.train.accumulation_steps
        return {
            "step": responses,
            "rollout": min(
                prompts_together(config.generation, responses) * config.generation.samples_per_prompt, responses
            ),
            "passes": micro_batch_size(config.method, config.train.batch_size, responses),
            "evaluation": min(config.evaluation.batch_size, len(self.evaluated)),
        }

    def __call__(self, length: int, width: int, *, recompute: bool) -> tuple[Peaks, float]:
        """(peaks of responses that all have `length` tokens and pass together in numbers of about `width` at most, how
        many times as many there are in the run). The run goes on as if nothing had happened: all generators are put
        back, and gradients and what a method keeps are dropped."""
        device = self.policy.device
        generation = replace(self.config.generation, max_new_tokens=length, min_new_tokens=0, ignore_eos=True)
        method = self.config.method
        # GRPO passes over groups of equal rewards, whatever kl_coef is; this KL, known anyway, moves every response.
        coefficient: dict[str, Any] = {f"kl_{method.kl_direction}_coef": 1.0}
        method = replace(method, grpo=replace(method.grpo, **coefficient))
        evaluation = replace(self.config.evaluation, batch_size=min(width, self.batches["evaluation"]))
        config = replace(
            self.config, generation=generation, method=method, train=self._train(width), evaluation=evaluation
        )
        few = replace(self, config=config, reward=self.reward.in_trial())
        try:
            # What compiled layers allocate is not seen on a CPU. Their own code keeps more, operation by operation.
            with _generators_put_back(device), self.policy.switches.uncompiled():
                found = few._peaks(recompute)
        finally:
            for parameter in self.policy.parameters():
                parameter.grad = None
        moments = 2 * sum(p.nbytes for p in self.policy.parameters())  # of AdamW, beside every step but the first
        # A compiled step keeps its caches: of full rollouts, and of a step's rest.
        always: float = moments
        if config.rollout.compile and config.rollout.sampled_here:
            always += found["rollout"] * (2 if self.batches["step"] % self.batches["rollout"] else 1)
        found = {name: size + (moments if name == "rollout" else always) for name, size in found.items()}
        if config.method.updates > 1 and config.guard.max_skipped > 1:  # what a later update's failure would put back
            found["passes"] += moments + moments / 2
        return found, max(count / few.batches[name] for name, count in self.batches.items())

    def _train(self, width: int) -> TrainConfig:
        """With fewer responses, in whole groups and micro-batches."""
        train = self.config.train
        batch = min(width, self.batches["passes"])
        fewest = math.lcm(self.config.generation.samples_per_prompt, self.config.method.minibatches * batch)
        responses = fewest * max(width // fewest, 1)
        if responses >= self.batches["step"]:
            return train
        return replace(train, batch_size=batch, accumulation_steps=responses // batch)

    def _peaks(self, recompute: bool) -> Peaks:
        config, device = self.config, self.policy.device
        train, copies = config.train, config.generation.samples_per_prompt
        method = make_method(
            self.policy,
            self.reward,
            config.method,
            config.generation,
            train,
            Services(failing_together=self.failing_together),
            seed=config.seed,
            activation_checkpointing=recompute,
        )
        responses = train.batch_size * train.accumulation_steps
        numbers, at_once = mixed(self.prompts, responses // copies), prompts_together(config.generation, responses)

        def sampled() -> list[Rollout]:
            starts = range(0, len(numbers), at_once)
            return [self._sampled(numbers[i : i + at_once], method.sampling(0), copies, training=True) for i in starts]

        def enough() -> NoReturn:
            raise _Enough

        def passes() -> None:
            try:
                method.step(together, 0, enough)
            except _Enough:
                return
            raise RuntimeError(f"a trial of method.name={config.method.name} has come to no update, nor to its memory")

        def evaluated() -> None:
            numbers = mixed(self.evaluated, self.batches["evaluation"])
            rollout = self._sampled(numbers, evaluation_sampling(config.evaluation, config.generation), training=False)
            score(self.policy, self.reward, rollout, score_settings(config.method, device))

        rollouts, rollout = peak_bytes(sampled, device)
        # The micro-batches of a method that backpropagates through each for itself are all alike.
        alone = config.method.name in DIFFERENTIATING
        together = [rollouts[0].cut(0, min(train.batch_size, len(rollouts[0])))] if alone else rollouts
        waiting = sum(t.nbytes for r in rollouts for t in vars(r).values() if isinstance(t, torch.Tensor))
        passed = waiting + peak_bytes(passes, device)[1]
        rollouts.clear()
        together.clear()
        return {"rollout": rollout, "passes": passed, "evaluation": peak_bytes(evaluated, device)[1]}

    def _sampled(self, numbers: list[int], sampling: Sampling, copies: int = 1, *, training: bool) -> Rollout:
        """A response to each of these prompts, of training or of those that are evaluated."""
        prompts = self.prompts if training else self.evaluated
        ids, mask = pad_prompts([prompts[n] for n in numbers], self.policy.pad_id, self.policy.device)
        rows = torch.arange(len(numbers) * copies, device=self.policy.device) * sampling.max_new_tokens
        rollout = sample(self.policy, ids, mask, sampling, seed=0, first_rows=rows, samples_per_prompt=copies)
        if self.split is None or self.config.rollout.source is not None:
            return rollout
        return rollout.of("policy" if training else self.split, numbers)


@contextmanager
def _generators_put_back(device: torch.device) -> Iterator[None]:
    """Torch's, and those of Python and numpy, from which a reward of one's own may draw."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def mixed(prompts: Sequence[list[int]], count: int) -> list[int]:
    """Numbers of `count` prompts, long and short ones by turns: padding, where there is any, costs some kernels of
    attention."""
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]), reverse=True)
    turns = [(number // 2) % len(order) for number in range(count)]
    return [order[-1 - turn if number % 2 else turn] for number, turn in enumerate(turns)]


def memory_plan(
    trial: Trial,
    processes: int,
    any_process: Callable[[bool], bool],
    failing_together: Callable[[], AbstractContextManager] = nullcontext,
) -> MemoryPlan:
    """`grade.memory.plan.plan` for a run of this many processes on its machine."""
    config, device, sharding = trial.config, trial.policy.device, trial.policy.sharding
    free = free_bytes(device, processes)
    measure: Callable[..., tuple[Peaks, float]] = trial
    if sharding is not None:
        free = None if free is None else -int(sharding.largest(-free))
        together = partial(failing_in_all, sharding.accelerator)
        measure = partial(_agreed, replace(trial, failing_together=together), sharding)
    longest = max(map(len, [*trial.prompts, *trial.evaluated]))
    sizes = Sizes(
        longest,
        config.generation.max_new_tokens,
        trial.batches,
        config.method.head_chunk_bytes(device.type),
        trial.policy.supports_activation_checkpointing,
    )
    return plan(measure, config, sizes, free, any_process, failing_together)


def _agreed(trial: Trial, sharding: Sharding, length: int, width: int, *, recompute: bool) -> tuple[Peaks, float]:
    """A trial with the largest peaks of all processes, so that all of them make the same ones.

    Raises:
        GradeError: memory ran out here; the other processes wait in a pass, and cannot try less together with this one.
    """
    try:
        with trial.failing_together():
            peaks, times = trial(length, width, recompute=recompute)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise GradeError(
            f"out of memory in a trial of {width} responses of {length} tokens ({reason_of(error)}). Set "
            "method.activation_checkpointing to true, train.batch_size lower (with train.accumulation_steps above for "
            "the same gradient), or run on more processes, over which model.fsdp shards the base."
        ) from error
    return {name: sharding.largest(size) for name, size in peaks.items()}, times
