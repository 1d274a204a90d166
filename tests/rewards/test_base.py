"""What somebody gets who subclasses a reward or a task: gradients wherever it reads, and defaults for the rest."""

from __future__ import annotations

import math

import pytest
import torch
from classifiers import classifier
from published import gradients, relative_error
from rollouts import draw
from tiny import KeepDouble, TinyTokenizer, tiny_policy, tiny_reward

from grade.errors import GradeError, RewardFailed
from grade.replay.replay import ReplaySettings, replay
from grade.rewards.base import DifferentiableReward, EmbeddingTable, RewardFunction
from grade.rewards.classifier import ClassifierReward
from grade.rewards.function import FunctionReward
from grade.tasks.base import Task


class Sum(DifferentiableReward):
    """Two rewards in one: what shares the base pass, and what reads the response in a table of its own."""

    shares_base_pass = True

    def __init__(self, parts):
        self.parts = parts
        self.tables = [table for part in parts for table in part.tables]

    def value(self, rollout, base, fed=(), *, activation_checkpointing=False):
        fed = list(fed)
        own = [[fed.pop(0) for _ in part.tables] for part in self.parts]
        return sum(part.value(rollout, base, x) for part, x in zip(self.parts, own, strict=True))


def test_the_gradient_of_a_sum_is_the_sum_of_the_gradients():
    """Through the base and through two further models, in one replay without KL."""
    found = []
    with KeepDouble():
        policy = tiny_policy(dtype=torch.float64)
        rollout = draw(policy, max_new_tokens=5)
        parts = [ClassifierReward(classifier(dtype=torch.float64, seed=seed), 1, "response") for seed in (5, 6)]
        parts.insert(1, tiny_reward(policy))
        settings = ReplaySettings(tau=1.0, max_hops=4, hop_tol=0.0)
        for reward in (Sum(parts), *parts):
            weights = dict(reward_weight=torch.ones(len(rollout)), kl_weight=torch.zeros(rollout.mask.shape))
            replay(policy, reward, rollout, settings, **weights)
            found.append(gradients(policy))
    whole, *each = found
    assert relative_error(whole, sum(each)) < 1e-12 and min(g.norm() for g in each) > 1e-3


class Length(RewardFunction):
    def score(self, rollout):
        return rollout.mask.sum(1).float()


class Steps(Length):
    def prefix_values(self, rollout, base):
        raise AssertionError("asked in a trial")


def test_what_a_reward_need_not_say():
    policy = tiny_policy()
    rollout, reward = draw(policy), Length()
    assert not reward.differentiable and reward.inputs(rollout) == []
    assert reward.identity().startswith("test_base.Length ")
    values = reward.value(rollout, None)
    assert torch.equal(values, rollout.mask.sum(1).float()) and reward.details(rollout, values) == {}
    with pytest.raises(GradeError, match="method.grpo.level=token needs .* which Length does not give"):
        reward.prefix_values(rollout, None)
    with pytest.raises(TypeError, match="abstract"):
        RewardFunction()


@pytest.mark.parametrize("level", [True, False])
def test_what_stands_in_for_a_function_has_a_reward_where_it_has(level):
    policy = tiny_policy()
    rollout = draw(policy)
    stand_in = (Steps() if level else Length()).in_trial()
    assert torch.equal(stand_in.value(rollout, None), torch.zeros(len(rollout)))
    if level:
        assert stand_in.prefix_values(rollout, None).shape == (len(rollout), 1 + rollout.tokens.shape[1])
    else:
        with pytest.raises(GradeError, match="which Length does not give"):
            stand_in.prefix_values(rollout, None)


def test_a_reward_is_known_by_its_weights():
    """Those of all its models; another weight is another reward."""
    policy = tiny_policy()
    first, again, other = (tiny_reward(policy, seed=seed) for seed in (1, 1, 2))
    assert first.identity() == again.identity() != other.identity()
    both = Sum([first, other])
    both.modules = [first.head, other.head]
    assert both.identity() not in (first.identity(), other.identity())


def test_what_a_task_need_not_say():
    class Nameless(Task):
        def prompts(self, split, tokenizer, limit=None):
            return [[5], [6]][:limit]

        def describe(self):
            return {"task": self.name, "splits": {}}

    class Numbers(Nameless):
        name = "numbers"

    with pytest.raises(TypeError, match="abstract .*name"):
        Nameless()
    task = Numbers()
    assert task.labels is None and task.examples("reward") == ()
    with pytest.raises(TypeError, match="abstract"):
        Task()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (KeyError("oops"), r"the reward Says failed \(KeyError: .*oops.*\). Mend it, and start another run"),
        (torch.tensor([1.0, math.inf]), "the reward Says gave inf for a response"),
        ([1.0, 2.0], r"the reward Says gave list for 2 responses: it must be a float tensor of shape \[2\]"),
    ],
)
def test_what_somebodys_reward_does_wrong_is_told_by_its_name(said, message):
    class Says(RewardFunction):
        def score(self, rollout):
            if isinstance(said, Exception):
                raise said
            return said

    rollout = draw(tiny_policy(), [[5, 9], [7, 11]], max_new_tokens=2)
    with pytest.raises(GradeError, match=message):
        Says().valued(rollout, None)


class Target(DifferentiableReward):
    """A reward with a table and an identity of its own."""

    def __init__(self, rows, target=1.0):
        self.tables, self.target = [EmbeddingTable(rows)], target

    def value(self, rollout, base, fed=(), *, activation_checkpointing=False):
        return fed[0].sum((1, 2)) * self.target

    def identity(self):
        return f"{super().identity()} and a file"


def test_an_identity_of_its_own_leaves_the_attributes_on():
    one, other = Target(torch.zeros(3, 2)), Target(torch.ones(3, 2))
    assert set(one.attributes()) == {"Target.target", "Target.tables"}
    assert one.attributes()["Target.tables"] != other.attributes()["Target.tables"]
    assert one.attributes()["Target.target"] == "1.0" and one.identity().endswith(" and a file")


def called(completions):
    return [0.0 for _ in completions]


class Halved(FunctionReward):
    share = 0.5

    def score(self, rollout):
        return self.share * super().score(rollout)


class Doubled(ClassifierReward):
    def value(self, rollout, base, fed=(), *, activation_checkpointing=False):
        return 2 * super().value(rollout, base, fed)


def test_the_source_of_a_subclass_counts():
    """Of what has an identity of its own, too."""
    halved, plain = Halved(called, TinyTokenizer()), FunctionReward(called, TinyTokenizer())
    halved.floor = 2
    assert halved.identity() != plain.identity() and halved.identity().endswith(plain.identity())
    assert halved.attributes() == {"Halved.floor": "2"} and plain.attributes() == {}
    model = classifier()
    doubled, plain = Doubled(model, 1, name="a folder"), ClassifierReward(model, 1)
    assert "test_base.Doubled " in doubled.identity() and "Doubled" not in plain.identity()
    assert doubled.attributes()["Doubled.label"] == "1" and plain.attributes() == {}
    assert not any("folder" in text for text in doubled.attributes().values())


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (ValueError("no memory of this prompt"), False),
        (ConnectionError("the server: CUDA error: out of memory"), False),
    ],
)
@pytest.mark.parametrize("kind", ["class", "function"])
def test_running_out_of_memory_in_a_reward_stays_what_it_is(error, kept, kind):
    """For the trainer to say what to lower; what is only called memory is the reward's own failure."""

    def judge(completions):
        raise error

    class Judge(RewardFunction):
        def score(self, rollout):
            raise error

    reward = Judge() if kind == "class" else FunctionReward(judge, TinyTokenizer())
    rollout = draw(tiny_policy(), [[5, 9], [7, 11]], max_new_tokens=2)
    with pytest.raises(type(error) if kept else RewardFailed):
        reward.judge(rollout)
