"""Rules that every file of `grade_kernels.triton_ops` keeps, read from its source: no device, no interpreter.

Each rule is a function from a parsed file to the faults in it, and is tried on a snippet that breaks it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import grade_kernels

FILES = sorted((Path(grade_kernels.__file__).parent / "triton_ops").glob("*.py"))
# Integers that change from call to call; specialised on their value or divisibility they would recompile.
CHANGING = re.compile(r"n|inner|\w+_inner|seed\w*|draws?|\w+_draw|programs|parts_n|per_part|groups|blocks")
# Calls that wait for the device, and prints, by the name that is called.
FORBIDDEN = {"item", "tolist", "synchronize", "nonzero", "print", "device_print", "device_assert"}


def name_of(node: ast.AST) -> str:
    """The dotted name behind a decorator or a call."""
    return ast.unparse(node.func if isinstance(node, ast.Call) else node)


def decorator(function: ast.FunctionDef, name: str) -> ast.AST | None:
    return next((d for d in function.decorator_list if name_of(d).endswith(name)), None)


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def calls(tree: ast.AST, name: str) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call) and name_of(node) == name)


def narrow_program_ids(tree: ast.Module) -> Iterator[str]:
    """tl.program_id is int32: times a row of 262,144 entries it overflows at row 8,192."""
    widened = {
        id(node.func.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "to"
        and [ast.unparse(argument) for argument in node.args] == ["tl.int64"]
    }
    for call in calls(tree, "tl.program_id"):
        if id(call) not in widened:
            yield f"line {call.lineno}: tl.program_id is not at once .to(tl.int64)"
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)) and name_of(node).endswith("program_id"):
            if name_of(node) != "tl.program_id":
                yield f"line {node.lineno}: program_id under another name than tl.program_id"


def forbidden_calls(tree: ast.Module) -> Iterator[str]:
    """A launcher never waits for the device, and nothing prints."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and name_of(node).rpartition(".")[2] in FORBIDDEN:
            yield f"line {node.lineno}: {ast.unparse(node)}"


def pointers(function: ast.FunctionDef) -> set[str]:
    """Parameters that are addresses: what tl.load, tl.store and offsets into them are built on.

    A tensor is the first name of an address (`rows + i * stride`), directly or through an augmented assignment.
    """
    found = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and name_of(node) in ("tl.load", "tl.store") and node.args:
            address = node.args[0]
            while isinstance(address, ast.BinOp):
                address = address.left
            if isinstance(address, ast.Name):
                found.add(address.id)
    return found


def specialised_integers(tree: ast.Module) -> Iterator[str]:
    """Integers that change from call to call are in do_not_specialize of the kernel that takes them."""
    lists = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for function in functions(tree):
        jit = decorator(function, "triton.jit")
        if jit is None or not any(calls(function, "tl.program_id")):
            continue  # not launched
        given = {k.arg: k.value for k in jit.keywords} if isinstance(jit, ast.Call) else {}
        spared = given.get("do_not_specialize", ast.List([]))
        spared = lists.get(spared.id, ast.List([])) if isinstance(spared, ast.Name) else spared
        spared, addresses = set(ast.literal_eval(spared)), pointers(function)
        for argument in function.args.args:
            constexpr = argument.annotation is not None
            if constexpr or argument.arg in addresses or not CHANGING.fullmatch(argument.arg):
                continue
            if argument.arg not in spared:
                yield f"line {function.lineno}: {argument.arg} of {function.name} is not in do_not_specialize"
        for name in spared - {argument.arg for argument in function.args.args}:
            # A misspelt name is ignored by Triton.  A list that several kernels share may hold more.
            if not isinstance(given["do_not_specialize"], ast.Name):
                yield f"line {function.lineno}: do_not_specialize of {function.name} has no parameter {name}"


def constexpr_batches(tree: ast.Module) -> Iterator[str]:
    """A constexpr that follows the batch, the seed or the draw is a compilation for every value of it."""
    for function in functions(tree):
        if decorator(function, "triton.jit") is None:
            continue
        for argument in function.args.args:
            if argument.annotation is not None and re.fullmatch(r"N|ROWS|SEED\w*|DRAWS?|BATCH", argument.arg.upper()):
                yield f"line {function.lineno}: {argument.arg} of {function.name} is a constexpr"


def ops_without_fake(tree: ast.Module) -> Iterator[str]:
    """torch.compile needs a fake implementation of every custom op; the op's name begins with grade_kernels::."""
    faked = {
        name_of(node).rpartition(".")[0]
        for function in functions(tree)
        for node in function.decorator_list
        if name_of(node).endswith(".register_fake")
    }
    for function in functions(tree):
        op = decorator(function, "custom_op")
        if op is None:
            continue
        name = ast.literal_eval(op.args[0])
        if not name.startswith("grade_kernels::"):
            yield f"line {function.lineno}: the op {name} is not in grade_kernels::"
        if function.name not in faked:
            yield f"line {function.lineno}: the op {name} has no register_fake"


def launches_past_the_launcher(tree: ast.Module) -> Iterator[str]:
    """kernel[grid](...) outside launch.py would not be recorded, compiled ahead of time, or fused alike."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            yield f"line {node.lineno}: {ast.unparse(node.func)}(...)"


OP = "@torch.library.custom_op('{}::f', mutates_args=())\ndef _f(x): pass\n@_{}.register_fake\ndef _(x): pass"
LIST = "L = {}\n@triton.jit(do_not_specialize=L)\ndef f(p_inner, seed_low): tl.program_id(0)"
RULES: list[tuple[Callable[[ast.Module], Iterator[str]], str, str]] = [
    (narrow_program_ids, "row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)"),
    (narrow_program_ids, "row = tl.program_id(1).to(tl.int64) * 4", "row = (tl.program_id(1) * 4).to(tl.int64)"),
    (narrow_program_ids, "row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0).to(tl.int32)"),
    (narrow_program_ids, "x = tl.num_programs(0)", "from triton.language import program_id\nx = program_id(0)"),
    (forbidden_calls, "n = x.numel()", "n = x.max().item()"),
    (forbidden_calls, "torch.cuda.device(0)", "torch.cuda.synchronize()"),
    (forbidden_calls, "x = 'print'", "print(x)"),
    (
        specialised_integers,
        "@triton.jit(do_not_specialize=['n'])\ndef f(x, n, V, B: tl.constexpr): tl.program_id(0)",
        "@triton.jit\ndef f(x, n, V, B: tl.constexpr): tl.program_id(0)",
    ),
    (specialised_integers, LIST.format(["n", "p_inner", "seed_low"]), LIST.format(["n", "p_inner"])),
    (
        specialised_integers,
        "@triton.jit\ndef f(n, x):\n  i = tl.program_id(0)\n  tl.load(n + i * 4)",  # n is a tensor
        "@triton.jit\ndef f(n, x):\n  i = tl.program_id(0)\n  tl.load(x + i * n)",
    ),
    (
        specialised_integers,
        "@triton.jit\ndef device_function(n): pass",
        "@triton.jit(do_not_specialize=['m'])\ndef f(x): tl.program_id(0)",
    ),
    (
        constexpr_batches,
        "@triton.jit\ndef f(n, LANES: tl.constexpr): pass",
        "@triton.jit\ndef f(x, N: tl.constexpr): pass",
    ),
    (ops_without_fake, OP.format("grade_kernels", "f"), OP.format("grade_kernels", "g")),
    (ops_without_fake, "def custom(x): pass", OP.format("other", "f")),
    (launches_past_the_launcher, "launch(kernel, (n,), x, num_warps=4)", "kernel[(n,)](x, num_warps=4)"),
]
DISTINCT = list(dict.fromkeys(rule for rule, _, _ in RULES))


@pytest.mark.parametrize(("rule", "good", "bad"), RULES)
def test_a_rule_finds_what_breaks_it(rule, good, bad):
    assert not list(rule(ast.parse(good)))
    assert len(list(rule(ast.parse(bad)))) == 1


@pytest.mark.parametrize("rule", DISTINCT, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_kernels_keep_the_rule(path, rule):
    exempt = path.name == "launch.py" and rule is launches_past_the_launcher  # the one place that launches
    assert exempt or not list(rule(ast.parse(path.read_text())))


def test_the_rules_see_kernels_and_ops():
    every = [function for path in FILES for function in functions(ast.parse(path.read_text()))]
    kernels = [f for f in every if decorator(f, "triton.jit") and any(calls(f, "tl.program_id"))]
    assert len(kernels) >= 10 and len([f for f in every if decorator(f, "custom_op")]) >= 10
