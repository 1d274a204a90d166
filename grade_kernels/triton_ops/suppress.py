"""The suppressed ids as a bitmap, which a kernel asks once per entry or per candidate."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grade_kernels.triton_ops.launch import launch

# Bits used of each int32 word: 16, so that the adjacent ids of a vector load share a word.
_BITS = 16
_IDS = 128  # of a program


def suppress_bits(suppress: Tensor | None, vocab: int, device: torch.device) -> Tensor | None:
    """int32 [ceil(vocab / 16)], bit (id & 15) of word id >> 4 set where id is in `suppress` (int64 [m]).

    None where there is nothing to suppress.  Does not wait for the device.
    """
    if suppress is None:
        return None
    bits = torch.zeros(-(-vocab // _BITS), dtype=torch.int32, device=device)
    ids = suppress.contiguous()
    launch(_set_bits_kernel, (-(-ids.numel() // _IDS),), bits, ids, ids.numel(), vocab, num_warps=4, IDS=_IDS)
    return bits


@triton.jit(do_not_specialize=["n"])
def _set_bits_kernel(bits, ids, n, vocab, IDS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * IDS + tl.arange(0, IDS)
    inside = at < n
    these = tl.load(ids + at, mask=inside, other=0)
    inside &= (these >= 0) & (these < vocab)  # no store outside, whatever the caller passes
    tl.atomic_or(bits + (these >> 4), (tl.full([IDS], 1, tl.int32) << (these & 15).to(tl.int32)), mask=inside)


@triton.jit
def is_blocked(bits, ids):
    """Whether each of ids (int32 or int64, any shape, all within the vocabulary) is in the bitmap."""
    word = tl.load(bits + (ids >> 4))
    return ((word >> (ids & 15).to(tl.int32)) & 1) != 0
