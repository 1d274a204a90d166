"""Kernel launches, waits and bytes of a training step on a GPU, counted without one.

    python -m benchmarks.launches --save benchmarks/results/launches.json        # two minutes, no weights
    python -m benchmarks.launches --table benchmarks/results/launches.json

A step of GRADE-STE with 16 responses of 64 tokens behind prompts of 32, in 16-bit weights of public shapes, with a LoRA
adapter on the projections of attention and 6 hops. Every operator that computes counts as a launch, whatever a library
makes of it (`benchmarks/launch_counter.py`). Kernels of what is compiled are those that Inductor schedules for an H200:
of a compiled step (`benchmarks/launch_graphs.py`) the host launches them as one recorded graph, of compiled layers
(`benchmarks/launch_layers.py`) one by one.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from unittest import mock

import torch
import transformers

from benchmarks.launch_counter import META, Counting, Work, counting
from benchmarks.launch_graphs import compiled_by
from benchmarks.launch_layers import Halves, compiling_layers
from benchmarks.saved import command, new_parser
from benchmarks.training_setup import SHAPES as TRAINED
from benchmarks.training_setup import Bench, Setting
from grade.errors import present
from grade.methods import make_method
from grade.methods.base import Method
from grade.methods.services import Services
from grade.planning.devices import DEVICES
from grade.rollout import Rollout
from grade.sampling.compiled import CompiledDecoding
from grade.sampling.decode import Decoding
from grade.sampling.draw import Sampling, sampling_of
from grade.sampling.sample import sample
from grade.tables import Column, Table

HOPS = 6
SHAPES = {"qwen3-4b": "Qwen3-4B", "qwen3-0.6b": "Qwen3-0.6B"}
FORWARD = ("policy_forward", "base_forward", "head", "base_backward")
PARTS = {
    "beside": "a token, each adapter beside its weight",
    "token": "a token",
    "beside_compiled": "a token, compiled, each adapter beside its weight",
    "token_compiled": "a token, compiled",
    "forward": "a replay: passes, head and the base's backward pass",
    "hop": "a hop",
    "backward": "a replay: backward pass into the adapter",
    "forward_compiled": "a replay: passes, head and the base's backward pass, compiled layers",
    "hop_compiled": "a hop, compiled layers",
    "backward_compiled": "a replay: backward pass into the adapter, compiled layers",
    "update": "clipping and AdamW",
    "step": f"a step of {HOPS} hops",
    "step_compiled": f"a step of {HOPS} hops, decoding compiled",
    "step_layers": f"a step of {HOPS} hops, decoding and layers compiled",
}
LAYERS = ("forward", "hop", "backward")
"""Parts that go through the layers, and by compiled ones too."""
COMPILED_LAYERS = tuple(f"{name}_compiled" for name in LAYERS)
AFFINE = ("beside", "token", "beside_compiled", "token_compiled", *LAYERS, *COMPILED_LAYERS)
"""Parts that take the same for every layer, beside what they take for none."""
_GPU = DEVICES["h200"]


@dataclass
class Part:
    """Of a step.

    Attributes:
        kernels: that the device runs, and copies.
        host: launches by the host; a recorded graph is one.
        waits: of the host for the device.
        moved: bytes that the kernels read and write, each by itself; None: not known of fused ones.
        least: bytes of weights, and of keys and values or of what a pass is given, each read once.
        graph: kernels of a compiled step; no sum of parts has them.
    """

    kernels: int
    host: int
    waits: int
    moved: int | None
    least: int
    graph: int | None = None

    def __add__(self, other: Part) -> Part:
        moved = None if self.moved is None or other.moved is None else self.moved + other.moved
        kernels, host, waits = self.kernels + other.kernels, self.host + other.host, self.waits + other.waits
        return Part(kernels, host, waits, moved, self.least + other.least)

    def __mul__(self, times: int) -> Part:
        moved = None if self.moved is None else self.moved * times
        return Part(self.kernels * times, self.host * times, self.waits * times, moved, self.least * times)


def counted(
    shape: str,
    layers: int | None = None,
    *,
    beside: bool = True,
    whole: bool = True,
    compiling: bool = True,
    compiled_layers: bool = True,
) -> dict[str, Part]:
    """The parts of a step of a model of this shape, by their names in PARTS.

    Args:
        layers: of the model; None: all.
        beside: with the tokens whose layers are not joined.
        whole: with the whole steps.
        compiling: with what compiled decoding takes.
        compiled_layers: with what compiled layers take.
    """
    setting = Setting(shape, 16, 32, 64, dtype="bfloat16", device="meta", hop_tol=0.0, layers=layers)
    bench = Bench(setting, "replay")
    passes = _replay(bench)
    parts = {name: part for name, part in passes.items() if name != "rest"}
    for suffix, compiled in (("", False), ("_compiled", True))[: 1 + compiling]:
        parts["token" + suffix] = token = _token(bench, compiled)
        if whole:
            rollout = _rollout(bench, compiled, setting.prompt, setting.length, token.graph)
            tokens = replace(rollout, least=token.least * setting.length)
            parts["step" + suffix] = _step(tokens, passes)
        if beside:
            present(bench.policy.joined).give_up()
            parts["beside" + suffix] = _token(bench, compiled)
            bench.policy.joined = None
    if compiled_layers:
        passes = _replay(bench, compiled=True)
        parts |= {f"{name}_compiled": passes[name] for name in LAYERS}
        if whole and compiling:
            parts["step_layers"] = _step(tokens, passes)
    return {name: parts[name] for name in PARTS if name in parts}


def _step(tokens: Part, passes: dict[str, Part]) -> Part:
    """A whole step, of what samples its tokens and of `_replay`."""
    least = sum(passes[name].least for name in (*LAYERS, "update"))
    once = tokens + replace(passes["rest"], least=least)
    return once + passes["hop"] * (HOPS - 1)


def _token(bench: Bench, compiled: bool) -> Part:
    """One in the middle of a response: what a rollout of three tokens takes more than one of two."""
    setting, config = bench.setting, bench.policy.config
    prompt = setting.prompt + setting.length // 2
    two = _rollout(bench, compiled, prompt, 2)
    three = _rollout(bench, compiled, prompt, 3, two.graph)
    table = bench.policy.head.weight
    weights = {
        id(p): p.numel() * p.dtype.itemsize for p in bench.policy.backbone.parameters() if p.shape != table.shape
    }
    keys = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    least = sum(weights.values()) + (table.numel() + setting.batch * prompt * keys) * table.dtype.itemsize
    return replace(three + two * -1, least=least, graph=two.graph)


def _rollout(bench: Bench, compiled: bool, prompt: int, length: int, graph: int | None = None) -> Part:
    """A rollout; `graph` are the kernels of its compiled step, if they are known."""
    sampling = replace(sampling_of(bench.config.generation), ignore_eos=False, max_new_tokens=length)
    with counting() as counts, compiled_by(counts, trace=graph is None) as graphs:
        with mock.patch("grade.sampling.compiled.decoding_error", return_value=0.0):  # it compares values
            way = CompiledDecoding(bench.policy) if compiled else Decoding(bench.policy)
        with counts.uncounted(), way.state(True):
            pass  # joins layers where none are yet
        with counts.phase("all"):
            _sampled(bench, prompt, sampling, way)
    everything, inside = counts.phases["all"], counts.phases.get("graph", Work())
    if not compiled:
        return _part(everything)
    graph = graphs.kernels() if graph is None else graph
    host = everything.launches - inside.launches
    return Part(host + graph * graphs.calls, host + graphs.calls, everything.waits, None, everything.least, graph)


def _sampled(bench: Bench, prompt: int, sampling: Sampling, way: Decoding) -> Rollout:
    prompts = torch.zeros(bench.setting.batch, prompt, dtype=torch.int64, device=META)
    rows = torch.arange(bench.setting.batch, device=META) * sampling.max_new_tokens
    return sample(bench.policy, prompts, prompts == 0, sampling, seed=0, first_rows=rows, decoding=way)


def _part(work: Work, halves: Halves | None = None) -> Part:
    """Of work, in which halves of compiled layers may have been called."""
    launches = work.launches if halves is None else halves.launches(work)
    return Part(launches, launches, work.waits, work.moved if halves is None else None, work.least)


def _replay(bench: Bench, compiled: bool = False) -> dict[str, Part]:
    """What follows the rollout of a step: its parts, a hop, and "rest", all of it with one hop.

    Args:
        compiled: with compiled layers.
    """
    policy, setting = bench.policy, bench.setting
    found = []
    with counting() as counts, compiling_layers(policy, counts) if compiled else nullcontext() as halves:
        sampling = replace(sampling_of(bench.config.generation), ignore_eos=False)
        counts.answers[3] = [setting.prompt, setting.prompt, setting.length]  # `Rollout.cut` asks for the real tokens
        rollout = _sampled(bench, setting.prompt, sampling, Decoding(policy))
        update = _updating(bench, counts)
        for hops in (1, 2):
            counts.phases.clear()
            before = counts.work()
            _method(bench, hops, counts).step([rollout], 0, update)
            found.append(counts.phases | {"rest": counts.work() - before})
    one, two = found
    parts = {"forward": sum((one[name] for name in FORWARD), Work()), "backward": one["policy_backward"]}
    parts |= {"update": one["update"], "rest": one["rest"]}
    hop = replace(_part(two["hops"] - one["hops"], halves), least=one["hops"].least)
    return {name: _part(work, halves) for name, work in parts.items()} | {"hop": hop}


def updated(shape: str) -> Part:
    """The update of all layers' parameters."""
    bench = Bench(Setting(shape, 1, 1, 1, dtype="bfloat16", device="meta"), "replay")
    with counting() as counts:
        update = _updating(bench, counts)
        for parameter in bench.policy.parameters():
            parameter.grad = torch.empty_like(parameter)
        update()
    return _part(counts.phases["update"])


def _updating(bench: Bench, counts: Counting) -> Callable[[], float]:
    """The update of a step, by an optimizer that has made one."""
    parameters = bench.policy.parameters()
    optimizer = torch.optim.AdamW(parameters, foreach=True)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()

    def update() -> float:
        # It asks for the device where tensors say the truth.
        lists = mock.patch("torch.nn.utils.clip_grad._device_has_foreach_support", return_value=True)
        with counts.phase("update"), lists:
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True).item()
            optimizer.step()
        optimizer.zero_grad()
        return norm

    return update


def _method(bench: Bench, hops: int, counts: Counting) -> Method:
    config = bench.config
    return make_method(
        bench.policy,
        bench.reward,
        replace(config.method, max_hops=hops),
        config.generation,
        config.train,
        Services(phase=counts.phase),
        seed=0,
        activation_checkpointing=False,
    )


def measure(options: argparse.Namespace) -> dict:
    """Layers of a model are alike: a whole one takes for each further layer what two take more than one. Only the
    update is counted on all parameters, since its launches take several at a time."""
    rows = []
    for shape in options.shapes:
        layers = TRAINED[shape][1]["num_hidden_layers"]
        one, two = (counted(shape, few) for few in (1, 2))
        whole = {name: part + (two[name] + part * -1) * (layers - 1) for name, part in one.items()}
        update = updated(shape)
        for name in ("step", "step_compiled", "step_layers"):
            whole[name] = whole[name] + update + whole["update"] * -1
        for name, part in (whole | {"update": update}).items():
            of_layer = two[name].kernels - one[name].kernels if name in AFFINE else None
            found = {number: value for number, value in vars(part).items() if number != "graph"}
            rows.append({"shape": shape, "part": name, "layers": layers, **found, "kernels_of_layer": of_layer})
    versions = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__}
    return versions | {"hops": HOPS, "rows": rows}


def document(saved: dict) -> str:
    columns = [
        Column("model"),
        Column("part of a step"),
        Column("kernels"),
        Column("of a layer"),
        Column("launches by the host"),
        Column("waits"),
        Column("GB moved", 2),
        Column("GB at least", 2),
        Column("ms at least", 2),
    ]
    rows = [
        [
            SHAPES[row["shape"]],
            PARTS[row["part"]],
            row["kernels"],
            row["kernels_of_layer"],
            row["host"],
            row["waits"],
            None if row["moved"] is None else row["moved"] / 1e9,
            row["least"] / 1e9,
            1e3 * row["least"] / _GPU.bandwidth,
        ]
        for row in saved["rows"]
    ]
    return Table("launches", columns, rows).markdown() + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="default: all")
    command(parser, arguments, measure, document, "hops", "rows", of_rows=("part", "kernels_of_layer"))


if __name__ == "__main__":
    main()
