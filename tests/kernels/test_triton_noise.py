"""The noise in Triton is that of the PyTorch path, which is tested as a distribution with tens of thousands of rows."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from grade_kernels.common import random
from grade_kernels.torch_ops import support
from grade_kernels.triton_ops import device as device_functions
from grade_kernels.triton_ops import noise
from grade_kernels.triton_ops.launch import launch, words

pytestmark = pytest.mark.triton
CALLS = [(0, 0, 0), (2**31, 0, 1), (-1, 2**40 + 3, 1), (2**63 + 5, -7, 2**31 + 1)]  # seed, row, draw


@triton.jit
def philox_kernel(out, counter, seed, LANES: tl.constexpr):
    lane = tl.arange(0, LANES)
    c0 = tl.load(counter + lane).to(tl.uint32)
    c1 = tl.load(counter + LANES + lane).to(tl.uint32)
    c2 = tl.load(counter + 2 * LANES + lane).to(tl.uint32)
    c3 = tl.load(counter + 3 * LANES + lane).to(tl.uint32)
    high, low, _, _ = tl.philox(tl.load(seed), c0, c1, c2, c3)
    tl.store(out + lane, high.to(tl.int64))
    tl.store(out + LANES + lane, low.to(tl.int64))


@triton.jit
def exponential_kernel(out, ids, key, seed_low, seed_high, draw, LANES: tl.constexpr):
    lane = tl.arange(0, LANES)
    ids = tl.load(ids + lane)
    tl.store(out + lane, device_functions.exponential(seed_low, seed_high, draw, tl.load(key), ids))


@triton.jit
def noisy_kernel(out, logits, tokens, seed_low, seed_high, draw, LANES: tl.constexpr, CONDITIONAL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    values, token = tl.load(logits + row * LANES + lane), tl.load(tokens + row)
    z = noise.noisy_logits(values, lane.to(tl.int64), lane >= 0, row, seed_low, seed_high, draw, token, CONDITIONAL)
    tl.store(out + row * LANES + lane, z)


@pytest.mark.parametrize(("seed", "key", "draw"), CALLS)
def test_bits_are_tritons_own(device, seed, key, draw):
    ids = torch.cat([torch.randint(0, 262_144, (60,)), torch.tensor([0, 151_935, 2**31 - 1, 77])])
    expected = random.random_bits(seed, draw, torch.tensor([key]), ids[None])
    fixed = torch.tensor([key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF, draw]).repeat(64, 1)
    counter = torch.stack([fixed[:, 0], fixed[:, 1], ids, fixed[:, 2]]).to(device)
    key_words = torch.tensor([(seed + 2**63) % 2**64 - 2**63], device=device)  # as a signed integer
    out = torch.empty(2, 64, dtype=torch.int64, device=device)
    philox_kernel[(1,)](out, counter, key_words, LANES=64)
    assert torch.equal(out.cpu(), torch.cat(expected))


@pytest.mark.parametrize(("seed", "key", "draw"), CALLS)
def test_exponentials(device, seed, key, draw):
    """Equal bits: -log1p(-u) to a few units in the last place, everywhere in the vocabulary and in both tails."""
    ids = torch.arange(2**18)
    expected = random.exponential(seed, draw, torch.tensor([key]), ids[None])[0]
    out = torch.empty(2**18, device=device)
    arguments = (ids.to(device), torch.tensor([key], device=device), *words(seed), words(draw)[0])
    launch(exponential_kernel, (1,), out, *arguments, num_warps=8, LANES=2**18)
    torch.testing.assert_close(out.cpu(), expected, rtol=5e-7, atol=0)
    assert expected.min() < 2e-5 and expected.max() > 10  # there are tails to compare


@pytest.mark.parametrize("conditional", [False, True])
def test_noisy_logits(device, conditional):
    """Row by row; given a token, it alone is the largest."""
    n, seed, draw = 64, 17, int(conditional)
    logits, tokens = torch.tensor([1.0, 300.0]).repeat(n // 2)[:, None] * torch.randn(n, 8), torch.arange(n) // 2 % 8
    given = tokens if conditional else None
    expected = support.noisy_logits(logits, torch.arange(8).expand(n, 8), torch.arange(n), seed, draw, given)
    out = torch.empty(n, 8, device=device)
    arguments = (logits.to(device), tokens.to(device), *words(seed), draw)
    launch(noisy_kernel, (n,), out, *arguments, num_warps=1, LANES=8, CONDITIONAL=conditional)
    z = out.cpu()
    torch.testing.assert_close(z, expected, rtol=1e-5, atol=1e-5)
    if conditional:
        assert torch.equal(z == z.amax(-1, keepdim=True), torch.arange(8) == tokens[:, None])
