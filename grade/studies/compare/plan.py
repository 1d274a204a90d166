"""The runs of a comparison: their settings and folders, and what is refused before any of them begins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from grade.config import Config, validate
from grade.config.methods import method_named
from grade.config.training import Schedule
from grade.errors import GradeError
from grade.studies.compare.comparison import read_run
from grade.studies.compare.jobs import Job

_GROUP = 4
_SWEEP_VALIDATIONS = 2


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

    def job(
        self,
        method: str,
        seed: int,
        learning_rate: float,
        schedule: Schedule,
        steps: int,
        validations: int,
        run_dir: Path,
    ) -> Job:
        """A run of a method as it would be by itself, without its own test."""
        config = self.config
        train = replace(
            config.train,
            learning_rate=learning_rate,
            schedule=schedule,
            steps=steps,
            run_dir=str(run_dir),
            keep_adapters=True,
            resume=False,
            overwrite=False,
            tensorboard=False,
            wandb=False,
        )
        return Job(
            run_dir.name,
            replace(
                config,
                seed=seed,
                method=method_named(config.method, method),
                train=train,
                generation=replace(config.generation, samples_per_prompt=self.samples_per_prompt),
                evaluation=replace(config.evaluation, test_prompts=0, every=-(-steps // validations)),
            ),
        )

    def sweep_job(self, method: str, factor: float, schedule: Schedule) -> Job:
        compare, train = self.config.compare, self.config.train
        rate = train.learning_rate * factor
        name = f"{method}-lr{rate:g}" + (f"-{schedule}" if schedule != train.schedule else "")
        run_dir = self.folder / "sweep" / name
        return self.job(method, compare.sweep_seed, rate, schedule, compare.sweep_steps, _SWEEP_VALIDATIONS, run_dir)

    def run_job(self, method: str, seed: int, learning_rate: float, schedule: Schedule) -> Job:
        steps, validations = self.config.train.steps, self.config.compare.validations
        return self.job(method, seed, learning_rate, schedule, steps, validations, self.folder / f"{method}-seed{seed}")

    def frontier_jobs(
        self, rates: Mapping[str, float], schedules: Mapping[str, Schedule]
    ) -> dict[tuple[str, int, float], Job]:
        """By (method, seed, kl_coef), the runs of compare.kl_coefs, but for the coefficient that all runs have."""
        own = self.config.method.kl_coef
        return {
            (method, seed, kl_coef): self._frontier_job(method, seed, rates[method], schedules[method], kl_coef)
            for seed in self.seeds
            for kl_coef in sorted(set(self.config.compare.kl_coefs or []) - {own})
            for method in self.methods
            if method in rates
        }

    def _frontier_job(self, method: str, seed: int, learning_rate: float, schedule: Schedule, kl_coef: float) -> Job:
        steps, validations = self.config.train.steps, self.config.compare.validations
        run_dir = self.folder / "frontier" / f"{method}-kl{kl_coef!r}-seed{seed}"
        job = self.job(method, seed, learning_rate, schedule, steps, validations, run_dir)
        return Job(job.name, replace(job.config, method=replace(job.config.method, kl_coef=kl_coef)))


def check_methods(comparison: Comparison, jobs: Sequence[Job]) -> None:
    """Refuse methods that cannot run, with their own coefficient of the KL or with one of compare.kl_coefs, and two
    that are the same.

    Args:
        jobs: one of each method, in their order.
    """
    for i, (method, job) in enumerate(zip(comparison.methods, jobs, strict=True)):
        _check_job(comparison, job)
        for other, earlier in zip(comparison.methods[:i], jobs[:i], strict=True):
            if earlier.config.method == job.config.method:
                raise GradeError(
                    f"--methods: {other} and {method} are the same method with these settings: leave one out."
                )
    train = comparison.config.train
    one = replace(comparison, seeds=comparison.seeds[:1])
    rates = dict.fromkeys(comparison.methods, train.learning_rate)
    for job in one.frontier_jobs(rates, dict.fromkeys(comparison.methods, train.schedule)).values():
        _check_job(comparison, job)


def _check_job(comparison: Comparison, job: Job) -> None:
    try:
        validate(job.config)
    except GradeError as error:
        if comparison.samples_per_prompt == comparison.config.generation.samples_per_prompt:
            raise
        # What is wrong is the comparison's own number, in a setting that the user has not touched.
        text = str(error).replace("generation.samples_per_prompt", "compare.samples_per_prompt")
        raise GradeError(text) from error


def check_steps(jobs: Iterable[Job], setting: str) -> None:
    """Refuse fewer steps than a run has had: it would be judged by steps beyond the others' last."""
    for job in jobs:
        try:
            had = len(read_run(job.run_dir, job.name, job.config.seed).tokens)
        except GradeError:
            continue  # not begun, or damaged, which is told where its curve is needed
        if had > job.config.train.steps:
            raise GradeError(
                f"{setting} is {job.config.train.steps}, but {job.run_dir} has had {had} steps: set it to {had} or "
                "more, or compare under another --name."
            )
