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

GOOD = torch.arange(20, 40)  # a third of the vocabulary
STEPS, PROMPT_COUNT, COPIES = 48, 4, 8


class ShareReward:
    """Share of the response's tokens that are GOOD, linear in their embeddings."""

    differentiable, shares_base_pass, embedding_scale = True, False, 1.0

    def __init__(self):
        self.table = torch.zeros(VOCAB, 1).index_fill(0, GOOD, 1.0)

    def from_embeddings(self, rollout, x, *, checkpoint=False):
        return (x[..., 0] * rollout.mask).sum(1) / rollout.mask.sum(1)

    def prefix_scores(self, rollout, base):
        """What is sure of the final share after every token."""
        good = self.table[rollout.tokens, 0] * rollout.mask / rollout.mask.sum(1, keepdim=True)
        return torch.cat([torch.zeros(len(rollout), 1), good], dim=1).cumsum(1)


def responses(policy, method, step, count, copies):
    """A rollout of `count` responses, `copies` of each prompt, as the method samples at a step."""
    prompts, rows = [[5 + i, 9, 41 + i] for i in range(count // copies)], torch.arange(count) * 4
    return draw(policy, prompts, seed=step, rows=rows, copies=copies, **vars(method.sampling(step)))


@pytest.mark.parametrize("name", COMPARED)
def test_learns(name):
    policy = tiny_policy(adapter_scale=0.0)
    size = PROMPT_COUNT * COPIES
    method = replace(
        method_named(MethodConfig(), name), kl_coef=0.0, tau_start=1.0, tau_end=1.0, ppo=PPOConfig(epochs=2)
    )
    generation = GenerationConfig(
        max_new_tokens=4, min_new_tokens=0, top_k=VOCAB, ignore_eos=True, samples_per_prompt=COPIES
    )
    train = TrainConfig(batch_size=size, accumulation_steps=1)
    method = make_method(policy, ShareReward(), method, generation, train, Services(), seed=0, checkpoint=False)
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
    final = (torch.isin(fresh.tokens, GOOD) & fresh.mask).sum() / fresh.mask.sum()
    assert start < 0.5
    assert final >= 0.95
