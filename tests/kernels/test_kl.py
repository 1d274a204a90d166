"""logits_kl: against float64, near equality, peaks, gradients, memory."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import HALF, Allocations, assert_no_worse, rel_err
from kl_checks import INF, TILE, assert_stats, judge, stats_and_grads, value_and_grads

from grade_kernels import logits_kl, reference
from grade_kernels.common import chunks

DIRECTIONS = ["policy_ref", "ref_policy"]
# Fewer entries than lanes, both sides of a tile, one lane more than two tiles, one entry more than a gradient program.
VOCABS = [1, 7, 300, TILE - 1, TILE, TILE + 1, 2 * TILE + 16, 4 * TILE + 1]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("leading", [(), (0,), (5,), (2, 3)])
def test_float64_equals_the_textbook(leading, direction):
    a, b = torch.randn(2, *leading, 33, dtype=torch.float64).mul(3).unbind()
    ours = value_and_grads(a, b, direction)
    assert ours[0].shape == leading
    for mine, exact in zip(ours, value_and_grads(a, b, direction, reference.kl), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-11, atol=1e-14)
    value, first, second = judge(*((a, b) if direction == "policy_ref" else (b, a)))
    judged = (value, first, second) if direction == "policy_ref" else (value, second, first)
    torch.testing.assert_close(judged, ours, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("vocab", VOCABS)
def test_sizes(ops, vocab, device):
    p, q = (3 * torch.randn(3, vocab)).to(device), (3 * torch.randn(3, vocab)).to(device)
    stats, d_p, d_q = stats_and_grads(ops, p, q)
    kl, exact_p, exact_q = judge(p, q)
    assert_stats(stats, p, q)
    if vocab == 1:
        assert all((x == 0).all() for x in (stats.kl, d_p, d_q))
        return
    assert rel_err(stats.kl, kl) < 1e-6 and rel_err(d_q, exact_q) < 1e-6
    # p (x + KL): x = q - p - shift is rounded where its parts are large, and its sum with KL may be small, which no
    # float32 formula of two log-probabilities escapes.
    parts = p.double().abs() + q.abs() + (stats.shift.abs() + kl)[:, None]
    assert (d_p - exact_p).abs().max() <= torch.finfo(torch.float32).eps * (p.double().softmax(-1) * parts).amax()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_no_worse_than_plain_pytorch(backend, dtype, direction, device):
    a, b = (torch.randn(4, 5000).mul(2).to(device, dtype) for _ in range(2))
    ours = value_and_grads(a, b, direction)
    plain = value_and_grads(a, b, direction, reference.kl)
    exact = value_and_grads(a.double(), b.double(), direction, reference.kl)
    assert [x.dtype for x in ours] == [torch.float32, dtype, dtype]
    for mine, theirs, truth in zip(ours, plain, exact, strict=True):
        assert_no_worse(mine, theirs, truth)


def test_log_probabilities_are_logits_too():
    """The gradient is q - p and not torch's -p, which is the same once it is pulled back through the log_softmax."""
    logits = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ref = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    logq = logits.log_softmax(-1)
    ours = logits_kl(logq, ref, "ref_policy")
    theirs = torch.nn.functional.kl_div(logq, ref, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    by_input, by_logits = (
        [torch.autograd.grad(x.sum(), y, retain_graph=True)[0] for x in (ours, theirs)] for y in (logq, logits)
    )
    torch.testing.assert_close(by_input[0], logq.exp() - ref.exp(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(by_input[1], -ref.exp(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(*by_logits, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1.0, 50.0])
def test_identical_inputs_give_exactly_zero(backend, dtype, scale, device):
    a = (scale * torch.randn(2, TILE + 9)).to(device, dtype)
    a[1, ::2] = -INF
    assert all((x == 0).all() for x in value_and_grads(a, a))


@pytest.mark.parametrize("offset", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("step", [1.0, 1e-1, 1e-3, 1e-5])
def test_nearly_equal_inputs_keep_their_digits(ops, step, offset, device):
    """Down to 1e-11 nats, logits up to 40, also where one side is shifted: as far as the logits hold the digits."""
    p = (torch.tensor([[3.0], [10.0]]) * torch.randn(2, 9000)).to(device)
    q = p + step * torch.randn(2, 9000).to(device) + offset
    (stats, *grads), (kl, *exact) = stats_and_grads(ops, p, q), judge(p, p.double() + (q - p))
    torch.testing.assert_close(stats.kl.double(), kl, rtol=2e-6, atol=0)
    for mine, truth in zip(grads, exact, strict=True):
        relative = (mine - truth).norm(dim=-1) / truth.norm(dim=-1)
        # The gradients keep the shift of one side, rounded as it is.
        assert (relative < 2e-6 + 1.5 * 2**-24 * offset / step).all(), relative


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", HALF)
def test_nearly_equal_half_logits(backend, ops, dtype, direction, device):
    """Most logits equal, some one rounding apart; plain 16-bit PyTorch is off by whole factors here."""
    base = 4 * torch.randn(2, 6000)
    a, b = base.to(device, dtype), (base * (1 + 1e-3 * torch.randn(2, 6000))).to(device, dtype)
    p, q = (a, b) if direction == "policy_ref" else (b, a)
    (stats, *grads), (kl, *exact) = stats_and_grads(ops, p, q), judge(p, q)
    assert 1e-6 < kl.min() and kl.max() < 1e-2
    torch.testing.assert_close(stats.kl.double(), kl, rtol=1e-6, atol=0)
    for mine, truth in zip(grads, exact, strict=True):
        assert float((mine - truth).norm() / truth.norm()) < 1e-6  # where a percent was asked for
    rounded = value_and_grads(a, b, direction)[1:]
    for mine, truth in zip(rounded, exact if direction == "policy_ref" else exact[::-1], strict=True):
        if dtype == torch.bfloat16:
            assert ((mine.double() - truth).norm(dim=-1) / truth.norm(dim=-1)).max() < 0.01
        else:  # float16 gradients of 1e-8 underflow whatever computes them
            assert (mine.double() - truth).abs().max() < 1e-3 * truth.abs().max()


@pytest.mark.parametrize("noise", [0.5, 1e-2])
@pytest.mark.parametrize("place", [0, 5, TILE + 3, 2 * TILE + 1])
def test_peaked_rows(ops, place, noise, device):
    """Nearly all mass on one entry, in the first tile or a later one, with a difference of its own there."""
    p = (3 * torch.randn(3, 2 * TILE + 5)).to(device)
    p[:, place] = torch.tensor([12.0, 25.0, 80.0]).to(device)
    q = p + noise * torch.randn(3, p.shape[1]).to(device)
    q[:, place] += 0.125
    (stats, *grads), (kl, *exact) = stats_and_grads(ops, p, q), judge(p, q)
    # A divergence of e^-80 has the error of its exponent: 80 roundings.
    torch.testing.assert_close(stats.kl.double(), kl, rtol=80 * 2**-24, atol=1e-38)
    for mine, truth in zip(grads, exact, strict=True):
        assert rel_err(mine, truth) < 1e-6


def test_masses_that_move_the_centre_far(ops, device):
    """Each tile outweighs all before it, and its differences lie elsewhere."""
    steps = torch.arange(4 * TILE) // TILE
    p = (torch.randn(2, 4 * TILE) + 15.0 * steps).to(device)
    q = p + (torch.randn(2, 4 * TILE) * 0.1 + torch.tensor([3.0, -2.0, 20.0, 1.0])[steps]).to(device)
    for first, second in ((p, q), (q, p)):
        (stats, *grads), (kl, *exact) = stats_and_grads(ops, first, second), judge(first, second)
        torch.testing.assert_close(stats.kl.double(), kl, rtol=2e-6, atol=0)
        for mine, truth in zip(grads, exact, strict=True):
            assert rel_err(mine, truth) < 5e-6


def test_huge_logits(backend, device):
    a, b = (1e4 * torch.randn(2, 2, 5000)).to(device).unbind()
    ours, exact = value_and_grads(a, b), judge(a, b)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-6, atol=0)
    for mine, truth in zip(ours[1:], exact[1:], strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=1e-30)
    near = a + torch.randn(2, 5000).to(device)
    for first, second in ((a, near), (near, a)):
        torch.testing.assert_close(logits_kl(first, second).double(), judge(first, second)[0], rtol=1e-5, atol=1e-38)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_row_weights_and_soft_cap(ops, softcap, device):
    p, q = torch.randn(3, 700).mul(4).clamp(-4.9, 4.9).to(device), torch.randn(3, 700).to(device)
    p[0, 3] = -INF  # counts as saturated
    weights = torch.tensor([0.5, 0.0, -2.0]).to(device)
    ours, exact = stats_and_grads(ops, p, q, weights, softcap), judge(p, q)
    for mine, truth, logits in zip(ours[1:], exact[1:], (p, q), strict=True):
        slope = 1.0 if softcap is None else (1 - (logits.double() / softcap) ** 2).clamp(min=0)
        torch.testing.assert_close(mine.double(), weights[:, None] * truth * slope, rtol=1e-5, atol=1e-7)
        assert (mine[1] == 0).all()


@pytest.mark.parametrize("sides", [(True, False), (False, True), (True, True)])
def test_gradients_may_overwrite_the_logits(ops, sides, device):
    p, q = torch.randn(3, 5000).to(device), torch.randn(3, 5000).to(device)
    stats, *expected = stats_and_grads(ops, p, q)
    kept = p.clone(), q.clone()
    ops.kl.kl_grads(p, q, stats, None, *(x if side else None for x, side in zip((p, q), sides, strict=True)))
    for x, before, grad, side in zip((p, q), kept, expected, sides, strict=True):
        assert torch.equal(x, grad if side else before)


def test_stats_of_a_chunk_of_rows(ops, device):
    """Rows of larger tensors: what linear_kl passes."""
    p, q = torch.randn(5, 100).to(device), torch.randn(5, 100).to(device)
    stats, d_p, _ = stats_and_grads(ops, p, q)
    out, weights = torch.empty_like(p[1:4]), torch.ones(1, device=device).expand(3)
    ops.kl.kl_grads(p[1:4], q[1:4], stats.rows(1, 4), weights, out, None)
    assert torch.equal(out, d_p[1:4])


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_the_sides_that_require_it_get_a_gradient(backend, needs, device):
    a, b = (torch.randn(4, 400, device=device, requires_grad=need) for need in needs)
    kept = a.detach().clone(), b.detach().clone()
    with Allocations() as made:
        logits_kl(a, b).sum().backward()
    assert (a.grad is not None, b.grad is not None) == needs
    assert made.largest == 4 * 400
    assert torch.equal(a, kept[0]) and torch.equal(b, kept[1])


def test_forward_keeps_only_scalars_beside_the_inputs(monkeypatch):
    monkeypatch.setattr(chunks, "_PIECE_BYTES_CPU", 4 * 500)  # one row at a time
    a, b = torch.randn(200, 500, requires_grad=True), torch.randn(200, 500)
    with Allocations().ignore(a, b) as made:
        value = logits_kl(a, b)
    assert made.peak < 4 * (12 * 500 + 10 * 200)
    saved = sum(t.numel() for t in value.grad_fn.saved_tensors)
    assert saved == 2 * 200 * 500 + 6 * 200


@pytest.mark.parametrize("leading", [(), (0,), (5,), (2, 3), (2, 0)])
def test_leading_shapes(backend, leading, device):
    a, b = torch.randn(2, *leading, 33).to(device).unbind()
    ours = value_and_grads(a, b)
    assert ours[0].shape == leading and ours[1].shape == ours[2].shape == a.shape
    torch.testing.assert_close(ours[0].double(), judge(a, b)[0], rtol=1e-6, atol=1e-7)


VIEWS = {
    "slice": lambda x: x[:, :-1],
    "transposed": lambda x: x.transpose(0, 1),
    "column-major": lambda x: x.mT.contiguous().mT,
    "three groups": lambda x: x.view(3, 2, 2, 50).permute(2, 0, 1, 3),
    "one row": lambda x: x[:1, :1].expand(3, 4, 50),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strides_and_pieces(backend, view, device, monkeypatch):
    monkeypatch.setattr(chunks, "_PIECE_BYTES_CPU", 4 * 50 * 4)  # of the PyTorch path: pieces that end within a row
    a, b = (torch.randn(3, 4, 50, device=device) for _ in range(2))
    a, b = view(a), view(b)
    for mine, truth in zip(value_and_grads(a, b), judge(a, b), strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float32), (torch.float16, torch.bfloat16)]
)
def test_mixed_dtypes(backend, dtypes, device):
    a, b = (torch.randn(12, 50).to(device, dtype) for dtype in dtypes)
    ours = value_and_grads(a, b)
    assert [x.dtype for x in ours] == [torch.float32, *dtypes]
    for mine, truth in zip(ours, judge(a, b), strict=True):
        assert rel_err(mine, truth) < torch.finfo(mine.dtype).eps + 1e-6


def test_one_double_side_is_enough_for_float64():
    assert logits_kl(torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5).bfloat16()).dtype == torch.float64
