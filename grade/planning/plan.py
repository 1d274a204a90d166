"""A plan of a run: seconds and memory of its phases, and what to change."""

from __future__ import annotations

from dataclasses import dataclass, replace

from grade.planning.memory import (
    Memory,
    fewest_shards,
    fits,
    largest_micro_batch,
    largest_rollout,
    memory_of,
    recomputes,
    room,
)
from grade.planning.phases import engine_rollout, phases_of, rollout
from grade.planning.run import Run
from grade.planning.seconds import INTERCONNECT, LAUNCHING, MEMORY, Time, time_of, time_of_part
from grade.planning.work import Work

_MOST_OF_CHUNKS = 2**33
"""Bytes of the head's chunks, beyond which none is suggested."""
_LEAST_SAVED = 0.01
"""Of a step's seconds, under which compiling layers is not suggested."""


@dataclass(frozen=True)
class PlannedPhase:
    """A phase of a step: its work on one device, and how long it takes."""

    name: str
    work: Work
    time: Time


@dataclass(frozen=True)
class WayToSample:
    """A way to sample the responses of a step, with what binds it."""

    name: str
    time: Time


@dataclass(frozen=True)
class Plan:
    """What `plan` found.

    Attributes:
        run: with recomputation as it was decided.
        phases: in the order of a step.
        ways: to sample.
        micro_batches: most responses that may pass together, by whether activations are recomputed; None: not one.
        rollout_batch: most that may be sampled together.
        shards: devices that must hold the base between them.
        suggestions: sentences.
    """

    run: Run
    phases: list[PlannedPhase]
    memory: Memory
    ways: list[WayToSample]
    micro_batches: dict[bool, int | None]
    rollout_batch: int | None
    shards: int | None
    suggestions: list[str]

    @property
    def seconds(self) -> float:
        """Of a step, without a rollout that another engine makes."""
        return sum(phase.time.seconds for phase in self.phases)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of responses, on all devices."""
        return self.run.devices * self.run.responses * self.run.response / self.seconds

    @property
    def fits(self) -> bool:
        return fits(self.run)


def plan(run: Run) -> Plan:
    """Seconds, memory and suggestions; recomputation is what method.activation_checkpointing comes to."""
    run = replace(run, recompute=recomputes(run))
    micro_batches = {recompute: largest_micro_batch(replace(run, recompute=recompute)) for recompute in (False, True)}
    found = Plan(
        run,
        _timed(run),
        memory_of(run),
        ways_to_sample(run),
        micro_batches,
        largest_rollout(run) if run.samples_here else None,
        fewest_shards(run),
        [],
    )
    return replace(found, suggestions=suggestions(found))


def _timed(run: Run) -> list[PlannedPhase]:
    groups = {"update": run.devices}
    return [
        PlannedPhase(phase.name, phase.work, time_of(phase.parts, run, groups.get(phase.name, run.shards)))
        for phase in phases_of(run)
    ]


def ways_to_sample(run: Run) -> list[WayToSample]:
    """Seconds for the responses of a step by the ways there are: each device with a whole base, each with a sharded
    one, and an engine that splits products over the devices of a group. A way that does not fit, or that the method
    cannot take, is left out."""
    ways = []
    for shards in dict.fromkeys((1, run.shards)):
        here = replace(run, shards=shards)
        if run.devices % shards or (memory_of(here).total("rollout") > (room(run) or float("inf"))):
            continue
        name = "here, whole base" if shards == 1 else f"here, sharded base (of {shards})"
        ways.append(WayToSample(name, time_of(rollout(here), here, shards)))
    group = run.shards if run.shards > 1 else min(run.devices, run.device.per_node)
    if group > 1 and engine_settings(run) is not None:
        responses = group * run.responses
        engine = engine_rollout(run, group, responses)
        ways.append(WayToSample(f"an engine, tensor parallel (of {group})", time_of(engine, run, group)))
    return ways


def engine_settings(run: Run) -> str | None:
    """The options by which an engine samples a step's responses; None where the run needs more of the draw than its
    tokens, or has no adapter to send."""
    method = run.config.method
    if method.name == "grade" or run.trained.everything:
        return None
    rule = " --method.estimator rao" if run.differentiates and method.estimator == "gumbel" else ""
    return f"--rollout.engine vllm{rule}"


def suggestions(found: Plan) -> list[str]:
    """What to change, the most important first."""
    run = found.run
    return [*_to_fit(found), *_micro_batch(found), *_sampling(found), *_passes(found), *_head(run), *_step(run)]


def _to_fit(found: Plan) -> list[str]:
    run, needed = found.run, found.shards
    if room(run) is None:
        return []
    sharded = run.config.model.finetuning != "full" and run.config.model.quantization is None
    if needed is None:
        fix = "Name another device, a smaller model or shorter responses" + (
            "." if sharded else ", or train an adapter on a base in model.dtype, which can be sharded."
        )
        return [f"Does not fit, however it is shared. {fix}"]
    if needed > run.shards:
        where = "" if needed <= run.device.per_node else f", {-(-needed // run.device.per_node)} nodes"
        return [
            f"Does not fit with {'a whole base on each device' if run.shards == 1 else f'{run.shards} shards'}: a "
            f"sharded base over {needed} devices{where} would (--gpus {needed} --model.fsdp true; --shards {needed} "
            "with a multiple of them plans groups)."
        ]
    if run.shards > 1 and needed == 1:
        return ["The base fits whole on each device: without shards (--shards 1) nothing is gathered."]
    if 1 < needed < run.shards:
        return [f"A sharded base over {needed} devices is enough (--shards {needed})."]
    return []


def _micro_batch(found: Plan) -> list[str]:
    """The largest part of a step that fits, with activations kept or recomputed, whichever is quicker."""
    run = found.run
    if room(run) is None or (found.shards or 0) > run.shards or found.shards is None:
        return []
    of_update = run.responses // run.config.method.minibatches
    divisors = [size for size in range(1, of_update + 1) if of_update % size == 0]
    setting = run.config.method.activation_checkpointing
    candidates = []
    for recompute in (False, True) if setting == "auto" else (setting,):
        limit = found.micro_batches[recompute]
        if limit is not None:
            size = max(size for size in divisors if size <= limit)
            candidates.append(replace(run, passed=size, recompute=recompute))
    quickest = min(candidates, key=_seconds, default=run)
    size = quickest.micro_batch
    if size == run.micro_batch:
        return []
    how = "recomputed" if quickest.recompute else "kept"
    return [
        f"Quickest by micro-batches of {size} of a device's {run.responses} responses, with activations {how}: "
        f"--train.batch_size {size} --train.accumulation_steps {run.responses // size}."
    ]


def _seconds(run: Run) -> float:
    return sum(phase.time.seconds for phase in _timed(run))


def _sampling(found: Plan) -> list[str]:
    run = found.run
    if not run.samples_here:
        return []
    lines = []
    if room(run) is not None and found.rollout_batch is not None and found.rollout_batch < run.together:
        lines.append(
            f"At most {found.rollout_batch} responses can be sampled together: --generation.batch_size "
            f"{found.rollout_batch}."
        )
    bound, here = found.phases[0].time.bound, found.phases[0].time.seconds
    quicker = min(found.ways, key=lambda way: way.time.seconds, default=None)
    if bound == INTERCONNECT:
        engine = engine_settings(run)
        fix = "Hold the base whole" if engine is None else f"Let an engine sample ({engine}), or hold the base whole"
        lines.append(f"Sampling is bound by the interconnect: every token gathers the sharded layers anew. {fix}.")
    elif bound == LAUNCHING:
        record = "" if run.records or run.shards > 1 else " --rollout.compile true records the launches;"
        lines.append(
            f"Sampling is bound by launching a layer at a time, not by the device:{record} more responses sampled "
            "together cost the same time."
        )
    elif bound == MEMORY and run.together < run.responses:
        lines.append("Sampling is bound by reading weights: more responses together (--generation.batch_size).")
    if quicker is not None and quicker.name.startswith("an engine") and quicker.time.seconds < here:
        times = here / quicker.time.seconds
        lines.append(f"{quicker.name[0].upper()}{quicker.name[1:]} would sample {times:.1f} times as fast.")
    return lines


def _passes(found: Plan) -> list[str]:
    """Compiled layers, where training's passes are bound by launching."""
    run = found.run
    bound = [p.name for p in found.phases if p.time.bound == LAUNCHING and p.name not in ("rollout", "update")]
    compiled = replace(run, config=replace(run.config, train=replace(run.config.train, compile="auto")))
    saved = 1 - _seconds(compiled) / found.seconds
    if not bound or run.compiles_layers or not compiled.compiles_layers or saved < _LEAST_SAVED:
        return []
    return [
        f"Passes are bound by launching a layer at a time ({', '.join(bound)}): --train.compile true would take "
        f"{saved:.0%} off a step."
    ]


def _head(run: Run) -> list[str]:
    """Chunks of so few rows that the head's weight is read too often."""
    rows = run.micro_batch * run.response

    def took(chunk: int | None) -> float:
        return time_of_part(run.passes.head(rows, 2, 2, chunk), run, 1).seconds

    best, more = took(None), run.chunk_bytes
    if took(run.chunk_rows) < 1.2 * best:
        return []
    while more < _MOST_OF_CHUNKS and took(run.rows_of_chunk(more)) > 1.1 * best:
        more *= 2
    return [
        f"Chunks of {run.chunk_rows} rows read the head's weight often: --method.head_chunk_mib {more // 2**20} takes "
        f"less time, and {more // 2**20} MiB for the chunks."
    ]


def _step(run: Run) -> list[str]:
    """A step grows with the number of devices."""
    if run.devices == 1:
        return []
    accumulation, total = run.config.train.accumulation_steps, run.devices * run.responses
    line = f"{run.devices} devices take {total} responses a step, {run.devices} times as many as one."
    if accumulation % run.devices == 0:
        line += f" For as many as one takes: --train.accumulation_steps {accumulation // run.devices}."
    elif run.responses > 1:
        line += " Lower train.batch_size or train.accumulation_steps for fewer."
    return [line]
