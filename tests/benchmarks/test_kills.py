"""Runs that are killed twice, the second time while they recover, end as one that was left alone."""

from __future__ import annotations

import sys

import pytest
from forked import forked

from benchmarks import damage, kills


@pytest.mark.parametrize("command, option", [(kills, "--kills"), (damage, "--count")])
@pytest.mark.parametrize("number", ["0", "-3"])
def test_of_no_kills_or_damages_nothing_is_said(command, option, number, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["command", option, number])
    with pytest.raises(SystemExit) as refusal:
        command.main()
    assert refusal.value.code == 2
    assert f"{option} is {number}: it must be at least 1" in capsys.readouterr().err


@pytest.mark.slow
def test_runs_killed_twice_end_as_the_undisturbed_one():
    ((code, said, errors),) = forked([(["-m", "benchmarks.kills", "--kills", "3"], {})], timeout=500)
    assert code == 0 and "3 of 3 runs" in said, said + errors
