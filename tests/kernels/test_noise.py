"""The counter-based noise: its bits, its distribution and its tails."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from grade_kernels.common import random

WORD = 0xFFFFFFFF


# The known-answer vectors that Random123 ships for philox4x32 with 10 rounds: counter, key, the half that is used.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D)),
        ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB)),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """The counter is (row, low word first; id; draw)."""
    row = counter[0] | counter[1] << 32
    rows, ids = torch.tensor([(row + 2**63) % 2**64 - 2**63]), torch.tensor([[counter[2]]])
    high, low = random.random_bits(key[0] | key[1] << 32, counter[3], rows, ids)
    assert (int(high), int(low)) == expected


def test_noise_does_not_depend_on_batch_split_or_order():
    rows = torch.tensor([4, 2**40, 0, 17, 2**33 + 1])
    ids = torch.randint(0, 150_000, (5, 64), generator=torch.Generator().manual_seed(0))
    whole = random.gumbel(7, 0, rows, ids)
    one_by_one = torch.stack([random.gumbel(7, 0, rows[i], ids[i]) for i in range(5)])
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.equal(whole, one_by_one)
    assert torch.equal(random.gumbel(7, 0, rows[order], ids[order]), whole[order])
    columns = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(random.gumbel(7, 0, rows, ids[:, columns]), whole[:, columns])


@pytest.mark.parametrize("change", ["seed low", "seed high", "draw", "row low", "row high", "id"])
def test_every_part_of_the_key_matters(change):
    def bits(seed=1, draw=0, row=0, offset=0):
        return random.random_bits(seed, draw, torch.tensor([row]), torch.arange(1000)[None] + offset)[0]

    other = {
        "seed low": bits(seed=2),
        "seed high": bits(seed=1 + 2**32),
        "draw": bits(draw=1),
        "row low": bits(row=1),
        "row high": bits(row=2**32),
        "id": bits(offset=1000),
    }[change]
    base = bits()
    assert (base == other).sum() == 0
    correlation = torch.corrcoef(torch.stack([base.double().flatten(), other.double().flatten()]))[0, 1]
    assert abs(correlation) < 4 / math.sqrt(1000)


def test_seed_and_draw_wrap():
    rows, ids = torch.tensor([0]), torch.arange(8)[None]
    assert torch.equal(random.gumbel(-1, 0, rows, ids), random.gumbel(2**64 - 1, 0, rows, ids))
    assert torch.equal(random.gumbel(2**64 + 5, 2**32 + 2, rows, ids), random.gumbel(5, 2, rows, ids))


def test_neither_the_global_random_state_nor_an_input_is_touched():
    before, rows, ids = torch.get_rng_state(), torch.arange(4), torch.arange(40).view(4, 10)
    random.gumbel(1, 0, rows, ids)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(rows, torch.arange(4)) and torch.equal(ids, torch.arange(40).view(4, 10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distributions(dtype):
    rows, ids = torch.arange(400), torch.arange(500).expand(400, 500)
    exponential = random.exponential(11, 0, rows, ids, dtype).flatten().numpy()
    gumbel = random.gumbel(12, 0, rows, ids, dtype).flatten().numpy()
    assert exponential.dtype == gumbel.dtype == torch.empty(0, dtype=dtype).numpy().dtype
    assert stats.kstest(exponential, "expon").pvalue > 1e-3
    assert stats.kstest(gumbel, "gumbel_r").pvalue > 1e-3


def test_every_byte_of_the_bits_is_uniform():
    high, low = random.random_bits(5, 0, torch.arange(200), torch.arange(500).expand(200, 500))
    for word in (high, low):
        for shift in (0, 8, 16, 24):
            counts = torch.bincount((word >> shift).flatten() & 255, minlength=256)
            assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_neighbouring_rows_and_ids_are_independent():
    noise = random.gumbel(3, 0, torch.arange(300), torch.arange(300).expand(300, 300), torch.float64)
    for a, b in ((noise[:-1], noise[1:]), (noise[:, :-1], noise[:, 1:])):
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation) < 4 / math.sqrt(a.numel())


def from_bits(monkeypatch, bits: int, dtype, name: str = "exponential") -> float:
    pair = (torch.tensor([[bits >> 32]]), torch.tensor([[bits & WORD]]))
    monkeypatch.setattr(random, "random_bits", lambda *args: pair)
    return float(getattr(random, name)(0, 0, torch.zeros(1), torch.zeros(1, 1), dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [0, 1, 12345, 2**20 + 7, 2**31 + 3, 2**40 + 1025, 2**55 + 5, 2**62 + 77])
def test_small_exponentials_keep_their_digits(monkeypatch, dtype, bits):
    # These are the upper tail of the Gumbel, which decides the samples.
    exact = -math.log1p(-(bits + 0.5) * 2.0**-64)
    assert from_bits(monkeypatch, bits, dtype) == pytest.approx(exact, rel=4 * torch.finfo(dtype).eps)


def test_gumbel_tail_reaches_past_16(monkeypatch):
    # 24-bit uniforms end at 16.6, 32-bit ones at 22.2.
    assert from_bits(monkeypatch, 0, torch.float32, "gumbel") == pytest.approx(65 * math.log(2), rel=1e-6)
    assert from_bits(monkeypatch, 2**36, torch.float32, "gumbel") == pytest.approx(28 * math.log(2), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [2**64 - 1, 2**64 - 2**10, 2**64 - 2**41])
def test_largest_uniforms_stay_finite(monkeypatch, dtype, bits):
    value = from_bits(monkeypatch, bits, dtype)
    assert 15 < value < 64 * math.log(2)
    assert math.isfinite(from_bits(monkeypatch, bits, dtype, "gumbel"))


def test_tail_frequencies():
    # 2^21 draws hold 95.2 above 10 and 4739 above 6.1 on average: within 5 standard deviations.
    noise = random.gumbel(21, 0, torch.arange(2**9), torch.arange(2**12).expand(2**9, 2**12))
    for threshold in (6.1, 10.0):
        expected = noise.numel() * -math.expm1(-math.exp(-threshold))
        assert abs(int((noise > threshold).sum()) - expected) < 5 * math.sqrt(expected)
