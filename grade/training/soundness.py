"""Whether a policy is still one: what must be finite before an update counts, a checkpoint is written or chosen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from grade.model.policy import Policy

_MEASURES = ("loss", "reward", "kl", "entropy", "grad_norm")


def broken_measure(values: Mapping[str, float]) -> str | None:
    """The first measure of a step or a validation that no sound policy has, as words; None if there is none."""
    wrong = next((name for name in _MEASURES if name in values and not math.isfinite(values[name])), None)
    return None if wrong is None else f"{wrong} is {values[wrong]}"


@torch.no_grad()
def broken_policy(policy: Policy, trained: Iterable[Tensor], prompt: list[int]) -> str | None:
    """What is not finite of a policy, as words; None of a sound one.

    Args:
        trained: its trained parameters and those of its method.
        prompt: token ids whose next token's logits are looked at.
    """
    if not torch.stack([parameter.isfinite().all() for parameter in trained]).all():
        return "its weights are not finite"
    ids = torch.tensor([prompt], device=policy.device)
    with policy.state(adapters=True):
        hidden = policy.hidden(policy.embed(ids), torch.ones_like(ids, dtype=torch.bool), padded=False)
    return None if (hidden[:, -1] @ policy.head.weight.T).isfinite().all() else "its logits are not finite"
