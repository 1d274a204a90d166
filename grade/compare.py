"""`grade compare`: several methods, several seeds, the same prompts, one run each; tables at equal cost.

    1. sweep     every method with every learning rate, the same few; the best by validation is the method's own
    2. runs      method x seed with it; the adapter of every validation is kept
    3. test      for each run the best checkpoint by validation within the common budget of tokens, and within that of
                 seconds, on the test prompts (`grade.final_test`)
    4. tables    `grade.comparison`

Everything is kept as it is made and found again: a comparison that was stopped goes on where it was, and a run that
failed is reported and does not stop the others.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import torch
from rich.console import Console

from grade.checkpoint import check_writable
from grade.comparison import (
    Budgets,
    RunCurve,
    Tests,
    best_within,
    common_budgets,
    markdown,
    read_run,
    rich_table,
    table,
    write_comparison,
)
from grade.config import Config, GradeError, validate
from grade.final_test import Checkpoint, test_checkpoints, test_key
from grade.jobs import Job, check_jobs, run_jobs
from grade.loading import load_policy, load_reward, load_tokenizer
from grade.machine import machine, machine_line
from grade.method_config import method_named
from grade.run_dir import adapter_folder
from grade.tasks import load_task
from grade.trainer import make_accelerator

_GROUP = 4
_TITLES = {"tokens": "Equal generated tokens", "seconds": "Equal training time"}


@dataclass(frozen=True)
class Comparison:
    """What is compared, and where it is kept."""

    config: Config
    methods: Sequence[str]
    seeds: Sequence[int]

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir) / f"compare-{self.config.name}"

    @property
    def samples_per_prompt(self) -> int:
        own = self.config.generation.samples_per_prompt
        return self.config.compare.samples_per_prompt or (own if own > 1 else _GROUP)

    def job(self, method: str, seed: int, learning_rate: float, steps: int, run_dir: Path) -> Job:
        """A run of a method as it would be by itself, without its own test."""
        config = self.config
        train = replace(
            config.train, learning_rate=learning_rate, steps=steps, run_dir=str(run_dir), keep_adapters=True,
            resume=False, overwrite=False, tensorboard=False, wandb=False,
        )
        return Job(run_dir.name, replace(
            config, seed=seed, method=method_named(config.method, method), train=train,
            generation=replace(config.generation, samples_per_prompt=self.samples_per_prompt),
            evaluation=replace(config.evaluation, test_prompts=0),
        ))

    def sweep_job(self, method: str, factor: float) -> Job:
        compare, rate = self.config.compare, self.config.train.learning_rate * factor
        return self.job(
            method, compare.sweep_seed, rate, compare.sweep_steps, self.folder / "sweep" / f"{method}-lr{rate:g}"
        )

    def run_job(self, method: str, seed: int, learning_rate: float) -> Job:
        return self.job(method, seed, learning_rate, self.config.train.steps, self.folder / f"{method}-seed{seed}")


def run_comparison(config: Config, methods: Sequence[str], seeds: Sequence[int]) -> dict:
    """Do what is not done yet and print the tables.

    Args:
        methods: names in `grade.method_config.COMPARED`.
        seeds: of the runs.

    Returns:
        The payload of comparison.json.

    Raises:
        GradeError: a method cannot run with this config; earlier runs had other settings; or every run failed.
    """
    comparison, console = Comparison(config, methods, seeds), Console(stderr=True, soft_wrap=True)
    if config.compare.sweep_seed in seeds:
        raise GradeError(f"compare.sweep_seed ({config.compare.sweep_seed}) is one of --seeds: choose another.")
    for method in methods:
        validate(comparison.run_job(method, seeds[0], config.train.learning_rate).config)
    check_writable("output_dir", comparison.folder)
    comparison.folder.mkdir(parents=True, exist_ok=True)
    _make_reward(config)
    rates, sweep, failures = _sweep(comparison, console)
    jobs = {(m, s): comparison.run_job(m, s, rates[m]) for m in methods if m in rates for s in seeds}
    check_jobs(list(jobs.values()))
    failures |= run_jobs(list(jobs.values()), config.compare.jobs, console)
    curves = {key: read_run(job.run_dir, *key) for key, job in jobs.items() if job.name not in failures}
    if not curves:
        raise GradeError(f"every run of the comparison failed: {failures}")
    tests, judge = test_checkpoints(config, comparison.folder, _chosen(comparison, list(curves.values())), console)
    payload = _payload(comparison, rates, sweep, failures, judge, list(curves.values()), tests)
    write_comparison(comparison.folder / "comparison.json", payload)
    show(payload, comparison.folder)
    return payload


def _make_reward(config: Config) -> None:
    """Train the reward head before several runs would each want to; in this process, and given back."""
    accelerator, tokenizer, task = make_accelerator(config), load_tokenizer(config), load_task(config)
    load_reward(config, load_policy(config, tokenizer, accelerator.device), task)
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()


def _sweep(comparison: Comparison, console: Console) -> Tuple[Dict[str, float], List[dict], Dict[str, str]]:
    """(learning rate by method, what was tried, failures). A rate that fails is not chosen."""
    config, compare = comparison.config, comparison.config.compare
    if compare.sweep_steps == 0 or len(compare.learning_rate_factors) == 1:
        rate = config.train.learning_rate * (compare.learning_rate_factors[0] if compare.sweep_steps else 1.0)
        return {method: rate for method in comparison.methods}, [], {}
    jobs = {
        (method, factor): comparison.sweep_job(method, factor)
        for method in comparison.methods for factor in compare.learning_rate_factors
    }
    check_jobs(list(jobs.values()))
    console.print(f"Learning rates: {len(jobs)} runs of {compare.sweep_steps} steps")
    failures = run_jobs(list(jobs.values()), compare.jobs, console)
    tried, rates = [], {}
    for (method, factor), job in jobs.items():
        rate = config.train.learning_rate * factor
        value = None
        if job.name not in failures:
            value = validation_objective(read_run(job.run_dir, method, compare.sweep_seed), config)
        tried.append({"method": method, "learning_rate": rate, "objective": value})
    for method in comparison.methods:
        found = [t for t in tried if t["method"] == method and t["objective"] is not None]
        if found:
            rates[method] = max(found, key=lambda t: t["objective"])["learning_rate"]
    return rates, tried, {f"sweep/{name}": reason for name, reason in failures.items()}


def validation_objective(curve: RunCurve, config: Config) -> float:
    """What the sweep compares: the metric minus kl_coef times KL, of the best validation of a run.

    Not the metric alone: the highest rate often buys it with a KL that the objective would not pay for.
    """
    per_nat = config.method.kl_coef
    if config.method.kl_reduction == "sequence_sum":
        per_nat *= config.generation.max_new_tokens  # an upper bound of the length: validations keep nats per token
    return max(v.metric - per_nat * v.kl for v in curve.validations if v.step > 0)


def _chosen(comparison: Comparison, curves: Sequence[RunCurve]) -> Dict[Checkpoint, Path]:
    """The adapters that the tables need: the best of each run within either budget."""
    budgets = common_budgets(curves)
    chosen = {}
    for curve in curves:
        for budget in ({"tokens": budgets.tokens}, {"seconds": budgets.seconds}):
            best = best_within(curve, **budget)
            if best is not None and best.step > 0:
                run_dir = comparison.folder / f"{curve.method}-seed{curve.seed}"
                chosen[curve.method, curve.seed, best.step] = adapter_folder(run_dir, best.step)
    return chosen


def _payload(
    comparison: Comparison, rates: Dict[str, float], sweep: List[dict], failures: Dict[str, str],
    judge: Optional[dict], curves: List[RunCurve], tests: Tests,
) -> dict:
    return {
        "config": asdict(comparison.config), "methods": list(comparison.methods), "seeds": list(comparison.seeds),
        "learning_rates": rates, "sweep": sweep, "failures": failures, "judge": judge,
        "machine": machine(), "budgets": asdict(common_budgets(curves)),
        "tables": {budget: table(curves, tests, budget=budget) for budget in ("tokens", "seconds")},
        "tests": {test_key(key): value for key, value in tests.items()},
        "curves": [asdict(curve) for curve in curves],
    }


def document(payload: dict) -> str:
    """comparison.json as Markdown: both tables, learning rates, judge, failures, machine."""
    budgets = Budgets(**payload["budgets"])
    seeds = ", ".join(map(str, payload["seeds"]))
    parts = [f"# {payload['config']['name']}: {', '.join(payload['methods'])}; seeds {seeds}"]
    for budget, title in _TITLES.items():
        parts.append(f"## {title}\n\n{markdown(payload['tables'][budget], budget, budgets).rstrip()}")
    return "\n\n".join([*parts, _notes(payload)]) + "\n"


def _notes(payload: dict) -> str:
    rates = ", ".join(f"{method} {rate:g}" for method, rate in payload["learning_rates"].items())
    lines = [f"Learning rates, by the sweep: {rates}." if payload["sweep"] else f"Learning rates: {rates}."]
    if payload["judge"] is not None:
        accuracy = ", ".join(f"{value:.3f} on the first {text}" for text, value in payload["judge"]["accuracy"].items())
        lines.append(f"The judge's held-out accuracy: {accuracy}.")
    lines += [f"Failed: {name}: {reason}" for name, reason in payload["failures"].items()]
    jobs = payload["config"]["compare"]["jobs"]
    lines.append(f"{jobs} run{'s' * (jobs > 1)} at a time. {machine_line(payload['machine'])}")
    return "\n".join(lines)


def show(payload: dict, folder: Path) -> None:
    """Print the two tables with their notes; write them as comparison.md."""
    out = Console()
    for budget, title in _TITLES.items():
        out.print(rich_table(payload["tables"][budget], title))
    (folder / "comparison.md").write_text(document(payload), encoding="utf-8")
    out.print(_notes(payload), highlight=False, markup=False)
    out.print(f"Comparison: {folder}", soft_wrap=True, highlight=False)
