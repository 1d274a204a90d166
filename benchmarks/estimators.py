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
    plain step         what moving every token's logits along one response's g gains at equal KL, over the best step
                       there is (`grade.studies.variance.steps`); natural step: g times the inverse Fisher information
    ... no noise       the same along E g: what the bias leaves
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

from benchmarks.estimator_problem import LogitGradient, Problem, network_reward, symbol_policy
from benchmarks.saved import command, new_parser, number
from grade.machine import machine, machine_line
from grade.replay.replay import ReplaySettings
from grade.rollout import Rollout
from grade.studies.variance.steps import Metric, Products, euclidean, natural, plain, shares
from grade.tables import Column, Table

SYMBOLS, LENGTH, KL_COEF = 4, 4, 0.2
HOPS, TAUS, SPREADS = (0, 1, LENGTH - 1), (2.0, 1.0, 0.5), (0.5, 4.0)
COPIES, DRAWN, BATCH = 3, 768, 64
QUANTITIES = {"bias": "relative bias", "cosine": "cosine", "variance": "relative variance", "batch": f"cosine, {BATCH}"}
STEPS = {
    "plain_step": "plain step",
    "plain_ceiling": "plain, no noise",
    "natural_step": "natural step",
    "natural_ceiling": "natural, no noise",
}


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
    return problem.replayed(_every_response(problem, copies, seed), settings).unflatten(0, (copies, -1))


def _every_response(problem: Problem, copies: int, seed: int) -> Rollout:
    tokens = problem.responses.repeat(copies, 1)
    return problem.rollout(tokens, torch.arange(tokens.numel()).view(tokens.shape), seed)


def reinforce(problem: Problem, probability: Tensor) -> Tensor:
    """[1, Y, P], the score-function gradient with the constant baseline of least variance."""
    gradient, score = problem.score_function()
    weighted = probability[:, None] * score
    return (gradient - (weighted * gradient).sum() / (weighted * score).sum() * score)[None]


def step_products(problem: Problem, exact: LogitGradient, gradients: Tensor) -> Products:
    """Exact sums over steps, prefixes and responses.

    Args:
        gradients: [R, Y, S, V], minus those of all responses at their steps' logits, drawn R times each; KL's own
            gradient is added here. Products of E g with itself are of different draws.
    """
    copies, p, kl = len(gradients), exact.p, exact.kl_gradient
    each = torch.stack([problem.prefix_mean(one, exact.probability) for one in gradients])
    path, target, every = each.mean(0), exact.gradient, gradients + kl

    def expected(metric: Metric, u: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("y,...ys->...", exact.probability, metric(u, v, p)).mean()

    def size(metric: Metric, shift: Tensor) -> Tensor:
        every = expected(metric, path + shift, path + shift)
        return every if copies == 1 else (copies * every - expected(metric, each + shift, each + shift)) / (copies - 1)

    none = torch.zeros_like(kl)
    return Products(
        natural_gain=expected(natural, path + kl, target),
        natural_cost=expected(natural, every, every),
        natural_size=size(natural, kl),
        plain_gain=expected(euclidean, path + kl, target),
        plain_cost=expected(plain, every, every),
        plain_size=size(plain, kl),
        best=expected(natural, target, target),
        length_gain=expected(euclidean, path, target - kl),
        length_size=size(euclidean, none),
        fisher_gain=expected(natural, path, target - kl),
        fisher_size=size(natural, none),
    )


def drawn_products(
    of: Products, problem: Problem, exact: LogitGradient, rollout: Rollout, gradients: Tensor
) -> Products:
    """`of` with the costs of sampled gradients [N, S, V] of the responses of `rollout`."""
    symbols = exact.p.shape[-1]
    which = (rollout.tokens * symbols ** torch.arange(problem.length - 1, -1, -1)).sum(1)  # their places among all
    every, p = gradients + exact.kl_gradient[which], exact.p[which]
    return of._replace(
        natural_cost=natural(every, every, p).sum(1).mean(), plain_cost=plain(every, every, p).sum(1).mean()
    )


def logits_of_every_response(problem: Problem, settings: ReplaySettings, copies: int = 1, seed: int = 0) -> Tensor:
    """[R, Y, S, V], as `at_every_response` at the logits."""
    return problem.at_logits(_every_response(problem, copies, seed), settings).unflatten(0, (copies, -1))


def score_at_logits(problem: Problem, exact: LogitGradient) -> Tensor:
    """[1, Y, S, V], the score function's at the logits, with the exact value of every prefix as its baseline."""
    returns = exact.returns[..., None].expand_as(exact.p)
    drawn = torch.nn.functional.one_hot(problem.responses, exact.p.shape[-1])
    return ((returns - problem.prefix_mean(returns, exact.probability)) * (drawn - exact.p))[None]


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


def measure_steps(problem: Problem, seed: int) -> Iterator[dict]:
    """(estimator, tau) and what steps along its converged gradient gain, of one problem."""
    exact, drawn = problem.exact_at_logits(), problem.drawn(DRAWN, seed)

    def settings(estimator: str, tau: float | None) -> ReplaySettings:
        return ReplaySettings(tau=tau or 1.0, estimator=estimator, max_hops=HOPS[-1], hop_tol=0.0)

    def row(name: str, tau: float | None, of: Products) -> dict:
        return {"estimator": name, "tau": tau, **shares(of)}

    for tau in TAUS:
        rao = step_products(problem, exact, logits_of_every_response(problem, settings("rao", tau), COPIES, seed))
        gumbel = problem.at_logits(drawn, settings("gumbel", tau))
        yield row("gumbel", tau, drawn_products(rao, problem, exact, drawn, gumbel))
        yield row("rao, 16 draws", tau, rao)
    rules: list[tuple[str, float | None]] = [("straight_through", None), *(("reinmax", tau) for tau in TAUS)]
    for name, at in rules:
        yield row(name, at, step_products(problem, exact, logits_of_every_response(problem, settings(name, at))))
    yield row("score function", None, step_products(problem, exact, score_at_logits(problem, exact)))
    yield row("exact gradient", None, step_products(problem, exact, (exact.gradient - exact.kl_gradient)[None]))


def table(rows: list[dict]) -> str:
    """The Markdown table of one spread: medians over its problems, a cell from no hop to all."""
    hops = " / ".join(map(str, HOPS))
    titles = ("estimator", "tau", *(f"{title}, {hops} hops" for title in QUANTITIES.values()))
    lines = []
    for (name, tau), group in _groups(rows).items():
        cells = []
        for quantity in QUANTITIES:
            by_hops = [[r[quantity] for r in group if r["hops"] == h] for h in HOPS]
            cells.append(" / ".join(f"{median(values):.2f}" for values in by_hops if values))
        lines.append([name, str(tau or "any"), *cells])
    return Table("", list(map(Column, titles)), lines).markdown()


def steps_table(rows: list[dict]) -> str:
    """The Markdown table of the steps of one spread: medians over its problems."""
    lines = [
        [name, str(tau or "any"), *(f"{median(row[quantity] for row in group):.2f}" for quantity in STEPS)]
        for (name, tau), group in _groups(rows).items()
    ]
    return Table("", list(map(Column, ("estimator", "tau", *STEPS.values()))), lines).markdown()


def _groups(rows: list[dict]) -> dict[tuple[str, float | None], list[dict]]:
    """Rows by estimator and temperature, in the order in which these come."""
    groups: dict[tuple[str, float | None], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["estimator"], row["tau"]), []).append(row)
    return groups


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
        parts.append("Steps along the gradient after all hops, as shares of the best step:")
        parts.append(steps_table([row for row in saved["steps"] if row["spread"] == spread]))
    return "\n\n".join([*parts, machine_line(saved["machine"])]) + "\n"


def _measured(options: argparse.Namespace) -> dict:
    rows: list[dict] = []
    steps: list[dict] = []
    for spread in SPREADS:
        for seed in range(options.problems):
            policy = symbol_policy(SYMBOLS, spread, seed)
            problem = Problem(policy, network_reward(policy, LENGTH, seed), LENGTH, KL_COEF)
            rows += [{"spread": spread, "problem": seed, **row} for row in measure(problem, seed)]
            steps += [{"spread": spread, "problem": seed, **row} for row in measure_steps(problem, seed)]
    return {"machine": machine(), "rows": rows, "steps": steps}


def main(arguments: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--problems", type=number(int, 1), default=5, help="random policies and rewards per spread")
    command(parser, arguments, _measured, document, "rows", "steps", "machine", of_rows=("spread", "hops", "batch"))


if __name__ == "__main__":
    main()
