"""The policy's pass in two, the prompts' first: what one pass gives, in fewer rows."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from published import gradients, relative_error
from rollouts import gradient, rollout_of
from tiny import CONFIGS, FURTHER, VOCAB, KeepDouble, tiny_policy, tiny_reward
from transformers import LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

from grade.model.passes import fed_embeddings, policy_pass
from grade.model.policy import Policy
from grade.model.probe import combination
from grade.planning.prompt_pass import PassSizes
from grade.replay.replay import ReplaySettings
from grade.replay.score import ScoreSettings, score

SETTINGS = ReplaySettings(tau=1.0, max_hops=8, hop_tol=0.0)
RECURRENT = ("qwen3.5", "zamba", "mamba")
PROMPT, RESPONSE = 44, 6


def long_prompts(number, shortest=PROMPT - 9):
    """Of different lengths, up to `PROMPT`."""
    numbers = torch.Generator().manual_seed(0)
    lengths = [PROMPT, shortest, PROMPT - 2, PROMPT - 1][:number]
    return [torch.randint(4, VOCAB, (length,), generator=numbers).tolist() for length in lengths]


def long_rollout(policy, number=2, copies=2, **options):
    return rollout_of(policy, max_new=RESPONSE, prompts=long_prompts(number), copies=copies, **options)


@contextmanager
def counted_rows(monkeypatch):
    """[(whether the adapter is on, sequences, positions)] of the passes made inside."""
    passes, own = [], Policy.forward

    def forward(self, embeddings, *rest):
        passes.append((self.switches.state.adapters, *embeddings.shape[:2]))
        return own(self, embeddings, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Policy, "forward", forward)
        yield passes


@pytest.mark.parametrize("name", [*CONFIGS, *FURTHER])
def test_the_gradient_is_that_of_one_pass(name, monkeypatch):
    """In float64, with padding and two samples of each prompt. Recurrent states are never read."""
    with KeepDouble():
        policy = tiny_policy(name, dtype=torch.float64)
        reward, rollout = tiny_reward(policy), long_rollout(policy)
        one = gradient(policy, reward, rollout, replace(SETTINGS, prompt_cache=False))
        with counted_rows(monkeypatch) as passes:
            two = gradient(policy, reward, rollout, SETTINGS)
    assert relative_error(two, one) < 1e-11
    if name in RECURRENT:
        assert passes[0] == (True, 4, PROMPT + RESPONSE)
    else:
        assert passes[:2] == [(True, 2, PROMPT), (True, 4, RESPONSE)]


@pytest.mark.parametrize(
    "soft, changes",
    [
        (False, {"estimator": "rao"}),
        (False, {"estimator": "straight_through"}),
        (True, {"kl_prefix_grad": "policy"}),
        (False, {"kl_prefix_grad": "none", "path_scale": 0.5}),
        (False, {"max_hops": 2, "kl_direction": "ref_policy"}),
    ],
)
def test_every_kind_of_gradient(soft, changes):
    """And in micro-batches that part a prompt's samples, whose passes are of other sizes."""
    with KeepDouble():
        policy = tiny_policy(dtype=torch.float64)
        rollout = long_rollout(policy, 4, 2, soft=soft)
        reward, settings = tiny_reward(policy), replace(SETTINGS, **changes)
        one = gradient(policy, reward, rollout, replace(settings, prompt_cache=False))
        for micro in (8, 4, 3):
            assert relative_error(gradient(policy, reward, rollout, settings, micro=micro), one) < 1e-11


def of_parameters(policy, rollout, **how):
    """[p], gradients of a policy gradient's pass."""
    hidden = policy_pass(policy, rollout, fed_embeddings(rollout, policy.embedding, policy.embedding_scale), **how)
    return gradients(policy, (hidden * combination(hidden))[rollout.mask].sum())


@pytest.mark.parametrize("name", ["llama", "gemma2", "full"])
def test_policy_gradients_share_a_prompts_pass(name, monkeypatch):
    """Of adapters, and of all weights."""
    with KeepDouble():
        policy = tiny_policy("llama" if name == "full" else name, dtype=torch.float64)
        if name == "full":
            policy = Policy(trained_whole(policy.causal_lm), policy.tokenizer)
        rollout = long_rollout(policy, 2, 4)
        one = of_parameters(policy, rollout, prompt_cache=False)
        with counted_rows(monkeypatch) as passes:
            two = of_parameters(policy, rollout)
    assert passes == [(True, 2, PROMPT), (True, 8, RESPONSE)]
    assert one.norm() > 0 and relative_error(two, one) < 1e-11


def trained_whole(causal_lm):
    return LlamaForCausalLM(causal_lm.config).double().requires_grad_(True)


def test_dropout_and_recomputation_take_one_pass(monkeypatch):
    """Samples of a prompt would share what was dropped; a recomputed layer would write the cache twice."""
    policy = tiny_policy(dropout=0.1)
    policy.enable_activation_checkpointing()
    rollout = long_rollout(policy)
    with counted_rows(monkeypatch) as passes:
        for how in ({"dropout": True}, {"activation_checkpointing": True}, {"prompt_cache": False}):
            of_parameters(policy, rollout, hops=3, **how)
    assert passes == 3 * [(True, 4, PROMPT + RESPONSE)]


def test_kl_of_a_fresh_adapter_is_zero_where_both_passes_are_two(monkeypatch):
    policy = tiny_policy(adapter_scale=0.0)
    reward, rollout = tiny_reward(policy), long_rollout(policy, 2, 4)
    with counted_rows(monkeypatch) as passes:
        scores = score(policy, reward, rollout, ScoreSettings())
    assert [rows for _, _, rows in passes] == 2 * [PROMPT, RESPONSE]
    assert scores.kl.abs().max() == 0


def test_a_cache_that_ends_the_graph_is_not_read_by_the_policy(monkeypatch):
    own = DynamicLayer.update

    def without_graph(self, keys, values, *args, **kwargs):
        first = not self.is_initialized
        keys, values = own(self, keys, values, *args, **kwargs)
        if first:
            self.keys, self.values = self.keys.detach(), self.values.detach()
        return keys, values

    monkeypatch.setattr(DynamicLayer, "update", without_graph)
    policy = tiny_policy()
    assert policy.reads_prompt_cache and not policy.keeps_prompt_graph
    rollout = long_rollout(policy)
    with counted_rows(monkeypatch) as passes:
        gradient(policy, tiny_reward(policy), rollout, SETTINGS)
    assert [rows for _, _, rows in passes] == [PROMPT + RESPONSE, PROMPT, RESPONSE]


SIZES = PassSizes(
    responses=4, prompts=4, prompt=32, response=256, width=288, item=4, padded=True, on_gpu=False
)  # of benchmarks.training, where prompts have no padding


@pytest.mark.parametrize(
    "changes, replay, policy_gradient",
    [
        ({}, True, False),
        ({"prompt": 8}, False, False),
        ({"prompt": 128, "response": 64}, True, False),
        ({"prompts": 1}, True, True),
        # Kernels for causal attention skip much of a long response, those that are given a mask nothing.
        ({"prompt": 128, "response": 1024, "padded": False}, False, False),
        ({"prompt": 128, "response": 1024}, True, True),
        # A GPU waits for the launches of a small model's second pass, and computes a large one's.
        ({"responses": 16, "prompts": 16, "on_gpu": True, "item": 2}, False, False),
        ({"responses": 16, "prompts": 16, "on_gpu": True, "item": 2, "width": 4096, "prompt": 128}, True, False),
    ],
    ids=str,
)
def test_two_passes_are_made_where_they_are_quicker(changes, replay, policy_gradient):
    sizes = replace(SIZES, **changes)
    assert (sizes.pay_apart(3), sizes.pay_apart(0)) == (replay, policy_gradient)
