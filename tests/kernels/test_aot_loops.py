"""What `grade_kernels.aot` reads from machine code: loops, what they take, and the ceilings this sets.

The listings are written by hand, as short as what they test allows; what the compiler makes of kernels comes last.
"""

from __future__ import annotations

import ast
import io
import re
import sys
from pathlib import Path

import pytest
import torch

from grade.planning.devices import DEVICES as PLANNED
from grade_kernels.aot import binary, command, devices, listing, loops, streams, table
from grade_kernels.aot.loops import Access, Counts
from grade_kernels.aot.streams import Found, Stream, Streamed
from grade_kernels.common.environment import check_triton, interpreting

OPS = Path(command.__file__).parents[1] / "triton_ops"


def sass(code: str) -> str:
    """As nvdisasm prints it; a line that ends in a colon is a label, one that begins with # a source line."""
    lines = []
    for line in filter(None, map(str.strip, code.splitlines())):
        if line.startswith("#"):
            lines.append(f"\t//## {line[1:]}")
        else:
            lines.append(
                line if line.endswith(":") else f"        /*{len(lines) * 16:04x}*/                   {line} ;"
            )
    return "\n".join(['	.section	.text.toy,"ax",@progbits', "toy:", ".text.toy:", *lines])


def amdgcn(code: str) -> str:
    lines = [line if line.endswith(":") else f"\t{line}" for line in filter(None, map(str.strip, code.splitlines()))]
    return "\n".join(["\t.type\ttoy,@function", "toy:  ; @toy", *lines, ".Lfunc_end0:", "\t.size toy, 1"])


def sass_loops(code: str) -> list[loops.Loop]:
    return loops.loops(listing.read_sass(sass(code)), loops.count_sass)


def amdgcn_loops(code: str) -> list[loops.Loop]:
    return loops.loops(listing.read_amdgcn_code(amdgcn(code)), loops.count_amdgcn)


# Loops.


def test_what_is_outside_a_loop_does_not_count():
    (loop,) = sass_loops("""
        SHFL.BFLY PT, R1, R1, 0x1, 0x1f
        .L_x_0:
        LDG.E.128 R4, [R2.64]
        MUFU.EX2 R4, R4
        FFMA R1, R4, R4, R1
        @P0 BRA `(.L_x_0)
        SHFL.BFLY PT, R1, R1, 0x1, 0x1f
        BAR.SYNC.DEFER_BLOCKING 0x0
        STG.E [R2.64], R1
        EXIT
        .L_x_1:
        BRA `(.L_x_1)
        NOP
    """)
    counts = loop.counts
    assert loop.is_innermost and loop.label == ".L_x_0"
    assert (counts.instructions, counts.issue, counts.floats, counts.special) == (4, 4, 1, 1)
    assert (counts.load_bytes, counts.store_bytes, counts.shuffles, counts.barriers) == (16, 0, 0, 0)


def test_forward_branches_and_code_put_elsewhere_belong_to_their_loop():
    """The part behind the exit is reached from the loop and returns to it; the jump back closes no loop of its own."""
    (loop,) = sass_loops("""
        .L_x_0:
        LDG.E R4, [R2.64]
        @!P1 BRA `(.L_x_1)
        FADD R1, R1, R4
        .L_x_1:
        BRA.DIV UR4, `(.L_x_3)
        FMUL R1, R1, R4
        .L_x_2:
        ISETP.NE.AND P0, PT, R3, RZ, PT
        @P0 BRA P2, `(.L_x_0)
        EXIT
        .L_x_3:
        SHFL.IDX PT, R1, R1, RZ, 0x1f
        BRA `(.L_x_2)
    """)
    assert loop.counts.instructions == 9 and loop.counts.shuffles == 1


def test_an_outer_loop_has_what_is_not_in_the_inner_ones():
    inner, second, outer = sass_loops("""
        .L_x_0:
        BAR.SYNC.DEFER_BLOCKING 0x0
        .L_x_1:
        LDG.E.64 R4, [R2.64]
        BRA.U UP0, `(.L_x_1)
        .L_x_2:
        REDUX.SUM UR4, R4
        @P1 BRA `(.L_x_2)
        @P0 BRA `(.L_x_0)
        EXIT
    """)
    assert (inner.is_innermost, second.is_innermost, outer.inside) == (True, True, 2)
    assert (inner.counts.instructions, inner.counts.load_bytes, inner.counts.barriers) == (2, 8, 0)
    assert (second.counts.shuffles, outer.counts.shuffles) == (1, 0)
    assert (outer.counts.instructions, outer.counts.barriers) == (2, 1)


def test_a_call_within_the_kernel_is_a_jump_and_any_other_is_counted_as_a_call():
    """ptxas leaves a loop for sm_80 by a guarded CALL of the label behind it."""
    code = """
        .L_x_0:
        FADD R1, R1, R4
        {call}
        @!P0 CALL.REL.NOINC `(.L_x_1)
        BRA `(.L_x_0)
        .L_x_1:
        FADD R1, R1, R1
        EXIT
    """
    (loop,) = sass_loops(code.format(call=""))
    assert (loop.counts.instructions, loop.counts.calls) == (3, 0)
    (loop,) = sass_loops(code.format(call="CALL.REL.NOINC `($__internal_0_$__div)"))
    assert (loop.counts.instructions, loop.counts.calls) == (4, 1)


def test_a_kernel_without_loops_has_none():
    assert sass_loops("FADD R1, R1, R4\n@P0 EXIT\nSTG.E [R2.64], R1\nEXIT") == []


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("BRX R2 -0x10", "jumps to a computed address"),
        ("BRA `(.L_x_7)", "goes to .L_x_7, which the listing does not have"),
        ("BRA 0x80", "does not say where it goes"),
        ("what is this", "cannot be read"),
        ("", "holds no instructions"),
        ("@P0 BRA `(.L_x_1)\n.L_x_0:\nFADD R1, R1, R1\n.L_x_1:\n@P1 BRA `(.L_x_0)\nEXIT", "entered at 2 places"),
        (".L_x_0:\nUTMALDG.2D [UR8], [UR4]\n@P0 BRA `(.L_x_0)\nEXIT", "copies in bulk"),
    ],
)
def test_what_cannot_be_followed_is_refused(code, says):
    with pytest.raises(RuntimeError, match=says):
        sass_loops(code)


@pytest.mark.parametrize("read", [listing.read_sass, listing.read_amdgcn_code])
@pytest.mark.parametrize(
    "text", ["", "\t.section\t.text.a,x\n\t.section\t.text.b,x\n\t.type a,@function\n\t.type b,@function"]
)
def test_a_listing_is_of_one_kernel(read, text):
    with pytest.raises(RuntimeError, match="should hold one"):
        read(text)


@pytest.mark.parametrize(
    ("name", "loaded", "stored"),
    [
        ("LDG.E", 4, 0),
        ("LDG.E.U16.CONSTANT", 2, 0),
        ("LDG.E.ENL2.256", 32, 0),
        ("LDGSTS.E.BYPASS.128", 16, 0),
        ("LDS.128", 0, 0),
        ("STG.E.64", 0, 8),
        ("REDG.E.ADD.F32.FTZ.RN.STRONG.GPU", 0, 4),
    ],
)
def test_bytes_of_nvidias_accesses(name, loaded, stored):
    counts = Counts()
    loops.count_sass(counts, listing.Instruction(name, "R4, [R2.64]"))
    assert (counts.load_bytes, counts.store_bytes) == (loaded, stored)


@pytest.mark.parametrize(
    "name", ["BAR.SYNC.DEFER_BLOCKING", "SYNCS.PHASECHK.TRANS64.TRYWAIT", "UCGABAR_WAIT", "MEMBAR.ALL.GPU"]
)
def test_what_is_a_barrier(name):
    counts = Counts()
    loops.count_sass(counts, listing.Instruction(name, ""))
    assert counts.barriers == 1 and counts.shuffles == 0


# AMD's assembly.


def test_a_loop_of_amds():
    """Vector instructions are issued, slow ones in four turns; scalar ones beside them; waiting takes no unit."""
    (loop,) = amdgcn_loops("""
        v_add_f32_dpp v1, v1, v1 row_shr:1 row_mask:0xf bank_mask:0xf
        .LBB0_1:
        .loc 1 9 3 ; toy.py:9:3 @[ other.py:5:1 ]
        buffer_load_dwordx4 v[4:7], v2, s[4:7], 0 offen
        s_waitcnt vmcnt(0)
        v_pk_fma_f32 v[4:5], v[4:5], v[6:7], v[4:5]
        v_exp_f32_e32 v4, v4
        s_and_saveexec_b64 s[0:1], vcc
        s_cbranch_execz .LBB0_2
        v_mov_b32_dpp v4, v4 quad_perm:[0,1,2,3] row_mask:0xf bank_mask:0xf
        global_store_short v2, v4, s[4:5]
        .LBB0_2:
        s_add_i32 s8, s8, 1
        s_cbranch_scc1 .LBB0_1
        ds_bpermute_b32 v1, v2, v1
        s_barrier
        s_endpgm
    """)
    counts = loop.counts
    assert (counts.instructions, counts.issue, counts.scalar, counts.special) == (10, 6, 2, 1)
    assert (counts.load_bytes, counts.store_bytes, counts.shuffles, counts.barriers) == (16, 2, 0, 0)
    assert counts.loads == [Access(16, (("toy.py", 9), ("other.py", 5)))]


@pytest.mark.parametrize(
    ("instruction", "shuffles", "barriers"),
    [
        ("v_mov_b32_dpp v1, v1 quad_perm:[1,0,3,2] row_mask:0xf bank_mask:0xf", 1, 0),
        ("ds_swizzle_b32 v1, v1 offset:swizzle(SWAP,16)", 1, 0),
        ("ds_bpermute_b32 v1, v2, v1", 1, 0),
        ("v_permlane32_swap_b32 v1, v2", 1, 0),
        ("ds_read_b128 v[0:3], v1", 0, 0),
        ("s_barrier", 0, 1),
    ],
)
def test_exchanges_in_a_loop_of_amds(instruction, shuffles, barriers):
    (loop,) = amdgcn_loops(f".LBB0_1:\n{instruction}\ns_cbranch_scc1 .LBB0_1\ns_endpgm")
    assert (loop.counts.shuffles, loop.counts.barriers) == (shuffles, barriers)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("s_setpc_b64 s[30:31]", "jumps to a computed address"),
        ("s_branch .LBB0_9", "goes to .LBB0_9"),
        (".LBB0_1:\nbuffer_load_format_xyz v1, v2, s[4:7], 0\ns_branch .LBB0_1", "not known here"),
    ],
)
def test_what_cannot_be_followed_of_amds_is_refused(code, says):
    with pytest.raises(RuntimeError, match=says):
        amdgcn_loops(code)


# Streams and ceilings.


def test_what_is_declared_exists():
    """A renamed function or parameter would no longer be checked."""
    functions, parameters = set(), {}
    for path in OPS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                functions.add(f"{path.stem}.{node.name}")
                parameters[f"{path.stem}.{node.name}"] = {arg.arg for arg in node.args.args}
    assert {*streams.RARE, *streams.BESIDE} <= functions
    for kernel, declared in streams.STREAMS.items():
        for stream in declared:
            assert stream.functions <= functions
            assert {*stream.reads, *stream.given, *stream.absent, "WIDTH", "STEPS"} <= parameters[kernel]


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
