"""soft_embedding: values, both gradients, precision of 16-bit tables, and memory."""

import pytest
import torch
from kernel_checks import HALF, Allocations, rel_err

from grade_kernels import SparseTokens, gumbel_topk, reference, soft_embedding
from grade_kernels.torch_ops import embedding as ops


def sparse(leading, k, vocab, hard, dtype=torch.float32, grad=False):
    indices = torch.randint(0, vocab, (*leading, k))  # duplicates within a row included
    weights = torch.rand(*leading, k, dtype=dtype).softmax(-1).requires_grad_(grad)
    tokens = indices[..., 0] if k else None
    return SparseTokens(indices, weights, tokens, weights.detach().sum(-1), hard)


@pytest.mark.parametrize("leading", [(), (0,), (7,), (2, 3)])
@pytest.mark.parametrize("hard", [False, True])
def test_values(leading, hard):
    tokens, table = sparse(leading, 5, 40, hard), torch.randn(40, 6, requires_grad=True)
    out = soft_embedding(tokens, table)
    assert out.shape == (*leading, 6)
    if hard:
        assert torch.equal(out, table[tokens.tokens])
    else:
        exact = reference.soft_embedding(tokens.weights.double(), tokens.indices, table.double())
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-6)
    out.sum().backward()
    assert table.grad.shape == table.shape


def test_gradcheck_soft():
    tokens = sparse((2, 3), 4, 9, hard=False, dtype=torch.float64)
    table = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    weights = tokens.weights.clone().requires_grad_()

    def embed(w, e):
        return soft_embedding(SparseTokens(tokens.indices, w, tokens.tokens, tokens.mass, False), e)

    assert torch.autograd.gradcheck(embed, (weights, table))


def test_gradcheck_through_the_sampler():
    logits = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    table = torch.randn(8, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: soft_embedding(gumbel_topk(x, 8, 0.7, seed=2, hard=False), table), logits
    )


@pytest.mark.parametrize("hard", [False, True])
def test_gradients_are_those_of_the_dense_product(hard):
    """logits -> scatter -> dense @ E is the definition, straight-through part included."""
    logits = torch.randn(4, 5, 30, dtype=torch.float64, requires_grad=True)
    table = torch.randn(30, 7, dtype=torch.float64, requires_grad=True)
    v = torch.randn(4, 5, 7, dtype=torch.float64)
    tokens = gumbel_topk(logits, 6, 0.5, seed=1, hard=hard)
    ours = torch.autograd.grad((soft_embedding(tokens, table) * v).sum(), (logits, table), retain_graph=True)
    dense = torch.autograd.grad((tokens.scatter(30) @ table * v).sum(), (logits, table))
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_half_tables_are_accumulated_in_float32(monkeypatch, dtype, columns):
    monkeypatch.setattr(ops, "_prefer_columns", lambda indices, table: columns)
    monkeypatch.setattr(ops, "_BLOCK_BYTES", 2**13)  # many blocks
    tokens, table = sparse((50,), 64, 300, hard=False, grad=True), torch.randn(300, 48).to(dtype)
    out = soft_embedding(tokens, table)
    grad = torch.randn(50, 48).to(dtype)
    (d_weights,) = torch.autograd.grad(out, tokens.weights, grad)
    gathered = table[tokens.indices]
    exact = reference.soft_embedding(tokens.weights.detach().double(), tokens.indices, table.double())
    assert out.dtype == dtype
    # One rounding, of the result; rounding the weights to 16 bits would add another.
    torch.testing.assert_close(out.double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-6)
    exact = torch.einsum("nd,nkd->nk", grad.double(), gathered.double())
    assert d_weights.dtype == torch.float32 and rel_err(d_weights, exact) < 1e-6


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_table_gradient_is_accumulated_in_float32(dtype, hard):
    # 2000 positions on 3 ids: sums of hundreds of terms, which 16-bit accumulation loses.
    tokens, table = sparse((2000,), 4, 3, hard), torch.randn(3, 5).to(dtype).requires_grad_()
    grad = torch.rand(2000, 5).to(dtype)
    (d_table,) = torch.autograd.grad(soft_embedding(tokens, table), table, grad)
    scale = torch.ones(2000, 1) if hard else tokens.weights
    ids = tokens.tokens[:, None] if hard else tokens.indices
    terms = (scale.double()[..., None] * grad.double()[:, None]).reshape(-1, 5)
    exact = torch.zeros(3, 5, dtype=torch.float64).index_add_(0, ids.reshape(-1), terms)
    assert d_table.dtype == dtype
    assert rel_err(d_table, exact) < max(2e-6, torch.finfo(dtype).eps)


def test_table_gradient_is_deterministic():
    tokens = sparse((500,), 8, 20, hard=False)
    table, grad = torch.randn(20, 16, requires_grad=True), torch.randn(500, 16)
    torch.set_num_threads(2)  # restored by the fixture
    grads = [torch.autograd.grad(soft_embedding(tokens, table), table, grad)[0] for _ in range(5)]
    assert all(torch.equal(g, grads[0]) for g in grads)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_never_builds_n_k_d_and_leaves_a_frozen_table_alone(monkeypatch, dtype, hard):
    monkeypatch.setattr(ops, "_BLOCK_BYTES", 2**16)
    n, k, d, vocab = 64, 128, 96, 2000
    tokens, table = sparse((n,), k, vocab, hard, grad=True), torch.randn(vocab, d).to(dtype)
    with Allocations().ignore(table) as made:
        soft_embedding(tokens, table).sum().backward()
    assert tokens.weights.grad.shape == (n, k)
    assert made.largest < n * k * d / 4
    assert made.largest < vocab * d  # no gradient of the frozen table
    table.requires_grad_()
    with Allocations().ignore(table) as made:
        soft_embedding(tokens, table).sum().backward()
    assert vocab * d <= made.largest < n * k * d / 4


def test_strided_table_and_inputs_stay():
    table = torch.randn(8, 40).t()  # [40, 8], columns contiguous
    tokens, copy = sparse((6,), 4, 40, hard=False), table.clone()
    exact = reference.soft_embedding(tokens.weights, tokens.indices, table)
    torch.testing.assert_close(soft_embedding(tokens, table), exact)
    assert torch.equal(table, copy)


def test_a_slice_of_one_candidate():
    """[:, :1] of a longer support is not contiguous, and reshaping it makes no copy."""
    weights, indices, table = torch.randn(3, 5)[:, :1], torch.randint(0, 9, (3, 5))[:, :1], torch.randn(9, 4)
    tokens = SparseTokens(indices, weights.detach().requires_grad_(), indices[:, 0], torch.ones(3), False)
    out = soft_embedding(tokens, table)
    torch.testing.assert_close(out, weights * table[indices[:, 0]])
    (grad,) = torch.autograd.grad(out.sum(), tokens.weights)
    torch.testing.assert_close(grad, table[indices].sum(-1))
