"""The Triton path of token log-probability, entropy and log-sum-exp."""

import pytest
import torch
from kernel_checks import HALF, assert_no_worse, rel_err

from grade_kernels import linear_token_logprob, reference, token_logprob
from grade_kernels.torch_ops import logprob as torch_logprob
from grade_kernels.triton_ops import logprob as triton_logprob

INF = torch.inf
# A tile is 256 lanes of 32 entries: fewer entries than lanes, both sides of one tile, one lane more than two.
TILE = 8192
VOCABS = [1, 7, 300, TILE - 1, TILE, TILE + 1, 2 * TILE + 16]


def paths(logits, tokens, d_logprob, d_entropy, softcap=None):
    """(stats, gradient) of the Triton path and of the PyTorch path."""
    results = []
    for ops in (triton_logprob, torch_logprob):
        stats, out = ops.token_stats(logits, tokens, torch.float32), torch.empty(logits.shape, device=logits.device)
        ops.token_stats_grad(logits, tokens, stats, d_logprob, d_entropy, out, softcap)
        results.append((stats, out))
    return results


@pytest.mark.parametrize("vocab", VOCABS)
def test_sizes(vocab, device):
    logits = torch.randn(3, vocab).mul(3).to(device)
    tokens = torch.tensor([0, vocab // 2, vocab - 1]).to(device)
    v = torch.randn(2, 3).to(device)
    (ours, mine), (theirs, plain) = paths(logits, tokens, *v)
    double = logits.double().requires_grad_()
    exact = reference.token_logprob(double, tokens)
    (judge,) = torch.autograd.grad((exact[0] * v[0] + exact[1] * v[1]).sum(), double)
    if vocab == 1:
        assert (ours.logprob == 0).all() and (ours.entropy == 0).all() and (mine == 0).all()
    else:
        assert_no_worse(ours.logprob, theirs.logprob, exact[0])
        assert_no_worse(ours.entropy, theirs.entropy, exact[1])
        assert_no_worse(mine, plain, judge)
    torch.testing.assert_close(ours.lse.double(), double.detach().logsumexp(-1), rtol=2e-7, atol=2e-7)
    assert torch.equal(triton_logprob.token_stats(logits, None, torch.float32).entropy, ours.entropy)


def test_gradient_programs_cover_the_row(device):
    # A program of the gradient kernel takes 16384 entries: one entry more, and tokens on both sides.
    logits = torch.randn(3, 16385).to(device)
    tokens = torch.tensor([16384, 16383, 4096]).to(device)
    (_, mine), (_, plain) = paths(logits, tokens, *torch.randn(2, 3).to(device))
    assert rel_err(mine, plain) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_no_worse_than_plain_pytorch(dtype, device):
    logits = torch.randn(4, 9000).mul(3).to(device, dtype).requires_grad_()
    double = logits.detach().double().requires_grad_()
    tokens, v = torch.randint(0, 9000, (4,)).to(device), torch.randn(2, 4).to(device)
    results = []
    for function, x in ((token_logprob, logits), (reference.token_logprob, logits), (reference.token_logprob, double)):
        logprob, entropy = function(x, tokens)
        (grad,) = torch.autograd.grad((logprob * v[0] + entropy * v[1]).sum(), x)
        results.append((logprob.detach(), entropy.detach(), grad))
    ours, plain, exact = results
    assert ours[0].dtype == ours[1].dtype == torch.float32 and ours[2].dtype == dtype
    for mine, theirs, judge in zip(ours, plain, exact, strict=True):
        assert_no_worse(mine, theirs, judge)


@pytest.mark.parametrize("place", [0, TILE + 1])
def test_peaked_rows(place, device):
    """An entropy far below 1 nat, whose peak comes in the first tile or a later one."""
    logits = torch.randn(3, TILE + 5)
    logits[:, place] = torch.tensor([20.0, 30.0, 60.0])
    logits, tokens = logits.to(device), torch.tensor([place, 3, place]).to(device)
    (ours, mine), (theirs, plain) = paths(logits, tokens, *torch.randn(2, 3).to(device))
    exact = reference.token_logprob(logits.double(), tokens)
    # The sum of e^(x - peak) is 1 and a little: its roundings, of 2^-24 each, are absolute errors of both.
    for value, other, judge in zip(ours[:2], theirs[:2], exact, strict=True):
        plain_error = (other.double() - judge).abs()
        assert ((value.double() - judge).abs() <= plain_error + 8 * 2**-24).all()
    torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("vocab", [4, 9000])
def test_masked_and_underflowing_entries(vocab, device):
    base = torch.tensor([[-INF, 0.0, 1.0, -INF], [-500.0, 0.0, -400.0, 1e4], [-1e4, -1e4, 1e4, 1e4]])
    logits = base.repeat(1, vocab // 4).to(device).requires_grad_()
    tokens = torch.tensor([1, 0, vocab - 1]).to(device)
    logprob, entropy = token_logprob(logits, tokens)
    exact = reference.token_logprob(logits.detach().double(), tokens)
    torch.testing.assert_close(logprob.double(), exact[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(entropy.double(), exact[1], rtol=1e-6, atol=1e-12)
    (logprob.sum() + entropy.sum()).backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[0, [0, 3]] == 0).all()


def test_whole_lanes_are_masked(device):
    # The first tile holds no mass at all, then a lane does.
    logits = torch.full((2, 2 * TILE), -INF)
    logits[0, TILE + 7], logits[1, TILE + 7], logits[1, 2 * TILE - 1] = -30.0, 5.0, 5.0
    logits, tokens = logits.to(device), torch.tensor([TILE + 7, TILE + 7]).to(device)
    logprob, entropy = token_logprob(logits, tokens)
    torch.testing.assert_close(logprob.exp(), torch.tensor([1.0, 0.5], device=device))
    torch.testing.assert_close(entropy.exp(), torch.tensor([1.0, 2.0], device=device))


@pytest.mark.parametrize("vocab", [6, 9000])
def test_rows_that_are_no_distribution(vocab, device):
    """All masked, NaN or +inf: as on the PyTorch path, and only there."""
    logits = torch.randn(6, vocab)
    clean = logits.to(device, copy=True)
    logits[0] = -INF
    logits[1, vocab - 1] = torch.nan
    logits[2, 3] = INF
    logits[3, 3], logits[3, 4] = INF, -INF
    logits[4, 1], logits[4, 3] = torch.nan, -INF
    logits, tokens = logits.to(device), torch.zeros(6, dtype=torch.int64, device=device)
    ours, theirs = (ops.token_stats(logits, tokens, torch.float32) for ops in (triton_logprob, torch_logprob))
    assert ours.logprob[:5].isnan().all() and ours.entropy[:5].isnan().all()
    assert theirs.logprob[:5].isnan().all() and theirs.entropy[:5].isnan().all()
    assert ours.lse[0] == theirs.lse[0] == -INF
    for value, before in zip(ours, triton_logprob.token_stats(clean, tokens, torch.float32), strict=True):
        assert torch.equal(value[5], before[5])


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_soft_cap_and_gradients_in_place(softcap, device):
    logits = torch.randn(3, 700).mul(4).clamp(-4.9, 4.9)
    logits[0, 3] = -INF  # counts as saturated
    logits, tokens = logits.to(device), torch.tensor([3, 5, 699]).to(device)
    d_logprob, d_entropy = torch.randn(2, 3).to(device)
    d_logprob[0] = 0.0  # the masked token's
    (stats, mine), (_, plain) = paths(logits, tokens, d_logprob, d_entropy, softcap)
    torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-8)
    triton_logprob.token_stats_grad(logits, tokens, stats, d_logprob, d_entropy, logits, softcap)
    assert torch.equal(logits, mine)


@pytest.mark.parametrize("leading", [(), (0,), (5,), (2, 3), (2, 0)])
def test_leading_shapes(leading, device):
    logits = torch.randn(*leading, 21).to(device).requires_grad_()
    tokens = torch.randint(0, 21, leading).to(device)
    results = token_logprob(logits, tokens)
    for ours, exact in zip(results, reference.token_logprob(logits.double(), tokens), strict=True):
        assert ours.shape == leading
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)
    (results[0].sum() + results[1].sum()).backward()
    assert logits.grad.shape == logits.shape


def test_strides(device):
    base, ids = torch.randn(3, 4, 50).to(device), torch.randint(0, 50, (3, 4)).to(device)
    for view in (lambda x: x[:, :-1], lambda x: x.transpose(0, 1), lambda x: x[1:2, 2:3].expand(3, 4, *x.shape[2:])):
        logits, tokens = view(base).detach().requires_grad_(), view(ids)
        double = logits.detach().double().requires_grad_()
        results = [torch.stack(f(x, tokens)) for f, x in ((token_logprob, logits), (reference.token_logprob, double))]
        torch.testing.assert_close(results[0].double(), results[1], rtol=1e-6, atol=1e-6)
        (mine,), (exact,) = (
            torch.autograd.grad((r * r).sum(), x) for r, x in zip(results, (logits, double), strict=True)
        )
        assert rel_err(mine, exact) < 2e-6
    column_major = base.mT.contiguous().mT
    assert torch.equal(torch.stack(token_logprob(column_major, ids)), torch.stack(token_logprob(base, ids)))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_linear_token_logprob(softcap, device):
    hidden, weight = torch.randn(2, 3, 8).to(device).requires_grad_(), torch.randn(70, 8).to(device).requires_grad_()
    tokens = torch.randint(0, 70, (2, 3)).to(device)
    ours = torch.stack(linear_token_logprob(hidden, weight, tokens, softcap=softcap, chunk_bytes=3 * 4 * 70 * 4))
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logits = h @ w.T if softcap is None else softcap * torch.tanh(h @ w.T / softcap)
    exact = torch.stack(reference.token_logprob(logits, tokens))
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)
    v = torch.randn(2, 2, 3).to(device)
    mine = torch.autograd.grad((ours * v).sum(), (hidden, weight))
    judges = torch.autograd.grad((exact * v).sum(), (h, w))
    for m, j in zip(mine, judges, strict=True):
        assert rel_err(m, j) < 1e-5


def test_custom_ops(device):
    logits, tokens = torch.randn(2, 3, 40).to(device), torch.randint(0, 40, (6,)).to(device)
    ops = torch.ops.grade_kernels
    for ids in (tokens, None):
        torch.library.opcheck(ops.token_stats, (logits, ids))
    _, entropy, peak, norm = ops.token_stats(logits, tokens).unbind()
    for cap in (None, 3.0):
        out = torch.zeros(6, 40).to(device)
        torch.library.opcheck(ops.token_stats_grad, (logits, tokens, entropy, peak, norm, peak, norm, out, cap))


def test_compiles_into_one_graph(device):
    def score(x):
        logprob, entropy = token_logprob(x, torch.arange(3, device=x.device))
        return logprob.sum() + entropy.sum()

    x = torch.randn(3, 50).to(device).requires_grad_()
    torch._dynamo.reset()
    compiled, eager = torch.compile(score, fullgraph=True, backend="aot_eager")(x), score(x)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, x), torch.autograd.grad(eager, x))
