"""What must hold of every step of PPO, REINFORCE and GRPO, whatever the model and the reward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from enumeration import ConstantReward, drawn_rollout, full_terms, method_of, step_gradients
from published import relative_error
from tiny import VOCAB, KeepDouble, tiny_policy, tiny_reward

PROMPTS = [[5, 9, 2], [7, 11, 13, 17, 19]]
ONE_UPDATE = {
    "ppo": ("ppo", dict(epochs=1, minibatches=1)),
    "rloo": ("reinforce", dict(baseline="leave_one_out")),
    "grpo": ("grpo", dict(kl_ref_policy_coef=0.2)),
    "grpo-token": ("grpo", dict(level="token", loss_reduction="sequence_mean")),
}


class TokenReward:
    """Mean id of the response over the vocabulary; a constant after prompts that end in 2."""

    differentiable = shares_base_pass = False

    def from_tokens(self, rollout):
        return self.prefix_scores(rollout, None)[:, -1]

    def prefix_scores(self, rollout, base):
        ids, mask = rollout.tokens * rollout.mask / VOCAB, rollout.mask
        mean = ids.cumsum(1) / mask.cumsum(1)
        scores = torch.cat([torch.full_like(mean[:, :1], 0.5), mean], dim=1)
        return torch.where(rollout.prompt_ids[:, -1:] == 2, 0.5, scores)


def ragged(policy, copies=4, prompts=PROMPTS):
    """Two prompts of different lengths, responses of 1 to 6 tokens."""
    policy.eos_ids = torch.arange(10)
    rollout = drawn_rollout(policy, prompts, copies=copies, max_new_tokens=6, top_k=9, ignore_eos=False)
    assert len(set(rollout.mask.sum(1).tolist())) > 2
    return rollout


def method_for(case, policy, reward, batch=8, accumulation=1, copies=4, own=None, **common):
    name, defaults = ONE_UPDATE[case]
    own = {**defaults, **(own or {})}
    common = {"kl_coef": 0.1, **common}
    return method_of(
        policy, reward, name, batch=batch, accumulation=accumulation, copies=copies, max_new_tokens=6, own=own, **common
    )


def one_gradient(method, rollout):
    (gradient,), metrics = step_gradients(method, rollout)
    return gradient, metrics


# -- the importance ratio ------------------------------------------------------------------------------------------


def test_ppo_starts_at_ratio_one():
    policy = tiny_policy()
    _, metrics = one_gradient(method_for("ppo", policy, tiny_reward(policy), 2, 4), ragged(policy))
    assert metrics["val/ratio"] == 1.0
    assert metrics["policy/clipfrac_avg"] == metrics["val/clipfrac_avg"] == metrics["policy/approxkl_avg"] == 0.0


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_the_ratio_is_one_until_the_policy_moves(name):
    """Over passes and shuffled mini-batches of a policy that stays, bit for bit; and not once it moves."""
    for rate in (0.0, 0.1):
        policy = tiny_policy()
        method = method_of(
            policy, tiny_reward(policy), name, batch=2, accumulation=4, copies=4, max_new_tokens=6,
            own=dict(epochs=2, minibatches=2, **({"target_kl": None} if name == "ppo" else {})),
        )
        taken, metrics = step_gradients(method, ragged(policy), rate=rate)
        assert len(taken) == 4
        assert (metrics["val/ratio"] == 1.0) == (rate == 0.0)


# -- batches and padding -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ONE_UPDATE)
@pytest.mark.parametrize("batch", [1, 2])
def test_micro_batches_change_nothing(case, batch):
    """Groups of four are split; every token keeps its weight, and metrics stay."""
    with KeepDouble():
        policy = tiny_policy(dtype=torch.float64)
        reward, rollout = tiny_reward(policy), ragged(policy)
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
    reward, rollout = tiny_reward(policy), ragged(policy)
    noise = torch.randint(VOCAB, rollout.tokens.shape, generator=torch.Generator().manual_seed(1))
    other = replace(
        rollout, tokens=torch.where(rollout.mask, rollout.tokens, noise),
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
        found.append(one_gradient(method, ragged(policy))[0])
    assert relative_error(found[1], found[0]) < 1e-5


# -- nothing to learn ----------------------------------------------------------------------------------------------


def test_equal_rewards_teach_reinforce_nothing():
    policy = tiny_policy()
    for copies in (1, 4):
        rollout = ragged(policy, copies, PROMPTS * (4 // copies))
        method = method_for("rloo", policy, ConstantReward(0.5), copies=copies, kl_coef=0.0)
        assert torch.count_nonzero(one_gradient(method, rollout)[0]) == 0


@pytest.mark.parametrize("case, own", [("grpo", {}), ("grpo-token", {"loss_reduction": "token_mean"})])
def test_groups_that_do_not_differ_stay_in_the_denominators(case, own):
    """The gradient of a step with one is that of the other group alone, times its share of the tokens."""
    policy = tiny_policy()
    rollout = ragged(policy)
    own = {**own, "kl_ref_policy_coef": 0.0}
    both, metrics = one_gradient(method_for(case, policy, TokenReward(), 2, 4, kl_coef=0.0, own=own), rollout)
    other = rollout.cut(4, 8)
    alone, _ = one_gradient(method_for(case, policy, TokenReward(), 2, 2, kl_coef=0.0, own=own), other)
    assert metrics["frac_reward_zero_std"] == 0.5
    assert relative_error(both, alone * int(other.mask.sum()) / int(rollout.mask.sum())) < 1e-5


def test_the_kl_of_groups_that_do_not_differ_counts():
    """Beside advantages, and with the scale of undivided ones."""
    with KeepDouble():
        policy = tiny_policy(dtype=torch.float64)
        rollout = ragged(policy, prompts=PROMPTS[:1] * 2)
        kl = full_terms(policy, rollout)
        share = 1 / int(rollout.mask.sum())
        for own, kl_coef, expected in (
            ({"kl_ref_policy_coef": 0.2}, 0.0, 0.2 * share * kl.ref_kl.sum()),
            ({"kl_ref_policy_coef": 0.0, "advantage_scale": "none"}, 0.1, 0.1 * share**2 * 6 * kl.kl.sum()),
        ):
            method = method_for("grpo", policy, TokenReward(), 2, 4, kl_coef=kl_coef, own=own)
            found, metrics = one_gradient(method, rollout)
            assert metrics["frac_reward_zero_std"] == 1.0
            exact = torch.autograd.grad(expected, policy.parameters(), retain_graph=True)
            assert relative_error(found, torch.cat([g.flatten() for g in exact])) < 1e-12


@pytest.mark.parametrize("case, kl_coef", [("grpo", 0.1), ("grpo-token", 0.0)])
def test_a_gradient_of_zero_is_no_update(case, kl_coef):
    """No group differs, and no KL is asked for, or none that has a scale."""
    policy = tiny_policy()
    rollout = ragged(policy, prompts=PROMPTS[:1] * 2)
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
        step_gradients(method, ragged(policy, prompts=prompts))
        shapes.append(sums)
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("baseline", ["ema", "none"])
def test_reinforce_learns_from_single_responses(baseline):
    """No baseline yet at the first step; finite numbers from there on."""
    policy = tiny_policy()
    method = method_of(policy, TokenReward(), "reinforce", batch=1, own={"baseline": baseline}, max_new_tokens=6)
    for step in range(3):
        rollout = drawn_rollout(policy, PROMPTS[1:], max_new_tokens=6, top_k=9, seed=step)
        (gradient,), metrics = step_gradients(method, rollout, step=step)
        assert gradient.isfinite().all() and gradient.norm() > 0
        assert all(abs(value) < float("inf") for value in metrics.values())
        assert (metrics["baseline"] == 0) == (baseline == "none" or step == 0)


def test_the_moving_average_follows_the_return():
    """Its first value is the first step's mean return, KL included, and the next step is compared with it. The KL of a
    token is what it has above the mean: of the step's others at first, then of the steps before."""
    policy = tiny_policy()
    method = method_of(policy, TokenReward(), "reinforce", batch=8, copies=4, max_new_tokens=6, kl_coef=0.3)
    rollout = ragged(policy)
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
            policy, tiny_reward(policy), "ppo", batch=2, accumulation=4, copies=4, max_new_tokens=6,
            own=dict(epochs=4, minibatches=2, target_kl=target),
        )
        taken, metrics = step_gradients(method, ragged(policy), rate=0.1)
        assert len(taken) == metrics["ppo/updates"] == updates


@pytest.mark.parametrize("case", ["ppo", "ema"])
def test_a_loaded_state_repeats_the_step(case):
    """The value head and the moving average are what a resumed run needs."""
    policy = tiny_policy()
    reward, rollout = tiny_reward(policy), ragged(policy)

    def fresh():
        own = dict(epochs=1, minibatches=1) if case == "ppo" else {}
        name = "ppo" if case == "ppo" else "reinforce"
        return method_of(policy, reward, name, batch=8, copies=4, max_new_tokens=6, own=own)

    method = fresh()
    if case == "ppo":
        torch.nn.init.normal_(method.value_head.layer.weight)
    else:
        step_gradients(method, rollout)
    state = {name: value.clone() if torch.is_tensor(value) else value for name, value in method.state_dict().items()}
    resumed = fresh()
    resumed.load_state_dict(state)
    expected, metrics = one_gradient(method, rollout)
    found, again = one_gradient(resumed, rollout)
    assert torch.equal(found, expected) and again == metrics
    assert not torch.equal(one_gradient(fresh(), rollout)[0], expected)
