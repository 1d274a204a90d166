"""`grade plan`: time and memory of a step on devices that need not be here, from the model's config.json alone."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from grade.built_in import countdown_model, demo_model
from grade.config import Config
from grade.errors import GradeError, read_json
from grade.hub_names import GIVEN, looks_local
from grade.planning.memory import fewest_shards
from grade.planning.plan import Plan, plan
from grade.planning.public_shapes import PUBLIC
from grade.planning.run import USUAL_HOPS, Run, device_named
from grade.planning.shape import ModelShape, shape_of
from grade.planning.text import as_json, device_line, memory_table, model_line, phase_table, sampling_table, sentences

_SHARES = ("flops", "bandwidth", "link")
_LEAST_SHARE = 1e-6
"""A step that reaches less of a device takes years, and no table has room for them."""


def run_plan(config: Config, as_text: bool = True, **options: Any) -> None:
    """Print tables, or with `as_text=False` JSON; `options` as `planned` takes them."""
    found = planned(config, **options)
    if as_text:
        show(found)
    else:
        sys.stdout.write(json.dumps(as_json(found), indent=2) + "\n")


def planned(
    config: Config,
    *,
    gpu: str | None = None,
    gpus: int = 1,
    shards: int | None = None,
    hops: float | None = None,
    **assumptions: float | None,
) -> Plan:
    """The plan of a config.

    Args:
        gpu, gpus: device and number; None: the measured CPU for device=cpu, an H100 for others.
        shards: devices that hold the base between them; None: all with model.fsdp, else the fewest that it needs.
        hops: of a step; None: as trained models need, or method.max_hops if that is less.
        assumptions: fields of `Efficiency` instead of the device's usual ones.

    Raises:
        GradeError: something is not known, with the setting or option that names it.
    """
    device = device_named(("cpu" if config.device == "cpu" else "h100") if gpu is None else gpu)
    given = {name: value for name, value in assumptions.items() if value is not None}
    for name, value in given.items():
        least = _LEAST_SHARE if name in _SHARES else 0.0
        if not least <= value <= 1.0:
            span = f"at least {least:g} and at most 1" if name in _SHARES else "0 or more and at most 1 s"
            raise GradeError(f"--{name}{'' if name in _SHARES else ', in seconds,'} is {value:g}: it must be {span}.")
    if shards is not None and shards < 1:
        raise GradeError(f"--shards is {shards}: it must be at least 1.")
    if config.model.fsdp:
        if shards not in (None, gpus):
            raise GradeError(
                f"--shards is {shards}, but model.fsdp shards the base over all {gpus} devices. Leave one of them out."
            )
        shards = gpus
    classifier = None
    if config.reward.model is not None and config.reward.bridge is None:
        classifier = shape_named("reward.model", config.reward.model, None)
    run = Run(
        config,
        shape_named("model.name", config.model.name, config.model.revision),
        device,
        devices=gpus,
        shards=shards or 1,
        hops=min(USUAL_HOPS, config.method.max_hops) if hops is None else hops,
        classifier=classifier,
        efficiency=replace(device.reached, **given),
    )
    if shards is None:
        needed = fewest_shards(run) or 1
        if needed <= gpus and gpus % needed == 0:
            run = replace(run, shards=needed)
    return plan(run)


def shape_named(setting: str, name: str, revision: str | None) -> ModelShape:
    """The sizes of a model: of a built-in one, of a folder's config.json, of the hub's cache on this machine, or of the
    table of public models.

    Args:
        setting: that names it, for messages.

    Raises:
        GradeError: its config.json is nowhere here, or says nothing that is known.
    """
    fix = f"Give --{setting} FOLDER with its config.json; weights are not needed."
    if name.startswith(GIVEN):
        raise GradeError(f"{setting} is {name}: that was given as an object in Python. {fix}")
    kind, _, built_in = name.partition(":")
    if kind == "built-in":
        settings = {"countdown": countdown_model.SETTINGS, "demo": demo_model.SETTINGS}
        if built_in not in settings:
            raise GradeError(f"{setting}={name}: the built-in models are {', '.join(sorted(settings))}.")
        return shape_of(_built_in_config(settings[built_in]), name)
    if looks_local(name):
        path = Path(name).expanduser() / "config.json"
        if not path.is_file():
            raise GradeError(f"{setting}={name}: there is no {path}. {fix}")
        return shape_of(read_json(path, fix), name)
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # no name that a repository can have
        cached = None
    if isinstance(cached, str):
        return shape_of(read_json(Path(cached), fix), name)
    if name not in PUBLIC:
        raise GradeError(
            f"{setting}={name}: its config.json is neither in the hub's cache on this machine nor are its sizes in the "
            f"table of public models ({', '.join(PUBLIC)}). {fix}"
        )
    return shape_of(PUBLIC[name], name)


def _built_in_config(settings: dict) -> dict:
    """The config.json that training a built-in model would write; its vocabulary may come out smaller."""
    return {
        "model_type": "llama",
        "vocab_size": settings["vocabulary"],
        "hidden_size": settings["hidden_size"],
        "intermediate_size": settings["intermediate_size"],
        "num_hidden_layers": settings["layers"],
        "num_attention_heads": settings["heads"],
        "tie_word_embeddings": True,
    }


def show(found: Plan) -> None:
    """Print the plan as tables."""
    from rich.console import Console

    console = Console()
    console.print(model_line(found.run), highlight=False, markup=False)
    console.print(device_line(found.run), highlight=False, markup=False)
    for table in (phase_table(found), memory_table(found), sampling_table(found)):
        if table.rows:
            console.print(table.rich(title_justify="left"))
    for line in sentences(found):
        console.print(line, highlight=False, markup=False)
