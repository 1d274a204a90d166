"""The PyTorch top-k looks at the largest entries of groups first: ties, NaN and what is left of the last group."""

from __future__ import annotations

import pytest
import torch

from grade_kernels import reference
from grade_kernels.torch_ops.topk import topk_ids

ROWS = {
    "random": lambda x: x,
    "ties": lambda x: (4 * x).round(),
    "zeros of both signs": lambda x: 0.0 * x,
    "masked": lambda x: x.index_fill(1, torch.arange(x.shape[1] // 2), -torch.inf),
    "side by side at the end": lambda x: x + 50.0 * (torch.arange(x.shape[1]) >= x.shape[1] - 4),
    "NaN and infinite": lambda x: x.index_fill(1, torch.tensor([x.shape[1] // 2]), torch.nan).clamp_max(1.0) / 0.0,
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("suppressed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("vocab", "k"), [(64, 1), (100, 4), (1023, 5), (1000, 50), (4099, 16)])
def test_groups_change_nothing(vocab, k, dtype, suppressed, rows):
    """Groups of 4 entries and more, most with some entries left over."""
    assert vocab // (k + 1) >= 16  # fewer are not divided
    logits = ROWS[rows](torch.randn(4, vocab)).to(dtype)
    suppress = torch.tensor([0, vocab // 3, vocab - 1]) if suppressed else None
    assert torch.equal(topk_ids(logits, k, suppress), reference.topk(logits, k, suppress))
