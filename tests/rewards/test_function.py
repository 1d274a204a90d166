"""Plain functions as rewards: what they are called with, what they may return, and where they come from."""

from __future__ import annotations

import json
import math
import re
from functools import partial

import pytest
import torch
from rollouts import draw
from tiny import tiny_policy
from tiny_run import changed, stopped_after, timeless, trainer_of, with_train

from grade.commands.train import train
from grade.config import validate
from grade.config.reading import load_config
from grade.config.reward import FunctionTerm
from grade.errors import GradeError
from grade.model.checkpoint import load_state
from grade.rewards.function import FunctionReward, load_function
from grade.tasks.base import Task


class Questions(Task):
    """Two prompts with a column, as conversations where asked."""

    name = "questions"

    def __init__(self, chat=False):
        self.chat = chat

    def prompts(self, split, tokenizer, limit=None):
        return [[5, 9], [7]][:limit]

    def describe(self):
        return {"task": self.name, "splits": {}}

    def columns(self, split, index):
        return {"answer": [f"{split} {i}" for i in index]}

    def conversations(self, split, index):
        return [[{"role": "user", "content": f"{split} {i}"}] for i in index] if self.chat else None


@pytest.fixture(scope="module")
def rollout():
    return draw(tiny_policy(), [[5, 9], [7]], copies=2, max_new_tokens=4).of("policy", [1, 0])


def reward_of(function, task=None):
    return FunctionReward(function, tiny_policy().tokenizer, task)


@pytest.mark.parametrize("chat", [False, True])
def test_a_function_is_called_as_trl_calls_it(rollout, chat):
    seen = {}

    def f(prompts, completions, answer, length=3, **others):
        seen.update(prompts=prompts, completions=completions, answer=answer, length=length, others=others)
        return [1, None, 0.5, True]

    score = reward_of(f, Questions(chat)).score(rollout)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, torch.tensor([1, math.nan, 0.5, 1]), equal_nan=True)
    texts = [" ".join(map(str, row[mask].tolist())) for row, mask in zip(rollout.tokens, rollout.mask, strict=True)]
    assert seen["answer"] == ["policy 1", "policy 1", "policy 0", "policy 0"] and seen["length"] == 3
    assert seen["others"] == {"completion_ids": rollout.real_tokens()}
    if chat:
        assert seen["prompts"][0] == [{"role": "user", "content": "policy 1"}]
        assert seen["completions"] == [[{"role": "assistant", "content": text}] for text in texts]
    else:
        assert seen["prompts"] == ["5 9", "5 9", "7", "7"] and seen["completions"] == texts


def test_a_response_keeps_its_row_however_a_batch_is_cut(rollout):
    """Micro-batches by length, and halves of a group."""

    def f(completions, answer):
        return [float(text.split()[0]) + 100 * float(a.split()[1]) for text, a in zip(completions, answer, strict=True)]

    reward = reward_of(f, Questions())
    whole = dict(zip(rollout.rows[:, 0].tolist(), reward.score(rollout).tolist(), strict=True))
    rollout.samples_per_prompt = 1
    for size in (1, 3):
        for part in rollout.micro_batches(size, by_length=True):
            assert reward.score(part).tolist() == [whole[row] for row in part.rows[:, 0].tolist()]
    rollout.samples_per_prompt = 2


def fails(completions):
    return [1 / 0 for _ in completions]


async def later(completions):
    return [0.0 for _ in completions]


class Judge:
    async def __call__(self, completions):
        return [0.0 for _ in completions]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (fails, "the reward function fails failed .ZeroDivisionError: division by zero.. Mend it"),
        (lambda completions: [1.0], "returned 1 values for 4 responses"),
        (lambda completions: [math.nan] * 4, "returned 'nan' for response 0 of 4. Return a finite number, or None"),
        (lambda completions: [1, 2, "good", 3], "returned 'good' for response 2 of 4"),
        (lambda completions: 3.0, "returned float. Return a list of 4 numbers"),
        (lambda completions: torch.tensor([1.0, math.inf, 0, 0]), "returned 'inf' for response 1 of 4"),
        (
            lambda completions, solution: [],
            "asks for solution, and there is prompts, completions, completion_ids, answer",
        ),
        (later, "reward function later: it is async"),
        (Judge(), "reward function Judge: it is async"),
        (lambda completions: later(completions), "returned a coroutine"),
        (Judge, "it is a class"),
        (3, "it is int, which cannot be called"),
    ],
)
def test_what_a_function_may_not_do(rollout, function, message):
    with pytest.raises(GradeError, match=message):
        reward_of(function, Questions()).score(rollout)


def test_prompts_from_elsewhere_have_no_columns(rollout):
    foreign = draw(tiny_policy(), [[5]], max_new_tokens=4)
    with pytest.raises(GradeError, match="asks for answer.* Prompts of rollout.source have no columns"):
        reward_of(lambda completions, answer: [0.0], Questions()).score(foreign)
    assert reward_of(lambda completions, **columns: [len(columns)], Questions()).score(foreign).tolist() == [2.0]


FILE = """
from dataclasses import dataclass

@dataclass
class Rule:
    word: str

def good(completions, **columns):
    return [float("good" in text) for text in completions]

def broken(completions):
    raise ValueError("no verifier here")

async def slow(completions):
    return []

NUMBER = 3
"""


def test_a_function_of_a_file(tmp_path, rollout):
    path = tmp_path / "rewards.py"
    path.write_text(FILE)
    loaded = load_function(f"{path}:good")
    assert loaded.function(completions=["a good", "a"]) == [1.0, 0.0] and loaded.name == "good"
    reward = FunctionReward(loaded.function, tiny_policy().tokenizer, loaded=loaded)
    kept = reward.keep(tmp_path)["reward_functions"]
    assert kept == [{"file": str(path), "function": "good", "sha256": loaded.sha256}]
    before = reward.identity()
    path.write_text(FILE + "# changed\n")
    again = load_function(f"{path}:good")
    assert FunctionReward(again.function, None, loaded=again).identity() != before
    broken = load_function(f"{path}:broken")
    with pytest.raises(GradeError, match=f"{path}:broken failed .ValueError in line 12: no verifier here"):
        FunctionReward(broken.function, tiny_policy().tokenizer, loaded=broken).score(rollout)


class Longer:
    def __call__(self, completions):
        return [1.0] * len(completions)


class Shorter:
    def __call__(self, completions):
        return [-1.0] * len(completions)


def at_least(least, completions):
    return [float(len(text) >= least) for text in completions]


def typed(body, head="f(completions)"):
    """A function without source, as one typed at a prompt."""
    exec(f"def {head}: return [{body} for c in completions]", made := {})
    return made["f"]


@pytest.mark.parametrize(
    ("one", "same", "others"),
    [
        (Longer(), Longer(), [Shorter()]),
        (partial(at_least, 3), partial(at_least, 3), [partial(at_least, 4), partial(typed("len(c)"), 3)]),
        (partial(Longer(), completions=[]), partial(Longer(), completions=[]), [partial(Shorter(), completions=[])]),
        (
            typed("c.count('a')"),
            typed("c.count('a')"),
            [typed("c.count('b')"), typed("c.index('a')"), typed("c.count('a')", "f(completions, least=1)")],
        ),
    ],
)
def test_a_function_is_known_by_what_it_does(one, same, others):
    known = FunctionReward(one, None).identity()
    assert known == FunctionReward(same, None).identity()
    for other in others:
        reward = FunctionReward(other, None)
        reward.name = FunctionReward(one, None).name  # the name tells nothing
        assert known != reward.identity()
    with pytest.raises(GradeError, match="the reward function fsum has neither source nor code"):
        FunctionReward(math.fsum, None).identity()


@pytest.mark.parametrize(
    ("content", "called", "message"),
    [
        (None, "rewards.py:f", "rewards.py cannot be read .there is no such file"),
        (FILE, "rewards.py:better", "has nothing called better. It has good, broken, slow"),
        (FILE, "rewards.py:NUMBER", "it is int, which cannot be called"),
        (FILE, "rewards.py:slow", "it is async"),
        (FILE, "rewards.py", "write FILE.py:NAME"),
        ("x = \n", "rewards.py:f", r"cannot be run .SyntaxError in line 1: invalid syntax"),
        ("import missing_module\n", "rewards.py:f", "cannot be run .ModuleNotFoundError in line 1: No module named"),
        ("raise SystemExit(3)\n", "rewards.py:f", "cannot be run .SystemExit in line 1: 3"),
    ],
)
def test_what_a_file_may_lack(tmp_path, content, called, message):
    if content is not None:
        (tmp_path / "rewards.py").write_text(content)
    with pytest.raises(GradeError, match=rf"^reward.function={re.escape(str(tmp_path))}.*{message}"):
        load_function(f"{tmp_path}/{called}")


REWARDS = """
def short(completions, **columns):
    return [-len(text) / 100 if i % 5 else None for i, text in enumerate(completions)]

def good(prompts, completions):
    return [float("good" in text) for text in completions]
"""


@pytest.fixture
def with_functions(tiny_config, tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(REWARDS)
    evaluation = {"every": 4, "test_prompts": 0, "validation_prompts": 4}
    config = changed(tiny_config, evaluation=evaluation, train={"tensorboard": False, "save_every": 2})
    return config, path


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_run_on_functions_alone_needs_no_labels(with_functions, monkeypatch):
    config, path = with_functions
    monkeypatch.setattr("grade.rewards.loading.HeadTraining", None)  # a head would be trained with it
    config = changed(config, method={"name": "reinforce"}, reward={"function": f"{path}:short"}, train={"steps": 2})
    validate(config)
    train(config)
    run = json.loads((path.parent / "run" / "run.json").read_text())
    assert run["reward"] == f"what {path}:short returns" and "reward_head" not in run
    assert run["reward_functions"][0]["function"] == "short" and len(run["reward_functions"][0]["sha256"]) == 64
    assert all(row["rewards/short/mean"] < 0 for row in rows(path.parent / "run") if "loss" in row)
    found = json.loads((path.parent / "run" / "evaluation.json").read_text())["validation"][0]
    assert found["details"]["rewards/short/mean"] < 0 <= found["details"]["rewards/short/std"]


def test_a_resumed_run_of_a_sum_repeats_the_uninterrupted_one(with_functions, tmp_path):
    """With running means, which are part of the checkpoint; another file is another reward."""
    config, path = with_functions
    functions = [
        {"function": f"{path}:short", "name": "length", "weight": 0.5, "normalize": True},
        {"function": f"{path}:good", "offset": 1.0},
    ]
    file = tmp_path / "terms.yaml"
    file.write_text(json.dumps({"reward": {"functions": functions, "weight": 2.0, "normalize": True}}))
    config = changed(
        config, reward={name: getattr(load_config(file).reward, name) for name in ("functions", "weight", "normalize")}
    )
    whole, stopped = (with_train(config, run_dir=str(tmp_path / name)) for name in ("whole", "stopped"))
    train(whole)
    stopped_after(stopped)
    train(with_train(stopped, resume=True))
    assert timeless(tmp_path / "whole" / "metrics.jsonl") == timeless(tmp_path / "stopped" / "metrics.jsonl")
    last = [row for row in rows(tmp_path / "whole") if "loss" in row][-1]
    assert {"rewards/model/mean", "rewards/length/std", "rewards/good/mean"} <= set(last)
    run = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert [kept["function"] for kept in run["reward_functions"]] == ["short", "good"] and "reward_head" in run
    assert run["reward"].startswith("2 × the probability of ") and "(normalised) + 0.5 × what" in run["reward"]
    path.write_text(REWARDS + "# another\n")
    with pytest.raises(GradeError, match="was started with something else: the reward"):
        train(with_train(changed(whole, train={"steps": 5}), resume=True))


def test_what_was_done_before_a_function_fails_is_saved(with_functions):
    config, path = with_functions
    path.write_text(
        "calls = []\ndef f(completions):\n    calls.append(1)\n"
        "    assert len(calls) < 4\n    return [0.0] * len(completions)\n"
    )
    config = changed(config, method={"name": "reinforce"}, reward={"function": f"{path}:f"}, train={"save_every": 50})
    with pytest.raises(
        GradeError, match=r"f failed \(AssertionError in line 4\).* Kept is checkpoints/last \(step 2\)"
    ):
        train(config)  # the first call is the base model's validation
    assert load_state(path.parent / "run" / "checkpoints" / "last")["step"] == 2


def test_a_function_is_not_called_for_what_is_only_tried(with_functions):
    """Before its first step a run tries one for its memory."""
    config, path = with_functions
    path.write_text("calls = []\ndef f(completions):\n    calls.append(1)\n    return [0.0] * len(completions)\n")
    trainer_of(changed(config, reward={"functions": [FunctionTerm(function=f"{path}:f")], "weight": 1.0}))
    assert load_function(f"{path}:f").function.__globals__["calls"] == []


def test_a_mistake_of_a_function_is_told_before_any_update(with_functions):
    config, path = with_functions
    path.write_text("def f(completions):\n    return [0.0]\n")
    config = changed(config, method={"name": "reinforce"}, reward={"function": f"{path}:f"})
    with pytest.raises(GradeError, match="returned 1 values for 4 responses"):
        train(config)
    assert not (path.parent / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"function": "f.py:f"}, "method.name=grade-ste backpropagates .* the reward is a function alone .f.py:f; "),
        ({"function": "f.py"}, "reward.function is f.py: write FILE.py:NAME"),
        ({"bridge": "retokenize"}, "reward.bridge is retokenize, but reward.model is null"),
        ({"bridge": "retokenize", "model": "some/bert"}, "reward.bridge=retokenize scores the text without a gradient"),
        ({"function": "f.py:model", "weight": 1.0}, "two terms of the reward are called model"),
    ],
)
def test_settings_that_cannot_work(tiny_config, settings, message):
    with pytest.raises(GradeError, match=message):
        validate(changed(tiny_config, reward=settings))


def test_what_a_function_changes_in_other_settings(tiny_config):
    config = changed(tiny_config, reward={"function": "f.py:f", "weight": 0.5})
    validate(config)
    with pytest.raises(GradeError, match="method.replay_dropout is true, and reward.functions are followed"):
        validate(changed(config, method={"replay_dropout": True}))
    grpo = changed(config, method={"name": "grpo"}, generation={"samples_per_prompt": 2})
    token = changed(grpo, method={"grpo": {"level": "token"}})
    with pytest.raises(GradeError, match="level=token needs the reward after every token, which a function"):
        validate(token)
