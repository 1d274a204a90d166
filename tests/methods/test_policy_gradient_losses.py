"""Parts of the policy gradients against numbers worked out by hand, where no exact expectation would show a mistake."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor

from grade.methods.grpo import sequence_advantages, token_advantages
from grade.methods.policy_gradient import TokenMeans, clipped_surrogate
from grade.methods.ppo import gae, value_loss, whitened
from grade.methods.reinforce import MovingAverage, leave_one_out
from grade.methods.services import Services


def close(value, expected, tolerance=1e-6):
    assert torch.allclose(value.double(), torch.as_tensor(expected, dtype=torch.float64), rtol=tolerance, atol=1e-9)


def prefix_mask(lengths, width):
    return torch.arange(width) < tensor(lengths)[:, None]


# -- the clipped surrogate -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ratio, advantage, loss, slope",
    [
        (1.0, 2.0, -2.0, -2.0),  # slope: d loss / d log ratio, -A ratio where it is not clipped
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.6, 0.0),  # a gain beyond 1 + clip_high = 1.3 is not rewarded
        (0.5, 2.0, -1.0, -1.0),  # a loss always counts
        (0.9, -2.0, 1.8, 1.8),
        (0.5, -2.0, 1.6, 0.0),  # nor is a gain below 1 - clip_low = 0.8
        (1.5, -2.0, 3.0, 3.0),
    ],
)
def test_clipped_surrogate(ratio, advantage, loss, slope):
    old = tensor([[-1.5]], dtype=torch.float64)
    logprob = (old + math.log(ratio)).requires_grad_()
    value = clipped_surrogate(logprob, old, tensor([[advantage]], dtype=torch.float64), 0.2, 0.3)
    close(value.detach(), [[loss]])
    close(torch.autograd.grad(value.sum(), logprob)[0], [[slope]])


# -- PPO -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma, gae_lambda", [(1.0, 1.0), (1.0, 0.95), (0.9, 0.7), (0.99, 0.0), (0.0, 0.9)])
def test_gae_is_the_double_sum(gamma, gae_lambda):
    """On ragged responses whose rewards and values at padding are garbage."""
    generator = torch.Generator().manual_seed(3)
    lengths = [1, 2, 5, 7, 4]
    rewards, values = torch.randn(2, len(lengths), 7, generator=generator, dtype=torch.float64)
    expected = torch.zeros_like(rewards)
    for b, n in enumerate(lengths):
        r, v = rewards[b].tolist(), values[b, :n].tolist() + [0.0]
        for t in range(n):
            expected[b, t] = sum(
                (gamma * gae_lambda) ** (s - t) * (r[s] + gamma * v[s + 1] - v[s]) for s in range(t, n)
            )
    close(gae(rewards, values, prefix_mask(lengths, 7), gamma, gae_lambda), expected, 1e-12)


@pytest.mark.parametrize(
    "value, clip, loss, slope",
    [
        (1.3, 0.5, 0.5 * 0.7**2, -0.7),  # within the clip
        (1.3, 0.2, 0.5 * 0.8**2, 0.0),  # moved by 0.2 at most: to 1.2, which is further from the return
        (0.5, 0.2, 0.5 * 1.5**2, -1.5),  # away from the return: the clip would flatter, so it does not apply
        (1.3, 0.0, 0.5 * 0.7**2, -0.7),  # off
    ],
)
def test_value_loss(value, clip, loss, slope):
    """An old value of 1 and a return of 2."""
    values = tensor([[value]], dtype=torch.float64, requires_grad=True)
    out = value_loss(values, tensor([[1.0]]).double(), tensor([[2.0]]).double(), clip)
    close(out.detach(), [[loss]])
    close(torch.autograd.grad(out.sum(), values)[0], [[slope]])


@pytest.mark.parametrize(
    "values, expected, divisor",
    [
        ([1.0, 2.0, 6.0], [-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5], 7**0.5),  # (4 + 1 + 9) / 2
        ([0.1, 0.1 + 1e-8], [-5e-5, 5e-5], 1e-4),  # of equal advantages rounding stays rounding
        ([4.0], [0.0], 1e-4),
    ],
)
def test_whitening_by_hand(values, expected, divisor):
    values = tensor([values], dtype=torch.float64)
    (found,), spread = whitened([values], [values != 0], values.numel(), Services())
    close(found, [expected])
    assert spread == pytest.approx(divisor)


# -- REINFORCE -----------------------------------------------------------------------------------------------------


def test_leave_one_out_by_hand():
    close(leave_one_out(tensor([1.0, 2.0, 6.0])), [4.0, 3.5, 1.5])
    close(leave_one_out(tensor([[1.0, 3.0], [5.0, 0.0]])), [[3.0, 1.0], [0.0, 5.0]])


def test_moving_average_by_hand():
    """Weights 0.25, 0.75 * 0.25, ... of the newest first, divided by their sum."""
    average = MovingAverage(0.75)
    assert average.value is None
    average.update(4.0)
    assert average.value == pytest.approx(4.0)
    average.update(8.0)
    assert average.value == pytest.approx((0.25 * 8 + 0.1875 * 4) / 0.4375)
    average.update(-2.0)
    assert average.value == pytest.approx((0.25 * -2 + 0.1875 * 8 + 0.140625 * 4) / 0.578125)
    zero = MovingAverage(0.9)
    zero.update(0.0)
    assert zero.value == 0.0  # a past whose mean is 0 is still a past


# -- GRPO ----------------------------------------------------------------------------------------------------------


def test_equal_rewards_have_no_advantage_whatever_their_mean_rounds_to():
    rewards = torch.full((1, 7), 0.1)
    assert (rewards.mean(1) != rewards[:, 0]).any()
    assert torch.equal(sequence_advantages(rewards, "std"), torch.zeros(1, 7))


def test_token_advantages_by_hand():
    """The mean of the group's three real tokens is 0.2; one token is clamped, padding is garbage and gets 0."""
    rewards = tensor([[[0.1, -0.7], [1.2, 50.0]], [[0.0, 3.0], [0.0, 0.0]]])
    mask = tensor([[[True, True], [True, False]], [[True, False], [True, True]]])
    advantage = token_advantages(rewards, mask)
    close(advantage, [[[-0.1, -0.9], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    close(token_advantages(-rewards, mask), -advantage)


# -- means over tokens ---------------------------------------------------------------------------------------------


def test_token_means():
    """Over the real tokens of all passes; two processes that saw the same have the same means."""
    for processes in (1, 2):
        means = TokenMeans(lambda sums, n=processes: {name: n * value for name, value in sums.items()})
        means.add(prefix_mask([2, 1], 2), a=tensor([[1.0, 2.0], [6.0, 99.0]]), b=tensor([[True, False], [True, True]]))
        means.add(prefix_mask([1], 2), a=tensor([[7.0, 99.0]]), b=tensor([[False, True]]))
        assert means.take() == {"a": 4.0, "b": 0.5}
        means.add(prefix_mask([1], 1), a=tensor([[3.0]], requires_grad=True))
        assert means.take() == {"a": 3.0}  # it starts again
        means.add(prefix_mask([0], 1), a=tensor([[3.0]]))
        assert means.take() == {}  # no token, no mean
