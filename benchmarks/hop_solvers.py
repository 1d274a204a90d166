"""Can anything solve for the hops in fewer backward passes than adding them up?

    python -m benchmarks.hop_solvers                     # ../shared/models, S = 64 and 256, tau = 1 and 0.5; minutes
    python -m benchmarks.hop_solvers --lengths 64 --models ../shared/models/stories260K
    python -m benchmarks.hop_solvers --table benchmarks/results/hop_solvers.json    # of numbers kept with --save

The gradient at the hidden states solves g = g_direct + A g, and one application of A is a backward pass through the
policy (a VJP), next to which everything else is cheap, so a solver that is to save a third of the time must save a
third of the VJPs. For every sequence, the VJPs until g is within 1e-2 of the converged one:

    plain   the series g_direct + A g_direct + ..., as `grade.replay` sums it; `replay` is where its own test stops, at
            which the last term is 1e-2 of the sum
    GMRES   the best combination of the same terms by the residual, per sequence (Saad & Schultz 1986), and one more
            application of A that its residual gives for free
    blocks  block Gauss-Seidel from the end of the sequence: hops inside a block, then one VJP to all before it. Its
            cost is what it would be if a VJP cost exactly its share of the positions: 1/J inside one of J blocks,
            (b + 1)/J from block b to everything up to it. Nothing real is that cheap. A block is done when its error
            is 1e-2 / sqrt(J) of the whole gradient, and at the latest after as many hops as it has tokens

Adapters are random (not zero, so that KL counts), the reward head too; responses are sampled from the model.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.saved import command, new_parser, number
from grade.config.reading import load_config
from grade.machine import machine, machine_line
from grade.methods.base import kl_weight
from grade.model.loading import load_policy, load_tokenizer
from grade.replay.replay import ReplaySettings, prepare
from grade.rewards.shared import RewardHead, SharedReward
from grade.rollout import pad_prompts
from grade.sampling.draw import Sampling
from grade.sampling.sample import sample
from grade.tables import Column, Table, numbers

TOLERANCE = 1e-2
BLOCKS = (2, 4, 8)
_MOST = 24  # terms that stand for convergence: the last is below 1e-5 of the sum
_PROMPT = "This movie was"


class System(NamedTuple):
    """g = direct + A g for one sequence: [S, d] and the map, which moves gradients to earlier positions only."""

    direct: Tensor
    apply: Callable[[Tensor], Tensor]


@dataclass
class Row:
    """VJPs to the tolerance, one number per sequence."""

    model: str
    length: int
    tau: float
    plain: list[int]
    replay: list[int]
    gmres: list[int]
    blocks: dict  # J -> list of VJP equivalents


def system(model: str, length: int, tau: float, seed: int) -> System:
    """The system of one sampled response of `length` tokens."""
    config = load_config("imdb_small", [f"--model.name={model}", f"--generation.max_new_tokens={length}"])
    policy = load_policy(config, load_tokenizer(config.model), torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    torch.manual_seed(seed)
    reward = SharedReward(policy, RewardHead(policy.embedding.shape[1], 64))
    ids, mask = pad_prompts([policy.tokenizer.encode(_PROMPT, add_special_tokens=False)], policy.pad_id)
    sampling = Sampling(length, length, min(config.generation.top_k, policy.vocab_size), 1.0)
    rollout = sample(policy, ids, mask, sampling, seed=seed, first_rows=torch.zeros(1, dtype=torch.int64))
    weight = kl_weight(rollout.mask, "token_mean", config.method.kl_coef, length, 1)
    settings = ReplaySettings(tau=tau, max_hops=0)
    prepared = prepare(policy, reward, rollout, settings, reward_weight=torch.ones(1), kl_weight=weight)
    return System(*prepared.equation(settings))


def series(problem: System, most: int) -> list[Tensor]:
    """[direct, A direct, A² direct, ...], `most` + 1 terms."""
    terms = [problem.direct]
    for _ in range(most):
        terms.append(problem.apply(terms[-1]))
    return terms


def plain_vjps(terms: list[Tensor], exact: Tensor) -> int:
    """VJPs until the partial sum is within the tolerance."""
    total = torch.zeros_like(exact)
    for vjps, term in enumerate(terms):
        total = total + term
        if error(total, exact) < TOLERANCE:
            return vjps
    raise AssertionError("the series was not summed to its end")


def replay_vjps(terms: list[Tensor]) -> int:
    """VJPs at which `grade.replay.replay` stops: it does not know the converged gradient."""
    total = terms[0]
    for vjps, term in enumerate(terms[1:], start=1):
        total = total + term
        if float(term.norm() / total.norm()) <= TOLERANCE:
            return vjps
    raise AssertionError("the series was not summed to its end")


def gmres_vjps(terms: list[Tensor], exact: Tensor) -> int:
    """The same with the combination of terms that has the smallest residual."""
    flat = torch.stack([term.flatten().double() for term in terms])
    for vjps in range(1, len(terms)):
        basis, mapped = flat[:vjps], flat[1 : vjps + 1]
        weights = torch.linalg.lstsq((basis - mapped).T, flat[0][:, None], driver="gelsd").solution[:, 0]
        improved = flat[0] + weights @ mapped  # direct + A g
        if error(improved.view_as(exact), exact) < TOLERANCE:
            return vjps
    raise AssertionError("GMRES did not converge")


def block_vjps(problem: System, exact: Tensor, count: int) -> float:
    """VJP equivalents of block Gauss-Seidel with `count` blocks."""
    length = len(exact)
    edges = [length * i // count for i in range(count + 1)]
    solved, right, cost = torch.zeros_like(exact), problem.direct.clone(), 0.0
    for block in reversed(range(count)):
        inside = slice(edges[block], edges[block + 1])
        term = torch.zeros_like(exact)
        term[inside] = right[inside]
        solved[inside] = right[inside]
        for _ in range(edges[block + 1] - edges[block]):
            if float((solved[inside] - exact[inside]).norm() / exact.norm()) < TOLERANCE / count**0.5:
                break
            mapped = problem.apply(term)
            term = torch.zeros_like(exact)
            term[inside] = mapped[inside]
            solved[inside] += term[inside]
            cost += 1 / count
        if block:
            own = torch.zeros_like(exact)
            own[inside] = solved[inside]
            right[: edges[block]] += problem.apply(own)[: edges[block]]
            cost += (block + 1) / count
    return cost


def error(g: Tensor, exact: Tensor) -> float:
    return float((g.double() - exact.double()).norm() / exact.double().norm())


def measure(model: str, length: int, tau: float, seeds: int) -> Row:
    row = Row(Path(model).name, length, tau, [], [], [], {count: [] for count in BLOCKS})
    for seed in range(seeds):
        problem = system(model, length, tau, seed)
        terms = series(problem, min(_MOST, length - 1))
        exact = torch.stack(terms).sum(0)
        row.plain.append(plain_vjps(terms, exact))
        row.replay.append(replay_vjps(terms))
        row.gmres.append(gmres_vjps(terms, exact))
        for count in BLOCKS:
            row.blocks[count].append(block_vjps(problem, exact, count))
    return row


def document(saved: dict) -> str:
    """Means over sequences, and plain over the better of the others: how many times less work at the very most."""
    titles = ["S", "τ", "replay", "plain", "GMRES", *(f"{count} blocks" for count in BLOCKS), "best gain"]
    lines = []
    for row in saved["rows"]:
        plain = statistics.mean(row["plain"])
        others = [statistics.mean(values) for values in (row["gmres"], *row["blocks"].values())]
        counts = [statistics.mean(row["replay"]), plain, *others]
        cells = [row["model"], str(row["length"]), f"{row['tau']:g}", *(f"{count:.1f}" for count in counts)]
        lines.append([*cells, f"{plain / min(others):.2f}"])
    table = Table("", [Column("model"), *numbers(titles)], lines)
    sequences = len(saved["rows"][0]["plain"])
    title = f"VJPs until within {TOLERANCE:g} of the converged gradient, mean over {sequences} sequences:"
    return "\n\n".join([title, table.markdown(), machine_line(saved["machine"])]) + "\n"


def _measured(options: argparse.Namespace) -> dict:
    rows = [
        asdict(measure(model, length, tau, options.seeds))
        for model in options.models
        for length in options.lengths
        for tau in options.taus
    ]
    return {"machine": machine(), "rows": rows}


def main(arguments: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=["../shared/models/stories260K", "../shared/models/imdb-lm"])
    parser.add_argument("--lengths", nargs="+", type=number(int, 1), default=[64, 256])
    parser.add_argument("--taus", nargs="+", type=number(float, 0, above=True), default=[1.0, 0.5])
    parser.add_argument("--seeds", type=number(int, 1), default=4, help="sequences of each")
    command(parser, arguments, _measured, document, "rows", "machine", of_rows=("plain", "gmres", "blocks"))


if __name__ == "__main__":
    main()
