"""The expected gradient of every method, reduction and form of KL, against sums over all responses in float64.

Two symbols, one of which may end a response; a step's responses are drawn independently, so its gradient is averaged
over all multisets of responses with their probabilities. The policy's probabilities are those of its logits, and the
derivatives are autograd's on them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations_with_replacement
from typing import NamedTuple

import pytest
import torch
from enumeration import (
    RAGGED,
    ConstantReward,
    FullTerms,
    draws,
    full_terms,
    given_rollout,
    method_of,
    padded,
    step_gradients,
    symbol_policy,
)
from published import gradients, relative_error
from tiny import VOCAB, KeepDouble, tiny_policy
from torch import Tensor

from grade.rewards.base import RewardFunction

KL_COEF = 3.0  # the effect of a token on later KL is then a large part of the gradient
EXACT = 1e-12
EQUAL = [(0, 0), (0, 1), (1, 0), (1, 1)]
LENGTH_OF_EQUAL, LONGEST = 2, 3


class Responses(NamedTuple):
    """All that can be drawn, and what autograd needs of each."""

    tokens: Tensor  # [Y, S]
    mask: Tensor  # [Y, S]
    terms: FullTerms  # [Y, S]
    probability: Tensor  # [Y], differentiable
    reward: Tensor  # [Y]

    @property
    def lengths(self):
        return self.mask.sum(1)


class PrefixReward(RewardFunction):
    """A score for every prefix; responses (0, 1) and (1, 0) tie, so that some groups of equal rewards differ."""

    def score(self, rollout):
        return self.prefix_values(rollout, None)[:, -1]

    def prefix_values(self, rollout, base):
        tokens, mask = rollout.tokens.double() * rollout.mask, rollout.mask.double()
        ones, length = tokens.cumsum(1), mask.cumsum(1)
        scores = 0.7 * torch.sin(1.0 + ones) + 0.2 * torch.cos(2.0 * length)
        return torch.cat([torch.full_like(scores[:, :1], 0.4), scores], dim=1)


@pytest.fixture(scope="module")
def policy():
    with KeepDouble():
        yield symbol_policy(symbols=2)


@pytest.fixture(scope="module")
def cases(policy):
    """Both sets of responses, with one graph each."""
    out = {}
    for name, all_responses in (("equal", EQUAL), ("ragged", RAGGED)):
        tokens, mask = padded(all_responses)
        rollout = given_rollout(policy, tokens, mask=mask)
        terms = full_terms(policy, rollout)
        probability = terms.logprob.sum(1).exp()
        assert probability.sum().item() == pytest.approx(1, abs=1e-12)
        assert (terms.kl[mask] > 0.01).all()
        out[name] = Responses(tokens, mask, terms, probability, PrefixReward().score(rollout))
    return out


def found(method, of: Responses, count, copies=1, before=None):
    """The method's expected gradient over a step of `count` responses; `before` sets its state."""
    probability, total = of.probability.tolist(), 0.0
    for group, orders in draws(count, len(of.tokens)):
        if before is not None:
            before(method)
        width = int(of.lengths[group].max())
        rollout = given_rollout(method.policy, of.tokens[group, :width], copies, mask=of.mask[group, :width])
        taken, _ = step_gradients(method, rollout)
        total = total + orders * math.prod(probability[i] for i in group) * sum(taken)  # no update is a 0
    return total


def expected(policy, of: Responses, count, value):
    """d / d theta of the mean over all draws of `value(group)`, a differentiable loss of a step's responses."""
    loss = 0.0
    for group, orders in draws(count, len(of.tokens)):
        loss = loss + orders * value(group, of.probability[group].prod())
    for p in policy.parameters():
        p.grad = None
    loss.backward(retain_graph=True)
    return gradients(policy)


def kl_of(of: Responses, direction):
    return of.terms.kl if direction == "policy_ref" else of.terms.ref_kl


def reduced(kl, of: Responses, group, reduction):
    """The KL term of a step."""
    total = kl[group].sum()
    return total / of.lengths[group].sum() if reduction == "token_mean" else total / len(group)


FORMS = [(r, d) for r in ("token_mean", "sequence_sum") for d in ("policy_ref", "ref_policy")]


@pytest.mark.parametrize("lengths", ["equal", "ragged"])
def test_the_cases_tell_the_forms_apart(policy, cases, lengths):
    """The KL that the choice of a token leads to, its direction and its reduction change far more than `EXACT`."""
    of = cases[lengths]

    def gradient(reduction="token_mean", direction="policy_ref", to_go=True):
        kl = kl_of(of, direction)

        def loss(group, probability):
            return (probability if to_go else probability.detach()) * reduced(kl, of, group, reduction)

        return expected(policy, of, 2, loss)

    for other in ({"to_go": False}, {"direction": "ref_policy"}, {"reduction": "sequence_sum"}):
        assert relative_error(gradient(**other), gradient()) > 0.03
    if lengths == "ragged":  # and not by a factor
        whole, mean = gradient("sequence_sum"), gradient()
        assert relative_error(whole * (mean @ whole) / (whole @ whole), mean) > 0.03


# -- REINFORCE -----------------------------------------------------------------------------------------------------


def filled(method):
    method.average.load_state_dict({"total": 0.06, "weight": 0.1})
    method.average_kl.load_state_dict({"total": 0.03, "weight": 0.1})


def empty(method):
    method.average.load_state_dict({"total": 0.0, "weight": 0.0})
    method.average_kl.load_state_dict({"total": 0.0, "weight": 0.0})


@pytest.mark.parametrize("reduction, direction", FORMS)
@pytest.mark.parametrize(
    "lengths, baseline, count, copies, before",
    [
        ("equal", "none", 1, 1, empty),
        ("equal", "ema", 2, 1, filled),
        ("equal", "leave_one_out", 2, 1, filled),
        ("ragged", "none", 2, 1, empty),
        ("ragged", "ema", 1, 1, empty),
        ("ragged", "ema", 1, 1, filled),
        ("ragged", "ema", 3, 1, empty),
        ("ragged", "leave_one_out", 3, 1, empty),
        ("ragged", "leave_one_out", 2, 2, filled),
    ],
)
def test_reinforce(policy, cases, lengths, baseline, count, copies, before, reduction, direction):
    """The gradient of the objective, KL-to-go included; of a ratio of sums over responses of any lengths too."""
    of = cases[lengths]
    method = method_of(
        policy,
        PrefixReward(),
        "reinforce",
        batch=count,
        copies=copies,
        max_new_tokens=LONGEST,
        own={"baseline": baseline},
        kl_coef=KL_COEF,
        kl_reduction=reduction,
        kl_direction=direction,
    )
    kl = kl_of(of, direction)

    def objective(group, probability):
        return probability * (KL_COEF * reduced(kl, of, group, reduction) - of.reward[group].mean())

    assert relative_error(found(method, of, count, copies, before), expected(policy, of, count, objective)) < EXACT


def test_reinforce_of_groups_within_a_step(policy, cases):
    """Two prompts' groups of two (the same prompt twice): the others of a group and of a step are not the same."""
    of, reduction = cases["ragged"], "token_mean"
    method = method_of(
        policy,
        PrefixReward(),
        "reinforce",
        batch=4,
        copies=2,
        max_new_tokens=LONGEST,
        own={"baseline": "leave_one_out"},
        kl_coef=KL_COEF,
        kl_reduction=reduction,
    )

    def objective(group, probability):
        return probability * (KL_COEF * reduced(of.terms.kl, of, group, reduction) - of.reward[group].mean())

    probability, total = of.probability.tolist(), 0.0
    for (one, times), (two, again) in combinations_with_replacement(list(draws(2, len(of.tokens))), 2):
        group, orders = one + two, times * again * (1 if one == two else 2)
        width = int(of.lengths[group].max())
        rollout = given_rollout(policy, of.tokens[group, :width], 2, mask=of.mask[group, :width])
        total = total + orders * math.prod(probability[i] for i in group) * sum(step_gradients(method, rollout)[0])
    assert relative_error(total, expected(policy, of, 4, objective)) < EXACT


# -- PPO -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kl, reduction, direction, count",
    [("reward", r, "policy_ref", n) for r in ("token_mean", "sequence_sum") for n in (1, 2, 3)]
    + [("loss", *form, 2) for form in FORMS],
)
@pytest.mark.parametrize("lengths", ["equal", "ragged"])
def test_ppo(policy, cases, lengths, kl, reduction, direction, count):
    """One pass without value and whitening. Of responses of one length it is the objective's gradient over that length:
    with the log-ratio of drawn tokens in the reward to the last one's KL-to-go, with the KL in the loss at fixed
    responses. Of ragged ones a draw's loss is divided by its own number of tokens."""
    of, coef = cases[lengths], KL_COEF
    off = dict(epochs=1, minibatches=1, value_coef=0.0, entropy_coef=0.0, gamma=1.0, gae_lambda=1.0, target_kl=None)
    method = method_of(
        policy,
        PrefixReward(),
        "ppo",
        batch=count,
        max_new_tokens=LONGEST,
        kl_coef=coef,
        kl_reduction=reduction,
        kl_direction=direction,
        own={**off, "whiten_advantages": False, "kl": kl},
    )
    method.value_head.double()
    terms, lengths_of = of.terms, of.lengths
    ratio, kl_terms = (terms.full - terms.full_ref).detach(), kl_of(of, direction)

    def equal(group, probability):
        """Of the objective, over the length; the cost of the drawn tokens is a number."""
        cost = ratio if kl == "reward" else kl_terms
        paid = coef * reduced(cost, of, group, reduction) * (probability if kl == "reward" else probability.detach())
        return (paid - probability * of.reward[group].mean()) / LENGTH_OF_EQUAL

    def ragged(group, probability):
        """Every token's advantage, written out."""
        tokens, loss = int(lengths_of[group].sum()), 0.0
        per_token = coef * len(group) / tokens if reduction == "token_mean" else coef
        for b, i in enumerate(group):
            n, rest = int(lengths_of[i]), [j for a, j in enumerate(group) if a != b]
            others = 0.0
            if rest and reduction == "token_mean":
                others = float(terms.kl[rest].sum()) / int(lengths_of[rest].sum())
            for t in range(n):
                advantage = float(of.reward[i])
                if kl == "reward":
                    advantage -= per_token * float((ratio[i, t:n] - others).sum())
                loss = loss - advantage * terms.logprob[i, t] / tokens
            if kl == "loss":
                loss = loss + per_token * kl_terms[i].sum() / tokens
        return probability.detach() * loss

    exact = expected(policy, of, count, equal if lengths == "equal" else ragged)
    assert relative_error(found(method, of, count), exact) < EXACT


# -- GRPO ----------------------------------------------------------------------------------------------------------


GRPO_KL = [("shared", *form) for form in FORMS] + [("own", "token_mean", d) for d in ("policy_ref", "ref_policy")]


@pytest.mark.parametrize("which, reduction, direction", GRPO_KL)
@pytest.mark.parametrize(
    "level, scale, loss_reduction, count",
    [
        ("sequence", "std", "token_mean", 3),
        ("sequence", "std", "sequence_mean", 2),
        ("sequence", "none", "constant", 2),
        ("token", "std", "token_mean", 2),
    ],
)
def test_grpo(policy, cases, level, scale, loss_reduction, count, which, reduction, direction):
    """On ragged responses, over all groups, those that tie among them: the loss at fixed responses, with its KL."""
    of, terms = cases["ragged"], cases["ragged"].terms
    own = {f"kl_{direction}_coef": KL_COEF} if which == "own" else {}
    method = method_of(
        policy,
        PrefixReward(),
        "grpo",
        batch=count,
        copies=count,
        max_new_tokens=LONGEST,
        kl_coef=KL_COEF if which == "shared" else 0.0,
        kl_reduction=reduction,
        kl_direction=direction,
        own={"level": level, "advantage_scale": scale, "loss_reduction": loss_reduction, **own},
    )
    kl = kl_of(of, direction)
    rollout = given_rollout(policy, of.tokens, mask=of.mask)
    changes = PrefixReward().prefix_values(rollout, None).diff(dim=1) * of.mask

    def loss(group, probability):
        tokens, n = int(of.lengths[group].sum()), len(group)
        rewards = of.reward[group]
        tied = bool((rewards == rewards[0]).all())
        share = {
            "token_mean": lambda m: 1 / tokens,
            "sequence_mean": lambda m: 1 / (n * m),
            "constant": lambda m: 1 / (n * LONGEST),
        }[loss_reduction]
        spread = float(rewards.std()) + 1e-4 if scale == "std" else 1.0
        mean_change = float(changes[group].sum()) / tokens
        total = 0.0
        for i in group:
            weight = share(int(of.lengths[i]))
            if level == "sequence":
                total = total - weight * float(of.reward[i] - rewards.mean()) / spread * terms.logprob[i].sum()
                of_reward = 0.0 if tied and scale == "std" else (n - 1) / n / spread
            else:
                advantage = ((changes[i] - mean_change) * of.mask[i]).clamp(-1, 1)
                total = total - weight * (advantage * terms.logprob[i]).sum()
                of_reward = 1.0
            if which == "own":
                total = total + KL_COEF * weight * kl[i].sum()
            else:  # what a response's KL counts in the objective, where a reward counts 1 / n, times what that is here
                counts = 1 / tokens if reduction == "token_mean" else 1 / n
                total = total + KL_COEF * counts * n * weight * of_reward * kl[i].sum()
        return probability.detach() * total

    assert relative_error(found(method, of, count, count), expected(policy, of, count, loss)) < EXACT


def test_trl_beta_is_the_coefficient_of_ref_policy(policy):
    """TRL's k3 at the drawn token, differentiated as it stands and averaged over every token of the vocabulary."""
    with KeepDouble():
        policy = tiny_policy(dtype=torch.float64)
    tokens = torch.arange(VOCAB)[:, None]
    everything = replace(given_rollout(policy, tokens, 2), indices=torch.arange(VOCAB).expand(VOCAB, 1, -1))
    terms = full_terms(policy, everything)
    log_ratio = terms.full_ref - terms.full
    k3 = (terms.full.exp().detach() * (log_ratio.exp() - log_ratio - 1)).sum()
    exact, apart = gradients(policy, k3), {}
    for name in ("kl_ref_policy_coef", "kl_policy_ref_coef"):
        method = method_of(
            policy, ConstantReward(0.5), "grpo", batch=2, copies=2, max_new_tokens=1, kl_coef=0.0, own={name: 1.0}
        )
        apart[name] = relative_error(step_gradients(method, everything.cut(0, 2))[0][0], exact)
    assert apart["kl_ref_policy_coef"] < EXACT < 0.1 < apart["kl_policy_ref_coef"]
