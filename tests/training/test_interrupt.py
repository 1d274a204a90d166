"""A stop that is asked for from outside: Ctrl-C, SIGTERM, and a terminal that is closed."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys

import pytest

from grade.training.interrupt import stop_between_steps

SCRIPT = """
import sys, time
from grade.training.interrupt import stop_between_steps
with stop_between_steps("the step is saved") as stop:
    print("ready", flush=True)
    while not stop.asked:
        time.sleep(0.01)
    print("this goes to a terminal that may be gone", flush=True)
    open(sys.argv[1], "w").write("saved")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_says_so_at_once(number, capfd):
    before = signal.signal(number, signal.default_int_handler)
    try:
        with stop_between_steps("the step is saved") as stop:
            assert not stop.asked
            signal.raise_signal(number)
            assert stop.asked and "stopping: the step is saved first" in capfd.readouterr().err
            if number == signal.SIGINT:
                with pytest.raises(KeyboardInterrupt):
                    signal.raise_signal(number)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


def test_a_closed_terminal_lets_the_run_save(tmp_path):
    """Closing it sends SIGHUP, and from then on printing to it would fail."""
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever started the tests may ignore it, as nohup does
        os.execv(sys.executable, [sys.executable, "-c", SCRIPT, str(tmp_path / "saved")])
    seen = b""
    while b"ready" not in seen:
        seen += os.read(terminal, 100)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (tmp_path / "saved").read_text() == "saved"


def test_a_signal_that_the_caller_ignores_stays_ignored(tmp_path):
    """As under nohup."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            SCRIPT.replace("while not stop.asked", "import os, signal; os.kill(os.getpid(), 1)\n    for _ in range(3)"),
            str(tmp_path / "saved"),
        ],
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    assert done.returncode == 0 and "terminal that may be gone" in done.stdout
