"""The head of a language model: its parts, and its product on a chunk of rows, forwards and backwards."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grade_kernels.common import checks
from grade_kernels.common.chunks import spans
from grade_kernels.common.cpu_products import product, takes_onednn, weight_first

# A 16-bit weight is widened on a CPU this many bytes at a time.  That repeats for every row chunk, but costs little
# beside the product (one pass over the block against one per row), where a widened copy of the whole
# weight would be the largest tensor around.
_BLOCK_BYTES = 2**25
# As many rows a CPU's BLAS multiplies up to twice as fast with the long weight on the left, copy included.
_FEW_ROWS = (4, 32)


def through_softcap(d_logits: Tensor, logits: Tensor, softcap: float | None) -> Tensor:
    """Gradient before the soft cap, in place: d_logits * (1 - (logits / cap)^2)."""
    if softcap is None:
        return d_logits
    # A candidate blocked with -inf would make 0 * -inf; it counts as saturated.
    return d_logits.mul_(1.0 - (logits / softcap).clamp(-1.0, 1.0).square_())


def split_product(x: Tensor, weight: Tensor, mm: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """x @ weight in float32 for float32 x [r, v] and a 16-bit weight [v, d], by a 16-bit product of twice the rows.

    x is cut into a 16-bit number and the 16-bit rest, which keeps 16 (bf16) or 21 (fp16) of its bits, at the
    speed of a GPU's matrix units; rounding it to 16 bits once would keep 8 or 11.  fp16 has a short exponent, so
    its rows are scaled by powers of two to about 1.  `mm` multiplies 16-bit matrices into float32.  It
    takes memory for both halves, together as much as x, and for their products, [2 r, d] in float32.
    """
    halves = torch.empty(2, *x.shape, dtype=weight.dtype, device=x.device)
    high, minus_low = halves.unbind()
    scale = None
    if weight.dtype == torch.float16:
        peak = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True)
        power = torch.exp2(peak.log2().ceil().clamp(-126, 127))  # one that has an inverse
        scale = torch.where(peak.isfinite() & (peak > 0), power, 1.0)
        torch.div(x, scale, out=high)
        torch.addcmul(high, x, scale.reciprocal(), value=-1, out=minus_low)
    else:
        high.copy_(x)
        torch.sub(high, x, out=minus_low)
    products = mm(halves.flatten(0, 1), weight).view(2, x.shape[0], weight.shape[1])
    top, rest = products.unbind()
    out = top.sub_(rest)
    return out if scale is None else out.mul_(scale)


def _mm_float32(x: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(x, weight, out_dtype=torch.float32)


@dataclass(frozen=True, eq=False)  # tensors have no one answer
class Head:
    """The head of a language model: logits = softcap * tanh((scale * hidden @ weight.T + bias) / softcap).

    Logits and gradients are in float32, even from 16-bit operands (float64 for a float64 weight).

    Parameters
    ----------
    weight : float [V, d]
    bias : float [V], optional
        May be of a wider dtype than `weight`.
    scale : float
        Logit scale (Cohere, Granite).
    softcap : float, optional
        Soft cap of the logits (Gemma 2), > 0; None for no tanh.

    Raises
    ------
    TypeError, ValueError
        On wrong dtypes, shapes, devices or numbers.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        checks.check_table("weight", self.weight)
        if self.bias is not None:
            checks.check_float("bias", self.bias)
            checks.check_shape("bias", self.bias, self.weight.shape[:1])
            checks.check_device("bias", self.bias, self.weight.device)
        if isinstance(self.scale, Tensor):
            raise TypeError("scale must be a python number, not a tensor: reading one waits for the device")
        if not -math.inf < self.scale < math.inf:
            raise ValueError(f"scale must be a finite number, got {self.scale}")
        if self.softcap is not None:
            checks.check_positive("softcap", self.softcap)

    @property
    def dtype(self) -> torch.dtype:
        """What logits and gradients are computed in: float32, or float64 for a float64 weight."""
        return checks.compute_dtype(self.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [r, d] -> logits [r, V], never rounded to 16 bits."""
        return self.finish(self._product(hidden))

    def finish(self, product: Tensor) -> Tensor:
        """Logits [r, V], in place, from product = hidden @ weight.T."""
        if self.scale != 1.0:
            product *= self.scale
        if self.bias is not None:
            product += self.bias.to(product.dtype)
        if self.softcap is not None:
            product.div_(self.softcap).tanh_().mul_(self.softcap)
        return product

    def grad_hidden(self, d_raw: Tensor) -> Tensor:
        """d_raw [r, V] (before the soft cap) -> d hidden [r, d] in `dtype`."""
        if self.weight.dtype == d_raw.dtype:
            out = product(d_raw, self.weight.T)
        elif self.weight.is_cuda:
            out = split_product(d_raw, self.weight, _mm_float32)
        else:
            out = d_raw.new_zeros(d_raw.shape[0], self.weight.shape[1])
            for a, b in self._blocks():
                out += product(d_raw[:, a:b], self.weight[a:b].to(d_raw.dtype).T)
        return out.mul_(self.scale)

    def add_grad_weight(self, d_raw: Tensor, hidden: Tensor, out: Tensor) -> None:
        """out [V, d] += scale * d_raw.T @ hidden."""
        out.addmm_(d_raw.T, hidden.to(out.dtype), alpha=self.scale)

    def _product(self, hidden: Tensor) -> Tensor:
        weight, dtype = self.weight, self.dtype
        if weight.dtype == dtype:
            few = weight.device.type == "cpu" and _FEW_ROWS[0] <= hidden.shape[0] <= _FEW_ROWS[1]
            if few and not takes_onednn(hidden, weight):
                return weight_first(hidden, weight)
            return product(hidden, weight)
        if weight.is_cuda:
            return _mm_float32(hidden, weight.T)
        hidden = hidden.to(dtype)
        out = hidden.new_empty(hidden.shape[0], weight.shape[0])
        for a, b in self._blocks():
            out[:, a:b] = product(hidden, weight[a:b].to(dtype))
        return out

    def _blocks(self) -> list[tuple[int, int]]:
        rows = max(1, _BLOCK_BYTES // (self.weight.shape[1] * self.dtype.itemsize))
        return list(spans(self.weight.shape[0], rows))


def check_is_head(name: str, head: Head) -> None:
    if not isinstance(head, Head):
        raise TypeError(f"{name} must be a Head, got {type(head).__name__}; wrap the weight in Head(weight)")


def check_hidden(name: str, hidden: Tensor, head: Head, head_name: str = "head") -> None:
    """hidden [..., d] fits the head: its width, dtype and device are those of the weight."""
    check_is_head(head_name, head)
    weight = head.weight
    checks.check_float(name, hidden)
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"{name} has width {hidden.shape[-1]}, but {head_name}.weight has rows of {weight.shape[1]}")
    checks.check_device(f"{head_name}.weight", weight, hidden.device)
    if weight.dtype != hidden.dtype:
        raise TypeError(
            f"{name} is {hidden.dtype} but {head_name}.weight is {weight.dtype}; convert {name} with "
            f".to({head_name}.weight.dtype) (the products come out in float32 either way)"
        )
