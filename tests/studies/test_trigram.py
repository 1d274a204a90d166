"""The trigram model: a corpus counted by hand, and that it is a distribution."""

from __future__ import annotations

import numpy as np
import pytest

from grade.studies.compare.trigram import Trigrams

A, B = 0, 1


def test_a_corpus_counted_by_hand():
    """Texts `a b a` and `a b`, a vocabulary of 3. Trigrams with their marks ^: ^^a twice, ^ab twice, aba once, so that
    n1 = 1, n2 = 2 and D = 1/5. Bigrams by how many contexts they have: ^a, ab and ba each one, so that D = 1/2 where no
    n2 is there. Words by how many words they follow: a two (^ and b), b one: n1 = n2 = 1, D = 1/3."""
    model = Trigrams([[A, B, A], [A, B]], size=3)
    left = 1 / 3 * 2 / 3  # D * different words / all of them, shared by 3 words
    a, b = (2 - 1 / 3) / 3 + left / 3, (1 - 1 / 3) / 3 + left / 3
    a_after_start, b_after_a, a_after_b = 0.5 + 0.5 * a, 0.5 + 0.5 * b, 0.5 + 0.5 * a
    expected = [
        (2 - 0.2) / 2 + 0.2 / 2 * a_after_start,
        (2 - 0.2) / 2 + 0.2 / 2 * b_after_a,
        (1 - 0.2) / 1 + 0.2 * a_after_b,
    ]
    found, unseen, none = model.logprobs([[A, B, A], [2, 2], []])
    np.testing.assert_allclose(found, np.log(expected), rtol=1e-12)
    # `2` occurs nowhere: its share of the uniform distribution, by what each order leaves for the one below.
    np.testing.assert_allclose(unseen, np.log([0.2 / 2 * 0.5 * left / 3, left / 3]), rtol=1e-12)
    assert len(none) == 0


@pytest.mark.parametrize("repeats", [1, 3])
def test_it_sums_to_one_in_every_context(repeats):
    rng = np.random.default_rng(0)
    size = 12
    texts = [rng.integers(0, size - 2, rng.integers(0, 9)).tolist() for _ in range(40)] * repeats
    model = Trigrams(texts, size)
    for context in ([], [3], [3, 4], [11, 4], [4, 11], [11, 11], [0, 0]):
        last = [row[-1] for row in model.logprobs([[*context, word] for word in range(size)])]
        assert np.exp(last).sum() == pytest.approx(1, abs=1e-12)


def test_rows_do_not_depend_on_each_other_and_seen_text_is_likelier():
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, 50, 30).tolist() for _ in range(20)]
    model = Trigrams(texts, size=1000)
    rows = [texts[0], [], texts[1][:3], rng.integers(0, 50, 30).tolist()]
    together = model.logprobs(rows)
    for row, found in zip(rows, together, strict=True):
        np.testing.assert_array_equal(found, model.logprobs([row])[0])
    assert together[0].mean() > together[3].mean()


def test_refuses_what_it_cannot_count():
    for rows, size in (([[]], 3), ([], 3), ([[0]], 2**21)):
        with pytest.raises(ValueError):
            Trigrams(rows, size)
