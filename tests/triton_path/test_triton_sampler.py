"""The sampler as a distribution through Triton: chi-squared and Kolmogorov-Smirnov tests at fixed seeds.

The interpreter takes some 20 ms a row, so it gets hundreds of rows where a GPU gets tens of thousands.  The random
bits are those of the PyTorch path, which is tested with as many: `test_noise_is_that_of_the_pytorch_path`.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from scipy import stats

from grade_kernels import gumbel_topk, random
from grade_kernels.triton_ops import device as device_functions
from grade_kernels.triton_ops import noise
from grade_kernels.triton_ops.launch import launch, words

LOGITS = torch.tensor([0.3, -1.2, 2.0, 0.0, -3.0, 1.1, -0.4, 0.9])
IDS = torch.arange(8)


@triton.jit
def exponential_kernel(out, ids, key, seed_low, seed_high, draw, LANES: tl.constexpr):
    lane = tl.arange(0, LANES)
    ids = tl.load(ids + lane)
    tl.store(out + lane, device_functions.exponential(seed_low, seed_high, draw, tl.load(key), ids))


@triton.jit
def noisy_kernel(out, logits, tokens, seed_low, seed_high, draw, LANES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    values, token = tl.load(logits + lane), tl.load(tokens + row)
    z = noise.noisy_logits(values, lane.to(tl.int64), lane >= 0, row, seed_low, seed_high, draw, token, True)
    tl.store(out + row * LANES + lane, z)


def many(device: str) -> int:
    return 400 if device == "cpu" else 60_000


@pytest.mark.parametrize("seed", [0, -1, 2**63 + 5, 2**31])
@pytest.mark.parametrize(("key", "draw"), [(0, 0), (2**40 + 3, 1), (-7, 2**31 + 1)])
def test_noise_is_that_of_the_pytorch_path(device, seed, key, draw):
    """Equal bits: -log1p(-u) to a few units in the last place, everywhere in the vocabulary and in both tails."""
    ids = torch.randint(0, 262_144, (65_536,))
    expected = random.exponential(seed, draw, torch.tensor([key]), ids[None])[0]
    out = torch.empty(65_536, device=device)
    arguments = (ids.to(device), torch.tensor([key], device=device), *words(seed), words(draw)[0])
    launch(exponential_kernel, (1,), out, *arguments, num_warps=8, LANES=65_536)
    torch.testing.assert_close(out.cpu(), expected, rtol=5e-7, atol=0)
    assert expected.min() < 1e-4 and expected.max() > 9  # there are tails to compare


def test_lower_tail_is_not_cut_off(device):
    """The smallest of 2^19 draws; 24 bits would leave multiples of 6e-8 near 0 and ties among them."""
    ids = torch.arange(2**19)
    out = torch.empty(2**19, device=device)
    arguments = (ids.to(device), torch.zeros(1, dtype=torch.int64, device=device), *words(11), 0)
    launch(exponential_kernel, (1,), out, *arguments, num_warps=8, LANES=2**19)
    small = out.cpu().sort().values[:512]
    assert len(small.unique()) == 512  # 24 bits would tie some of them
    assert stats.kstest(small.double().numpy() / float(small.max()), "uniform").pvalue > 1e-3
    assert stats.kstest(out.cpu().double().numpy(), "expon").pvalue > 1e-3


def test_free_tokens(device):
    n = many(device)
    # A given support, since selecting one is what takes the interpreter long.
    indices = IDS.flip(0).to(device).expand(n, -1)
    tokens = gumbel_topk(LOGITS.to(device).expand(n, -1), tau=0.5, seed=3, indices=indices).tokens.cpu()
    expected = LOGITS.double().softmax(-1) * n
    assert stats.chisquare(torch.bincount(tokens, minlength=8).numpy(), expected.numpy()).pvalue > 1e-3


def test_conditional_noise(device):
    """Given tokens drawn by another sampler, z - logits are independent standard Gumbels and z is largest there."""
    n, exact = many(device), LOGITS.double()
    generator = torch.Generator().manual_seed(5)
    tokens = torch.multinomial(exact.softmax(-1), n, replacement=True, generator=generator)
    out = torch.empty(n, 8, device=device)
    launch(
        noisy_kernel, (n,), out, LOGITS.to(device), tokens.to(device), *words(17), 1, num_warps=1, LANES=8
    )  # fmt: skip
    z = out.cpu().double()
    assert torch.equal(z.argmax(-1), tokens)
    gumbel = z - (exact - exact.max())  # z comes centred
    for column in range(8):
        assert stats.kstest(gumbel[:, column].numpy(), "gumbel_r").pvalue > 1e-3, column
    uniform = torch.exp(-torch.exp(-gumbel))
    assert (torch.corrcoef(uniform.T) - torch.eye(8)).abs().max() < 5 / n**0.5


def test_conditional_weights_are_the_free_weights_that_drew_the_token(device):
    n = many(device) // 2
    indices = IDS.to(device).expand(n, -1)
    logits = LOGITS.to(device).expand(n, -1)
    free = gumbel_topk(logits, 8, 0.5, seed=41, indices=indices)
    drawn = free.weights[free.tokens == 2].cpu()
    tokens = torch.full((n // 2,), 2, device=device)
    given = gumbel_topk(logits[: n // 2], 8, 0.5, seed=42, draw=1, indices=indices[: n // 2], tokens=tokens).weights
    for column in range(8):
        pair = drawn[:, column].numpy(), given[:, column].cpu().numpy()
        assert stats.ks_2samp(*pair).pvalue > 1e-3, column
