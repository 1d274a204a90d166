"""The dense scatter of sparse tokens, and the backward pass of their weights."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import HALF, rel_err

from grade_kernels import SparseTokens, gumbel_topk, reference, scatter_tokens

# A step of zeros is 8 warps of 32 threads with 4 vectors of 16 bytes: float32 entries.
TILE = 4096


def support(n, k, vocab, device):
    ids = torch.rand(n, vocab).argsort(-1)[:, :k].to(device)
    return ids, torch.rand(n, k, device=device)


# Vocabularies: as many entries as candidates; a part of a step; one step; one more; two and a part.
# Candidates: one; not a power of two; more than the 1024 of a step.
@pytest.mark.parametrize("k, vocab", [(1, 1), (5, 5), (17, 300), (5, TILE), (16, TILE + 1), (1500, 2 * TILE + 16)])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_scatter(ops, device, dtype, k, vocab):
    ids, values = support(3, k, vocab, device)
    values[0, 0] = torch.nan
    copies = ids.clone(), values.clone()
    for given in (values, values.half()):
        expected = torch.zeros(3, vocab, dtype=dtype, device=device)
        expected[torch.arange(3, device=device)[:, None], ids] = given.to(dtype)
        ours = ops.scatter.scatter(ids, given, vocab, dtype)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(ids, copies[0]) and torch.equal(values[1:], copies[1][1:])


@pytest.mark.parametrize("tau", [0.3, 1.0])
@pytest.mark.parametrize("k", [1, 5, 16, 17, 1100])
def test_weights_vjp(ops, device, k, tau):
    weights, grad = torch.randn(3, k, device=device).softmax(-1), torch.randn(3, k, device=device)
    if k == 1:  # the weight is 1 and its derivative 0
        assert (ops.scatter.weights_vjp(weights, grad, tau) == 0).all()
        return
    jacobian = reference.softmax_jacobian(weights.double())
    for v in (grad, grad.bfloat16(), torch.ones(1, 1, device=device).expand(3, k)):
        exact = (jacobian @ v.double()[..., None])[..., 0] / tau
        error = (ops.scatter.weights_vjp(weights, v, tau).double() - exact).abs().max()
        assert error < 8 * torch.finfo(torch.float32).eps * (weights * v).abs().max() / tau


@pytest.mark.parametrize("leading", [(), (0,), (3,), (2, 2)])
@pytest.mark.parametrize("hard", [False, True])
def test_tokens_and_their_gradient(backend, device, hard, leading):
    """The first and the last entry of a row belong to it; the gradient is straight-through where hard."""
    ids, weights = support(torch.Size(leading).numel(), 7, 7, device)
    ids, weights = ids.view(*leading, 7), weights.view(*leading, 7).requires_grad_()
    tokens = SparseTokens(ids, weights, ids[..., 2].clone(), weights.detach().sum(-1), hard)
    dense = scatter_tokens(tokens, 7)
    if hard:
        assert torch.equal(dense, torch.nn.functional.one_hot(tokens.tokens, 7).float())
    else:
        assert torch.equal(dense, torch.zeros(*leading, 7, device=device).scatter(-1, ids, weights.detach()))
    v = torch.randn(*leading, 7, device=device)
    (grad,) = torch.autograd.grad(dense, weights, v)
    assert torch.equal(grad, v.gather(-1, ids))


@pytest.mark.parametrize("hard", [False, True])
def test_samples_of_float64(hard):
    logits = torch.randn(3, 4, 15, dtype=torch.float64, requires_grad=True)
    result = gumbel_topk(logits, 5, 0.6, seed=8, hard=hard)
    dense, v = scatter_tokens(result, 15), torch.randn(3, 4, 15, dtype=torch.float64)
    torch.testing.assert_close(dense.sum(-1), torch.ones(3, 4, dtype=torch.float64))
    straight_through, soft = (
        torch.autograd.grad((a * b).sum(), logits, retain_graph=True)[0]
        for a, b in ((dense, v), (result.weights, v.gather(-1, result.indices)))
    )
    assert rel_err(straight_through, soft) < 1e-15
