"""`python -m grade_kernels.aot`: what it compiles, what it reads from the binaries, and what it refuses.

The Triton path is compiled here without a GPU, so nothing but the machine's Triton is needed.
"""

from __future__ import annotations

import ast
import csv
import io
import sys
from pathlib import Path

import pytest
import torch

from grade_kernels.aot import binary, command
from grade_kernels.aot.streams import STREAMS
from grade_kernels.common.environment import check_triton, interpreting

try:
    check_triton()
except RuntimeError as error:
    pytest.skip(str(error), allow_module_level=True)

from grade_kernels.triton_ops.launch import PerVendor  # noqa: E402

OPS = Path(command.__file__).parents[1] / "triton_ops"
TARGETS = list(binary.TARGETS)

TOYS = """
import triton
import triton.language as tl

@triton.jit(do_not_specialize=["n"])
def good(x, maybe, out, n, width, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    y = tl.load(x + row * width + lane, mask=lane < width, other=0.0) * scale
    if maybe is not None:
        y += tl.load(maybe + row)
    tl.store(out + row * n, tl.sum(y, axis=0))

@triton.jit
def spilling(x, out, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    y = tl.load(x + lane)
    tl.store(out + lane, y / tl.sum(y, axis=0))  # y is needed after the sum, so it stays in registers

@triton.jit
def wrong(x, out, BLOCK: tl.constexpr):
    tl.store(out, tl.load(x) + undefined)

@triton.jit
def crashing(x, out, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), die())

@triton.constexpr_function
def die():
    import os
    os.abort()
"""

needs_compiler = pytest.mark.skipif(interpreting(), reason="TRITON_INTERPRET=1 replaces the compiler")


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """A module of small kernels, importable in other processes too."""
    folder = tmp_path_factory.mktemp("toys")
    (folder / "toy_kernels.py").write_text(TOYS)
    sys.path.insert(0, str(folder))
    import toy_kernels

    yield toy_kernels
    sys.path.remove(str(folder))
    del sys.modules["toy_kernels"]


def recorded(kernel, *args, num_warps=1, **constants):
    from grade_kernels.triton_ops import launch

    with launch.recording() as launches:
        launch.launch(kernel, (1,), *args, num_warps=num_warps, **constants)
    return launches[0]


def good_launch(toys, n=8, width=64, dtype=torch.float32, maybe=None, offset=0, block=64):
    x = torch.empty(n * width + offset, dtype=dtype)[offset:]
    return recorded(toys.good, x, maybe, torch.empty(n), n, width, 0.5, BLOCK=block)


def run(configurations, *, jobs=1, table=None):
    out = io.StringIO()
    status = command.check(configurations, jobs, table, out)
    return status, out.getvalue()


# What the launches become.


@needs_compiler
def test_a_launch_is_specialised_as_triton_does(toys):
    one = command.configuration(good_launch(toys, dtype=torch.bfloat16), "sm_90")
    kinds = {"x": "*bf16", "maybe": "constexpr", "out": "*fp32", "n": "i32", "width": "i32", "scale": "fp32"}
    assert one.signature == {**kinds, "BLOCK": "constexpr"}
    assert one.constants == {(1,): None, (6,): 64}
    assert {path for path, attrs in one.attrs.items() if attrs} == {(0,), (2,), (4,)}  # aligned, but not n
    assert str(one) == "x:bf16 maybe=None out:fp32 n:i32! width:i32 BLOCK=64"


@needs_compiler
@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"n": 17}, True),  # do_not_specialize: not divisible by 16,
        ({"n": 1}, True),  # and 1 is no constant
        ({"width": 80}, True),
        ({"width": 65}, False),
        ({"width": 1}, False),
        ({"dtype": torch.float16}, False),
        ({"maybe": torch.empty(8)}, False),
        ({"offset": 4}, True),  # 16 bytes: still aligned
        ({"offset": 1}, False),
        ({"block": 128}, False),
    ],
)
def test_what_is_another_compilation(toys, change, same):
    before, after = good_launch(toys), good_launch(toys, **change)
    for target in TARGETS:
        assert (command.configuration(before, target).key == command.configuration(after, target).key) is same
    assert len(command.configurations([before, after], ["sm_90"])) == (1 if same else 2)


@needs_compiler
def test_targets_with_wide_warps_take_half_as_many(toys):
    launch = recorded(toys.spilling, torch.empty(64), torch.empty(64), num_warps=8, BLOCK=64)
    assert [command.configuration(launch, target).num_warps for target in TARGETS] == [8, 8, 8, 4]


@needs_compiler
def test_a_bound_on_registers_is_told_to_nvidia_only(toys):
    x = torch.empty(64, 256)
    free = recorded(toys.spilling, x, x, num_warps=8, BLOCK=2**14)
    bound = recorded(toys.spilling, x, x, num_warps=8, max_registers=40, BLOCK=2**14)
    keys = [[command.configuration(one, target).key for one in (free, bound)] for target in ("sm_90", "gfx942")]
    assert keys[0][0] != keys[0][1] and keys[1][0] == keys[1][1]
    one = command.configuration(bound, "sm_90")
    assert str(one).endswith(" maxnreg=40")
    assert binary.compile_one(one).resources.registers <= 40


@needs_compiler
def test_a_constant_may_differ_between_vendors(toys):
    launch = good_launch(toys, block=PerVendor(nvidia=64, amd=32))
    assert [str(command.configuration(launch, name))[-8:] for name in ("sm_90", "gfx942")] == ["BLOCK=64", "BLOCK=32"]


@needs_compiler
def test_large_logits_are_told_to_amd_only(toys):
    launch = good_launch(toys, n=2, width=2**14)
    launch = recorded(launch.kernel, torch.empty(2, 2**14), *launch.args[1:], **launch.constants)
    assert len(command.configurations([launch], ["sm_90"])) == 1
    small, large = command.configurations([launch], ["gfx942"])
    assert "x:fp32 " in str(small) and "x:fp32+ " in str(large) and "out:fp32 " in str(large)


# The configurations of the package.


@pytest.fixture(scope="module")
def shipped():
    if interpreting():
        pytest.skip("TRITON_INTERPRET=1 replaces the compiler")
    from grade_kernels.aot import cases

    return command.configurations(cases.record(), TARGETS)


def kernels_in_the_source() -> set[str]:
    found = set()
    for path in OPS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            # A jitted function that asks for its program is launched; the others are called by those.
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                if "tl.program_id" in ast.unparse(node):
                    found.add(f"{path.stem}.{node.name}")
    return found


def test_every_kernel_has_a_case(shipped):
    assert {one.name for one in shipped} == kernels_in_the_source()


def test_every_dtype_and_alignment_reaches_the_logits_kernels(shipped):
    heads = {str(one).split()[0] for one in shipped if one.target == "sm_90" and one.name == "logprob._stats_kernel"}
    assert heads == {f"x:{dtype}{mark}" for dtype in ("fp32", "bf16", "fp16") for mark in ("", "!")}


def test_quick_has_every_kernel_for_every_target_the_largest_first(shipped):
    chosen = command.quick(shipped)
    pairs = {(one.target, one.name) for one in shipped}
    assert {(one.target, one.name) for one in chosen} == pairs
    assert len(chosen) <= max(60, len(pairs)) and len({one.key for one in chosen}) == len(chosen)
    vjp = [one for one in chosen if one.name == "vjp._token_vjp_kernel" and one.target == "sm_90"]
    assert "KP=1024" in str(vjp[0])


@pytest.mark.slow
def test_the_quick_table_is_free_of_spills(shipped, tmp_path):
    chosen = command.quick(shipped)
    assert {(one.target, one.name) for one in chosen} == {(one.target, one.name) for one in shipped}
    status, text = run(chosen, jobs=2, table=str(tmp_path / "table.csv"))
    assert status == 0, text
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert {row["target"] for row in rows} == set(TARGETS)
    assert all(int(row["registers"]) > 0 and row["spills"] == "0" for row in rows)
    streaming = [row for row in rows if row["kernel"] in STREAMS and row["kernel"] != "sample.select_kernel"]
    assert streaming and all(float(row["issue_per_element"]) > 1 and row["shuffles"] == "0" for row in streaming)


# What compiling makes of good, spilling and broken kernels.


@needs_compiler
def test_the_table_of_a_good_kernel(toys, tmp_path):
    every = command.configurations([good_launch(toys)], TARGETS)
    status, text = run(every, jobs=2, table=str(tmp_path / "table.csv"))
    assert status == 0 and "4 of 4 compiled, 0 with spills" in text and "most registers: " in text
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert sorted(row["target"] for row in rows) == sorted(TARGETS)
    assert all(0 < int(row["registers"]) < 64 and float(row["seconds"]) > 0 and not row["error"] for row in rows)
    assert rows[0]["kernel"] == "toy_kernels.good" and rows[0]["arguments"] == str(every[0])


@needs_compiler
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_spill_is_named_and_fails(toys, target):
    entries = 2**17 if target == "sm_90" else 2**18  # twice the registers of 1024 threads
    x = torch.empty(entries // 64, 64)
    launch = recorded(toys.spilling, x, x, num_warps=32, BLOCK=entries)
    status, text = run(command.configurations([launch, good_launch(toys)], [target]))
    assert status == 1 and "2 of 2 compiled, 1 with spills" in text
    assert f"spills: {target} toy_kernels.spilling x:fp32 out:fp32 BLOCK={entries}" in text
    assert "spills: " + target + " toy_kernels.good" not in text


@needs_compiler
def test_what_does_not_compile_is_a_row_and_the_rest_goes_on(toys):
    x, out = torch.empty(64), torch.empty(64)
    launches = [recorded(kernel, x, out, BLOCK=64) for kernel in (toys.wrong, toys.crashing)]
    status, text = run(command.configurations([*launches, good_launch(toys)], ["sm_80"]))
    assert status == 1 and "1 of 3 compiled, 0 with spills" in text
    assert "FAILED CompilationError: " in text and "undefined is not defined" in text
    assert "FAILED the compiler took its process down (exit code -6)" in text
    assert "did not compile: sm_80 toy_kernels.wrong" in text


@needs_compiler
def test_more_shared_memory_than_a_block_has_is_a_failure(toys, monkeypatch):
    one = command.configuration(good_launch(toys, block=1024), "sm_80")
    monkeypatch.setitem(binary.TARGETS, "sm_80", binary.Target("cuda", 80, 32, -1))
    assert binary.compile_one(one).error.endswith("bytes of shared memory, a block has -1")


# Reading the binaries.

USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function toy:
  REG:64 STACK:3088 SHARED:1024 LOCAL:8 CONSTANT[0]:384 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
AMDGCN = """
	.set toy.num_vgpr, 9
	.amdgpu_metadata
amdhsa.kernels:
  - .agpr_count:     4
    .group_segment_fixed_size: 512
    .name:           toy
    .private_segment_fixed_size: {scratch}
    .sgpr_count:     22
    .sgpr_spill_count: {scalar}
    .vgpr_count:     256
    .vgpr_spill_count: {vector}
"""


def test_reading_cuobjdump():
    assert binary.read_cuobjdump(USAGE) == binary.Resources(registers=64, spills=3096, shared=1024)
    assert binary.read_cuobjdump(USAGE.replace("3088", "0").replace("LOCAL:8", "LOCAL:0")).spills == 0
    with pytest.raises(RuntimeError, match="did not report registers"):
        binary.read_cuobjdump("nothing to see")


def test_reading_a_listing():
    """A spill is in the instructions; an unused stack frame is not one."""
    head = "Function : toy\n        /*0000*/  LDC R1, c[0x0][0x28] ;\n"
    assert not binary.touches_local_memory(head)
    assert binary.touches_local_memory(head + "        /*0010*/  STL.64 [R1], R2 ;\n")
    assert binary.touches_local_memory(head + "   @P0  LDL R2, [R1] ;\n")
    with pytest.raises(RuntimeError, match="did not list the kernel"):
        binary.touches_local_memory("")


@pytest.mark.parametrize(
    ("vector", "scalar", "scratch", "spills"), [(0, 0, 0, 0), (3, 0, 12, 3), (0, 2, 0, 0), (0, 0, 64, 64)]
)
def test_reading_the_metadata_of_amds_assembly(vector, scalar, scratch, spills):
    text = AMDGCN.format(vector=vector, scalar=scalar, scratch=scratch)
    assert binary.read_amdgcn(text) == binary.Resources(registers=256, spills=spills, shared=512)


def test_assembly_without_metadata_is_refused():
    with pytest.raises(RuntimeError, match=".vgpr_count"):
        binary.read_amdgcn(".set toy.num_vgpr, 9")


# Refusals.


def refusal(capsys, *argv) -> str:
    assert command.main(argv) == 2
    return capsys.readouterr().err


def test_the_interpreter_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET is set" in refusal(capsys, "--list")


@needs_compiler
@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--target", "sm_70"], "--target must be one of sm_80, sm_90, sm_100, gfx942, got 'sm_70'"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--kernel", "no_such", "--list"], "--kernel 'no_such' is in none of embedding._dots_kernel"),
    ],
)
def test_bad_options_are_refused(capsys, argv, says):
    assert says in refusal(capsys, *argv)


@needs_compiler
def test_a_missing_cuobjdump_is_refused_unless_it_is_not_needed(capsys, monkeypatch, tmp_path):
    import triton

    monkeypatch.setattr(triton, "__file__", str(tmp_path / "__init__.py"))
    assert "cuobjdump is missing" in refusal(capsys, "--target", "sm_90")
    assert command.main(["--target", "gfx942", "--kernel", "logprob._stats_kernel", "--list"]) == 0


@needs_compiler
def test_an_unsupported_triton_is_refused(capsys, monkeypatch):
    import triton

    monkeypatch.setattr(triton, "__version__", "3.10.0")
    assert "Triton 3.10.0 is not supported" in refusal(capsys, "--list")


@needs_compiler
def test_list_names_the_configurations_of_one_kernel(capsys):
    assert command.main(["--target", "sm_90", "--kernel", "logprob._stats_kernel", "--list"]) == 0
    *lines, _, summary = capsys.readouterr().out.splitlines()
    assert lines and all(line.startswith("sm_90   logprob._stats_kernel") for line in lines)
    assert summary == f"{len(lines)} configurations of 1 kernels"


def test_a_table_that_cannot_be_written_is_refused_before_compiling(capsys, tmp_path):
    assert command.main(["--target", "gfx942", "--csv", str(tmp_path)]) == 2
    assert "cannot be written: Is a directory; name another file" in capsys.readouterr().err
