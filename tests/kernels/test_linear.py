"""linear_kl, linear_token_logprob, linear_gumbel_topk: values and gradients against dense autograd."""

import pytest
import torch
from kernel_checks import HALF, HEADS, Allocations, assert_no_worse, make_head, rel_err

from grade_kernels import Head, gumbel_topk, linear_gumbel_topk, linear_kl, linear_token_logprob, reference
from grade_kernels.common import head as head_ops

N, V, D = 3, 11, 5


DTYPES = [torch.float64, torch.float32]
# All rows at once, and one at a time with whatever a head has.
HEADS_AND_CHUNKS = [*((options, 2**28) for options in HEADS), (HEADS[-1], 1)]


def head_of(options, width=D, dtype=torch.float64, device="cpu"):
    head = make_head(options, V, width, dtype, device)
    for part in (head.weight, head.bias):
        if part is not None:
            part.requires_grad_()
    return head


def states(width=D, dtype=torch.float64, device="cpu"):
    return torch.randn(N, width, dtype=dtype, device=device, requires_grad=True)


def leaves(hidden, head):
    return [t for t in (hidden, head.weight, head.bias) if t is not None]


def assert_same(ours, exact, v, inputs):
    """Values, and the gradients of their product with v."""
    grads = [torch.autograd.grad((value * v).sum(), inputs) for value in (ours, exact)]
    tolerance = {} if v.dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(ours, exact, **tolerance)
    torch.testing.assert_close(*grads, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", ["policy_ref", "ref_policy"])
@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize(("options", "chunk_bytes"), HEADS_AND_CHUNKS)
def test_linear_kl(backend, device, options, own_head, direction, chunk_bytes, dtype):
    h, head = states(D, dtype, device), head_of(options, D, dtype, device)
    rh, ref_head = states(D, dtype, device), None
    inputs = [*leaves(h, head), rh]
    if own_head:
        rh, ref_head = states(7, dtype, device), head_of(options | {"scale": 0.5}, 7, dtype, device)
        inputs[-1:] = leaves(rh, ref_head)
    ours = linear_kl(h, head, rh, ref_head, direction, chunk_bytes=chunk_bytes)
    exact = reference.kl(reference.head_logits(h, head), reference.head_logits(rh, ref_head or head), direction)
    assert_same(ours, exact, torch.randn(N, dtype=dtype, device=device), inputs)


IDS = torch.tensor([[0, 3, 5]] * N)
OPERATIONS = {
    "kl": lambda h, head, rh: linear_kl(h, head, rh),
    "token_logprob": lambda h, head, _: linear_token_logprob(h, head, torch.arange(N)),
    "gumbel_topk": lambda h, head, _: linear_gumbel_topk(h, head, seed=3, indices=IDS).weights,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradcheck(name):
    h, rh, head = states(), states(), head_of({"bias": True})
    assert torch.autograd.gradcheck(
        lambda h, w, b, rh: OPERATIONS[name](h, Head(w, b, 0.5, 2.0), rh), (h, head.weight, head.bias, rh)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("options", "chunk_bytes"), HEADS_AND_CHUNKS)
def test_linear_token_logprob(backend, device, options, chunk_bytes, dtype):
    h, head = states(D, dtype, device), head_of(options, D, dtype, device)
    tokens, v = torch.randint(0, V, (N,), device=device), torch.randn(2, N, dtype=dtype, device=device)
    ours = torch.stack(linear_token_logprob(h, head, tokens, chunk_bytes=chunk_bytes))
    exact = torch.stack(reference.token_logprob(reference.head_logits(h, head), tokens))
    assert_same(ours, exact, v, leaves(h, head))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize(("options", "chunk_bytes"), HEADS_AND_CHUNKS)
def test_linear_gumbel_topk(backend, device, options, tokens, chunk_bytes, dtype):
    h, head = states(D, dtype, device), head_of(options, D, dtype, device)
    sampling = {
        "seed": 3,
        "draw": int(tokens),
        "rows": torch.randint(0, 2**40, (N,), device=device),
        "tokens": torch.randint(0, V, (N,), device=device) if tokens else None,
        "suppress": [1, 4],
        "hard": False,
    }
    ours = linear_gumbel_topk(h, head, 4, 0.6, **sampling, chunk_bytes=chunk_bytes)
    dense = gumbel_topk(reference.head_logits(h, head), 4, 0.6, **sampling)
    for name in ("indices", "tokens", "mass", "hard"):
        torch.testing.assert_close(getattr(ours, name), getattr(dense, name))
    assert_same(ours.weights, dense.weights, torch.randn(N, 4, dtype=dtype, device=device), leaves(h, head))


@pytest.mark.parametrize("leading", [(), (0,), (2, 3)])
def test_leading_shapes(backend, device, leading):
    h, rh = torch.randn(2, *leading, D, device=device, requires_grad=True).unbind()
    head = head_of({}, D, torch.float32, device)
    kl = linear_kl(h, head, rh)
    logprob, entropy = linear_token_logprob(h, head, torch.zeros(leading, dtype=torch.int64, device=device))
    sample = linear_gumbel_topk(h, head, 3, seed=0)
    assert kl.shape == logprob.shape == entropy.shape == sample.tokens.shape == sample.mass.shape == leading
    assert sample.weights.shape == sample.indices.shape == (*leading, 3)
    loss = kl.sum() + logprob.sum() + sample.weights.square().sum()
    d_h, d_w = torch.autograd.grad(loss, (h, head.weight))
    assert d_h.shape == h.shape and d_w.shape == head.weight.shape


@pytest.mark.parametrize("dtype", HALF)
def test_logits_of_half_operands_are_not_rounded(backend, monkeypatch, dtype):
    """p near q: rounding the logits to 16 bits would leave noise in place of the divergence."""
    monkeypatch.setattr(head_ops, "_BLOCK_BYTES", 4 * 64 * 100)  # 100 of the 700 rows of the weight a block
    h = torch.randn(8, 64).to(dtype)
    rh = (h.float() + 0.01 * torch.randn(8, 64)).to(dtype)
    w = torch.randn(700, 64).to(dtype)
    tensors = [t.requires_grad_() for t in (h, w, rh)]
    exact_tensors = [t.detach().double().requires_grad_() for t in tensors]

    def dense(h, w, rh):
        return reference.kl(h @ w.T, rh @ w.T)

    ours, plain, exact = linear_kl(h, Head(w), rh), dense(*tensors), dense(*exact_tensors)
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
    h, head = torch.randn(20, 16).bfloat16(), Head(torch.randn(300, 16).bfloat16())
    for chunk_bytes in (1, 2**28):
        assert (linear_kl(h, head, h.clone(), chunk_bytes=chunk_bytes) == 0).all()


def test_nothing_of_size_n_v_and_no_gradient_of_a_frozen_head():
    n, vocab, d, chunk_bytes = 256, 2000, 8, 3 * 4 * 2000 * 4  # four rows a chunk
    h, rh = torch.randn(n, d, requires_grad=True), torch.randn(n, d, requires_grad=True)
    w, tokens = torch.randn(vocab, d), torch.randint(0, vocab, (n,))

    def run():
        kl = linear_kl(h, Head(w), rh, chunk_bytes=chunk_bytes)
        logprob, entropy = linear_token_logprob(h, Head(w), tokens, chunk_bytes=chunk_bytes)
        weights = linear_gumbel_topk(h, Head(w), 16, seed=0, chunk_bytes=chunk_bytes).weights
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
    ours = linear_kl(view, Head(w), rh.transpose(0, 1)[:, :-1], chunk_bytes=3 * 8 * V * 3)
    plain = linear_kl(copy, Head(w.contiguous()), rh.transpose(0, 1)[:, :-1].contiguous())
    torch.testing.assert_close(ours, plain)
    (a,), (b,) = torch.autograd.grad(ours.sum(), view), torch.autograd.grad(plain.sum(), copy)
    torch.testing.assert_close(a, b)
