"""Runs that learn, from Python, on the demo's task: a differentiable reward of one's own, a function, both together.

Standard errors are about 0.02, so the bounds lie far above the starts, and what several seeds reached far above them.
"""

from __future__ import annotations

import pytest
import torch
from tiny_run import changed
from transformers import AutoTokenizer

import grade
from grade.tasks import demo

STEPS = 30
LONGEST = 12


class Praise(grade.DifferentiableReward):
    """Tokens that begin a word of praise less those that begin one of blame, as a share of the response."""

    raises, reads = "the share of praise", "response"

    def __init__(self, policy):
        def first_tokens(words):
            return {policy.tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in words}

        praise, blame = first_tokens(demo.POSITIVE_WORDS), first_tokens(demo.NEGATIVE_WORDS)
        table = torch.zeros(policy.vocab_size, 1)  # a token's embedding is what it is worth
        table[sorted(praise - blame)], table[sorted(blame - praise)] = 1.0, -1.0
        self.tables = [grade.EmbeddingTable(table)]

    def value(self, rollout, base, fed=(), *, activation_checkpointing=False):
        return fed[0].squeeze(-1).sum(1) / rollout.mask.sum(1)


def short(completion_ids):
    """The share of the longest response that a response takes, as a cost."""
    return [-len(ids) / LONGEST for ids in completion_ids]


@pytest.fixture(scope="module")
def prompts(tiny_model):
    """Openings of the demo's reviews as token ids, by split."""
    settings = grade.TaskConfig(
        name="demo", reward_examples=2, policy_examples=64, validation_examples=64, judge_examples=0,
        prompt_max_tokens=8,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return {split: demo.load(settings).prompts(split, tokenizer) for split in ("policy", "validation")}


@pytest.fixture
def config(tiny_config):
    return changed(
        tiny_config,
        task=grade.TaskConfig(),
        model={"lora": {"r": 8, "alpha": 16}},
        reward=grade.RewardConfig(),
        generation={"max_new_tokens": LONGEST, "min_new_tokens": 4, "top_k": 64},
        method={"kl_coef": 0.02, "max_hops": 2},
        train={"steps": STEPS, "batch_size": 16, "learning_rate": 5e-3},
        evaluation={"every": STEPS, "validation_prompts": 64, "batch_size": 64},
    )


def learned(config, prompts, reward, method):
    """What training on a reward has come to: the base model and the best checkpoint on the validation prompts."""
    model, config = config.model.name, changed(config, method={"name": method})
    trainer = grade.GradeTrainer(model, reward, prompts["policy"], config=config, eval_prompts=prompts["validation"])
    result = trainer.train()
    assert result.best_step == STEPS and result.base.prompts == 64
    assert abs(result.base.kl) < 1e-6 < result.best.kl
    return result.base, result.best


def test_a_differentiable_reward_is_learned(config, prompts):
    base, best = learned(config, prompts, Praise, "grade-ste")
    assert base.reward < 0.05 and best.reward > 0.3


def test_a_function_is_learned(config, prompts):
    base, best = learned(config, prompts, short, "reinforce")
    assert base.reward < -0.85 and best.reward > -0.6


def test_both_together_are_learned(config, prompts):
    base, best = learned(config, prompts, [(Praise, 3.0), short], "grade-ste")
    for name, start, bound in (("Praise", 0.05, 0.1), ("short", -0.85, -0.75)):
        assert base.details[f"rewards/{name}/mean"] < start and best.details[f"rewards/{name}/mean"] > bound
