"""What a reward depends on beside its code: which names count, which values are told, and always by the same text."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property, lru_cache, partial, wraps
from pathlib import Path

import numpy as np
import pytest
import torch

from grade.rewards.attributes import of_function, told

LIMIT, WORDS, FACTOR, count, unread = 5, ["good"], 2.0, 3, 4


def in_nested_code(completions):
    longest = lambda text: len(text) > LIMIT  # noqa: E731

    def scaled(value):
        return FACTOR * value

    return [scaled(longest(text)) for text in completions if text.count("a") and any(w in text for w in WORDS)]


def test_names_inside_nested_functions_count_and_attributes_do_not():
    """`count` is a method of texts here, and a global beside it."""
    assert of_function(in_nested_code) == {"LIMIT": "5", "WORDS": '["good"]', "FACTOR": "2.0"}


def with_defaults(low, high=7, /, *, words=frozenset("ba")):
    def function(completions, factor=1.5, *, offset=0):
        class Inside:
            at = LIMIT

        return [factor * (low < len(text) < high) + offset + Inside.at for text in completions if text not in words]

    return function


def times(factor):
    def decorated(function):
        @wraps(function)
        def wrapper(completions):
            return [factor * value for value in function(completions)]

        return wrapper

    return decorated


@times(3)
def decorated(completions, least=2):
    return [float(len(text) > least) for text in completions]


@lru_cache
def cached(least=2):
    return least


def test_defaults_cells_and_what_a_decorator_wraps_count():
    found = {"factor": "1.5", "offset": "0", "low": "1", "high": "7", "words": '["a", "b"]', "LIMIT": "5"}
    assert of_function(with_defaults(1)) == found
    given = partial(with_defaults(1), factor=4, others={"d", "c"})
    assert of_function(given) == {**found, "factor": "4", "others": '["c", "d"]'}
    assert of_function(decorated) == {"factor": "3", "least": "2"}
    assert of_function(cached) == {"least": "2"}


class Longer:
    def __init__(self, threshold):
        self.threshold, self._calls = threshold, 0

    @cached_property
    def words(self):
        return ["kept once it was asked"]

    def __call__(self, completions, threshold=9):
        return [float(len(text) > min(threshold, self.threshold, LIMIT)) for text in completions]

    def score(self, completions):
        return self(completions, LIMIT)


class Slotted(Longer):
    __slots__ = ("width",)

    def __init__(self):
        super().__init__(1)
        self.width = 3


def test_an_object_is_told_beside_what_its_code_reads():
    """Under names of its own: neither `threshold` stands in for the other."""
    reward = Longer(6)
    found = {"threshold": "9", "LIMIT": "5", "self.threshold": "6"}
    assert of_function(reward) == found
    assert reward.words and of_function(reward) == found
    assert of_function(reward.score) == {"LIMIT": "5", "self.threshold": "6"}
    assert of_function(Slotted())["self.width"] == "3"


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_the_names_are_the_same_on_every_python(version):
    """Of those that are installed; the compilers of two of them make no function of a comprehension."""
    python = shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"Python {version} is not here")
    program = """
from grade.rewards.dependencies import read_by
LIMIT, WORDS, count = 5, ["good"], 3
def make(low):
    def function(completions, factor=2.0, *, offset=1):
        class Inside:
            at = LIMIT
        return {text.count("a"): [w for w in WORDS if w in text and low] for text in completions}
    return function
print(sorted(item for item in read_by(make(7)).items() if item[0] != "__name__"))
"""
    done = subprocess.run([python, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    expected = [("LIMIT", 5), ("WORDS", ["good"]), ("factor", 2.0), ("low", 7), ("offset", 1)]
    assert done.stdout.strip() == str(expected), done.stderr


class Color(Enum):
    RED = 1


@dataclass
class Settings:
    width: int = 3
    names: list = field(default_factory=lambda: ["a"])
    model: object = field(default_factory=object)
    _asked: int = 0


def text_of(value):
    return told({"value": value})["value"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (re.compile("a"), re.compile("a", re.IGNORECASE)),
        (Path("a"), Path("b")),
        (b"a", b"b"),
        (Color.RED, 1),
        (Settings(), Settings(width=4)),
        ({1: "a"}, {"1": "a"}),
        ({frozenset("ab"), frozenset("cd")}, {frozenset("ab"), frozenset("ce")}),
        (np.float32(0.5), np.float32(0.25)),
        (np.arange(4), np.arange(4) + 1),
        (np.arange(4, dtype=">i4"), np.arange(4, dtype=">i4") + 1),
        (np.array(["a", "b"]), np.array(["a", "c"])),
        (torch.zeros(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16)),
        (torch.zeros(2, dtype=torch.complex64), torch.zeros(2, dtype=torch.complex64) + 1j),
        (torch.zeros(2**22 + 1, dtype=torch.int8), torch.ones(2**22 + 1, dtype=torch.int8)),
        (torch.eye(3).to_sparse(), (2 * torch.eye(3)).to_sparse()),
        (torch.eye(3).to_sparse_csr(), (2 * torch.eye(3)).to_sparse_csr()),
        (torch.zeros(2, device="meta"), torch.zeros(3, device="meta")),
        (
            torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
            torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8),
        ),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_values_are_told_by_content(one, other):
    assert text_of(one) == text_of(one) != text_of(other)


def test_what_cannot_be_told_is_left_out():
    assert told({"object": object(), "among others": [1, object()], "_kept": 1, "bool": True}) == {"bool": "true"}
    assert text_of(Settings()) == text_of(Settings(model=object(), _asked=7))
    sparse = torch.sparse_coo_tensor([[0], [2**40]], [1.0], (1, 2**41))  # as it is: dense it has terabytes
    assert text_of(sparse) == text_of(sparse.clone())


IN_A_PROCESS = """
import sys
from functools import partial
from grade.rewards.attributes import of_function, stable_repr, told
words = {"good", "bad", "fine", "poor", "great", "awful"}
def function(completions, words=frozenset(words)):
    return [float(text in words) for text in completions]
given = partial(function, nested={frozenset({word, "a"}) for word in words}, others=[words], by={"a": words})
print(told({"words": words, "nested": {frozenset({word, "a"}) for word in words}}))
print(of_function(given))
print(stable_repr(function.__defaults__), stable_repr(sorted(given.keywords.items())), stable_repr((1,)))
assert "transformers" not in sys.modules
"""


def test_no_text_depends_on_the_order_of_a_set():
    """Which is another in every process."""
    done = [
        subprocess.run(
            [sys.executable, "-c", IN_A_PROCESS],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=200,
        )
        for seed in ("1", "2")
    ]
    assert done[0].stdout and done[0].stdout == done[1].stdout, (done[0].stderr, done[1].stderr)
    assert done[0].stdout.endswith("(1,)\n")
