"""What is said on standard error: lines in a log, bars and broken lines on a terminal, and how much of it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.progress import Progress

from grade import terminal
from grade.training.progress import training_progress
from grade.training.validations import line_of

METRICS = {"reward": 0.5234, "kl": 0.0123, "hops": 5.25, "tokens_per_second": 1234.4}


@pytest.fixture(autouse=True)
def usual_level():
    yield
    terminal.set_level("info")


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the test sets: clock[0] = 60."""
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


def on_a_terminal(monkeypatch, width):
    """What is drawn on a terminal of this width."""
    shown = Console(file=io.StringIO(), width=width, height=20, force_terminal=True, color_system=None)
    monkeypatch.setattr(terminal, "console", lambda: shown)
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    return shown


def test_a_log_has_a_line_every_so_many_steps_the_first_and_the_last(capsys, clock):
    with training_progress(8, 0, every=3, enabled=True) as progress:
        for step in range(8):
            clock[0] += 10
            progress.advance(METRICS)
            assert step or "training 1/8  0:00:10, 0:01:10 left" in capsys.readouterr().err
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["training 3/8", "training 6/8", "training 8/8"]
    assert lines[0] == "training 3/8  0:00:30, 0:00:50 left  reward 0.523  KL 0.012  hops 5.2  1234 tokens/s"
    assert lines[2].startswith("training 8/8  0:01:20  reward")


def test_no_minute_is_silent_however_rare_the_lines(capsys, clock):
    with training_progress(100, 90, every=50, enabled=True) as progress:
        for _ in range(10):
            clock[0] += 45
            progress.advance(METRICS)
        with progress.evaluation("test", 40) as tick:
            for _ in range(4):
                clock[0] += 61
                tick(10)
    lines = capsys.readouterr().err.splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in lines[:-4]] == [91, 93, 95, 97, 99, 100]
    assert lines[-4].startswith("test 10/40  0:01:01, 0:03:03 left") and lines[-1].startswith("test 40/40")


def test_heads_and_built_in_models_are_announced(capsys, clock):
    for _ in terminal.counted("Reward head, epochs", range(3)):
        clock[0] += 61
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Reward head, epochs: 3" and lines[1] == "Reward head, epochs 1/3  0:01:01, 0:02:02 left"
    assert len(lines) == 4


@pytest.mark.parametrize("width", [60, 80, 100])
def test_a_bar_keeps_steps_and_time_left_readable(monkeypatch, width):
    on_a_terminal(monkeypatch, width)
    with training_progress(25000, 12000, enabled=True) as progress:
        progress.advance(METRICS)
        bars = progress.shown.bars
    paper = Console(file=io.StringIO(), width=width)
    paper.print(bars.get_renderable())
    (line,) = paper.file.getvalue().splitlines()
    assert len(line) <= width and "…" not in line
    assert line.startswith("training ") and " 12001/25000 0:00:00 -:--:-- " in line
    assert line.rstrip().endswith({60: "-:--:--", 80: "  KL 0.012", 100: "  hops 5.2"}[width])


def test_a_validation_breaks_at_its_separators(monkeypatch):
    from grade.training.evaluation import Evaluation

    row = Evaluation("validation", 100, "policy", 0.5, 0.01, 0.02, 1.0, 4.0, 0.9, 30.0, 1.0, 50)
    assert line_of(row).startswith("step 100  validation of the policy: reward 0.500 ± 0.010  KL")
    for width in (60, 80):
        shown = on_a_terminal(monkeypatch, width)
        terminal.say(line_of(row))
        lines = shown.file.getvalue().splitlines()
        assert len(lines) == 2 and max(map(len, lines)) <= width
        assert "  ".join(line.strip() for line in lines) == line_of(row)
        assert lines[1].startswith("  KL" if width == 60 else "  distinct tokens 0.90")


def test_quiet_leaves_what_is_wrong(capsys):
    terminal.set_level("warning")
    terminal.say("progress")
    with training_progress(1, 0, enabled=True) as progress:
        progress.say("a note")
        progress.advance(METRICS)
        progress.warn("warning: no response ended")
    assert capsys.readouterr().err == "warning: no response ended\n"


def test_a_warning_needs_no_rich(capsys, monkeypatch):
    monkeypatch.setattr(terminal.importlib.util, "find_spec", lambda name: None)
    terminal.warn_once("warning: no response ended")
    assert capsys.readouterr().err == "warning: no response ended\n"


def test_other_processes_say_nothing(capsys):
    with training_progress(1, 0, enabled=False) as progress:
        progress.say("a note")
        progress.warn("a warning")
        progress.advance(METRICS)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("no_color", ["", "1"])
def test_no_color(monkeypatch, no_color):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    shown = terminal.console(color_system="standard", width=80)
    shown.file = io.StringIO()
    with Progress(*terminal.Counter().bars.columns, console=shown) as bars:
        bars.add_task("training", total=2, completed=1, note="")
    codes = [code for part in shown.file.getvalue().split("\x1b[")[1:] for code in part.split("m")[0].split(";")]
    coloured = any(code.isdigit() and 30 <= int(code) <= 37 for code in codes)
    assert coloured is not bool(no_color)
