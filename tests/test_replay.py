"""Replay at S hops equals step-by-step autograd of the published algorithm."""

from __future__ import annotations

import pytest
import torch
from published import gradients, published_loss, relative_error
from tiny import CONFIGS, EOS, VOCAB, KeepDouble, tiny_policy, tiny_reward

from grade.methods.grade import kl_weight
from grade.replay import ReplaySettings, replay, score
from grade.rollout import Sampling, pad_prompts, sample

PROMPTS = [[5, 9, 2], [7, 11, 13, 17, 19], [23], [8, 6, 4, 31]]
MIN_NEW = 3


def rollout_of(policy, *, k=7, tau=1.0, soft=False, max_new=8, seed=0, prompts=PROMPTS, copies=1, min_new=MIN_NEW):
    ids, mask = pad_prompts(prompts, policy.pad_id)
    sampling = Sampling(max_new_tokens=max_new, min_new_tokens=min_new, top_k=k, tau=tau, soft=soft)
    first_rows = torch.arange(len(prompts) * copies) * max_new
    return sample(policy, ids, mask, sampling, seed=seed, first_rows=first_rows, samples_per_prompt=copies)


def replayed_gradient(policy, reward, rollout, settings, *, kl_coef, kl_reduction, micro=None):
    tokens, responses = int(rollout.mask.sum()), len(rollout)
    for part in rollout.micro_batches(micro or responses):
        weight = kl_weight(part.mask, kl_reduction, kl_coef, tokens, responses)
        share = weight.new_full((len(part),), 1 / responses)
        replay(policy, reward, part, settings, reward_weight=share, kl_weight=weight)
    return gradients(policy)


def ragged_rollout(policy, **options):
    """A rollout in which some responses end early: a token that they would sample becomes an end token."""
    free = rollout_of(policy, **options)
    for token in free.tokens[:, MIN_NEW + 1].tolist():
        policy.eos_ids = torch.tensor([EOS, token])
        rollout = rollout_of(policy, **options)
        lengths = rollout.mask.sum(1)
        if lengths.min() < lengths.max() == rollout.tokens.shape[1] == free.tokens.shape[1]:
            assert lengths.min() >= MIN_NEW
            return rollout
    raise AssertionError("no response ended early")


CASES = [
    # (soft, k, kl_reduction, kl_prefix_grad, kl_direction, reads): each choice against the others at least once
    (False, 7, "token_mean", "both", "policy_ref", "prompt+response"),
    (True, 7, "sequence_sum", "both", "policy_ref", "prompt+response"),
    (False, VOCAB, "sequence_sum", "both", "ref_policy", "response"),
    (True, VOCAB, "token_mean", "both", "policy_ref", "response"),
    (False, 7, "token_mean", "policy", "policy_ref", "prompt+response"),
    (False, 7, "token_mean", "none", "policy_ref", "prompt+response"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{'soft' if c[0] else 'ste'}-k{c[1]}-{c[2]}-{c[3]}-{c[4]}-{c[5]}")
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_published_algorithm(name, case):
    soft, k, reduction, prefix, direction, reads = case
    if name not in ("llama", "gemma2") and case not in CASES[:2]:
        pytest.skip("the remaining choices do not depend on the architecture")
    with KeepDouble():
        policy = tiny_policy(name, dtype=torch.float64, unknown=2)
        reward = tiny_reward(policy, reads)
        rollout = ragged_rollout(policy, k=k, tau=1.3, soft=soft)
        settings = ReplaySettings(
            tau=1.3, max_hops=rollout.tokens.shape[1], hop_tol=0.0, kl_prefix_grad=prefix, kl_direction=direction
        )
        ours = replayed_gradient(policy, reward, rollout, settings, kl_coef=0.3, kl_reduction=reduction)
        loss = published_loss(
            policy, reward.head, rollout, tau=1.3, k=k, soft=soft, kl_coef=0.3, kl_reduction=reduction,
            kl_direction=direction, kl_prefix_grad=prefix, min_new_tokens=MIN_NEW, reads=reads,
        )
        expected = gradients(policy, loss)
    assert relative_error(ours, expected) < 1e-9
