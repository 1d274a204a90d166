"""The benchmark of a training step: the algorithms compute the same, and the table says what was measured."""

from __future__ import annotations

import csv
import json
import math
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from forked import forked

from benchmarks import training
from benchmarks.training_floors import floors, rates
from benchmarks.training_setup import ALGORITHMS, COMPILED, Bench, Setting, measure
from benchmarks.training_text import compiling, document, growth

SETTING = Setting(shape="llama-260k", batch=2, prompt=5, length=12, k=16)


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


def measured(seconds, **others):
    """What a process that took one step of so many seconds reports."""
    return {
        "status": "ok",
        "steps": [{"seconds": seconds, "phases": {"rollout": seconds / 2, "update": seconds / 2}}],
        "peak_gib": 2.0,
        "before_gib": 1.0,
        "tensors_gib": 0.5,
        "hops": None,
        "apart": None,
        "first_seconds": None,
        "tokens": torch.zeros(2, 3),
        "gradient": torch.ones(3),
        **others,
    }


def options_of(line):
    return training.new_options().parse_args(line.split())


@pytest.fixture(scope="module")
def exact():
    """One step of every algorithm with all hops."""
    setting = replace(SETTING, hop_tol=0.0, max_hops=SETTING.length - 1)
    names = [name for name in ALGORITHMS if name not in COMPILED]  # which take a minute
    return {name: Bench(setting, name).step() for name in names}


@pytest.mark.parametrize("name", ["published", "cached", "checkpointed"])
def test_the_published_algorithm_has_the_tokens_and_gradient_of_replay(exact, name):
    assert torch.equal(exact[name]["tokens"], exact["replay"]["tokens"])
    assert exact["replay"]["gradient"].norm() > 0
    assert relative(exact["replay"]["gradient"], exact[name]["gradient"]) < 1e-4  # float32


def test_phases_cover_the_step(exact):
    assert list(exact["published"]["phases"]) == ["rollout", "reference and reward", "backward", "update"]
    assert list(exact["replay"]["phases"]) == [
        "rollout",
        "policy_forward",
        "base_forward",
        "head",
        "base_backward",
        "hops",
        "policy_backward",
        "update",
    ]
    for found in exact.values():
        assert 0.5 < sum(found["phases"].values()) / found["seconds"] <= 1


def test_every_repeat_starts_from_the_same_weights():
    once, thrice = (measure(SETTING, "replay", repeats=n, seconds=60, counted=0) for n in (1, 3))
    assert len(thrice["steps"]) == 3
    assert relative(thrice["gradient"], once["gradient"]) < 1e-5


def test_the_peak_is_the_steps(monkeypatch):
    """What a step holds in passing counts, what is held before it is told apart."""
    ordinary = Bench.step

    def larger(self):
        torch.ones(2**28)  # a GiB, gone at once
        return ordinary(self)

    monkeypatch.setattr(Bench, "step", larger)
    found = measure(SETTING, "replay", repeats=1, seconds=60, counted=60)
    # A quarter of it was found in the heap that other tests had left, which is no new memory; a GiB is not.
    assert found["before_gib"] > 0.05 and found["peak_gib"] - found["before_gib"] > 0.5
    assert 1 <= found["tensors_gib"] < 1.02


def test_what_takes_long_is_neither_repeated_nor_counted():
    found = measure(SETTING, "replay", repeats=5, seconds=0, counted=0)
    assert len(found["steps"]) == 1 and found["tensors_gib"] is None


def test_another_gradient_stops_the_benchmark(monkeypatch, tmp_path):
    def run(setting, algorithm, folder, **limits):
        return measured(1.0, gradient=torch.ones(3) * (1.1 if algorithm == "cached" else 1.0))

    monkeypatch.setattr(training, "run_apart", run)
    assert training.check(SETTING, 8, ["published", "replay"], tmp_path) == {"published": 0.0}
    assert training.check(SETTING, 8, ["replay"], tmp_path) == {}
    with pytest.raises(SystemExit, match="gradients differ, nothing is timed"):
        training.check(SETTING, 8, ["published", "cached"], tmp_path)


def test_a_power_law_is_continued():
    rows = [{"length": s, "seconds": 3 * s**2.0} for s in (16, 64, 256)]
    assert training.ahead_of(rows, "seconds", 1024) == pytest.approx(3 * 1024**2)
    assert training.ahead_of(rows[:1], "seconds", 1024) is None
    assert growth(rows) == {(16, 64): pytest.approx(2), (64, 256): pytest.approx(2)}


def test_what_compiles_is_told_apart():
    rows = [{"algorithm": name, "length": 8, "first_seconds": 3.2} for name in COMPILED]
    decoding, layers = compiling([*rows, {"algorithm": "replay", "length": 8, "first_seconds": None}]).split("\n\n")
    assert decoding == "The first step of replay, rollout.compile, which compiles, is not in its rows: 3 s at S = 8."
    assert layers.startswith("Compiling the layers of replay, rollout.compile and train.compile, and the first step")


@pytest.fixture
def one_from_nothing(monkeypatch):
    """Of the processes that the command starts, the first begins from nothing, the others are forked."""
    start, commands = subprocess.run, []

    def run(command, *, timeout, **how):
        commands.append(command)
        if len(commands) == 1:
            return start(command, timeout=timeout, **how)
        ((code, out, errors),) = forked([(command[1:], {})], timeout=timeout)
        return subprocess.CompletedProcess(command, code, out, errors)

    monkeypatch.setattr(training, "subprocess", SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired))
    return commands


def test_the_command(one_from_nothing, tmp_path, capsys):
    stem = tmp_path / "llama-0.3m"  # the dot is part of the name
    saved = tmp_path / "llama-0.3m.json"
    training.main(
        [
            "--shape",
            "llama-260k",
            "--batch",
            "2",
            "--prompt",
            "5",
            "--top-k",
            "16",
            "--lengths",
            "8",
            "--algorithms",
            "published",
            "replay",
            "--rounds",
            "1",
            "--repeats",
            "2",
            "--time-limit",
            "60",
            "--save",
            str(stem),
        ]
    )
    printed = capsys.readouterr().out
    assert len(one_from_nothing) >= 4
    payload = json.loads(saved.read_text())
    assert printed.endswith(document(payload)) and (tmp_path / "llama-0.3m.png").stat().st_size > 10_000
    assert [(row["length"], row["algorithm"]) for row in payload["rows"]] == [(8, "published"), (8, "replay")]
    assert all(row["status"] == "ok" and row["gradient_error"] < 0.1 for row in payload["rows"])
    with (tmp_path / "llama-0.3m.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["seconds"]) for row in rows] == [row["seconds"] for row in payload["rows"]]
    training.main(["--table", str(saved)])
    assert capsys.readouterr().out == document(payload)
    payload["rows"][1].pop("phases")
    saved.write_text(json.dumps(payload))
    with pytest.raises(SystemExit, match="is damaged, or of another version of this command"):
        training.main(["--table", str(saved)])


def test_rows_that_were_not_run(monkeypatch, tmp_path):
    """Beyond the time limit a row has its extrapolated time, and replay's advantage is marked as such."""

    def run(setting, algorithm, folder, **limits):
        return measured(1e-3 * setting.length ** (2 if algorithm == "published" else 1))

    monkeypatch.setattr(training, "run_apart", run)
    options = options_of("--rounds 1 --time-limit 30 --algorithms published replay")
    rows = []
    for length in (64, 128, 256):
        rows += training.rows_of(replace(SETTING, length=length), options, rows, tmp_path)
    last, replayed = rows[-2:]
    assert last["status"] == "too slow" and math.isclose(last["extrapolated_seconds"], 65.536)
    assert replayed["status"] == "ok" and "gradient_error" not in replayed
    payload = {"rows": rows, "setting": vars(SETTING), "machine": {"device": "none"}, "check": {}}
    lines = document(payload).splitlines()
    assert any(line.startswith("| 256 | published | ~65.5 | too slow |") for line in lines)
    assert any(line.startswith("| 256 | replay | 0.256 |") and "| ~256 | ~1/1 | ~1/1 |" in line for line in lines)


def test_rounds_take_turns(monkeypatch, tmp_path):
    """Every algorithm once a round, while its steps stay within --seconds; living tensors are counted in the first, and
    a later round that fails takes nothing away."""
    seconds = {"published": [25.0], "cached": [7.0, 8.0, 9.0], "replay": [1.0, 4.0, 2.0]}
    taken = []

    def run(setting, algorithm, folder, *, counted, **limits):
        turn = sum(name == algorithm for name, _ in taken)
        taken.append((algorithm, counted > 0))
        if algorithm == "cached" and turn == 2:
            return {"status": "out of memory"}
        memory = {"peak_gib": 2.0 + turn, "before_gib": 1.5 * turn, "tensors_gib": 0.5 if counted else None}
        return measured(seconds[algorithm][turn], **memory)

    monkeypatch.setattr(training, "run_apart", run)
    options = options_of("--rounds 3 --seconds 40 --algorithms published cached replay")
    published, cached, replay = training.rows_of(SETTING, options, [], tmp_path)
    order = ["published", "cached", "replay", "cached", "replay", "cached", "replay"]
    assert taken == [(name, turn < 3) for turn, name in enumerate(order)]
    assert (published["steps"], published["seconds"]) == (1, 25.0)
    assert (cached["status"], cached["steps"], cached["seconds"]) == ("ok", 2, 7.5)
    assert (replay["steps"], replay["seconds"], replay["peak_gib"], replay["step_gib"]) == (3, 2.0, 4.0, 1.0)
    assert [row["tensors_gib"] for row in (published, cached, replay)] == [0.5] * 3


def test_a_step_that_fails_has_a_row_that_says_so(monkeypatch, tmp_path):
    """Out of memory, or an error: the other algorithms and lengths go on, and what was to be expected is kept."""
    monkeypatch.setattr(training, "run_apart", lambda setting, name, folder, **limits: {"status": "out of memory"})
    before = [
        {
            "algorithm": "published",
            "status": "ok",
            "length": s,
            "seconds": 1e-3 * s,
            "step_gib": 1e-6,
            "peak_gib": 1.0,
            "tensors_gib": None,
        }
        for s in (2, 4)
    ]
    (row,) = training.rows_of(replace(SETTING, length=8), options_of("--algorithms published"), before, tmp_path)
    assert row["status"] == "out of memory" and row["extrapolated_seconds"] == pytest.approx(8e-3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--lengths", "0"], "--lengths is 0: it must be 2 or more"),
        (["--tau", "0"], "--tau is 0.0: it must be a number above 0"),
        (["--shape", "llama-260k", "--top-k", "513"], "--top-k is 513, the vocabulary of llama-260k 512"),
        (["--hop-tol", "nan"], "--hop-tol is nan"),
        (["--save", "README.md/x"], "--save README.md/x: its folder cannot be made"),
    ],
)
def test_what_cannot_run_is_refused_at_once(arguments, message):
    with pytest.raises(SystemExit, match=message):
        training.main(arguments)


@pytest.mark.parametrize("length", [16, 64])
def test_speed_of_a_step(benchmark, length):
    """For pytest-benchmark to compare; and replay is faster than the published algorithm even on a tiny model."""
    benches = [Bench(replace(SETTING, length=length), name) for name in ("replay", "published")]
    benches[0].step()
    benchmark.pedantic(benches[0].step, rounds=3)
    replayed, published = (min(bench.step()["seconds"] for _ in range(2)) for bench in benches)
    assert replayed < published


def test_floors_are_below_what_is_measured():
    """A tiny model is far above the machine's rates; and they grow as the passes do."""
    setting = replace(SETTING, batch=4)
    measured = rates("cpu", "float32")
    step = Bench(setting, "replay").step()
    least = floors(setting, setting.length, step["hops"], measured)
    assert all(0 < least[name] < step["phases"][name] for name in least)
    assert set(least) == set(step["phases"]) - {"update"}
    twice = floors(replace(setting, batch=8), setting.length, step["hops"], measured)
    for name in ("policy_forward", "head", "base_backward", "policy_backward"):
        assert twice[name] == pytest.approx(2 * least[name])
    assert twice["rollout"] < 1.5 * least["rollout"]  # the weights are read once for all
