"""Counter-based noise: Philox-4x32-10 keyed by (seed, draw, row, vocabulary id).

The bits are a pure function of the four numbers: they are never stored, they are regenerated where they
are needed, and no batch split, row order, process count or backend changes them.  torch's global random
state is neither read nor written.

Philox is from Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).  The key is the
64-bit seed (low word, high word), the counter is (row low word, row high word, id, draw), as in
`triton.language.philox(seed, row_lo, row_hi, id, draw)`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10 on 32-bit words held in int64 tensors that broadcast against one another.

    `seed` is any python int and wraps at 64 bits.  Returns four int64 tensors of values in [0, 2^32).
    """
    seed = operator.index(seed)  # compiled code has it as a constant: its symbols know no 64 bits
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    if torch.compiler.is_compiling():
        return _philox_without_overflow(k0, k1, c0, c1, c2, c3)
    c0, c1, c2, c3 = (c.clone() for c in torch.broadcast_tensors(c0, c1, c2, c3))
    product0, product1 = torch.empty_like(c0), torch.empty_like(c0)
    for _ in range(_ROUNDS):
        # A product of two 32-bit words wraps in int64 but keeps its 64 bits, so the words can be cut out
        # of it.  c1 and c3 only ever meet an xor, so their upper halves may stay dirty until then.
        torch.mul(c0, _MULTIPLIERS[0], out=product0)
        torch.mul(c2, _MULTIPLIERS[1], out=product1)
        torch.bitwise_right_shift(product1, 32, out=c0).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_MASK)
        torch.bitwise_right_shift(product0, 32, out=c2).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_MASK)
        c1, product1, c3, product0 = product1, c1, product0, c3  # products become words, words scratch
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1.bitwise_and_(_MASK), c2, c3.bitwise_and_(_MASK)


def _philox_without_overflow(k0: int, k1: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> Any:
    # Compiled for a CPU, a product that wraps is undefined behaviour, and the C++ compiler does drop a mask
    # that only such a product needs.
    for _ in range(_ROUNDS):
        high0, low0 = _words(c0, _MULTIPLIERS[0])
        high1, low1 = _words(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return torch.broadcast_tensors(c0, c1, c2, c3)


def _words(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """Upper and lower 32 bits of the product of two 32-bit words, through products of 48 bits."""
    upper, lower = (word >> 16) * multiplier, (word & 0xFFFF) * multiplier
    return (upper + (lower >> 16)) >> 16, (((upper & 0xFFFF) << 16) + lower) & _MASK


def random_bits(seed: int, draw: int, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """64 random bits for every (row, id).

    Parameters
    ----------
    seed : int
        Wraps at 64 bits.
    draw : int
        Wraps at 32 bits.  By convention free sampling uses draw 0 and conditional draws use 1 and up.
    rows : int64 [...]
    ids : int64 [..., k]
        Vocabulary ids, below 2^32.

    Returns
    -------
    (high, low) : int64 [..., k] each
        The upper and the lower 32 bits.
    """
    rows = rows.unsqueeze(-1)
    counter_draw = torch.full((), draw & _MASK, dtype=torch.int64, device=ids.device)
    high, low, _, _ = philox(seed, rows & _MASK, (rows >> 32) & _MASK, ids & _MASK, counter_draw)
    return high, low


def exponential(seed: int, draw: int, rows: Tensor, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Exp(1) noise [..., k] in `dtype` (float32 or float64): -log1p(-u), u = (bits + 0.5) * 2^-64.

    All 64 bits take part, so the small values, which become the upper tail of the Gumbel, go down to
    2^-65 (Gumbel up to 45).  u is clamped below 1, where float32 would round it to 1 and the noise to inf.
    """
    high, low = random_bits(seed, draw, rows, ids)
    u = high.to(dtype).mul_(2.0**-32).add_(low.to(dtype).add_(0.5).mul_(2.0**-64))
    below_one = 1.0 - torch.finfo(dtype).eps / 2
    return u.clamp_(max=below_one).neg_().log1p_().neg_()


def gumbel(seed: int, draw: int, rows: Tensor, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard Gumbel noise [..., k] in `dtype`: -log of `exponential`."""
    return exponential(seed, draw, rows, ids, dtype).log_().neg_()
