"""token_logprob: against float64, masks, peaks, gradients, memory."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import HALF, Allocations, assert_no_worse, rel_err

from grade_kernels import reference, token_logprob
from grade_kernels.common import chunks

INF = torch.inf
# A tile of the kernel is 256 lanes of 32 entries, and a program of its gradient takes 16384: fewer entries than lanes,
# both sides of one tile, one lane more than two, one entry more than a program.
TILE = 8192
VOCABS = [1, 7, 300, TILE - 1, TILE, TILE + 1, 2 * TILE + 16, 2 * TILE + 1]


def values_and_grad(logits, tokens, v, function=token_logprob):
    """(log-probability, entropy, gradient of <v[0], logprob> + <v[1], entropy>)."""
    logits = logits.detach().requires_grad_()
    logprob, entropy = function(logits, tokens)
    (grad,) = torch.autograd.grad((logprob * v[0] + entropy * v[1]).sum(), logits)
    return logprob.detach(), entropy.detach(), grad


def stats_and_grad(ops, logits, tokens, v, softcap=None):
    """(stats, gradient in float32) of a backend."""
    stats, out = ops.logprob.token_stats(logits, tokens, torch.float32), torch.empty(logits.shape, device=logits.device)
    ops.logprob.token_stats_grad(logits, tokens, stats, *v, out, softcap)
    return stats, out


@pytest.mark.parametrize("leading", [(), (0,), (5,), (2, 3), (2, 0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_leading_shapes(backend, dtype, leading, device):
    logits, tokens = torch.randn(*leading, 21).to(device, dtype), torch.randint(0, 21, leading).to(device)
    v = torch.randn(2, *leading).to(device, dtype)
    ours = values_and_grad(logits, tokens, v)
    assert ours[0].shape == ours[1].shape == leading
    close = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 1e-6, "atol": 1e-6}
    exact = values_and_grad(logits.double(), tokens, v.double(), reference.token_logprob)
    for mine, truth in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), truth, **close)


@pytest.mark.parametrize("vocab", VOCABS)
def test_sizes(ops, vocab, device):
    logits, v = torch.randn(3, vocab).mul(3).to(device), torch.randn(2, 3).to(device)
    tokens = torch.tensor([0, vocab // 2, vocab - 1]).to(device)
    stats, grad = stats_and_grad(ops, logits, tokens, v)
    exact = values_and_grad(logits.double(), tokens, v.double(), reference.token_logprob)
    if vocab == 1:
        assert (stats.logprob == 0).all() and (stats.entropy == 0).all() and (grad == 0).all()
    else:
        for mine, truth in zip((stats.logprob, stats.entropy, grad), exact, strict=True):
            assert rel_err(mine, truth) < 1e-6
    torch.testing.assert_close(stats.lse.double(), logits.double().logsumexp(-1), rtol=2e-7, atol=2e-7)
    assert torch.equal(ops.logprob.token_stats(logits, None, torch.float32).entropy, stats.entropy)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_no_worse_than_plain_pytorch(backend, dtype, device):
    logits = torch.randn(4, 9000).mul(3).to(device, dtype)
    tokens, v = torch.randint(0, 9000, (4,)).to(device), torch.randn(2, 4).to(device)
    ours = values_and_grad(logits, tokens, v)
    plain = values_and_grad(logits, tokens, v, reference.token_logprob)
    exact = values_and_grad(logits.double(), tokens, v, reference.token_logprob)
    assert [x.dtype for x in ours] == [torch.float32, torch.float32, dtype]
    for mine, theirs, truth in zip(ours, plain, exact, strict=True):
        assert_no_worse(mine, theirs, truth)


@pytest.mark.parametrize("place", [0, TILE + 1])
def test_peaked_rows(ops, place, device):
    """An entropy far below 1 nat, whose peak comes in the first tile or a later one."""
    logits = torch.randn(3, TILE + 5)
    logits[:, place] = torch.tensor([20.0, 30.0, 60.0])
    logits, tokens, v = logits.to(device), torch.tensor([place, 3, place]).to(device), torch.randn(2, 3).to(device)
    stats, grad = stats_and_grad(ops, logits, tokens, v)
    *exact, judge = values_and_grad(logits.double(), tokens, v.double(), reference.token_logprob)
    # The sum of e^(x - peak) is 1 and a little: its roundings, of 2^-24 each, are absolute errors.
    for mine, truth in zip(stats[:2], exact, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=2**-23, atol=8 * 2**-24)
    torch.testing.assert_close(grad.double(), judge, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("vocab", [4, 9000])
def test_masked_and_underflowing_entries(backend, vocab, device):
    base = torch.tensor([[-INF, 0.0, 1.0, -INF], [-500.0, 0.0, -400.0, 1e4], [-1e4, -1e4, 1e4, 1e4]])
    logits = base.repeat(1, vocab // 4).to(device)
    tokens = torch.tensor([1, 0, vocab - 1]).to(device)
    logprob, entropy, grad = values_and_grad(logits, tokens, torch.ones(2, 3, device=device))
    exact = reference.token_logprob(logits.double(), tokens)
    torch.testing.assert_close(logprob.double(), exact[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(entropy.double(), exact[1], rtol=1e-6, atol=1e-12)
    assert torch.isfinite(grad).all() and (grad[0, [0, 3]] == 0).all()
    assert token_logprob(logits, torch.zeros_like(tokens))[0][0] == -INF


def test_whole_lanes_are_masked(backend, device):
    # The first tile holds no mass at all, then a lane does.
    logits = torch.full((2, 2 * TILE), -INF)
    logits[0, TILE + 7], logits[1, TILE + 7], logits[1, 2 * TILE - 1] = -30.0, 5.0, 5.0
    logits, tokens = logits.to(device), torch.tensor([TILE + 7, TILE + 7]).to(device)
    logprob, entropy = token_logprob(logits, tokens)
    torch.testing.assert_close(logprob.exp(), torch.tensor([1.0, 0.5], device=device))
    torch.testing.assert_close(entropy.exp(), torch.tensor([1.0, 2.0], device=device))


@pytest.mark.parametrize("vocab", [6, 9000])
def test_rows_that_are_no_distribution(ops, vocab, device):
    """All masked, NaN or +inf: NaN, and only there."""
    logits = torch.randn(6, vocab)
    clean = logits.to(device, copy=True)
    logits[0] = -INF
    logits[1, vocab - 1] = torch.nan
    logits[2, 3] = INF
    logits[3, 3], logits[3, 4] = INF, -INF
    logits[4, 1], logits[4, 3] = torch.nan, -INF
    logits, tokens = logits.to(device), torch.zeros(6, dtype=torch.int64, device=device)
    ours, before = (ops.logprob.token_stats(x, tokens, torch.float32) for x in (logits, clean))
    assert ours.logprob[:5].isnan().all() and ours.entropy[:5].isnan().all()
    assert ours.lse[0] == -INF
    assert all(torch.equal(value[5], old[5]) for value, old in zip(ours, before, strict=True))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_soft_cap_and_gradients_in_place(ops, softcap, device):
    logits = torch.randn(3, 700).mul(4).clamp(-4.9, 4.9)
    logits[0, 3] = -INF  # counts as saturated
    logits, tokens, v = logits.to(device), torch.tensor([3, 5, 699]).to(device), torch.randn(2, 3).to(device)
    v[0, 0] = 0.0  # the masked token's
    stats, grad = stats_and_grad(ops, logits, tokens, v, softcap)
    double = logits.double()
    p, logp = double.softmax(-1), double.log_softmax(-1).clamp(min=-1e4)
    onehot = torch.nn.functional.one_hot(tokens, 700)
    exact = v[0, :, None] * (onehot - p) - v[1, :, None] * p * (logp - (p * logp).sum(-1, keepdim=True))
    if softcap is not None:
        exact = exact * (1 - (double / softcap) ** 2).clamp(min=0)
    torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=1e-8)
    ops.logprob.token_stats_grad(logits, tokens, stats, *v, logits, softcap)
    assert torch.equal(logits, grad)


VIEWS = {
    "slice": lambda x: x[:, :-1],
    "transposed": lambda x: x.transpose(0, 1),
    "one row": lambda x: x[1:2, 2:3].expand(3, 4, *x.shape[2:]),
    "column-major": lambda x: x.mT.contiguous().mT if x.dim() == 3 else x,
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strides(backend, view, device):
    logits, tokens = (view(x.to(device)) for x in (torch.randn(3, 4, 50), torch.randint(0, 50, (3, 4))))
    v = torch.randn(2, *tokens.shape).to(device)
    exact = values_and_grad(logits.double(), tokens, v.double(), reference.token_logprob)
    for mine, truth in zip(values_and_grad(logits, tokens, v), exact, strict=True):
        assert rel_err(mine, truth) < 2e-6


def test_pieces_and_memory(monkeypatch):
    logits, tokens = torch.randn(40, 9, 50, dtype=torch.float64), torch.randint(0, 50, (40, 9))
    expected = reference.token_logprob(logits, tokens)
    monkeypatch.setattr(chunks, "_PIECE_BYTES_CPU", 8 * 50 * 2)
    with Allocations().ignore(logits) as made:
        got = token_logprob(logits[:, :-2].requires_grad_(), tokens[:, :-2])
    assert made.peak < logits[0].numel() * 8 * 6 and made.largest < logits.numel() / 8
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b[:, :-2])
