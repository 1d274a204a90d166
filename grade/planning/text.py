"""A plan as tables, and as JSON has it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from grade.planning.memory import SHARE, room
from grade.planning.plan import Plan
from grade.planning.recording import against_layers, passed_and_least
from grade.planning.run import Run
from grade.planning.seconds import link_rate
from grade.tables import Column, Table, numbers

_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def quantity(value: float, unit: str) -> str:
    """With three figures that count and a prefix, such as `1.23 TB`; – for nothing."""
    if not value:
        return "–"
    for size, prefix in _PREFIXES:
        if value >= 0.9995 * size:
            return f"{_figures(value / size)} {prefix}{unit}"
    return f"{_figures(value)} {unit}"


def _figures(value: float) -> str:
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f}"


def count(value: float) -> str:
    """A large number in words, such as `4.02 billion`."""
    return f"{_figures(value / 1e9)} billion" if value >= 0.9995e9 else f"{_figures(value / 1e6)} million"


def seconds(value: float) -> str:
    """Seconds or milliseconds."""
    return f"{_figures(value)} s" if value >= 0.9995 else f"{_figures(1000 * value)} ms"


def model_line(run: Run) -> str:
    """The policy, what is trained of it, and the responses."""
    shape, config = run.shape, run.config
    if run.trained.everything:
        trained = f"{count(run.trained.parameters)} of them trained"
    else:
        trained = f"{count(run.trained.parameters)} more in an adapter of rank {run.trained.rank}"
    dtype = config.model.quantization or run.dtype
    micro = f"{run.responses} in micro-batches of {run.micro_batch}"
    method = f"{config.method.name}, {run.hops:g} hops" if run.differentiates else config.method.name
    return (
        f"{shape.name}: {count(shape.parameters)} parameters in {dtype}, {trained}. {method}. P = "
        f"{run.prompt:,}, S = {run.response:,}, k = {config.generation.top_k:,}; responses on a device: {micro}, "
        f"{run.together} sampled together."
    )


def device_line(run: Run) -> str:
    """The devices and what of their numbers is taken to be reached."""
    device, efficiency = run.device, run.efficiency
    parts = [
        f"{quantity(device.rate(run.dtype), 'FLOP/s')} in {run.dtype}, {efficiency.flops:.0%} reached",
        f"memory {quantity(device.bandwidth, 'B/s')}, {efficiency.bandwidth:.0%}",
    ]
    if run.devices > 1:
        rate = link_rate(run, run.devices)
        where = "within a node" if run.nodes == 1 else "between nodes"
        parts.append(f"interconnect {quantity(rate, 'B/s')} {where}, {efficiency.link:.0%}")
        if 1 < run.shards <= device.per_node < run.devices:
            parts.append(f"{quantity(device.link, 'B/s')} among shards")
    nodes = f" on {run.nodes} nodes" if run.nodes > 1 else ""
    layer = f"a layer takes {efficiency.layer_seconds * 1e6:g} µs to launch"
    others = [f"{efficiency.compiled_seconds * 1e6:g} µs in a recorded rollout"] if run.records else []
    if run.compiles_layers and device.is_beside_host:
        others.append(f"{efficiency.fused:.0%} of it as a compiled layer")
    if others:
        layer += f" ({', '.join(others)})"
    shared = "whole base on each" if run.shards == 1 else f"sharded base, {run.shards} devices hold it between them"
    exchange = f"; an exchange {efficiency.exchange_seconds * 1e6:g} µs" if run.devices > 1 else ""
    return (
        f"{run.devices} × {device.title}{nodes}, {shared}. Taken to hold: {'; '.join(parts)}; {layer}{exchange}; "
        f"attention computes {efficiency.attention_square:.0%} of the square of positions. Numbers: {device.source}."
    )


def phase_table(plan: Plan) -> Table:
    """Work and seconds of each phase, on one device."""
    rows = [
        [
            phase.name,
            quantity(phase.work.flops, "FLOP"),
            quantity(phase.work.moved, "B"),
            quantity(phase.work.received, "B"),
            phase.time.bound,
            seconds(phase.time.seconds),
            f"{phase.time.seconds / plan.seconds:.0%}",
        ]
        for phase in plan.phases
    ]
    total = [
        quantity(sum(getattr(p.work, name) for p in plan.phases), unit)
        for name, unit in (("flops", "FLOP"), ("moved", "B"), ("received", "B"))
    ]
    rows.append(["step", *total, "", seconds(plan.seconds), "100%"])
    columns = [
        Column("phase"),
        *numbers(["products", "memory moved", "received"]),
        Column("bound by"),
        *numbers(["time", "share"]),
    ]
    return Table("a step, on one device", columns, rows)


def memory_table(plan: Plan) -> Table:
    """What a device holds while it samples and while it differentiates."""
    parts = plan.memory.parts
    rows = [[name, quantity(size, "B"), quantity(size, "B")] for name, size in parts["always"].items()]
    for name in dict.fromkeys((*parts["rollout"], *parts["passes"])):
        rows.append([name, *(quantity(parts[time].get(name, 0.0), "B") for time in ("rollout", "passes"))])
    rows.append(["together", *(quantity(plan.memory.total(time), "B") for time in ("rollout", "passes"))])
    limit = room(plan.run)
    if limit is not None and plan.run.device.memory is not None:
        rows.append([f"{SHARE:.0%} of {quantity(plan.run.device.memory, 'B')}", *[quantity(limit, "B")] * 2])
    return Table("memory of one device", [Column("what"), *numbers(["in sampling", "in the passes"])], rows)


def sampling_table(plan: Plan) -> Table:
    """The ways to sample a step's responses."""
    rows = [[way.name, way.time.bound, seconds(way.time.seconds)] for way in plan.ways]
    return Table("ways to sample", [Column("way"), Column("bound by"), *numbers(["time"])], rows)


def sentences(plan: Plan) -> list[str]:
    """Throughput, what fits, and what to change."""
    run = plan.run
    lines = [
        f"{seconds(plan.seconds)} a step, {quantity(plan.tokens_per_second, 'tokens/s')} on all devices; activations "
        f"{'recomputed' if run.recompute else 'kept'}."
    ]
    if room(run) is None:
        lines.append("The device has no memory of its own, so nothing is said of what fits.")
    else:
        kept, again = (str(plan.micro_batches[recompute] or "none") for recompute in (False, True))
        lines.append(
            f"{'Fits' if plan.fits else 'Does not fit'}. Largest micro-batch: {kept} with activations kept, {again} "
            "recomputed."
        )
    return [*lines, *compiled_layers(run), *plan.suggestions]


def compiled_layers(run: Run) -> list[str]:
    """Whether train.compile compiles layers, why, and what of it is in the plan's numbers; nothing where it is off."""
    wanted, on_gpu = run.config.train.compile, run.device.is_beside_host
    if not wanted:
        return []
    line = f"train.compile={'auto' if wanted == 'auto' else 'true'}: layers are"
    if run.shards > 1:
        return [f"{line} not compiled, since compiled layers hold their weights, and the base is sharded."]
    if not run.compiles_layers:
        return [f"{line} not compiled, since {against_layers(run.config, on_gpu=on_gpu)}."]
    line += " compiled"
    if wanted == "auto":
        line += f", since {passed_and_least(run.config)}"
    if not on_gpu:
        return [f"{line}. What they save on a CPU is not in these numbers."]
    return [
        f"{line}. {run.efficiency.fused:.0%} of a layer's launches are left (counted, not measured). Not in these "
        "numbers: what calling compiled code takes, what fused kernels need neither move nor hold, and compiling, a "
        "minute or so before the first step."
    ]


def as_json(plan: Plan) -> dict[str, Any]:
    """The numbers in types that JSON has; bytes, seconds, operations."""
    run = plan.run
    return {
        "model": {
            "name": run.shape.name,
            "parameters": run.shape.parameters,
            "trained": run.trained.parameters,
            "dtype": run.dtype,
        },
        "method": run.config.method.name,
        "sizes": {
            "prompt": run.prompt,
            "response": run.response,
            "responses": run.responses,
            "micro_batch": run.micro_batch,
            "sampled_together": run.together,
            "hops": run.hops if run.differentiates else None,
        },
        "device": {"name": run.device.name, "number": run.devices, "shards": run.shards, "source": run.device.source},
        "assumptions": asdict(run.efficiency),
        "recompute": run.recompute,
        "compiles_layers": run.compiles_layers,
        "phases": [
            {"name": p.name, **asdict(p.work), "bound": p.time.bound, "seconds": p.time.seconds} for p in plan.phases
        ],
        "sampling": [{"way": w.name, "bound": w.time.bound, "seconds": w.time.seconds} for w in plan.ways],
        "seconds": plan.seconds,
        "tokens_per_second": plan.tokens_per_second,
        "memory": {**plan.memory.parts, "peak": plan.memory.peak, "room": room(run)},
        "fits": None if room(run) is None else plan.fits,
        "largest_micro_batch": {"kept": plan.micro_batches[False], "recomputed": plan.micro_batches[True]},
        "suggestions": plan.suggestions,
    }
