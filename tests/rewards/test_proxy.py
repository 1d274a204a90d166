"""A proxy of a program: what it learns and where it is kept, where it counts, and runs that follow it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from published import relative_error
from rollouts import draw, gradient
from tiny import VOCAB, tiny_policy, tiny_reward
from tiny_run import changed, timeless

from grade.built_in import countdown_model as built_in
from grade.cli import main
from grade.commands.reward import train_reward
from grade.commands.train import train
from grade.config import GenerationConfig, RewardConfig, default_methods, validate
from grade.config.reading import load_config
from grade.errors import GradeError
from grade.replay.replay import ReplaySettings
from grade.replay.score import ScoreSettings, score
from grade.rewards import loading
from grade.rewards.base import RewardFunction
from grade.rewards.loading import load_reward, proxy_training
from grade.rewards.proxy import ProxyTraining
from grade.rewards.shared import head_lines
from grade.rewards.weighted import Term, WeightedReward
from grade.tasks import countdown, load_task
from grade.training.api import GradeTrainer
from grade.training.setup import set_up

ALONE = SimpleNamespace(device=torch.device("cpu"), is_main_process=True, num_processes=1)
SETTINGS = RewardConfig(hidden_size=16, epochs=20, learning_rate=1e-2, proxy=True, proxy_samples=4)
GENERATION = GenerationConfig(max_new_tokens=8, min_new_tokens=4, top_k=30)


class LowIds(RewardFunction):
    """The share of a response's tokens with low ids; a solution has more than half."""

    raises = "the share of low ids"

    def __init__(self, policy=None, task=None):
        pass

    def score(self, rollout):
        low = (rollout.tokens < VOCAB // 2) & rollout.mask
        return low.sum(1).float() / rollout.mask.sum(1)

    def details(self, rollout, values):
        return {"solve_rate": (values > 0.5).float()}


class MostlyLow(LowIds):
    def score(self, rollout):
        return (super().score(rollout) > 0.5).float()


class Silent(LowIds):
    def score(self, rollout):
        return super().score(rollout) * 0


class Prompts:
    """Short prompts of random ids, others in each split."""

    def prompts(self, split, tokenizer, limit=None):
        generator = torch.Generator().manual_seed(len(split))
        return torch.randint(4, VOCAB, (200, 3), generator=generator).tolist()


class OneHeldOut(Prompts):
    def prompts(self, split, tokenizer, limit=None):
        return super().prompts(split, tokenizer, limit)[: 1 if split == "validation" else None]


def fitted(program, prompts=None, **settings):
    prompts = prompts or Prompts()
    training = ProxyTraining(replace(SETTINGS, **settings), 11, "", tiny_policy(), prompts, program, GENERATION)
    return training.train()


# --- what is learnt ---


def test_a_proxy_estimates_what_the_program_says_of_the_bases_responses():
    head, report = fitted(LowIds())
    assert head.label_type == report["label_type"] == "numbers"
    assert report["trained_on"] == report["held_out"] == 800 and report["judged_length"] == 11
    assert report["correlation"]["11 tokens"] > 0.25 and report["correlation_within_prompts"]["11 tokens"] > 0.25
    assert 0 < report["mean_reward"]["trained_on"] < 1
    (line,) = head_lines(report)
    assert "correlation within prompts" in line and line.endswith("(the length it will judge), 800 responses")
    again, _ = fitted(LowIds())
    assert torch.equal(again.last.weight, head.last.weight)
    other, _ = fitted(LowIds(), seed=1)
    assert not torch.equal(other.last.weight, head.last.weight)


def test_yes_or_no_is_learnt_as_classes():
    head, report = fitted(MostlyLow())
    assert head.label_type == report["label_type"] == "classes"
    assert report["accuracy"]["11 tokens"] > 0.58 and report["correlation"]["11 tokens"] > 0.2


def test_one_response_a_prompt_has_no_others_to_go_with():
    _, report = fitted(LowIds(), proxy_samples=1)
    assert report["trained_on"] == 200 and report["correlation_within_prompts"] == {"11 tokens": None}
    assert "correlation within prompts undefined" in head_lines(report)[0]


def test_a_single_held_out_response_goes_with_nothing():
    _, report = fitted(LowIds(), OneHeldOut(), proxy_samples=1)
    assert report["held_out"] == 1 and report["correlation"] == {"11 tokens": None}
    json.dumps(report, allow_nan=False)


class HalfHeldOut(MostlyLow):
    """Yes or no of what is learnt from, and something between of what is held out."""

    def score(self, rollout):
        return super().score(rollout) * (0.5 if rollout.split == "validation" else 1.0)


def test_no_part_of_a_reward_is_rounded_to_a_class():
    head, report = fitted(HalfHeldOut())
    assert head.label_type == "numbers" and report["mean_reward"]["held_out"] < 0.5


def test_a_program_that_says_the_same_of_everything_is_refused():
    with pytest.raises(GradeError, match="reward.proxy: the share of low ids is 0 for each of 800 .* nothing to learn"):
        fitted(Silent())


# --- where it counts ---


def both(policy, *, normalize=False):
    verifier = Term(LowIds(), "verifier", 0.5, 2.0, 1.0, normalize)
    return WeightedReward([verifier, Term(tiny_reward(policy), "proxy", 3.0, proxy=True)])


def test_evaluations_and_methods_of_values_leave_it_out():
    policy = tiny_policy()
    reward, rollout = both(policy), draw(policy)
    evaluated, trained = (score(policy, reward, rollout, ScoreSettings(training=t)) for t in (False, True))
    verified = 0.5 * (2 * LowIds().score(rollout).double() + 1)
    proxy = score(policy, tiny_reward(policy), rollout, ScoreSettings()).reward.double()
    torch.testing.assert_close(evaluated.reward, verified)
    torch.testing.assert_close(trained.reward, verified + 3 * proxy)
    torch.testing.assert_close(evaluated.terms["proxy"].double(), proxy)  # it is told
    by_value = reward.by_value()
    torch.testing.assert_close(score(policy, by_value, rollout, ScoreSettings(training=True)).reward, verified)
    assert not by_value.differentiable and by_value.by_value() is by_value
    assert reward.raises.endswith("+ 3 × the probability of a positive review (in training alone)")
    alone = LowIds()
    assert WeightedReward([Term(alone, "verifier"), reward.terms[1]]).by_value() is alone
    counted = [replace(reward.terms[0]), replace(reward.terms[1], proxy=False)]
    assert WeightedReward(counted).identity() != reward.identity()


def test_the_gradient_is_that_of_the_weighted_proxy():
    settings = ReplaySettings(tau=1.0, estimator="rao", max_hops=11, hop_tol=0.0, training=True)
    found = []
    for make in (both, lambda policy: WeightedReward([Term(tiny_reward(policy), "model", 3.0)])):
        policy = tiny_policy()
        found.append(gradient(policy, make(policy), draw(policy), settings))
    assert found[0].norm() > 0 and relative_error(found[0], found[1]) < 1e-6


def test_running_means_are_those_of_the_whole():
    reward = both(tiny_policy(), normalize=True)
    by_value = reward.by_value()
    by_value.observe({"verifier": (4.0, 2.0, 1.5)})
    state = reward.state_dict()
    assert state["verifier"][0] == 4
    other = both(tiny_policy(), normalize=True)
    rest = other.by_value()
    other.load_state_dict(state)
    assert rest.state_dict() == state


def test_what_cannot_be_a_proxy():
    head = tiny_reward(tiny_policy())
    with pytest.raises(GradeError, match="'verifier' of the reward is a proxy, .* it has none"):
        WeightedReward([Term(LowIds(), "verifier", proxy=True), Term(head, "model")])
    with pytest.raises(GradeError, match="every term of the reward is a proxy"):
        WeightedReward([Term(head, "proxy", proxy=True)])


# --- settings ---


def test_countdown_with_a_proxy_is_for_every_method():
    config = load_config("countdown_small", [])
    for name in ("grade-ste", "grade"):
        wanted = changed(config, method={"name": name, "estimator": "gumbel"})
        with pytest.raises(GradeError, match="this task's reward is a program .* or set reward.proxy to true"):
            validate(wanted)
        validate(changed(wanted, reward={"proxy": True}))
    assert set(default_methods(changed(config, reward={"proxy": True}))) > {"grade-ste", "grade", "grpo", "grpo-token"}
    assert "grade-ste" not in default_methods(config)


@pytest.mark.parametrize(
    "name, settings, words",
    [
        ("demo", {"reward": {"proxy": True}}, "reward.proxy is true, but task.name=demo is not judged by a program"),
        ("countdown_small", {"reward": {"proxy": True, "input": "response"}}, "but reward.input is response"),
        (
            "countdown_small",
            {"reward": {"proxy": True, "function": "f.py:proxy"}},
            "two terms of the reward are called proxy .they are the program and its proxy.",
        ),
        (
            "countdown_small",
            {"reward": {"proxy": True}, "method": {"name": "grade-ste", "replay_dropout": True}},
            "method.replay_dropout is true, and the task's program is followed by the probabilities",
        ),
    ],
)
def test_what_cannot_have_a_proxy_is_refused(name, settings, words):
    with pytest.raises(GradeError, match=words):
        validate(changed(load_config(name, []), **settings))


# --- runs ---


@pytest.fixture(scope="module")
def puzzle_model(tmp_path_factory):
    """Folder of Countdown's model after four steps: it solves nothing, so that another program judges it here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(built_in.SETTINGS, "puzzles", 300)
        return built_in.countdown_model(tmp_path_factory.mktemp("cache"), steps=4, progress=False)


@pytest.fixture
def config(puzzle_model, tmp_path, monkeypatch):
    monkeypatch.setattr(countdown, "TEST_PUZZLES", 20)
    monkeypatch.setitem(loading.PROGRAMS, "countdown", LowIds)
    small = {"reward_examples": 24, "policy_examples": 30, "validation_examples": 20}
    return changed(
        load_config("countdown_small", []),
        output_dir=str(tmp_path / "out"),
        model={"name": str(puzzle_model)},
        task=small,
        reward={"proxy": True, "hidden_size": 16, "epochs": 5},
        generation={"max_new_tokens": 6, "top_k": 16, "samples_per_prompt": 2},
        method={"name": "grade-ste"},
        train={"steps": 2, "batch_size": 4, "run_dir": str(tmp_path / "run"), "tensorboard": False},
        evaluation={"every": 2, "validation_prompts": 8, "test_prompts": 0, "batch_size": 8},
    )


def test_a_run_follows_both_and_is_judged_by_the_program(config, tmp_path, capsys):
    train(config)
    run_dir = tmp_path / "run"
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    step = next(row for row in rows if "loss" in row)
    assert step["reward"] == pytest.approx(step["rewards/verifier/mean"])
    assert step["reward_with_proxy"] == pytest.approx(step["reward"] + step["rewards/proxy/mean"])
    assert step["loss"] == pytest.approx(-step["reward_with_proxy"] + config.method.kl_coef * step["kl"])
    record, evaluations = (json.loads((run_dir / name).read_text()) for name in ("run.json", "evaluation.json"))
    for row in evaluations["validation"]:
        assert row["reward"] == pytest.approx(row["details"]["rewards/verifier/mean"])
        assert 0 <= row["details"]["solve_rate"] <= 1 and "rewards/proxy/mean" in row["details"]
    assert record["reward_head"]["unit"] == "responses" and "correlation" in record["reward_head"]
    assert record["reward_head"]["trained_on"] == 24 * 4
    (folder,) = (tmp_path / "out").glob("proxy-*")
    assert (folder / "reward.json").read_text() == (run_dir / "reward" / "reward.json").read_text()
    assert "reward head: held-out" in capsys.readouterr().err
    # The run's own proxy is read again, and is what it was.
    train(changed(config, train={"steps": 3, "resume": True}))
    assert len(list((tmp_path / "out").glob("proxy-*"))) == 1


def test_policy_gradients_take_the_program_alone(config, tmp_path):
    logs = []
    for proxy in (True, False):
        run_dir = tmp_path / f"run-{proxy}"
        own = changed(config, method={"name": "grpo"}, reward={"proxy": proxy}, train={"run_dir": str(run_dir)})
        train(own)
        logs.append(timeless(run_dir / "metrics.jsonl"))
    steps, validations = ([[r for r in log if ("loss" in r) == of_steps] for log in logs] for of_steps in (True, False))
    assert steps[0] == steps[1] and "rewards/proxy/mean" not in steps[0][0]
    with_proxy, without = ([{k: v for k, v in r.items() if "rewards/" not in k} for r in rows] for rows in validations)
    assert with_proxy == [{k: pytest.approx(v) for k, v in row.items()} for row in without]


def test_a_proxy_is_known_by_what_it_comes_from(config, monkeypatch):
    policy = set_up(config, ALONE).policy

    def folder(**settings):
        c = changed(config, **settings)
        return proxy_training(c.reward, policy, load_task(c.task), 38, c.output_dir, c.generation).folder.name

    own = folder()
    assert own == folder(reward={"proxy_weight": 5.0, "weight": 0.5, "max_tokens": 7}, method={"name": "grpo"})
    assert own == folder(generation={"samples_per_prompt": 4}, task={"policy_examples": 20})
    others = [
        folder(reward={"proxy_samples": 3}),
        folder(reward={"seed": 3}),
        folder(task={"reward_examples": 23}),
        folder(task={"countdown": replace(config.task.countdown, partial_credit=False)}),
        folder(generation={"top_k": 8}),
    ]
    monkeypatch.setitem(loading.PROGRAMS, "countdown", MostlyLow)
    assert len({own, *others, folder()}) == 7


def test_other_heads_are_no_proxies(config, tmp_path):
    policy, task = (found := set_up(config, ALONE)).policy, found.task
    (folder,) = (tmp_path / "out").glob("proxy-*")
    more = replace(config.reward, path=str(folder), proxy_samples=7)
    with pytest.raises(GradeError, match="was trained with something else: .*proxy_samples"):
        load_reward(more, policy, task, judged=38, output_dir="", generation=config.generation)


def test_whether_grade_can_follow_the_proxy_is_measured_of_it_alone(config):
    found = GradeTrainer.from_config(config).check_gradient(responses=16, swaps=2)
    assert found.verdict.endswith("Left out, as without a gradient: verifier.")
    assert found.rows[0].swaps > 16 and math.isfinite(found.rows[0].pearson.value)
    with pytest.raises(GradeError, match="has the weight 0 .reward.proxy_weight."):
        GradeTrainer.from_config(changed(config, reward={"proxy_weight": 0.0})).check_gradient(responses=16)


def test_the_command_trains_a_proxy_by_itself(config, tmp_path, capsys):
    assert set(train_reward(config)) == {"38 tokens"}
    assert "Proxy: " in (said := capsys.readouterr().out) and "correlation within prompts" in said
    assert main(["reward", "countdown_small"]) == 2
    assert "Set reward.proxy to true" in capsys.readouterr().err
