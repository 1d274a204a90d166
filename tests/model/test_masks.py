"""Masks are those of transformers, and nothing asks the device for them."""

from __future__ import annotations

import pytest
import torch
from rollouts import PROMPTS, draw, gradient
from tiny import FURTHER, LLAMA_SIZES, SIZES, KeepDouble, base_model, policy_around, tiny_policy, tiny_reward
from torch.overrides import TorchFunctionMode
from transformers import MistralConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from waits import Waits

from grade.model.masks import known_padding
from grade.replay.replay import ReplaySettings

# On a CPU, where it waits for nothing, our top-k asks for ties.
ON_CPU_ONLY = "torch_ops/topk.py:topk_ids"
# transformers asks once a pass whether recurrent layers have padding; behind a cache it does not.
RECURRENT = "transformers/masking_utils.py:create_recurrent_attention_mask"
NAMES = ["llama", "windows", "gemma2", "llama4", *({"qwen3.5"} & FURTHER.keys()), "opt", "mamba"]


def policy_of(name, dtype=torch.float32):
    if name != "windows":
        return tiny_policy(name, dtype=dtype)
    config = MistralConfig(**SIZES, **LLAMA_SIZES, num_key_value_heads=2, sliding_window=6)
    return policy_around(base_model(config, dtype))


def waits_of(call):
    with Waits() as waits:
        result = call()
    del waits.at[ON_CPU_ONLY]
    return result, dict(waits.at)


@pytest.mark.parametrize("name", NAMES)
def test_no_token_waits(name):
    """Prompts of several lengths are padded: the device is asked for that once, and for the lengths in the end."""
    policy = policy_of(name)
    for tokens in (3, 6):
        _, waits = waits_of(lambda tokens=tokens: draw(policy, copies=2, max_new_tokens=tokens, ignore_eos=True))
        assert waits.pop(RECURRENT, 0) <= 1
        assert waits == {"model/decoder.py:__init__": 1, "grade/rollout.py:cut": 1}


@pytest.mark.parametrize("name", ["llama", "windows"])
def test_a_step_waits_for_what_it_must_know(name):
    """Sizes of its micro-batch, the places of its real tokens, and hop by hop whether another is needed."""
    policy = policy_of(name)
    reward, rollout = tiny_reward(policy), draw(policy, copies=2, max_new_tokens=6)
    settings = ReplaySettings(tau=1.0, max_hops=2, hop_tol=0.0)
    _, waits = waits_of(lambda: gradient(policy, reward, rollout, settings))
    assert waits.pop(RECURRENT, 0) <= 2  # the policy's pass and the base's
    assert waits.pop("support/rollouts.py:gradient") == 1  # the tests' own count of tokens
    assert waits == {"grade/rollout.py:cut": 1, "replay/score.py:__init__": 1, "replay/replay.py:solve_hops": 2}


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_the_states_are_those_of_transformers_own_masks(name):
    with KeepDouble():
        policy = policy_of(name, torch.float64)
        ids = torch.arange(20).view(2, 10) + 7
        for padding, ways in ((slice(0, 4), [True]), (slice(6, 10), [True, False]), (slice(0, 0), [True, False])):
            mask = torch.ones_like(ids, dtype=torch.bool)
            mask[1, padding] = False
            given = {"inputs_embeds": policy.embed(ids), "attention_mask": mask.long()}
            if policy.takes("position_ids"):
                given["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
            expected = policy.backbone(**given, use_cache=False).last_hidden_state[mask]
            for padded in ways:
                states = policy.hidden(policy.embed(ids), mask, padded=padded)[mask]
                torch.testing.assert_close(states, expected, rtol=1e-10, atol=1e-10)


class AttentionMasks(TorchFunctionMode):
    """What SDPA is given."""

    def __init__(self):
        super().__init__()
        self.given = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.given.append(kwargs["attn_mask"])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("padded", [False, True])
def test_only_padding_before_a_prompt_needs_a_mask(padded):
    """So prompts of one length, with responses of any, take SDPA's kernels for causal attention."""
    policy = tiny_policy()
    free = draw(policy, [PROMPTS[0], PROMPTS[1][: 5 if padded else 3]], max_new_tokens=6)
    policy.eos_ids = free.tokens[0, 2:3]
    rollout = draw(policy, [PROMPTS[0], PROMPTS[1][: 5 if padded else 3]], max_new_tokens=6)
    assert not rollout.mask.all() and rollout.padded == padded
    settings = ReplaySettings(tau=1.0, prompt_cache=False)
    with AttentionMasks() as masks:
        gradient(policy, tiny_reward(policy), rollout, settings)
    assert len(masks.given) == 2 * 2  # the layers of the policy's pass and of the base's
    assert {mask is None for mask in masks.given} == {not padded}


def test_transformers_has_its_masks_back():
    config = tiny_policy().config
    with pytest.raises(RuntimeError, match="on the way"), known_padding(config, True):
        assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_mask
        raise RuntimeError("on the way")
    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is sdpa_mask
