"""soft_embedding on the Triton path: sums, dot products, the table's gradient, memory."""

import pytest
import torch
from kernel_checks import Allocations, assert_no_worse

from grade_kernels import SparseTokens, pull_back, reference, soft_embedding
from grade_kernels.torch_ops import embedding as torch_ops
from grade_kernels.triton_ops import embedding as ops

V = 20
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (candidates, width): one of each; neither a power of two; whole steps of 8 candidates and one vector for each
# thread; one more than steps, lanes and vectors; several column blocks, the last one part full, and a full tile
# of dot products with a tail.
SIZES = [(1, 1), (5, 7), (16, 64), (17, 129), (9, 1100)]


def inputs(n, k, d, dtype, device):
    """(weights, ids with repetitions, gradients, table)."""
    make = {"device": device}
    ids = torch.randint(0, V, (n, k), **make)
    return torch.rand(n, k, **make), ids, torch.randn(n, d, **make).to(dtype), torch.randn(V, d, **make).to(dtype)


def sparse(leading, k, hard, device, vocab=V):
    ids = torch.randint(0, vocab, (*leading, k), device=device)
    weights = torch.rand(*leading, k, device=device).softmax(-1).requires_grad_()
    return SparseTokens(ids, weights, ids[..., 0].clone(), weights.detach().sum(-1), hard)


def exact_scatter(weights, ids, rows, vocab):
    terms = (weights.double()[..., None] * rows.double()[:, None]).flatten(0, 1)
    zeros = torch.zeros(vocab, rows.shape[1], dtype=torch.float64, device=rows.device)
    return zeros.index_add_(0, ids.flatten(), terms)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k, d", SIZES)
def test_sums_and_dot_products(device, k, d, dtype):
    weights, ids, grad, table = inputs(3, k, d, dtype, device)
    copies = [x.clone() for x in (weights, ids, grad, table)]
    gathered = table.double()[ids]
    exact = torch.einsum("nk,nkd->nd", weights.double(), gathered)
    assert_no_worse(ops.weighted_sum(weights, ids, table), torch_ops.weighted_sum(weights, ids, table), exact)
    exact = torch.einsum("nd,nkd->nk", grad.double(), gathered)
    assert_no_worse(ops.candidate_dots(grad, ids, table), torch_ops.candidate_dots(grad, ids, table), exact)
    assert all(map(torch.equal, (weights, ids, grad, table), copies))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k, d", SIZES)
def test_sums_by_id(device, k, d, dtype):
    weights, ids, rows, _ = inputs(9, k, d, dtype, device)
    ids = ids % 7 + 2  # long segments, and ids without an entry at both ends
    ours, plain = ops.scatter_sum(weights, ids, rows, 11), torch_ops.scatter_sum(weights, ids, rows, 11)
    assert_no_worse(ours, plain, exact_scatter(weights, ids, rows, 11))
    ours, plain = ops.scatter_sum(None, ids[:, :1], rows, 11), torch_ops.scatter_sum(None, ids[:, :1], rows, 11)
    assert_no_worse(ours, plain, exact_scatter(torch.ones_like(weights[:, :1]), ids[:, :1], rows, 11))
    assert (ours[:2] == 0).all() and (ours[9:] == 0).all()


def test_an_id_in_every_row(device):
    # 500 entries: 31 full steps of 16 and a part of one; sums that 16 bits would lose.
    weights, _, rows, _ = inputs(500, 2, 5, torch.bfloat16, device)
    ids = torch.tensor([1, 3], device=device).expand(500, 2)
    ours = ops.scatter_sum(weights, ids, rows, 4)
    assert_no_worse(ours, torch_ops.scatter_sum(weights, ids, rows, 4), exact_scatter(weights, ids, rows, 4))
    assert torch.equal(ours, ops.scatter_sum(weights, ids, rows, 4))


@pytest.mark.parametrize("leading", [(), (0,), (3,), (2, 2)])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_soft_embedding_and_its_gradients(device, dtype, hard, leading):
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
    if hard:
        assert torch.equal(out, table[tokens.tokens])
        weights, ids = torch.ones_like(weights[:, :1]), tokens.tokens.reshape(-1, 1)
    else:
        plain = torch_ops.weighted_sum(weights, ids, table.detach()).to(dtype)
        exact = reference.soft_embedding(weights.double(), ids, table.detach().double())
        assert_no_worse(out.view(-1, 9), plain, exact)
    plain = torch_ops.scatter_sum(weights, ids, rows, V).to(dtype)
    assert_no_worse(d_table, plain, exact_scatter(weights, ids, rows, V))
    candidates = tokens.indices.view(-1, 5)
    exact = torch.einsum("nd,nkd->nk", rows.double(), table.detach().double()[candidates])
    plain = torch_ops.candidate_dots(rows, candidates, table.detach())
    assert_no_worse(d_weights.reshape(-1, 5), plain, exact)


@pytest.mark.parametrize("hard", [False, True])
def test_table_gradient_is_bitwise_repeatable(device, hard):
    tokens, table = sparse((40,), 6, hard, device), torch.randn(V, 16, device=device, requires_grad=True)
    v = torch.randn(40, 16, device=device)
    first, second = (torch.autograd.grad(soft_embedding(tokens, table), table, v)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("hard", [False, True])
def test_memory_and_a_frozen_table(device, hard):
    n, k, d, vocab = 4, 24, 40, 300
    tokens, table = sparse((n,), k, hard, device, vocab), torch.randn(vocab, d, device=device)
    with Allocations().ignore(table) as made:
        soft_embedding(tokens, table).sum().backward()
    assert tokens.weights.grad.shape == (n, k) and table.grad is None
    assert made.largest < n * k * d / 4  # no [N, k, d]
    assert made.largest < vocab * d / 4  # no gradient of the frozen table


def test_strides(device):
    """Column slices keep their row stride, transposed tables are copied, and so are expanded gradients."""
    weights, ids, _, wide = inputs(3, 5, 30, torch.float32, device)
    for table in (wide[:, 3:20], torch.randn(17, V, device=device).t()):
        exact = reference.soft_embedding(weights.double(), ids, table.double())
        assert_no_worse(ops.weighted_sum(weights, ids, table), exact.float(), exact)
        for grad in (torch.randn(3, 40, device=device)[:, 1:18], torch.ones(1, 1, device=device).expand(3, 17)):
            exact = torch.einsum("nd,nkd->nk", grad.double(), table.double()[ids])
            assert_no_worse(ops.candidate_dots(grad, ids, table), exact.float(), exact)
            ours = ops.scatter_sum(weights, ids, grad, V)
            assert_no_worse(ours, torch_ops.scatter_sum(weights, ids, grad, V), exact_scatter(weights, ids, grad, V))


def test_infinite_rows_stay_where_they_are(device):
    """Padding of the last step reads no other row: an infinity in row 0 reaches no sum that lacks the row."""
    weights, ids, grad, table = inputs(2, 5, 7, torch.float32, device)
    table[0], ids = torch.inf, ids % (V - 1) + 1
    assert ops.weighted_sum(weights, ids, table).isfinite().all()
    assert ops.candidate_dots(grad, ids, table).isfinite().all()


def test_no_rows(device):
    weights, ids, grad, table = inputs(0, 5, 7, torch.bfloat16, device)
    assert ops.weighted_sum(weights, ids, table).shape == (0, 7)
    assert ops.candidate_dots(grad, ids, table).shape == (0, 5)
    assert torch.equal(ops.scatter_sum(weights, ids, grad, V), torch.zeros(V, 7, device=device))
    assert pull_back(weights, ids, table).shape == (0, 7)


def test_custom_ops(device):
    weights, ids, grad, table = inputs(2, 3, 5, torch.float32, device)
    torch.library.opcheck(torch.ops.grade_kernels.weighted_sum, (weights, ids, table))
    torch.library.opcheck(torch.ops.grade_kernels.candidate_dots, ([grad, grad], [table, table], ids))
    torch.library.opcheck(torch.ops.grade_kernels.scatter_sum, (weights, ids, grad, V))
    torch.library.opcheck(torch.ops.grade_kernels.scatter_sum, (None, ids[:, :1], grad, V))


@pytest.mark.parametrize("hard", [False, True])
def test_compiles_into_one_graph(device, hard):
    tokens, table = sparse((3,), 4, hard, device), torch.randn(V, 6, device=device, requires_grad=True)

    def loss(weights, table):
        mixed = SparseTokens(tokens.indices, weights, tokens.tokens, tokens.mass, hard)
        return soft_embedding(mixed, table).square().sum()

    torch._dynamo.reset()
    arguments = (tokens.weights, table)
    values = [f(*arguments) for f in (torch.compile(loss, fullgraph=True, backend="aot_eager"), loss)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value, arguments) for value in values))
