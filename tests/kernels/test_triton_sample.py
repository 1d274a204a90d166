"""gumbel_topk in Triton: the roads through the selection, full sizes, and its operators."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import HALF
from sampling_checks import check_sample

from grade_kernels import reference, triton_ops
from grade_kernels.triton_ops import sample

pytestmark = pytest.mark.triton
DTYPES = [torch.float32, *HALF]


def check(logits, k, **options):
    return check_sample(triton_ops, logits, k, **options)


def test_large_vocabulary(device):
    """The largest vocabulary of the common tokenizers: 4,096 groups of 64, and the row's first read is split."""
    assert sample.plan(262_144, 16, torch.empty(0)).groups == 4096
    check(2 * torch.randn(1, 262_144, device=device), 16)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 256, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
def test_full_size(device, dtype, k):
    for vocab in (151_936, 50_257):
        check(3 * torch.randn(300, vocab).to(device, dtype), k)


@pytest.mark.gpu
def test_random_shapes(device):
    generator = torch.Generator().manual_seed(1)
    for _ in range(60):
        vocab, n = (int(torch.randint(1, high, (), generator=generator)) for high in (40_000, 200))
        k = int(torch.randint(1, min(vocab, 1024) + 1, (), generator=generator))
        logits = (torch.randn(n, vocab, generator=generator) * 2).to(device, DTYPES[vocab % 3])
        suppress = torch.randperm(vocab, generator=generator)[: vocab // 10].to(device) if n % 2 else None
        check(logits, k, suppress=suppress)


def test_splitting_a_row_changes_nothing(device, monkeypatch):
    """Fewer rows than multiprocessors: the first read of a row is shared out."""
    logits = torch.randn(2, 40_000, device=device)
    for processors in (1, 132):
        monkeypatch.setattr(sample, "multiprocessors", lambda device, p=processors: p)
        check(logits, 16)
        check(logits, 16, indices=torch.arange(32, device=device).view(2, 16))


def test_batches_larger_than_the_scratch(device, monkeypatch):
    monkeypatch.setattr(sample, "_SCRATCH_BYTES", 2 * 4 * 256)  # two rows a launch
    check(torch.randn(5, 300, device=device), 4)


@pytest.mark.parametrize(("k", "counts"), [(127, (127, 128)), (128, (128, 129, 255, 256, 257))])
def test_blocks_of_candidates(device, k, counts):
    """128 groups are read again at a time, and at most 2k: as many hold the largest entry as fill one block or two, one
    fewer and one more."""
    vocab = 40_000
    plan = sample.plan(vocab, k, torch.empty(0))
    assert plan.groups > 512 and plan.buffers["READ"] == 128
    logits = torch.rand(len(counts), vocab)
    for row, count in zip(logits, counts, strict=True):
        group = torch.randperm(plan.groups)[:count]
        row[group // plan.lanes * plan.lanes * plan.width * plan.steps + group % plan.lanes * plan.width] = 5.0
    ids, values, _ = triton_ops.sample.select(logits.to(device), k, None, None, None, torch.float32)
    assert torch.equal(ids.cpu(), reference.topk(logits, k)) and (values == 5.0).all()


def masked(row: torch.Tensor, kept: slice) -> torch.Tensor:
    return torch.full_like(row, -torch.inf).index_copy(0, torch.arange(len(row))[kept], row[kept])


LOGITS = {
    "wide": lambda x: 30 * x,
    "equal": lambda x: torch.full_like(x, 7.3),
    "far above 0": lambda x: 1e4 + 3 * x,
    "far below 0": lambda x: -1e4 + 3 * x,
    "far above and below 0": lambda x: 1e4 * x.sign() + x,
    "masked but for 3": lambda x: masked(x, slice(-3, None)),
    "first tile masked, far below 0": lambda x: masked(-1e4 + 3 * x, slice(20_000, None)),
    "masked by the lowest float": lambda x: torch.where(x > 3, x, torch.finfo(x.dtype).min),
    "the lowest float alone": lambda x: torch.full_like(x, torch.finfo(x.dtype).min),
    "the largest float": lambda x: torch.where(x == x.max(), torch.finfo(x.dtype).max, x),
}


@pytest.mark.parametrize("processors", [1, 132])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_sum_exp_is_rounded_once(device, monkeypatch, dtype, processors):
    """The error is the rounding of the result to float32 and three units of float32 at 1, also where logits are large,
    for one program a row and for several."""
    monkeypatch.setattr(sample, "multiprocessors", lambda device: processors)
    x = torch.randn(40_000).to(dtype)
    logits = torch.stack([row(x) for row in LOGITS.values()]).to(device)
    assert logits.dtype == dtype
    indices = torch.zeros(len(logits), 1, dtype=torch.int64, device=device)
    lse = triton_ops.sample.select(logits, 1, None, indices, None, torch.float32).lse.double()
    exact, eps = logits.double().logsumexp(-1), torch.finfo(torch.float32).eps
    assert ((lse - exact).abs() <= eps * (exact.abs() / 2 + 3)).all()


def test_random_candidates_are_few():
    """What `topk` claims of rows in random order, at the sizes it names: candidates for 256 of 151,936."""
    plan = sample.plan(151_936, 256, torch.empty(0, dtype=torch.bfloat16))
    assert plan.groups == 2560 and plan.width * plan.steps == 64
    logits = torch.randn(20, plan.tiles * plan.lanes * 64)
    logits[:, 151_936:] = -torch.inf
    # [tile, step, lane, width] -> a group is what a lane sees of a tile
    maxima = logits.view(20, plan.tiles, plan.steps, plan.lanes, plan.width).amax((2, 4)).flatten(1)
    bound = maxima.topk(256).values[:, -1:]
    passed = (logits >= bound).sum(-1).float()
    assert 256 <= passed.min() and 265 < passed.mean() < 280 and passed.max() < plan.buffers["SORT"]
