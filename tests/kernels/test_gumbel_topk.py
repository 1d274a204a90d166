"""gumbel_topk: the support, the weights and their gradient, conditional noise, and odd rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import HALF

from grade_kernels import SparseTokens, gumbel_topk, place_tokens, random, reference
from grade_kernels.torch_ops import support as support_ops

DTYPES = [torch.float32, torch.float64, *HALF]


def noise_of(result: SparseTokens, seed, draw=0, rows=None):
    n = result.tokens.numel()
    rows = torch.arange(n) if rows is None else rows
    ids = result.indices.reshape(n, -1)
    return random.gumbel(seed, draw, rows, ids, result.weights.dtype).view(result.indices.shape)


# ---------------------------------------------------------------- support


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("vocab", "k"),
    [
        (5000, 256),  # the default k
        (300, 300),  # the whole vocabulary
        (7, 1),
        (1, 1),
    ],
)
def test_support_is_the_exact_topk_in_order(dtype, vocab, k):
    # 5000 normals in bf16 tie everywhere, also at the k-th place.
    logits = torch.randn(9, vocab, generator=torch.Generator().manual_seed(vocab)).to(dtype)
    result = gumbel_topk(logits, k, seed=0)
    assert result.indices.dtype == torch.int64
    assert torch.equal(result.indices, reference.topk(logits.double(), k))


@pytest.mark.parametrize("dtype", DTYPES)
def test_support_with_zeros_of_both_signs_masks_and_extremes(dtype):
    big = torch.finfo(dtype).max
    row = [0.0, -0.0, -torch.inf, 1.0, -1.0, 0.0, -0.0, -torch.inf, big, -big, torch.finfo(dtype).tiny, -1.0]
    logits = torch.tensor([row], dtype=dtype)
    for k in range(1, len(row) + 1):
        got = gumbel_topk(logits, k, seed=0).indices
        assert torch.equal(got, reference.topk(logits.double(), k)), k


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_support_property(data):
    vocab = data.draw(st.integers(1, 40))
    k = data.draw(st.integers(1, vocab))
    dtype = data.draw(st.sampled_from(DTYPES))
    values = st.sampled_from([-torch.inf, -3.0, -0.0, 0.0, 0.5, 0.5009765625, 7.0])
    rows = data.draw(st.lists(st.lists(values, min_size=vocab, max_size=vocab), min_size=1, max_size=4))
    suppress = data.draw(st.lists(st.integers(0, vocab - 1), max_size=5))
    logits = torch.tensor(rows, dtype=dtype)
    result = gumbel_topk(logits, k, seed=1, suppress=suppress)
    expected = reference.topk(logits.double(), k, torch.tensor(suppress, dtype=torch.int64))
    assert torch.equal(result.indices, expected)
    assert (result.indices == result.tokens[:, None]).any(-1).all()
    allowed = ~torch.isin(result.indices, torch.tensor(suppress, dtype=torch.int64))
    alive = (allowed & (logits.gather(-1, result.indices) > -torch.inf)).any(-1)
    assert torch.isfinite(result.weights[alive]).all()
    assert (result.weights[alive][~allowed[alive]] == 0).all()


def test_suppressed_ids_are_left_out():
    logits = torch.arange(10.0).flip(0).repeat(3, 1)
    for suppress in ([0, 2], torch.tensor([0, 2])):
        result = gumbel_topk(logits, 4, seed=0, suppress=suppress)
        assert result.indices.tolist() == [[1, 3, 4, 5]] * 3
        expected = logits[0].softmax(-1)[[1, 3, 4, 5]].sum()  # the mass stays one of the raw row
        torch.testing.assert_close(result.mass, expected.repeat(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_suppressed_ids_that_must_fill_the_support_have_no_weight(dtype):
    logits = torch.tensor([[3.0, -torch.inf, 1.0, 2.0]], dtype=dtype).repeat(200, 1)
    result = gumbel_topk(logits, 4, seed=0, suppress=[0])
    assert result.indices[0].tolist() == [3, 2, 1, 0]
    assert (result.weights[:, 2:] == 0).all()
    assert set(result.tokens.tolist()) == {3, 2}
    assert (gumbel_topk(logits, seed=0, suppress=[0], indices=result.indices).tokens != 0).all()


def test_given_indices_are_used_as_they_are():
    logits = torch.randn(6, 50)
    indices = torch.stack([torch.randperm(50)[:5] for _ in range(6)])
    result = gumbel_topk(logits, 999, seed=3, indices=indices)
    assert torch.equal(result.indices, indices)
    z = logits.gather(-1, indices) + noise_of(result, 3)
    assert torch.equal(result.tokens, indices.gather(-1, z.argmax(-1, keepdim=True)).squeeze(-1))


# ---------------------------------------------------------------- weights, tokens, mass


@pytest.mark.parametrize("tau", [0.1, 1.0, 7.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_tokens_and_mass_follow_the_definition(dtype, tau):
    logits = 3 * torch.randn(20, 400, generator=torch.Generator().manual_seed(0)).to(dtype)
    result = gumbel_topk(logits, 32, tau, seed=5)
    values = logits.double().gather(-1, result.indices)
    position, weights = reference.gumbel_softmax(values, noise_of(result, 5).double(), tau)
    assert torch.equal(result.tokens, result.indices.gather(-1, position[:, None]).squeeze(-1))
    double = dtype == torch.float64
    assert result.weights.dtype == result.mass.dtype == (torch.float64 if double else torch.float32)
    # float32 noise carries a rounding of about 1e-6 at its largest, which 1/tau magnifies.
    tolerance = 1e-12 if double else 3e-6 * max(1, 1 / tau)
    torch.testing.assert_close(result.weights.double(), weights, rtol=tolerance, atol=tolerance)
    mass = logits.double().softmax(-1).gather(-1, result.indices).sum(-1)
    torch.testing.assert_close(result.mass.double(), mass, rtol=tolerance, atol=0)


def test_tau_does_not_touch_the_tokens():
    logits = torch.randn(500, 60)
    tokens = [gumbel_topk(logits, 20, tau, seed=9).tokens for tau in (1e-30, 0.5, 1.0, 1e30)]
    assert all(torch.equal(t, tokens[0]) for t in tokens)
    weights = gumbel_topk(logits, 20, 1e-30, seed=9).weights
    assert torch.equal(weights.amax(-1), torch.ones(500))


def test_a_tie_goes_to_the_lower_id():
    z, indices = torch.tensor([[1.0, 2.0, 2.0], [3.0, 3.0, 3.0]]), torch.tensor([[4, 9, 2], [8, 6, 7]])
    assert support_ops.winner(z, indices).tolist() == [2, 6]


def test_rows_key_the_noise_and_batches_may_be_split():
    logits, rows = torch.randn(6, 5, 40), torch.randint(0, 2**50, (6, 5))
    whole = gumbel_topk(logits, 8, 0.5, seed=2, rows=rows)
    for i in range(6):
        part = gumbel_topk(logits[i], 8, 0.5, seed=2, rows=rows[i])
        assert torch.equal(part.tokens, whole.tokens[i])
        torch.testing.assert_close(part.weights, whole.weights[i], rtol=1e-6, atol=0)
    flipped = gumbel_topk(logits.flip(0), 8, 0.5, seed=2, rows=rows.flip(0))
    assert torch.equal(flipped.tokens, whole.tokens.flip(0))
    default = gumbel_topk(logits, 8, 0.5, seed=2)
    numbered = gumbel_topk(logits, 8, 0.5, seed=2, rows=torch.arange(30).view(6, 5))
    assert torch.equal(default.weights, numbered.weights)


def test_noise_belongs_to_the_id_not_to_the_place():
    logits = torch.randn(40, 30)
    narrow, wide = gumbel_topk(logits, 5, seed=4), gumbel_topk(logits, 12, seed=4)
    torch.testing.assert_close(noise_of(narrow, 4), noise_of(wide, 4)[:, :5])
    inside = (narrow.indices == wide.tokens[:, None]).any(-1)
    assert inside.any() and torch.equal(narrow.tokens[inside], wide.tokens[inside])


# ---------------------------------------------------------------- odd rows and shapes


def test_masked_rows():
    logits = torch.full((3, 8), -torch.inf)
    logits[0, 5] = 0.0
    logits[1, [2, 6]] = torch.tensor([1.0, 2.0])
    leaf = logits.clone().requires_grad_()
    result = gumbel_topk(leaf, 4, 0.5, seed=0)
    assert result.indices.tolist() == [[5, 0, 1, 2], [6, 2, 0, 1], [0, 1, 2, 3]]
    assert result.tokens[0] == 5 and result.tokens[1] in (2, 6)
    assert result.weights[0].tolist() == [1, 0, 0, 0]
    assert (result.weights[1, 2:] == 0).all() and torch.isfinite(result.weights[1]).all()
    assert result.weights[2].isnan().all()  # nothing to sample from
    (result.weights[:2] * torch.randn(2, 4)).sum().backward()
    assert torch.isfinite(leaf.grad[:2]).all()
    assert (leaf.grad[:2][logits[:2] == -torch.inf] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_row_gets_nan_mass_and_spoils_no_other(dtype):
    logits = torch.randn(3, 20).to(dtype)
    clean = gumbel_topk(logits, 5, seed=0)
    logits[1, 7] = torch.nan
    result = gumbel_topk(logits, 5, seed=0)
    assert result.mass.isnan().tolist() == [False, True, False]
    assert result.tokens[1] in result.indices[1]
    for name in ("indices", "weights", "tokens", "mass"):
        assert torch.equal(getattr(result, name)[::2], getattr(clean, name)[::2])


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("leading", [(), (0,), (3, 0, 2), (2, 3)])
def test_leading_shapes(leading, tokens):
    given_tokens = torch.zeros(leading, dtype=torch.int64) if tokens else None
    logits = torch.randn(*leading, 12, requires_grad=True)
    result = gumbel_topk(logits, 4, seed=0, tokens=given_tokens)
    assert result.indices.shape == result.weights.shape == (*leading, 4)
    assert result.tokens.shape == result.mass.shape == leading
    result.weights.sum().backward()
    assert logits.grad.shape == logits.shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_matter_and_inputs_stay(dtype):
    base = torch.randn(4, 7, 30).to(dtype)
    for view in (base[:, :-1], base.transpose(0, 1), base[..., ::2], base[:1].expand(3, 7, 30)):
        copy = view.clone().contiguous()
        a, b = gumbel_topk(view, 6, seed=1), gumbel_topk(copy, 6, seed=1)
        for name in ("indices", "weights", "tokens", "mass"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert torch.equal(view, copy)


# ---------------------------------------------------------------- gradient


@pytest.mark.parametrize("tau", [0.4, 1.0, 2.0])
def test_gradcheck(tau):
    logits = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    result = gumbel_topk(logits.detach(), 5, seed=6)

    def weights(x):  # the support held still, as finite differences could move it
        return gumbel_topk(x, tau=tau, seed=6, indices=result.indices).weights

    assert torch.autograd.gradcheck(weights, logits)


@pytest.mark.parametrize("tokens", [False, True])
def test_gradient_formula(tokens):
    tau, logits = 0.7, torch.randn(4, 25, dtype=torch.float64, requires_grad=True)
    chosen = torch.tensor([0, 5, 24, 7]) if tokens else None
    result = gumbel_topk(logits, 6, tau, seed=6, draw=1, tokens=chosen)
    v = torch.randn(4, 6, dtype=torch.float64)
    (grad,) = torch.autograd.grad((result.weights * v).sum(), logits)
    w = result.weights.detach()
    expected = (w * v - w * (w * v).sum(-1, keepdim=True)) / tau
    torch.testing.assert_close(grad, torch.zeros_like(grad).scatter(-1, result.indices, expected))


@pytest.mark.parametrize("dtype", HALF)
def test_gradient_has_the_dtype_of_the_logits(dtype):
    logits = torch.randn(4, 25).to(dtype).requires_grad_()
    result = gumbel_topk(logits, 6, seed=6)
    result.weights.square().sum().backward()
    exact = logits.detach().double().requires_grad_()
    z = exact.gather(-1, result.indices) + noise_of(result, 6).double()
    z.softmax(-1).square().sum().backward()
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("hard", [False, True])
def test_scatter_is_the_papers_dense_token(hard):
    logits = torch.randn(3, 4, 15, dtype=torch.float64, requires_grad=True)
    result = gumbel_topk(logits, 5, 0.6, seed=8, hard=hard)
    dense = result.scatter(15)
    if hard:
        assert torch.equal(dense, torch.nn.functional.one_hot(result.tokens, 15).double())
    else:
        torch.testing.assert_close(dense.gather(-1, result.indices), result.weights)
        torch.testing.assert_close(dense.sum(-1), torch.ones(3, 4, dtype=torch.float64))
    v = torch.randn(3, 4, 15, dtype=torch.float64)
    (straight_through,) = torch.autograd.grad((dense * v).sum(), logits, retain_graph=True)
    (soft,) = torch.autograd.grad((result.weights * v.gather(-1, result.indices)).sum(), logits)
    torch.testing.assert_close(straight_through, soft)


# ---------------------------------------------------------------- given tokens


def test_place_tokens():
    indices = torch.tensor([[[3, 1, 2], [4, 5, 6]]])
    placed, missed = place_tokens(indices, torch.tensor([[1, 9]]))
    assert placed.tolist() == [[[3, 1, 2], [4, 5, 9]]]
    assert missed.tolist() == [[False, True]]
    assert indices.tolist() == [[[3, 1, 2], [4, 5, 6]]]


@pytest.mark.parametrize("given_indices", [False, True])
def test_a_token_outside_the_support_takes_its_last_place(given_indices):
    logits, tokens = torch.arange(20.0).flip(0).repeat(2, 1), torch.tensor([2, 19])
    indices = torch.arange(4).repeat(2, 1) if given_indices else None
    result = gumbel_topk(logits, 4, seed=0, draw=1, tokens=tokens, indices=indices)
    assert result.indices.tolist() == [[0, 1, 2, 3], [0, 1, 2, 19]]
    assert torch.equal(result.tokens, tokens)
    assert result.weights.argmax(-1).tolist() == [2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 300.0])
def test_the_given_token_always_wins(dtype, scale):
    logits = scale * torch.randn(2000, 30, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits[::3, :10] = -torch.inf
    tokens = torch.arange(2000) % 20 + 10  # likely and next to impossible ones alike
    result = gumbel_topk(logits, 30, 0.5, seed=3, draw=1, tokens=tokens)
    z = support_ops.noisy_logits(
        logits.gather(-1, result.indices), result.indices, torch.arange(2000), 3, 1, tokens
    )
    assert torch.isfinite(result.weights).all()
    best = z == z.amax(-1, keepdim=True)
    assert torch.equal(best, result.indices == tokens[:, None])
    assert torch.equal(result.weights.amax(-1), result.weights[result.indices == tokens[:, None]])


def test_the_given_token_wins_also_where_rounding_makes_a_tie():
    # E = e^-30 puts the other candidate 1e-13 below the maximum, which is no distance in float32.
    neg_gumbel = torch.tensor([[-1.0, -30.0]])
    z = support_ops._truncate(torch.zeros(1, 2), neg_gumbel, torch.tensor([[True, False]]))
    assert z[0, 1] < z[0, 0] and z[0, 0] - z[0, 1] < 1e-6


def test_conditional_noise_matches_its_textbook_form():
    logits, tokens = torch.randn(50, 12, dtype=torch.float64), torch.arange(50) % 12
    ids = torch.arange(12).expand(50, 12)
    z = support_ops.noisy_logits(logits, ids, torch.arange(50), 3, 1, tokens)
    noise = random.exponential(3, 1, torch.arange(50), ids, torch.float64)
    expected = reference.conditional_gumbel(logits, tokens, noise)
    torch.testing.assert_close(z - z.amax(-1, keepdim=True), expected - expected.amax(-1, keepdim=True))


def test_a_given_token_is_not_suppressed():
    logits = torch.zeros(2, 6)
    result = gumbel_topk(logits, 3, seed=0, draw=1, tokens=torch.tensor([1, 4]), suppress=[0, 1])
    assert result.indices.tolist() == [[2, 3, 1], [2, 3, 4]]
    assert result.weights[0, 2] == result.weights[0].max()
    torch.testing.assert_close(result.mass, torch.full((2,), 0.5))
