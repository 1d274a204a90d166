"""What a pass over the logits leaves of each row: all that a gradient needs beside the logits.

A log-sum-exp is kept as its two parts, the largest logit and the rest, because
log p = (logit - peak) - norm loses less than logit - (peak + norm).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _RowStats:
    """What the two tuples share; every field is [N]."""

    @classmethod
    def empty(cls: Any, n: int, dtype: torch.dtype, device: torch.device) -> Any:
        return cls(*torch.empty(len(cls._fields), n, dtype=dtype, device=device).unbind())

    def put(self: Any, a: int, b: int, part: Iterable[Tensor]) -> None:
        for whole, rows in zip(self, part, strict=True):
            whole[a:b] = rows

    def rows(self: Any, a: int, b: int) -> Any:
        return type(self)(*(stat[a:b] for stat in self))


class _KLFields(NamedTuple):
    kl: Tensor  # KL(p || q), nats
    peak_p: Tensor  # largest logit
    norm_p: Tensor  # log-sum-exp minus the peak
    peak_q: Tensor
    norm_q: Tensor
    shift: Tensor  # the difference of the log-sum-exps, q's minus p's, to full precision


class KLStats(_RowStats, _KLFields):
    @property
    def lse_p(self) -> Tensor:
        return self.peak_p + self.norm_p

    @property
    def lse_q(self) -> Tensor:
        return self.peak_q + self.norm_q


class _TokenFields(NamedTuple):
    logprob: Tensor  # of the token, nats; not meaningful without tokens
    entropy: Tensor  # nats
    peak: Tensor
    norm: Tensor


class TokenStats(_RowStats, _TokenFields):
    @property
    def lse(self) -> Tensor:
        return self.peak + self.norm
