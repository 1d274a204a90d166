"""Rollouts of tiny policies and their replayed gradients."""

from __future__ import annotations

import torch
from published import gradients

from grade.methods.base import kl_weight
from grade.replay.replay import replay
from grade.rollout import pad_prompts
from grade.sampling.draw import Sampling
from grade.sampling.sample import sample

PROMPTS = [[5, 9, 2], [7, 11, 13, 17, 19], [23], [8, 6, 4, 31]]
MIN_NEW = 3


def draw(policy, prompts=PROMPTS, *, seed=0, rows=None, copies=1, adapters=True, decoding=None, **options):
    """A rollout of 12 tokens from 7 candidates unless told otherwise, and noise rows that do not overlap."""
    sampling = Sampling(**{"max_new_tokens": 12, "top_k": 7, **options})
    ids, mask = pad_prompts(prompts, policy.pad_id)
    if rows is None:
        rows = torch.arange(len(prompts) * copies) * 100
    return sample(
        policy,
        ids,
        mask,
        sampling,
        seed=seed,
        first_rows=rows,
        samples_per_prompt=copies,
        adapters=adapters,
        decoding=decoding,
    )


def rollout_of(policy, *, k=7, max_new=8, prompts=PROMPTS, copies=1, min_new=MIN_NEW, **options):
    """The same with all that replay's tests vary; responses end late."""
    rows = torch.arange(len(prompts) * copies) * max_new
    return draw(
        policy, prompts, rows=rows, copies=copies, top_k=k, max_new_tokens=max_new, min_new_tokens=min_new, **options
    )


def gradient(
    policy, reward, rollout, settings, *, kl_coef=0.3, kl_reduction="token_mean", micro=None, score_weight=None
):
    """All adapter gradients as one vector, from replays of `micro` responses at a time; of all at once where a
    `score_weight` [B] is given."""
    tokens, responses = int(rollout.mask.sum()), len(rollout)
    assert micro is None or score_weight is None
    for part in rollout.micro_batches(micro or responses):
        weight = kl_weight(part.mask, kl_reduction, kl_coef, tokens, responses)
        share = weight.new_full((len(part),), 1 / responses)
        replay(policy, reward, part, settings, reward_weight=share, kl_weight=weight, score_weight=score_weight)
    return gradients(policy)
