"""linear_kl, linear_token_logprob, linear_gumbel_topk: values and gradients against dense autograd."""

import pytest
import torch
from kernel_checks import HALF, Allocations, assert_no_worse, rel_err

from grade_kernels import (
    gumbel_topk,
    linear_gumbel_topk,
    linear_kl,
    linear_token_logprob,
    reference,
)
from grade_kernels.common import head as head_ops

HEADS = [
    {},
    {"bias": True},
    {"scale": 0.25},  # Cohere, Granite
    {"softcap": 3.0},  # Gemma 2
    {"bias": True, "scale": -1.5, "softcap": 2.0},
]
N, V, D = 6, 11, 5


def operands(options, dtype=torch.float64, ref_width=None):
    """(hidden, weight, bias or None, ref_hidden, ref_weight or None) and the options without the bias."""
    options = dict(options)
    bias = torch.randn(V, dtype=dtype) if options.pop("bias", False) else None
    hidden, weight = torch.randn(N, D, dtype=dtype), torch.randn(V, D, dtype=dtype)
    ref_hidden = torch.randn(N, ref_width or D, dtype=dtype)
    ref_weight = torch.randn(V, ref_width, dtype=dtype) if ref_width else None
    tensors = (hidden, weight, bias, ref_hidden, ref_weight)
    return [t if t is None else t.requires_grad_() for t in tensors], options


def leaves(*tensors):
    return [t for t in tensors if t is not None]


@pytest.mark.parametrize("chunk_bytes", [1, 2**28])  # one row at a time, all at once
@pytest.mark.parametrize("direction", ["policy_ref", "ref_policy"])
@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("options", HEADS)
def test_linear_kl(options, own_head, direction, chunk_bytes):
    (h, w, bias, rh, rw), options = operands(options, ref_width=7 if own_head else None)
    rb = torch.randn(V, dtype=torch.float64, requires_grad=True) if own_head and bias is not None else None
    inputs = leaves(h, w, bias, rh, rw, rb)
    ours = linear_kl(h, w, rh, rw, direction, bias=bias, ref_bias=rb, chunk_bytes=chunk_bytes, **options)
    policy = reference.head_logits(h, w, bias, **options)
    other = reference.head_logits(rh, rw if own_head else w, rb if own_head else bias, **options)
    exact = reference.kl(policy, other, direction)
    torch.testing.assert_close(ours, exact)
    v = torch.randn(N, dtype=torch.float64)
    grads = [torch.autograd.grad((value * v).sum(), inputs) for value in (ours, exact)]
    torch.testing.assert_close(*grads)


def test_linear_kl_gradcheck():
    (h, w, bias, rh, _), _ = operands({"bias": True})
    assert torch.autograd.gradcheck(
        lambda h, w, b, rh: linear_kl(h, w, rh, bias=b, scale=0.5, softcap=2.0), (h, w, bias, rh)
    )


@pytest.mark.parametrize("chunk_bytes", [1, 2**28])
@pytest.mark.parametrize("options", HEADS)
def test_linear_token_logprob(options, chunk_bytes):
    (h, w, bias, _, _), options = operands(options)
    tokens, v = torch.randint(0, V, (N,)), torch.randn(2, N, dtype=torch.float64)
    ours = linear_token_logprob(h, w, tokens, bias=bias, chunk_bytes=chunk_bytes, **options)
    exact = reference.token_logprob(reference.head_logits(h, w, bias, **options), tokens)
    grads = []
    for pair in (ours, exact):
        loss = (torch.stack(pair) * v).sum()
        grads.append(torch.autograd.grad(loss, leaves(h, w, bias)))
    torch.testing.assert_close(ours, exact)
    torch.testing.assert_close(*grads)


def test_linear_token_logprob_gradcheck():
    (h, w, bias, _, _), _ = operands({"bias": True})
    tokens = torch.arange(N)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_token_logprob(h, w, tokens, bias=b, scale=0.5, softcap=2.0), (h, w, bias)
    )


@pytest.mark.parametrize("chunk_bytes", [1, 2**28])
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("options", HEADS)
def test_linear_gumbel_topk(options, tokens, chunk_bytes):
    (h, w, bias, _, _), options = operands(options)
    sampling = {
        "seed": 3,
        "draw": int(tokens),
        "rows": torch.randint(0, 2**40, (N,)),
        "tokens": torch.randint(0, V, (N,)) if tokens else None,
        "suppress": [1, 4],
        "hard": False,
    }
    ours = linear_gumbel_topk(h, w, 4, 0.6, **sampling, bias=bias, chunk_bytes=chunk_bytes, **options)
    dense = gumbel_topk(reference.head_logits(h, w, bias, **options), 4, 0.6, **sampling)
    v, grads = torch.randn(N, 4, dtype=torch.float64), []
    for result in (ours, dense):
        grads.append(torch.autograd.grad((result.weights * v).sum(), leaves(h, w, bias)))
    for name in ("indices", "tokens", "weights", "mass", "hard"):
        torch.testing.assert_close(getattr(ours, name), getattr(dense, name))
    torch.testing.assert_close(*grads)


def test_linear_gumbel_topk_gradcheck():
    (h, w, bias, _, _), _ = operands({"bias": True})
    ids = linear_gumbel_topk(h, w, 4, seed=3, bias=bias).indices
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_gumbel_topk(h, w, seed=3, indices=ids, bias=b, scale=0.5, softcap=2.0).weights,
        (h, w, bias),
    )


@pytest.mark.parametrize("leading", [(), (0,), (2, 3)])
def test_leading_shapes(leading):
    h, rh = torch.randn(2, *leading, D, requires_grad=True).unbind()
    w = torch.randn(V, D, requires_grad=True)
    kl = linear_kl(h, w, rh)
    logprob, entropy = linear_token_logprob(h, w, torch.zeros(leading, dtype=torch.int64))
    sample = linear_gumbel_topk(h, w, 3, seed=0)
    assert kl.shape == logprob.shape == entropy.shape == sample.tokens.shape == sample.mass.shape == leading
    assert sample.weights.shape == sample.indices.shape == (*leading, 3)
    loss = kl.sum() + logprob.sum() + sample.weights.square().sum()
    d_h, d_w = torch.autograd.grad(loss, (h, w))
    assert d_h.shape == h.shape and d_w.shape == w.shape


@pytest.mark.parametrize("dtype", HALF)
def test_logits_of_half_operands_are_not_rounded(monkeypatch, dtype):
    """p near q: rounding the logits to 16 bits would leave noise in place of the divergence."""
    monkeypatch.setattr(head_ops, "_BLOCK_BYTES", 4 * 64 * 100)  # 100 of the 700 rows of the weight a block
    h = torch.randn(30, 64).to(dtype)
    rh = (h.float() + 0.01 * torch.randn(30, 64)).to(dtype)
    w = torch.randn(700, 64).to(dtype)
    tensors = [t.requires_grad_() for t in (h, w, rh)]
    exact_tensors = [t.detach().double().requires_grad_() for t in tensors]

    def dense(h, w, rh):
        return reference.kl(h @ w.T, rh @ w.T)

    ours, plain, exact = linear_kl(h, w, rh), dense(*tensors), dense(*exact_tensors)
    assert ours.dtype == torch.float32
    assert rel_err(ours, exact) < 1e-4 < rel_err(plain, exact)
    grads = torch.autograd.grad(ours.sum(), tensors)
    plain_grads = torch.autograd.grad(plain.sum(), tensors)
    exact_grads = torch.autograd.grad(exact.sum(), exact_tensors)
    for mine, theirs, judge in zip(grads, plain_grads, exact_grads, strict=True):
        assert mine.dtype == dtype
        assert_no_worse(mine, theirs, judge)
        assert rel_err(mine, judge) < torch.finfo(dtype).eps


def test_identical_sides_give_exactly_zero():
    h, w = torch.randn(20, 16).bfloat16(), torch.randn(300, 16).bfloat16()
    for chunk_bytes in (1, 2**28):
        assert (linear_kl(h, w, h.clone(), chunk_bytes=chunk_bytes) == 0).all()


def test_nothing_of_size_n_v_and_no_gradient_of_a_frozen_head():
    n, vocab, d, chunk_bytes = 256, 2000, 8, 3 * 4 * 2000 * 4  # four rows a chunk
    h, rh = torch.randn(n, d, requires_grad=True), torch.randn(n, d, requires_grad=True)
    w, tokens = torch.randn(vocab, d), torch.randint(0, vocab, (n,))

    def run():
        kl = linear_kl(h, w, rh, chunk_bytes=chunk_bytes)
        logprob, entropy = linear_token_logprob(h, w, tokens, chunk_bytes=chunk_bytes)
        weights = linear_gumbel_topk(h, w, 16, seed=0, chunk_bytes=chunk_bytes).weights
        (kl.sum() + logprob.sum() + entropy.sum() + weights.square().sum()).backward()

    with Allocations().ignore(w) as made:
        run()
    assert made.largest < vocab * d  # 2 % of n * vocab, and no gradient of the weight
    w.requires_grad_()
    with Allocations().ignore(w) as made:
        run()
    assert made.largest == vocab * d


def test_strides_do_not_matter():
    h = torch.randn(4, 5, D, dtype=torch.float64)
    rh, w = torch.randn(5, 4, D, dtype=torch.float64), torch.randn(D, V, dtype=torch.float64).T
    view, copy = h[:, :-1].requires_grad_(), h[:, :-1].clone().requires_grad_()
    ours = linear_kl(view, w, rh.transpose(0, 1)[:, :-1], chunk_bytes=3 * 8 * V * 3)
    plain = linear_kl(copy, w.contiguous(), rh.transpose(0, 1)[:, :-1].contiguous())
    torch.testing.assert_close(ours, plain)
    (a,), (b,) = torch.autograd.grad(ours.sum(), view), torch.autograd.grad(plain.sum(), copy)
    torch.testing.assert_close(a, b)
