"""How far an engine's probabilities are from the trainer's own, and the weights that correct for it.

The same weights give other log-probabilities in another program: by its kernels, its dtype, an adapter in 16 bits. Like
is compared with like. vLLM's log-probabilities are by default those of the whole distribution; with its option
`--logprobs-mode processed_logprobs` they are of what is drawn from, the candidates that are left after end-of-sequence
before its time and ids that the tokenizer does not know are taken out. Where the last of k candidates and the next one
tie, vLLM keeps both, and its log-probabilities of that token are lower by the next one's share, at most log(1 + 1/k).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grade.model.policy import Policy
from grade.rollout import Rollout
from grade.sampling.sample import support_is_allowed
from grade_kernels import vocab_head


@torch.no_grad()
def policy_logprobs(policy: Policy, rollout: Rollout, hidden: Tensor, *, processed: bool) -> Tensor:
    """[B, S] float64 log-probabilities of a rollout's tokens under the policy, nats; 0 at padding.

    Args:
        hidden: [B, S, d], the states that predict the tokens.
        processed: of the distribution among the candidates, and not of the whole one.
    """
    mask, tokens = rollout.mask, rollout.tokens[rollout.mask]
    support = rollout.indices[mask]  # [n, k]
    head = vocab_head(hidden[mask], policy.head, indices=support, tokens=tokens)
    assert head.logprob is not None and head.logits is not None  # as tokens and indices were given
    found = head.logprob.double()
    if processed:
        allowed = support_is_allowed(policy, rollout)[mask]
        logits = torch.where(allowed, head.logits.double(), -torch.inf)
        chosen = (support == tokens[:, None]).long().argmax(1, keepdim=True)
        found = logits.log_softmax(-1).gather(1, chosen).squeeze(1)
    dense = torch.zeros(mask.shape, dtype=torch.float64, device=found.device)
    dense[mask] = found
    return dense


def padded(rows: Sequence[Sequence[float]], like: Tensor) -> Tensor:
    """[B, S] float64 of rows of numbers, 0 behind each; `like` [B, S] has the shape and the device."""
    out = torch.zeros(like.shape, dtype=torch.float64)
    for number, row in enumerate(rows):
        out[number, : len(row)] = torch.tensor(row, dtype=torch.float64)
    return out.to(like.device)


def importance_weights(log_ratio: Tensor, cap: float) -> Tensor:
    """[B, S] float32: min(exp(log_ratio), cap), the truncated importance weights of Yao et al. 2025, "Your efficient RL
    framework secretly brings you off-policy RL training".

    Args:
        log_ratio: [B, S], log-probability by the trainer minus that by the engine.
    """
    return log_ratio.exp().clamp(max=cap).float()


@dataclass
class Mismatch:
    """Sums over the tokens of a step.

    Attributes:
        tokens: real ones.
        absolute: sum of |log-probability by the trainer - by the engine|, nats.
        largest: the largest of them.
        weights, capped: sum of the importance weights, and how many of them are at the cap.
    """

    tokens: float = 0.0
    absolute: float = 0.0
    largest: float = 0.0
    weights: float = 0.0
    capped: float = 0.0

    def add(self, log_ratio: Tensor, rollout: Rollout, cap: float | None) -> None:
        """Count a rollout's tokens; `log_ratio` [B, S] is 0 at padding."""
        size = log_ratio.abs()
        self.tokens += float(rollout.mask.sum())
        self.absolute += float(size.sum())
        self.largest = max(self.largest, float(size.max()))
        if rollout.importance is not None and cap is not None:
            self.weights += float((rollout.importance * rollout.mask).sum())
            self.capped += float(((log_ratio.exp() >= cap) & rollout.mask).sum())

    @property
    def mean(self) -> float:
        """Mean absolute difference, nats."""
        return self.absolute / max(self.tokens, 1.0)


def together(parts: Sequence[Mismatch]) -> Mismatch:
    """That of all processes."""
    return Mismatch(
        tokens=sum(p.tokens for p in parts),
        absolute=sum(p.absolute for p in parts),
        largest=max(p.largest for p in parts),
        weights=sum(p.weights for p in parts),
        capped=sum(p.capped for p in parts),
    )
