"""The frontier's tests: several checkpoints of every run, and the base model's best of n, on the first test prompts.

A point is a test like any other (`grade.studies.compare.final_test`), on fewer prompts, with the same noise for all;
one pass of sampling gives all its measures. KL is KL(policy | base) whatever the runs were trained with, as that of
best-of-n is bounded in this direction. tests.json keeps the results under "frontier", by the content of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from grade.config import Config
from grade.errors import GradeError
from grade.model.checkpoint import adapter_digest
from grade.studies.compare.best_of import sampled_best_of
from grade.studies.compare.final_test import Bench
from grade.studies.compare.frontier import KL, MEASURES, evenly_spaced, frontier_table
from grade.training.run_folder import adapter_folder


class FrontierRun(NamedTuple):
    """A run whose checkpoints are points of the frontier.

    Attributes:
        steps: of its validations, rising, without the base model's.
    """

    method: str
    seed: int
    kl_coef: float
    run_dir: Path
    steps: tuple[int, ...]


def evaluate_frontier(bench: Bench, runs: Sequence[FrontierRun]) -> tuple[dict | None, dict[str, str]]:
    """Test what the frontier needs, but for what tests.json already holds.

    Returns:
        (what comparison.json has of the frontier, None where compare.frontier_prompts is 0; by name of a run why a
        checkpoint of it could not be tested). The former: "prompts", their number; "base", the base model's measures;
        "points" and "best_of" as `grade.studies.compare.frontier` has them; "table", its `frontier_table`.
    """
    compare = bench.config.compare
    if compare.frontier_prompts == 0:
        return None, {}
    kept = bench.kept.get("frontier")
    if kept is None or kept["prompts"] != compare.frontier_prompts:
        kept = bench.kept["frontier"] = {"prompts": compare.frontier_prompts, "points": {}}
    config = replace(bench.config, method=replace(bench.config.method, kl_direction="policy_ref"))
    wanted = [(run, step) for run in runs for step in evenly_spaced(run.steps, compare.frontier_points)]
    _test_base(bench, config, kept)
    failures = _test_points(bench, config, kept, wanted)
    points = [
        {"method": run.method, "seed": run.seed, "kl_coef": run.kl_coef, "step": step, **_measured(kept["points"][key])}
        for run, step in wanted
        if (key := _key(run, step)) in kept["points"] and run.run_dir.name not in failures
    ]
    base, best_of = _measured(kept["base"]["row"]), kept["best_of"]["rows"]
    table = frontier_table(points, base, best_of)
    found = {"prompts": kept["base"]["row"]["prompts"], "base": base, "points": points, "best_of": best_of}
    return {**found, "table": table}, failures


def _test_base(bench: Bench, config: Config, kept: dict) -> None:
    """The base model on the frontier's prompts, and its best of n."""
    sizes = sorted(config.compare.best_of)
    if "base" not in kept:
        bench.console.print("Frontier: the base model", highlight=False)
        row, spread = bench.test(0, None, _prompts(bench), config)
        kept["base"] = {"row": row, "spread": spread}
        bench.keep()
    if kept.get("best_of", {}).get("of") != sizes:
        rows = []
        if sizes:
            bench.console.print(f"Frontier: the base model's best of {sizes[-1]}", highlight=False)
            policy, reward, _, measure = bench.loaded
            rows = sampled_best_of(policy, reward, _prompts(bench), config, measure)
        kept["best_of"] = {"of": sizes, "rows": rows}
        bench.keep()


def _test_points(bench: Bench, config: Config, kept: dict, wanted: Sequence[tuple[FrontierRun, int]]) -> dict[str, str]:
    """Test the missing ones of these checkpoints; why not, by name of a run."""
    failures: dict[str, str] = {}
    digests = {(run, step): adapter_digest(adapter_folder(run.run_dir, step)) for run, step in wanted}
    known = kept["points"]
    missing = [
        (run, step)
        for run, step in wanted
        if digests[run, step] is None or known.get(_key(run, step), {}).get("adapter_sha256") != digests[run, step]
    ]
    for number, (run, step) in enumerate(missing, start=1):
        if run.run_dir.name in failures:
            continue
        bench.console.print(
            f"Frontier: {number} of {len(missing)}, {run.run_dir.name}, step {step}", highlight=False, markup=False
        )
        try:
            bench.put(adapter_folder(run.run_dir, step))
        except GradeError as error:
            failures[run.run_dir.name] = str(error)
            continue
        row, _ = bench.test(step, kept["base"]["spread"], _prompts(bench), config)
        known[_key(run, step)] = {**row, "adapter_sha256": digests[run, step]}
        bench.keep()
    return failures


def _prompts(bench: Bench) -> list[list[int]]:
    return bench.loaded.prompts[: bench.config.compare.frontier_prompts]


def _key(run: FrontierRun, step: int) -> str:
    return f"{run.run_dir.name}/{step}"


def _measured(row: dict) -> dict:
    """What a point has of its test."""
    return {name: row[name] for name in (KL, "kl", "reward_stderr", *MEASURES) if row.get(name) is not None}
