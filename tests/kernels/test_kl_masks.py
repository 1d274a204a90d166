"""logits_kl where entries are masked or underflow, and rows that have no divergence."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_checks import HALF
from kl_checks import INF, TILE, assert_stats, judge, stats_and_grads, value_and_grads

from grade_kernels import logits_kl, reference, token_logprob


@pytest.mark.parametrize("direction", ["policy_ref", "ref_policy"])
@pytest.mark.parametrize("gap", [30.0, 95.0, 120.0, 500.0, 3e4])
@pytest.mark.parametrize("wide", [1, 4 * 256])  # each entry in a lane of its own, or in four entries of every lane
def test_underflow(backend, gap, direction, wide, device):
    """Probabilities that underflow on either side, or on both (0 log 0)."""
    a = torch.tensor([[0.0, -gap, -gap, 1.0], [0.0, -gap, 0.5, 1.0], [0.0, -gap, -gap, -gap]])
    b = torch.tensor([[0.5, -gap, 1.0, 1.0], [0.0, -gap + 1, -gap, 1.0], [-gap, 0.0, -gap, -gap]])
    a, b = (x.repeat_interleave(wide, 1).to(device) for x in (a, b))
    ours = value_and_grads(a, b, direction)
    exact = value_and_grads(a.double(), b.double(), direction, reference.kl)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-6, atol=0)
    for mine, truth in zip(ours[1:], exact[1:], strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=2e-6, atol=1e-7 * float(truth.abs().max()))


@pytest.mark.parametrize(("p_rest", "q_few"), [(-150.0, -10.0), (-145.0, -6.0), (-142.0, -3.0), (-200.0, -2.0)])
def test_lanes_where_only_one_side_has_mass(backend, p_rest, q_few, device):
    """A lane whose entries are nothing under p, by more than the exponent of a float, and much under q."""
    p = torch.full((1, 1024), p_rest, device=device)
    p[0, 0] = 0.0
    q = p.clone()
    q[0, 500:504] = q_few
    torch.testing.assert_close(logits_kl(p, q).double(), judge(p, q)[0], rtol=2e-6, atol=0)


@pytest.mark.parametrize("mask", [-1e4, -1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("every", [3, 4])  # 4: the first entry of each lane and more
def test_finite_masks_on_one_side(ops, every, mask, device):
    p = 3 * torch.randn(2, TILE + 40)
    q = p + 0.1 * torch.randn(2, TILE + 40)
    masked, unlikely = p.clone(), p.clone()
    masked[:, ::every] = mask
    unlikely[:, ::every] -= 30.0
    p, q, masked, unlikely = (x.to(device) for x in (p, q, masked, unlikely))
    # p masked; q masked, at 1e4 nats and more; q masked where p is as unlikely
    for first, second in ((masked, q), (p, masked), (unlikely, masked)):
        (stats, *grads), (kl, *exact) = stats_and_grads(ops, first, second), judge(first, second)
        torch.testing.assert_close(stats.kl.double(), kl, rtol=3e-6, atol=0)
        torch.testing.assert_close(stats.lse_q.double(), second.double().logsumexp(-1), rtol=3e-7, atol=3e-7)
        for mine, truth in zip(grads, exact, strict=True):
            # Where a few entries make up the divergence the shift is small beside KL, but has the roundings of KL.
            assert ((mine - truth).abs().amax(-1) <= 5e-6 * truth.abs().amax(-1) + 8 * 2**-23 * kl).all()


def test_the_lowest_float_as_a_mask(backend, device):
    """finfo.min on both sides does not count, and a row of nothing else is uniform."""
    lowest = torch.finfo(torch.float32).min
    p, q = torch.randn(2, 3, 5000, device=device)
    for side in (p, q):
        side[:, ::2] = lowest
    exact = reference.kl(p.double(), q.double())
    torch.testing.assert_close(logits_kl(p, q).double(), exact, rtol=2e-6, atol=0)
    uniform = torch.full((1, 100), lowest, device=device)
    logprob, entropy = token_logprob(uniform, torch.tensor([3], device=device))
    assert logprob.item() == pytest.approx(-math.log(100)) and entropy.item() == pytest.approx(math.log(100))


@pytest.mark.parametrize("vocab", [40, TILE + 40])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_masks(ops, vocab, dtype, device):
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
    p, q = p.to(device, dtype), q.to(device, dtype)
    (stats, d_p, d_q), (kl, exact_p, _) = stats_and_grads(ops, p, q), judge(p, q)
    assert stats.kl.isinf().tolist() == [False, False, True, False, True, True, True, False]
    finite = ~stats.kl.isinf()
    torch.testing.assert_close(stats.kl.double()[finite], kl[finite], rtol=2e-6, atol=0)
    assert_stats(stats, p, q)
    torch.testing.assert_close(d_p[finite].double(), exact_p[finite], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(d_q.double(), q.double().softmax(-1) - p.double().softmax(-1), rtol=1e-4, atol=1e-6)
    assert (d_p[finite][p[finite] == -INF] == 0).all()
    assert (d_q[(p == -INF) & (q == -INF)] == 0).all()


def test_rows_that_have_no_divergence(ops, device):
    """All masked, NaN or +inf: marked so, and only there."""
    p, q = torch.randn(8, 600).to(device), torch.randn(8, 600).to(device)
    clean = ops.kl.kl_stats(p, q, torch.float32).kl
    p[0] = q[1] = p[2] = q[2] = -INF
    p[3, 599], q[4, 3] = torch.nan, torch.nan
    p[5, 3], q[6, 599] = INF, INF
    stats, d_p, d_q = stats_and_grads(ops, p, q)
    assert stats.kl[:3].isposinf().all() and stats.kl[3:7].isnan().all()
    assert torch.equal(stats.kl[7], clean[7])
    assert d_p[3:7].isnan().all() and d_q[3:7].isnan().all()
    assert d_p[7].isfinite().all() and d_q[7].isfinite().all()


def test_an_infinite_row_of_weight_zero_spoils_nothing(backend, device):
    a = torch.tensor([[0.0, 1.0], [0.0, 1.0]], device=device, requires_grad=True)
    b = torch.tensor([[0.0, -INF], [0.0, 0.5]], device=device, requires_grad=True)
    d_a, d_b = torch.autograd.grad(logits_kl(a, b), (a, b), torch.tensor([0.0, 1.0], device=device))
    assert (d_a[0] == 0).all() and (d_b[0] == 0).all()
    assert torch.isfinite(d_a).all() and torch.isfinite(d_b).all() and (d_a[1] != 0).all()
