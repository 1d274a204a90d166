"""Bias and variance of the four estimators against the exact gradient, where every response can be enumerated.

    python -m benchmarks.estimators                       # prints the tables; about two minutes on one core
    python -m benchmarks.estimators --save FILE.json      # also keeps every problem's figures
    python -m benchmarks.estimators --table benchmarks/results/estimators.json    # the tables of kept figures

Four symbols, four response tokens, random policies and rewards (`benchmarks.estimator_problem`), gradients from
`grade.replay.replay`. Expectations over the 256 responses are exact sums with their probabilities at temperature 1.
Given the response, `straight_through` and `reinmax` have no noise. `rao` averages conditional Gumbel draws and is
sampled COPIES times per response. `gumbel` runs on responses drawn by the real sampler, whose noise it takes up again;
it and `rao` have one expectation, so both show the bias that `rao` with 16 draws measures.

    relative bias      |E g - grad J| / |grad J|
    cosine             between E g and grad J: what is left of the bias when the optimizer sets the scale
    relative variance  trace of the covariance of one response's g, over |E g|^2
    cosine, 64         cosine / sqrt(1 + relative variance / 64), about that of a mean over 64 responses with grad J

`score function` is REINFORCE with the best constant baseline: no bias, hops or temperature.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from benchmarks.estimator_problem import Problem, network_reward, symbol_policy
from benchmarks.saved import command, new_parser
from grade.machine import machine, machine_line
from grade.replay.replay import ReplaySettings
from grade.tables import Column, Table

SYMBOLS, LENGTH, KL_COEF = 4, 4, 0.2
HOPS, TAUS, SPREADS = (0, 1, LENGTH - 1), (2.0, 1.0, 0.5), (0.5, 4.0)
COPIES, DRAWN, BATCH = 3, 768, 64
QUANTITIES = {"bias": "relative bias", "cosine": "cosine", "variance": "relative variance", "batch": f"cosine, {BATCH}"}


@dataclass
class Expectation:
    """An estimator's expectation and the spread of its samples; errors are Monte-Carlo standard errors.

    Args:
        norm2: squared norm of the expectation.
        bias: of the expectation, relative to the exact gradient's norm; `cosine` is between the two.
        trace: of the covariance of one response's gradient.
    """

    norm2: float
    bias: float
    bias_error: float
    cosine: float
    trace: float
    trace_error: float


def enumerated(gradients: Tensor, probability: Tensor, exact: Tensor) -> Expectation:
    """From gradients [R, Y, P] of all Y responses, drawn R times each, their probabilities and the exact one [P].

    The noise of the mean, known from the spread over the R, is taken out of the squared norms that it enters.
    """
    copies = len(gradients)
    mean = torch.einsum("y,ryp->p", probability, gradients) / copies

    def error2(values: Tensor) -> Tensor:
        """Squared standard error of the mean of values [R, Y, ...]."""
        if copies == 1:
            return torch.zeros_like(values[0, 0])
        return torch.einsum("y,y...->...", probability**2, values.var(0)) / copies

    noise, gap, size = error2(gradients).sum(), mean - exact, exact.norm()
    squares = (gradients - mean).square().sum(-1)
    norm2 = mean @ mean - noise
    return Expectation(
        norm2.item(),
        ((gap @ gap - noise).clamp_min(0).sqrt() / size).item(),
        (error2(gradients @ (gap / gap.norm())).sqrt() / size).item(),
        (mean @ exact / norm2.sqrt() / size).item(),
        ((squares @ probability).mean() + noise).item(),
        error2(squares).sqrt().item(),
    )


def sampled(gradients: Tensor) -> tuple[float, float]:
    """Trace of the covariance of independent samples [N, P], and its standard error."""
    squares = (gradients - gradients.mean(0)).square().sum(1) * len(gradients) / (len(gradients) - 1)
    return squares.mean().item(), squares.std().item() / len(gradients) ** 0.5


def at_every_response(problem: Problem, settings: ReplaySettings, copies: int = 1, seed: int = 0) -> Tensor:
    """[R, Y, P] gradients of `replay`, `copies` draws of the estimator's noise for every response."""
    tokens = problem.responses.repeat(copies, 1)
    rows = torch.arange(tokens.numel()).view(tokens.shape)
    return problem.replayed(problem.rollout(tokens, rows, seed), settings).unflatten(0, (copies, -1))


def reinforce(problem: Problem, probability: Tensor) -> Tensor:
    """[1, Y, P], the score-function gradient with the constant baseline of least variance."""
    gradient, score = problem.score_function()
    weighted = probability[:, None] * score
    return (gradient - (weighted * gradient).sum() / (weighted * score).sum() * score)[None]


def figures(name: str, tau: float | None, hops: int, of: Expectation, trace: float, trace_error: float) -> dict:
    """A row: the expectation from `of`, the variance from the trace of a covariance, of another estimate maybe."""
    variance = trace / of.norm2
    return {
        "estimator": name,
        "tau": tau,
        "hops": hops,
        "bias": of.bias,
        "bias_error": of.bias_error,
        "cosine": of.cosine,
        "variance": variance,
        "variance_error": trace_error / of.norm2,
        "batch": of.cosine / (1 + variance / BATCH) ** 0.5,
    }


def measure(problem: Problem, seed: int) -> Iterator[dict]:
    """The rows of one problem."""
    exact, probability = problem.exact_gradient(), problem.probability()
    drawn = problem.drawn(DRAWN, seed)

    def settings(estimator: str, hops: int, tau: float = 1.0, samples: int = 16) -> ReplaySettings:
        return ReplaySettings(tau=tau, estimator=estimator, rao_samples=samples, max_hops=hops, hop_tol=0.0)

    def estimate(options: ReplaySettings, copies: int = 1) -> Expectation:
        return enumerated(at_every_response(problem, options, copies, seed), probability, exact)

    for hops in HOPS:
        for tau in TAUS:
            rao = estimate(settings("rao", hops, tau), COPIES)
            yield figures("gumbel", tau, hops, rao, *sampled(problem.replayed(drawn, settings("gumbel", hops, tau))))
            one = estimate(settings("rao", hops, tau, samples=1), COPIES)
            yield figures("rao, 1 draw", tau, hops, rao, one.trace, one.trace_error)
            yield figures("rao, 16 draws", tau, hops, rao, rao.trace, rao.trace_error)
        exactly: list[tuple[str, float | None]] = [("straight_through", None), *(("reinmax", tau) for tau in TAUS)]
        for name, at in exactly:
            of = estimate(settings(name, hops, at or 1.0))
            yield figures(name, at, hops, of, of.trace, of.trace_error)
    of = enumerated(reinforce(problem, probability), probability, exact)
    yield figures("score function", None, HOPS[-1], of, of.trace, of.trace_error)


def table(rows: list[dict]) -> str:
    """The Markdown table of one spread: medians over its problems, a cell from no hop to all."""
    hops = " / ".join(map(str, HOPS))
    titles = ("estimator", "tau", *(f"{title}, {hops} hops" for title in QUANTITIES.values()))
    lines = []
    groups: dict[tuple[str, float | None], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["estimator"], row["tau"]), []).append(row)
    for (name, tau), group in groups.items():
        cells = []
        for quantity in QUANTITIES:
            by_hops = [[r[quantity] for r in group if r["hops"] == h] for h in HOPS]
            cells.append(" / ".join(f"{median(values):.2f}" for values in by_hops if values))
        lines.append([name, str(tau or "any"), *cells])
    return Table("", list(map(Column, titles)), lines).markdown()


def summary(rows: list[dict]) -> str:
    """Who is best after all hops, problem by problem, and how far the noise of the measurement reaches."""

    def winners(quantity: str, best: Callable, contenders: list[dict]) -> str:
        names: list[str] = []
        for problem in problems:
            row = best((r for r in contenders if r["problem"] == problem), key=lambda r: r[quantity])
            names.append(row["estimator"] + (f" at tau {row['tau']:g}" if row["tau"] else ""))
        return ", ".join(f"{name} ({n})" for name, n in Counter(names).most_common())

    problems = sorted({r["problem"] for r in rows})
    converged = [r for r in rows if r["hops"] == HOPS[-1]]
    biased = [r for r in converged if r["estimator"] not in ("gumbel", "rao, 1 draw", "score function")]
    bias = max(r["bias_error"] for r in rows)
    variance = max(r["variance_error"] / r["variance"] for r in rows)
    return (
        f"After all hops, in {len(problems)} problems: smallest bias {winners('bias', min, biased)}; best cosine of "
        f"{BATCH} responses {winners('batch', max, converged)}.\n"
        f"Monte-Carlo standard errors in one problem, the largest: {bias:.3f} of a relative bias, "
        f"{100 * variance:.0f} % of a relative variance."
    )


def document(saved: dict) -> str:
    """The tables of all spreads, with what they say, as Markdown."""
    parts = []
    for spread in dict.fromkeys(row["spread"] for row in saved["rows"]):
        rows = [row for row in saved["rows"] if row["spread"] == spread]
        count = len({row["problem"] for row in rows})
        parts.append(f"Embeddings spread {spread:g} times their common vector, medians over {count} problems:")
        parts += [table(rows), summary(rows)]
    return "\n\n".join([*parts, machine_line(saved["machine"])]) + "\n"


def _measured(options: argparse.Namespace) -> dict:
    rows: list[dict] = []
    for spread in SPREADS:
        for seed in range(options.problems):
            policy = symbol_policy(SYMBOLS, spread, seed)
            problem = Problem(policy, network_reward(policy, LENGTH, seed), LENGTH, KL_COEF)
            rows += [{"spread": spread, "problem": seed, **row} for row in measure(problem, seed)]
    return {"machine": machine(), "rows": rows}


def main(arguments: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--problems", type=int, default=5, help="random policies and rewards per spread")
    command(parser, arguments, _measured, document, "rows", "machine", of_rows=("spread", "hops", "batch"))


if __name__ == "__main__":
    main()
