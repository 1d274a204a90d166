"""What must hold of every step of PPO, REINFORCE and GRPO, whatever the model and the reward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from enumeration import RAGGED_PROMPTS as PROMPTS
from enumeration import ConstantReward, full_terms, method_of, ragged_rollout, step_gradients
from published import relative_error
from tiny import VOCAB, KeepDouble, tiny_policy, tiny_reward

from grade.rewards.base import RewardFunction

ONE_UPDATE = {
    "ppo": ("ppo", dict(epochs=1, minibatches=1)),
    "rloo": ("reinforce", dict(baseline="leave_one_out")),
    "grpo": ("grpo", dict(kl_ref_policy_coef=0.2)),
    "grpo-token": ("grpo", dict(level="token", loss_reduction="sequence_mean")),
}


class TokenReward(RewardFunction):
    """Mean id of the response over the vocabulary; a constant after prompts that end in 2."""

    def score(self, rollout):
        return self.prefix_values(rollout, None)[:, -1]

    def prefix_values(self, rollout, base):
        ids, mask = rollout.tokens * rollout.mask / VOCAB, rollout.mask
        mean = ids.cumsum(1) / mask.cumsum(1)
        scores = torch.cat([torch.full_like(mean[:, :1], 0.5), mean], dim=1)
        return torch.where(rollout.prompt_ids[:, -1:] == 2, 0.5, scores)


def method_for(case, policy, reward, batch=8, accumulation=1, copies=4, own=None, **common):
    name, defaults = ONE_UPDATE[case]
    own = {**defaults, **(own or {})}
    common = {"kl_coef": 0.1, **common}
    return method_of(policy, reward, name, batch=batch, accumulation=accumulation, copies=copies, own=own, **common)


def one_gradient(method, rollout):
    (gradient,), metrics = step_gradients(method, rollout)
    return gradient, metrics


# -- the importance ratio ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_the_ratio_is_one_until_the_policy_moves(name):
    """Over passes and shuffled mini-batches of a policy that stays, bit for bit; and not once it moves."""
    for rate in (0.0, 0.1):
        policy = tiny_policy()
        method = method_of(
            policy,
            tiny_reward(policy),
            name,
            batch=2,
            accumulation=4,
            copies=4,
            own=dict(epochs=2, minibatches=2, **({"target_kl": None} if name == "ppo" else {})),
        )
        taken, metrics = step_gradients(method, ragged_rollout(policy), rate=rate)
        assert len(taken) == 4
        assert (metrics["val/ratio"] == 1.0) == (rate == 0.0)


# -- batches and padding -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ONE_UPDATE)
@pytest.mark.parametrize("batch", [1, 2])
def test_micro_batches_change_nothing(case, batch):
    """Groups of four are split; every token keeps its weight, and metrics stay."""
    with KeepDouble():
        policy = tiny_policy(dtype=torch.float64)
        reward, rollout = tiny_reward(policy), ragged_rollout(policy)
        methods = [method_for(case, policy, reward, b, 8 // b) for b in (8, batch)]
        for method in methods:
            if case == "ppo":
                method.value_head.double()
        whole, split = (one_gradient(m, rollout) for m in methods)
    assert relative_error(split[0], whole[0]) < 1e-9
    assert split[1] == pytest.approx(whole[1], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("case", ONE_UPDATE)
def test_what_stands_at_padding_is_ignored(case):
    policy = tiny_policy()
    reward, rollout = tiny_reward(policy), ragged_rollout(policy)
    noise = torch.randint(VOCAB, rollout.tokens.shape, generator=torch.Generator().manual_seed(1))
    other = replace(
        rollout,
        tokens=torch.where(rollout.mask, rollout.tokens, noise),
        indices=torch.where(rollout.mask[..., None], rollout.indices, noise[..., None]),
    )
    assert not torch.equal(other.tokens, rollout.tokens)
    found, expected = (one_gradient(method_for(case, policy, reward), r)[0] for r in (other, rollout))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("case", ONE_UPDATE)
def test_checkpointing_changes_nothing(case):
    found = []
    for on in (False, True):
        policy = tiny_policy()
        method = method_for(case, policy, tiny_reward(policy), 4, 2, activation_checkpointing=on)
        found.append(one_gradient(method, ragged_rollout(policy))[0])
    assert relative_error(found[1], found[0]) < 1e-5


# -- nothing to learn ----------------------------------------------------------------------------------------------


def test_equal_rewards_teach_reinforce_nothing():
    policy = tiny_policy()
    for copies in (1, 4):
        rollout = ragged_rollout(policy, copies, PROMPTS * (4 // copies))
        method = method_for("rloo", policy, ConstantReward(0.5), copies=copies, kl_coef=0.0)
        assert torch.count_nonzero(one_gradient(method, rollout)[0]) == 0


@pytest.mark.parametrize("case, own", [("grpo", {}), ("grpo-token", {"loss_reduction": "token_mean"})])
def test_groups_that_do_not_differ_stay_in_the_denominators(case, own):
    """The gradient of a step with one is that of the other group alone, times its share of the tokens."""
    policy = tiny_policy()
    rollout = ragged_rollout(policy)
    own = {**own, "kl_ref_policy_coef": 0.0}
    both, metrics = one_gradient(method_for(case, policy, TokenReward(), 2, 4, kl_coef=0.0, own=own), rollout)
    other = rollout.cut(4, 8)
    alone, _ = one_gradient(method_for(case, policy, TokenReward(), 2, 2, kl_coef=0.0, own=own), other)
    assert metrics["frac_reward_zero_std"] == 0.5
    assert relative_error(both, alone * int(other.mask.sum()) / int(rollout.mask.sum())) < 1e-5


@pytest.mark.parametrize("case, kl_coef", [("grpo", 0.1), ("grpo-token", 0.0)])
def test_a_gradient_of_zero_is_no_update(case, kl_coef):
    """No group differs, and no KL is asked for, or none that has a scale."""
    policy = tiny_policy()
    rollout = ragged_rollout(policy, prompts=PROMPTS[:1] * 2)
    own = {"kl_ref_policy_coef": 0.0}
    taken, metrics = step_gradients(method_for(case, policy, TokenReward(), 2, 4, kl_coef=kl_coef, own=own), rollout)
    assert taken == []
    assert metrics["frac_reward_zero_std"] == 1.0
    assert all(p.grad is None for p in policy.parameters())


@pytest.mark.parametrize("case", ["grpo", "grpo-token"])
def test_a_process_without_a_difference_still_sums(case):
    """Other processes wait for its part of every sum, however little there is to add."""
    policy, shapes = tiny_policy(), []
    for prompts in (PROMPTS, PROMPTS[:1] * 2):
        sums = []
        method = method_for(case, policy, TokenReward(), 2, 4)
        method.services.reduce = lambda values, sums=sums: sums.append(values.shape) or values
        step_gradients(method, ragged_rollout(policy, prompts=prompts))
        shapes.append(sums)
    assert shapes[0] == shapes[1]


def test_the_moving_average_follows_the_return():
    """Its first value is the first step's mean return, KL included, and the next step is compared with it. The KL of a
    token is what it has above the mean: of the step's others at first, then of the steps before."""
    policy = tiny_policy()
    method = method_of(policy, TokenReward(), "reinforce", batch=8, copies=4, kl_coef=0.3)
    rollout = ragged_rollout(policy)
    _, first = step_gradients(method, rollout)
    kl, tokens = full_terms(policy, rollout).kl.sum(1), rollout.mask.sum(1)
    above = kl - tokens * (kl.sum() - kl) / (tokens.sum() - tokens)
    assert first["return"] == pytest.approx(first["reward"] - 0.3 * above.sum().item() / tokens.sum().item(), rel=1e-5)
    assert first["return"] != pytest.approx(first["reward"], rel=1e-3)
    _, second = step_gradients(method, rollout)
    assert second["baseline"] == pytest.approx(first["return"])
    assert second["return"] == pytest.approx(second["reward"], rel=1e-5)


# -- stopping and resuming -----------------------------------------------------------------------------------------


def test_target_kl_stops_the_passes():
    for target, updates in ((1e-9, 2), (1e9, 8), (None, 8)):
        policy = tiny_policy()
        method = method_of(
            policy,
            tiny_reward(policy),
            "ppo",
            batch=2,
            accumulation=4,
            copies=4,
            own=dict(epochs=4, minibatches=2, target_kl=target),
        )
        taken, metrics = step_gradients(method, ragged_rollout(policy), rate=0.1)
        assert len(taken) == metrics["ppo/updates"] == updates
