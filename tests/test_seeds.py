"""Derived seeds: fixed numbers, different for different uses."""

from __future__ import annotations

from itertools import product

import numpy
import pytest
import torch

from grade.seeds import derived_seed


@pytest.mark.parametrize(
    "parts, expected",
    [
        ((0,), 4066689987807800415),  # the first eight bytes of SHA-256("0"), little-endian, without the highest bit
        ((0, 1), 2015542916331321731),
        ((0, 1, 2), 5814101051857616576),
        ((12, 3, 0), 8220634896440958400),
    ],
)
def test_seeds_are_these_numbers_everywhere(parts, expected):
    assert derived_seed(*parts) == expected
    assert derived_seed(*(numpy.int64(p) for p in parts)) == expected  # whatever kind of whole number says it
    torch.Generator().manual_seed(expected)


def test_different_parts_have_different_seeds():
    """Order, number and signs of the parts count, and digits do not run together."""
    parts = [*product(range(-2, 12), repeat=2), *product(range(3), repeat=3), *((n,) for n in range(120))]
    assert len({derived_seed(*p) for p in parts}) == len(parts)
