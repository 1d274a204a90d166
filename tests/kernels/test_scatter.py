"""The dense scatter and the backward pass of the weights on the Triton path."""

import pytest
import torch
from kernel_checks import assert_no_worse

from grade_kernels import SparseTokens, reference
from grade_kernels.torch_ops import sample as torch_ops
from grade_kernels.triton_ops import scatter as ops

# A step of zeros is 8 warps of 32 threads with 4 vectors of 16 bytes: float32 entries.
TILE = 4096


def support(n, k, vocab, device):
    ids = torch.rand(n, vocab).argsort(-1)[:, :k].to(device)
    return ids, torch.rand(n, k, device=device)


# Vocabularies: as many entries as candidates; a part of a step; one step; one more; two and a part.
# Candidates: one; not a power of two; more than the 1024 of a step.
@pytest.mark.parametrize("k, vocab", [(1, 1), (5, 5), (17, 300), (5, TILE), (16, TILE + 1), (1500, 2 * TILE + 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scatter(device, dtype, k, vocab):
    ids, values = support(3, k, vocab, device)
    values[0, 0] = torch.nan
    copies = ids.clone(), values.clone()
    ours = ops.scatter(ids, values, vocab, dtype)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, torch_ops.scatter(ids, values, vocab, dtype), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(ids, copies[0]) and torch.equal(values[1:], copies[1][1:])
    half = values.half()
    expected = torch_ops.scatter(ids, half, vocab, dtype)
    torch.testing.assert_close(ops.scatter(ids, half, vocab, dtype), expected, rtol=0, atol=0, equal_nan=True)


def test_the_ends_of_a_row(device):
    """The first and the last entry belong to their own rows."""
    ids, values = torch.tensor([[0, 6], [6, 0]], device=device), torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=device)
    expected = torch.tensor([[1.0, 0, 0, 0, 0, 0, 2], [4.0, 0, 0, 0, 0, 0, 3]], device=device)
    assert torch.equal(ops.scatter(ids, values, 7, torch.float32), expected)


@pytest.mark.parametrize("tau", [0.3, 1.0])
@pytest.mark.parametrize("k", [1, 5, 16, 17, 1100])
def test_weights_vjp(device, k, tau):
    weights, grad = torch.randn(3, k, device=device).softmax(-1), torch.randn(3, k, device=device)
    jacobian = reference.softmax_jacobian(weights.double())
    exact = (jacobian @ grad.double()[..., None])[..., 0] / tau
    if k == 1:  # the weight is 1 and its derivative 0
        assert (ops.weights_vjp(weights, grad, tau) == 0).all()
        return
    assert_no_worse(ops.weights_vjp(weights, grad, tau), torch_ops.weights_vjp(weights, grad, tau), exact)
    half = grad.bfloat16()  # and gradients that are expanded
    torch.testing.assert_close(ops.weights_vjp(weights, half, tau), ops.weights_vjp(weights, half.float(), tau))
    ones = torch.ones(1, 1, device=device).expand(3, k)
    torch.testing.assert_close(ops.weights_vjp(weights, ones, tau), torch_ops.weights_vjp(weights, ones, tau))


@pytest.mark.parametrize("leading", [(), (0,), (3,), (2, 2)])
@pytest.mark.parametrize("hard", [False, True])
def test_tokens_scatter_and_its_gradient(device, hard, leading):
    ids, weights = support(torch.Size(leading).numel(), 5, 30, device)
    ids, weights = ids.view(*leading, 5), weights.view(*leading, 5).requires_grad_()
    tokens = SparseTokens(ids, weights, ids[..., 2].clone(), weights.detach().sum(-1), hard)
    dense = tokens.scatter(30)
    if hard:
        assert torch.equal(dense, torch.nn.functional.one_hot(tokens.tokens, 30).float())
    else:
        assert torch.equal(dense, torch.zeros(*leading, 30, device=device).scatter(-1, ids, weights.detach()))
    v = torch.randn(*leading, 30, device=device)
    (grad,) = torch.autograd.grad(dense, weights, v)
    assert torch.equal(grad, v.gather(-1, ids))


def test_custom_ops(device):
    ids, values = support(2, 3, 8, device)
    torch.library.opcheck(torch.ops.grade_kernels.scatter, (ids, values, 8, torch.bfloat16))
    torch.library.opcheck(torch.ops.grade_kernels.weights_vjp, (values, values, 0.5))


@pytest.mark.parametrize("hard", [False, True])
def test_compiles_into_one_graph(device, hard):
    ids, weights = support(2, 3, 8, device)
    weights.requires_grad_()

    def dense(weights):
        return SparseTokens(ids, weights, ids[:, 1], weights.detach().sum(-1), hard).scatter(8).square()

    torch._dynamo.reset()
    values = [f(weights) for f in (torch.compile(dense, fullgraph=True, backend="aot_eager"), dense)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value.sum(), weights) for value in values))
