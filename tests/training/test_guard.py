"""What watches over a run: steps whose numbers are not finite, alarms, and what they do to it."""

from __future__ import annotations

import copy
import json
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import adapter_of, changed, make_tiny_config, timeless, trainer_of

from benchmarks.kills import differences
from grade import cli
from grade.config import GuardConfig, validate
from grade.config.reading import config_to_yaml
from grade.errors import Collapsed, GradeError, RewardFailed
from grade.model.checkpoint import load_state, verified_step
from grade.studies.compare.study import run_comparison
from grade.training.alarms import Alarms
from grade.training.log import RunLog
from grade.training.run_folder import MARKER, clear, run_folder
from grade.tree import leaves


@pytest.fixture
def config(tiny_model, tiny_data, shared_output, tmp_path):
    return config_in(tiny_model, tiny_data, shared_output, tmp_path / "run")


@pytest.fixture
def returning(tiny_model, tiny_data, shared_output, tmp_path):
    return returning_in(tiny_model, tiny_data, shared_output, tmp_path / "run")


def config_in(*places):
    """A run of six steps, saved and validated every second one."""
    config = make_tiny_config(*places)
    return changed(
        config,
        train={"steps": 6, "save_every": 2, "samples_every": 1, "tensorboard": False},
        evaluation={"validation_prompts": 4, "test_prompts": 0},
        guard={"alarm_steps": 2},
    )


def returning_in(*places):
    guard = {"action": "rollback", "rollback_factor": 0.25}
    return changed(config_in(*places), guard=guard, train={"tensorboard": True})


def fitted(config, prepare=lambda trainer: None):
    """Run a config as `grade train` does, with something done to its trainer before it begins."""
    with run_folder(config) as decided:
        trainer = trainer_of(decided)
        prepare(trainer)
        trainer.fit()
        return trainer


def without_a_number(*steps):
    """The head's reward of a response is NaN in these steps."""

    def prepare(trainer):
        value = trainer.reward.value

        def poisoned(rollout, *arguments, **options):
            found = value(rollout, *arguments, **options)
            bad = rollout.split == "policy" and trainer.step in steps
            return torch.where(torch.arange(len(found)) == 1, float("nan"), found) if bad else found

        trainer.reward.value = poisoned

    return prepare


def measuring(name, value, when):
    """A step's metric is something else where `when(trainer)`."""

    def prepare(trainer):
        step = trainer.method.step

        def measured(*arguments):
            metrics = step(*arguments)
            return {**metrics, name: value} if when(trainer) else metrics

        trainer.method.step = measured

    return prepare


def rows_of(config):
    return [row for row in timeless(Path(config.run_dir) / "metrics.jsonl") if "loss" in row]


def state_of(config, name="last"):
    return load_state(Path(config.run_dir) / "checkpoints" / name)


def record_of(config):
    return json.loads((Path(config.run_dir) / "run.json").read_text())


# -- steps that are left out -----------------------------------------------------------------------------------


def test_a_reward_that_is_no_number_leaves_its_step_out(config, tmp_path, capfd):
    """The run ends as one that had every step but that one's update."""
    fitted(config, without_a_number(2))

    def idle_in_the_third(trainer):
        update = trainer.gate.update

        def idle():
            if trainer.step != 2:
                return update()
            trainer.optimization.clear()
            return 0.0

        trainer.gate.update = idle

    other = changed(config, train={"run_dir": str(tmp_path / "other")})
    fitted(other, idle_in_the_third)
    ours, theirs = (Path(c.run_dir) for c in (config, other))
    for name in ("checkpoints/last/adapter_model.safetensors", "checkpoints/last/trainer_state.safetensors"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    assert (ours / "evaluation.json").read_text() == (theirs / "evaluation.json").read_text()

    rows = rows_of(config)
    assert [row["guard/skipped_updates"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert rows[2]["reward"] is None and rows[2]["updates"] == 0 and rows[2]["tokens"] > 0
    skipped = json.loads((ours / "skipped" / "step-2.json").read_text())
    assert (skipped["step"], skipped["seed"], skipped["reason"]) == (2, config.seed, "reward is nan")
    samples = [r for r in map(json.loads, (ours / "samples.jsonl").read_text().splitlines()) if r["step"] == 2]
    assert len(skipped["responses"]) == config.train.batch_size and len(samples) == 4
    trainer = trainer_of(config)
    for response, sample in zip(skipped["responses"], samples, strict=True):
        assert trainer.prompts[response["prompt"]] == response["prompt_ids"]
        text = trainer.policy.tokenizer.decode(response["response_ids"], skip_special_tokens=True)
        assert text in sample.values()
    assert [entry["step"] for entry in record_of(config)["guard"]["skipped_updates"]] == [2]
    said = " ".join(capfd.readouterr().err.split())
    assert "step 2: the update was not made (reward is nan). Its responses: skipped/step-2.json" in said


def test_too_many_in_a_row_stop_the_run_and_a_resumed_one_counts_on(config):
    config = changed(config, guard={"max_skipped": 3})
    poisoned = without_a_number(1, 3, 4, 5)

    def killed(trainer):
        poisoned(trainer)
        step = trainer.train_step

        def until_the_fifth():
            if trainer.step == 4:
                raise KeyboardInterrupt
            return step()

        trainer.train_step = until_the_fifth

    with pytest.raises(KeyboardInterrupt):
        fitted(config, killed)
    assert state_of(config)["step"] == 4  # one of three was left out
    with pytest.raises(
        GradeError,
        match=r"^step 5: the update of 3 steps in a row was not made \(reward is nan\).*"
        r"guard.max_skipped is 3.*Kept .*checkpoints/last \(step 4\)",
    ) as caught:
        fitted(changed(config, train={"resume": True}), poisoned)
    assert not isinstance(caught.value, Collapsed)
    assert [row["guard/skipped_updates"] for row in rows_of(config)] == [0, 1, 1, 2, 3, 4]
    assert verified_step(Path(config.run_dir) / "checkpoints" / "last") == 4
    (Path(config.run_dir) / "skipped" / "notes").write_text("mine")
    clear(Path(config.run_dir))
    left = {str(path.relative_to(config.run_dir)) for path in Path(config.run_dir).rglob("*") if path.is_file()}
    assert left == {MARKER, "skipped/notes"}


def test_a_reward_of_ones_own_that_gives_no_number(config, tmp_path, capfd):
    """The same; at the end of patience it is told by its name, and what was done before is saved."""
    path, away = tmp_path / "judge.py", tmp_path / "away"
    path.write_text(
        "from pathlib import Path\n"
        f"def judge(completions):\n    number = 'inf' if Path({str(away)!r}).exists() else 0.5\n"
        "    return [float(number) for _ in completions]\n"
    )
    config = changed(
        config,
        method={"name": "reinforce"},
        reward={"function": f"{path}:judge"},
        train={"save_every": 100},
        evaluation={"every": 100},
        guard={"max_skipped": 2},
    )

    def leaves(trainer):
        asked = trainer.method.asked

        def away_in(rollouts):
            if trainer.step in (1, 3, 4):
                away.touch()
            try:
                return asked(rollouts)
            finally:
                away.unlink(missing_ok=True)

        trainer.method.asked = away_in

    with pytest.raises(RewardFailed, match=r"judge.* returned 'inf' for response 0 .*checkpoints/last \(step 4\)"):
        fitted(config, leaves)
    rows = rows_of(config)
    assert [row["guard/skipped_updates"] for row in rows] == [0, 1, 1, 2] and rows[1]["reward"] is None
    said = " ".join(capfd.readouterr().err.split())
    assert "None where it does not apply). Its responses: skipped/step-1.json" in said  # the run goes on
    assert "start another run" not in said
    state = state_of(config)
    assert state["step"] == 4 and state["method"]["average"]["weight"] == pytest.approx(1 - 0.9**2)


METHODS = {"grade-ste": {}, "reinforce": {}, "grpo": {"epochs": 2, "minibatches": 2}, "ppo": {"target_kl": None}}


@pytest.mark.parametrize("name", METHODS)
def test_nothing_of_a_step_that_is_left_out_is_kept(config, name):
    """Weights, moments and the method's own state are, to the bit, those before: where a reward or a KL is no number,
    and where the gradient is infinite, of several updates the last one's."""
    config = changed(config, method={"name": name}, generation={"samples_per_prompt": 2})
    config = changed(config, method={name: METHODS[name]} if METHODS[name] else {})
    Path(config.run_dir).mkdir()
    trainer = trainer_of(config)
    without_a_number(1)(trainer)
    hear, clip, update = trainer.services.before_update, trainer.optimization.clip, trainer.optimization.update
    made: list[int] = []

    def heard(sums):
        hear({**sums, "token/kl": float("nan")} if trainer.step == 2 else sums)

    def clipped():
        if trainer.step == 3 and len(made) == config.method.updates - 1:
            trainer.policy.parameters()[-1].grad.flatten()[0] = float("inf")
        return clip()

    def updated():
        made.append(trainer.step)
        update()

    trainer.services.before_update, trainer.optimization.clip, trainer.optimization.update = heard, clipped, updated
    trainer.train_step()
    before = kept(trainer)
    for trainer.step in (1, 2, 3):
        made.clear()
        metrics = trainer.train_step()
        assert metrics["updates"] == 0 and metrics["guard/skipped_updates"] == trainer.step
        assert len(made) == (config.method.updates - 1 if trainer.step == 3 else 0)
        for now, then in zip(leaves(kept(trainer)), leaves(before), strict=True):
            assert torch.equal(now, then) if isinstance(now, torch.Tensor) else now == then
        assert all(parameter.grad is None for parameter in trainer.optimization.parameters())
    trainer.step = 4
    assert trainer.train_step()["updates"] == config.method.updates
    assert not torch.equal(adapter_of(trainer.policy), before[0])


def kept(trainer):
    method, adamw = trainer.method, trainer.optimization.adamw
    state = (method.state_dict(), method.kl_coef, trainer.reward.state_dict())
    return copy.deepcopy((adapter_of(trainer.policy), adamw.state_dict()["state"], *state))


def test_broken_weights_end_the_run_at_once(config):
    """No step after them would be better."""

    def breaks(trainer):
        update = trainer.optimization.update

        def broken():
            update()
            if trainer.step == 2:
                with torch.no_grad():
                    trainer.policy.parameters()[0].fill_(float("nan"))

        trainer.optimization.update = broken

    with pytest.raises(
        GradeError, match=r"^after 3 steps: the policy is broken \(its weights are not finite\).*step 2"
    ):
        fitted(config, breaks)
    assert not (Path(config.run_dir) / "skipped" / "step-4.json").exists()
    for name in ("last", "best"):
        weights = load_file(Path(config.run_dir) / "checkpoints" / name / "adapter_model.safetensors")
        assert all(weight.isfinite().all() for weight in weights.values())


# -- alarms ------------------------------------------------------------------------------------------------------

HEALTHY = {"unique_token_ratio": 0.8, "entropy": 2.0, "kl": 0.5, "eos_rate": 0.9}
BOUNDS = [
    ("min_unique_token_ratio", "unique_token_ratio", 0.2, 0.19),
    ("min_entropy", "entropy", 0.2, 0.19),
    ("max_kl", "kl", 3.0, 3.1),
    ("max_clipped_ratio", "eos_rate", 0.25, 0.2),
]


@pytest.mark.parametrize("bound, metric, edge, beyond", BOUNDS)
def test_every_alarm(bound, metric, edge, beyond):
    """Of the last three values all beyond the bound: not of two, not of values on the bound, once as long as it
    lasts, and again after a step within it."""
    value = 1 - edge if metric == "eos_rate" else edge
    off = {name: None for name, *_ in BOUNDS}
    alarms = Alarms(GuardConfig(**{**off, bound: value}, alarm_steps=3))
    raised = [alarms.hear({**HEALTHY, metric: x}) for x in [beyond] * 2 + [edge] * 3 + [beyond] * 5 + [edge]]
    assert [list(found) for found in raised] == [[]] * 7 + [[bound]] + [[]] * 3
    assert f"(guard.{bound}) over 3 steps" in raised[7][bound] and not alarms.standing() and not alarms.beyond()
    assert [list(alarms.hear({**HEALTHY, metric: beyond})) for _ in range(3)] == [[], [], [bound]]
    silent = Alarms(GuardConfig(**off, alarm_steps=1))
    assert not silent.hear({**HEALTHY, metric: beyond}) and not silent.beyond()


@pytest.mark.parametrize("name", ["imdb_small", "imdb_small_tau2", "countdown_small"])
def test_the_defaults_are_silent_on_published_runs(name):
    """In no single step or test, of any method and seed; in as many steps in a row as an alarm takes, with room."""
    text = (Path(__file__).parents[2] / "benchmarks" / "results" / f"compare_{name}.json").read_text()
    comparison, default = json.loads(text), GuardConfig()
    ratio = min(test["unique_token_ratio"] for test in comparison["tests"].values())
    assert ratio > 2 * default.min_unique_token_ratio
    near = replace(default, max_kl=0.6 * default.max_kl, min_entropy=2 * default.min_entropy)
    for curve in comparison["curves"]:
        at_once, close = Alarms(replace(default, alarm_steps=1)), Alarms(near)
        for kl, entropy in zip(curve["kl"], curve["entropy"], strict=True):
            metrics = {**HEALTHY, "kl": kl, "entropy": entropy}
            assert not at_once.hear(metrics) and not close.hear(metrics)


def test_a_warning_is_said_once_and_counted(config, capfd):
    bad = (1, 2, 4, 5)
    fitted(config, measuring("entropy", 0.001, lambda trainer: trainer.step in bad))
    assert [row["guard/alarms"] for row in rows_of(config)] == [0, 0, 1, 1, 1, 2]
    said = " ".join(capfd.readouterr().err.split())
    assert said.count("warning: entropy is below 0.01 (guard.min_entropy) over 2 steps, 0.001 in the last") == 1
    assert record_of(config)["guard"]["alarms"] == 2 and state_of(config)["step"] == 6


def test_stop_saves_and_a_resumed_run_needs_another_setting(config):
    config = changed(config, guard={"action": "stop"})
    always = measuring("kl", 50.0, lambda trainer: trainer.step >= 1)
    with pytest.raises(Collapsed, match=r"^after 3 steps: kl is above 10 .*guard.action is stop.*last \(step 3\)"):
        fitted(config, always)
    assert state_of(config)["step"] == 3
    resumed = changed(config, train={"resume": True})
    with pytest.raises(Collapsed, match="^after 3 steps: kl is above 10"):
        fitted(resumed)
    assert len(rows_of(config)) == 3
    fitted(changed(resumed, guard={"action": "warn"}))
    assert state_of(config)["step"] == 6


def test_the_exit_code_of_a_run_that_an_alarm_ended(config, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))

    def ended(config):
        raise Collapsed("after 3 steps: kl is above 10.")

    monkeypatch.setattr("grade.commands.train.train", ended)
    assert cli.main(["train", str(tmp_path / "config.yaml")]) == 3
    assert "grade: error: after 3 steps" in capsys.readouterr().err


# -- going back --------------------------------------------------------------------------------------------------

COLLAPSE = measuring(
    "unique_token_ratio", 0.01, lambda trainer: trainer.step in (3, 4) and trainer.guard.rate_factor == 1
)
"""Found after the fifth step of a run's first try; the second step was the last within the bounds that is saved."""


@pytest.fixture(scope="module")
def went_back(tiny_model, tiny_data, shared_output, tmp_path_factory):
    """A run that went back from its fifth step and was never stopped."""
    config = returning_in(tiny_model, tiny_data, shared_output, tmp_path_factory.mktemp("whole") / "run")
    fitted(config, COLLAPSE)
    return config


def test_a_rollback(went_back, tmp_path):
    """Everything is put back: from there on the run is one that begins there with a lower rate."""
    rows, run_dir = rows_of(went_back), Path(went_back.run_dir)
    assert [row["step"] for row in rows] == list(range(6))
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-3] * 2 + [2.5e-4] * 4)
    assert [row["guard/rollbacks"] for row in rows] == [0, 0, 1, 1, 1, 1]
    aside = timeless(run_dir / "rollbacks" / "1-metrics.jsonl")
    assert [row["step"] for row in aside if "loss" in row] == [2, 3, 4] and aside[-1]["guard/alarms"] == 1
    (noted,) = record_of(went_back)["guard"]["rollbacks"]
    assert (noted["from_step"], noted["to_step"], noted["rate_factor"]) == (5, 2, 0.25)
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    assert [row["step"] for row in evaluation["validation"]] == [0, 2, 4, 6]

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("reward")] == list(range(6))
    assert [event.step for event in events.Scalars("validation/reward")] == [0, 2, 4, 6]

    other = changed(went_back, guard={"action": "warn"}, train={"run_dir": str(tmp_path / "other")})

    def slower(trainer):
        begin = trainer.optimization.begin

        def begun(step):
            trainer.optimization.rate_factor = 0.25 if step >= 2 else 1.0
            begin(step)

        trainer.optimization.begin = begun

    fitted(other, slower)
    for name in ("adapter_model", "trainer_state"):
        files = [Path(c.run_dir) / "checkpoints" / "last" / f"{name}.safetensors" for c in (went_back, other)]
        assert files[0].read_bytes() == files[1].read_bytes()


def ended_by(what, moment):
    """A run's trainer that ends at a moment, as if its process had been killed there, or was asked to stop in a step.

    Args:
        moment: (step, factor of the learning rate) of a step; or what is about to be done in a rollback.
    """

    def end(*_):
        raise KeyboardInterrupt

    def prepare(trainer):
        COLLAPSE(trainer)
        if moment == "set aside":
            trainer.checkpoints.save_last = partial(end_if, trainer, trainer.checkpoints.save_last)
        elif moment == "saved":
            set_aside = RunLog.set_aside

            def then_end(log, *arguments):
                set_aside(log, *arguments)
                log.cut = end

            what.setattr(RunLog, "set_aside", then_end)
        else:
            go = trainer.train_step

            def last():
                if (trainer.step, trainer.guard.rate_factor) == moment[:2]:
                    end() if len(moment) == 2 else signal.raise_signal(moment[2])
                return go()

            trainer.train_step = last

    def end_if(trainer, save, *arguments):
        return end() if trainer.guard.rate_factor < 1 else save(*arguments)

    return prepare


def test_a_run_that_goes_back_ends_as_one_that_was_never_stopped(returning, went_back, keyboard, monkeypatch):
    """Stopped between two checkpoints, killed in the collapse, twice while it goes back, and ended twice later on.
    Earlier checkpoints to go on from are not compared: a run that was stopped saves at other steps."""
    config = changed(returning, train={"resume": "auto"})
    moments = [(2, 1.0, signal.SIGINT), (4, 1.0), "set aside", "saved", (3, 0.25), (4, 0.25, signal.SIGINT)]
    for moment in moments:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            fitted(config, ended_by(patch, moment))
    fitted(config, COLLAPSE)
    for run_dir in (config.run_dir, went_back.run_dir):
        for earlier in (Path(run_dir) / "checkpoints").glob("resume-*"):
            shutil.rmtree(earlier)
    assert differences(Path(config.run_dir), Path(went_back.run_dir)) == []


def test_rollbacks_come_to_an_end(returning, capfd):
    config = changed(returning, guard={"max_rollbacks": 2})
    always = measuring("kl", 50.0, lambda trainer: trainer.step >= 3)
    with pytest.raises(Collapsed, match=r"^after 5 steps: .*guard.max_rollbacks is 2.*last \(step 5\)"):
        fitted(config, always)
    said = " ".join(capfd.readouterr().err.split())
    assert "The run goes back from step 5 to step 2, and on with 0.0625 times train.learning_rate" in said
    state = state_of(config)
    assert (state["step"], state["guard"]["rate_factor"]) == (5, 0.25**2)
    assert [len(timeless(path)) for path in sorted(Path(config.run_dir).glob("rollbacks/*metrics*"))] == [4, 4]
    with pytest.raises(Collapsed, match="^after 5 steps"):
        fitted(changed(config, train={"resume": True}), always)
    clear(Path(config.run_dir))
    assert [path.name for path in Path(config.run_dir).iterdir()] == [MARKER]


def test_a_run_that_collapses_at_once_goes_back_to_its_start(returning):
    at_once = measuring("kl", 50.0, lambda trainer: trainer.guard.rate_factor == 1)
    trainer = fitted(changed(returning, guard={"alarm_steps": 1}), at_once)
    assert trainer.step == 6 and record_of(returning)["guard"]["rollbacks"][0]["to_step"] == 0


def test_a_policy_beyond_a_bound_is_not_the_best(returning):
    """Unless there is no other: what a rollback goes back to is never earlier than the best."""
    fitted(
        changed(returning, guard={"alarm_steps": 5}, train={"learning_rate": 1e-2}),
        measuring("kl", 50.0, lambda trainer: trainer.step in (3, 5)),
    )
    assert state_of(returning)["best"]["step"] == 2 and state_of(returning, "rollback")["step"] == 2


def improving(trainer):
    """Every validation is better than those before."""
    evaluate = trainer.evaluator.evaluate

    def evaluated(split, progress, stop, step, **options):
        row = evaluate(split, progress, stop, step, **options)
        return replace(row, reward=float(step), details={})

    trainer.evaluator.evaluate = evaluated


def test_what_a_rollback_goes_back_to_is_not_before_the_best(returning):
    """A checkpoint of an earlier session's, whose best another one has replaced, has no best to go back to."""
    fitted(changed(returning, train={"steps": 2}), improving)
    resumed = changed(returning, train={"resume": True, "steps": 4})
    fitted(changed(resumed, guard={"action": "warn"}), improving)
    assert state_of(returning, "rollback")["step"] == 2 and state_of(returning)["best"]["step"] == 4

    def collapsing(trainer):
        improving(trainer)
        measuring("kl", 50.0, lambda trainer: trainer.guard.rate_factor == 1)(trainer)

    fitted(changed(resumed, train={"steps": 8}), collapsing)
    (noted,) = record_of(returning)["guard"]["rollbacks"]
    assert (noted["from_step"], noted["to_step"]) == (6, 4)
    best = Path(returning.run_dir) / "checkpoints" / "best"
    assert state_of(returning)["best"]["step"] == verified_step(best) == 8


def test_a_checkpoint_to_go_back_to_goes_with_the_steps_after_it(returning):
    """Where a run goes on from an earlier checkpoint, since its last one is damaged."""
    kept = changed(returning, train={"keep_checkpoints": 3})
    fitted(kept)
    last = Path(returning.run_dir) / "checkpoints" / "last"
    sound = last.with_name("rollback")
    assert verified_step(sound) == 6
    (last / "adapter_model.safetensors").write_bytes(b"")
    going_on = changed(kept, train={"resume": True, "steps": 7}, guard={"action": "warn"})

    def at_once(trainer):
        trainer.train_step = lambda: pytest.fail(f"{sound} is there") if sound.exists() else stop()

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(going_on, at_once)
    assert verified_step(last) == 4


def test_settings_that_cannot_work_are_refused(config, tmp_path):
    for changes, words in (
        ({"generation": {"ignore_eos": True}, "guard": {"max_clipped_ratio": 0.5}}, "guard.max_clipped_ratio watches"),
        (
            {"guard": {"action": "stop", "min_unique_token_ratio": None, "min_entropy": None, "max_kl": None}},
            "guard.action is stop, but there is nothing",
        ),
        (
            {
                "guard": {"action": "rollback"},
                "rollout": {"source": str(tmp_path / "ids.jsonl")},
                "method": {"estimator": "rao"},
            },
            "guard.action=rollback makes steps again",
        ),
    ):
        with pytest.raises(GradeError, match=words):
            validate(changed(config, **changes))
    with pytest.raises(GradeError, match="guard.action is rollback, but a comparison is of runs of equal cost"):
        run_comparison(changed(config, guard={"action": "rollback"}), ["reinforce"], [0])
