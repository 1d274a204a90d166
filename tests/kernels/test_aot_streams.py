"""Which loops `grade_kernels.aot` takes for streams of logits, the ceilings that it finds, and what the compiler makes
of the kernels."""

from __future__ import annotations

import ast
import io
import re
import sys
from pathlib import Path

import pytest
import torch

from grade.planning.devices import DEVICES as PLANNED
from grade_kernels.aot import binary, command, devices, streams, table
from grade_kernels.aot.loops import Access, Counts
from grade_kernels.aot.streams import Found, Stream, Streamed
from grade_kernels.common.environment import check_triton, interpreting

OPS = Path(command.__file__).parents[1] / "triton_ops"


def test_what_is_declared_exists():
    """A renamed function or parameter would no longer be checked."""
    functions, parameters = set(), {}
    for path in OPS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                functions.add(f"{path.stem}.{node.name}")
                parameters[f"{path.stem}.{node.name}"] = {arg.arg for arg in node.args.args}
    assert set(streams.RARE) <= functions
    for kernel, declared in streams.STREAMS.items():
        for stream in declared:
            assert stream.functions <= functions
            assert {*stream.reads, *stream.given, *stream.absent, *stream.words, "WIDTH", "STEPS"} <= parameters[kernel]


def streamed(entries: int = 16, **counts) -> Streamed:
    return Streamed((Found("toy.loop", entries, False, Counts(loads=[Access(4 * entries, ())], **counts)),))


def test_a_ceiling_by_hand():
    """An H200 issues 132 x 128 instructions of a thread a cycle; 32 of them for 4 bytes are 4.18 TB/s of 4.8."""
    assert devices.ceiling(streamed(issue=512), "H200") == pytest.approx(132 * 128 * 1.98e9 / 32 * 4 / 4.8e12)
    # An A100 has half as many float32 units as it issues, every device an eighth as many special-function units.
    bounds = devices.bounds(streamed(issue=512, floats=384, special=32), "A100")
    assert bounds["issue"] / bounds["float"] == pytest.approx(1.5) and bounds["special"] == 2 * bounds["issue"]
    assert devices.ceiling(streamed(issue=512, floats=384, special=32), "A100") == bounds["float"]
    # An MI300X has a scalar unit beside the vector units.
    assert devices.bounds(streamed(issue=512, scalar=16, special=32), "MI300X").keys() == {"issue"}
    assert devices.ceiling(streamed(issue=16, scalar=64), "MI300X") == devices.ceiling(streamed(issue=64), "MI300X")


def test_two_reads_of_a_row_add_up_and_what_few_rows_enter_does_not():
    once = streamed(issue=512).found[0]
    rare = Found("toy.again", 0, True, Counts(issue=999, shuffles=2))
    both = Streamed((once, once, rare))
    assert both.per_entry("issue") == 64 and both.bytes_per_entry == 8
    assert both.exchanges == ["2 shuffles and 0 barriers in a turn of the loop of toy.again"]
    assert not Streamed((rare,)).has_speed


@pytest.mark.parametrize(
    ("target", "registers", "shared", "num_warps", "warps"),
    [
        ("sm_90", 32, 0, 8, 64),
        ("sm_90", 128, 0, 8, 16),
        ("sm_90", 129, 0, 8, 8),  # 136, which leaves 3 warps in each quarter: one block of 8
        ("sm_90", 32, 100 * 1024, 8, 16),
        ("sm_80", 32, 100 * 1024, 8, 8),
        ("sm_80", 16, 0, 1, 32),  # blocks
        ("gfx942", 128, 0, 4, 16),
        ("gfx942", 24, 48 * 1024, 4, 4),
    ],
)
def test_how_many_warps_fit(target, registers, shared, num_warps, warps):
    size = binary.TARGETS[target].warp_size
    assert devices.resident_warps(target, registers, shared, num_warps, size) == warps


@pytest.mark.parametrize(
    ("name", "planned"),
    [("A100", "a100-80"), ("H100", "h100"), ("H200", "h200"), ("B200", "b200"), ("MI300X", "mi300x")],
)
def test_devices_are_those_of_the_planner(name, planned):
    device, other = devices.DEVICES[name], PLANNED[planned]
    processor = devices.PROCESSORS[device.target]
    lanes = processor.float_lanes or 2 * processor.issue_lanes  # AMD's rate is that of packed pairs
    assert device.bandwidth == pytest.approx(other.bandwidth)
    assert 2 * lanes * device.processors * device.clock == pytest.approx(other.flops["float32"], rel=0.01)


def test_every_target_has_a_processor_and_a_device():
    assert devices.PROCESSORS.keys() == binary.TARGETS.keys()
    assert all(devices.devices_of(target) for target in binary.TARGETS)


# What the compiler makes of kernels.

TOY = """
import triton
import triton.language as tl

@triton.jit
def read(x, i, WIDTH, STEPS: tl.constexpr):
    offsets = i * (32 * WIDTH * STEPS) + tl.arange(0, 32 * WIDTH * STEPS)
    return tl.load(x + offsets)

@triton.jit
def streaming(x, scale, out, n, EXCHANGE: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr):
    total = tl.zeros([32 * WIDTH * STEPS], tl.float32)
    for i in range(0, n):
        tile = read(x, i, WIDTH, STEPS).to(tl.float32)
        total += tl.exp(tile)
        if EXCHANGE:
            total += tl.max(tile, axis=0)
    tl.store(out, tl.sum(total, axis=0))
"""


def has_compiler() -> bool:
    try:
        check_triton()
    except RuntimeError:
        return False
    return not interpreting()


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="needs Triton's compiler")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy_streams.py").write_text(TOY)
    sys.path.insert(0, str(folder))
    import toy_streams

    yield toy_streams
    sys.path.remove(str(folder))
    del sys.modules["toy_streams"]


def compiled(toy, monkeypatch, target, stream, exchange=False, dtype=torch.bfloat16):
    """A row of the toy kernel with one warp of 32, 16 entries a thread, or half as many of a warp of 64."""
    from grade_kernels.triton_ops import launch

    monkeypatch.setitem(streams.STREAMS, "toy_streams.streaming", (stream,))
    with launch.recording() as launches:
        x = torch.empty(4096, dtype=dtype)
        options = {"EXCHANGE": exchange, "WIDTH": 8, "STEPS": 2 if target != "gfx942" else 4}
        launch.launch(toy.streaming, (1,), x, None, torch.empty(1), 4, num_warps=1, **options)
    return binary.compile_one(command.configuration(launches[0], target))


@needs_compiler
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_a_stream_is_found_by_the_source_of_its_loads(toy, monkeypatch, target):
    row = compiled(
        toy, monkeypatch, target, Stream("toy_streams.streaming", ("x",), share=2 if target == "gfx942" else 1)
    )
    assert row.error == "" and row.streamed is not None
    (found,) = row.streamed.found
    assert (found.function, found.entries, found.exchanges) == ("toy_streams.streaming", 16, "")
    assert row.streamed.bytes_per_entry == 2 and found.counts.special == 16
    assert 2 < row.streamed.per_entry("instructions") < 12
    names = devices.devices_of(target)
    assert all(f"{name} " in table.line(row) for name in names)
    record = table.record(row, "3.9.0")
    assert record["shuffles"] == record["barriers"] == 0 and record["load_bytes_per_element"] == 2
    assert {key for key in record if key.startswith("ceiling")} == {f"ceiling_{name}" for name in names}


@needs_compiler
def test_an_exchange_in_a_stream_fails_by_name(toy, monkeypatch):
    import triton

    row = compiled(toy, monkeypatch, "sm_90", Stream("toy_streams.read", ("x",)), exchange=True)
    monkeypatch.setattr(binary, "compile_all", lambda every, jobs: iter([row]))
    out = io.StringIO()
    assert command.check([row.configuration], 1, out=out) == 1
    assert "1 of 1 compiled, 0 with spills, 1 with shuffles or barriers" in out.getvalue()
    (exchange,) = [line for line in out.getvalue().splitlines() if line.startswith("exchanges: ")]
    where, what = exchange.split(f", Triton {triton.__version__}: ")
    assert where == "exchanges: sm_90 toy_streams.streaming"
    assert re.match(r"[1-9]\d* shuffles and \d+ barriers in a turn of the loop of toy_streams.read; x:bf16", what)


@needs_compiler
@pytest.mark.parametrize(
    ("stream", "says"),
    [
        (Stream("toy_streams.gone", ("x",)), "toy_streams.streaming has no loop of toy_streams.gone that loads"),
        (Stream("toy_streams.read", ("x", "out")), "no whole number of tiles of 16 x 6"),
        (Stream("toy_streams.read", ("y",)), "has no parameter y"),
    ],
)
def test_a_declaration_that_is_not_so_is_refused(toy, monkeypatch, stream, says):
    assert says in compiled(toy, monkeypatch, "sm_90", stream).error


@needs_compiler
def test_a_stream_that_a_configuration_lacks_is_not_looked_for(toy, monkeypatch):
    row = compiled(toy, monkeypatch, "sm_90", Stream("toy_streams.gone", ("x",), given=("scale",)))
    assert row.error == "" and row.streamed is not None and not row.streamed.has_speed
    assert "ceiling_H200" not in table.record(row, "3.9.0")


def shipped(name: str):
    """The launch of a streaming kernel in a cheap configuration: each declared stream is in one of them."""
    from grade_kernels.common.stats import KLStats, TokenStats
    from grade_kernels.triton_ops import kl, launch, logprob, objective, sample, sweep

    rows, vocab = 8, 32000
    x, y, wide = (torch.empty(rows, vocab, dtype=dtype) for dtype in (torch.bfloat16, torch.bfloat16, torch.float32))
    ids, support, each = (
        torch.zeros(rows, dtype=torch.int64),
        torch.zeros(rows, 16, dtype=torch.int64),
        torch.ones(rows),
    )
    float32, weights = torch.float32, (each, None, None)
    calls = {
        "kl._stats_kernel": lambda: kl.kl_stats(x, y, float32),
        "kl._grads_kernel": lambda: kl.kl_grads(x, y, KLStats.empty(rows, float32, x.device), each, x, y),
        "logprob._stats_kernel": lambda: logprob.token_stats(x, ids, float32),
        "logprob._grad_kernel": lambda: logprob.token_stats_grad(
            x, ids, TokenStats.empty(rows, float32, x.device), each, each, x
        ),
        "sweep._head_kernel": lambda: sweep.head_chunk(wide, None, 16, None, support, ids, "policy_ref", False, None),
        "objective._objective_kernel": lambda: objective.objective_chunk(
            wide, None, None, support, ids, weights, False, None
        ),
        "sample.select_kernel": lambda: sample.select(x, 16, None, support, None, float32),
        "sample.survey_kernel": lambda: sample.select(
            x[:2], 16, torch.zeros(2, dtype=torch.int64), None, None, float32
        ),
    }
    assert calls.keys() == streams.STREAMS.keys()
    with launch.recording() as launches:
        calls[name]()
    return next(made for made in launches if made.kernel.fn.__name__ == name.rpartition(".")[2])


@needs_compiler
@pytest.mark.parametrize("name", streams.STREAMS)
def test_what_streams_logits_exchanges_nothing(name):
    row = binary.compile_one(command.configuration(shipped(name), "sm_90"))
    assert row.error == "" and row.streamed is not None
    assert row.streamed.has_speed and row.streamed.exchanges == []
    assert devices.ceiling(row.streamed, "H200") > 0.5


@needs_compiler
@pytest.mark.parametrize("given", [False, True])
def test_suppressed_ids_are_read_for_the_maxima_alone(given):
    """With a given support no bitmap is read; without one the loop over candidates reads one too, and is no stream,
    whatever else the compiler moves into it."""
    from grade_kernels.aot import cases

    def wanted(one):
        if not (one.name == "sample.select_kernel" and one.given("bits") and one.given("given") == given):
            return False
        kind = "*bf16" if given else "*fp32"
        return one.signature["logits"] == kind and one.constant("KEPT") == 256 and not one.given("parts")

    few = [one for one in command.configurations(cases.record(), ["sm_90"]) if wanted(one)]
    row = binary.compile_one(min(few, key=lambda one: one.constant("STEPS") * one.constant("WIDTH")))
    assert not row.error
    assert {one.function for one in row.streamed.found if not one.rare} == {"topk.survey"}
