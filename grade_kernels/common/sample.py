"""What a selection and a sample are, and how a token gets into a support."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Support(NamedTuple):
    ids: Tensor  # int64 [N, k]
    values: Tensor  # [N, k] logits, -inf where the id may not be sampled
    lse: Tensor  # [N] log-sum-exp of the whole raw row


class Sample(NamedTuple):
    weights: Tensor  # [N, k] softmax(z / tau)
    tokens: Tensor  # int64 [N]
    mass: Tensor  # [N] probability of the support


def place(indices: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(the support [..., k] with each token in it, where it was missing [...])."""
    missed = ~(indices == tokens.unsqueeze(-1)).any(-1)
    last = torch.where(missed, tokens, indices[..., -1])
    return torch.cat([indices[..., :-1], last.unsqueeze(-1)], dim=-1), missed
