"""`grade variance`: bias and variance of the gradient estimators at fixed parameters (`laboratory.py`).

For every length and number of candidates, all estimators on the same draws; for lengths at which the bias can be
judged, an unbiased reference on many more. The objective is the trainer's, KL and its effect on later tokens included.
variance.json is written after each of them, and the same command goes on with what is missing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from grade.config import Config, EvaluationConfig, default_methods, validate
from grade.config.methods import MethodConfig, method_named
from grade.config.studies import CompareConfig
from grade.config.tasks import JUDGED_BY_PROGRAM
from grade.errors import GradeError, printing, read_json, writing
from grade.files import check_writable, latest
from grade.formats import VARIANCE
from grade.machine import machine
from grade.model.checkpoint import adapter_digest, load_adapter
from grade.model.fingerprint import check_made_from, inputs_of, policy_inputs
from grade.processes import make_accelerator
from grade.rewards.weighted import WeightedReward
from grade.studies.variance.laboratory import Estimator, Laboratory, config_of
from grade.studies.variance.statistics import Draws, agreement, norm_error
from grade.studies.variance.steps import Branches, steps
from grade.studies.variance.text import document, rich_table
from grade.terminal import counting
from grade.training.evaluation import write_evaluations
from grade.training.interrupt import StopRequest, stop_between_steps
from grade.training.setup import set_up

JUDGED_LENGTH = 8
"""Longest response whose gradient's bias is judged: the noise of the reference grows with the length."""


def run_variance(config: Config, checkpoint: Path | None = None) -> dict:
    """Measure, print the table, write it.

    Args:
        checkpoint: folder of an adapter; None measures at the adapter's initial state.

    Returns:
        The payload of variance.json.

    Raises:
        GradeError: settings that cannot work, or no adapter in `checkpoint`.
        KeyboardInterrupt: Ctrl-C or SIGTERM; what was measured is written.
    """
    validate(config)
    settings = config.variance
    names = settings.methods or default_methods(config)
    lengths = settings.lengths or sorted({JUDGED_LENGTH, config.generation.max_new_tokens})
    top_ks = settings.top_ks or [config.generation.top_k]
    largest = replace(
        config, generation=replace(config.generation, max_new_tokens=max(lengths), min_new_tokens=0, top_k=max(top_ks))
    )
    folder = Path(config.output_dir) / f"variance-{config.name}"
    weights = None if checkpoint is None else adapter_digest(latest(checkpoint))
    if checkpoint is not None and weights is None:
        raise GradeError(
            f"--checkpoint {checkpoint} holds no adapter (adapter_model.safetensors is missing). Name a folder under "
            "checkpoints/ of a run."
        )
    if config.task.name in JUDGED_BY_PROGRAM:
        raise GradeError(
            f"task.name={config.task.name}: an answer to it must end by itself to count, and grade variance measures "
            "responses of one length. Use a task whose reward reads any text."
        )
    for name in names:  # each as it will be run
        validate(config_of(config, name, max(lengths), max(top_ks)))
    check_writable("output_dir", folder)
    path = folder / "variance.json"
    identity = {"config": asdict(_relevant(config)), "adapter_sha256": weights, "machine": machine()}
    _kept(path, identity)  # first without what takes time to load
    accelerator = make_accelerator(config)
    if accelerator.num_processes > 1:
        raise GradeError("grade variance runs in one process: start it without torchrun or accelerate.")
    tokenizer, task, policy, reward = set_up(config, accelerator, policy_config=largest)
    if checkpoint is not None:
        check_made_from(checkpoint.parents[1], policy_inputs(policy))
        load_adapter(latest(checkpoint), policy)
    payload = _kept(path, {**identity, "inputs": inputs_of(policy, task, reward.identity())})
    prompts = task.prompts("policy", tokenizer)
    with writing(folder, "output_dir"):
        folder.mkdir(parents=True, exist_ok=True)
    with stop_between_steps("what was measured is written") as stop:
        for length in lengths:
            for top_k in top_ks:
                laboratory = Laboratory(config, policy, reward, prompts, length, top_k)
                here = [row for row in payload["rows"] if (row["length"], row["top_k"]) == (length, top_k)]
                if _complete(laboratory, names, here):
                    continue
                fresh = _measured(laboratory, names, stop)
                if len(fresh) < len(here) or _fewest(fresh) < _fewest(here):
                    fresh = here  # stopped earlier than before
                payload["rows"] = [row for row in payload["rows"] if row not in here] + fresh
                with writing(path, "output_dir", "Make room on its disk: what was measured before is kept there."):
                    write_evaluations(path, payload)
                    (folder / "variance.md").write_text(document(payload), encoding="utf-8")
                if stop.asked:
                    raise KeyboardInterrupt
    with printing():
        Console().print(rich_table(payload))
        Console().print(f"Measured: {path}", soft_wrap=True, highlight=False)
    return payload


def _measured(laboratory: Laboratory, names: list[str], stop: StopRequest) -> list[dict]:
    """The rows of one length and number of candidates; of the draws so far if it was stopped."""
    settings = laboratory.config.variance
    title = f"{laboratory.length} tokens, {laboratory.top_k} candidates"
    with counting(f"{title}: draws", settings.warmup_draws + settings.draws) as tick:
        found = laboratory.measure(names, lambda: stop.asked, tick)
    reference = None
    if _judges(laboratory) and not stop.asked:
        with counting(f"{title}: reference", laboratory.reference_draws) as tick:
            reference = laboratory.reference(lambda: stop.asked, tick)
        found[Estimator("reference")] = reference
    branches: dict[Estimator, Branches] = {}
    if _takes_steps(laboratory, names) and not stop.asked:
        with counting(f"{title}: prefixes", laboratory.prefixes) as tick:
            branches = laboratory.steps(lambda: stop.asked, tick)
    rows = (_row(laboratory, key, draws, reference, branches.get(key)) for key, draws in found.items())
    return [row for row in rows if row is not None]


def _fewest(rows: list[dict]) -> int:
    """Draws of the row that has the fewest."""
    return min((row["draws"] for row in rows), default=0)


def _judges(laboratory: Laboratory) -> bool:
    """Whether there is to be a reference."""
    return laboratory.length <= JUDGED_LENGTH and laboratory.config.variance.reference_responses > 0


def _takes_steps(laboratory: Laboratory, names: Sequence[str]) -> bool:
    """Whether steps are measured: not of a reward with functions, whose scores make responses of a prefix depend on
    each other."""
    reward = laboratory.reward
    functions = isinstance(reward, WeightedReward) and bool(reward.functions)
    return "grade-ste" in names and laboratory.prefixes > 0 and not functions


def _complete(laboratory: Laboratory, names: Sequence[str], rows: list[dict]) -> bool:
    """Whether these rows have all the draws and prefixes they should."""
    draws = {row["method"]: row["draws"] for row in rows}
    reference = draws.pop("reference", 0)
    return (
        bool(draws)
        and set(draws.values()) == {laboratory.config.variance.draws}
        and (reference == laboratory.reference_draws or not _judges(laboratory))
        and (max(row.get("prefixes", 0) for row in rows) == laboratory.prefixes or not _takes_steps(laboratory, names))
    )


def _row(
    laboratory: Laboratory, key: Estimator, draws: Draws, reference: Draws | None, branches: Branches | None
) -> dict | None:
    """None of too few draws to say anything."""
    spread = draws.spread()
    if spread is None:
        return None
    row = {
        **key._asdict(),
        "length": laboratory.length,
        "top_k": laboratory.top_k,
        **asdict(spread),
        "relative_variance": spread.relative_variance,
        "snr_per_second": spread.snr_per_second,
        "relative_variance_interval": spread.relative_variance_interval,
    }
    if branches is not None:
        row |= {"prefixes": branches.taken, **steps(branches.means(), spread.seconds_per_sample)}
    if key.method == "reference":
        error = norm_error(draws.means())
        known = f"is known to ±{error:.0%}" if math.isfinite(error) else "may be 0"
        return {**row, "verdict": f"the reference; its norm {known}"}
    if reference is None or reference.taken < reference.count:
        return {**row, "verdict": "not judged"}
    same_scale = not _rescales(method_named(laboratory.config.method, key.method))
    return {**row, **asdict(agreement(draws.means(), reference.means(), same_scale=same_scale))}


def _rescales(method: MethodConfig) -> bool:
    """Whether its gradient has a length of its own, by normalised advantages or, in GRPO's token form, others."""
    if method.name == "grpo":
        return method.grpo.advantage_scale == "std" or method.grpo.level == "token"
    return method.name == "ppo"


def _relevant(config: Config) -> Config:
    """The config without what its measurements do not depend on."""
    method = replace(config.method, path_scale=1.0)  # as all is measured
    return replace(
        config, output_dir="", name="", method=method, compare=CompareConfig(), evaluation=EvaluationConfig()
    )


def _kept(path: Path, identity: dict) -> dict:
    """The payload so far, if it was measured with the same settings and weights, or a new one.

    Raises:
        GradeError: the file holds other measurements, or is damaged.
    """
    if not path.is_file():
        return {**identity, "rows": []}
    kept = read_json(path, "Delete it, or measure under another --name.", *identity, shape=VARIANCE)
    if {name: kept[name] for name in identity} != identity:
        raise GradeError(
            f"{path} holds measurements of other settings, another checkpoint or another machine. Delete it, or "
            "measure under another --name."
        )
    return kept
