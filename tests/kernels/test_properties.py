"""Properties of the PyTorch path over inputs that hypothesis draws, which a GPU's machine need not have."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import HALF

from grade_kernels import gumbel_topk, logits_kl, reference


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_support_property(data):
    vocab = data.draw(st.integers(1, 40))
    k = data.draw(st.integers(1, vocab))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, *HALF]))
    values = st.sampled_from([-torch.inf, -3.0, -0.0, 0.0, 0.5, 0.5009765625, 7.0])
    rows = data.draw(st.lists(st.lists(values, min_size=vocab, max_size=vocab), min_size=1, max_size=4))
    suppress = data.draw(st.lists(st.integers(0, vocab - 1), max_size=5))
    logits = torch.tensor(rows, dtype=dtype)
    result = gumbel_topk(logits, k, seed=1, suppress=suppress)
    expected = reference.topk(logits.double(), k, torch.tensor(suppress, dtype=torch.int64))
    assert torch.equal(result.indices, expected)
    assert (result.indices == result.tokens[:, None]).any(-1).all()
    allowed = ~torch.isin(result.indices, torch.tensor(suppress, dtype=torch.int64))
    alive = (allowed & (logits.gather(-1, result.indices) > -torch.inf)).any(-1)
    assert torch.isfinite(result.weights[alive]).all()
    assert (result.weights[alive][~allowed[alive]] == 0).all()


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_never_negative_and_right(data):
    vocab = data.draw(st.integers(1, 12))
    row = st.lists(st.floats(-100, 100, width=32), min_size=vocab, max_size=vocab)
    a, b = torch.tensor([data.draw(row)]), torch.tensor([data.draw(row)])
    if data.draw(st.booleans()):
        b = a + 1e-3 * b
    ours = logits_kl(a, b)
    assert ours >= 0
    torch.testing.assert_close(ours.double(), reference.kl(a.double(), b.double()), rtol=3e-5, atol=1e-9)
