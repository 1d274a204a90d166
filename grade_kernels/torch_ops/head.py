"""The language-model head on a chunk of rows, forwards and backwards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grade_kernels.checks import compute_dtype
from grade_kernels.torch_ops.chunks import spans

# A 16-bit weight is widened this many bytes at a time.  That repeats for every row chunk, but costs little
# beside the product (one pass over the block against one per row), where a widened copy of the whole
# weight would be the largest tensor around.
_BLOCK_BYTES = 2**25


def through_softcap(d_logits: Tensor, logits: Tensor, softcap: float | None) -> Tensor:
    """Gradient before the soft cap, in place: d_logits * (1 - (logits / cap)^2)."""
    if softcap is None:
        return d_logits
    # A candidate blocked with -inf would make 0 * -inf; it counts as saturated.
    return d_logits.mul_(1.0 - (logits / softcap).clamp(-1.0, 1.0).square_())


@dataclass(frozen=True)
class Head:
    """logits = cap * tanh((scale * hidden @ weight.T + bias) / cap), without the tanh if softcap is None."""

    weight: Tensor  # [V, d]
    bias: Tensor | None = None  # [V]
    scale: float = 1.0
    softcap: float | None = None

    @property
    def dtype(self) -> torch.dtype:
        """float32, or float64 for a float64 weight: what logits and gradients are computed in."""
        return compute_dtype(self.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [r, d] -> logits [r, V], never rounded to 16 bits."""
        out = self._product(hidden)
        if self.scale != 1.0:
            out *= self.scale
        if self.bias is not None:
            out += self.bias.to(out.dtype)
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)
        return out

    def grad_hidden(self, d_raw: Tensor) -> Tensor:
        """d_raw [r, V] (before the soft cap) -> d hidden [r, d] in `dtype`."""
        if self.weight.dtype == d_raw.dtype:
            out = d_raw @ self.weight
        else:
            out = d_raw.new_zeros(d_raw.shape[0], self.weight.shape[1])
            for a, b in self._blocks():
                out.addmm_(d_raw[:, a:b], self.weight[a:b].to(d_raw.dtype))
        return out.mul_(self.scale)

    def add_grad_weight(self, d_raw: Tensor, hidden: Tensor, out: Tensor) -> None:
        """out [V, d] += scale * d_raw.T @ hidden."""
        out.addmm_(d_raw.T, hidden.to(out.dtype), alpha=self.scale)

    def _product(self, hidden: Tensor) -> Tensor:
        weight, dtype = self.weight, self.dtype
        if weight.dtype == dtype:
            return hidden @ weight.T
        if weight.is_cuda:
            return torch.mm(hidden, weight.T, out_dtype=dtype)
        hidden = hidden.to(dtype)
        out = hidden.new_empty(hidden.shape[0], weight.shape[0])
        for a, b in self._blocks():
            out[:, a:b] = hidden @ weight[a:b].to(dtype).T
        return out

    def _blocks(self) -> list[tuple[int, int]]:
        rows = max(1, _BLOCK_BYTES // (self.weight.shape[1] * self.dtype.itemsize))
        return list(spans(self.weight.shape[0], rows))
