"""soft_embedding: sums, dot products and the table's gradient against float64, memory, strides."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import HALF, Allocations, assert_no_worse, rel_err

from grade_kernels import Head, SparseTokens, gumbel_topk, pull_back, reference, scatter_tokens, soft_embedding
from grade_kernels.torch_ops import embedding as torch_ops

V = 20
DTYPES = [torch.float32, *HALF]
# (candidates, width): one of each; neither a power of two; whole steps of 8 candidates and one vector for each
# thread; one more than steps, lanes and vectors; several column blocks, the last one part full, and a full tile
# of dot products with a tail.
SIZES = [(1, 1), (5, 7), (16, 64), (17, 129), (9, 1100)]


def inputs(n, k, d, dtype, device):
    """(weights, ids with repetitions, gradients, table)."""
    make = {"device": device}
    ids = torch.randint(0, V, (n, k), **make)
    return torch.rand(n, k, **make), ids, torch.randn(n, d, **make).to(dtype), torch.randn(V, d, **make).to(dtype)


def sparse(leading, k, hard, device, vocab=V, dtype=torch.float32):
    ids = torch.randint(0, vocab, (*leading, k), device=device)
    weights = torch.rand(*leading, k, device=device, dtype=dtype).softmax(-1).requires_grad_()
    return SparseTokens(ids, weights, ids[..., 0].clone(), weights.detach().sum(-1), hard)


def exact_dots(grad, ids, table):
    return torch.einsum("nd,nkd->nk", grad.double(), table.double()[ids])


def exact_scatter(weights, ids, rows, vocab):
    terms = (weights.double()[..., None] * rows.double()[:, None]).flatten(0, 1)
    zeros = torch.zeros(vocab, rows.shape[1], dtype=torch.float64, device=rows.device)
    return zeros.index_add_(0, ids.flatten(), terms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k, d", SIZES)
def test_sums_and_dot_products(ops, device, k, d, dtype):
    """In float32, whatever the table."""
    weights, ids, grad, table = inputs(3, k, d, dtype, device)
    copies = [x.clone() for x in (weights, ids, grad, table)]
    sums, dots = ops.embedding.weighted_sum(weights, ids, table), ops.embedding.candidate_dots(grad, ids, table)
    assert sums.dtype == dots.dtype == torch.float32
    exact = reference.soft_embedding(weights.double(), ids, table.double())
    assert_no_worse(sums, reference.soft_embedding(weights, ids, table.float()), exact)
    plain = torch.einsum("nd,nkd->nk", grad.float(), table.float()[ids])
    assert_no_worse(dots, plain, exact_dots(grad, ids, table))
    assert all(map(torch.equal, (weights, ids, grad, table), copies))


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_both_ways_of_pytorch_through_half_tables(monkeypatch, dtype, columns):
    monkeypatch.setattr(torch_ops, "_prefer_columns", lambda indices, table: columns)
    monkeypatch.setattr(torch_ops, "_BLOCK_BYTES", 2**11)  # many blocks
    weights, ids, grad, table = inputs(50, 17, 48, dtype, "cpu")
    exact = reference.soft_embedding(weights.double(), ids, table.double())
    assert rel_err(torch_ops.weighted_sum(weights, ids, table), exact) < 1e-6
    assert rel_err(torch_ops.candidate_dots(grad, ids, table), exact_dots(grad, ids, table)) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k, d", SIZES)
def test_sums_by_id(ops, device, k, d, dtype):
    weights, ids, rows, _ = inputs(9, k, d, dtype, device)
    ids = ids % 7 + 2  # long segments, and ids without an entry at both ends
    for scale, of in ((weights, ids), (None, ids[:, :1])):
        ours = ops.embedding.scatter_sum(scale, of, rows, 11)
        exact = exact_scatter(torch.ones_like(weights[:, :1]) if scale is None else weights, of, rows, 11)
        assert rel_err(ours, exact) < 8 * torch.finfo(torch.float32).eps
        assert (ours[:2] == 0).all() and (ours[9:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_id_in_every_row(ops, device, dtype):
    # 500 entries: 31 full steps of 16 and a part of one; sums that 16 bits would lose.
    weights, _, rows, _ = inputs(500, 2, 5, dtype, device)
    ids = torch.tensor([1, 3], device=device).expand(500, 2)
    ours = ops.embedding.scatter_sum(weights, ids, rows, 4)
    assert rel_err(ours, exact_scatter(weights, ids, rows, 4)) < 2e-6
    assert torch.equal(ours, ops.embedding.scatter_sum(weights, ids, rows, 4))


@pytest.mark.parametrize("leading", [(), (0,), (3,), (2, 2)])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_embedding_and_its_gradients(backend, device, dtype, hard, leading):
    tokens, table = sparse(leading, 5, hard, device), torch.randn(V, 9, device=device).to(dtype).requires_grad_()
    out = soft_embedding(tokens, table)
    assert out.shape == (*leading, 9) and out.dtype == dtype
    v = torch.randn_like(out)
    d_weights, d_table = torch.autograd.grad(out, (tokens.weights, table), v)
    assert d_weights.shape == tokens.weights.shape and d_table.shape == table.shape and d_table.dtype == dtype
    if out.numel() == 0:
        assert (d_table == 0).all()
        return
    weights, ids, rows = tokens.weights.detach().view(-1, 5), tokens.indices.view(-1, 5), v.reshape(-1, 9)
    assert d_weights.dtype == torch.float32 and rel_err(d_weights.view(-1, 5), exact_dots(rows, ids, table)) < 1e-6
    if hard:
        assert torch.equal(out, table[tokens.tokens])
        weights, ids = torch.ones_like(weights[:, :1]), tokens.tokens.reshape(-1, 1)
    else:
        exact = reference.soft_embedding(weights.double(), ids, table.detach().double())
        # One rounding, of the result; rounding the weights to 16 bits would add another.
        close = 0.51 * torch.finfo(dtype).eps
        torch.testing.assert_close(out.double().view(-1, 9), exact, rtol=max(close, 1e-6), atol=1e-6)
    close = max(2e-6, 0.51 * torch.finfo(dtype).eps)
    torch.testing.assert_close(d_table.double(), exact_scatter(weights, ids, rows, V), rtol=close, atol=1e-6)


@pytest.mark.parametrize("hard", [False, True])
def test_gradients_are_those_of_the_dense_product(hard):
    """logits -> scatter -> dense @ E is the definition, straight-through part included."""
    logits = torch.randn(4, 5, 30, dtype=torch.float64, requires_grad=True)
    table = torch.randn(30, 7, dtype=torch.float64, requires_grad=True)
    v = torch.randn(4, 5, 7, dtype=torch.float64)
    tokens = gumbel_topk(logits, 6, 0.5, seed=1, hard=hard)
    ours = torch.autograd.grad((soft_embedding(tokens, table) * v).sum(), (logits, table), retain_graph=True)
    dense = torch.autograd.grad((scatter_tokens(tokens, 30) @ table * v).sum(), (logits, table))
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck():
    tokens = sparse((2, 3), 4, False, "cpu", dtype=torch.float64)
    table = torch.randn(V, 5, dtype=torch.float64, requires_grad=True)

    def embed(w, e):
        return soft_embedding(SparseTokens(tokens.indices, w, tokens.tokens, tokens.mass, False), e)

    assert torch.autograd.gradcheck(embed, (tokens.weights, table))


@pytest.mark.parametrize("hard", [False, True])
def test_table_gradient_is_bitwise_repeatable(backend, device, hard):
    n, repeats = (500, 5) if backend == "torch" else (30, 2)
    tokens, table = sparse((n,), 6, hard, device), torch.randn(V, 16, device=device, requires_grad=True)
    v = torch.randn(n, 16, device=device)
    torch.set_num_threads(2)  # restored by the fixture
    first, *others = (torch.autograd.grad(soft_embedding(tokens, table), table, v)[0] for _ in range(repeats))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_and_a_frozen_table(backend, device, monkeypatch, dtype, hard):
    monkeypatch.setattr(torch_ops, "_BLOCK_BYTES", 2**12)
    n, k, d, vocab = 16, 64, 48, 300
    tokens, table = sparse((n,), k, hard, device, vocab), torch.randn(vocab, d, device=device).to(dtype)
    with Allocations().ignore(table) as made:
        soft_embedding(tokens, table).sum().backward()
    assert tokens.weights.grad.shape == (n, k) and table.grad is None
    assert made.largest < n * k * d / 4  # no [N, k, d]
    assert made.largest < vocab * d / 2  # no gradient of the frozen table
    table.requires_grad_()
    with Allocations().ignore(table) as made:
        soft_embedding(tokens, table).sum().backward()
    assert vocab * d <= made.largest < n * k * d / 2


def test_strides(ops, device):
    """Column slices keep their row stride, transposed tables are copied, and so are expanded gradients."""
    weights, ids, _, wide = inputs(3, 5, 30, torch.float32, device)
    for table in (wide[:, 3:20], torch.randn(17, V, device=device).t()):
        exact = reference.soft_embedding(weights.double(), ids, table.double())
        assert rel_err(ops.embedding.weighted_sum(weights, ids, table), exact) < 1e-6
        for grad in (torch.randn(3, 40, device=device)[:, 1:18], torch.ones(1, 1, device=device).expand(3, 17)):
            assert rel_err(ops.embedding.candidate_dots(grad, ids, table), exact_dots(grad, ids, table)) < 1e-6
            ours = ops.embedding.scatter_sum(weights, ids, grad, V)
            assert rel_err(ours, exact_scatter(weights, ids, grad, V)) < 1e-6


def test_a_slice_of_one_candidate(backend, device):
    """[:, :1] of a longer support is not contiguous, and reshaping it makes no copy."""
    weights, ids, _, table = inputs(3, 5, 4, torch.float32, device)
    tokens = SparseTokens(ids[:, :1], weights[:, :1].requires_grad_(), ids[:, 0], torch.ones(3, device=device), False)
    out = soft_embedding(tokens, table)
    torch.testing.assert_close(out, weights[:, :1] * table[ids[:, 0]])
    (grad,) = torch.autograd.grad(out.sum(), tokens.weights)
    torch.testing.assert_close(grad, table[ids[:, :1]].sum(-1))


def test_infinite_rows_stay_where_they_are(ops, device):
    """Padding of the last step reads no other row: an infinity in row 0 reaches no sum that lacks the row."""
    weights, ids, grad, table = inputs(2, 5, 7, torch.float32, device)
    table[0], ids = torch.inf, ids % (V - 1) + 1
    assert ops.embedding.weighted_sum(weights, ids, table).isfinite().all()
    assert ops.embedding.candidate_dots(grad, ids, table).isfinite().all()


def test_no_rows(ops, device):
    weights, ids, grad, table = inputs(0, 5, 7, torch.bfloat16, device)
    assert ops.embedding.weighted_sum(weights, ids, table).shape == (0, 7)
    assert ops.embedding.candidate_dots(grad, ids, table).shape == (0, 5)
    assert torch.equal(ops.embedding.scatter_sum(weights, ids, grad, V), torch.zeros(V, 7, device=device))
    assert pull_back(weights, ids, Head(table)).shape == (0, 7)
