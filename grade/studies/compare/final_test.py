"""The held-out test of a comparison: chosen checkpoints and the base model on the same prompts with the same noise.

Beside the reward that was trained on stand measures it had no part in (`grade.studies.compare.measures`), above all an
independent judge and how well the samples read to another model. Where the reward rises and they fall, the reward was
fooled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from grade.config import Config, flatten, judged_length, settings_with_role
from grade.errors import GradeError, read_json, writing
from grade.formats import JUDGE, TESTS
from grade.model.checkpoint import adapter_digest, load_adapter
from grade.model.policy import Policy
from grade.processes import make_accelerator
from grade.rewards.base import Reward
from grade.rollout import Rollout
from grade.studies.compare.comparison import BASE, Checkpoint
from grade.studies.compare.fluency import load_reader
from grade.studies.compare.judge import Judge, train_judge
from grade.studies.compare.measures import Spread, distances, numbers, sample_measures, spread_of
from grade.tasks.base import Task
from grade.training.evaluation import Measures, responses, summary, write_evaluations
from grade.training.run_folder import make_again
from grade.training.setup import set_up

_TESTED = ("task", "model", "reward", "generation", "evaluation")
"""Sections whose settings may change what a test finds."""
_UNTESTED = ("evaluation.every", "evaluation.validation_prompts")
"""Settings of those that choose the checkpoints, and leave the test of one what it is."""
_ROOM = "Make room on its disk: what was tested before is kept, and the same command goes on."


class Loaded(NamedTuple):
    """A policy, its reward, all test prompts, and what measures a rollout."""

    policy: Policy
    reward: Reward
    prompts: list[list[int]]
    measure: Callable[[Rollout], Measures]


class Bench:
    """What tests run on, loaded when the first of them is missing, and their results so far.

    Args:
        config: of the comparison.
        folder: keeps tests.json, the judge and its report.
        inputs: fingerprint of model, tokenizer, data, reward (`grade.model.fingerprint`), of the judge's texts and of
            what reads the samples.

    Raises:
        GradeError: tests.json is damaged.
    """

    def __init__(self, config: Config, folder: Path, inputs: Mapping[str, str], console: Console):
        self.config, self.folder, self.inputs, self.console = config, folder, inputs, console
        self.kept = _kept(folder / "tests.json", {**_identity(config), "inputs": dict(inputs)})

    @cached_property
    def loaded(self) -> Loaded:
        config = self.config
        tokenizer, task, policy, reward = set_up(config, make_accelerator(config))
        prompts = task.prompts("test", tokenizer, limit=config.evaluation.test_prompts)
        judge = load_judge(self.folder, config, self.inputs, tokenizer, task)
        return Loaded(policy, reward, prompts, sample_measures(policy, judge, load_reader(config, tokenizer, task)))

    def put(self, adapter: Path) -> None:
        """Give the policy this checkpoint's weights.

        Raises:
            GradeError: they cannot be read; with how to make its run again.
        """
        try:
            load_adapter(adapter, self.loaded.policy)
        except GradeError as error:
            raise GradeError(f"{error} {make_again(adapter.parents[1])}") from error

    def test(
        self, step: int, base: Spread | None, prompts: Sequence[list[int]], config: Config
    ) -> tuple[dict[str, Any], Spread]:
        """Numbers of the policy as it is, and the spread of its responses.

        Args:
            base: the base model's spread on the same prompts; None tests the base model itself.
            config: the comparison's, or one that measures something else.
        """
        policy, reward, _, measure = self.loaded
        adapters = base is not None
        records = responses(
            policy,
            reward,
            prompts,
            config.evaluation,
            config.generation,
            config.method,
            split="test",
            adapters=adapters,
            measure=measure,
        )
        model = "policy" if adapters else "base"
        row = summary(records, config.evaluation.samples, split="test", step=step, model=model)
        spread = spread_of(records)
        return {**numbers(asdict(row)), **distances(spread, base or spread)}, spread

    def keep(self) -> None:
        _write(self.folder / "tests.json", self.kept)


def evaluate_checkpoints(
    bench: Bench, adapters: Mapping[Checkpoint, Path]
) -> tuple[dict[Checkpoint, dict], dict[str, str], dict | None]:
    """Test the base model and each adapter, but for what tests.json already holds of the same weights.

    Args:
        adapters: folder of each checkpoint's adapter.

    Returns:
        (results as `comparison.table` reads them, by name of a run why it could not be tested, the judge's report
        or None without a judge).

    Raises:
        GradeError: judge.json is damaged.
    """
    results, failures = bench.kept["results"], {}
    digests = {BASE: None, **{key: adapter_digest(adapter) for key, adapter in adapters.items()}}
    missing = [
        key for key, digest in digests.items() if results.get(key_of(key), {}).get("adapter_sha256", "none") != digest
    ]
    for number, key in enumerate(missing, start=1):
        bench.console.print(f"Test {number} of {len(missing)}: {_named(key)}", highlight=False)
        if key != BASE:
            try:
                bench.put(adapters[key])
            except GradeError as error:
                failures[adapters[key].parents[1].name] = str(error)
                del digests[key]
                continue
        base = None if key == BASE else bench.kept["spread"]
        row, spread = bench.test(key[2], base, bench.loaded.prompts, bench.config)
        if key == BASE:
            bench.kept["spread"] = spread
        results[key_of(key)] = {**row, "adapter_sha256": digests[key]}
        bench.keep()
    return {key: results[key_of(key)] for key in digests}, failures, _judge_report(bench.folder)


def _kept(path: Path, identity: dict) -> dict:
    """tests.json, begun anew where it holds results of other settings or inputs.

    Its "spread" is that of the base model's responses in the test.
    """
    kept = read_json(path, "Delete it: the same command tests again.", shape=TESTS) if path.is_file() else {}
    if kept.get("identity") != identity:
        kept = {"identity": identity, "results": {}}
        _write(path, kept)  # before a judge of these settings takes the place of those results' own
    return kept


def _write(path: Path, content: dict) -> None:
    with writing(path, "output_dir", _ROOM):
        write_evaluations(path, content)


def _named(key: Checkpoint) -> str:
    method, seed, step = key
    return "the base model" if key == BASE else f"{method}, seed {seed}, step {step}"


def key_of(key: Checkpoint) -> str:
    """A checkpoint as a name in JSON."""
    return "/".join(str(part) for part in key)


def _identity(config: Config) -> dict:
    """What test results depend on beside the checkpoint."""
    settings = flatten(asdict(config))
    return {
        name: settings[name]
        for name in settings_with_role("identity")
        if name == "method.kl_direction" or (name.partition(".")[0] in _TESTED and name not in _UNTESTED)
    }


def load_judge(folder: Path, config: Config, inputs: Mapping[str, str], tokenizer: Any, task: Task) -> Judge | None:
    """The comparison's judge, trained now unless the one kept there was trained on the same; None for a task without
    texts to learn from."""
    examples, report, path = task.examples("judge"), folder / "judge.json", folder / "judge.safetensors"
    if len({example.label for example in examples}) < 2:
        report.unlink(missing_ok=True)
        return None
    judged = judged_length(config.task, config.reward, config.generation)
    lengths = sorted({judged, config.reward.max_tokens, 2 * config.reward.max_tokens})
    identity = _judge_identity(config, inputs, lengths)
    if path.is_file() and (_judge_report(folder) or {}).get("identity") == identity:
        return Judge.load(path)
    report.unlink(missing_ok=True)  # written last: it says whose weights these are
    # Reported on the test's own reviews: held-out training reviews flatter it (the same films, perhaps).
    judge, numbers = train_judge(tokenizer, examples, task.examples("test"), lengths=lengths, seed=config.reward.seed)
    with writing(path, "output_dir", _ROOM):
        judge.save(path)
    _write(report, {**numbers, "identity": identity})
    return judge


def _judge_identity(config: Config, inputs: Mapping[str, str], lengths: Sequence[int]) -> dict:
    """What a judge and its report depend on, by content."""
    read = {name: inputs[name] for name in ("tokenizer", "judge", "data")}
    return {**read, "lengths": list(lengths), "seed": config.reward.seed}


def _judge_report(folder: Path) -> dict | None:
    path = folder / "judge.json"
    fix = "Delete it and tests.json: the same command makes both again."  # the judge is trained only for a test
    return read_json(path, fix, shape=JUDGE) if path.is_file() else None
