"""The Triton path of KL: against float64 and the PyTorch path, masks, underflow, gradients, addressing."""

import math

import pytest
import torch
from kernel_checks import HALF, assert_no_worse, rel_err

from grade_kernels import linear_kl, logits_kl, logits_kl_with_grads, reference, token_logprob
from grade_kernels.torch_ops import kl as torch_kl
from grade_kernels.triton_ops import kl as triton_kl

DIRECTIONS = ["policy_ref", "ref_policy"]
INF = torch.inf
# A tile is 256 lanes of 16 entries: fewer entries than lanes, both sides of one tile, one lane more than two.
TILE = 4096
VOCABS = [1, 7, 300, TILE - 1, TILE, TILE + 1, 2 * TILE + 16]


def bregman(p, q):
    """KL(p || q) in float64, written so that float64 loses nothing where the two are nearly equal."""
    p, q = p.double(), q.double()
    logp, logq = p.log_softmax(-1), q.log_softmax(-1)
    x = torch.where((p == -INF) & (q == -INF), 0.0, logq - logp)
    terms = torch.where(p == -INF, logq.exp(), logp.exp() * (x.expm1() - x))
    return terms.sum(-1)


def bregman_grads(p, q):
    """(dKL/dp_logits, dKL/dq_logits) in float64."""
    logp, logq = p.double().log_softmax(-1), q.double().log_softmax(-1)
    x = logq - logp
    return -logp.exp() * (x + bregman(p, q)[..., None]), logp.exp() * x.expm1()


def exact_kl(a, b, direction):
    a, b = a.detach().double().requires_grad_(), b.detach().double().requires_grad_()
    value = reference.kl(a, b, direction)
    return (value.detach(), *torch.autograd.grad(value.sum(), (a, b)))


def torch_path(p, q, weights=None, softcap=None):
    """(stats, d_p, d_q) of the PyTorch path, gradients in float32."""
    stats = torch_kl.kl_stats(p, q, torch.float32)
    outs = [torch.empty(x.shape, device=x.device) for x in (p, q)]
    torch_kl.kl_grads(p, q, stats, weights, *outs, softcap)
    return stats, *outs


def triton_path(p, q, weights=None, softcap=None):
    stats = triton_kl.kl_stats(p, q, torch.float32)
    outs = [torch.empty(x.shape, device=x.device) for x in (p, q)]
    triton_kl.kl_grads(p, q, stats, weights, *outs, softcap)
    return stats, *outs


@pytest.mark.parametrize("vocab", VOCABS)
def test_sizes(vocab, device):
    p, q = (torch.randn(3, vocab) * 3).to(device), (torch.randn(3, vocab) * 3).to(device)
    ours, plain = triton_path(p, q), torch_path(p, q)
    exact = (bregman(p, q), *bregman_grads(p, q))
    if vocab == 1:
        assert all((x == 0).all() for x in (ours[0].kl, *ours[1:]))
    else:
        assert_no_worse(ours[0].kl, plain[0].kl, exact[0])
        assert_no_worse(ours[2], plain[2], exact[2])
        # p (x + KL): x = q - p - shift is rounded where its parts are large, and its sum with KL may be small, which
        # no float32 formula of two log-probabilities escapes.
        parts = p.double().abs() + q.abs() + (ours[0].shift.abs() + exact[0])[:, None]
        bound = torch.finfo(torch.float32).eps * (p.double().softmax(-1) * parts).amax()
        assert (ours[1] - exact[1]).abs().max() <= bound
        assert (plain[1] - exact[1]).abs().max() <= bound
    for mine, logits in ((ours[0].lse_p, p), (ours[0].lse_q, q)):
        torch.testing.assert_close(mine.double(), logits.double().logsumexp(-1), rtol=3e-7, atol=3e-7)
    shift = q.double().logsumexp(-1) - p.double().logsumexp(-1)
    torch.testing.assert_close(ours[0].shift.double(), shift, rtol=3e-7, atol=3e-6)


def test_gradient_programs_cover_the_row(device):
    # A program of the gradient kernel takes 16384 entries: one entry more, so the last program has one.
    p = torch.randn(2, 16385).to(device)
    q = p + torch.randn(2, 16385).to(device)
    for mine, exact in zip(triton_path(p, q)[1:], bregman_grads(p, q), strict=True):
        assert rel_err(mine, exact) < 2e-6


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_no_worse_than_plain_pytorch(dtype, direction, device):
    a = torch.randn(2, 5000).mul(2).to(device, dtype).requires_grad_()
    b = torch.randn(2, 5000).mul(2).to(device, dtype).requires_grad_()
    value, *exact = exact_kl(a, b, direction)
    ours, plain = logits_kl(a, b, direction), reference.kl(a, b, direction)
    assert ours.dtype == torch.float32
    assert_no_worse(ours, plain, value)
    mine = torch.autograd.grad(ours.sum(), (a, b))
    theirs = torch.autograd.grad(plain.sum(), (a, b))
    for m, t, e in zip(mine, theirs, exact, strict=True):
        assert m.dtype == dtype
        assert_no_worse(m, t, e)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1.0, 50.0])
def test_identical_inputs_give_exactly_zero(dtype, direction, scale, device):
    a = (scale * torch.randn(2, TILE + 9)).to(device, dtype)
    a[1, ::2] = -INF
    x, y = a.clone().requires_grad_(), a.clone().requires_grad_()
    value = logits_kl(x, y, direction)
    assert (value == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(value.sum(), (x, y)))


@pytest.mark.parametrize("offset", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("step", [1.0, 1e-1, 1e-3, 1e-5])
def test_nearly_equal_inputs_keep_their_digits(step, offset, device):
    """Down to 1e-11 nats, also where one side is shifted: as far as the logits themselves hold the digits."""
    p = (3 * torch.randn(2, 9000)).to(device)
    q = p + step * torch.randn(2, 9000).to(device) + offset
    ours, plain = triton_path(p, q), torch_path(p, q)
    exact = (bregman(p, q), *bregman_grads(p, q))
    if offset == 0.0:
        torch.testing.assert_close(ours[0].kl.double(), exact[0], rtol=1e-6, atol=0)
    for mine, theirs, judge in zip((ours[0].kl, *ours[1:]), (plain[0].kl, *plain[1:]), exact, strict=True):
        # Where the difference of the logits is itself rounded, both paths carry the same error.
        errors = [float((x.double() - judge).norm() / judge.norm()) for x in (mine, theirs)]
        assert errors[0] <= 1.2 * errors[1] + 1e-6, errors


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", HALF)
def test_policy_close_to_the_reference_in_half_precision(dtype, direction, device):
    """Most logits equal, some one rounding apart: 1e-4 nats."""
    base = 4 * torch.randn(2, 6000)
    a = base.to(device, dtype)
    b = (base * (1 + 1e-3 * torch.randn(2, 6000))).to(device, dtype)
    p, q = (a, b) if direction == "policy_ref" else (b, a)
    stats, d_p, d_q = triton_path(p, q)
    theirs = torch_path(p, q)
    value = bregman(p, q)
    assert 1e-6 < value.min() and value.max() < 1e-2
    torch.testing.assert_close(stats.kl.double(), value, rtol=1e-6, atol=0)
    for mine, plain, exact in zip((d_p, d_q), theirs[1:], bregman_grads(p, q), strict=True):
        assert_no_worse(mine, plain, exact)
        assert float((mine - exact).norm() / exact.norm()) < 1e-6  # where a percent was asked for
    x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
    rounded = torch.autograd.grad(logits_kl(x, y, direction).sum(), (x, y))
    exact = bregman_grads(p, q)
    for mine, judge in zip(rounded, exact if direction == "policy_ref" else exact[::-1], strict=True):
        if dtype == torch.bfloat16:  # float16 gradients of 1e-8 underflow whatever computes them
            assert ((mine.double() - judge).norm(dim=-1) / judge.norm(dim=-1)).max() < 0.01


@pytest.mark.parametrize("noise", [0.5, 1e-2])
@pytest.mark.parametrize("place", [0, 5, TILE + 3, 2 * TILE + 1])
def test_peaked_rows(place, noise, device):
    """Nearly all mass on one entry, in the first tile or a later one, with a difference of its own there."""
    p = (3 * torch.randn(3, 2 * TILE + 5)).to(device)
    p[:, place] = torch.tensor([12.0, 25.0, 80.0]).to(device)
    q = p + noise * torch.randn(3, p.shape[1]).to(device)
    q[:, place] += 0.125
    stats, *grads = triton_path(p, q)
    theirs = torch_path(p, q)
    exact = bregman(p, q)
    assert (stats.kl >= 0).all()
    # A divergence of e^-80 has the error of its exponent: 80 roundings.
    torch.testing.assert_close(stats.kl.double(), exact, rtol=80 * 2**-24, atol=1e-38)
    for mine, plain, judge in zip(grads, theirs[1:], bregman_grads(p, q), strict=True):
        assert_no_worse(mine, plain, judge)


def test_masses_that_move_the_centre_far(device):
    """Each tile outweighs all before it, and its differences lie elsewhere."""
    steps = torch.arange(4 * TILE) // TILE
    p = (torch.randn(2, 4 * TILE) + 15.0 * steps).to(device)
    q = p + (torch.randn(2, 4 * TILE) * 0.1 + torch.tensor([3.0, -2.0, 20.0, 1.0])[steps]).to(device)
    for first, second in ((p, q), (q, p)):
        stats, *grads = triton_path(first, second)
        torch.testing.assert_close(stats.kl.double(), bregman(first, second), rtol=2e-6, atol=0)
        for mine, exact in zip(grads, bregman_grads(first, second), strict=True):
            assert rel_err(mine, exact) < 5e-6


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_huge_logits(direction, device):
    a, b = (1e4 * torch.randn(2, 2, 5000)).to(device).unbind()
    x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
    ours = logits_kl(x, y, direction)
    value, *exact = exact_kl(a, b, direction)
    torch.testing.assert_close(ours.double(), value, rtol=1e-6, atol=0)
    for mine, judge in zip(torch.autograd.grad(ours.sum(), (x, y)), exact, strict=True):
        torch.testing.assert_close(mine.double(), judge, rtol=1e-5, atol=1e-30)
    near = a + torch.randn(2, 5000).to(device)
    first, second = (a, near) if direction == "policy_ref" else (near, a)
    exact = bregman(first, second)
    torch.testing.assert_close(logits_kl(a, near, direction).double(), exact, rtol=1e-5, atol=1e-38)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("gap", [30.0, 95.0, 120.0, 500.0, 3e4])
def test_underflow(gap, direction, device):
    """Probabilities that underflow on either side, or on both (0 log 0)."""
    a = torch.tensor([[0.0, -gap, -gap, 1.0], [0.0, -gap, 0.5, 1.0], [0.0, -gap, -gap, -gap]]).to(device)
    b = torch.tensor([[0.5, -gap, 1.0, 1.0], [0.0, -gap + 1, -gap, 1.0], [-gap, 0.0, -gap, -gap]]).to(device)
    # once in one lane each, once with four entries of a lane
    for wide in (False, True):
        if wide:
            a, b = (x.repeat_interleave(4 * 256, 1) for x in (a, b))
        x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
        ours = logits_kl(x, y, direction)
        value, *exact = exact_kl(a, b, direction)
        torch.testing.assert_close(ours.double(), value, rtol=1e-6, atol=0)
        for mine, judge in zip(torch.autograd.grad(ours.sum(), (x, y)), exact, strict=True):
            torch.testing.assert_close(mine.double(), judge, rtol=2e-6, atol=1e-7 * float(judge.abs().max()))


@pytest.mark.parametrize("mask", [-1e4, -1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("every", [3, 4])  # 4: the first entry of each lane and more
def test_finite_masks_on_one_side(every, mask, device):
    p = 3 * torch.randn(2, TILE + 40)
    q = p + 0.1 * torch.randn(2, TILE + 40)
    masked = p.clone()
    masked[:, ::every] = mask
    p, q, masked = (x.to(device) for x in (p, q, masked))
    # p masked; q masked, at 1e4 nats and more; q masked where p is as unlikely
    unlikely = p.clone()
    unlikely[:, ::every] -= 30.0
    for first, second in ((masked, q), (p, masked), (unlikely, masked)):
        stats, *grads = triton_path(first, second)
        if first is masked:  # log q - log p overflows the other form
            value, *exact = exact_kl(first, second, "policy_ref")
        else:
            value, exact = bregman(first, second), bregman_grads(first, second)
        torch.testing.assert_close(stats.kl.double(), value, rtol=3e-6, atol=0)
        torch.testing.assert_close(stats.lse_q.double(), second.double().logsumexp(-1), rtol=3e-7, atol=3e-7)
        for mine, judge in zip(grads, exact, strict=True):
            # Where a few entries make up the divergence the shift is small beside KL, but has the roundings of KL.
            bound = 5e-6 * judge.abs().amax(-1) + 8 * 2**-23 * value
            assert ((mine - judge).abs().amax(-1) <= bound).all()


def mask_cases(vocab, device):
    p, q = torch.randn(8, vocab), torch.randn(8, vocab)
    q[:5] = p[:5] + 0.01 * torch.randn(5, vocab)
    p[0, ::3] = -INF  # p only
    p[1, ::3] = q[1, ::3] = -INF  # both: does not count
    q[2, -1] = -INF  # q only: infinite
    p[3, 1:] = q[3, 1:] = -INF  # one entry left
    p[4, -1], q[4, -1] = -400.0, -INF  # infinite, though p underflows
    p[5, : vocab // 2] = -INF  # disjoint
    q[5, vocab // 2 :] = -INF
    p[6, ::5], q[6, ::2] = -INF, -INF
    return p.to(device), q.to(device)


@pytest.mark.parametrize("vocab", [40, TILE + 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_as_on_the_pytorch_path(vocab, dtype, device):
    p, q = (x.to(dtype) for x in mask_cases(vocab, device))
    (ours, *mine), (theirs, *plain) = triton_path(p, q), torch_path(p, q)
    assert ours.kl.isinf().tolist() == [False, False, True, False, True, True, True, False]
    finite = ~ours.kl.isinf()
    torch.testing.assert_close(ours.kl.double()[finite], bregman(p, q)[finite], rtol=2e-6, atol=0)
    for name in ("kl", "lse_p", "lse_q"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=2e-6, atol=1e-6)
    shift = q.double().logsumexp(-1) - p.double().logsumexp(-1)
    torch.testing.assert_close(ours.shift.double(), shift, rtol=1e-6, atol=3e-6)
    torch.testing.assert_close(mine[0][finite], plain[0][finite], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mine[1], plain[1], rtol=1e-4, atol=1e-6)


def test_rows_that_have_no_divergence(device):
    """All masked, NaN or +inf: marked as on the PyTorch path, and only there."""
    p, q = torch.randn(8, 600).to(device), torch.randn(8, 600).to(device)
    clean = logits_kl(p, q)
    p[0] = -INF
    q[1] = -INF
    p[2] = q[2] = -INF
    p[3, 599], q[4, 3] = torch.nan, torch.nan
    p[5, 3], q[6, 599] = INF, INF
    ours = logits_kl(p, q)
    theirs = torch_kl.kl_stats(p, q, torch.float32).kl
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert ours[:3].isinf().all() and ours[3:7].isnan().all()
    assert torch.equal(ours[7], clean[7])
    _, d_p, d_q = triton_path(p, q)
    assert d_p[3:7].isnan().all() and d_q[3:7].isnan().all()


def test_an_infinite_row_of_weight_zero_spoils_nothing(device):
    a = torch.tensor([[0.0, 1.0], [0.0, 1.0]], device=device, requires_grad=True)
    b = torch.tensor([[0.0, -INF], [0.0, 0.5]], device=device, requires_grad=True)
    d_a, d_b = torch.autograd.grad(logits_kl(a, b), (a, b), torch.tensor([0.0, 1.0], device=device))
    assert (d_a[0] == 0).all() and (d_b[0] == 0).all()
    assert torch.isfinite(d_a).all() and torch.isfinite(d_b).all() and (d_a[1] != 0).all()


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_row_weights_and_soft_cap(softcap, device):
    p, q = torch.randn(3, 700).mul(4).clamp(-4.9, 4.9).to(device), torch.randn(3, 700).to(device)
    p[0, 3] = -INF  # counts as saturated
    weights = torch.tensor([0.5, 0.0, -2.0]).to(device)
    ours, plain = triton_path(p, q, weights, softcap), torch_path(p, q, weights, softcap)
    for mine, theirs in zip(ours[1:], plain[1:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-8)
        assert (mine[1] == 0).all()


@pytest.mark.parametrize("sides", [(True, False), (False, True), (True, True)])
def test_gradients_may_overwrite_the_logits(sides, device):
    p, q = torch.randn(3, 5000).to(device), torch.randn(3, 5000).to(device)
    stats, *expected = triton_path(p, q)
    kept = p.clone(), q.clone()
    triton_kl.kl_grads(p, q, stats, None, *(x if side else None for x, side in zip((p, q), sides, strict=True)))
    for x, before, grad, side in zip((p, q), kept, expected, sides, strict=True):
        assert torch.equal(x, grad if side else before)


def test_stats_of_a_chunk_of_rows(device):
    """Rows of larger tensors: what linear_kl passes."""
    p, q = torch.randn(5, 100).to(device), torch.randn(5, 100).to(device)
    stats, d_p, _ = triton_path(p, q)
    out, weights = torch.empty_like(p[1:4]), torch.ones(1, device=device).expand(3)
    triton_kl.kl_grads(p[1:4], q[1:4], stats.rows(1, 4), weights, out, None)
    assert torch.equal(out, d_p[1:4])


@pytest.mark.parametrize("leading", [(), (0,), (5,), (2, 3), (2, 0)])
def test_leading_shapes(leading, device):
    a, b = torch.randn(2, *leading, 33).to(device).requires_grad_().unbind()
    ours = logits_kl(a, b)
    assert ours.shape == leading
    torch.testing.assert_close(ours.double(), bregman(a, b), rtol=1e-6, atol=1e-7)
    mine = torch.autograd.grad(ours.sum(), (a, b))
    assert all(g.shape == a.shape for g in mine)


def test_strides_and_mixed_dtypes(device):
    a, b = torch.randn(3, 4, 50).to(device), torch.randn(3, 4, 50).to(device)
    expected = bregman(a, b)
    views = {
        "slice": lambda x: x[:, :-1],
        "transposed": lambda x: x.transpose(0, 1),
        "column-major": lambda x: x.mT.contiguous().mT,
        "three groups": lambda x: x.view(3, 2, 2, 50).permute(2, 0, 1, 3),
    }
    for name, view in views.items():
        x, y = view(a).detach().requires_grad_(), view(b).detach().requires_grad_()
        ours = logits_kl(x, y)
        judge = view(expected[..., None].expand(3, 4, 50))[..., 0]
        torch.testing.assert_close(ours.double(), judge, rtol=1e-6, atol=1e-7, msg=name)
        exact = bregman_grads(x, y)
        for mine, theirs in zip(torch.autograd.grad(ours.sum(), (x, y)), exact, strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-7, msg=name)
    row = b[:1, :1].expand(3, 4, 50).detach().requires_grad_()
    ours = logits_kl(a, row)
    torch.testing.assert_close(ours.double(), bregman(a, row), rtol=1e-6, atol=1e-7)
    (mine,) = torch.autograd.grad(ours.sum(), row)
    torch.testing.assert_close(mine.double(), bregman_grads(a, row)[1], rtol=1e-5, atol=1e-7)
    for x, y in ((a, b.bfloat16()), (a.half(), b), (a.half(), b.bfloat16())):
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        ours = logits_kl(x, y)
        torch.testing.assert_close(ours.double(), bregman(x, y), rtol=1e-6, atol=1e-7)
        d_x, d_y = torch.autograd.grad(ours.sum(), (x, y))
        assert (d_x.dtype, d_y.dtype) == (x.dtype, y.dtype)
        for mine, theirs in zip((d_x, d_y), bregman_grads(x, y), strict=True):
            assert rel_err(mine, theirs) < torch.finfo(mine.dtype).eps + 1e-6


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_linear_kl(softcap, shared, device):
    hidden, ref = torch.randn(2, 3, 8).to(device).requires_grad_(), torch.randn(2, 3, 8).to(device).requires_grad_()
    weight, other = torch.randn(70, 8).to(device).requires_grad_(), torch.randn(70, 8).to(device).requires_grad_()
    leaves = (hidden, weight, ref) if shared else (hidden, weight, ref, other)

    def cap(x):
        return x if softcap is None else softcap * torch.tanh(x / softcap)

    for direction in DIRECTIONS:
        ours = linear_kl(
            hidden, weight, ref, None if shared else other, direction, softcap=softcap, chunk_bytes=3 * 4 * 70 * 2
        )
        a, w, b, o = (x.detach().double().requires_grad_() for x in (hidden, weight, ref, other))
        value = reference.kl(cap(a @ w.T), cap(b @ (w if shared else o).T), direction)
        torch.testing.assert_close(ours.double(), value, rtol=1e-5, atol=1e-7)
        exact = torch.autograd.grad(value.sum(), (a, w, b) if shared else (a, w, b, o))
        for mine, judge in zip(torch.autograd.grad(ours.sum(), leaves), exact, strict=True):
            assert rel_err(mine, judge) < 1e-5


def test_custom_ops(device):
    p, q = torch.randn(2, 3, 40).to(device), torch.randn(2, 3, 40).to(device)
    torch.library.opcheck(torch.ops.grade_kernels.kl_stats, (p, q))
    stats = torch.ops.grade_kernels.kl_stats(p, q).unbind()
    for weights, out_p, out_q, cap in (
        (None, torch.zeros(6, 40), torch.zeros(6, 40), None),
        (torch.rand(6), None, torch.zeros(6, 40), 3.0),
    ):
        tensors = (x if x is None else x.to(device) for x in (weights, out_p, out_q))
        torch.library.opcheck(torch.ops.grade_kernels.kl_grads, (p, q, *stats, *tensors, cap))


def test_compiles_into_one_graph(device):
    def divergence(x, y):
        return logits_kl(x[:, :-1], y[:, :-1]).sum()

    x, y = (torch.randn(2, 3, 50).to(device).requires_grad_() for _ in range(2))
    torch._dynamo.reset()
    compiled = torch.compile(divergence, fullgraph=True, backend="aot_eager")(x, y)
    eager = divergence(x, y)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, (x, y)), torch.autograd.grad(eager, (x, y)))


@pytest.mark.parametrize("direction", ["policy_ref", "ref_policy"])
def test_both_gradients_in_one_launch(direction, device):
    """What autograd gives with unit weights; two tiles and a tail, rows with strides, two dtypes."""
    sides = [torch.randn(2, 3, 9000).to(dtype).to(device)[:, :2].requires_grad_() for dtype in (torch.float32, HALF[0])]
    result = logits_kl_with_grads(*sides, direction)
    kl = logits_kl(*sides, direction)
    torch.testing.assert_close(result.kl, kl, rtol=1e-6, atol=0)
    for ours, expected in zip((result.grad, result.ref_grad), torch.autograd.grad(kl.sum(), sides), strict=True):
        assert ours.dtype == expected.dtype
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("p_rest", "q_few"), [(-150.0, -10.0), (-145.0, -6.0), (-142.0, -3.0), (-200.0, -2.0)])
def test_lanes_where_only_one_side_has_mass(p_rest, q_few, device):
    """A lane whose entries are nothing under p, by more than the exponent of a float, and much under q."""
    p = torch.full((1, 1024), p_rest)
    p[0, 0] = 0.0
    q = p.clone()
    q[0, 500:504] = q_few
    exact = reference.kl(p.double(), q.double())
    ours = logits_kl(p.to(device), q.to(device))
    torch.testing.assert_close(ours.cpu().double(), exact, rtol=2e-6, atol=0)


def test_the_lowest_float_as_a_mask(device):
    """finfo.min on both sides does not count, and a row of nothing else is uniform."""
    lowest = torch.finfo(torch.float32).min
    p, q = torch.randn(2, 3, 5000)
    for side in (p, q):
        side[:, ::2] = lowest
    exact = reference.kl(p.double(), q.double())
    torch.testing.assert_close(logits_kl(p.to(device), q.to(device)).cpu().double(), exact, rtol=2e-6, atol=0)
    uniform = torch.full((1, 100), lowest, device=device)
    logprob, entropy = token_logprob(uniform, torch.tensor([3], device=device))
    assert logprob.item() == pytest.approx(-math.log(100)) and entropy.item() == pytest.approx(math.log(100))
