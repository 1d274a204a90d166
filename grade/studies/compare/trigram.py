"""A trigram language model with interpolated Kneser-Ney smoothing: what a text is like, as judged by other texts alone.

It shares neither weights nor data with a policy or its reward. After S. F. Chen and J. Goodman, "An empirical study of
smoothing techniques for language modeling", Computer Speech & Language 13 (1999), section 2.7, with one discount an
order, D = n1 / (n1 + 2 n2) of n1 n-grams that were counted once and n2 that were counted twice:

    p(w | u v) = (c(u v w) - D)+ / c(u v)  +  D N(u v) / c(u v) * p(w | v)

N(u v): how many different words follow u v. The orders below count in how many different contexts an n-gram stands
instead of how often, and the lowest is interpolated with the uniform distribution.

Counts are sorted arrays of the n-grams that occur, found by binary search: nothing of size V or more but the vocabulary
itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]
LARGEST = 2**20
"""Largest vocabulary: three of its ids, and the one of a beginning, fit into 63 bits."""


@dataclass(frozen=True)
class _Order:
    """The n-grams of one order.

    Attributes:
        keys: int64 [m], sorted: the n-grams that occur, each as one number.
        share: float64 [m], their discounted share of their context.
        contexts: int64 [c], sorted: the contexts that occur.
        backoff: float64 [c], what a context leaves to the order below.
    """

    keys: Ids
    share: Floats
    contexts: Ids
    backoff: Floats

    def interpolated(self, keys: Ids, contexts: Ids, below: Floats) -> Floats:
        """Probabilities of n-grams [n] in their contexts, from those of the order below."""
        share, backoff = _found(self.keys, self.share, keys, 0.0), _found(self.contexts, self.backoff, contexts, 1.0)
        return share + backoff * below


class Trigrams:
    """Counts of texts, and the probabilities that they give.

    Args:
        rows: texts as ids of [0, size), which may be empty. Two marks stand before every text; no mark of an end is
            counted, as a text is judged up to where it is cut.
        size: of the vocabulary.

    Raises:
        ValueError: the vocabulary is larger than `LARGEST`, or the texts have no token.
    """

    def __init__(self, rows: Sequence[Sequence[int]], size: int):
        if size > LARGEST or not any(len(row) for row in rows):
            raise ValueError(f"{len(rows)} texts without a token, or a vocabulary of {size} tokens, above {LARGEST}")
        self.size, self.base = size, size + 1  # the last id is the mark before a text
        trigrams, counts = np.unique(self._keys(*self._contexts(rows)), return_counts=True)
        # What is below the highest order counts different continuations: each trigram that occurs once.
        bigrams, before = np.unique(trigrams % self.base**2, return_counts=True)
        words, contexts = np.unique(bigrams % self.base, return_counts=True)
        self._trigram, self._bigram = self._order(trigrams, counts), self._order(bigrams, before)
        self._word = self._order(words, contexts)

    def _order(self, keys: Ids, counts: Ids) -> _Order:
        contexts, place, different = np.unique(keys // self.base, return_inverse=True, return_counts=True)
        totals = np.bincount(place, weights=counts)
        once, twice = (int((counts == n).sum()) for n in (1, 2))
        # Without n-grams counted once the formula would leave nothing for what has not been seen, and without any
        # counted twice it would take all from what was seen once.
        discount = once / (once + 2 * twice) if once and twice else 0.5
        share = np.maximum(counts - discount, 0.0) / totals[place]
        return _Order(keys, share, contexts, discount * different / totals)

    def _contexts(self, rows: Sequence[Sequence[int]]) -> tuple[Ids, Ids, Ids]:
        """(two before, one before, token) of every token of the texts, int64 [n] each."""
        marks = [self.size, self.size]
        ids = np.array([i for row in rows for i in (*marks, *row)], dtype=np.int64)
        lengths = np.array([len(row) + 2 for row in rows], dtype=np.int64)
        real = np.ones(len(ids), dtype=bool)
        starts = np.cumsum(lengths) - lengths
        real[starts], real[starts + 1] = False, False
        at = real.nonzero()[0]
        return ids[at - 2], ids[at - 1], ids[at]

    def _keys(self, first: Ids, second: Ids, third: Ids) -> Ids:
        return (first * self.base + second) * self.base + third

    def logprobs(self, rows: Sequence[Sequence[int]]) -> list[Floats]:
        """Log-probability of every token of every text given what stands before it in that text, nats: one float64
        array a text."""
        lengths = [len(row) for row in rows]
        if not sum(lengths):
            return [np.zeros(0) for _ in rows]
        first, second, third = self._contexts(rows)
        bigrams, trigrams = second * self.base + third, self._keys(first, second, third)
        uniform = np.full(len(third), 1 / self.size)
        word = self._word.interpolated(third, np.zeros_like(third), uniform)
        bigram = self._bigram.interpolated(bigrams, second, word)
        trigram = self._trigram.interpolated(trigrams, trigrams // self.base, bigram)
        return np.split(np.log(trigram), np.cumsum(lengths)[:-1])


def _found(keys: Ids, values: Floats, wanted: Ids, missing: float) -> Floats:
    """Values by sorted keys; `missing` for a key that is not there."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], missing)
