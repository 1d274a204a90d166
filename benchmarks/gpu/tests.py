"""A plugin of pytest: processes share one list of tests, and keep each outcome at once."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.gpu.machine import device_answers
from benchmarks.gpu.selection import FIRST, LARGE
from benchmarks.gpu.work import BROKEN, Work, ordered


class _Shared:
    """pytest's loop over the tests, as one of several processes."""

    def __init__(self, work: Work):
        self.work = work
        self.reports: list[pytest.TestReport] = []
        self.unread: list[str] = []

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """The kernels' tests of the PyTorch path, which a GPU runs too, come last."""
        items.sort(key=lambda item: not _is_first(item) and item.get_closest_marker("triton") is None)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.unread.append(f"collecting {report.nodeid}")
            if self.work.begin(self.unread[-1]):
                self.work.done(self.unread[-1], {"status": "failed", "text": str(report.longrepr)[-4000:]})

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.work.plan(list(dict.fromkeys([*self.unread, *(item.nodeid for item in session.items)])))
        items = sorted(session.items, key=lambda item: self.work.is_again(item.nodeid))
        waiting = [item for item in items if not self._run(item, wait=False)]
        for item in waiting:
            self._run(item, wait=True)
        return True

    def _run(self, item: pytest.Item, wait: bool) -> bool:
        """Run a test that is still to be run; False: it needs the device's memory, which another has."""
        with self._memory(item, wait) as free:
            if not free:
                return False
            if self.work.begin(item.nodeid):
                self.reports.clear()
                began = time.monotonic()
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
                row = {**outcome(self.reports), "seconds": round(time.monotonic() - began, 3)}
                self.work.done(item.nodeid, row)
                if row["status"] == "failed" and not device_answers():
                    os._exit(BROKEN)  # every further test of this process would fail
        return True

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """That a test failed, or that others have run all of them, is no failure of this process."""
        if session.exitstatus in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.OK

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(report)

    @contextlib.contextmanager
    def _memory(self, item: pytest.Item, wait: bool) -> Iterator[bool]:
        """What takes a large share of the device's memory has it alone; False where it would have to wait."""
        if not item.nodeid.startswith(LARGE):
            yield True
            return
        with (self.work.folder / "large").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True


def _is_first(item: pytest.Item) -> bool:
    return item.nodeid.startswith(FIRST)


def outcome(reports: list[pytest.TestReport]) -> dict:
    """Status and, if it failed, the end of what pytest says, from the reports of set-up, call and tear-down."""
    failed = [report for report in reports if report.failed]
    if failed:
        return {"status": "failed", "text": "\n".join(report.longreprtext for report in failed)[-4000:]}
    for report in reports:
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            return {"status": f"skipped: {reason.removeprefix('Skipped: ')}"}
    return {"status": "ok"}


def pytest_configure(config: pytest.Config) -> None:
    os.chdir(Path(__file__).resolve().parents[2])
    config.pluginmanager.register(_Shared(Work(ordered())))
