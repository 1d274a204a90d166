"""logits_kl of 16-bit logits, whose rows have one exponent each: where that is far off, and where terms change form."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import HALF, rel_err
from kl_checks import INF, TILE, assert_stats, judge, stats_and_grads

WIDE = 2 * TILE + 24  # its last tile is not full
pytestmark = pytest.mark.parametrize("dtype", HALF)


@pytest.fixture
def pair(dtype, device):
    """Logits [3, WIDE] of both sides, some tenths apart."""
    p = 3 * torch.randn(3, WIDE)
    q = p + 0.3 * torch.randn(3, WIDE)
    return p.to(device, dtype), q.to(device, dtype)


def assert_exact(ops, p, q, rtol=2e-6):
    (stats, *grads), (kl, *exact) = stats_and_grads(ops, p, q), judge(p, q)
    torch.testing.assert_close(stats.kl.double(), kl, rtol=rtol, atol=0)
    assert_stats(stats, p, q)
    for mine, truth in zip(grads, exact, strict=True):
        assert rel_err(mine, truth) < 3e-6


@pytest.mark.parametrize("place", [TILE + 3, 2 * TILE + 1])
@pytest.mark.parametrize("above", [15.0, 40.0, 80.0, 200.0])
def test_a_later_entry_that_outweighs_the_first_tile(ops, pair, place, above):
    """By less than a float32 can hold, and by more; the divergence is down to e^-200."""
    p, q = pair
    p[:, place] = above
    q[:, place] = above + 2.0
    p[0, place + 1] = q[0, place + 1] = above  # not alone in the first row, whose divergence is then larger
    (stats, *_), (kl, *_) = stats_and_grads(ops, p, q), judge(p, q)
    torch.testing.assert_close(stats.kl.double(), kl, rtol=3e-6, atol=1e-38)
    assert_stats(stats, p, q)


@pytest.mark.parametrize("mask", [-1e3, "lowest", -INF])
def test_a_first_tile_that_is_masked(ops, pair, mask, dtype):
    p, q = pair
    for side in pair:
        side[:, :TILE] = torch.finfo(dtype).min if mask == "lowest" else mask
    assert_exact(ops, p, q)


@pytest.mark.parametrize("depth", [30.0, 80.0, 90.0, 100.0, 150.0])
def test_lanes_that_are_nothing_under_one_side(ops, pair, depth):
    """Beyond a few entries all is far below the first, in the second tile even for a float32; and the other way."""
    p, q = pair
    p[:, 2:] = -depth
    q[:, 2 : TILE + 500] = -depth
    for first, second in ((p, q), (q, p)):
        (stats, *_), (kl, *_) = stats_and_grads(ops, first, second), judge(first, second)
        torch.testing.assert_close(stats.kl.double(), kl, rtol=3e-6, atol=0)


@pytest.mark.parametrize("offset", [-20.0, 1.0, 3.0, 50.0])
def test_a_shift_of_one_side(ops, pair, offset):
    p, q = pair
    q += offset
    (stats, *_), (kl, *_) = stats_and_grads(ops, p, q), judge(p, q)
    torch.testing.assert_close(stats.kl.double(), kl, rtol=2e-6, atol=0)
    assert_stats(stats, p, q)


@pytest.mark.parametrize("difference", [0.25, 0.5, 0.74609375, 0.75, 0.75390625, 1.0])
def test_where_terms_change_their_form(ops, difference, device, dtype):
    """Half of the mass a step up, half of it down: |u| is the step, the same for all."""
    p = torch.zeros(1, 2 * TILE, device=device, dtype=dtype)
    q = difference * torch.ones_like(p)
    q[:, ::2] *= -1
    assert_exact(ops, p, q, rtol=1e-6)


def test_a_few_likely_entries_and_small_divergences(ops, pair):
    """Most of the mass on one entry of a later tile with a difference of its own, as trained models have it."""
    p, q = pair
    p[:, TILE + 7] = torch.tensor([16.0, 20.0, 24.0])
    q[:, TILE + 7] = p[:, TILE + 7] - 0.25
    (stats, *_), (kl, *_) = stats_and_grads(ops, p, q), judge(p, q)
    assert kl.min() < 1e-5
    torch.testing.assert_close(stats.kl.double(), kl, rtol=3e-6, atol=0)


def test_a_row_whose_first_likely_entry_is_nothing_under_the_other_side(ops, device, dtype):
    """Equal lanes, whose errors add up: the exponents of q are about 90 where that of its mass is taken for 0."""
    pattern = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0)).expand(2, 256, 8).reshape(-1)
    p = pattern.repeat(4)[None].to(dtype)
    step = 4 * 64 * torch.finfo(dtype).eps
    q = p.float() + 64.0 + step * (torch.arange(4 * TILE) // TILE % 2)
    p[:, 0], q[:, 0] = 4.0, 4.0
    p, q = p.to(device), q.to(device, dtype)
    (stats, *_), (kl, *_) = stats_and_grads(ops, p, q), judge(p, q)
    assert kl < 1.0
    torch.testing.assert_close(stats.kl.double(), kl, rtol=2e-6, atol=0)
