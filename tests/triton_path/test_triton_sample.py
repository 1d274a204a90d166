"""gumbel_topk through Triton: exact supports on every road through the selection, the sample, and its gradient."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import HALF, assert_no_worse

from grade_kernels import gumbel_topk, linear_gumbel_topk, random, reference
from grade_kernels.torch_ops import sample as torch_sample
from grade_kernels.triton_ops import sample as ops

SEED = 2**63 + 9  # both words are in use, and the high one is negative as a signed integer
DTYPES = [torch.float32, *HALF]
INF = float("inf")


def compare(logits, k, device, *, tau=0.7, draw=0, suppress=None, indices=None, tokens=None):
    """Triton's ids, values and log-sum-exp, and its sample, against the PyTorch path's; the sample is returned."""
    n = logits.shape[:-1].numel()
    rows = torch.arange(n) + 2**33  # keys beyond 32 bits
    flat = logits.reshape(n, -1)
    given = [None if x is None else x.to(device) for x in (suppress, indices, tokens)]
    ours = ops.select(logits.to(device), k, *given, torch.float32)
    plain = torch_sample.select(flat, k, suppress, indices, tokens, torch.float32)
    assert torch.equal(ours.ids.cpu(), plain.ids)
    assert torch.equal(ours.values.cpu(), plain.values)
    exact = flat.double().logsumexp(-1)
    if exact.isfinite().all():
        assert_no_worse(ours.lse.cpu(), plain.lse, exact)

    arguments = (k, tau, rows.to(device), SEED, draw)
    ids, sampled = ops.select_and_sample(logits.to(device), *arguments, *given, torch.float32)
    _, expected = torch_sample.select_and_sample(
        flat, k, tau, rows, SEED, draw, suppress, indices, tokens, torch.float32
    )
    assert torch.equal(ids.cpu(), plain.ids)
    check_sample(sampled, expected, plain, rows, draw, tokens)
    return sampled


def check_sample(sampled, expected, support, rows, draw, given):
    """Equal weights and mass to rounding; equal tokens, but where the two best are that close."""
    weights, tokens, mass = (x.cpu() for x in sampled)
    torch.testing.assert_close(weights, expected.weights, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mass, expected.mass, rtol=1e-5, atol=1e-7)
    if given is not None:
        assert torch.equal(tokens, given)
        return
    assert (support.ids == tokens[:, None]).any(-1).all()
    noise = random.gumbel(SEED, draw, rows, support.ids)
    best = (support.values + noise).topk(min(2, support.ids.shape[1]), dim=-1).values
    near_tie = best[:, 0] - best[:, -1] < 1e-5 * best[:, 0].abs().clamp(min=1)
    differs = tokens != expected.tokens
    assert not (differs & ~near_tie).any()
    assert differs.float().mean() <= 0.001 + 1.0 / len(tokens) * near_tie.any()


# ---------------------------------------------------------------- supports


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("vocab", "k"),
    [
        (1, 1),
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
def test_support(device, dtype, vocab, k):
    logits = torch.randn(2, vocab) * 3
    compare(logits.to(dtype), k, device)


def test_large_vocabulary(device):
    """The largest vocabulary of the common tokenizers: 4,096 groups of 64, and the row's first read is split."""
    assert ops.plan(262_144, 16, torch.empty(0)).groups == 4096
    compare(torch.randn(1, 262_144) * 2, 16, device)


def test_default_k(device):
    compare(torch.randn(1, 6000), 256, device)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 256, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
def test_full_size(device, dtype, k):
    if device == "cpu":
        pytest.skip("too large for the interpreter")
    for vocab in (151_936, 50_257):
        compare(torch.randn(300, vocab) * 3, k, device)


@pytest.mark.gpu
def test_random_shapes(device):
    if device == "cpu":
        pytest.skip("too many programs for the interpreter")
    generator = torch.Generator().manual_seed(1)
    for _ in range(60):
        vocab, n = (int(torch.randint(1, high, (), generator=generator)) for high in (40_000, 200))
        k = int(torch.randint(1, min(vocab, 1024) + 1, (), generator=generator))
        logits = (torch.randn(n, vocab, generator=generator) * 2).to(DTYPES[vocab % 3])
        suppress = torch.randperm(vocab, generator=generator)[: vocab // 10] if n % 2 else None
        compare(logits, k, device, suppress=suppress)


@pytest.mark.parametrize("k", [1, 4, 16])
def test_ties(device, k):
    """Small integers tie at every place, also at the k-th: the lower id goes first."""
    compare(torch.randint(0, 4, (1, 500)).float(), k, device)


def test_all_equal(device):
    """Nothing distinguishes the entries but their ids: over the row, since no buffer holds them."""
    result = compare(torch.zeros(1, 1100), 4, device)
    assert result.mass.item() == pytest.approx(4 / 1100)


def test_zeros_of_both_signs_are_equal(device):
    logits = torch.tensor([[-1.0, 0.0, -0.0, 2.0, -0.0, 0.0, -5.0, -INF]])
    for k in (3, 5, 8):
        compare(logits, k, device)


def test_sorted_rows(device):
    """All candidates are neighbours, so a few groups hold them: rising, falling, and the rest far below."""
    rising = torch.arange(3000.0)
    block = torch.full((3000,), -50.0)
    block[1000:1100] = torch.rand(100)
    compare(torch.stack([rising, rising.flip(0), block]), 16, device)


@pytest.mark.parametrize("finite", [0, 3, 16])
def test_masked_rows(device, finite):
    """Fewer than or exactly k = 16 finite entries; the others are -inf and come in the order of their ids."""
    logits = torch.full((1, 600), -INF)
    logits[:, torch.randperm(600)[:finite]] = torch.randn(finite)
    ours = ops.select(logits.to(device), 16, None, None, None, torch.float32)
    assert torch.equal(ours.ids.cpu(), reference.topk(logits, 16))
    if finite:
        compare(logits, 16, device)


def test_narrowing_in_the_buffer(device):
    """More candidates than are sorted (32), but no more than the buffer (256) holds: 100 large neighbours."""
    logits = torch.full((1, 4000), -9.0)
    logits[:, 2000:2100] = torch.randn(100)
    plan = ops.plan(4000, 16, logits)
    assert plan.buffers["SORT"] < 100 < plan.buffers["LIMIT"]
    compare(logits, 16, device)


def test_infinities(device):
    logits = torch.randn(1, 500)
    logits[0, 3] = INF
    ours = ops.select(logits.to(device), 16, None, None, None, torch.float32)
    assert torch.equal(ours.ids.cpu(), reference.topk(logits, 16))


def test_nan_rows_are_marked(device):
    """The mass is NaN, the ids are those of the PyTorch path (NaN first), and the other rows do not notice."""
    logits = torch.randn(3, 1000)
    logits[1, 700] = logits[1, 20] = torch.nan
    result = gumbel_topk(logits.to(device), 16, seed=0)
    assert result.mass.isnan().tolist() == [False, True, False]
    expected = torch_sample.select(logits, 16, None, None, None, torch.float32)
    assert torch.equal(result.indices.cpu(), expected.ids)
    assert (result.indices == result.tokens[:, None]).any(-1).all()


@pytest.mark.parametrize("suppressed", [1, 300, 990])
def test_suppressed_ids(device, suppressed):
    """Left out of the support, also the largest; with 990 of 1000 gone, 6 of the 16 places hold them at -inf."""
    logits = torch.randn(2, 1000)
    best, ids = logits[0].argmax(), torch.randperm(1000)
    suppress = torch.cat([best[None], ids[ids != best]])[:suppressed]
    sampled = compare(logits, 16, device, suppress=suppress)
    assert not torch.isin(sampled.tokens.cpu(), suppress).any()


def test_rows_with_strides(device):
    logits = torch.randn(2, 3, 90, dtype=torch.bfloat16)
    compare(logits[:, :-1], 7, device)  # two strides
    compare(logits[:1, :1].expand(2, 2, -1), 7, device)  # no stride
    compare(torch.randn(90, 3, 2).transpose(0, 2), 3, device)  # entries not adjacent
    compare(torch.randn(2, 2, 2, 40)[:, :1, :1], 3, device)  # a stride for every dimension


def test_splitting_a_row_changes_nothing(device, monkeypatch):
    """Fewer rows than multiprocessors: the first read of a row is shared out."""
    logits = torch.randn(2, 40_000)
    for processors in (1, 132):
        monkeypatch.setattr(ops, "multiprocessors", lambda device, p=processors: p)
        compare(logits, 16, device)
        compare(logits, 16, device, indices=torch.arange(32).view(2, 16))


def test_batches_larger_than_the_scratch(device, monkeypatch):
    monkeypatch.setattr(ops, "_SCRATCH_BYTES", 2 * 8 * 256)  # two rows a launch
    compare(torch.randn(5, 300), 4, device)


def test_empty_batch(device):
    result = gumbel_topk(torch.empty(2, 0, 50, device=device), 3, seed=0)
    assert result.indices.shape == result.weights.shape == (2, 0, 3)
    assert result.tokens.shape == result.mass.shape == (2, 0)


def test_one_dimension(device):
    result = gumbel_topk(torch.randn(50, device=device), 3, seed=0)
    assert result.weights.shape == (3,) and result.tokens.shape == ()


def test_random_candidates_are_few():
    """What `topk` claims of rows in random order, at the sizes it names: candidates for 256 of 151,936."""
    plan = ops.plan(151_936, 256, torch.empty(0, dtype=torch.bfloat16))
    assert plan.groups == 2560 and plan.width * plan.steps == 64
    logits = torch.randn(20, plan.tiles * plan.lanes * 64)
    logits[:, 151_936:] = -INF
    # [tile, step, lane, width] -> a group is what a lane sees of a tile
    maxima = logits.view(20, plan.tiles, plan.steps, plan.lanes, plan.width).amax((2, 4)).flatten(1)
    bound = maxima.topk(256).values[:, -1:]
    passed = (logits >= bound).sum(-1).float()
    assert 256 <= passed.min() and 265 < passed.mean() < 280 and passed.max() < plan.buffers["SORT"]


# ---------------------------------------------------------------- samples


def test_conditional_samples(device):
    """Tokens at the edge of the support, outside it, far outside it, and first but suppressed; all but the last of
    these places are taken by others."""
    logits = torch.randn(4, 300)
    order = logits.argsort(descending=True)
    tokens = torch.stack([order[0, 0], order[1, 7], order[2, 8], order[3, 299]])
    result = compare(logits, 8, device, draw=1, tokens=tokens, suppress=order[0, :1])
    assert (result.weights.argmax(-1) == 7).all()


def test_given_support(device):
    logits = torch.randn(3, 300)
    indices = torch.stack([torch.randperm(300)[:9] for _ in range(3)])
    compare(logits, 9, device, indices=indices)
    compare(logits, 9, device, indices=indices, suppress=indices[:, 0])
    compare(logits, 9, device, indices=indices, tokens=torch.tensor([5, 6, 7]), draw=2, suppress=indices[0, :4])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient(device, dtype):
    """dl = (w v - w <w, v>) / tau at the support and 0 elsewhere, in the dtype of the logits."""
    logits = torch.randn(2, 3, 200).to(dtype)
    v = torch.randn(2, 3, 6)
    ours = logits.to(device).requires_grad_()
    result = gumbel_topk(ours, 6, 0.5, seed=3)
    result.weights.backward(v.to(device))
    assert ours.grad.dtype == dtype
    w = result.weights.detach().cpu().double()
    expected = w * (v - (w * v).sum(-1, keepdim=True)) / 0.5
    dense = torch.zeros(2, 3, 200, dtype=torch.double).scatter(-1, result.indices.cpu(), expected)
    tolerance = torch.finfo(dtype).eps * dense.abs().max()
    torch.testing.assert_close(ours.grad.cpu().double(), dense, rtol=0, atol=float(tolerance))


def test_linear_is_the_same_without_the_logits(device):
    hidden, weight = torch.randn(3, 8), torch.randn(400, 8)
    leaves = [x.to(device).requires_grad_() for x in (hidden, weight)]
    sparse = linear_gumbel_topk(*leaves, 7, 0.5, seed=1, chunk_bytes=1, suppress=[3])
    sparse.weights.square().sum().backward()
    others = [x.to(device).requires_grad_() for x in (hidden, weight)]
    dense = gumbel_topk(others[0] @ others[1].T, 7, 0.5, seed=1, suppress=[3])
    dense.weights.square().sum().backward()
    assert torch.equal(sparse.indices, dense.indices) and torch.equal(sparse.tokens, dense.tokens)
    torch.testing.assert_close(sparse.weights, dense.weights)
    torch.testing.assert_close(sparse.mass, dense.mass)
    for ours, theirs in zip(leaves, others, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_inputs_stay_as_they_were(device):
    logits, tokens, rows = torch.randn(2, 300), torch.tensor([1, 2]), torch.tensor([7, 8])
    arguments = [x.to(device) for x in (logits, tokens, rows)]
    gumbel_topk(arguments[0], 4, seed=0, draw=1, tokens=arguments[1], rows=arguments[2], suppress=[1])
    for before, after in zip((logits, tokens, rows), arguments, strict=True):
        assert torch.equal(before, after.cpu())


# ---------------------------------------------------------------- as operators


def test_opcheck(device):
    logits, keys = torch.randn(2, 100, device=device), torch.arange(2, device=device)
    some = torch.tensor([3, 5], device=device)
    support = ops.select(logits, 4, None, None, None, torch.float32)
    torch.library.opcheck(torch.ops.grade_kernels.select, (logits, 4, some, None, None))
    torch.library.opcheck(
        torch.ops.grade_kernels.select_and_sample, (logits, 4, 0.5, keys, 1, 2, 1, None, None, some)
    )
    torch.library.opcheck(
        torch.ops.grade_kernels.sample,
        (support.values, support.ids, support.lse, keys, 1, 2, 0, None, 0.5),
    )


def test_one_graph(device):
    def sample(logits):
        return gumbel_topk(logits, 5, 0.5, seed=1, suppress=[2]).weights.square().sum()

    logits = torch.randn(2, 90, device=device, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(sample, fullgraph=True, backend="aot_eager")(logits)
    torch.testing.assert_close(compiled, sample(logits))
    torch.testing.assert_close(*(torch.autograd.grad(f, logits)[0] for f in (compiled, sample(logits))))
