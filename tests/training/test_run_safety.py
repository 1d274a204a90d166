"""What a run must never do: lose somebody's files, bless a broken policy, or go on as another run without a word."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import types
from contextlib import ExitStack
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from killing import killed
from safetensors.torch import load_file, save_file
from tiny_run import files_of, make_tiny_config, stopped_after, timeless, trainer_of, with_train

from grade import cli
from grade.commands.evaluate import evaluate_run
from grade.commands.train import train
from grade.config.reading import config_from_yaml, config_to_yaml
from grade.errors import GradeError
from grade.files import sha256
from grade.model.checkpoint import load_state, verified_step
from grade.processes import make_accelerator
from grade.studies.compare.jobs import Job, curve_of
from grade.studies.compare.study import run_comparison
from grade.training.resuming import other_schedule, restored
from grade.training.run_folder import MARKER, clear, decided, mark, prepare_run_dir, run_folder, write_run_config
from grade.training.trainer import Trainer


@pytest.fixture(scope="module")
def stopped(tiny_model, tiny_data, shared_output, tmp_path_factory):
    """The config of a run that was interrupted in its third step of four; its folder is for copying. It keeps one
    checkpoint to go on from: others are the matter of test_kept_checkpoints.py."""
    config = make_tiny_config(tiny_model, tiny_data, shared_output, tmp_path_factory.mktemp("stopped") / "run")
    config = with_train(config, save_every=1, samples_every=1, keep_checkpoints=1)
    config = replace(config, evaluation=replace(config.evaluation, validation_prompts=4, test_prompts=4))
    stopped_after(config)
    return config


@pytest.fixture
def copied(stopped, tmp_path):
    """Its config, resuming a copy of its folder."""
    shutil.copytree(stopped.run_dir, tmp_path / "run")
    return with_train(stopped, run_dir=str(tmp_path / "run"), resume=True)


def refused(config, match: str) -> None:
    """Resuming is refused in these words, and nothing in the folder is touched."""
    before = files_of(Path(config.run_dir))
    with pytest.raises(GradeError, match=match):
        train(config)
    assert files_of(Path(config.run_dir)) == before


# -- whose files ---------------------------------------------------------------------------------------------


def test_overwriting_deletes_only_what_the_run_wrote(copied):
    run_dir = Path(copied.run_dir)
    foreign = [
        "thesis.tex",
        ".git/HEAD",
        "checkpoints/mine/adapter.bin",
        "tensorboard/notes",
        "reward/notes",
        "checkpoints/best/notes.txt",
        "checkpoints/step-99/mine",
        "evaluation-mine.json",
    ]
    for name in foreign:
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_text("mine")
    clear(run_dir)
    left = {str(path.relative_to(run_dir)) for path in files_of(run_dir)}
    assert left == {*foreign, MARKER} and all((run_dir / name).read_text() == "mine" for name in foreign)


def test_a_folder_without_the_marker_is_never_overwritten(tiny_config, tmp_path):
    """Also if it holds a config.yaml, or is a run's folder seen from above."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "config.yaml").write_text(config_to_yaml(tiny_config))
    (tmp_path / "thesis" / "metrics.jsonl").write_text("mine")
    mark(tmp_path / "thesis" / "run")
    refused(with_train(tiny_config, run_dir=str(tmp_path / "thesis"), overwrite=True), "nothing is deleted there")


@pytest.mark.parametrize("link", ["the folder", "checkpoints", "metrics.jsonl"])
def test_nothing_is_deleted_through_a_symbolic_link(copied, tmp_path, link):
    run_dir, elsewhere = Path(copied.run_dir), tmp_path / "elsewhere"
    place = run_dir if link == "the folder" else run_dir / link
    place.rename(elsewhere)
    place.symlink_to(elsewhere)
    refused(with_train(copied, resume=False, overwrite=True), "symbolic link")


def test_a_kill_at_any_moment_of_deleting_leaves_a_whole_run_or_none(stopped, tmp_path):
    moment, whole = 0, []
    while True:
        moment += 1
        run_dir = tmp_path / str(moment)
        shutil.copytree(stopped.run_dir, run_dir)
        shutil.copytree(run_dir / "checkpoints" / "last", run_dir / "checkpoints" / "last.old")
        if not killed(lambda folder=run_dir: clear(folder), run_dir, moment):
            break
        auto = decided(with_train(stopped, run_dir=str(run_dir), resume="auto"))
        assert auto.train.resume is not auto.train.overwrite
        whole.append(auto.train.resume)
        if auto.train.resume:
            assert {verified_step(run_dir / "checkpoints" / name) for name in ("last", "best")} == {2}
        clear(run_dir)
        assert set(files_of(run_dir)) == {run_dir / MARKER}
    assert whole == sorted(whole, reverse=True) and True in whole and False in whole  # once gone, it stays gone


def test_a_run_folder_is_used_by_one_process(copied):
    with run_folder(copied):
        refused(copied, "another process uses")
    with run_folder(copied):
        pass


def test_a_run_that_holds_nothing_yet_stays_locked(tiny_config):
    """Two that come while it loads its models are refused, and do not take its lock away."""
    with run_folder(tiny_config):
        for _ in range(2):
            with pytest.raises(GradeError, match="another process uses"), run_folder(tiny_config):
                pass
        assert (Path(tiny_config.run_dir) / MARKER).is_file()
    assert not Path(tiny_config.run_dir).exists()


def test_a_run_in_a_folder_named_checkpoints(copied, tmp_path):
    """Its own files are not taken for checkpoints."""
    run_dir = tmp_path / "checkpoints"
    Path(copied.run_dir).rename(run_dir)
    (run_dir / "tensorboard" / "thesis").write_text("mine")
    clear(run_dir)
    assert set(files_of(run_dir)) == {run_dir / MARKER, run_dir / "tensorboard" / "thesis"}


def test_what_a_kill_left_of_a_kept_head_goes_too(copied):
    (Path(copied.run_dir) / "reward.new").mkdir()
    clear(Path(copied.run_dir))
    assert set(files_of(Path(copied.run_dir))) == {Path(copied.run_dir) / MARKER}
    assert not (Path(copied.run_dir) / "reward.new").exists()


def test_a_mistake_leaves_no_folder(tiny_config):
    with pytest.raises(GradeError, match="model.name"):
        train(replace(tiny_config, model=replace(tiny_config.model, name="./nowhere")))
    assert not Path(tiny_config.run_dir).exists()


def test_resume_auto_starts_goes_on_and_starts_again(tiny_config, stopped, tmp_path):
    """Free: start. A checkpoint: go on. Stopped before the first one: start over what is there."""
    auto = with_train(tiny_config, resume="auto")
    assert decided(auto).train == replace(auto.train, resume=False)
    assert decided(with_train(stopped, resume="auto")).train.resume is True
    begun = tmp_path / "begun"
    mark(begun)
    (begun / "metrics.jsonl").write_text("")
    auto = with_train(auto, run_dir=str(begun))
    assert (decided(auto).train.resume, decided(auto).train.overwrite) == (False, True)
    with pytest.raises(GradeError, match="before its first checkpoint.*--train.resume auto"):
        prepare_run_dir(with_train(auto, resume=False))
    with pytest.raises(GradeError, match="nothing to continue.*Start without train.resume"):
        prepare_run_dir(with_train(auto, resume=True))


def test_a_run_whose_last_checkpoint_is_gone_is_not_started_over(copied, tmp_path):
    """Missing, or behind a link that leads nowhere: what is left of the run stays as it is."""
    auto = with_train(copied, resume="auto")
    shutil.rmtree(Path(copied.run_dir) / "checkpoints" / "last")
    refused(auto, "checkpoints/last is missing.*Put it back")
    (Path(copied.run_dir) / "checkpoints").rename(tmp_path / "unmounted")
    (Path(copied.run_dir) / "checkpoints").symlink_to(tmp_path / "not mounted")
    refused(auto, "checkpoints/last is missing.*Put it back")


def test_a_marker_that_is_a_link_is_none(tiny_config, tmp_path):
    Path(tiny_config.run_dir).mkdir()
    (Path(tiny_config.run_dir) / MARKER).symlink_to(tmp_path / "elsewhere")
    refused(tiny_config, "is no file of a run")
    assert not (tmp_path / "elsewhere").exists()


def test_a_checkpoint_behind_a_link_is_replaced_and_the_linked_folder_kept(copied, tmp_path):
    last = Path(copied.run_dir) / "checkpoints" / "last"
    last.rename(tmp_path / "linked")
    last.symlink_to(tmp_path / "linked")
    train(copied)
    assert verified_step(last) == 4 and not last.is_symlink() and verified_step(tmp_path / "linked") == 2
    assert not last.with_name("last.old").exists()


# -- what is resumed -----------------------------------------------------------------------------------------


def test_every_flipped_bit_of_a_checkpoint_is_found(stopped, tmp_path):
    """One in each of 12 stretches of every file."""
    last, copy = Path(stopped.run_dir) / "checkpoints" / "last", tmp_path / "last"
    shutil.copytree(last, copy)
    assert verified_step(copy) == 2
    names = [path.name for path in last.iterdir()]
    state = {"trainer_state.json", "trainer_state.safetensors"}
    assert {"adapter_model.safetensors", "manifest.json", *state} <= set(names)
    for name in names:
        content = (last / name).read_bytes()
        for part in range(12):
            damaged = bytearray(content)
            damaged[(len(content) - 1) * part // 11] ^= 1 << part % 8
            (copy / name).write_bytes(damaged)
            if name == "manifest.json" and says_the_same(damaged, content):
                continue  # a flip in white space, of the one file that has no sum of its bytes
            with pytest.raises(GradeError):
                verified_step(copy)
        (copy / name).write_bytes(content)
    assert verified_step(copy) == 2


def says_the_same(damaged: bytes, content: bytes) -> bool:
    try:
        return json.loads(damaged) == json.loads(content)
    except ValueError:
        return False


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_a_log_that_is_not_the_runs_is_refused(copied, name):
    path = Path(copied.run_dir) / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refused(copied, f"{name} is damaged")
    path.write_bytes(content.replace(b"e", b"f", 1))
    refused(copied, f"{name} is damaged")
    path.unlink()
    refused(copied, f"{name} cannot be read")


@pytest.mark.parametrize("damage", ["cut", "empty", "edited"])
def test_a_damaged_config_is_not_taken_for_defaults(copied, damage):
    path = Path(copied.run_dir) / "config.yaml"
    text = path.read_text()
    path.write_text(
        {"cut": text[: text.index("evaluation:")], "empty": "", "edited": text.replace("seed: 0", "seed: 1", 1)}[damage]
    )
    refused(copied, "config.yaml is damaged, or was changed by hand")


def test_a_head_is_not_taken_for_one_of_other_settings(copied):
    path = str(Path(copied.run_dir) / "reward")
    other = replace(copied, reward=replace(copied.reward, path=path, epochs=3))
    with pytest.raises(GradeError, match=r"was trained with something else: epochs \(10 then, 3 now\)"):
        trainer_of(with_train(other, resume=False))


def test_a_damaged_reward_head_is_refused(copied):
    head = Path(copied.run_dir) / "reward" / "head.safetensors"
    content = bytearray(head.read_bytes())
    content[-1] ^= 1
    head.write_bytes(content)
    refused(copied, "head.safetensors is not what was trained there")


def other_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})


def with_own_inputs(config, tmp_path):
    """A config that reads copies of model and data, which a test may replace."""
    shutil.copytree(config.model.name, tmp_path / "model")
    shutil.copytree(config.task.dataset, tmp_path / "data")
    return replace(
        config,
        model=replace(config.model, name=str(tmp_path / "model")),
        task=replace(config.task, dataset=str(tmp_path / "data")),
        output_dir=str(tmp_path / "output"),
    )


def test_replaced_inputs_are_another_run(tiny_config, tmp_path):
    """Under the same paths: first other reviews, then other base weights. A head trained on the old weights is not
    taken for one of the new."""
    config = with_own_inputs(with_train(tiny_config, save_every=1), tmp_path)
    stopped_after(config)
    resumed = with_train(config, resume=True)
    rows = (tmp_path / "data" / "train.jsonl").read_text()
    (tmp_path / "data" / "train.jsonl").write_text(rows.replace("the", "THE"))
    refused(resumed, "the data of task.dataset")
    (tmp_path / "data" / "train.jsonl").write_text(rows)
    heads = set((tmp_path / "output").glob("reward-*"))
    other_weights(tmp_path / "model")
    with pytest.raises(GradeError, match="base model's weights"):
        train(resumed)
    trainer_of(with_train(config, run_dir=str(tmp_path / "again")))
    assert len(set((tmp_path / "output").glob("reward-*")) - heads) == 1
    with pytest.raises(GradeError, match="base model's weights"):
        evaluate_run(config, Path(config.run_dir), "last", "validation")


def test_another_number_of_responses_a_step_is_refused_and_other_micro_batches_are_not(copied):
    refused(with_train(copied, batch_size=8), r"responses of a step.*4 then, 8 now")
    train(with_train(copied, batch_size=2, accumulation_steps=2))
    assert load_state(Path(copied.run_dir) / "checkpoints" / "last")["step"] == 4


def test_a_schedule_is_a_function_of_the_step_and_the_settings(copied):
    """Four steps, two of them done, become eight: the third has the rate of step 2 of 8, and the change is said."""
    state = load_state(Path(copied.run_dir) / "checkpoints" / "last")
    assert state["steps"] == 4
    config = with_train(copied, schedule="linear", steps=8)
    trainer = trainer_of(config)
    restored(Path(config.run_dir), trainer.inputs, trainer.policy, trainer.optimization.adamw, trainer.method)
    trainer.step = 2
    assert trainer.train_step()["learning_rate"] == pytest.approx(1e-3 * (8 - 2) / 8)
    (note,) = other_schedule(state["steps"], config.train, 2)
    assert "was 4 and is 8" in note and "linear" in note
    assert not other_schedule(4, with_train(config, schedule="constant").train, 2)
    assert not other_schedule(8, config.train, 2)


def test_tensorboard_keeps_the_validation_of_the_resumed_step(copied):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(copied)
    events = EventAccumulator(str(Path(copied.run_dir) / "tensorboard"))
    events.Reload()
    rows = timeless(Path(copied.run_dir) / "metrics.jsonl")
    assert [e.step for e in events.Scalars("validation/reward")] == [r["step"] for r in rows if "validation/kl" in r]
    assert [e.step for e in events.Scalars("reward")] == [0, 1, 2, 3]


# -- what is saved and chosen --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["grpo", "grade-ste"])
def test_a_broken_policy_is_never_saved_or_chosen(tiny_config, method):
    """A learning rate of 1e20: the run fails, and what it saved before is whole and finite."""
    config = with_train(tiny_config, learning_rate=1e20, save_every=1)
    config = replace(
        config,
        method=replace(config.method, name=method),
        generation=replace(config.generation, samples_per_prompt=2),
        evaluation=replace(config.evaluation, every=1),
    )
    with pytest.raises(GradeError, match="broken|norm at step"):
        trainer_of(config).fit()  # past the bounds of the settings
    saved = list((Path(config.run_dir) / "checkpoints").glob("*/adapter_model.safetensors"))
    for path in saved:
        verified_step(path.parent)
        assert all(weight.isfinite().all() for weight in load_file(path).values())
    evaluations = json.loads((Path(config.run_dir) / "evaluation.json").read_text())
    assert [row["model"] for row in evaluations["validation"]][0] == "base"
    assert all(torch.tensor([row["reward"], row["kl"]]).isfinite().all() for row in evaluations["validation"])


def test_a_best_checkpoint_that_was_noted_and_not_saved_is_saved_on_resuming(copied):
    """Killed between the two: the policy at hand is the one."""
    best = Path(copied.run_dir) / "checkpoints" / "best"
    assert verified_step(best) == 2
    shutil.rmtree(best)
    train(copied)
    tested = json.loads((Path(copied.run_dir) / "evaluation.json").read_text())["test"]["best"]
    assert verified_step(best) == tested["step"]


def test_a_best_checkpoint_that_is_lost_is_told_before_work(copied):
    stopped_after(copied, steps=3)  # the second was validated, the third was not
    best = Path(copied.run_dir) / "checkpoints" / "best"
    shutil.copytree(best.with_name("last"), best, dirs_exist_ok=True)
    refused(copied, "holds step 3, but the best is step 2")
    shutil.rmtree(best)
    refused(copied, "best/manifest.json cannot be read")


def test_resuming_to_the_step_that_was_reached_validates_and_tests(copied):
    stopped_after(copied, steps=3)
    reached = with_train(copied, steps=3)
    train(reached)
    evaluation = json.loads((Path(copied.run_dir) / "evaluation.json").read_text())
    assert [row["step"] for row in evaluation["validation"]] == [0, 2, 3] and "test" in evaluation
    with pytest.raises(GradeError, match="nothing left to do"):
        train(reached)


def test_weights_that_break_after_a_checkpoint_leave_it_alone(copied):
    trainer = Trainer(copied, make_accelerator(copied), prepare_run_dir(copied))
    step = trainer.train_step

    def poisoned():
        metrics = step()
        with torch.no_grad():
            trainer.policy.parameters()[0].fill_(float("nan"))
        return metrics

    trainer.train_step = poisoned
    with pytest.raises(GradeError, match=r"weights are not finite.*checkpoints/last \(step 2\)"):
        trainer.fit()
    assert load_state(Path(copied.run_dir) / "checkpoints" / "last")["step"] == 2


def test_a_run_that_beats_nothing_says_so(stopped, tmp_path, capsys):
    """Learning rate 0: every validation equals the base model's."""
    train(with_train(stopped, learning_rate=0.0, run_dir=str(tmp_path / "run"), steps=1))
    assert "No checkpoint is better than the base model" in " ".join(capsys.readouterr().out.split())
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation["best"]["beats_base"] is False


def test_a_full_disk_is_told_in_words_and_the_run_goes_on_later(copied, monkeypatch):
    import grade.training.log

    def full(path, rows):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(grade.training.log, "append_rows", full)
        with pytest.raises(GradeError, match=r"train.run_dir.*jsonl.*No space left.*--train.resume auto"):
            train(copied)
    train(copied)
    assert load_state(Path(copied.run_dir) / "checkpoints" / "last")["step"] == 4


@pytest.mark.parametrize("what", ["a checkpoint", "evaluation.json", "the reward head", "config.yaml", "run.json"])
def test_a_full_disk_elsewhere(tiny_config, tmp_path, monkeypatch, what):
    import grade.model.checkpoint
    import grade.rewards.head_training
    import grade.training.evaluation
    import grade.training.record
    import grade.training.run_folder

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    config = with_train(replace(tiny_config, output_dir=str(tmp_path / "output")), steps=1)
    places = {
        "a checkpoint": (grade.model.checkpoint.tree, "save"),
        "evaluation.json": (grade.training.evaluation, "replace_text"),
        "the reward head": (grade.rewards.head_training, "save_file"),
        "config.yaml": (grade.training.run_folder, "replace_text"),
        "run.json": (grade.training.record, "replace_text"),
    }
    monkeypatch.setattr(*places[what], full)
    with pytest.raises(GradeError, match="could not be written.*No space left"):
        train(config)


def test_the_hint_after_a_stop_is_one_command_that_works(stopped, tmp_path, capsys, monkeypatch):
    (tmp_path / "config.yaml").write_text(config_to_yaml(stopped))
    monkeypatch.setattr("grade.commands.train.train", lambda config: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(["train", str(tmp_path / "config.yaml"), "--train.overwrite", "true"]) == 130
    hint = capsys.readouterr().err.strip().split("grade ")[-1].split()
    assert hint == ["train", str(tmp_path / "config.yaml"), "--train.resume", "auto"]


def test_config_and_record_of_a_resumed_run(copied):
    """What a run was made of is kept with it, and settings that may change are those of the last call."""
    with ExitStack() as stack:
        config = stack.enter_context(run_folder(with_train(copied, resume="auto", save_every=3)))
        Trainer(config, make_accelerator(config), Path(config.run_dir)).fit()
    assert config_from_yaml(Path(copied.run_dir) / "config.yaml").train.save_every == 3
    inputs = json.loads((Path(copied.run_dir) / "run.json").read_text())["inputs"]
    assert set(inputs) == {"model", "tokenizer", "data", "reward", "responses_per_step"}


def test_nothing_to_evaluate_is_told_before_work(copied):
    none = replace(copied, evaluation=replace(copied.evaluation, test_prompts=0))
    with pytest.raises(GradeError, match="evaluation.test_prompts is 0: there is nothing to evaluate"):
        evaluate_run(none, Path(copied.run_dir), "last", "test")


def test_a_comparison_takes_no_folder_of_somebody_else(tiny_config, tmp_path):
    config = replace(tiny_config, output_dir=str(tmp_path))
    (tmp_path / "compare-tiny").mkdir()
    (tmp_path / "compare-tiny" / "comparison.json").write_text("mine")
    with pytest.raises(GradeError, match="was not made by `grade compare`"):
        run_comparison(config, ["reinforce"], [0])
    assert (tmp_path / "compare-tiny" / "comparison.json").read_text() == "mine"


def test_an_edited_log_of_a_finished_run_is_not_compared(copied):
    train(copied)
    path = Path(copied.run_dir) / "metrics.jsonl"
    assert curve_of(Job("run", copied), "grade-ste", 0).validations[-1].step == 4
    path.write_text(path.read_text().replace('"validation/reward": 0.', '"validation/reward": 0.9', 1))
    with pytest.raises(GradeError, match="metrics.jsonl is damaged"):
        curve_of(Job("run", copied), "grade-ste", 0)


def test_a_finished_run_has_nothing_left_and_auto_says_so_without_an_error(copied, capsys):
    train(copied)
    before = files_of(Path(copied.run_dir))
    assert train(with_train(copied, resume="auto")) == {}
    assert "nothing left to do" in " ".join(capsys.readouterr().out.split())
    refused(copied, "nothing left to do")
    refused(with_train(copied, resume="auto", learning_rate=0.5), "other settings")
    refused(with_train(copied, resume="auto", steps=3), "has had 4 steps, train.steps is 3")
    assert files_of(Path(copied.run_dir)) == before


@pytest.mark.parametrize("asked_in", ["the last step", "the test"])
def test_a_stop_before_the_end_of_the_test_leaves_the_test_to_the_next_call(copied, keyboard, asked_in):
    trainer = Trainer(copied, make_accelerator(copied), prepare_run_dir(copied))
    step, evaluated = trainer.train_step, trainer._evaluate

    def last_step():
        if trainer.step == 3 and asked_in == "the last step":
            signal.raise_signal(signal.SIGINT)
        return step()

    def evaluate_split(split, progress, step, *, adapters):
        if split == "test":
            assert asked_in == "the test"
            signal.raise_signal(signal.SIGINT)
        return evaluated(split, progress, step, adapters=adapters)

    trainer.train_step, trainer._evaluate = last_step, evaluate_split
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    path = Path(copied.run_dir) / "evaluation.json"
    assert "test" not in json.loads(path.read_text())
    assert train(with_train(copied, resume="auto"))["best"].prompts == 4 and "test" in json.loads(path.read_text())


def test_an_overwrite_that_cannot_start_deletes_nothing(copied, monkeypatch):
    """A logger that is not installed, and a head that lies in what would be deleted."""
    over = with_train(copied, resume=False, overwrite=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(with_train(over, wandb=True), "wandb is not installed")
    monkeypatch.undo()
    inside = replace(over, reward=replace(over.reward, path=str(Path(copied.run_dir) / "reward")))
    refused(inside, "whose head would be deleted")


@pytest.fixture
def wandb(monkeypatch):
    """In the place of wandb one that has no key and does not start; what would load a run says that it was asked."""
    stand_in = types.ModuleType("wandb")
    stand_in.__spec__ = ModuleSpec("wandb", None)
    stand_in.settings = types.SimpleNamespace(mode="online")
    stand_in.setup = lambda: stand_in
    stand_in.login = lambda *, prompt, verify: prompt
    stand_in.init = failing("server is not reached")
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return stand_in


def failing(text: str):
    def fail(*_, **__):
        raise RuntimeError(text)

    return fail


def test_wandb_without_a_key_is_told_before_anything_is_loaded(copied, wandb, monkeypatch):
    asks = with_train(copied, wandb=True)
    monkeypatch.setattr("grade.training.trainer.set_up", failing("loading"))
    refused(asks, "train.wandb is true but wandb has no API key.*wandb login.*WANDB_MODE=offline.*train.wandb false")
    wandb.login = failing("API key must have 40+ characters, has 5")
    refused(asks, "train.wandb is true but wandb does not start: API key must have 40.*WANDB_API_KEY")
    wandb.settings.mode = "offline"
    with pytest.raises(RuntimeError, match="loading"):
        train(asks)
    wandb.settings.mode, wandb.login = "online", lambda **_: True
    with pytest.raises(RuntimeError, match="loading"):
        train(asks)


def test_wandb_that_does_not_start_is_told_in_words(copied, wandb):
    wandb.login = lambda **_: True
    with pytest.raises(GradeError, match="train.wandb is true but wandb does not start: server is not reached"):
        train(with_train(copied, wandb=True))


def test_the_config_of_a_run_neither_resumes_nor_overwrites(copied):
    train(with_train(copied, resume=False, overwrite=True, steps=1))
    written = config_from_yaml(Path(copied.run_dir) / "config.yaml").train
    assert (written.resume, written.overwrite, written.steps) == (False, False, 1)
    with pytest.raises(GradeError, match="already holds a run"):
        train(config_from_yaml(Path(copied.run_dir) / "config.yaml"))


def test_an_evaluation_uses_the_head_that_is_asked_for(copied, tmp_path):
    """Not the run's own without a word."""
    shutil.copytree(Path(copied.run_dir) / "reward", tmp_path / "other")
    weights = load_file(tmp_path / "other" / "head.safetensors")
    save_file({name: -weight for name, weight in weights.items()}, tmp_path / "other" / "head.safetensors")
    report = json.loads((tmp_path / "other" / "reward.json").read_text())
    report["sha256"] = sha256(tmp_path / "other" / "head.safetensors")
    (tmp_path / "other" / "reward.json").write_text(json.dumps(report))
    other = replace(copied, reward=replace(copied.reward, path=str(tmp_path / "other")))
    run_dir = Path(copied.run_dir)
    own, asked = (evaluate_run(c, run_dir, "last", "validation")[0].reward for c in (copied, other))
    assert own != asked


def test_lost_evaluations_are_made_again_from_the_checkpoint(copied):
    config = replace(copied, evaluation=replace(copied.evaluation, test_prompts=0))
    run_dir = Path(copied.run_dir)
    write_run_config(run_dir, config)
    train(config)
    path = run_dir / "evaluation.json"
    before = path.read_text()
    path.write_text("{")
    refused(config, "evaluation.json cannot be read .*Delete that file: going on with the run makes it again")
    path.unlink()
    train(config)
    assert path.read_text() == before
