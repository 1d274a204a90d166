"""What `rollout.compile: auto` chooses, without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import tiny_policy

from grade.config import Config, GenerationConfig, ModelConfig, RolloutConfig, TrainConfig, validate
from grade.config.reading import load_config
from grade.errors import GradeError
from grade.model.policy import Policy
from grade.sampling import choice
from grade.sampling.decode import Decoding

LONG = Config(
    rollout=RolloutConfig(compile="auto"),
    train=TrainConfig(steps=250, batch_size=4, accumulation_steps=4),
    generation=GenerationConfig(max_new_tokens=40, min_new_tokens=1),
)  # 250 * 40 = 10,000 forwards


@pytest.fixture(scope="module")
def policy():
    return tiny_policy()


@pytest.fixture
def compiled(monkeypatch):
    """A GPU, and what stands for compiled decoding on it."""

    class Compiled(Decoding):
        pass

    monkeypatch.setattr(Policy, "device", torch.device("cuda"))
    monkeypatch.setattr(choice, "CompiledDecoding", Compiled)
    return Compiled


def test_long_runs_on_a_gpu_compile(policy, compiled):
    decoding, note = choice.decoding_of(policy, LONG)
    assert type(decoding) is compiled and "compiles for half a minute" in note
    shorter = replace(LONG, train=replace(LONG.train, steps=249))
    assert type(choice.decoding_of(policy, shorter)[0]) is Decoding
    in_parts = replace(shorter, generation=replace(LONG.generation, batch_size=8))  # two rollouts a step
    assert type(choice.decoding_of(policy, in_parts)[0]) is compiled
    for changed in ({"source": "responses.jsonl"}, {"compile": False}):
        plain = replace(LONG, rollout=replace(LONG.rollout, **changed))
        assert choice.decoding_of(policy, plain)[1] is None and type(choice.decoding_of(policy, plain)[0]) is Decoding
    packed = replace(LONG, model=ModelConfig(quantization="4bit"))
    validate(packed)
    assert type(choice.decoding_of(policy, packed)[0]) is Decoding
    other = replace(LONG, model=ModelConfig(attn_implementation="eager"))
    validate(other)
    with pytest.raises(GradeError, match="masks its cache as sdpa does, but model.attn_implementation is eager"):
        validate(replace(other, rollout=RolloutConfig(compile=True)))
    forced = replace(shorter, rollout=RolloutConfig(compile=True))
    assert type(choice.decoding_of(policy, forced)[0]) is compiled


def test_longer_runs_on_a_cpu_compile(policy, monkeypatch):
    """In float32, in which its gain was measured."""

    class Compiled(Decoding):
        pass

    monkeypatch.setattr(choice, "CompiledDecoding", Compiled)
    assert type(choice.decoding_of(policy, LONG)[0]) is Decoding
    longer = replace(LONG, train=replace(LONG.train, steps=500), model=ModelConfig(dtype="float32"))
    assert type(choice.decoding_of(policy, longer)[0]) is Compiled
    for changed in ({"steps": 499}, {"batch_size": 8}):
        other = replace(longer, train=replace(longer.train, **changed))
        assert type(choice.decoding_of(policy, other)[0]) is (Decoding if "steps" in changed else Compiled)
    half = replace(longer, model=ModelConfig(dtype="bfloat16"))
    assert type(choice.decoding_of(policy, half)[0]) is Decoding


def test_a_model_that_cannot_be_compiled_is_decoded_plainly(policy, compiled, monkeypatch):
    def refuse(policy):
        raise GradeError("rollout.compile: it has windows. Set rollout.compile=false.")

    monkeypatch.setattr(choice, "CompiledDecoding", refuse)
    decoding, note = choice.decoding_of(policy, LONG)
    assert type(decoding) is Decoding and note == "rollout.compile=auto: decodes without compiling. it has windows."
    with pytest.raises(GradeError, match="it has windows"):
        choice.decoding_of(policy, replace(LONG, rollout=RolloutConfig(compile=True)))


def test_the_config_of_the_paper_compiles(policy, compiled):
    config = load_config("imdb_qwen3_4b")
    assert config.rollout.compile == "auto" and type(choice.decoding_of(policy, config)[0]) is compiled
