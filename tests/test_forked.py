"""Programs that tests run in forked processes are told apart where they fail, hang, or are another test's."""

from __future__ import annotations

import fcntl
import subprocess
import time

import pytest
from forked import forked


@pytest.fixture
def program(tmp_path):
    def written(code):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.py"
        path.write_text(code)
        return path

    return written


def test_codes_and_streams_are_those_of_a_process(program, tmp_path):
    programs = [
        program("print('done')"),
        program("import sys; sys.exit('why')"),
        program("raise ValueError('what')"),
        program("import os, signal; os.kill(os.getpid(), signal.SIGTERM)"),
        program("import sys; print(sys.argv[1:], sys.stdin.read()); sys.exit(3)"),
    ]
    done = forked([([one, "a", "b"], {}) for one in programs], cwd=tmp_path, timeout=60)
    assert [code for code, _, _ in done] == [0, 1, 1, -15, 3]
    assert [said for _, said, _ in done] == ["done\n", "", "", "", "['a', 'b'] \n"]
    assert done[1][2] == "why\n" and done[2][2].endswith("ValueError: what\n")


@pytest.mark.parametrize("value", ["one", "two", None])
def test_an_environment_is_that_of_the_test(value, program, monkeypatch):
    """Whichever test was the first to start the process that is forked."""
    if value is not None:
        monkeypatch.setenv("GRADE_TEST_FORKED", value)
    asks = program("import os; print(os.environ.get('GRADE_TEST_FORKED'), os.environ.get('ADDED'))")
    ((_, said, _),) = forked([([asks], {"ADDED": "more"})], timeout=60)
    assert said == f"{value} more\n"


def test_one_that_hangs_is_no_failed_one(program, tmp_path):
    """It is killed with what it has started, and the next ones are run."""
    held = tmp_path / "held"
    hangs = program(
        "import fcntl, subprocess, sys, time\n"
        f"file = open({str(held)!r}, 'w')\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], pass_fds=[file.fileno()])\n"
        "print('hangs', flush=True)\ntime.sleep(60)\n"
    )
    with pytest.raises(subprocess.TimeoutExpired) as expired:
        forked([([program("")], {}), ([hangs], {})], timeout=3)
    assert expired.value.output == "hangs\n" and expired.value.cmd == [str(hangs)]
    start = time.monotonic()
    with held.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # which both held
    assert time.monotonic() - start < 20
    assert forked([([program("print(1)")], {})], timeout=60)[0][:2] == (0, "1\n")
