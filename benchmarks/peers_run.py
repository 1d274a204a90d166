"""One run of `benchmarks.peers`, in a process of its own:

    python -m benchmarks.peers_run ORDER.json ROW.json

Reads what to do, and writes what was measured. Every method is timed by the same clock, and evaluated by the same code
on the same prompts with the same noise while the clock stands still.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.peers_trl import TRAINERS, train_by_trl, trl_classes
from grade import Callback, GradeTrainer
from grade.config import Config
from grade.config.methods import method_named
from grade.config.reading import config_from_yaml
from grade.config.training import Schedule
from grade.methods.metrics import peak_memory_gib, reset_peak_memory
from grade.model.fingerprint import inputs_of, judge_digest
from grade.processes import make_accelerator
from grade.studies.compare.final_test import load_judge
from grade.studies.compare.judge import Judge
from grade.studies.compare.measures import judge_rows
from grade.training.evaluation import Evaluation, evaluate
from grade.training.setup import SetUp, set_up

BASE = "base"
"""In place of a method: the model before any step; trains the reward's head and the judge for the others."""


@dataclass(frozen=True)
class Order:
    """What a process is to do.

    Args:
        stage: "base", "pace" (seconds of a step), "sweep" or "run".
        method: `BASE`, a name of `TRAINERS`, or a name of `grade.config.methods.COMPARED`.
        learning_rate, schedule, steps: of the run; a step is a batch of responses.
        points: shares of the steps after which to evaluate.
        options: further settings of TRL's.
    """

    stage: str
    method: str
    seed: int = 0
    learning_rate: float = 0.0
    schedule: Schedule = "constant"
    steps: int = 0
    points: tuple[float, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


class Clock:
    """Seconds of steps by the wall clock and by that of the process, and memory; evaluations take none of them.

    Args:
        measure: an evaluation of the policy as it is.
        at: the steps after which to make one.
    """

    def __init__(self, measure: Callable[[], dict[str, Any]], at: Collection[int], device: Any):
        self.measure, self.at, self.device = measure, at, device
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.tokens: list[int] = []
        self.points: list[dict[str, Any]] = []
        self.peak_gib = 0.0
        self._restart()
        self.began = self._last

    def begin(self) -> None:
        """The first step begins now."""
        reset_peak_memory(self.device)
        self._restart()
        self.began = self._last

    def _restart(self) -> None:
        self._last, self._last_cpu = time.perf_counter(), time.process_time()

    def step(self, tokens: int, catch_up: Callable[[], None] = lambda: None) -> None:
        """A step has ended, in which so many tokens were sampled.

        Args:
            catch_up: called before an evaluation, to give the policy what was learned elsewhere.
        """
        self.seconds.append(time.perf_counter() - self._last)
        self.cpu_seconds.append(time.process_time() - self._last_cpu)
        self.tokens.append(tokens)
        if not self.points:  # an evaluation leaves memory behind that no step has asked for
            self.peak_gib = max(self.peak_gib, peak_memory_gib(self.device))
        if len(self.seconds) in self.at:
            catch_up()
            times = {"seconds": sum(self.seconds), "cpu_seconds": sum(self.cpu_seconds)}
            self.points.append({"step": len(self.seconds), **times, **self.measure()})
        self._restart()


class Timed(Callback):
    """Tells the clock of the steps of a run of ours."""

    def __init__(self, clock: Clock):
        self.clock = clock

    def on_validation(self, trainer: Any, evaluation: Evaluation) -> None:
        if evaluation.model == BASE:
            self.clock.begin()

    def on_step(self, trainer: Any, step: int, metrics: Any) -> None:
        self.clock.step(int(metrics["tokens"]))


def steps_at(steps: int, shares: Collection[float]) -> set[int]:
    """The steps after which a run of so many is evaluated, at least 1."""
    return {max(round(steps * share), 1) for share in shares}


def run_config(config: Config, order: Order, run_dir: Path) -> Config:
    """The settings of a run by one of our methods; TRL's follow from them too."""
    named = BASE if order.method == BASE else order.method
    method = config.method if named in (BASE, *TRAINERS) else method_named(config.method, named)
    return replace(
        config,
        seed=order.seed,
        method=method,
        train=replace(
            config.train,
            learning_rate=order.learning_rate,
            schedule=order.schedule,
            steps=max(order.steps, 1),
            run_dir=str(run_dir),
            save_every=max(order.steps, 1),
            overwrite=True,
            tensorboard=False,
        ),
        # The run's own validation, which it begins and ends with, is not what is measured here.
        evaluation=replace(config.evaluation, every=max(order.steps, 1), validation_prompts=1, test_prompts=0),
    )


def measured_by(loaded: SetUp, config: Config, folder: Path) -> Callable[..., dict[str, Any]]:
    """The evaluation of every point: reward, KL and judge on the first evaluation.validation_prompts.

    Args:
        folder: where the judge is kept; trained now if it is not there.
    """
    tokenizer, task, policy, reward = loaded
    inputs = {**inputs_of(policy, task, reward.identity()), "judge": judge_digest(task)}
    judge: Judge | None = load_judge(folder, config, inputs, tokenizer, task)
    prompts = task.prompts("validation", tokenizer, limit=config.evaluation.validation_prompts)

    def measured(adapters: bool = True) -> dict[str, Any]:
        row = evaluate(
            policy,
            reward,
            prompts,
            config.evaluation,
            config.generation,
            config.method,
            split="validation",
            step=None,
            adapters=adapters,
            measure=None if judge is None else lambda r: {"judge": judge.probability(judge_rows(policy, r))},
        )
        kl = row.kl if config.method.kl_reduction == "token_mean" else row.kl_sequence
        return {
            "reward": row.reward,
            "kl": kl,
            "objective": row.reward - config.method.kl_coef * kl,
            "judge": row.details.get("judge"),
            "length": row.mean_length,
        }

    return measured


def run(order: Order, config: Config, folder: Path) -> dict[str, Any]:
    """Do it; the row."""
    run_dir = folder / "runs" / f"{order.stage}-{order.method}-seed{order.seed}"
    own = run_config(config, order, run_dir)
    if order.method in TRAINERS:
        loaded = set_up(own, make_accelerator(own))
        trainer = None
    else:
        trainer = GradeTrainer.from_config(own)
        loaded = trainer.loaded
    measured = measured_by(loaded, config, folder)
    if order.method == BASE:
        return {**asdict(order), **measured(adapters=False)}
    if trainer is None:
        trl_classes(order.method)  # what their import takes is not the run's
    device = loaded.policy.device
    reset_peak_memory(device)
    clock = Clock(measured, steps_at(order.steps, order.points), device)
    before, start = peak_memory_gib(device), time.perf_counter()
    if trainer is None:
        prompts = loaded.task.prompts("policy", loaded.tokenizer, limit=None)
        train_by_trl(
            order.method,
            own,
            loaded.policy,
            loaded.reward,
            prompts,
            run_dir,
            order.options,
            begin=clock.begin,
            step=clock.step,
        )
    else:
        trainer.callbacks.called = (Timed(clock),)
        trainer.train()
    return {
        **asdict(order),
        "before_seconds": clock.began - start,
        "step_seconds": clock.seconds,
        "step_cpu_seconds": clock.cpu_seconds,
        "step_tokens": clock.tokens,
        "loaded_gib": before,
        "peak_gib": clock.peak_gib,
        "curve": clock.points,
    }


def main(arguments: list[str]) -> None:
    order_file, row_file = map(Path, arguments)
    order = Order(**json.loads(order_file.read_text(encoding="utf-8")))
    folder = order_file.parent
    row = run(order, config_from_yaml(folder / "config.yaml"), folder)
    row_file.write_text(json.dumps(row), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
