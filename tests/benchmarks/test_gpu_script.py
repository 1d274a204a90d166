"""`bash benchmarks/gpu.sh`: a whole dry run without the libraries that it does without, cut and called again; and what
becomes of workers that hang, die or run out of time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import pool, selection, training
from benchmarks.gpu.rows import Rows
from benchmarks.gpu.summary import FILES, SEE_ROWS, summary
from benchmarks.gpu.work import Order, Work
from benchmarks.training_setup import ALGORITHMS, SHAPES
from grade.errors import GradeError

ROOT = Path(__file__).resolve().parents[2]
ABSENT = ("datasets", "jsonargparse", "rich", "scipy", "hypothesis", "matplotlib", "tensorboard", "sklearn")
WITHOUT = f"""
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {ABSENT} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""
"""Python's own hook at its start: to every process of the call these libraries are not installed."""


def parsed(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


@pytest.mark.slow
def test_a_dry_run_that_is_killed_and_called_again(tmp_path):
    """Every part runs without the libraries; what was measured before the kill stays as it is, the rest is filled."""
    out, hook = tmp_path / "out", tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(WITHOUT)
    own = {"PYTHON": sys.executable, "PYTHONPATH": str(hook), "DRY_RUN": "1", "OUT": str(out)}
    environment = {**os.environ, **own, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = ["bash", "benchmarks/gpu.sh", "--seconds", "3000"]

    first = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    wait_for(lambda: (out / "training.jsonl").exists() and b"step 1" in measured(out / "training.jsonl"), first)
    first.kill()
    first.wait()
    wait_for(lambda: not working(out))  # its worker does not write on
    cut = {name: (out / name).read_bytes() for name in FILES.values()}
    with (out / "kernels.jsonl").open("ab") as file:  # as a kill in the middle of a write leaves it
        file.write(b'{"key": "token_logprob forw')

    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr + (out / "log.txt").read_text()[-3000:]
    rows = {name: parsed(out / name) for name in FILES.values()}
    for name, content in cut.items():
        assert (out / name).read_bytes().startswith(content)
        keys = [row["key"] for row in rows[name] if "key" in row]
        assert len(keys) == len(set(keys))  # nothing was measured twice
        for head in [row["machine"] for row in rows[name] if "machine" in row]:
            assert head["device"] == "dry run" and {"python", "torch", "triton", "transformers", "peft"} <= set(head)
            assert head["commit"] and head["code"]
        planned = [key for row in rows[name] for key in row.get("plan", ())]
        assert planned and set(planned) <= set(keys)
    statuses = {row["status"] for of_file in rows.values() for row in of_file if "key" in row}
    assert all(status == "ok" or status.startswith("skipped: ") for status in statuses)
    kernels = {(row["kernel"], row["dtype"]) for row in rows["kernels.jsonl"] if row.get("kernel")}
    assert kernels == {("token_logprob", "bfloat16"), ("token_logprob", "float32"), ("scatter_tokens", "float32")}
    ours = [row for row in rows["kernels.jsonl"] if row.get("implementation") == "ours"]
    assert all(row["backend"] == "interpreter" and row["ratio"] == 1 for row in ours)
    steps = [row for row in rows["training.jsonl"] if "entry" in row]
    assert [step["entry"].split()[-1] for step in steps] == ["replay"] * 3 + ["layers"]
    assert steps[-1]["first_seconds"] > steps[-1]["seconds"] > 0  # what compiling took is told apart
    assert all(set(step["floors"]) == set(step["phases"]) - {"update"} for step in steps)
    assert sum("tests/kernels/" in row.get("key", "") for row in rows["tests.jsonl"]) == 10

    text = (out / "summary.md").read_text()
    assert text in again.stdout and "not measured again:" in text and "test_scatter.py (10)" in text
    assert "== tests" not in again.stdout and "compilation ahead" not in again.stdout


def measured(path: Path) -> bytes:
    """The keys of a file's rows."""
    return b"\n".join(line.partition(b'"key": ')[2] for line in path.read_bytes().splitlines())


def working(out: Path) -> list[int]:
    """Processes that were told to write there."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"OUT={out}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def wait_for(true, process=None, seconds=600):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until and (process is None or process.poll() is None)
        time.sleep(0.05)


def test_what_is_listed_exists():
    """Nobody sees it before there is a GPU: tests by name, shapes and algorithms."""
    for name in (selection.FIRST, *selection.KERNELS, *selection.DRY):
        path, _, function = name.partition("::")
        text = (ROOT / path).read_text()
        assert f"def {function or 'test_'}" in text, name
    for entry in (*training.ENTRIES, *training.DRY):
        assert entry.shape in SHAPES and entry.algorithm in ALGORITHMS
    assert len({entry.name for entry in training.ENTRIES}) == len(training.ENTRIES)
    # A step beside the same without one more thing compiled, in the order of their worth.
    assert [entry.algorithm for entry in training.ENTRIES[:3]] == ["replay", "compiled", "layers"]
    assert len({replace(entry, algorithm="", share=0.0) for entry in training.ENTRIES[:3]}) == 1


# -- parts of it ---------------------------------------------------------------------------------------------

WORKER = """
import os, signal, time
from benchmarks.gpu.work import Work, ordered

work = Work(ordered())
work.plan(KEYS)
for key in KEYS:
    if work.begin(key):
        if key == "hangs":
            time.sleep(60)
        if key == "dies":
            os.kill(os.getpid(), signal.SIGSEGV)
        if key == "raises":
            raise ValueError(key)
        time.sleep(0.02)
        work.done(key, {"status": "ok", "worker": os.getpid()})
"""


def run(folder: Path, keys: list[str], *, workers=1, patience=4.0, seconds=60.0) -> tuple[Rows, list[str]]:
    """A part whose workers take these keys."""
    shared = folder / f"shared-{len(list(folder.iterdir()))}"
    shared.mkdir()
    order = Order("part", str(folder / "rows.jsonl"), "this", str(shared), time.time() + seconds, dry=True)
    command = [sys.executable, "-c", WORKER.replace("KEYS", repr(keys))]
    problems = pool.run(pool.Crew(command, workers, patience, {"PYTHONPATH": str(ROOT)}), order, folder / "log.txt")
    return Rows(folder / "rows.jsonl", "this"), problems


def test_what_hangs_or_dies_is_a_row_and_the_others_go_on(tmp_path):
    rows, problems = run(tmp_path, ["a", "hangs", "b", "dies", "c", "raises", "d"])
    status = {key: row["status"] for key, row in rows.latest.items()}
    assert [key for key, said in status.items() if said == "ok"] == ["a", "b", "c", "d"]
    assert status["hangs"].startswith("stopped after ")
    assert status["dies"] == "failed: its process ended with SIGSEGV (log.txt)"
    assert status["raises"] == "failed: its process ended with status 1 (log.txt)"
    assert "ValueError: raises" in (tmp_path / "log.txt").read_text() and problems == []
    assert rows.missing("part") == ["hangs", "dies", "raises"]  # measured again by the next call


def test_workers_share_what_is_to_be_done_and_what_is_there_is_kept(tmp_path):
    keys = [f"key {number}" for number in range(60)]
    rows, _ = run(tmp_path, keys, workers=3)
    assert rows.missing("part") == [] and len(parsed(rows.path)) == 1 + len(keys)  # and the plan
    assert len({row["worker"] for row in rows.latest.values()}) > 1
    before = rows.path.read_bytes()
    rows.add("key 5", {"status": "failed: once"})
    rows, _ = run(tmp_path, keys)
    added = rows.path.read_bytes().removeprefix(before).decode().splitlines()
    assert [json.loads(line)["key"] for line in added] == ["key 5"] * 2 and rows.missing("part") == []


def test_what_failed_does_not_stand_in_the_way_of_what_was_never_tried(tmp_path):
    """It comes last, so that what hangs takes the time of nothing else in every call."""
    order = Order("part", str(tmp_path / "rows.jsonl"), "this", str(tmp_path), time.time() + 60, dry=True)
    Rows(tmp_path / "rows.jsonl", "this").add("a", {"status": "stopped after 45 s"})
    assert sorted(["a", "b", "c"], key=Work(order).is_again) == ["b", "c", "a"]


def test_the_end_of_the_time_leaves_no_row_of_what_it_interrupts(tmp_path):
    began = time.monotonic()
    rows, problems = run(tmp_path, ["a", "hangs", "b"], patience=60.0, seconds=3.0)
    assert time.monotonic() - began < 30 and problems == []
    assert list(rows.latest) == ["a"] and rows.missing("part") == ["hangs", "b"]


def test_a_worker_that_cannot_begin_is_said_once(tmp_path):
    order = Order("part", str(tmp_path / "rows.jsonl"), "this", str(tmp_path), time.time() + 60, dry=True)
    crew = pool.Crew([sys.executable, "-c", "import nothing_like_it"], 2, 60.0, {})
    assert pool.run(crew, order, tmp_path / "log.txt") == ["a worker ended with status 1 (log.txt)"]


def test_rows_of_another_device_or_code_count_for_nothing(tmp_path):
    path = tmp_path / "rows.jsonl"
    Rows(path, "this").add("a", {"status": "ok"})
    assert Rows(path, "this").kept("a") and Rows(path, "another").kept("a") is None


def test_damaged_rows_count_for_nothing(tmp_path):
    rows = Rows(tmp_path / FILES["tests"], "this")
    rows.begin({"device": "H200"})
    rows.add_plan("tests", ["a", "b"])
    rows.add("a", {"status": "ok"})
    with rows.path.open("ab") as file:
        file.write(b'\x00\xff\n[]\n{"of": "this"}\n{"key": "b", "of": "this"}\n{"machine": 3, "of": "this"}\n')
        file.write(b'{"key": 3, "status": "ok", "of": "this"}\n{"key": "b", "status": null, "of": "this"}\n')
        file.write(b'{"plan": 3, "part": "tests", "of": "this"}\n{"end": 3, "part": "tests", "of": "this"}\n')
    assert Rows(rows.path, "this").missing("tests") == ["b"] and "device H200" in summary(tmp_path)[0]
    Rows(tmp_path / FILES["training"], "this").add("step 1", {"status": "ok", "entry": "e"})
    Rows(tmp_path / FILES["training"], "this").begin({"device": "H200"})
    with pytest.raises(GradeError, match=f"{tmp_path}: a row of .* is damaged"):
        command.write_summary(tmp_path)


def test_what_an_earlier_call_has_left_is_taken_over_as_a_whole_or_named(tmp_path, capsys):
    earlier, out = tmp_path / "earlier", tmp_path / "out"
    earlier.mkdir()
    out.mkdir()
    with pytest.raises(GradeError, match=f"--earlier: {earlier} has none of tests.jsonl"):
        command.take_over(earlier, out)
    (earlier / FILES["tests"]).write_text("1")
    (earlier / FILES["kernels"]).write_text("2")
    (out / FILES["kernels"]).write_text("3")
    command.take_over(earlier, out)
    command.take_over(out, out)
    assert {path.name: path.read_text() for path in out.iterdir()} == {FILES["tests"]: "1", FILES["kernels"]: "3"}
    assert f"{earlier / FILES['kernels']} is not read" in capsys.readouterr().out


def test_a_file_in_place_of_the_folder_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["gpu.sh", "--summary", "--out", str(tmp_path / "file")])
    assert command.main() == command.NOT_RUN
    assert f"--out (or $OUT): {tmp_path / 'file'} could not be written (File exists)" in capsys.readouterr().err


PROBES = """
import pytest

def test_right(): pass
def test_wrong(): assert 1 == 2
@pytest.mark.skip(reason="not here")
def test_skipped(): pass
"""


def test_outcomes_of_tests_are_rows(tmp_path):
    """Two processes of pytest: every test once, a failure with its text, and a file that cannot be read."""
    (tmp_path / "test_probes.py").write_text(PROBES)
    (tmp_path / "test_broken.py").write_text("import nothing_like_it\n")
    shared = tmp_path / "shared"
    shared.mkdir()
    order = Order("tests", str(tmp_path / "rows.jsonl"), "this", str(shared), time.time() + 300, dry=True)
    options = ["-q", "-p", "benchmarks.gpu.tests", "--continue-on-collection-errors", "--rootdir", str(tmp_path)]
    environment = {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    crew = pool.Crew([sys.executable, "-m", "pytest", *options, str(tmp_path)], 2, 200.0, environment)
    problems = pool.run(crew, order, tmp_path / "log.txt")
    assert problems == [], (tmp_path / "log.txt").read_text()
    rows = Rows(tmp_path / "rows.jsonl", "this")
    said = {key.rpartition("::")[2]: row["status"] for key, row in rows.latest.items()}
    assert said == {
        "collecting test_broken.py": "failed",
        "test_right": "ok",
        "test_wrong": "failed",
        "test_skipped": "skipped: not here",
    }
    assert "assert 1 == 2" in rows.latest["test_probes.py::test_wrong"]["text"]
    assert len(parsed(rows.path)) == 1 + len(said)


def test_the_summary_says_what_failed_what_is_left_and_what_was_not_run(tmp_path):
    rows = {name: Rows(tmp_path / file, "this") for name, file in FILES.items()}
    for one in rows.values():
        one.begin({"device": "H200", "commit": "c0ffee"})
    rows["tests"].add_plan("tests", ["a", "b", "c"])
    rows["tests"].add("a", {"status": "ok"})
    rows["tests"].begin({"device": "H200", "commit": "c0ffee"})
    rows["tests"].add("b", {"status": "failed", "text": "line\nE   assert 1 == 2\n"})
    rows["tests"].end("tests", 12.3, [])
    text, status = summary(tmp_path)
    assert status == 1 + 8 + 16  # a test failed, one is left, and nothing is known of the other files
    assert "device H200" in text and "commit c0ffee" in text
    assert "| tests | 1 | 1 | 1 | 1 | 12 | – |" in text and "- b: failed: assert 1 == 2" in text
    assert "- tests: a (1)" in text
    for key in ("b", "c"):
        rows["tests"].add(key, {"status": "ok"})
    rows["training"].add_plan("training", ["step"])
    rows["training"].add("step", {"status": "ok"})
    rows["kernels"].add_plan("kernels", ["set-up kl 1"])
    wrong = {"kernel": "kl", "variant": "forward", "dtype": "bfloat16", "shape": "N=1", "status": "wrong: error 1"}
    rows["kernels"].add("kl textbook", {**wrong, "implementation": "textbook"})
    rows["kernels"].add("set-up kl 1", {"status": SEE_ROWS})
    text, status = summary(tmp_path)
    assert status == 0 and "- kl textbook: wrong: error 1" in text  # what others compute wrongly is no failure of ours
    rows["kernels"].add("kl ours", {**wrong, "implementation": "ours, dense"})
    assert summary(tmp_path)[1] == 2


def test_sigterm_ends_the_workers_and_says_what_is_there(tmp_path):
    own = {"PYTHON": sys.executable, "DRY_RUN": "1", "OUT": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    process = subprocess.Popen(
        ["bash", "benchmarks/gpu.sh"], cwd=ROOT, env={**os.environ, **own}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline().startswith("== tests")
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 8 + 16 and "kernels: stopped" in said and f"Results: {tmp_path}" in said
    wait_for(lambda: not working(tmp_path))
