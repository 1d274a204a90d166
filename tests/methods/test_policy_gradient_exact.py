"""Gradients of GRPO and PPO over several passes are those of their documented losses on the same responses."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from enumeration import full_terms, method_of, ragged_rollout, step_gradients
from published import relative_error
from tiny import KeepDouble, tiny_policy, tiny_reward

from grade.methods.base import kl_weight
from grade.methods.grpo import sequence_advantages, token_advantages, token_weights
from grade.methods.policy_gradient import clipped_surrogate
from grade.methods.ppo import gae, token_rewards, value_loss


@pytest.fixture
def double():
    with KeepDouble():
        yield


def descended(parameters, loss, rate, updates):
    """Gradients of `loss()` at `updates` steps of plain descent, one vector each."""
    out = []
    for _ in range(updates):
        grads = torch.autograd.grad(loss(), parameters)
        out.append(torch.cat([g.flatten() for g in grads]))
        with torch.no_grad():
            for p, g in zip(parameters, grads, strict=True):
                p.sub_(rate * g)
    return out


@pytest.mark.parametrize(
    "level, scale, loss_reduction, kl_reduction, direction, entropy_reward",
    [
        ("sequence", "std", "token_mean", "token_mean", "policy_ref", 0.0),
        ("sequence", "none", "constant", "sequence_sum", "ref_policy", 0.1),
        ("token", "std", "sequence_mean", "token_mean", "policy_ref", 0.0),
        ("token", "std", "token_mean", "sequence_sum", "policy_ref", 0.1),
    ],
)
def test_grpo_is_its_documented_loss(double, level, scale, loss_reduction, kl_reduction, direction, entropy_reward):
    """Over three passes, the later ones with ratios that clip, both KLs at once, and shaped rewards."""
    policy, own = tiny_policy(dtype=torch.float64), tiny_policy(dtype=torch.float64)
    reward, rollout, rate = tiny_reward(policy), ragged_rollout(policy), 4.0
    mask, size = rollout.mask, (int(rollout.mask.sum()), len(rollout))
    method = method_of(
        policy,
        reward,
        "grpo",
        batch=2,
        accumulation=4,
        copies=4,
        kl_coef=0.2,
        kl_direction=direction,
        kl_reduction=kl_reduction,
        own=dict(
            level=level,
            advantage_scale=scale,
            loss_reduction=loss_reduction,
            epochs=3,
            clip_low=0.1,
            clip_high=0.3,
            kl_policy_ref_coef=0.1,
            kl_ref_policy_coef=0.3,
            preference_coef=2.0,
            entropy_reward_coef=entropy_reward,
        ),
    )
    score = method.score([rollout], gains=True)
    old_logprob, _, _, entropy, *_ = (t.detach() for t in full_terms(own, rollout))
    if level == "sequence":
        rewards = 2.0 * torch.cat([s.reward for s in score]) + entropy_reward * entropy.sum(1) / mask.sum(1)
        advantage = sequence_advantages(rewards.view(2, 4), scale).flatten()[:, None]
        spread = rewards.view(2, 4).std(1).repeat_interleave(4)[:, None] + 1e-4 if scale == "std" else 1.0
        of_reward = (3 / 4) / spread  # what the objective is multiplied with, response by response
    else:
        of_reward = 1.0
        rewards = entropy_reward * entropy
        for b, part in enumerate(p for s in score for p in s.gains):
            rewards[b, : len(part)] += 2.0 * part
        advantage = token_advantages(rewards.view(2, 4, -1), mask.view(2, 4, -1)).flatten(0, 1)

    def loss():
        terms = full_terms(own, rollout)
        kl = terms.kl if direction == "policy_ref" else terms.ref_kl
        surrogate = clipped_surrogate(terms.logprob, old_logprob, advantage, 0.1, 0.3)
        weight = token_weights(mask, loss_reduction, *size, 6)
        shared = kl_weight(mask, kl_reduction, 0.2, *size) * kl * len(rollout) * of_reward
        return (weight * (surrogate + shared + 0.1 * terms.kl + 0.3 * terms.ref_kl)).sum()

    found, metrics = step_gradients(method, rollout, rate=rate)
    expected = descended(own.parameters(), loss, rate, 3)
    assert max(relative_error(f, e) for f, e in zip(found, expected, strict=True)) < 1e-8
    assert metrics["clip_ratio/region_mean"] > 0.01
    assert metrics["frac_reward_zero_std"] == 0


@pytest.mark.parametrize("kl, whiten, reduction", [("reward", True, "token_mean"), ("loss", False, "sequence_sum")])
def test_ppo_is_its_documented_loss(double, kl, whiten, reduction):
    """Over three passes, the later ones with clipped ratios and values; the value's gradient reaches the adapter."""
    policy, own = tiny_policy(dtype=torch.float64), tiny_policy(dtype=torch.float64)
    reward, rollout, rate = tiny_reward(policy), ragged_rollout(policy), 1.0
    mask = rollout.mask
    method = method_of(
        policy,
        reward,
        "ppo",
        batch=2,
        accumulation=4,
        kl_coef=0.4,
        kl_reduction=reduction,
        own=dict(
            epochs=3,
            minibatches=1,
            clip=0.1,
            value_clip=0.1,
            entropy_coef=0.05,
            gamma=0.9,
            gae_lambda=0.8,
            whiten_advantages=whiten,
            target_kl=None,
            kl=kl,
        ),
    )
    torch.manual_seed(7)
    head = torch.nn.Linear(policy.head.weight.shape[1], 1).double()
    method.value_head.layer = deepcopy(head)
    reward_of = torch.cat([s.reward for s in method.score([rollout])])
    old = type(full_terms(own, rollout))(*(t.detach() for t in full_terms(own, rollout)))
    old_values = head(old.hidden).squeeze(-1).detach() * mask
    penalty = torch.zeros_like(old.full)
    if kl == "reward":  # a mean over tokens, on the scale of rewards that are a mean over responses
        sums, tokens = old.kl.sum(1), mask.sum(1)
        others = (sums.sum() - sums) / (tokens.sum() - tokens)  # per token, of the other responses
        penalty = 0.4 * (old.full - old.full_ref - others[:, None]) * len(rollout) / int(mask.sum())
    advantage = gae(token_rewards(reward_of, penalty, mask), old_values, mask, 0.9, 0.8)
    returns = advantage + old_values
    if whiten:
        real = advantage[mask]
        advantage = (advantage - real.mean()) / (real.var(correction=1) + 1e-8).sqrt()

    def loss():
        terms = full_terms(own, rollout)
        surrogate = clipped_surrogate(terms.logprob, old.logprob, advantage, 0.1, 0.1)
        error = value_loss(head(terms.hidden).squeeze(-1), old_values, returns, 0.1)
        of_tokens = ((surrogate + 0.5 * error - 0.05 * terms.entropy) * mask).sum() / mask.sum()
        share = len(rollout) / int(mask.sum())  # of a token mean in the objective's mean over responses
        weight = kl_weight(mask, reduction, 0.4, int(mask.sum()), len(rollout))
        return of_tokens + (kl == "loss") * share * (weight * terms.kl).sum()

    found, metrics = step_gradients(method, rollout, rate=rate)
    trained = [*own.parameters(), *head.parameters()]
    expected = descended(trained, loss, rate, 3)
    assert max(relative_error(f, e[: len(f)]) for f, e in zip(found, expected, strict=True)) < 1e-8
    assert torch.allclose(method.value_head.layer.weight, head.weight, rtol=1e-6, atol=1e-9)
    assert metrics["policy/clipfrac_avg"] > 0.01 and metrics["val/clipfrac_avg"] > 0.01
    assert metrics["ppo/updates"] == 3
