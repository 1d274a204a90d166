"""Damaged folders of runs, read by every command: words, and nothing is touched."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from tiny_run import with_train

from benchmarks.damage import contents, one, seal
from grade import cli, tree
from grade.commands.train import train
from grade.config.sealed import config_from_sealed
from grade.errors import GradeError


@pytest.fixture
def copied(trained_run, tmp_path):
    """The config of a run of four steps that is to go on for two, in a copy of its folder."""
    run_dir = tmp_path / "run"
    shutil.copytree(trained_run, run_dir)
    return with_train(config_from_sealed(run_dir / "config.yaml"), run_dir=str(run_dir), resume=True, steps=6)


def last(config) -> Path:
    return Path(config.run_dir) / "checkpoints" / "last"


def refused(config, match: str) -> None:
    before = contents(Path(config.run_dir))
    with pytest.raises(GradeError, match=match):
        train(config)
    assert contents(Path(config.run_dir)) == before


def moments(state: dict) -> dict:
    """What the optimizer keeps of its first parameter."""
    return next(iter(state["optimizer"]["state"].values()))


STATES = {  # what another program has written as the trainer's state, and what is said of it
    "a field is gone": (lambda s: s.pop("optimizer"), "has no entry 'optimizer'"),
    "another type": (lambda s: s.update(evaluations={}), "evaluations is an object, not a list"),
    "a type deep inside": (
        lambda s: s["evaluations"][0].update(kl="low"),
        r"evaluations\[0\].kl is 'low', not a number",
    ),
    "a negative number of steps": (lambda s: s.update(steps=-5), "steps is -5, not a whole number from 0 up"),
    "no place in the logs": (lambda s: s["logs"].update({"metrics.jsonl": [1]}), "not a list of 2"),
    "an optimizer of NaN": (lambda s: moments(s)["exp_avg"].fill_(float("nan")), "values that are not finite"),
    "an optimizer of other shapes": (
        lambda s: moments(s).update(exp_avg=torch.zeros(3)),
        "does not fit this run .*exp_avg of the optimizer is not that of a parameter",
    ),
    "a learning rate of text": (
        lambda s: s["optimizer"]["param_groups"][0].update(lr="fast"),
        "does not fit this run .*lr of the optimizer is 'fast'",
    ),
    "a best step without validation": (lambda s: s["best"].update(step=3), "best is step 3, which was not validated"),
}


@pytest.mark.parametrize("case", STATES)
def test_a_state_that_is_not_this_runs_is_refused(copied, case):
    change, said = STATES[case]
    state = tree.load(last(copied) / "trainer_state")
    change(state)
    tree.save(last(copied) / "trainer_state", state)
    for kind in ("json", "safetensors"):
        seal(last(copied) / f"trainer_state.{kind}")
    refused(copied, f"train.resume: .*{said}")


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (-5, "step is -5, not a whole number from 0 up"),
        ("4", "step is '4', not a whole number"),
        (3, "of step 3, and a validation is of step 4"),
        (5, "of step 5, and it was to have 4 steps"),
    ],
)
def test_a_step_that_cannot_be_is_refused(copied, step, said):
    path = last(copied) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "step": step}))
    seal(path)
    refused(copied, said)


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
@pytest.mark.parametrize("damage", ["no UTF-8", "no objects", "a folder"])
def test_a_log_of_another_kind_is_refused(copied, name, damage):
    path = Path(copied.run_dir) / name
    content = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    else:
        path.write_bytes(b"\xff" * len(content) if damage == "no UTF-8" else b"[1]\n" * len(content))
    refused(copied, f"{name} (is damaged|cannot be read)")


def test_a_record_of_another_kind_is_told_by_every_command(copied, capsys):
    run_dir = Path(copied.run_dir)
    (run_dir / "run.json").write_text(json.dumps({"inputs": ["model"], "sessions": 3}))
    before = contents(run_dir)
    for line in (
        ["evaluate", str(run_dir)],
        ["generate", str(run_dir), "a film"],
        ["export", str(run_dir), "--merge", "--to", str(run_dir.parent / "export")],
    ):
        assert cli.main(line) == 2
        assert "run.json is damaged, or of something else: inputs is a list, not an object" in capsys.readouterr().err
    assert contents(run_dir) == before and not (run_dir.parent / "export").exists()
    refused(copied, "run.json is damaged")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_any_damage_is_taken_in_good_order(trained_run, tmp_path, capsys, seed):
    """A few of those of `python -m benchmarks.damage`, which makes as many as one likes."""

    def call(arguments: list[str]) -> tuple[int, str]:
        capsys.readouterr()
        code = cli.main(arguments)
        return code, "".join(capsys.readouterr())

    readers = ("resume", "evaluate", "generate", "export")
    done, wrong = one(trained_run, tmp_path, random.Random(f"tests/{seed}"), call, readers)
    assert wrong is None, f"{done}: {wrong}"
