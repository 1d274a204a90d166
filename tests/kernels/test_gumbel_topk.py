"""gumbel_topk: the support, the weights and their gradient, conditional noise, and odd rows."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import HALF
from sampling_checks import check_sample
from torch._dynamo.utils import counters

from grade_kernels import Head, gumbel_topk, linear_gumbel_topk, place_tokens, reference
from grade_kernels.torch_ops import support as support_ops

DTYPES = [torch.float64, torch.float32, *HALF]
INF = torch.inf
FIELDS = ("indices", "weights", "tokens", "mass")


# ---------------------------------------------------------------- support


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("vocab", "k"),
    [
        (1, 1),
        (7, 1),
        (7, 7),  # k = V, less than a warp
        (127, 3),  # one below the 128 lanes of a small vocabulary
        (128, 16),  # a group for each lane
        (129, 17),  # one entry in the second tile; k above a power of two
        (1000, 5),  # not a multiple of a vector load
        (8191, 16),  # the last size with four warps
        (16384, 16),  # a whole tile of 256 lanes with 64 entries each
        (16385, 16),  # and one entry more
    ],
)
def test_sizes(ops, device, dtype, vocab, k):
    check_sample(ops, (3 * torch.randn(2, vocab)).to(device, dtype), k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_default_k(ops, device, dtype):
    # 6000 normals in bf16 tie everywhere, also at the k-th place.
    check_sample(ops, torch.randn(1, 6000).to(device, dtype), 256)


def neighbours(size: int, first: int, count: int, rest: float) -> torch.Tensor:
    row = torch.full((size,), rest)
    row[first : first + count] = torch.randn(count)
    return row


ROWS = {
    "ties at every place": lambda: torch.randint(0, 4, (500,)).float(),
    "all equal": lambda: torch.zeros(1100),  # over the row, since no buffer holds them
    "zeros of both signs": lambda: torch.tensor([-1.0, 0.0, -0.0, 2.0, -0.0, 0.0, -5.0, -INF] + 12 * [-7.0]),
    # All candidates are neighbours, so a few groups hold them.
    "rising": lambda: torch.arange(3000.0),
    "falling": lambda: torch.arange(3000.0).flip(0),
    "a block": lambda: neighbours(3000, 1000, 100, -50.0),
    # More candidates than the kernel sorts, but no more than its buffer holds.
    "narrowing": lambda: neighbours(4000, 2000, 100, -9.0),
    "3 finite entries": lambda: neighbours(600, 100, 3, -INF),
    "16 finite entries": lambda: neighbours(600, 300, 16, -INF),
}


@pytest.mark.parametrize(("name", "k"), [*((name, 16) for name in ROWS), ("ties at every place", 4), ("all equal", 4)])
def test_odd_rows(ops, device, name, k):
    check_sample(ops, ROWS[name]().to(device)[None], k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [3, 8, 12])
def test_extremes(backend, device, dtype, k):
    big, tiny = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    row = [0.0, -0.0, -INF, 1.0, -1.0, 0.0, -0.0, -INF, big, -big, tiny, -1.0]
    logits = torch.tensor([row], dtype=dtype, device=device)
    assert torch.equal(gumbel_topk(logits, k, seed=0).indices, reference.topk(logits.double(), k))


@pytest.mark.parametrize("suppressed", [1, 300, 990])
def test_suppressed_ids(ops, device, suppressed):
    """Left out of the support, also the largest; with 990 of 1000 gone, 6 of the 16 places hold them at -inf."""
    logits = torch.randn(2, 1000)
    best, ids = logits[0].argmax(), torch.randperm(1000)
    suppress = torch.cat([best[None], ids[ids != best]])[:suppressed].to(device)
    result = check_sample(ops, logits.to(device), 16, suppress=suppress)
    assert not torch.isin(result.tokens, suppress).any()


def test_suppressed_ids_may_be_a_list():
    logits = torch.tensor([[3.0, -INF, 1.0, 2.0]])
    results = [gumbel_topk(logits, 4, seed=0, suppress=ids) for ids in ([0, 1], torch.tensor([0, 1]))]
    for name in FIELDS:
        assert torch.equal(getattr(results[0], name), getattr(results[1], name))
    assert results[0].indices.tolist() == [[3, 2, 0, 1]]


def test_given_support(ops, device):
    logits = torch.randn(3, 300).to(device)
    indices = torch.stack([torch.randperm(300)[:9] for _ in range(3)]).to(device)
    check_sample(ops, logits, 999, indices=indices)
    check_sample(ops, logits, 9, indices=indices, suppress=indices[:, 0])
    tokens = torch.tensor([5, 6, 7], device=device)
    check_sample(ops, logits, 9, indices=indices, tokens=tokens, draw=2, suppress=indices[0, :4])


# ---------------------------------------------------------------- weights and tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [0.1, 1.0, 7.0])
def test_weights_and_tokens_follow_the_definition(ops, device, dtype, tau):
    # Rows of a given support, since it is selecting one that takes the interpreter long.
    indices = torch.stack([torch.randperm(400)[:12] for _ in range(12)]).to(device)
    check_sample(ops, 3 * torch.randn(12, 400).to(device, dtype), 12, tau=tau, indices=indices)


@pytest.mark.parametrize("head", [False, True], ids=["logits", "head"])
def test_a_tau_in_a_tensor_is_that_number(backend, device, head):
    """At each call it is what the tensor then holds, in one compiled graph too."""
    logits, v = (torch.randn(4, n, device=device) for n in (50, 6))
    tau = torch.ones((), device=device)

    def weights(logits, tau):
        if head:
            return linear_gumbel_topk(logits, Head(torch.eye(50, device=device)), 6, tau, seed=3).weights
        return gumbel_topk(logits, 6, tau, seed=3).weights

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(weights, fullgraph=True, dynamic=False, backend="aot_eager")
    for value in (0.3, 2.0, 1.1):
        tau.fill_(value)
        results = []
        for call, temperature in ((weights, tau.item()), (weights, tau), (compiled, tau)):
            x = logits.clone().requires_grad_()
            out = call(x, temperature)
            results.append((out, *torch.autograd.grad(out, x, v)))
        torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(results[2], results[0], rtol=1e-6, atol=1e-7)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("head", [False, True], ids=["logits", "head"])
def test_a_backward_pass_behind_a_change_of_tau_is_refused(backend, device, head):
    """Its gradient would be another temperature's than its weights."""
    x, tau = torch.randn(4, 50, device=device, requires_grad=True), torch.ones((), device=device)
    if head:
        weights = linear_gumbel_topk(x, Head(torch.eye(50, device=device)), 6, tau, seed=3).weights
    else:
        weights = gumbel_topk(x, 6, tau, seed=3).weights
    tau.fill_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        weights.square().sum().backward()


def test_tau_does_not_touch_the_tokens(backend, device):
    logits, indices = torch.randn(10, 20).to(device), torch.arange(20, device=device).expand(10, 20)
    results = [gumbel_topk(logits, tau=tau, seed=9, indices=indices) for tau in (1e-30, 0.5, 1e30)]
    assert all(torch.equal(result.tokens, results[0].tokens) for result in results)
    assert torch.equal(results[0].weights.amax(-1), torch.ones(10, device=device))


def test_a_tie_goes_to_the_lower_id():
    z, indices = torch.tensor([[1.0, 2.0, 2.0], [3.0, 3.0, 3.0]]), torch.tensor([[4, 9, 2], [8, 6, 7]])
    assert support_ops.winner(z, indices).tolist() == [2, 6]


def test_rows_key_the_noise_and_batches_may_be_split(backend, device):
    logits, rows = torch.randn(3, 2, 40).to(device), torch.randint(0, 2**50, (3, 2)).to(device)
    whole = gumbel_topk(logits, 8, 0.5, seed=2, rows=rows)
    for i in range(3):
        part = gumbel_topk(logits[i], 8, 0.5, seed=2, rows=rows[i])
        assert torch.equal(part.tokens, whole.tokens[i])
        torch.testing.assert_close(part.weights, whole.weights[i], rtol=1e-6, atol=0)
    default = gumbel_topk(logits, 8, 0.5, seed=2)
    numbered = gumbel_topk(logits, 8, 0.5, seed=2, rows=torch.arange(6, device=device).view(3, 2))
    assert torch.equal(default.weights, numbered.weights)


# ---------------------------------------------------------------- odd rows and shapes


def test_masked_rows(backend, device):
    logits = torch.full((3, 8), -INF)
    logits[0, 5] = 0.0
    logits[1, [2, 6]] = torch.tensor([1.0, 2.0])
    leaf = logits.to(device).requires_grad_()
    result = gumbel_topk(leaf, 4, 0.5, seed=0)
    assert result.indices.tolist() == [[5, 0, 1, 2], [6, 2, 0, 1], [0, 1, 2, 3]]
    assert result.tokens[0] == 5 and result.tokens[1] in (2, 6)
    assert result.weights[0].tolist() == [1, 0, 0, 0]
    assert (result.weights[1, 2:] == 0).all() and torch.isfinite(result.weights[1]).all()
    assert result.weights[2].isnan().all()  # nothing to sample from
    (result.weights[:2] * torch.randn(2, 4, device=device)).sum().backward()
    grad = leaf.grad[:2].cpu()
    assert torch.isfinite(grad).all() and (grad[logits[:2] == -INF] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_nan_row_gets_nan_mass_and_spoils_no_other(backend, device, dtype):
    """NaN comes first; so does +inf, whose row has no distribution either."""
    logits = torch.randn(4, 500).to(device, dtype)
    clean = gumbel_topk(logits, 5, seed=0)
    logits[1, 70] = logits[1, 400] = torch.nan
    logits[3, 7] = INF
    result = gumbel_topk(logits, 5, seed=0)
    assert result.mass[:3].isnan().tolist() == [False, True, False]
    assert torch.equal(result.indices, reference.topk(logits, 5))
    assert result.tokens[1] in result.indices[1]
    for name in FIELDS:
        assert torch.equal(getattr(result, name)[:3:2], getattr(clean, name)[:3:2])


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("leading", [(), (0,), (3, 0, 2), (2, 3)])
def test_leading_shapes(backend, device, leading, tokens):
    given_tokens = torch.zeros(leading, dtype=torch.int64, device=device) if tokens else None
    logits = torch.randn(*leading, 12, device=device, requires_grad=True)
    result = gumbel_topk(logits, 4, seed=0, tokens=given_tokens)
    assert result.indices.shape == result.weights.shape == (*leading, 4)
    assert result.tokens.shape == result.mass.shape == leading
    result.weights.sum().backward()
    assert logits.grad.shape == logits.shape


VIEWS = {
    "two strides": lambda x: x[:, :-1],
    "turned": lambda x: x.transpose(0, 1),
    "every other entry": lambda x: x[..., ::2],
    "no stride": lambda x: x[:1].expand(3, *x.shape[1:]),
    "entries not adjacent": lambda x: x[..., :6].transpose(0, 2),
    "a stride for every dimension": lambda x: x.view(2, 3, 2, 15)[:, :1, :1],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strides_do_not_matter_and_inputs_stay(backend, device, view, dtype):
    logits = view(torch.randn(2, 3, 30).to(device, dtype))
    copy = logits.clone(memory_format=torch.contiguous_format)
    tokens = torch.ones(logits.shape[:-1], dtype=torch.int64, device=device)
    a, b = (gumbel_topk(x, 2, seed=1, draw=1, tokens=tokens, rows=2 * tokens) for x in (logits, copy))
    for name in FIELDS:
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert torch.equal(logits, copy) and (tokens == 1).all()


# ---------------------------------------------------------------- gradient


def test_gradcheck():
    logits = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    result = gumbel_topk(logits.detach(), 5, seed=6)

    def weights(x):  # the support held still, as finite differences could move it
        return gumbel_topk(x, tau=0.4, seed=6, indices=result.indices).weights

    assert torch.autograd.gradcheck(weights, logits)


@pytest.mark.parametrize("tokens", [None, [0, 5, 24, 7]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient(backend, device, dtype, tokens):
    """dl = (w v - w <w, v>) / tau at the support and 0 elsewhere, in the dtype of the logits."""
    logits = torch.randn(2, 2, 200).to(device, dtype).requires_grad_()
    chosen = None if tokens is None else torch.tensor(tokens, device=device).view(2, 2)
    result = gumbel_topk(logits, 6, 0.5, seed=3, draw=1, tokens=chosen)
    v = torch.randn(2, 2, 6).to(result.weights)
    (grad,) = torch.autograd.grad(result.weights, logits, v)
    w, v = result.weights.detach().double(), v.double()
    expected = w * (v - (w * v).sum(-1, keepdim=True)) / 0.5
    dense = torch.zeros(2, 2, 200, dtype=torch.double, device=device).scatter(-1, result.indices, expected)
    assert grad.dtype == dtype
    # The rounding of the result, and of the two terms that it is the difference of.
    terms = 2 * torch.finfo(result.weights.dtype).eps * (w * v).abs().max() / 0.5
    assert (grad.double() - dense).abs().max() <= torch.finfo(dtype).eps * dense.abs().max() + terms


# ---------------------------------------------------------------- given tokens


def test_place_tokens():
    indices = torch.tensor([[[3, 1, 2], [4, 5, 6]]])
    placed, missed = place_tokens(indices, torch.tensor([[1, 9]]))
    assert placed.tolist() == [[[3, 1, 2], [4, 5, 9]]]
    assert missed.tolist() == [[False, True]]
    assert indices.tolist() == [[[3, 1, 2], [4, 5, 6]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conditional_samples(ops, device, dtype):
    """Tokens at the edge of the support, outside it, far outside it, and first but suppressed; all but the last of
    these places are taken by others."""
    logits = torch.randn(4, 300).to(device, dtype)
    order = logits.argsort(descending=True)
    tokens = torch.stack([order[0, 0], order[1, 7], order[2, 8], order[3, 299]])
    result = check_sample(ops, logits, 8, draw=1, tokens=tokens, suppress=order[0, :1])
    assert (result.weights.argmax(-1) == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 300.0])
def test_the_given_token_always_wins(ops, device, dtype, scale):
    logits = scale * torch.randn(10, 30).to(device, dtype)
    logits[::3, :10] = -INF
    tokens = torch.arange(10, device=device) + 15  # likely and next to impossible ones alike
    indices = torch.arange(30, device=device).repeat(10, 1)
    result = check_sample(ops, logits, 30, tau=0.5, draw=1, tokens=tokens, indices=indices)
    assert torch.isfinite(result.weights).all()
    assert torch.equal(result.weights.amax(-1), result.weights[indices == tokens[:, None]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_given_token_is_the_only_winner(dtype):
    for scale in (0, 1, 30, 300):
        logits, tokens = scale * torch.randn(2000, 30).to(dtype), torch.arange(2000) % 30
        z = support_ops.noisy_logits(logits, torch.arange(30).expand(2000, 30), torch.arange(2000), 3, 1, tokens)
        assert torch.equal(z == z.amax(-1, keepdim=True), torch.arange(30) == tokens[:, None])
    # E = e^-30 puts the other candidate 1e-13 below the maximum, which is no distance in float32.
    neg_gumbel = torch.tensor([[-1.0, -30.0]])
    z = support_ops._truncate(torch.zeros(1, 2), neg_gumbel, torch.tensor([[True, False]]))
    assert z[0, 1] < z[0, 0] and z[0, 0] - z[0, 1] < 1e-6
