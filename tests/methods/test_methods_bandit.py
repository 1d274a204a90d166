"""Every method learns a reward that is a count of tokens, in a fixed number of samples.

The step size falls to 0, so that a run ends at what was learned and not at its last step's noise. Rounding decides in
the end which tokens are drawn, so a run is not the same on every processor.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rollouts import draw
from tiny import VOCAB, tiny_policy

from grade.config import GenerationConfig, MethodConfig, TrainConfig
from grade.config.methods import COMPARED, PPOConfig, method_named
from grade.methods import make_method
from grade.methods.services import Services
from grade.rewards.base import DifferentiableReward, EmbeddingTable
from grade.rewards.function import FunctionReward
from grade.rewards.weighted import Term, WeightedReward

GOOD = torch.arange(20, 40)  # a third of the vocabulary
STEPS, PROMPT_COUNT, COPIES = 48, 4, 8


class ShareReward(DifferentiableReward):
    """Share of the response's tokens that are GOOD, linear in their embeddings."""

    def __init__(self):
        self.tables = [EmbeddingTable(torch.zeros(VOCAB, 1).index_fill(0, GOOD, 1.0))]

    def value(self, rollout, base, fed=(), *, activation_checkpointing=False):
        return (fed[0][..., 0] * rollout.mask).sum(1) / rollout.mask.sum(1)

    def prefix_values(self, rollout, base):
        """What is sure of the final share after every token."""
        good = self.tables[0].rows[rollout.tokens, 0] * rollout.mask / rollout.mask.sum(1, keepdim=True)
        return torch.cat([torch.zeros(len(rollout), 1), good], dim=1).cumsum(1)


def responses(policy, method, step, count, copies):
    """A rollout of `count` responses, `copies` of each prompt, as the method samples at a step."""
    prompts, rows = [[5 + i, 9, 41 + i] for i in range(count // copies)], torch.arange(count) * 4
    return draw(policy, prompts, seed=step, rows=rows, copies=copies, **vars(method.sampling(step)))


def learnt(name, reward_of):
    """(reward of the first step, tokens [n] of responses after the last) of a method under `reward_of(policy)`."""
    policy = tiny_policy(adapter_scale=0.0)
    size = PROMPT_COUNT * COPIES
    method = replace(
        method_named(MethodConfig(), name), kl_coef=0.0, tau_start=1.0, tau_end=1.0, ppo=PPOConfig(epochs=2)
    )
    generation = GenerationConfig(
        max_new_tokens=4, min_new_tokens=0, top_k=VOCAB, ignore_eos=True, samples_per_prompt=COPIES
    )
    train = TrainConfig(batch_size=size, accumulation_steps=1)
    method = make_method(
        policy, reward_of(policy), method, generation, train, Services(), seed=0, activation_checkpointing=False
    )
    groups = [{"params": policy.parameters()}, *method.parameter_groups()]
    optimizer = torch.optim.AdamW(groups, lr=4e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)

    def update():
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return norm.item()

    start = None
    for step in range(STEPS):
        metrics = method.step([responses(policy, method, step, size, COPIES)], step, update)
        start = metrics["reward"] if start is None else start
        schedule.step()
    fresh = responses(policy, method, 10**6, 240, 240 // PROMPT_COUNT)
    return start, fresh.tokens[fresh.mask]


@pytest.mark.parametrize("name", COMPARED)
def test_learns(name):
    start, tokens = learnt(name, lambda policy: ShareReward())
    assert start < 0.5
    assert torch.isin(tokens, GOOD).float().mean() >= 0.95


def late(completions):
    """Share of the tokens that are 30 to 49: half of GOOD, and as many others."""
    return [sum(30 <= int(word) < 50 for word in text.split()) / 4 for text in completions]


@pytest.mark.parametrize("name", ["rloo", "grpo"])
def test_learns_a_function(name):
    start, tokens = learnt(name, lambda policy: WeightedReward([Term(FunctionReward(late, policy.tokenizer), "late")]))
    assert start < 0.5
    assert ((tokens >= 30) & (tokens < 50)).float().mean() >= 0.95


@pytest.mark.parametrize("name", ["grade-ste", "grade"])
def test_learns_a_function_beside_a_reward_with_a_gradient(name):
    """What both of them like: either alone is content with twice as many tokens."""
    start, tokens = learnt(
        name,
        lambda policy: WeightedReward(
            [Term(ShareReward(), "good"), Term(FunctionReward(late, policy.tokenizer), "late")]
        ),
    )
    assert start < 1.0
    assert ((tokens >= 30) & (tokens < 40)).float().mean() >= 0.9
