"""The KV cache that is written in place: what transformers' own gives, and no more than it has room for."""

from __future__ import annotations

import pytest
import torch
from test_rollout import PROMPTS, draw
from tiny import CONFIGS, tiny_policy

from grade.model import Policy
from grade.rollout import pad_prompts


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_cache_written_in_place_is_transformers_own_to_the_bit(name, monkeypatch):
    policy = tiny_policy(name)
    ours = draw(policy, copies=3, soft=True)
    concatenating = Policy.new_cache
    monkeypatch.setattr(Policy, "new_cache", lambda self, capacity=None: concatenating(self))
    theirs = draw(policy, copies=3, soft=True)
    assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.indices, theirs.indices)
    assert torch.equal(ours.weights, theirs.weights)


def test_a_full_cache_is_refused():
    policy = tiny_policy("llama")
    ids, mask = pad_prompts(PROMPTS[:1], policy.pad_id)
    cache = policy.new_cache(len(PROMPTS[0]) - 1)
    with pytest.raises(ValueError, match="a cache for 2 positions was given 3"), torch.no_grad():
        policy.hidden(policy.embed(ids), mask, cache)
