"""GRADE and GRADE-STE: backpropagate the reward through the generated tokens (arXiv 2601.11574).

    L = - mean over responses of r(x, Y)  +  kl_coef * KL

One optimizer step: sample (no graph), count the real tokens of the whole batch, then replay each micro-batch, which
adds its share of dL/dtheta to the adapter's gradients. Functions beside the reward, which have no gradient, are
followed on the same responses by the score function (`grade.methods.score_function`). Where this departs from the
published code:

- the KL is in the loss, exact over the vocabulary, aligned with the token it belongs to, and its gradient runs
  through earlier tokens of both models;
- accumulation equals the large batch: every weight below divides by a total of the whole step;
- nothing after the end of a response is fed, rewarded or counted;
- replay and hops (`grade.replay.replay`) give the gradient of the token-by-token graph without building it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch

from grade.config.methods import BY_VALUE
from grade.errors import GradeError, present
from grade.methods.base import Method, Update
from grade.methods.metrics import add_sums, step_sums, update_metrics
from grade.methods.score_function import advantages
from grade.methods.services import Totals
from grade.replay.replay import ReplayResult, ReplaySettings, replay
from grade.rewards.base import is_ours
from grade.rewards.weighted import WeightedReward
from grade.rollout import Rollout
from grade.sampling.draw import Sampling, sampling_of
from grade.seeds import derived_seed

_WITH_PROXY = "reward_with_proxy"
"""The metric of what is followed where a reward has proxies."""


def tau_at(step: int, start: float, end: float, steps: int) -> float:
    """Temperature at optimizer step `step` (from 0): linear from `start` to `end` over `steps`, then constant."""
    return start + (end - start) * min(step / steps, 1.0)


class Grade(Method):
    """The method as the trainer sees it: how to sample, and how to turn rollouts into gradients.

    Raises:
        GradeError: no part of the reward has a gradient.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.repeatable = not self.config.replay_dropout  # whose masks follow from what passes together
        if not self.reward.differentiable:
            raise GradeError(
                f"method.name={self.config.name} backpropagates the reward, and {self.reward.raises} has no "
                f"gradient. Use a method that only needs its value: {', '.join(BY_VALUE)}."
            )

    def tau(self, step: int) -> float:
        return tau_at(step, self.config.tau_start, self.config.tau_end, self.config.tau_steps)

    def sampling(self, step: int) -> Sampling:
        return sampling_of(self.generation, tau=self.tau(step), soft=self.config.name == "grade")

    def settings(self, step: int) -> ReplaySettings:
        config = self.config
        return ReplaySettings(
            tau=self.tau(step),
            path_scale=config.path_scale,
            estimator=config.estimator,
            rao_samples=config.rao_samples,
            kl_direction=config.kl_direction,
            kl_prefix_grad=config.kl_prefix_grad,
            max_hops=config.max_hops,
            hop_tol=config.hop_tol,
            dropout=config.replay_dropout,
            activation_checkpointing=self.activation_checkpointing,
            training=True,
            prompt_cache=config.prompt_cache,
            chunk_bytes=config.head_chunk_bytes(self.policy.device.type),
            any_process=self.services.any_process,
            phase=self._phase,
        )

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """A phase of a replay. In one of them somebody's own reward may fail, and the hops behind it need all
        processes. This package's do not fail, and processes spare themselves to agree on that for every micro-batch."""
        may_fail = name == "base_forward" and any(
            r.differentiable and not is_ours(type(r)) for r in self.reward.summands()
        )
        with self.services.phase(name), self.services.failing_together() if may_fail else nullcontext():
            yield

    def step(self, rollouts: list[Rollout], step: int, update: Update) -> dict[str, float]:
        # The KL's token mean divides by all real tokens of the step, so they are counted before the first pull-back.
        totals = self.services.totals(r.mask for r in rollouts)
        sums: dict[str, float] = {}
        for rollout in self.judged(rollouts):
            for micro_batch in rollout.micro_batches(self.together, by_length=True):
                sums = add_sums(sums, self._sums(micro_batch, self.accumulate(micro_batch, step, totals)))
        self.services.before_update(sums)
        norm = update()
        metrics = self.observed(sums)
        return {"loss": self.loss(metrics), **metrics, "tau": self.tau(step), **update_metrics([norm])}

    def judged(self, rollouts: list[Rollout]) -> list[Rollout]:
        """With what the reward's functions say of them, and the weights of their scores that follow from that."""
        if not isinstance(self.reward, WeightedReward) or not self.reward.functions:
            return rollouts
        with self.services.phase("score"):
            rollouts = super().judged(rollouts)
        shares = torch.cat([self.reward.function_shares(present(r.judged)) for r in rollouts])
        weights = advantages(shares, self.generation.samples_per_prompt, self.services.reduce)
        split = weights.split([len(r) for r in rollouts])
        return [replace(r, advantage=own) for r, own in zip(rollouts, split, strict=True)]

    def accumulate(self, micro_batch: Rollout, step: int, totals: Totals) -> ReplayResult:
        """Add this micro-batch's share of the gradient of a step with `totals`."""
        with self._dropout_of(micro_batch):
            return replay(
                self.policy, self.reward, micro_batch, self.settings(step), **self.loss_weights(micro_batch, totals)
            )

    def loss_weights(self, micro_batch: Rollout, totals: Totals) -> dict[str, torch.Tensor]:
        """The weights of each reward, of each token's KL and of each response's score in the loss, as
        `grade.replay.replay` takes them."""
        weight = self.weight_of_kl(micro_batch.mask, totals)
        shares = weight.new_full((len(micro_batch),), 1.0 / totals.responses)
        found = {"reward_weight": shares, "kl_weight": weight}
        if micro_batch.advantage is not None:
            found["score_weight"] = micro_batch.advantage / totals.responses
        return found

    @contextmanager
    def _dropout_of(self, micro_batch: Rollout) -> Iterator[None]:
        """torch's generators, where dropout masks come from, set by (seed, first noise row): a resumed run repeats."""
        if not self.config.replay_dropout:
            yield
            return
        device = self.policy.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(derived_seed(self.seed, int(micro_batch.rows[0, 0])))
            yield

    def loss(self, metrics: dict[str, float]) -> float:
        """As of every method, of a reward with its proxies where it has some."""
        return super().loss({**metrics, "reward": metrics.get(_WITH_PROXY, metrics["reward"])})

    def _sums(self, micro_batch: Rollout, result: ReplayResult) -> dict[str, float]:
        """With GRADE's own measures: hops and their last change, and the relaxed weight that is not on the sampled
        token (0: the straight-through step is exact). `reward` is what every method is measured by: proxies are a part
        of another measure, beside it."""
        per_response = {"hops": result.hops, "hop_residual": result.residual}
        added = self.reward.proxies_shares(result.terms) if isinstance(self.reward, WeightedReward) else None
        if added is not None:
            per_response[_WITH_PROXY] = result.reward
            result = replace(result, reward=result.reward - added)
        return step_sums(
            micro_batch,
            result,
            self.policy.eos_ids,
            per_response=per_response,
            per_token={"soft_hard_gap": (1 - micro_batch.token_weight) * micro_batch.mask},
        )
