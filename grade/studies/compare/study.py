"""`grade compare`: several methods, several seeds, the same prompts, one run each; tables at equal cost.

    1. sweep     every method with every learning rate, the same few; the best by validation is the method's own
                 (`grade.studies.compare.sweep`)
    2. runs      method x seed with it, seed by seed: a machine that is slower at one time of day is so for all methods
                 alike; the adapter of every validation is kept; last those of compare.kl_coefs, for the frontier
    3. test      for each run the best checkpoint by validation within the common budget of tokens, and within that of
                 seconds, on the test prompts (`grade.studies.compare.final_test`); several checkpoints of each for the
                 frontier of reward against KL (`grade.studies.compare.frontier_test`)
    4. tables    `grade.studies.compare.comparison`, shown by `grade.studies.compare.text`

Everything is kept as it is made and found again: a comparison that was stopped goes on where it was, and a run that
failed is reported and does not stop the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich import box
from rich.console import Console

from grade import terminal
from grade.config import Config
from grade.errors import GradeError, printing, writing
from grade.files import check_writable
from grade.machine import machine
from grade.model.fingerprint import inputs_of, judge_digest
from grade.model.loading import load_prompts
from grade.processes import make_accelerator
from grade.studies.compare.comparison import (
    Checkpoint,
    RunCurve,
    Tests,
    best_within,
    common_budgets,
    table,
    write_comparison,
)
from grade.studies.compare.final_test import Bench, evaluate_checkpoints, key_of
from grade.studies.compare.fluency import reader_identity, reader_name
from grade.studies.compare.frontier_test import FrontierRun, evaluate_frontier
from grade.studies.compare.frontier_text import frontier_tables
from grade.studies.compare.jobs import Job, check_jobs, curve_of, locked, run_jobs
from grade.studies.compare.plan import Comparison, check_methods, check_steps
from grade.studies.compare.sweep import Sweep, Swept
from grade.studies.compare.text import TITLES, document, notes, rich_table
from grade.training.run_folder import adapter_folder
from grade.training.setup import set_up

_TESTED = "Make room on its disk: runs and tests are kept, and the same command writes it."


def run_comparison(config: Config, methods: Sequence[str], seeds: Sequence[int]) -> dict:
    """Do what is not done yet and print the tables.

    Args:
        methods: names in `grade.config.methods.COMPARED`.
        seeds: of the runs.

    Returns:
        The payload of comparison.json.

    Raises:
        GradeError: a method cannot run with this config; two methods are the same; there is no KL for a frontier;
            earlier runs had other settings or more steps, or are damaged; another comparison uses the folder; or every
            run failed.
        KeyboardInterrupt: Ctrl-C, or SIGTERM while runs go on; the same call goes on where it was.
    """
    comparison, console = Comparison(config, methods, seeds), terminal.console(soft_wrap=True)
    if config.compare.sweep_seed in seeds:
        raise GradeError(f"compare.sweep_seed ({config.compare.sweep_seed}) is one of --seeds: choose another.")
    if config.rollout.source is not None:
        raise GradeError("rollout.source is set, but the runs of a comparison sample for themselves: set it to null.")
    if config.rollout.engine != "here":
        raise GradeError("rollout.engine is vllm, but the runs of a comparison sample for themselves: set it to here.")
    if config.guard.action == "rollback":
        raise GradeError(
            "guard.action is rollback, but a comparison is of runs of equal cost, which would not count the steps that "
            "are made again. Set it to warn or stop."
        )
    if config.evaluation.test_prompts == 0:
        raise GradeError("evaluation.test_prompts is 0, and a comparison ends with a test: set it to 1 or more.")
    if config.compare.frontier_prompts > 0 and config.model.reference == "initial" and config.model.adapter is not None:
        raise GradeError(
            "model.reference is initial, and the frontier is of the reward against the KL to the base model, which is "
            "not measured then. Set compare.frontier_prompts to 0, or model.reference to base."
        )
    own = config.train
    planned = [comparison.run_job(m, seed, own.learning_rate, own.schedule) for m in methods for seed in seeds]
    check_methods(comparison, planned[:: len(seeds)])
    check_steps(planned, "train.steps")
    check_writable("output_dir", comparison.folder)
    if comparison.folder.is_dir() and any(comparison.folder.iterdir()) and not (comparison.folder / "lock").is_file():
        raise GradeError(
            f"output_dir: {comparison.folder} is not empty and was not made by `grade compare` (it has no file "
            "`lock`). Compare under another --name."
        )
    comparison.folder.mkdir(parents=True, exist_ok=True)
    with locked(comparison.folder) as lock:
        console.print("Preparing data and reward", highlight=False)
        inputs, judged = prepared_inputs(config)
        swept = Sweep(comparison, inputs, console, lock).settings()
        rates, schedules, failures = swept.rates, swept.schedules, dict(swept.failures)
        jobs = {(m, s): comparison.run_job(m, s, rates[m], schedules[m]) for s in seeds for m in methods if m in rates}
        further = comparison.frontier_jobs(rates, schedules)
        every_job = [*jobs.values(), *further.values()]
        check_jobs(every_job, inputs)
        check_steps(further.values(), "train.steps")
        failures |= run_jobs(every_job, config.compare.jobs, console, lock=lock)
        curves = []
        for key in ((m, s) for m in methods for s in seeds if (m, s) in jobs and jobs[m, s].name not in failures):
            try:
                curves.append(curve_of(jobs[key], *key))
            except GradeError as error:
                failures[jobs[key].name] = str(error)
        if not curves:
            raise GradeError(f"every run of the comparison failed: {failures}")
        chosen = _chosen(comparison, curves)
        bench = Bench(config, comparison.folder, {**inputs, **judged}, console)
        tests, untested, judge = evaluate_checkpoints(bench, chosen)
        runs = frontier_runs(comparison, curves, further, failures)
        frontier, unread = evaluate_frontier(bench, runs)
        failures |= untested | unread
        payload = _payload(comparison, swept, failures, judge, curves, tests)
        payload["frontier"] = frontier
        with writing(comparison.folder / "comparison.json", "output_dir", _TESTED):
            write_comparison(comparison.folder / "comparison.json", payload)
        show(payload, comparison.folder)
    return payload


def missing_results(payload: dict) -> dict[str, str]:
    """Why there are no results, by name: of runs that failed or could not be tested, and of the trials of methods that
    have no learning rate. A trial that failed where another one gave the method its rate is no missing result: a step
    size too large is what a sweep is to find.

    Args:
        payload: of comparison.json.
    """
    without = [method for method in payload["methods"] if method not in payload["learning_rates"]]
    trials = tuple(f"sweep/{method}-lr" for method in without)
    return {
        name: reason
        for name, reason in payload["failures"].items()
        if not name.startswith("sweep/") or name.startswith(trials)
    }


def prepared_inputs(config: Config) -> tuple[dict[str, str], dict[str, str]]:
    """Find mistakes in data and prompts, and train the reward head, before several runs would each do so; in this
    process, and given back. The fingerprints of what the runs read, and of what only their tests read."""
    accelerator = make_accelerator(config)
    tokenizer, task, policy, reward = set_up(
        config, accelerator, before_policy=lambda tokenizer, task: load_prompts(config.evaluation, task, tokenizer)
    )
    inputs = inputs_of(policy, task, reward.identity())
    del policy, reward
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    return inputs, {"judge": judge_digest(task), "fluency": reader_identity(config, inputs["model"])}


def _chosen(comparison: Comparison, curves: Sequence[RunCurve]) -> dict[Checkpoint, Path]:
    """The adapters that the tables need: the best of each run within either budget."""
    budgets = common_budgets(curves)
    chosen: dict[Checkpoint, Path] = {}
    for curve in curves:
        run_dir = comparison.folder / f"{curve.method}-seed{curve.seed}"
        for best in (best_within(curve, tokens=budgets.tokens), best_within(curve, seconds=budgets.seconds)):
            if best.step > 0:
                chosen[curve.method, curve.seed, best.step] = adapter_folder(run_dir, best.step)
    return chosen


def frontier_runs(
    comparison: Comparison,
    curves: Sequence[RunCurve],
    further: Mapping[tuple[str, int, float], Job],
    failures: dict[str, str],
) -> list[FrontierRun]:
    """The runs on the frontier: those of the tables, and those of compare.kl_coefs that have ended well; why the
    others have not goes to `failures`."""
    runs = [
        _frontier_run(curve, comparison.folder / f"{curve.method}-seed{curve.seed}", comparison.config.method.kl_coef)
        for curve in curves
    ]
    for (method, seed, kl_coef), job in further.items():
        if job.name not in failures:
            try:
                runs.append(_frontier_run(curve_of(job, method, seed), job.run_dir, kl_coef))
            except GradeError as error:
                failures[job.name] = str(error)
    return sorted(runs, key=lambda run: comparison.methods.index(run.method))


def _frontier_run(curve: RunCurve, run_dir: Path, kl_coef: float) -> FrontierRun:
    steps = tuple(validation.step for validation in curve.validations if validation.step > 0)
    return FrontierRun(curve.method, curve.seed, kl_coef, run_dir, steps)


def _payload(
    comparison: Comparison,
    swept: Swept,
    failures: dict[str, str],
    judge: dict | None,
    curves: list[RunCurve],
    tests: Tests,
) -> dict:
    return {
        "config": asdict(comparison.config),
        "methods": list(comparison.methods),
        "seeds": list(comparison.seeds),
        "learning_rates": swept.rates,
        "schedules": swept.schedules,
        "sweep": swept.tried,
        "failures": failures,
        "judge": judge,
        "fluency": reader_name(comparison.config),
        "machine": machine(),
        "budgets": asdict(common_budgets(curves)),
        "tables": {budget: table(curves, tests, budget=budget) for budget in ("tokens", "seconds")},
        "tests": {key_of(key): value for key, value in tests.items()},
        "curves": [asdict(curve) for curve in curves],
    }


def show(payload: dict, folder: Path) -> None:
    """Print the two tables and the frontier of the reward with their notes; write them as comparison.md."""
    with writing(folder / "comparison.md", "output_dir", _TESTED):
        (folder / "comparison.md").write_text(document(payload), encoding="utf-8")
    out = Console()
    with printing():
        for budget, title in TITLES.items():
            out.print(rich_table(payload["tables"][budget], title))
        if payload["frontier"] is not None:
            out.print(frontier_tables(payload["frontier"])[0].rich(box=box.SIMPLE_HEAD))
        out.print(notes(payload), highlight=False, markup=False)
        out.print(f"Comparison: {folder}", soft_wrap=True, highlight=False)
