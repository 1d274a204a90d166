"""The last checkpoints of a run: how many are kept, and going on from the one before where the newest is damaged."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from killing import killed
from tiny_run import changed, files_of, make_tiny_config, stopped_after, trainer_of, with_train

from benchmarks.kills import differences
from grade.commands.train import train
from grade.errors import GradeError, NothingLeft
from grade.files import replace_text
from grade.model.checkpoint import recorded_step, verified_step
from grade.training.resumable import Resumable, go_on_from, keep, resumable
from grade.training.run_folder import MARKER, clear, prepare_run_dir
from grade.training.trained import checkpoint_folder
from grade.training.validations import Validations
from grade_kernels.common import cpu_products

METRIC = {1: 0.5, 2: 0.3, 3: 0.4, 4: 0.6, 5: 0.2}
"""What validations are made to say, by step: the best are those of steps 1 and 4."""


@pytest.fixture(scope="module", autouse=True)
def _known_bests():
    add = Validations.add

    def added(self, row, **options):
        return add(self, row if row.model == "base" else replace(row, reward=METRIC[row.step]), **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Validations, "add", added)
        yield


@pytest.fixture(scope="module")
def settings(tiny_model, tiny_data, shared_output, tmp_path_factory):
    """Of a run of five steps, each of them saved and validated."""
    config = make_tiny_config(tiny_model, tiny_data, shared_output, tmp_path_factory.mktemp("kept") / "whole")
    small = {"every": 1, "validation_prompts": 4, "test_prompts": 4}
    return changed(config, train={"steps": 5, "save_every": 1, "samples_every": 1}, evaluation=small)


@pytest.fixture(scope="module")
def whole(settings):
    """The folder of that run, undisturbed."""
    train(settings)
    return Path(settings.run_dir)


@pytest.fixture(scope="module")
def stopped(settings):
    """Its config where it was interrupted in its fifth step; the folder is for copying."""
    config = with_train(settings, run_dir=str(Path(settings.run_dir).with_name("stopped")))
    stopped_after(config, steps=4)
    return config


@pytest.fixture
def copied(stopped, tmp_path):
    """The same, resuming a copy of its folder."""
    shutil.copytree(stopped.run_dir, tmp_path / "run")
    return with_train(stopped, run_dir=str(tmp_path / "run"), resume=True)


def checkpoints(run_dir) -> dict[str, int | None]:
    return {path.name: recorded_step(path) for path in sorted((Path(run_dir) / "checkpoints").iterdir())}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_last_ones_are_kept_and_the_best_that_they_name(stopped, whole):
    """After the fourth step, which is the best, the third is kept beside it, whose best is the first."""
    assert checkpoints(stopped.run_dir) == {"best": 4, "best-1": 1, "last": 4, "resume-3": 3}
    assert checkpoints(whole) == {"best": 4, "last": 5, "resume-4": 4}
    for name in ("resume-4", "best"):
        assert verified_step(checkpoint_folder(whole, name)) == 4


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_a_damaged_file_of_any_kind_is_named_and_the_one_before_is_found(copied, damage):
    run_dir = Path(copied.run_dir)
    last = run_dir / "checkpoints" / "last"
    names = {path.name for path in last.iterdir()}
    assert {"adapter_model.safetensors", "manifest.json", "trainer_state.json", "trainer_state.safetensors"} <= names
    for path in [*last.iterdir(), run_dir / "metrics.jsonl", run_dir / "samples.jsonl"]:
        content = path.read_bytes()
        if damage == "missing" and path.suffix == ".jsonl":
            continue  # of which the one before knows a part too
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(content[:-1] if damage == "cut" else content)
        if damage == "flipped":
            flip(path) if path.suffix != ".jsonl" else path.write_bytes(content[:-2] + b"?\n")
        if path.name == "manifest.json" and damage == "cut":
            path.write_bytes(content[: len(content) // 2])  # its last byte ends a line
        found = resumable(run_dir)
        assert found.folder.name == "resume-3" and found.best == run_dir / "checkpoints" / "best-1"
        assert len(found.wrong) == 1 and str(path) in found.wrong[0] and "step 3" in found.warning()
        path.write_bytes(content)
    assert resumable(run_dir).folder == last and resumable(run_dir).warning() is None
    shutil.rmtree(last)
    assert (
        resumable(run_dir).folder.name == "resume-3" and "checkpoints/last is missing" in resumable(run_dir).warning()
    )


@pytest.mark.parametrize("damaged", ["trainer_state.safetensors", "metrics.jsonl"])
def test_the_run_ends_as_an_undisturbed_one(copied, whole, damaged, capsys):
    """Also where a log has lost a part of its last line: the state before knows how long it was then."""
    run_dir = Path(copied.run_dir)
    path = run_dir / damaged if damaged == "metrics.jsonl" else run_dir / "checkpoints" / "last" / damaged
    path.write_bytes(path.read_bytes()[:-20])
    train(copied)
    said = " ".join(capsys.readouterr().err.split())
    assert "warning:" in said and path.name in said and "of step 3, and repeats" in said
    assert differences(run_dir, whole) == [] and checkpoints(run_dir) == checkpoints(whole)


def test_a_finished_run_whose_best_is_damaged_repeats_its_end(settings, whole, tmp_path, capsys):
    """The fifth step only names the fourth as the best; the fourth is it."""
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    flip(run_dir / "checkpoints" / "best" / "adapter_model.safetensors")
    train(with_train(settings, run_dir=str(run_dir), resume="auto"))
    assert "best/adapter_model.safetensors is damaged" in " ".join(capsys.readouterr().err.split())
    assert differences(run_dir, whole) == []


def test_fewer_steps_than_the_damaged_one_had_end_with_the_earlier_best(copied):
    """Nothing says any more that the fourth step was better than the first."""
    run_dir = Path(copied.run_dir)
    flip(run_dir / "checkpoints" / "last" / "adapter_model.safetensors")
    rows = train(with_train(copied, steps=3))
    assert rows["best"].step == 1 and checkpoints(run_dir)["best"] == 1
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    assert evaluation["best"]["step"] == 1 and [row["step"] for row in evaluation["validation"]] == [0, 1, 2, 3]
    with pytest.raises(NothingLeft):
        prepare_run_dir(with_train(copied, steps=3))


def test_products_are_made_by_the_library_that_made_them_before(copied, monkeypatch):
    """Which one is quicker a second measurement may find otherwise, and sums would be rounded otherwise."""
    monkeypatch.setattr(cpu_products, "_restored", [cpu_products.Limits(2.0**30, 2.0**30)])
    before = resumable(Path(copied.run_dir)).state["cpu_products"]
    train(copied)
    assert cpu_products.record() == before


def test_where_all_are_damaged_nothing_is_touched(copied):
    run_dir = Path(copied.run_dir)
    for name in ("last", "resume-3"):
        flip(run_dir / "checkpoints" / name / "trainer_state.safetensors")
    before = files_of(run_dir)
    with pytest.raises(GradeError, match="last/trainer_state.*damaged.*No earlier.*resume-3/trainer_state.*damaged"):
        train(with_train(copied, resume="auto"))
    assert files_of(run_dir) == before


def test_one_checkpoint_is_kept_where_one_is_asked_for(copied):
    train(with_train(copied, keep_checkpoints=1))
    assert checkpoints(copied.run_dir) == {"best": 4, "last": 5}
    run_dir = Path(copied.run_dir)
    flip(run_dir / "checkpoints" / "last" / "trainer_state.json")
    before = files_of(run_dir)
    with pytest.raises(GradeError, match="last/trainer_state.json is damaged.*--train.overwrite true"):
        train(copied)
    assert files_of(run_dir) == before


def test_more_are_kept_from_then_on_where_more_are_asked_for(copied):
    trainer = trainer_of(with_train(copied, keep_checkpoints=3))
    trainer.fit()
    assert checkpoints(copied.run_dir) == {"best": 4, "best-1": 1, "last": 5, "resume-3": 3, "resume-4": 4}


def test_a_kill_at_any_moment_of_going_back_can_be_repeated(stopped, tmp_path):
    """What is found afterwards is the same step, with its best."""
    moment, found = 0, None
    while True:
        moment += 1
        run_dir = tmp_path / str(moment)
        shutil.copytree(stopped.run_dir, run_dir)
        flip(run_dir / "checkpoints" / "last" / "adapter_model.safetensors")
        came = killed(lambda folder=run_dir: go_on_from(folder, resumable(folder), 2), run_dir, moment)
        found = resumable(run_dir)
        assert found.state["step"] == 3 and recorded_step(found.best) == 1
        go_on_from(run_dir, found, 2)
        assert checkpoints(run_dir) == {"best": 1, "last": 3}
        if not came:
            break
    assert moment > 5


def test_a_kill_at_any_moment_of_deleting_leaves_no_part_of_one(stopped, tmp_path):
    moment = 0
    while True:
        moment += 1
        run_dir = tmp_path / str(moment)
        shutil.copytree(stopped.run_dir, run_dir)
        came = killed(lambda folder=run_dir: keep(folder, 4, 1), run_dir / "checkpoints", moment)
        for path in (run_dir / "checkpoints").iterdir():
            if path.suffix != ".new":
                verified_step(path)
        keep(run_dir, 4, 1)
        assert checkpoints(run_dir) == {"best": 4, "last": 4}
        if not came:
            break
    assert moment > 3


def test_an_old_copy_that_a_kill_left_becomes_the_one_before(copied):
    """Killed after the newest had taken its place, and before the one that it replaced had gone to its own."""
    run_dir = Path(copied.run_dir)
    folder = run_dir / "checkpoints"
    (folder / "resume-3").rename(folder / "last.old")
    (folder / "best-1").rename(folder / "best.old")
    found = resumable(run_dir)
    assert found == Resumable(folder / "last", found.state, folder / "best")
    go_on_from(run_dir, found, 2)
    assert checkpoints(run_dir) == checkpoints(folder.parent) == {"best": 4, "best-1": 1, "last": 4, "resume-3": 3}


def test_overwriting_deletes_them_too(copied):
    run_dir = Path(copied.run_dir)
    replace_text(run_dir / "checkpoints" / "resume-3" / "notes.txt", "mine")
    clear(run_dir)
    left = {path.relative_to(run_dir).as_posix() for path in files_of(run_dir)}
    assert left == {MARKER, "checkpoints/resume-3/notes.txt"}
