"""The suppressed ids as a bitmap, which a kernel asks once per entry or per candidate."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Bits used of each int32 word: 16, so that no sum of them reaches the sign bit.
_BITS = 16


def suppress_bits(suppress: Tensor | None, vocab: int, device: torch.device) -> Tensor | None:
    """int32 [ceil(vocab / 16)], bit (id & 15) of word id >> 4 set where id is in `suppress` (int64 [m]).

    None where there is nothing to suppress.  Does not wait for the device.
    """
    if suppress is None:
        return None
    flags = torch.zeros(-(-vocab // _BITS) * _BITS, dtype=torch.int32, device=device)
    flags.index_fill_(0, suppress, 1)
    return (flags.view(-1, _BITS) << torch.arange(_BITS, dtype=torch.int32, device=device)).sum(1, dtype=torch.int32)


@triton.jit
def is_blocked(bits, ids):
    """Whether each of ids (int32 or int64, any shape, all within the vocabulary) is in the bitmap."""
    word = tl.load(bits + (ids >> 4))
    return ((word >> (ids & 15).to(tl.int32)) & 1) != 0
