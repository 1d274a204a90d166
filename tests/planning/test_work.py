"""Operations by the formulas against those that a step's products are counted to have, and what tensors it holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import TARGETS, VOCAB, tiny_policy, tiny_reward

from benchmarks.scaling import config_of, counted, held, planned_bytes, planned_flops, planned_run
from benchmarks.training_setup import Setting
from grade.config import LoraSettings, ModelConfig, TrainConfig
from grade.planning.shape import shape_of
from grade.planning.work import Passes
from grade_kernels import chunk_rows

SETTING = Setting(shape="tiny", batch=4, prompt=6, length=20, k=16, hop_tol=0.0, max_hops=3)
FLOPS = 2e-3
"""Relative; what is not in the formulas is a reward head of [d, 16]."""


LONG_PROMPTS = replace(SETTING, prompt=40, length=12)
"""Of which the policy's pass is two."""


def compared(name: str, method: str, *, recompute=False, copies=1, batch_size=4, setting: Setting = SETTING):
    policy = tiny_policy(name)
    config = config_of(setting, method, recompute, copies)
    lora = LoraSettings(r=4, target_modules=TARGETS.get(name, LoraSettings().target_modules))
    train = TrainConfig(batch_size=batch_size, accumulation_steps=setting.batch // batch_size)
    config = replace(config, model=replace(config.model, lora=lora), train=train)
    prompts = torch.randint(4, VOCAB, (setting.batch // copies, setting.prompt))
    policy.causal_lm.set_attn_implementation("eager")
    found, hops = counted(policy, tiny_reward(policy), config, prompts)
    run = planned_run(shape_of(policy.causal_lm.config.to_dict(), name), config, hops)
    # Of one sample a prompt, a policy gradient saves less than the second pass costs.
    assert run.prompts_apart == (setting is LONG_PROMPTS and not recompute and (run.differentiates or copies > 1))
    return {key: flops for key, flops in found.items() if flops}, planned_flops(run)


@pytest.mark.parametrize(
    "name, method, options",
    [
        ("llama", "grade-ste", {}),
        ("llama", "grade-ste", {"recompute": True}),
        ("llama", "grade-ste", {"batch_size": 2, "copies": 2}),
        ("qwen3", "grade", {}),
        ("gpt2", "grade-ste", {}),
        ("gpt-neox", "grade-ste", {}),
        ("llama", "ppo", {}),
        ("llama", "reinforce", {"recompute": True}),
        ("llama", "grpo", {"copies": 2}),
        ("llama", "grade-ste", {"setting": LONG_PROMPTS}),
        ("llama", "grade-ste", {"setting": LONG_PROMPTS, "recompute": True}),
        ("qwen3", "grade", {"setting": LONG_PROMPTS, "copies": 2}),
        ("gpt-neox", "ppo", {"setting": LONG_PROMPTS}),
        ("llama", "grpo", {"setting": LONG_PROMPTS, "copies": 4}),
    ],
)
def test_operations_are_those_that_are_counted(name, method, options):
    found, planned = compared(name, method, **options)
    assert found == pytest.approx(planned, rel=5 * FLOPS)
    assert sum(planned.values()) == pytest.approx(sum(found.values()), rel=FLOPS)


@pytest.fixture
def two_threads(monkeypatch):
    """As many as the formulas take a CPU to have: the head has temporaries for each."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


@pytest.mark.parametrize(
    "method, recompute, prompt, copies",
    [
        ("grade-ste", False, 6, 1),
        ("grade-ste", True, 6, 1),
        ("reinforce", False, 6, 1),
        ("reinforce", True, 6, 1),
        ("grade-ste", False, 96, 1),
        ("grade-ste", False, 96, 4),
        ("reinforce", False, 96, 4),
    ],
)
def test_bytes_are_about_those_that_are_held(stories260k, two_threads, method, recompute, prompt, copies):
    """Within a quarter, of a model whose graphs are most of what a step holds."""
    from transformers import AutoModelForCausalLM

    from grade.model.loading import add_adapter
    from grade.model.policy import Policy

    base = AutoModelForCausalLM.from_pretrained(stories260k, dtype=torch.float32)

    class Tokenizer:
        pad_token_id = eos_token_id = 2

        def get_vocab(self):
            return {str(i): i for i in range(512)}

    policy = Policy(add_adapter(base, ModelConfig(name="stories260K"), 0), Tokenizer())
    config = config_of(replace(SETTING, batch=8, prompt=prompt, length=192), method, recompute, copies)
    prompts = torch.randint(4, 512, (8 // copies, prompt))
    found = held(policy, tiny_reward(policy), config, prompts)
    run = planned_run(shape_of(policy.causal_lm.config.to_dict(), "stories260K"), config, 3.0)
    assert run.prompts_apart == (prompt > 6)
    assert planned_bytes(run) == pytest.approx(found, rel=0.25)


def test_a_decoded_token_reads_weights_and_cache():
    """By hand: a layer of q and k, v of one head each, an MLP of 3 * 8 * 16, and a head of 50 rows, in 16 bits."""
    sizes = dict(hidden_size=8, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1)
    shape = shape_of({"model_type": "llama", **sizes, "num_hidden_layers": 1, "vocab_size": 50}, "small")
    weights = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16
    assert shape.products == weights
    passes = Passes(shape, 2, 2.0 * weights)
    for batch in (1, 3):
        longer, shorter = (passes.decode(batch, 10, length, adapters=False) for length in (7, 6))
        assert longer.bytes - shorter.bytes == 2 * weights + 2 * 50 * 8  # once for the whole batch
        cache, logits = 2 * 2 * 4 * 16 * batch, 3 * 4 * 50 * batch  # 10 + 6 positions, keys and values of 4 numbers
        assert longer.traffic - shorter.traffic == cache + logits
        attention = 4 * 8 * 16 * batch
        assert longer.flops - shorter.flops == 2 * batch * (weights + 50 * 8) + attention


def test_a_sharded_pass_receives_what_others_hold():
    shape = shape_of({**SHARDED, "model_type": "llama"}, "small")
    whole, sharded = (Passes(shape, 2, 2.0 * shape.products, shards=n) for n in (1, 4))
    one, other = (p.forward(5, p.pairs(1, 0, 5), adapters=False) for p in (whole, sharded))
    assert one.received == 0 and other.received == 1.5 * shape.products and one.flops == other.flops
    again = sharded.backward(5, 25, adapters=False, recompute=True)
    assert again.received == other.received  # weights that are gathered serve the recomputation too
    tokens = sharded.decode(2, 3, 11, adapters=False)
    assert tokens.received == 10 * other.received and tokens.exchanges == 10 * shape.layers


SHARDED = dict(
    hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=3, vocab_size=50, head_dim=4
)


def test_rows_of_a_chunk_are_those_of_the_kernels():
    run = planned_run(shape_of({**SHARDED, "model_type": "llama"}, "small"), config_of(SETTING), 2.0)
    for size in (1, 10**5, 2**28):
        assert run.rows_of_chunk(size) == chunk_rows(50, size)
