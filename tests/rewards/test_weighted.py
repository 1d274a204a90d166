"""Several rewards as one: how they add up, their running means, and their gradients and names in an evaluation."""

from __future__ import annotations

import math

import pytest
import torch
from classifiers import classifier
from published import gradients, relative_error
from rollouts import draw
from tiny import KeepDouble, tiny_policy, tiny_reward

from grade.errors import GradeError
from grade.replay.replay import ReplaySettings, replay
from grade.replay.score import ScoreSettings, score
from grade.rewards.base import DifferentiableReward, RewardFunction
from grade.rewards.classifier import ClassifierReward
from grade.rewards.weighted import Moments, Term, WeightedReward
from grade.training.evaluation import _of_terms


class Length(RewardFunction):
    """Of every second response only."""

    def score(self, rollout):
        length = rollout.mask.sum(1).double()
        return torch.where(torch.arange(len(length)) % 2 == 1, torch.nan, length)

    def details(self, rollout, values):
        return {"long": (values > 4).float()}


def test_terms_add_up():
    """With weights, scales and offsets; a function that does not apply gives nothing, its offset included."""
    policy = tiny_policy()
    rollout, head = draw(policy), tiny_reward(policy)
    alone = score(policy, head, rollout, ScoreSettings())
    reward = WeightedReward([Term(head, "model", 2.0), Term(Length(), "length", 0.5, -1.0, 3.0)])
    both = score(policy, reward, rollout, ScoreSettings())
    length = rollout.mask.sum(1).double()
    given = torch.where(torch.arange(len(length)) % 2 == 1, 0.0, 0.5 * (3.0 - length))
    torch.testing.assert_close(both.reward, 2 * alone.reward.double() + given)
    assert torch.equal(both.terms["model"], alone.reward) and alone.terms == {}
    assert both.terms["length"].isnan().tolist() == [False, True] * 2
    assert reward.raises == "2 × the probability of a positive review + 0.5 × (-1 × the reward + 3)"
    found = reward.measures(rollout, both.reward, both.terms)["long"]
    assert found.tolist() == (both.terms["length"] > 4).float().tolist()


def test_the_gradient_is_the_weighted_sum_of_gradients():
    """Through the base, through a classifier's own table and beside a function, in one replay."""
    found = []
    with KeepDouble():
        policy = tiny_policy(dtype=torch.float64)
        rollout = draw(policy, max_new_tokens=5)
        parts = [tiny_reward(policy), ClassifierReward(classifier(dtype=torch.float64), 1, "response")]
        terms = [Term(parts[0], "a", 0.5, 3.0), Term(Length(), "f"), Term(parts[1], "b", -2.0, 1.0, 7.0)]
        settings = ReplaySettings(tau=1.0, max_hops=4, hop_tol=0.0)
        for reward in (WeightedReward(terms), *parts):
            weights = dict(reward_weight=torch.ones(len(rollout)), kl_weight=torch.zeros(rollout.mask.shape))
            replay(policy, reward, rollout, settings, **weights)
            found.append(gradients(policy))
    assert relative_error(found[0], 1.5 * found[1] - 2 * found[2]) < 1e-12 and min(g.norm() for g in found[1:]) > 1e-3


def test_running_mean_and_deviation():
    values, running = torch.randn(50, dtype=torch.float64) * 3 + 1000, Moments()
    assert torch.equal(running.normalized(values), values)
    for part in values.split([1, 7, 0, 42]):
        running.add(len(part), part.sum().item(), part.square().sum().item())
    torch.testing.assert_close(
        running.normalized(values), (values - values.mean()) / values.std(), rtol=1e-6, atol=1e-6
    )


def test_normalisation_counts_in_training_alone_and_is_kept():
    policy = tiny_policy()
    rollout = draw(policy)
    reward = WeightedReward([Term(Length(), "length", 2.0, normalize=True)])
    reward.observe({"length": (4, 20.0, 112.0)})  # mean 5, deviation 2
    again = WeightedReward([Term(Length(), "length", 2.0, normalize=True)])
    again.load_state_dict(reward.state_dict())
    plain = again.valued(rollout, None).total
    trained = again.valued(rollout, None, training=True).total
    applies = torch.arange(len(rollout)) % 2 == 0
    expected = torch.where(applies, (plain - 10) / 2, 0.0)
    torch.testing.assert_close(trained, expected)
    torch.testing.assert_close(again.function_shares(again.judge(rollout))[applies, 0], expected[applies])


def test_an_evaluation_leaves_out_where_a_term_does_not_apply():
    assert _of_terms([{"a": 1.0, "b": math.nan}, {"a": math.nan, "b": math.nan}, {"a": 3.0, "b": math.nan}]) == {
        "rewards/a/mean": 2.0,
        "rewards/a/std": pytest.approx(math.sqrt(2)),
    }


class Wrong(DifferentiableReward):
    shares_base_pass = True

    def value(self, rollout, base, fed=(), *, activation_checkpointing=False):
        return base.response[:, :, 0]


def test_what_cannot_be_a_term():
    length = Term(Length(), "length")
    for terms, message in (
        ([], "has none"),
        ([length, length], "two terms of the reward are called 'length'"),
        ([Term(WeightedReward([length]), "sum")], "is itself a sum"),
    ):
        with pytest.raises(GradeError, match=message):
            WeightedReward(terms)
    policy = tiny_policy()
    for reward in (Wrong(), WeightedReward([Term(Wrong(), "wrong")])):
        with pytest.raises(GradeError, match=r"reward Wrong gave torch.float32 of shape \[4, 12\] for 4 responses"):
            score(policy, reward, draw(policy), ScoreSettings())
