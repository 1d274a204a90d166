"""The sizes of a real run, and random ones, on a GPU: N x V beyond 2^31 entries, every op against float64.

Nothing here runs in the interpreter, for which these sizes are out of reach; the fuzzed shapes it could run are
those of the other files.
"""

from __future__ import annotations

import pytest
import torch
from kernel_checks import assert_no_worse

import grade_kernels as gk
from grade_kernels import SparseTokens, reference
from grade_kernels.backend import VARIABLE

pytestmark = [pytest.mark.triton, pytest.mark.gpu]

N, V, D, K = 16_384, 151_936, 2_560, 256
# The first rows and the last, whose offsets do not fit into 32 bits.
ENDS = torch.cat([torch.arange(8), torch.arange(N - 8, N)])
BF16 = torch.bfloat16


def needs(gib: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib:.0f} GiB of GPU memory, {free:.0f} are free")


def logits_of(device, dtype=BF16, seed=0, scale=3.0):
    generator = torch.Generator(device).manual_seed(seed)
    out = torch.empty(N, V, dtype=dtype, device=device)
    for rows in out.split(512):
        rows.copy_(torch.randn(rows.shape, generator=generator, device=device) * scale)
    return out


def test_gumbel_topk(device):
    needs(16)
    logits = logits_of(device)
    result = gk.gumbel_topk(logits, K, 0.7, seed=1, suppress=[0, V - 1])
    some = logits[ENDS].double()
    expected = reference.topk(some, K, torch.tensor([0, V - 1], device=device))
    assert torch.equal(result.indices[ENDS], expected)
    mass = some.softmax(-1).gather(-1, expected).sum(-1)
    torch.testing.assert_close(result.mass[ENDS].double(), mass, rtol=1e-5, atol=1e-7)
    assert (result.indices == result.tokens[:, None]).any(-1).all()
    torch.testing.assert_close(result.weights.sum(-1), torch.ones(N, device=device), rtol=0, atol=1e-5)
    # The noise of a row is its key's, whatever the batch.
    part = gk.gumbel_topk(logits[ENDS], K, 0.7, seed=1, suppress=[0, V - 1], rows=ENDS.to(device))
    assert torch.equal(part.tokens, result.tokens[ENDS]) and torch.equal(part.indices, result.indices[ENDS])


@pytest.mark.parametrize("direction", ["policy_ref", "ref_policy"])
def test_logits_kl(device, direction):
    needs(24)
    sides = [logits_of(device, seed=0), logits_of(device, seed=0)]
    for rows in sides[1].split(512):
        rows += 0.05 * torch.randn(rows.shape, device=device, dtype=BF16)
    policy, ref = (x.requires_grad_() for x in sides)
    kl = gk.logits_kl(policy, ref, direction)
    grads = torch.autograd.grad(kl.sum(), [policy, ref])
    exact = [x.detach()[ENDS].double().requires_grad_() for x in sides]
    plain = [x.detach()[ENDS].float().requires_grad_() for x in sides]
    expected = reference.kl(*exact, direction)
    textbook = reference.kl(*plain, direction)
    assert_no_worse(kl[ENDS], textbook, expected)
    theirs = torch.autograd.grad(expected.sum(), exact)
    for ours, side, truth in zip(grads, torch.autograd.grad(textbook.sum(), plain), theirs, strict=True):
        assert_no_worse(ours[ENDS], side.to(BF16), truth)


def test_token_logprob(device):
    needs(14)
    logits = logits_of(device).requires_grad_()
    tokens = torch.randint(V, (N,), device=device)
    logprob, entropy = gk.token_logprob(logits, tokens)
    (grad,) = torch.autograd.grad((logprob + 0.1 * entropy).sum(), logits)
    exact = logits.detach()[ENDS].double().requires_grad_()
    expected = reference.token_logprob(exact, tokens[ENDS])
    for ours, truth in zip((logprob, entropy), expected, strict=True):
        torch.testing.assert_close(ours[ENDS].double(), truth.detach(), rtol=1e-6, atol=1e-5)
    (truth,) = torch.autograd.grad((expected[0] + 0.1 * expected[1]).sum(), exact)
    torch.testing.assert_close(grad[ENDS].double(), truth, rtol=2**-8, atol=1e-9)


def test_embedding_and_vjp(device):
    needs(8)
    table, head = (torch.randn(V, D, dtype=BF16, device=device) for _ in range(2))
    ids = torch.argsort(torch.rand(N, 4 * K, device=device), dim=-1)[:, :K] * (V // (4 * K))
    values = torch.randn(N, K, device=device)
    tokens = ids[:, 3].contiguous()
    weights = values.softmax(-1).requires_grad_()
    sparse = SparseTokens(ids, weights, tokens, weights.new_ones(N), False)
    x = gk.soft_embedding(sparse, table)
    assert torch.cuda.max_memory_allocated() < 16 * 2**30  # [N, k, d] would be 21 GB
    expected = torch.einsum("nk,nkd->nd", weights.detach()[ENDS].double(), table[ids[ENDS]].double())
    torch.testing.assert_close(x.detach()[ENDS].double(), expected, rtol=2**-8, atol=1e-3)
    grad = torch.randn(N, D, dtype=BF16, device=device)
    v = torch.einsum("nd,nkd->nk", grad[ENDS].double(), table[ids[ENDS]].double())
    (d_weights,) = torch.autograd.grad(x, weights, grad)
    torch.testing.assert_close(d_weights[ENDS].double(), v, rtol=1e-5, atol=1e-3)
    rule = dict(logits=values, indices=ids, tokens=tokens, tau=0.7, seed=3, head=gk.Head(head))
    for estimator in ("gumbel", "rao", "straight_through", "reinmax"):
        step = gk.soft_token_vjp(grad, table, estimator=estimator, samples=4, **rule)
        pulled = torch.einsum("nk,nkd->nd", step.dlogits[ENDS].double(), head[ids[ENDS]].double())
        torch.testing.assert_close(step.dhidden[ENDS].double(), pulled, rtol=1e-4, atol=1e-3)
        assert step.dlogits.sum(-1).abs().max() < 1e-3 * step.dlogits.abs().max()


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_vocab_head_in_bounded_memory(device, dtype, monkeypatch):
    """Against the PyTorch path on the same GPU; the peak is that of the formula in the docstring."""
    n, chunk_bytes = 4096, 2**30
    needs(8)
    hidden, ref = (torch.randn(n, D, device=device, dtype=dtype) for _ in range(2))
    head = gk.Head((torch.randn(V, D, device=device) / D**0.5).to(dtype))
    tokens = torch.randint(V, (n,), device=device)
    options = dict(ref_hidden=ref, k=K, tokens=tokens, grad=True, chunk_bytes=chunk_bytes)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ours = gk.vocab_head(hidden, head, **options)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    outputs = n * (4 * (2 * D + K + 8) + 8 * K)
    rows = gk.chunk_rows(V, chunk_bytes)
    assert peak < chunk_bytes + outputs + rows * 32 * K + 2**28  # and blocks of the weight, and their products
    monkeypatch.setenv(VARIABLE, "torch")
    plain = gk.vocab_head(hidden, head, **options)
    assert (ours.indices == plain.indices).float().mean() > 0.999  # ties of the two products' roundings
    for name in ("kl", "entropy", "logprob", "lse", "ref_lse", "grad_hidden", "grad_ref_hidden"):
        mine, theirs = getattr(ours, name), getattr(plain, name)
        assert (mine - theirs).norm() < 1e-3 * theirs.norm(), name


def test_random_shapes(device, monkeypatch):
    """Both paths on the same GPU, over shapes drawn at random."""
    generator = torch.Generator().manual_seed(2)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    for _ in range(40):
        n, vocab, d = draw(1, 300), draw(2, 30_000), draw(1, 300)
        k = draw(1, min(vocab, 300) + 1)
        dtype = (torch.float32, torch.float32, BF16, torch.float16)[draw(0, 4)]
        logits = (torch.randn(n, vocab, generator=generator) * draw(1, 6)).to(device, dtype)
        ref = logits + 0.1 * torch.randn_like(logits)
        table = torch.randn(vocab, d, generator=generator).to(device, dtype)
        grad = torch.randn(n, d, generator=generator).to(device, dtype)
        results = []
        for backend in ("triton", "torch"):
            monkeypatch.setenv(VARIABLE, backend)
            leaf = logits.detach().requires_grad_()
            kl = gk.logits_kl(leaf, ref)
            tokens = gk.gumbel_topk(logits, k, 0.5, seed=n)
            values = logits.gather(-1, tokens.indices).float()
            rule = dict(logits=values, indices=tokens.indices, tokens=tokens.tokens, seed=n)
            step = gk.soft_token_vjp(grad, table, estimator="rao", samples=3, **rule)
            soft = SparseTokens(**{**vars(tokens), "hard": False})
            embedded, dense = gk.soft_embedding(soft, table), gk.scatter_tokens(soft, vocab)
            (d_kl,) = torch.autograd.grad(kl.sum(), leaf)
            results.append((tokens.indices, kl.detach(), d_kl, *gk.token_logprob(logits, tokens.tokens),
                            tokens.weights, step.dlogits, embedded, dense))  # fmt: skip
        assert torch.equal(results[0][0], results[1][0])
        for mine, theirs in zip(results[0][1:], results[1][1:], strict=True):
            close = torch.finfo(mine.dtype).eps * 4 if mine.dtype != torch.float32 else 2e-4
            assert (mine.double() - theirs.double()).norm() <= close * theirs.double().norm() + 1e-7
