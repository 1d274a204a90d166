"""Gradients of REINFORCE, GRPO and PPO with the real sampler, and of their documented losses on the same responses."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from enumeration import (
    LENGTH,
    PROMPT,
    RESPONSES,
    TableReward,
    drawn_rollout,
    full_terms,
    given_rollout,
    method_of,
    step_gradients,
    symbol_policy,
)
from published import gradients, relative_error
from tiny import KeepDouble, tiny_policy, tiny_reward

from grade.methods.grpo import sequence_advantages, token_advantages
from grade.methods.policy_gradient import clipped_surrogate
from grade.methods.ppo import gae, token_rewards, value_loss

TABLE = torch.tensor([[0.9, 0.1, 0.4], [0.2, 0.9, 0.7], [0.0, 0.5, 0.3]], dtype=torch.float64)
KL_COEF = 3.0  # the effect of a token on later KL is then half of the gradient


@pytest.fixture
def double():
    with KeepDouble():
        yield


@pytest.fixture
def policy(double):
    return symbol_policy()


def exact_gradient(policy, kl_coef, reduction):
    """Of -E[reward] + kl_coef * E[KL]."""
    terms = full_terms(policy, given_rollout(policy, RESPONSES))
    probability = terms.logprob.sum(1).exp()
    assert probability.sum().item() == pytest.approx(1, abs=1e-6)
    kl = terms.kl.sum(1) / (LENGTH if reduction == "token_mean" else 1)
    return gradients(policy, (probability * (kl_coef * kl - TABLE.flatten().to(policy.dtype))).sum())


# -- the real sampler ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def draws():
    """20 rollouts of 64 groups of 8 in float32."""
    policy = symbol_policy(dtype=torch.float32)
    return policy, [drawn_rollout(policy, [PROMPT] * 64, copies=8, seed=seed) for seed in range(20)]


@pytest.mark.parametrize(
    "name, own, kl_coef, reduction",
    [
        ("reinforce", {"baseline": "leave_one_out"}, KL_COEF, "token_mean"),
        ("reinforce", {"baseline": "ema"}, KL_COEF, "sequence_sum"),
        ("grpo", {"advantage_scale": "none", "loss_reduction": "constant"}, 0.0, "token_mean"),
    ],
    ids=["rloo", "ema", "grpo"],
)
def test_sampled_gradient_is_unbiased(draws, name, own, kl_coef, reduction):
    """Along the gradient and in random directions, within 4 standard errors, and a tenth more would be outside."""
    policy, rollouts = draws
    method = method_of(
        policy, TableReward(TABLE.float()), name, batch=512, copies=8, own=own, kl_coef=kl_coef, kl_reduction=reduction,
    )
    exact = exact_gradient(policy, kl_coef, reduction)
    found = []
    for rollout in rollouts:
        (gradient,), _ = step_gradients(method, rollout)
        if name == "grpo":  # G - 1 Gth and length as above
            gradient = gradient * LENGTH * 8 / 7
        found.append(gradient)
    directions = torch.randn(len(exact), 5, generator=torch.Generator().manual_seed(0))
    directions[:, 0] = exact
    along = torch.stack(found) @ directions  # [20, 5]
    error = along.std(0) / len(found) ** 0.5
    z = (along.mean(0) - exact @ directions) / error
    assert z.abs().max() < 4
    assert 0.1 * exact.square().sum() > 4 * error[0]


# -- the documented losses on the same rollout ---------------------------------------------------------------------


def ragged(policy, copies=4):
    """Two prompts of different lengths, responses of 1 to 6 tokens."""
    policy.eos_ids = torch.arange(10)
    rollout = drawn_rollout(
        policy, [[5, 9, 2], [7, 11, 13, 17, 19]], copies=copies, max_new_tokens=6, top_k=9, ignore_eos=False
    )
    assert len(set(rollout.mask.sum(1).tolist())) > 2
    return rollout


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


def token_weight(mask, reduction, longest):
    """[B, S] by its definition, response by response."""
    tokens, responses = int(mask.sum()), len(mask)
    share = {
        "token_mean": lambda n: 1 / tokens, "sequence_mean": lambda n: 1 / (n * responses),
        "constant": lambda n: 1 / (longest * responses), "sequence_sum": lambda n: 1 / responses,
    }[reduction]
    return torch.tensor([[share(int(n))] for n in mask.sum(1)], dtype=torch.float64) * mask


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
    reward, rollout, rate = tiny_reward(policy), ragged(policy), 4.0
    mask = rollout.mask
    method = method_of(
        policy, reward, "grpo", batch=2, accumulation=4, copies=4, max_new_tokens=6, kl_coef=0.2,
        kl_direction=direction, kl_reduction=kl_reduction,
        own=dict(
            level=level, advantage_scale=scale, loss_reduction=loss_reduction, epochs=3, clip_low=0.1, clip_high=0.3,
            kl_policy_ref_coef=0.1, kl_ref_policy_coef=0.3, preference_coef=2.0, entropy_reward_coef=entropy_reward,
        ),
    )
    score = method.score([rollout], changes=True)
    old = [t.detach() for t in full_terms(own, rollout)]
    old_logprob, entropy = old[0], old[3]
    if level == "sequence":
        rewards = 2.0 * torch.cat([s.reward for s in score]) + entropy_reward * entropy.sum(1) / mask.sum(1)
        advantage = sequence_advantages(rewards.view(2, 4), scale).flatten()[:, None]
        spread = rewards.view(2, 4).std(1).repeat_interleave(4)[:, None] + 1e-4 if scale == "std" else 1.0
        of_reward = (3 / 4) / spread  # what the objective is multiplied with, response by response
    else:
        of_reward = 1.0
        rewards = entropy_reward * entropy
        for b, part in enumerate(p for s in score for p in s.changes):
            rewards[b, : len(part)] += 2.0 * part
        advantage = token_advantages(rewards.view(2, 4, -1), mask.view(2, 4, -1)).flatten(0, 1)

    def loss():
        terms = full_terms(own, rollout)
        kl = terms.kl if direction == "policy_ref" else terms.ref_kl
        surrogate = clipped_surrogate(terms.logprob, old_logprob, advantage, 0.1, 0.3)
        weight = token_weight(mask, loss_reduction, 6)
        shared = 0.2 * token_weight(mask, kl_reduction, 6) * kl * len(rollout) * of_reward
        return (weight * (surrogate + shared + 0.1 * terms.kl + 0.3 * terms.ref_kl)).sum()

    found, metrics = step_gradients(method, rollout, rate=rate)
    expected = descended(own.parameters(), loss, rate, 3)
    assert max(relative_error(f, e) for f, e in zip(found, expected, strict=True)) < 1e-8
    assert metrics["clip_ratio/region_mean"] > 0.01
    assert metrics["frac_reward_zero_std"] == 0


def test_ppo_without_its_extras_is_the_policy_gradient(policy):
    """One pass, no value: every token is credited with its response's reward, and the loss is a mean over tokens."""
    rollout = given_rollout(policy, RESPONSES)
    off = dict(epochs=1, minibatches=1, value_coef=0.0, entropy_coef=0.0, gamma=1.0, gae_lambda=1.0)
    method = method_of(
        policy, TableReward(TABLE), "ppo", batch=9, kl_coef=0.0, own={**off, "whiten_advantages": False}
    )
    method.value_head.double()
    (found,), _ = step_gradients(method, rollout)
    loss = -(TABLE.flatten()[:, None] * full_terms(policy, rollout).logprob).sum() / rollout.mask.sum()
    assert relative_error(found, gradients(policy, loss)) < 1e-12


@pytest.mark.parametrize("kl, whiten, reduction", [("reward", True, "token_mean"), ("loss", False, "sequence_sum")])
def test_ppo_is_its_documented_loss(double, kl, whiten, reduction):
    """Over three passes, the later ones with clipped ratios and values; the value's gradient reaches the adapter."""
    policy, own = tiny_policy(dtype=torch.float64), tiny_policy(dtype=torch.float64)
    reward, rollout, rate = tiny_reward(policy), ragged(policy), 1.0
    mask = rollout.mask
    method = method_of(
        policy, reward, "ppo", batch=2, accumulation=4, max_new_tokens=6, kl_coef=0.4, kl_reduction=reduction,
        own=dict(
            epochs=3, minibatches=1, clip=0.1, value_clip=0.1, entropy_coef=0.05, gamma=0.9, gae_lambda=0.8,
            whiten_advantages=whiten, target_kl=None, kl=kl,
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
        return of_tokens + (kl == "loss") * share * 0.4 * (token_weight(mask, reduction, 6) * terms.kl).sum()

    found, metrics = step_gradients(method, rollout, rate=rate)
    trained = [*own.parameters(), *head.parameters()]
    expected = descended(trained, loss, rate, 3)
    assert max(relative_error(f, e[: len(f)]) for f, e in zip(found, expected, strict=True)) < 1e-8
    assert torch.allclose(method.value_head.layer.weight, head.weight, rtol=1e-6, atol=1e-9)
    assert metrics["policy/clipfrac_avg"] > 0.01 and metrics["val/clipfrac_avg"] > 0.01
    assert metrics["ppo/updates"] == 3
