"""GRADE and GRADE-STE: backpropagate the reward through the generated tokens (arXiv 2601.11574).

    L = - mean over responses of r(x, Y)  +  kl_coef * KL

One optimizer step: sample (no graph), count the real tokens of the whole batch, then replay each micro-batch, which
adds its share of dL/dtheta to the adapter's gradients. Where this departs from the published code:

- the KL is in the loss, exact over the vocabulary, aligned with the token it belongs to, and its gradient runs
  through earlier tokens of both models;
- accumulation equals the large batch: every weight below divides by a total of the whole step;
- nothing after the end of a response is fed, rewarded or counted;
- replay and hops (`grade.replay`) give the gradient of the token-by-token graph without building it.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Iterator

import torch
from torch import Tensor

from grade.config import Config
from grade.replay import ReplayResult, ReplaySettings, replay
from grade.rollout import Rollout, Sampling


def tau_at(step: int, start: float, end: float, steps: int) -> float:
    """Temperature at optimizer step `step` (from 0): linear from `start` to `end` over `steps`, then constant."""
    return start + (end - start) * min(step / steps, 1.0)


def kl_weight(mask: Tensor, reduction: str, kl_coef: float, total_tokens: int, total_responses: int) -> Tensor:
    """[B, S] float64: what each token's KL counts in the loss.

    Args:
        mask: [B, S] bool, real tokens.
        reduction: "token_mean" divides by all real tokens of the step, "sequence_sum" by its responses.
        total_tokens, total_responses: of the whole step, over micro-batches and processes.
    """
    total = total_tokens if reduction == "token_mean" else total_responses
    return mask.double() * (kl_coef / total)


class Grade:
    """The method as the trainer sees it: how to sample, and how to turn rollouts into gradients."""

    def __init__(self, policy, reward, config: Config, *, any_process=bool, phase=None):
        self.policy, self.reward, self.config = policy, reward, config
        self.any_process, self.phase = any_process, phase
        if config.method.activation_checkpointing:
            policy.enable_checkpointing()

    def tau(self, step: int) -> float:
        method = self.config.method
        return tau_at(step, method.tau_start, method.tau_end, method.tau_steps)

    def sampling(self, step: int) -> Sampling:
        generation = self.config.generation
        return Sampling(
            max_new_tokens=generation.max_new_tokens, min_new_tokens=generation.min_new_tokens,
            top_k=generation.top_k, tau=self.tau(step), soft=self.config.method.name == "grade",
            ignore_eos=generation.ignore_eos,
        )

    def settings(self, step: int) -> ReplaySettings:
        method = self.config.method
        settings = ReplaySettings(
            tau=self.tau(step), estimator=method.estimator, rao_samples=method.rao_samples,
            kl_direction=method.kl_direction, kl_prefix_grad=method.kl_prefix_grad, max_hops=method.max_hops,
            hop_tol=method.hop_tol, dropout=method.replay_dropout, checkpoint=method.activation_checkpointing,
            prompt_cache=method.prompt_cache, chunk_bytes=method.head_chunk_mib * 2**20,
            any_process=self.any_process,
        )
        if self.phase is not None:
            settings.phase = self.phase
        return settings

    def accumulate(self, micro_batch: Rollout, step: int, *, total_tokens: int, total_responses: int) -> ReplayResult:
        """Add this micro-batch's share of the step's gradient.

        Args:
            micro_batch: B responses.
            total_tokens, total_responses: of the whole step, over micro-batches and processes.
        """
        method = self.config.method
        weight = kl_weight(micro_batch.mask, method.kl_reduction, method.kl_coef, total_tokens, total_responses)
        shares = weight.new_full((len(micro_batch),), 1.0 / total_responses)
        with self._dropout_of(micro_batch, step):
            return replay(
                self.policy, self.reward, micro_batch, self.settings(step), reward_weight=shares, kl_weight=weight
            )

    @contextmanager
    def _dropout_of(self, micro_batch: Rollout, step: int) -> Iterator[None]:
        """torch's generators, where dropout masks come from, set by (seed, first noise row): a resumed run repeats."""
        if not self.config.method.replay_dropout:
            yield
            return
        device = self.policy.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(hash((self.config.seed, int(micro_batch.rows[0, 0]))) % 2**63)
            yield

    def loss(self, reward: float, kl_per_token: float, kl_per_response: float) -> float:
        """The objective's value from a step's means."""
        method = self.config.method
        kl = kl_per_token if method.kl_reduction == "token_mean" else kl_per_response
        return -reward + method.kl_coef * kl
