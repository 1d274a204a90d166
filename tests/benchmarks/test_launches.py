"""What `python -m benchmarks.launches` counts, and that it has not grown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from torch.utils._triton import has_triton

from benchmarks import launches
from benchmarks.launch_counter import META, counting, list_launches
from benchmarks.launch_graphs import compiled_by
from benchmarks.launches import COMPILED_LAYERS, LAYERS, PARTS, counted
from grade_kernels import gumbel_topk

SAVED = json.loads((Path(__file__).parents[2] / "benchmarks/results/launches.json").read_text(encoding="utf-8"))
# Others launch other operators for the same code.
of_the_same_versions = pytest.mark.skipif(
    (SAVED["torch"], SAVED["transformers"]) != (torch.__version__.split("+")[0], transformers.__version__),
    reason=f"the table is of torch {SAVED['torch']} and transformers {SAVED['transformers']}",
)


def given(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device=META)


def test_what_computes_is_a_launch_and_what_looks_at_memory_is_not():
    x, w = given(4, 8), given(16, 8)
    with counting() as counts:
        assert x.is_cuda and x.device.type == "cuda" and not x.is_meta
        with counts.phase("all"):
            y = torch.nn.functional.linear(x, w).view(2, 2, 16).transpose(0, 1)[0]
            y.relu()
            torch.empty(3, device=x.device)
            torch.nn.functional.dropout(x, 0.5, training=False)
    found = counts.phases["all"]
    assert found.launches == 2 and found.waits == 0
    assert found.least == 2 * (4 * 8 + 16 * 8)
    assert found.moved == found.least + 2 * 4 * 16 + 2 * 2 * (2 * 16)


def test_inside_inference_mode_too():
    x, w = given(4, 8), given(16, 8)
    with counting() as counts, torch.inference_mode():
        torch.nn.functional.linear(x, w).softmax(-1)
    assert counts.work().operators == {"mm": 1, "_softmax": 1}


def test_lists_that_code_asks_for_are_what_was_answered():
    with counting() as counts:
        counts.answers[3] = [32, 32, 64]
        assert given(3, dtype=torch.int64).tolist() == [32, 32, 64]
        assert given(2, dtype=torch.int64).tolist() == [1, 1] and given(3).tolist() == [1.0] * 3
    assert counts.work().waits == 3


def test_replay_is_counted_of_whole_responses(small):
    """Of 16 responses of 64 tokens behind 32: what a hop moves is more than what its layers are given, many times."""
    one, two = small
    given = 16 * (32 + 64) * 1024 * 2
    assert two["hop"].moved - one["hop"].moved > 100 * given


def test_reading_a_value_waits():
    x = given(5, dtype=torch.float32)
    with counting() as counts:
        assert x.sum().item() == 1.0 and bool((x > 0).all())
        assert len((x > 0).nonzero()) == 5
        assert x.tolist() == [1.0] * 5
        torch.tensor([1, 2], device="cuda")
        torch.tensor([], device="cuda")
        torch.ones(3).to("cuda")
    assert counts.work().waits == 6


def test_rows_of_a_table_are_read_and_not_the_table():
    table, ids = given(1000, 8), given(3, dtype=torch.int64)
    with counting() as counts:
        torch.nn.functional.embedding(ids, table)
    assert counts.work().moved == 2 * 3 * 8 * 2 + 8 * 3


def test_operations_of_our_own_are_launches():
    logits = given(16, 151_936, dtype=torch.float32)
    with counting() as counts:
        drawn = gumbel_topk(logits, k=256, seed=0)
        assert drawn.tokens.shape == (16,)
    found = counts.work()
    assert found.launches <= 4 and found.least >= 4 * 16 * 151_936 and not found.waits


def test_a_backward_pass_is_counted():
    x, w = given(4, 8).requires_grad_(), given(16, 8).requires_grad_()
    y = None
    with counting() as counts:
        y = torch.nn.functional.linear(x, w)
        torch.autograd.grad(y, [x, w], torch.ones_like(y))
    assert counts.work().operators["mm"] == 3


def test_lists_take_a_launch_for_so_many_tensors_or_blocks():
    small, large = [given(10) for _ in range(111)], [given(65536 * 321)]
    assert list_launches((small,)) == 2 and list_launches((small[:110],)) == 1
    assert list_launches((small[:65], small[:65])) == 2
    assert list_launches((large,)) == 2
    assert list_launches((large + small[:109],)) == 2 and list_launches((large + small[:110],)) == 3


def test_compiled_kernels_are_fused_ones_and_products():
    x, w = given(64, 128), given(256, 128)

    def program(x):
        return torch.nn.functional.linear(torch.relu(x * 2) + 1, w).square() + 1

    with counting() as counts, compiled_by(counts) as graphs:
        step = torch.compile(program)
        assert step(x).shape == step(x).shape == (64, 256)
    before = has_triton()  # what torch keeps of that it must find anew, and so must who compiles later
    assert graphs.calls == 2 and graphs.kernels() == 3
    assert has_triton() == before
    assert counts.phases["graph"].launches == 2 * 6


@pytest.fixture(scope="module")
def small():
    return [counted("qwen3-0.6b", layers, beside=False, whole=False, compiled_layers=False) for layers in (1, 2)]


@pytest.fixture(scope="module")
def fused():
    return counted("qwen3-0.6b", 1, beside=False, whole=False, compiling=False)


@of_the_same_versions
@pytest.mark.parametrize("part", ["token", "token_compiled", "forward", "hop", "backward"])
@pytest.mark.parametrize("number", ["kernels", "host", "waits"])
def test_launches_have_not_grown(small, part, number):
    """All models of these layers launch the same for a layer. Fewer are a table to be written anew:
    python -m benchmarks.launches --save benchmarks/results/launches.json"""
    one, two = (getattr(parts[part], number) for parts in small)
    for row in SAVED["rows"]:
        if row["part"] == part:
            assert one + (row["layers"] - 1) * (two - one) == row[number]


@pytest.mark.slow
@of_the_same_versions
@pytest.mark.parametrize("part", COMPILED_LAYERS)
def test_launches_of_compiled_layers_have_not_grown(fused, part):
    (row,) = (row for row in SAVED["rows"] if row["part"] == part and row["shape"] == "qwen3-0.6b")
    found = fused[part]
    assert found.kernels + (row["layers"] - 1) * row["kernels_of_layer"] == row["kernels"]
    assert found.host == found.kernels and found.waits == row["waits"] and found.moved is None


def test_layers_launch_alike(small):
    """As the table takes them to."""
    four = counted("qwen3-0.6b", 4, beside=False, whole=False, compiling=False, compiled_layers=False)
    for part in ("token", "forward", "hop", "backward"):
        for number in ("kernels", "host", "waits", "moved", "least"):
            a, b, d = (getattr(parts[part], number) for parts in (*small, four))
            assert d == a + 3 * (b - a), (part, number)


def test_the_saved_table_is_whole():
    parts = {}
    for row in SAVED["rows"]:
        parts.setdefault(row["shape"], {})[row["part"]] = row
    for rows in parts.values():
        assert rows.keys() == PARTS.keys()
        assert rows["token"]["kernels"] < 0.75 * rows["beside"]["kernels"]
        assert rows["token_compiled"]["kernels"] < 0.8 * rows["beside_compiled"]["kernels"]
        assert rows["token_compiled"]["host"] == 1
        for name in LAYERS:  # a fused layer is the products of its weights and adapters, and a few kernels besides
            assert rows[f"{name}_compiled"]["kernels_of_layer"] < 0.42 * rows[name]["kernels_of_layer"]
        assert rows["step_layers"]["host"] < 0.4 * rows["step_compiled"]["host"]
        # Weights are read by either, and what else is there before a part is at most as much with fewer kernels.
        assert rows["hop_compiled"]["least"] <= rows["hop"]["least"]


def test_no_shape_is_refused(capsys):
    with pytest.raises(SystemExit):
        launches.main(["--shapes"])
    assert "--shapes: expected at least one argument" in capsys.readouterr().err
