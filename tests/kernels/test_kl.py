"""logits_kl: against float64, near equality, masks, underflow, gradients."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import HALF, Allocations, assert_no_worse, rel_err

from grade_kernels import logits_kl, logits_kl_with_grads, reference
from grade_kernels.common import chunks

DIRECTIONS = ["policy_ref", "ref_policy"]
INF = torch.inf


def grads(loss, *leaves):
    return torch.autograd.grad(loss, leaves)


def exact_kl(a, b, direction):
    """KL and its gradients in float64 by the textbook."""
    a, b = a.detach().double().requires_grad_(), b.detach().double().requires_grad_()
    value = reference.kl(a, b, direction)
    return (value.detach(), *grads(value.sum(), a, b))


def extended_kl(p, q):
    """KL(p || q) of float32 logits [N, V] in the 80-bit floats of numpy.

    As sum of q - p + p log(p/q): the textbook sum would leave an error of 1e-16 nats even so.
    """
    p, q = (t.numpy().astype(np.longdouble) for t in (p, q))
    logp, logq = (x - np.logaddexp.reduce(x, -1, keepdims=True) for x in (p, q))
    x = logq - logp
    return torch.from_numpy((np.exp(logp) * (np.expm1(x) - x)).sum(-1).astype(np.float64))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("leading", [(), (0,), (5,), (2, 3)])
def test_float64_equals_the_textbook(leading, direction):
    a, b = torch.randn(2, *leading, 33, dtype=torch.float64).mul(3).requires_grad_().unbind()
    ours = logits_kl(a, b, direction)
    value, d_a, d_b = exact_kl(a, b, direction)
    assert ours.shape == leading
    torch.testing.assert_close(ours, value, rtol=1e-12, atol=1e-14)
    for mine, theirs in zip(grads(ours.sum(), a, b), (d_a, d_b), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
def test_gradcheck(direction, scale):
    a = (torch.randn(3, 7, dtype=torch.float64) * scale).requires_grad_()
    b = (torch.randn(3, 7, dtype=torch.float64) * scale).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: logits_kl(x, y, direction), (a, b))
    assert torch.autograd.gradcheck(lambda x: logits_kl(x, b.detach(), direction), a)
    assert torch.autograd.gradcheck(lambda y: logits_kl(a.detach(), y, direction), b)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_no_worse_than_plain_pytorch(dtype, direction):
    a = torch.randn(40, 3000).mul(2).to(dtype).requires_grad_()
    b = torch.randn(40, 3000).mul(2).to(dtype).requires_grad_()
    value, d_a, d_b = exact_kl(a, b, direction)
    ours, plain = logits_kl(a, b, direction), reference.kl(a, b, direction)
    assert ours.dtype == torch.float32
    assert_no_worse(ours, plain, value)
    for mine, theirs, exact in zip(
        grads(ours.sum(), a, b), grads(plain.sum(), a, b), (d_a, d_b), strict=True
    ):
        assert mine.dtype == dtype
        assert_no_worse(mine, theirs, exact)


def test_log_probabilities_are_logits_too():
    """The gradient is q - p and not torch's -p, which is the same once it is pulled back through the log_softmax."""
    logits = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ref = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    logq = logits.log_softmax(-1)
    ours = logits_kl(logq, ref, "ref_policy")
    theirs = torch.nn.functional.kl_div(logq, ref, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    by_input, by_logits = ([torch.autograd.grad(x.sum(), y, retain_graph=True)[0] for x in (ours, theirs)]
                           for y in (logq, logits))
    torch.testing.assert_close(by_input[0], logq.exp() - ref.exp(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(by_input[1], -ref.exp(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(*by_logits, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("scale", [0.0, 1.0, 50.0])
def test_identical_inputs_give_exactly_zero(dtype, direction, scale):
    a = (scale * torch.randn(20, 1000)).to(dtype)
    a[3, ::2] = -INF
    x, y = a.clone().requires_grad_(), a.clone().requires_grad_()
    value = logits_kl(x, y, direction)
    assert (value == 0).all()
    assert all((g == 0).all() for g in grads(value.sum(), x, y))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.skipif(np.finfo(np.longdouble).eps > 1e-18, reason="needs 80-bit floats as the judge")
@pytest.mark.parametrize("step", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_nearly_equal_inputs_keep_their_digits(step, direction):
    """The regime of a fresh adapter: KL down to 1e-11 nats in float32, logits up to 40."""
    generator = torch.Generator().manual_seed(1)
    a = 10 * torch.randn(30, 4000, generator=generator)
    b = a + step * torch.randn(30, 4000, generator=generator)
    x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
    ours = logits_kl(x, y, direction)
    first, second = (a, b) if direction == "policy_ref" else (b, a)
    value = extended_kl(first, second)  # float64 has lost digits itself: it is off by 1e-15 nats
    torch.testing.assert_close(ours.double(), value, rtol=2e-6, atol=0)
    _, d_a, d_b = exact_kl(a, b, direction)
    for mine, exact in zip(grads(ours.sum(), x, y), (d_a, d_b), strict=True):
        relative = (mine.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
        # The worst rows put all but 1e-6 of their mass on one token and have gradients of 1e-9.
        assert relative.max() < 1e-3 and relative.median() < 1e-6


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", HALF)
def test_nearly_equal_half_logits(dtype, direction):
    """Most logits equal, some one rounding apart; plain 16-bit PyTorch is off by whole factors here."""
    base = 4 * torch.randn(30, 4000, generator=torch.Generator().manual_seed(2))
    a = base.to(dtype).requires_grad_()
    b = (base * (1 + 1e-3 * torch.randn(30, 4000))).to(dtype).requires_grad_()
    ours = logits_kl(a, b, direction)
    value, d_a, d_b = exact_kl(a, b, direction)
    assert 1e-6 < value.min() and value.max() < 1e-2
    torch.testing.assert_close(ours.double(), value, rtol=1e-5, atol=0)
    for mine, exact in zip(grads(ours.sum(), a, b), (d_a, d_b), strict=True):
        if dtype == torch.bfloat16:  # float16 gradients of 1e-8 underflow whatever computes them
            assert ((mine.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).max() < 0.01
        else:
            assert (mine.double() - exact).abs().max() < 1e-3 * exact.abs().max()


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_never_negative_and_right(data):
    vocab = data.draw(st.integers(1, 12))
    finite = st.floats(-100, 100, width=32)
    row = st.lists(finite, min_size=vocab, max_size=vocab)
    a, b = torch.tensor([data.draw(row)]), torch.tensor([data.draw(row)])
    if data.draw(st.booleans()):
        b = a + 1e-3 * b
    ours = logits_kl(a, b)
    assert ours >= 0
    # The exact value of float32 inputs: float64 with the same Bregman form needs no float32 tolerance.
    exact = reference.kl(a.double(), b.double())
    torch.testing.assert_close(ours.double(), exact, rtol=3e-5, atol=1e-9)


def test_masked_entries():
    # columns: both masked, policy masked, neither
    a = torch.tensor([[-INF, -INF, 1.0, 2.0]], requires_grad=True)
    b = torch.tensor([[-INF, 0.5, 1.5, 1.0]], requires_grad=True)
    value = logits_kl(a, b)
    q = b.detach().double().softmax(-1)[0]
    p = a.detach().double().softmax(-1)[0]
    expected = (p[2:] * (p[2:] / q[2:]).log()).sum()
    torch.testing.assert_close(value[0].double(), expected, rtol=1e-6, atol=0)
    d_a, d_b = grads(value.sum(), a, b)
    assert d_a[0, :2].tolist() == [0, 0] and d_b[0, 0] == 0
    torch.testing.assert_close(d_b[0].double(), q - p, rtol=1e-6, atol=1e-8)
    exact = p[2:] * ((p[2:] / q[2:]).log() - expected)
    torch.testing.assert_close(d_a[0, 2:].double(), exact, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_mass_where_the_other_side_is_masked_is_infinite(dtype):
    a = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, -INF]], dtype=dtype)
    b = torch.tensor([[0.0, -INF], [0.0, 1.0], [0.0, 1.0]], dtype=dtype)
    assert logits_kl(a, b).isinf().tolist() == [True, False, False]
    assert logits_kl(b, a).isinf().tolist() == [False, False, True]
    assert logits_kl(a, b, "ref_policy").isinf().tolist() == [False, False, True]
    # ... also where that mass underflows
    tiny = torch.tensor([[0.0, -300.0]], dtype=dtype)
    assert logits_kl(tiny, torch.tensor([[0.0, -INF]], dtype=dtype)).isinf().all()


def test_an_infinite_row_of_weight_zero_spoils_nothing():
    a = torch.tensor([[0.0, 1.0], [0.0, 1.0]], requires_grad=True)
    b = torch.tensor([[0.0, -INF], [0.0, 0.5]], requires_grad=True)
    d_a, d_b = torch.autograd.grad(logits_kl(a, b), (a, b), torch.tensor([0.0, 1.0]))
    assert (d_a[0] == 0).all() and (d_b[0] == 0).all()
    assert torch.isfinite(d_a).all() and torch.isfinite(d_b).all() and (d_a[1] != 0).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("gap", [30.0, 95.0, 120.0, 500.0, 3e4])
def test_underflow(gap, direction):
    """Probabilities that underflow on either side, or on both (0 log 0)."""
    a = torch.tensor([[0.0, -gap, -gap, 1.0], [0.0, -gap, 0.5, 1.0], [0.0, -gap, -gap, -gap]])
    b = torch.tensor([[0.5, -gap, 1.0, 1.0], [0.0, -gap + 1, -gap, 1.0], [-gap, 0.0, -gap, -gap]])
    x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
    ours = logits_kl(x, y, direction)
    value, d_a, d_b = exact_kl(a, b, direction)
    torch.testing.assert_close(ours.double(), value, rtol=1e-6, atol=0)
    for mine, exact in zip(grads(ours.sum(), x, y), (d_a, d_b), strict=True):
        assert torch.isfinite(mine).all()
        torch.testing.assert_close(mine.double(), exact, rtol=2e-6, atol=1e-7 * float(exact.abs().max()))


def test_nan_stays_in_its_row():
    a, b = torch.randn(3, 9), torch.randn(3, 9)
    clean = logits_kl(a, b)
    for side in (a, b):
        spoilt = side.clone()
        spoilt[1, 4] = torch.nan
        ours = logits_kl(spoilt, b) if side is a else logits_kl(a, spoilt)
        assert ours.isnan().tolist() == [False, True, False]
        assert torch.equal(ours[::2], clean[::2])


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_the_sides_that_require_it_get_a_gradient(needs):
    a, b = torch.randn(50, 400, requires_grad=needs[0]), torch.randn(50, 400, requires_grad=needs[1])
    with Allocations() as made:
        logits_kl(a, b).sum().backward()
    assert (a.grad is not None, b.grad is not None) == needs
    assert made.largest == 50 * 400


def test_forward_keeps_only_scalars_beside_the_inputs(monkeypatch):
    monkeypatch.setattr(chunks, "_PIECE_BYTES_CPU", 4 * 500)  # one row at a time
    a, b = torch.randn(200, 500, requires_grad=True), torch.randn(200, 500)
    with Allocations().ignore(a, b) as made:
        value = logits_kl(a, b)
    assert made.peak < 4 * (12 * 500 + 10 * 200)
    saved = sum(t.numel() for t in value.grad_fn.saved_tensors)
    assert saved == 2 * 200 * 500 + 6 * 200


def test_pieces_strides_and_mixed_dtypes(monkeypatch):
    a, b = torch.randn(6, 9, 50, dtype=torch.float64), torch.randn(6, 9, 50, dtype=torch.float64)
    expected = reference.kl(a, b)
    monkeypatch.setattr(chunks, "_PIECE_BYTES_CPU", 8 * 50 * 4)
    torch.testing.assert_close(logits_kl(a, b), expected)
    torch.testing.assert_close(logits_kl(a[:, :-2], b[:, :-2]), expected[:, :-2])
    turned = logits_kl(a.transpose(0, 1), b.transpose(0, 1))
    torch.testing.assert_close(turned, expected.transpose(0, 1))
    x = a[:, :-2].detach().requires_grad_()
    (grad,) = grads(logits_kl(x, b[:, :-2]).sum(), x)
    torch.testing.assert_close(grad, exact_kl(x, b[:, :-2], "policy_ref")[1])
    half = b.bfloat16()
    mixed = logits_kl(a.float(), half)
    assert mixed.dtype == torch.float32
    assert rel_err(mixed, reference.kl(a.float().double(), half.double())) < 1e-5
    assert logits_kl(a, half).dtype == torch.float64


def test_inputs_stay():
    a, b = torch.randn(4, 30, requires_grad=True), torch.randn(4, 30, requires_grad=True)
    copies = a.detach().clone(), b.detach().clone()
    logits_kl(a, b).sum().backward()
    assert torch.equal(a.detach(), copies[0]) and torch.equal(b.detach(), copies[1])


@pytest.mark.parametrize("direction", ["policy_ref", "ref_policy"])
@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float64), (torch.float32, torch.bfloat16)])
def test_with_grads_is_what_autograd_gives(direction, dtypes):
    sides = [torch.randn(2, 4, 50).to(dtype)[:, :3].requires_grad_() for dtype in dtypes]
    result = logits_kl_with_grads(*sides, direction)
    kl = logits_kl(*sides, direction)
    assert torch.equal(result.kl, kl) and not result.kl.requires_grad
    for ours, expected in zip((result.grad, result.ref_grad), torch.autograd.grad(kl.sum(), sides), strict=True):
        assert ours.dtype == expected.dtype and torch.equal(ours, expected)
