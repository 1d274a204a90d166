"""What `grade_kernels.aot` reads from machine code: loops and what they take.

The listings are written by hand, as short as what they test allows.
"""

from __future__ import annotations

import pytest

from grade_kernels.aot import listing, loops
from grade_kernels.aot.loops import Access, Counts


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
