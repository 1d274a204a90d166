"""How many adjacent entries a thread takes at once: the kernels tell the compiler that these are aligned."""

from __future__ import annotations

import pytest
import torch

from grade_kernels.common.stats import KLStats, TokenStats
from grade_kernels.triton_ops import kl, launch, logprob, sweep

pytestmark = pytest.mark.triton
ALIGNED, ODD = (4, 64), (4, 65)


def rows(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[4, 64], in rows that are as far apart as those of a tensor of this shape."""
    return torch.empty(shape, dtype=dtype)[:, :64]


@pytest.mark.parametrize(("vocab", "width"), [(50272, 8), (50264, 8), (50260, 4), (50258, 2), (50257, 1)])
def test_the_width_is_that_of_the_least_aligned_row(vocab, width):
    assert launch.vector_width(torch.empty(3, vocab, dtype=torch.bfloat16)) == width
    assert launch.vector_width(torch.empty(3, vocab)) == min(width, 4)


def test_memory_from_elsewhere_may_begin_anywhere():
    memory = bytearray(4 * 64 * 2 + 16)
    aligned = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % 16
    for begin, width in ((0, 8), (8, 4), (2, 1)):
        offset = (aligned + begin) % 16
        logits = torch.frombuffer(memory, dtype=torch.bfloat16, count=4 * 64, offset=offset).view(4, 64)
        assert logits.storage_offset() == 0
        assert launch.vector_width(logits) == width


def test_what_is_stored_counts_too():
    stats = KLStats.empty(4, torch.float32, torch.device("cpu"))
    p, q, ids = rows(ALIGNED), rows(ALIGNED), torch.zeros(4, dtype=torch.int64)
    narrow = rows(ALIGNED, torch.bfloat16)
    with launch.recording() as made:
        kl.kl_grads(p, q, stats, None, rows(ALIGNED), rows(ALIGNED))
        kl.kl_grads(p, q, stats, None, rows(ODD), None)
        kl.kl_grads(p, narrow, stats, None, rows(ALIGNED), narrow)  # 16 bytes of the wider
        logprob.token_stats_grad(p, ids, TokenStats(*torch.empty(4, 4)), *torch.empty(2, 4), rows(ODD))
        sweep.head_chunk(p, rows(ODD), None, None, None, None, "policy_ref", False, None)
    assert [one.constants["WIDTH"] for one in made] == [4, 1, 4, 1, 1]
