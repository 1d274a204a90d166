"""What is measured once a machine, and the ways that are chosen by it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from grade_kernels.common import quickest
from grade_kernels.common.quickest import seconds_of


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache folder of its own, and a process that knows nothing yet."""
    monkeypatch.setenv(quickest.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(quickest, "_known", {})
    return tmp_path / "cache"


def _ways(calls, **seconds):
    return {name: lambda name=name, s=s: calls.append(name) or _work(s) for name, s in seconds.items()}


def _work(seconds):
    start = time.thread_time()
    while time.thread_time() - start < seconds:
        pass


def test_the_quickest_is_found_and_remembered(folder, monkeypatch):
    calls: list[str] = []
    assert quickest.quickest("work", _ways(calls, plain=4e-3, other=1e-3)) == "other"
    measured = len(calls)
    assert quickest.quickest("work", _ways(calls, plain=0, other=1e-2)) == "other" and len(calls) == measured
    monkeypatch.setattr(quickest, "_known", {})  # another process
    assert quickest.quickest("work", _ways(calls, plain=0, other=1e-2)) == "other" and len(calls) == measured
    assert quickest.quickest("other work", _ways(calls, plain=1e-3, other=4e-3)) == "plain" and len(calls) > measured


def test_a_tenth_is_no_advantage(folder, monkeypatch):
    for other, chosen in ((0.95, "plain"), (0.89, "other")):
        monkeypatch.setattr(quickest, "seconds_of", lambda what, ways, other=other: {"plain": 1.0, "other": other})
        assert quickest.quickest("x", {"plain": None, "other": None}) == chosen


def test_another_machine_measures_for_itself(folder, monkeypatch):
    calls: list[str] = []
    seconds_of("x", _ways(calls, plain=0))
    before = len(calls)
    for name, value in (("MKL_CBWR", "COMPATIBLE"), ("ONEDNN_MAX_CPU_ISA", "AVX2")):
        monkeypatch.setenv(name, value)
        seconds_of("x", _ways(calls, plain=0))
    assert len(calls) == 3 * before
    monkeypatch.setattr(torch, "get_num_threads", lambda: 17)
    seconds_of("x", _ways(calls, plain=0))
    assert len(calls) == 4 * before


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"x": 3}', '{"x": {"plain": "fast"}}', '{"x": {"plain": NaN}}'])
def test_a_damaged_file_is_measured_anew(folder, text):
    folder.mkdir()
    (folder / "products.json").write_text(text)
    assert seconds_of("x", _ways([], plain=0))["plain"] >= 0
    assert len(json.loads((folder / "products.json").read_text())) == 1


def test_what_is_no_such_file_is_measured_anew(folder, monkeypatch):
    """A pipe would be waited for, and a file of any size be read as a whole."""
    folder.mkdir()
    os.mkfifo(folder / "products.json")
    assert seconds_of("x", _ways([], plain=0))["plain"] >= 0
    monkeypatch.setattr(quickest, "_known", {})
    with (folder / "products.json").open("ab") as file:
        file.truncate(2**30)
    assert seconds_of("x", _ways([], plain=0))["plain"] >= 0
    assert len(json.loads((folder / "products.json").read_text())) == 1


def test_a_folder_in_place_of_the_file_is_left(folder):
    (folder / "products.json").mkdir(parents=True)
    calls: list[str] = []
    first = seconds_of("x", _ways(calls, plain=0))
    assert first == seconds_of("x", _ways(calls, plain=0))
    assert {path.name for path in folder.iterdir()} == {"products.json", "products.lock"}


@pytest.mark.parametrize("wrong", [{}, {"other": 1.0}, {"plain": 1.0, "more": 1.0}])
def test_other_ways_than_those_that_are_asked_for_count_for_nothing(folder, wrong):
    """As another version would keep them, on disk or in a checkpoint."""
    seconds_of("x", _ways([], plain=0))
    ((what, _),) = quickest.record().items()
    (folder / "products.json").write_text(json.dumps({what: wrong}))
    quickest.restore({what: wrong})
    assert set(seconds_of("x", _ways([], plain=0))) == {"plain"}


def test_a_folder_that_cannot_be_written_is_no_obstacle(folder):
    folder.write_text("a file where the folder should be")
    calls: list[str] = []
    first = seconds_of("x", _ways(calls, plain=0))
    assert first == seconds_of("x", _ways(calls, plain=0)) and folder.is_file()


def test_no_home_is_no_obstacle(monkeypatch):
    """As that of a user without an entry in the system's list."""

    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    for name in (quickest.VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(quickest, "_known", {})
    monkeypatch.setattr(quickest.Path, "home", nowhere)
    calls: list[str] = []
    first, measured = seconds_of("x", _ways(calls, plain=0)), len(calls)
    assert first == seconds_of("x", _ways(calls, plain=0)) and len(calls) == measured


def test_a_disk_that_is_full_leaves_nothing_behind(folder, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert seconds_of("x", _ways([], plain=0))["plain"] >= 0
    assert [path.name for path in folder.iterdir()] == ["products.lock"]


def test_a_way_may_ask_itself(folder, monkeypatch):
    """As a head's product does, which is measured by one who knows nothing of the two libraries behind it."""
    calls: list[str] = []
    thread = threading.Thread(
        target=lambda: seconds_of("outer", {"way": lambda: seconds_of("inner", _ways(calls, plain=0))}), daemon=True
    )
    thread.start()
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert {what.split(";")[0] for what in json.loads((folder / "products.json").read_text())} == {"outer", "inner"}
    monkeypatch.setattr(quickest, "_known", {})
    measured = len(calls)
    seconds_of("inner", _ways(calls, plain=0))
    assert len(calls) == measured


def test_processes_that_ask_at_once_decide_alike(folder):
    """Whichever of them measured, and whatever it found."""
    asks = (
        "import random; from grade_kernels.common.quickest import seconds_of\n"
        "print(seconds_of('x', {n: lambda: sum(range(random.randrange(10**5))) for n in ('plain', 'other')}))"
    )
    run = [
        subprocess.Popen(
            [sys.executable, "-c", asks], stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        for _ in range(2)
    ]
    answers = [process.communicate(timeout=120)[0] for process in run]
    assert answers[0] == answers[1] != b""


@pytest.mark.parametrize("recorded", [3, {"x": 3}, {"x": {"plain": "fast"}}, {"x": {"plain": float("nan")}}])
def test_a_damaged_record_is_refused(folder, recorded):
    with pytest.raises(ValueError, match="seconds by names"):
        quickest.restore(recorded)
    assert quickest.record() == {}


def test_what_was_recorded_counts_without_the_folder(folder, monkeypatch):
    first = seconds_of("x", _ways([], plain=0))
    recorded = json.loads(json.dumps(quickest.record()))
    monkeypatch.setattr(quickest, "_known", {})
    (folder / "products.json").unlink()
    quickest.restore(recorded)
    calls: list[str] = []
    assert seconds_of("x", _ways(calls, plain=0)) == first and not calls
