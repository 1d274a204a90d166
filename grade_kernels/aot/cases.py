"""Calls of every launcher that between them make the compilations which the package ships; nothing is computed.

Every kernel is called with every dtype, alignment, number of candidates and option; options that change the code
in unrelated places are not all crossed with one another.  `record` runs the calls under `launch.recording`, on CPU
tensors that are allocated but never touched.  Batches are small, because no compilation depends on the batch,
except that few rows are split over several programs.  A new operation gets a function here;
`tests/kernels/test_aot.py` fails for a kernel that no case launches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from grade_kernels.common.checks import DIRECTIONS, ESTIMATORS
from grade_kernels.common.chunks import Rows, rows_of
from grade_kernels.common.sample import Support
from grade_kernels.common.stats import KLStats, TokenStats
from grade_kernels.triton_ops import embedding, kl, launch, logprob, objective, sample, scatter, sweep, vjp

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Qwen (divisible by 16); GPT-2 (odd: rows that are not aligned); Llama 2; Gemma.
VOCABULARIES = (151936, 50257, 32000, 262144)
CANDIDATES = (1, 16, 256, 1024)
# Widths of embeddings: of large models, of GPT-2, and one that no vector load divides.
WIDTHS = (4096, 768, 50)
# More than the processors of the device that a recording pretends to have, and so few that rows are split.
MANY, FEW = 8, 2
TAU, SEED = 0.5, 1
# Whether the head's logits are overwritten by gradients, and through which soft cap.
_GRADS = ((False, None), (True, None), (True, 30.0))

Case = Callable[[], object]


def record() -> list[launch.Launch]:
    """Every launch of every case.

    Raises
    ------
    RuntimeError
        A launcher fails; says which case.
    """
    with launch.recording() as launches:
        for family in FAMILIES:
            for number, case in enumerate(family()):
                try:
                    case()
                except Exception as error:
                    raise RuntimeError(f"case {number} of {family.__name__} cannot be recorded: {error!r}") from error
    return launches


def _logits(dtype: torch.dtype, vocab: int, rows: int = MANY) -> Tensor:
    return torch.empty(rows, vocab, dtype=dtype)


def _sliced(dtype: torch.dtype, vocab: int, start: int = 0) -> Rows:
    """logits[:, :-1] (start 0) or logits[:, 1:] of [2, 5, vocab]: rows with two strides."""
    whole = torch.empty(2, 5, vocab, dtype=dtype)
    return rows_of(whole[:, start : start + 4])


def _ids(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def _floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def logits_layouts(vocab: int) -> Iterator[Callable[[torch.dtype], Any]]:
    """The ways rows of logits lie in memory, as functions of the dtype."""
    yield lambda dtype: _logits(dtype, vocab)
    if vocab % 16:
        yield lambda dtype: _sliced(dtype, vocab)
        yield lambda dtype: _sliced(dtype, vocab, 1)  # begins off the alignment
        yield lambda dtype: _logits(dtype, vocab, 1)  # the one row has no stride


def kl_cases() -> Iterator[Case]:
    for vocab in VOCABULARIES:
        pairs = [(layout, d, d) for layout, d in product(logits_layouts(vocab), DTYPES)]
        mixed = [(first, second) for first, second in product(DTYPES, DTYPES) if first != second]
        pairs += [(next(logits_layouts(vocab)), *dtypes) for dtypes in mixed]
        for layout, p_dtype, q_dtype in pairs:
            p, q = layout(p_dtype), layout(q_dtype)
            yield partial(kl.kl_stats, p, q, torch.float32)
            n = p.shape[0]
            stats, weights = KLStats.empty(n, torch.float32, p.device), _floats(n)
            out_p, out_q = _logits(p_dtype, vocab, n), _logits(q_dtype, vocab, n)
            for outs in ((out_p, None), (None, out_q), (out_p, out_q)):
                yield partial(kl.kl_grads, p, q, stats, weights, *outs)
        # As the head calls it: float32 logits of a chunk, overwritten by their gradients, with and without a cap.
        p, q = _logits(torch.float32, vocab), _logits(torch.float32, vocab)
        stats = KLStats.empty(MANY, torch.float32, p.device)
        for cap, some in product((None, 30.0), (None, _floats(MANY))):
            yield partial(kl.kl_grads, p, q, stats, some, p, q, cap)


def logprob_cases() -> Iterator[Case]:
    for vocab, dtype in product(VOCABULARIES, DTYPES):
        for layout in logits_layouts(vocab):
            x = layout(dtype)
            n = x.shape[0]
            for tokens in (_ids(n), None):
                yield partial(logprob.token_stats, x, tokens, torch.float32)
            stats, out = TokenStats.empty(n, torch.float32, x.device), _logits(dtype, vocab, n)
            for cap in (None, 30.0):
                yield partial(logprob.token_stats_grad, x, _ids(n), stats, _floats(n), _floats(n), out, cap)


def sweep_cases() -> Iterator[Case]:
    for vocab, k in product(VOCABULARIES[:2], (None, *CANDIDATES)):
        usual = k in (None, 256)
        for ref, tokens, suppress in product((True, False), repeat=3) if usual else ((True, True, True),):
            kinds = product(DIRECTIONS if ref else DIRECTIONS[:1], _GRADS if ref else _GRADS[:1])
            for direction, (grad, cap) in kinds:
                x = _logits(torch.float32, vocab)
                y = _logits(torch.float32, vocab) if ref else None
                support = None if k is None else _ids(MANY, k)  # without it the sampler's own launch selects one
                rest = (_ids(2) if suppress else None, support, _ids(MANY) if tokens else None, direction, grad, cap)
                yield partial(sweep.head_chunk, x, y, k, *rest)


def objective_cases() -> Iterator[Case]:
    weightings = list(product((True, False), repeat=3))  # of entropy, kl and ref_kl
    for vocab, k in product(VOCABULARIES[:2], CANDIDATES):
        usual = k == 256
        for ref, tokens, suppress in product((True, False), repeat=3) if usual else ((True, True, True),):
            some = weightings if tokens and suppress and usual else (weightings[0], weightings[-1])
            kinds = dict.fromkeys((weights if ref else (weights[0], False, False)) for weights in some)
            for weighted, cap in product(kinds, (None, 30.0)):
                x = _logits(torch.float32, vocab)
                y = _logits(torch.float32, vocab) if ref else None
                weights: Any = tuple(_floats(MANY) if weigh else None for weigh in weighted)
                ids = (_ids(2) if suppress else None, _ids(MANY, k), _ids(MANY) if tokens else None)
                yield partial(objective.objective_chunk, x, y, *ids, weights, ref, cap)


def embedding_cases() -> Iterator[Case]:
    for dtype, width, k in product(DTYPES, WIDTHS, CANDIDATES):
        table, ids, vocab = torch.empty(64, width, dtype=dtype), _ids(MANY, k), 64
        grad = _floats(MANY, width, dtype=dtype)
        for weights in (_floats(MANY, k), _floats(MANY, k, dtype=dtype)):
            yield partial(embedding.weighted_sum, weights, ids, table)
            yield partial(embedding.scatter_sum, weights, ids, grad, vocab)
        for side in (grad, _floats(MANY, width)):
            yield partial(embedding.candidate_dots, side, ids, table)
        yield partial(embedding.scatter_sum, None, ids, grad, vocab)


def vjp_cases() -> Iterator[Case]:
    for dtype, width, k in product(DTYPES, WIDTHS, CANDIDATES):
        usual = k == 256  # what does not interact with k is varied here alone
        if width != WIDTHS[0] and not usual:
            continue
        ids, keys = _ids(MANY, k), _ids(MANY)
        rules = [(rule, range(1)) for rule in ESTIMATORS if rule != "rao"]
        rules += [("gumbel", range(1, 2)), ("rao", range(1, 17))]
        for models, x_dtype in product((1, 3) if usual else (1,), {torch.float32, dtype} if usual else {torch.float32}):
            tables, grads = [torch.empty(64, width, dtype=dtype)] * models, [_floats(MANY, width, dtype=dtype)] * models
            logits = _floats(MANY, k, dtype=x_dtype)
            yield partial(vjp.candidate_grad, grads, tables, ids)
            for rule, draws in rules:
                tokens = _ids(MANY) if draws.start or rule == "reinmax" else None
                shared = (grads, tables, logits, ids, tokens, keys)
                yield partial(vjp.token_vjp, *shared, rule, TAU, SEED, draws, torch.float32)


def sample_cases() -> Iterator[Case]:
    plain, busy = (False, False, False), (True, False, True)  # suppress, given support, given tokens
    for vocab, k, dtype, rows in product(VOCABULARIES, CANDIDATES, DTYPES, (MANY, FEW)):
        usual = (vocab, dtype) == (VOCABULARIES[0], torch.bfloat16)  # here the options are crossed with one another
        for options in product((False, True), repeat=3) if usual else (plain, busy):
            yield from _selections(_logits(dtype, vocab, rows), k, *options)
    for vocab, dtype in product(VOCABULARIES, DTYPES):
        for layout in logits_layouts(vocab):
            yield from _selections(layout(dtype), 256, *plain)
    for k in CANDIDATES:
        support = Support(_ids(MANY, k), _floats(MANY, k), _floats(MANY))
        for tokens in (None, _ids(MANY)):
            for tau in (TAU, _floats()):
                yield partial(sample.sample, support, _ids(MANY), SEED, 1, tokens, tau)


def _selections(logits: Tensor, k: int, suppress: bool, given: bool, chosen: bool) -> Iterator[Case]:
    n = logits.shape[0]
    rest = (_ids(2) if suppress else None, _ids(n, k) if given else None, _ids(n) if chosen else None, torch.float32)
    yield partial(sample.select, logits, k, *rest)
    for tau in (TAU,) if given or chosen else (TAU, _floats()):
        yield partial(sample.select_and_sample, logits, k, tau, _ids(n), SEED, 0, *rest)


def scatter_cases() -> Iterator[Case]:
    for k, dtype in product(CANDIDATES, DTYPES):
        weights = _floats(MANY, k, dtype=dtype)
        for tau in (TAU, _floats()):
            yield partial(scatter.weights_vjp, weights, weights, tau)
        yield partial(scatter.weights_vjp, _floats(MANY, k), weights, TAU)
        for vocab in VOCABULARIES:
            yield partial(scatter.scatter, _ids(MANY, k), weights, vocab, dtype)


FAMILIES = (
    kl_cases, logprob_cases, sweep_cases, objective_cases, embedding_cases, vjp_cases, sample_cases, scatter_cases,
)  # fmt: skip
