"""TRL's GRPO and RLOO trainers beside the methods here: the same model, adapter, prompts, responses a step and reward.

    pip install -e '.[peers]'
    OMP_NUM_THREADS=1 python -m benchmarks.peers --save benchmarks/results/peers-imdb_small.json
    python -m benchmarks.peers --table benchmarks/results/peers-imdb_small.json
    python -m benchmarks.peers --table benchmarks/results/peers-imdb_small.json --plot FILE.png

    1. base     the reward's head and the judge are trained, and the base model is evaluated
    2. pace     seconds of a step of every method: how many steps each gets for the same training time
    3. sweep    learning rates of each method that learns, and at the best of them one further setting after another,
                each kept where the objective on validation is higher; with one seed that no run has
    4. runs     seed by seed, method by method: as many steps as take --seconds, each run a process of its own

On a machine that does other work, `--clock process` counts the seconds that a process was on its CPU, where one thread
each leaves no others out.

What is measured is written to --save after every process, and the same command goes on where it was. Options that it
does not know are settings of the config, such as --train.batch_size 8.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.peers_run import BASE, Order
from benchmarks.peers_text import LABELS, STEP_SECONDS, document, objective_of
from benchmarks.peers_trl import TRAINERS, check_trl
from benchmarks.saved import SAVED, check_plot, document_of, new_parser, number, read_saved, write_saved
from grade.config import Config
from grade.config.reading import config_to_yaml, load_config
from grade.errors import GradeError, failure_of
from grade.files import locked
from grade.machine import machine

LEARNERS = (*TRAINERS, "grade-ste")
"""Methods with a sweep and whole runs."""
PACERS = ("grpo", "rloo")
"""Ours that are only timed: the same algorithms as TRL's."""
FACTORS = (0.3, 1.0, 3.0)
"""Learning rates of the sweep, times train.learning_rate."""
EXTENSIONS = 2
"""Further ones at most, where the best is the lowest or the highest."""
VARIANTS: Mapping[str, Sequence[dict[str, Any]]] = {
    "trl-grpo": ({"scale_rewards": "none"}, {"num_iterations": 2}, {"top_k": 0}, {"schedule": "constant"}),
    "trl-rloo": ({"normalize_advantages": True}, {"num_iterations": 2}, {"top_k": 0}, {"schedule": "constant"}),
    "grade-ste": ({"schedule": "constant"},),
}
"""What is tried at the best learning rate, one after another."""
SLOWER = ("num_iterations",)
"""TRL's settings that change what a step costs."""
PACE_STEPS = 8
POINTS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)
SWEEP_POINTS = (1 / 2, 1.0)
_GROUP = 4  # responses to a prompt, as `grade compare` has it


class ChildFailed(Exception):
    """A process with an order failed."""


@dataclass
class Study:
    """What is measured, and what has been.

    Args:
        payload: as it is saved.
        row_of: makes the row of an order, which takes the while.
        save: keeps the payload.
    """

    config: Config
    seconds: float
    sweep_seconds: float
    sweep_seed: int
    clock: str
    payload: dict[str, Any]
    row_of: Callable[[Order], dict[str, Any]]
    save: Callable[[dict[str, Any]], None]

    def row(self, order: Order) -> dict[str, Any]:
        """The row of an order, measured now unless it is there."""
        wanted = json.loads(json.dumps(asdict(order)))
        for row in self.payload["rows"]:
            if all(row[key] == value for key, value in wanted.items()):
                return row
        print(f"{order.stage}: {told(order)}", file=sys.stderr, flush=True)
        try:
            row = self.row_of(order)
        except ChildFailed as error:
            if order.stage != "sweep":  # a trial may fail, as one at too high a learning rate does
                sys.exit(f"{error}\n{told(order)} failed. What was measured before is kept: the same command goes on.")
            row = {**wanted, "failed": str(error).splitlines()[-1]}
            print(f"failed: {row['failed']}", file=sys.stderr, flush=True)
        self.payload["rows"].append(row)
        self.save(self.payload)
        return row

    def run(self, seeds: Sequence[int]) -> None:
        """All of it."""
        self.row(Order("base", BASE))
        for method in (*LEARNERS, *PACERS):
            self.pace(self.order("pace", method))
        best = {method: self.swept(method) for method in LEARNERS}
        for seed in seeds:
            for method in LEARNERS:
                self.row(self.timed(replace(best[method], stage="run", seed=seed, points=POINTS), self.seconds))
            for method in PACERS:
                self.row(replace(self.order("run", method), seed=seed, steps=PACE_STEPS))

    def order(self, stage: str, method: str) -> Order:
        """A method with the config's own rate and schedule."""
        train = self.config.train
        return Order(stage, method, self.sweep_seed, train.learning_rate, train.schedule)

    def pace(self, order: Order) -> float:
        """Median seconds of a step."""
        slower = {name: value for name, value in order.options.items() if name in SLOWER}
        same = replace(self.order("pace", order.method), options=slower, steps=PACE_STEPS)
        return statistics.median(self.row(same)[STEP_SECONDS[self.clock]][2:])

    def timed(self, order: Order, seconds: float) -> Order:
        """The same with as many steps as take so long."""
        return replace(order, steps=max(round(seconds / self.pace(order)), 2))

    def swept(self, method: str) -> Order:
        """The order of a method with its best settings."""
        first = replace(self.order("sweep", method), points=SWEEP_POINTS)
        if self.sweep_seconds == 0:
            return first
        found = {factor: self.tried(self.at_rate(first, factor)) for factor in FACTORS}
        for _ in range(EXTENSIONS):
            factor = beyond(found)
            if factor is None:
                break
            found[factor] = self.tried(self.at_rate(first, factor))
        factor = max(sorted(found), key=found.__getitem__)
        best, objective = self.at_rate(first, factor), found[factor]
        for variant in VARIANTS[method]:
            options = {name: value for name, value in variant.items() if name != "schedule"}
            changed = replace(
                best, schedule=variant.get("schedule", best.schedule), options={**best.options, **options}
            )
            if changed == best:
                continue
            if (reached := self.tried(changed)) > objective:
                best, objective = changed, reached
        return best

    def at_rate(self, order: Order, factor: float) -> Order:
        return replace(order, learning_rate=self.config.train.learning_rate * factor)

    def tried(self, order: Order) -> float:
        """The best objective of a trial; of one that failed, less than any."""
        row = self.row(self.timed(order, self.sweep_seconds))
        return -math.inf if "failed" in row else objective_of(row)


def beyond(found: Mapping[float, float]) -> float | None:
    """The factor to try next where the best is the first or the last; None where it lies inside."""
    factors = sorted(found)
    best = max(factors, key=found.__getitem__)
    if best not in (factors[0], factors[-1]):
        return None
    return best * best / factors[1 if best == factors[0] else -2]


def told(order: Order) -> str:
    """An order in words."""
    options = "".join(f", {name} {value}" for name, value in order.options.items())
    if order.method == BASE:
        return "the base model"
    return (
        f"{LABELS[order.method]}, seed {order.seed}, {order.steps} steps at {order.learning_rate:g} ({order.schedule})"
        + options
    )


def child(folder: Path, order: Order, threads: int) -> dict[str, Any]:
    """The row of an order, from a process of its own.

    Raises:
        ChildFailed: it failed; with the end of what it said.
    """
    order_file, row_file, log = folder / "order.json", folder / "row.json", folder / "child.log"
    order_file.write_text(json.dumps(asdict(order)), encoding="utf-8")
    row_file.unlink(missing_ok=True)
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    with log.open("w", encoding="utf-8") as output:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.peers_run", str(order_file), str(row_file)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    if done.returncode != 0 or not row_file.is_file():
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-15:]
        raise ChildFailed("\n".join(last) or f"exit status {done.returncode}")
    return json.loads(row_file.read_text(encoding="utf-8"))


@contextmanager
def refusing() -> Iterator[None]:
    """End with a mistake's words, and where it is stopped with how to go on."""
    try:
        yield
    except GradeError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("Stopped. What was measured before is kept: the same command goes on.")


def config_of(name: str, overrides: list[str]) -> Config:
    """The settings that all runs share.

    Raises:
        SystemExit: they cannot work.
    """
    with refusing():
        config = load_config(name, overrides)
    copies = config.generation.samples_per_prompt
    generation = replace(config.generation, samples_per_prompt=copies if copies > 1 else _GROUP)
    if generation.ignore_eos:
        sys.exit("generation.ignore_eos is true, which TRL's trainers cannot do. Set it to false.")
    return replace(config, generation=generation)


def begun(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What was saved before under the same settings, or the beginning of it.

    Raises:
        SystemExit: it was measured under others.
    """
    settings = json.loads(json.dumps(settings))
    if not path.is_file():
        return {"settings": settings, "machine": {**machine(), "trl": version("trl")}, "rows": []}
    payload = read_saved(path, SAVED, "settings", "machine", "rows")
    if not isinstance(payload["settings"], dict) or not isinstance(payload["rows"], list):
        sys.exit(f"{path} is damaged: its settings or rows are of another type. Save to another file.")
    differing = [name for name, value in settings.items() if payload["settings"].get(name) != value]
    if differing:
        sys.exit(f"{path} was measured with other settings ({', '.join(differing)}). Save to another file.")
    return payload


def measure(options: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """Measure what is not there yet."""
    check_trl()
    if options.sweep_seed in options.seeds:
        sys.exit(f"--sweep-seed ({options.sweep_seed}) is one of --seeds: choose another.")
    if options.clock == "process" and options.threads > 1:
        sys.exit("--clock process adds up the seconds of all threads. Set --threads to 1, or --clock to wall.")
    config = config_of(options.config, overrides)
    config = replace(config, evaluation=replace(config.evaluation, validation_prompts=options.prompts))
    settings = {
        "config": {name: value for name, value in asdict(config).items() if name != "output_dir"},
        "seconds": options.seconds,
        "sweep_seconds": options.sweep_seconds,
        "sweep_seed": options.sweep_seed,
        "threads": options.threads,
        "clock": options.clock,
    }
    payload = begun(options.save, settings)
    try:
        write_saved(options.save, payload)
    except OSError as error:
        sys.exit(f"--save {options.save} cannot be written ({error.strerror}). Name a file in a folder that is there.")
    folder = Path(config.output_dir) / f"peers-{config.name}"
    folder.mkdir(parents=True, exist_ok=True)
    busy = f"{folder} is in use by another measurement: wait for it, or name another --output_dir."
    with refusing(), locked(folder / "lock", "output_dir", busy):
        (folder / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
        study = Study(
            config,
            options.seconds,
            options.sweep_seconds,
            options.sweep_seed,
            options.clock,
            payload,
            lambda order: child(folder, order, options.threads),
            lambda found: write_saved(options.save, found),
        )
        study.run(options.seeds)
    return payload


def main(arguments: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--config", default="imdb_small", help="name or file of a config (default: imdb_small)")
    parser.add_argument("--seeds", type=_seeds, default=[0, 1, 2], help="of the runs (default: 0,1,2)")
    parser.add_argument(
        "--seconds", type=number(float, 0, above=True), default=45.0, help="training time of a run (default: 45)"
    )
    parser.add_argument(
        "--sweep-seconds", type=number(float, 0), default=20.0, help="of a trial; 0: none (default: 20)"
    )
    parser.add_argument("--sweep-seed", type=number(int, 0), default=1000, help="seed of the trials (default: 1000)")
    parser.add_argument(
        "--prompts", type=number(int, 1), default=200, help="validation prompts of an evaluation (default: 200)"
    )
    parser.add_argument("--threads", type=number(int, 1), default=1, help="of every process (default: 1)")
    parser.add_argument("--clock", choices=STEP_SECONDS, default="wall", help="what seconds are (default: wall)")
    parser.add_argument("--save", type=Path, help="where what is measured is kept, as JSON; it goes on from there")
    parser.add_argument("--table", type=Path, help="print the tables of a saved file, measure nothing")
    parser.add_argument("--plot", type=Path, help="draw reward against training time into this file")
    options, overrides = parser.parse_known_args(arguments)
    if options.plot is not None:
        check_plot(options.plot)
    if options.table is not None:
        if overrides:
            parser.error(f"--table measures nothing, so that {overrides[0]} changes nothing: leave it out")
        payload = read_saved(options.table, SAVED, "settings", "machine", "rows", of_rows=("stage", "method"))
    elif options.save is None:
        sys.exit("Name a file to keep it in with --save, or one to read with --table.")
    else:
        payload = measure(options, overrides)
    print(document_of(options.table or options.save, payload, document), end="")
    if options.plot is not None:
        from benchmarks.peers_plot import plot  # matplotlib is an extra

        try:
            plot(options.plot, payload)
        except (OSError, ValueError) as error:  # also of an ending that is no picture's
            sys.exit(f"--plot {options.plot} could not be drawn ({failure_of(error)}). Draw it again with --table.")


def _seeds(text: str) -> list[int]:
    parts = text.split(",")
    seeds = [int(part) for part in parts if part.strip().isdecimal()]
    if len(set(seeds)) < len(parts):
        raise argparse.ArgumentTypeError(f"must be different whole numbers from 0 on, such as 0,1,2, got {text!r}")
    return seeds


if __name__ == "__main__":
    main()
