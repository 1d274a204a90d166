"""The pure losses of the policy gradients, each against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor

from grade.methods.grpo import sequence_advantages, token_advantages, token_weights
from grade.methods.policy_gradient import Scored, TokenMeans, clipped_surrogate, mean_of_others
from grade.methods.ppo import PPO, Experience, gae, token_rewards, value_loss
from grade.methods.reinforce import MovingAverage, leave_one_out, penalised_return, reinforce_loss
from grade.methods.services import Services
from grade.rollout import Rollout


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


def test_token_rewards_by_hand():
    """The reward comes with the last real token; padding pays nothing."""
    mask = prefix_mask([3, 1], 3)
    penalty = tensor([[0.1, 0.2, 0.3], [0.5, 7.0, 7.0]])
    close(token_rewards(tensor([1.0, 2.0]), penalty, mask), [[-0.1, -0.2, 0.7], [1.5, 0.0, 0.0]])


def test_gae_of_two_tokens_by_hand():
    """delta_1 = 2 - 0.5 = 1.5 and delta_0 = 1 + 0.9 * 0.5 - 0.3 = 1.15, so A_0 = 1.15 + 0.72 * 1.5 = 2.23."""
    mask = torch.ones(1, 2, dtype=torch.bool)
    advantage = gae(tensor([[1.0, 2.0]]), tensor([[0.3, 0.5]]), mask, 0.9, 0.8)
    close(advantage, [[2.23, 1.5]])


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


def test_gae_with_lambda_one_is_the_return_minus_the_value():
    generator = torch.Generator().manual_seed(4)
    rewards, values = torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    close(gae(rewards, values, torch.ones(3, 6, dtype=torch.bool), 1.0, 1.0), to_go - values, 1e-12)


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


def rollout_of_mask(mask):
    ids = torch.zeros(*mask.shape, dtype=torch.int64)
    return Rollout(ids[:, :1], mask[:, :1], ids, mask, ids[..., None], mask.float(), ids)


def test_whitening_is_over_real_tokens():
    """Over all micro-batches together; what stands at padding does not count."""
    generator = torch.Generator().manual_seed(5)
    masks = [prefix_mask([2, 5], 5), prefix_mask([3, 1, 3], 3)]
    advantages = [torch.randn(m.shape, generator=generator) * 3 + 2 for m in masks]
    real = torch.cat([a[m] for a, m in zip(advantages, masks, strict=True)]).double()
    expected = (real - real.mean()) / (real.var(correction=1) + 1e-8).sqrt()
    nothing = torch.zeros(())
    batch = [
        Experience(Scored(rollout_of_mask(m), nothing, nothing), nothing, nothing, a)
        for m, a in zip(masks, advantages, strict=True)
    ]
    method = PPO.__new__(PPO)
    method.services = Services()
    method._whiten(batch, tokens=len(real))
    whitened = torch.cat([e.advantage[m] for e, m in zip(batch, masks, strict=True)])
    close(whitened, expected, 1e-5)
    assert abs(whitened.mean()) < 1e-6 and abs(whitened.var(correction=1) - 1) < 1e-5
    assert all((e.advantage[~m] == 0).all() for e, m in zip(batch, masks, strict=True))


def test_whitening_by_hand():
    """Of 1, 2 and 6 with mean 3: the variance is (4 + 1 + 9) / 2 = 7. Of equal advantages rounding stays rounding."""
    method = PPO.__new__(PPO)
    method.services, nothing = Services(), torch.zeros(())
    for values, expected in (
        ([1.0, 2.0, 6.0], [-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5]), ([0.1, 0.1 + 1e-8], [-5e-5, 5e-5]), ([4.0], [0.0]),
    ):
        values = tensor([values], dtype=torch.float64)
        batch = [Experience(Scored(rollout_of_mask(values != 0), nothing, nothing), nothing, nothing, values)]
        spread = method._whiten(batch, values.numel())
        close(batch[0].advantage, [expected], 1e-6)
        assert values.numel() > 1 or spread == pytest.approx(1e-4)


# -- REINFORCE -----------------------------------------------------------------------------------------------------


def test_reinforce_loss_by_hand():
    """-(2 * (-0.5 - 1.5) - 1 * -3) = 1, and every token of a response has the slope -A."""
    logprob = tensor([[-0.5, -1.5], [-3.0, 0.0]], requires_grad=True)
    loss = reinforce_loss(logprob, tensor([2.0, -1.0]))
    close(loss.detach(), 1.0)
    close(torch.autograd.grad(loss, logprob)[0], [[-2.0, -2.0], [1.0, 1.0]])


def test_penalised_return_by_hand():
    """Two responses of a token mean over three tokens with kl_coef 0.3: 0.1 a token, times the two responses."""
    weight = tensor([[0.1, 0.1], [0.1, 0.0]], dtype=torch.float64)
    kl = tensor([[1.0, 2.0], [4.0, 9.0]])
    returns = penalised_return(tensor([1.0, 0.5]), kl, weight, 2)
    close(returns, [1 - 2 * 0.3, 0.5 - 2 * 0.4])
    assert returns.dtype is torch.float64


def test_length_costs_nothing_in_a_token_mean():
    """The derivative of a step's mean KL per token by adding a response, to first order in its share of the tokens."""
    others_kl, others_tokens, responses, coefficient = 30.0, 100, 11, 0.2
    mean_kl = others_kl / others_tokens
    for kl, tokens in ((0.3, 1), (3.0, 10), (1.2, 2), (0.1, 5)):
        # An infinitesimal weight e on the response: d/de (K + e k) / (n + e t) = (k - K/n t) / n.
        change = (kl - mean_kl * tokens) / others_tokens
        weight = torch.full((1, tokens), coefficient / others_tokens, dtype=torch.float64)
        returns = penalised_return(tensor([0.5]), torch.full((1, tokens), kl / tokens), weight, responses, mean_kl)
        close(returns, [0.5 - responses * coefficient * change])


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


def test_moving_average_without_memory_and_of_zero():
    forgets = MovingAverage(0.0)
    for value in (3.0, 5.0):
        forgets.update(value)
    assert forgets.value == 5.0
    zero = MovingAverage(0.9)
    zero.update(0.0)
    assert zero.value == 0.0  # a past whose mean is 0 is still a past


# -- GRPO ----------------------------------------------------------------------------------------------------------


def test_mean_of_others_by_hand():
    """KLs of 6 and 2 in 3 and 1 tokens, of a step with 20 in 8; nothing where there are no others."""
    close(mean_of_others(tensor([6.0, 2.0]), tensor([3, 1]), 20.0, 8.0), [14 / 5, 18 / 7])
    close(mean_of_others(tensor([6.0]), tensor([3]), 6.0, 3.0), [0.0])


def test_equal_rewards_have_no_advantage_whatever_their_mean_rounds_to():
    rewards = torch.full((1, 7), 0.1)
    assert (rewards.mean(1) != rewards[:, 0]).any()
    assert torch.equal(sequence_advantages(rewards, "std"), torch.zeros(1, 7))


def test_sequence_advantages_by_hand():
    """Mean 2 and standard deviation sqrt(((-1)^2 + 0 + 1) / 2) = 1; the second group does not differ."""
    rewards = tensor([[1.0, 2.0, 3.0], [0.5, 0.5, 0.5]])
    close(sequence_advantages(rewards, "none"), [[-1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    close(sequence_advantages(rewards, "std"), tensor([[-1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]).double() / 1.0001)


def test_token_advantages_by_hand():
    """The mean of the group's three real tokens is 0.2; one token is clamped, padding is garbage and gets 0."""
    rewards = tensor([[[0.1, -0.7], [1.2, 50.0]], [[0.0, 3.0], [0.0, 0.0]]])
    mask = tensor([[[True, True], [True, False]], [[True, False], [True, True]]])
    advantage = token_advantages(rewards, mask)
    close(advantage, [[[-0.1, -0.9], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])


def test_token_advantages_are_clamped_below():
    mask = torch.ones(1, 2, 1, dtype=torch.bool)
    close(token_advantages(tensor([[[-3.0], [1.0]]]), mask), [[[-1.0], [1.0]]])


@pytest.mark.parametrize(
    "reduction, expected",
    [
        ("token_mean", [[1 / 5, 1 / 5, 1 / 5], [1 / 5, 0, 0]]),
        ("sequence_mean", [[1 / 9, 1 / 9, 1 / 9], [1 / 3, 0, 0]]),
        ("constant", [[1 / 12, 1 / 12, 1 / 12], [1 / 12, 0, 0]]),
    ],
)
def test_token_weights_by_hand(reduction, expected):
    """Of a mini-batch with 5 tokens in 3 responses, two of which are here; at most 4 tokens."""
    mask = prefix_mask([3, 1], 3)
    weights = token_weights(mask, reduction, 5, 3, 4)
    close(weights, expected, 1e-12)
    assert weights.dtype is torch.float64


# -- means over tokens ---------------------------------------------------------------------------------------------


def test_token_means():
    """Over the real tokens of all passes; two processes that saw the same have the same means."""
    for processes in (1, 2):
        means = TokenMeans(lambda sums, n=processes: {name: n * value for name, value in sums.items()})
        means.add(prefix_mask([2, 1], 2), a=tensor([[1.0, 2.0], [6.0, 99.0]]), b=tensor([[True, False], [True, True]]))
        means.add(prefix_mask([1], 2), a=tensor([[7.0, 99.0]]), b=tensor([[False, True]]))
        assert means.take() == {"a": 4.0, "b": 0.5}


def test_token_means_start_again():
    means = TokenMeans(Services().sum)
    means.add(prefix_mask([1], 1), a=tensor([[5.0]]))
    means.take()
    means.add(prefix_mask([1], 1), a=tensor([[3.0]], requires_grad=True))
    assert means.take() == {"a": 3.0}
    means.add(prefix_mask([0], 1), a=tensor([[3.0]]))
    assert means.take() == {}  # no token, no mean
