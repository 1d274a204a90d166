"""What a command says on standard error while it works, and how much of it.

On a terminal: bars. Elsewhere, such as in a log: a line now and then, never a minute without one while parts are done.
Results go to standard output, whatever the level. rich is loaded when something is drawn with it, so that a model can
be used, and warned about, where it is not installed.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.measure import Measurement
    from rich.progress import Progress

Level = Literal["warning", "info", "debug"]
LEVELS: tuple[str, ...] = get_args(Level)
SILENCE = 60.0
"""Seconds after which a line is due, where lines stand for a bar."""
_level: Level = "info"
Item = TypeVar("Item")


def set_level(level: Level) -> None:
    """How much this process says.

    Args:
        level: "warning": only what is wrong; "info": progress too; "debug": also what other libraries warn of.
    """
    global _level
    _level = level
    if level == "debug":
        os.environ["TRANSFORMERS_VERBOSITY"] = "warning"
        warnings.simplefilter("default")


def silence_libraries() -> None:
    """Show no warnings of code that is not ours: whoever reads the terminal cannot change it. For a process that is a
    command, before it imports them; level "debug" brings them back. What Python or transformers are told about
    warnings counts more."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module=r"grade(_kernels)?(\.|$)")


def console(**options: Any) -> Console:
    """Standard error for progress; silent at level "warning", and in all but the first of a run's processes."""
    return _stderr(quiet=_level == "warning" or not _is_first(), **options)


def _stderr(**options: Any) -> Console:
    from rich.console import Console

    return Console(stderr=True, **options)


def warn(line: str) -> None:
    """A line that is shown at every level."""
    if importlib.util.find_spec("rich") is None:
        print(line, file=sys.stderr)
    else:
        _print(_stderr(), line)


def warn_once(line: str) -> None:
    """The same, said by one of the processes that share a run."""
    if _is_first():
        warn(line)


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def say(line: str) -> None:
    """A line of progress."""
    _print(console(), line)


def _print(to: Console, line: str) -> None:
    # A label or a token may look like a tag. Only a terminal has an edge at which lines must end.
    shown = broken(line, to.width) if to.is_terminal else line
    to.print(shown, highlight=False, markup=False, soft_wrap=not to.is_terminal)


def broken(line: str, width: int) -> str:
    """`line` on lines of at most `width` characters, ended where two spaces part its words, as far as they are."""
    if len(line) <= width:
        return line
    first, *rest = line.split("  ")
    lines = [first]
    for part in rest:
        if len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += f"  {part}"
        else:
            lines.append(f"  {part}")
    return "\n".join(lines)


Tick = Callable[..., None]
"""tick(count=1, note=""): so many parts more are done, and what there is to say of the last; fewer of a negative count.
"""


def _bars(to: Console) -> Progress:
    """Bars, and beside each what there is to say of its last part."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    class NoteColumn(ProgressColumn):
        max_refresh = None

        def render(self, task: Task) -> _Note:
            return _Note(task.fields["note"])

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        NoteColumn(Column(no_wrap=False)),
        console=to,
    )


class _Note:
    """Of what is between two spaces, as much as there is room for."""

    def __init__(self, text: str):
        self.parts = text.split("  ")

    def __rich_console__(self, to: Console, options: ConsoleOptions) -> RenderResult:
        shown = ""
        for part in self.parts:
            longer = f"{shown}  {part}" if shown else part
            if len(longer) > options.max_width:
                break
            shown = longer
        yield shown

    def __rich_measure__(self, to: Console, options: ConsoleOptions) -> Measurement:
        from rich.measure import Measurement

        return Measurement(0, min(options.max_width, len("  ".join(self.parts))))


class Counter:
    """Shows how far things are: bars on a terminal, lines elsewhere, nothing where it is not enabled.

    Args:
        enabled: False in processes other than the main one.
    """

    def __init__(self, *, enabled: bool = True):
        self.console = console() if enabled else _stderr(quiet=True)
        self.enabled = enabled
        shows = self.console.is_interactive and not self.console.quiet
        self.bars = _bars(self.console) if shows else None

    def say(self, line: str) -> None:
        """A line of progress that stays, above the bars."""
        _print(self.console, line)

    def warn(self, line: str) -> None:
        """The same, at every level."""
        if self.enabled:
            _print(self.console if self.bars else _stderr(), line)

    @contextmanager
    def counting(
        self, title: str, total: int, done: int = 0, *, every: int | None = None, keep: bool = True
    ) -> Iterator[Tick]:
        """Show how many of `total` parts are done.

        Args:
            done: how many are at the beginning.
            keep: let the bar stand when the block has ended.
            every: parts between two lines; None: a line is due by time alone.
        """
        if self.bars is None:
            yield self._lines(title, total, done, every)
            return
        bars, task = self.bars, self.bars.add_task(title, total=total, completed=done, note="")
        try:
            yield lambda count=1, note="": bars.update(task, advance=count, note=note)
        finally:
            if not keep:
                bars.remove_task(task)

    def _lines(self, title: str, total: int, done: int, every: int | None) -> Tick:
        started = said = time.monotonic()
        first = done

        def tick(count: int = 1, note: str = "") -> None:
            nonlocal done, first, said
            before, done, now = done, done + count, time.monotonic()
            if count < 0:
                first = min(first, done)
                return
            due = every is not None and (before == first or done // every > before // every or done == total)
            if not due and now - said < SILENCE:
                return
            said = now
            left = (now - started) / (done - first) * (total - done)
            times = f"{_clock(now - started)}, {_clock(left)} left" if done < total else _clock(now - started)
            self.say("  ".join(filter(None, (f"{title} {done}/{total}", times, note))))

        return tick


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


@contextmanager
def counter(*, enabled: bool = True) -> Iterator[Counter]:
    """A `Counter` whose bars are drawn while the block runs."""
    shown = Counter(enabled=enabled)
    if shown.bars is None:
        yield shown
        return
    with shown.bars:
        yield shown


@contextmanager
def counting(title: str, total: int, *, enabled: bool = True) -> Iterator[Tick]:
    """Show how many of `total` parts are done while the block runs; lines say when it begins and ends."""
    with counter(enabled=enabled) as shown:
        if shown.bars is None:
            shown.say(f"{title}: {total}")
        with shown.counting(title, total) as tick:
            yield tick


def counted(title: str, items: Sequence[Item], size: Callable[[Item], int] = lambda item: 1) -> Iterator[Item]:
    """`items`, while `counting` shows how many are done, each as many parts as its `size`."""
    with counting(title, sum(map(size, items))) as tick:
        for item in items:
            yield item
            tick(size(item))
