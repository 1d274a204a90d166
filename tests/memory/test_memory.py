"""What a run says it will need of memory, against what its steps hold; what it decides by that; running out of it."""

from __future__ import annotations

import gc
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_policy, tiny_reward, two_references
from tiny_run import trainer_of, with_train
from torch.autograd.graph import saved_tensors_hooks

import grade.memory.estimate
from benchmarks.measure import LiveBytes
from grade.config import (
    Config,
    EvaluationConfig,
    GenerationConfig,
    MethodConfig,
    RolloutConfig,
    TrainConfig,
)
from grade.config.reading import config_from_yaml, load_config
from grade.errors import GradeError
from grade.machine import free_bytes
from grade.memory.activations import measure_pass, policy_forward, saved_bytes
from grade.memory.estimate import Estimate, estimate
from grade.memory.plan import MemoryPlan, is_out_of_memory, plan
from grade.methods import make_method
from grade.methods.services import Services
from grade.model.checkpoint import load_state
from grade.processes import make_accelerator
from grade.sampling.sample import sample
from grade.training.run_folder import prepare_run_dir
from grade.training.trainer import Trainer
from grade_kernels import Head

PROMPT = 16
GIB = 2**30
BATCHES = {"passes": 4, "rollout": 8, "evaluation": 16}


def config_of(name="grade-ste", checkpoint="auto", batch=2, length=24, **sections) -> Config:
    """Steps of one micro-batch, few hops, every response at its longest."""
    method = MethodConfig(name=name, activation_checkpointing=checkpoint, max_hops=2)
    method.ppo = replace(method.ppo, epochs=1, minibatches=1)
    return Config(
        method=method, train=TrainConfig(batch_size=batch, accumulation_steps=1),
        generation=GenerationConfig(max_new_tokens=length, min_new_tokens=0, top_k=32, ignore_eos=True),
        evaluation=EvaluationConfig(batch_size=1), **sections,
    )


def parts_of(found: Estimate, checkpoint: bool) -> dict:
    return found.checkpointed if checkpoint else found.parts


def method_of(policy, reward, config):
    return make_method(
        policy, reward, config.method, config.generation, config.train, Services(), seed=0,
        activation_checkpointing=config.method.checkpoint,
    )


@pytest.mark.parametrize("name, batch, length, attention, make", [
    ("grade-ste", 1, 30, "sdpa", tiny_policy), ("grade-ste", 2, 85, "sdpa", tiny_policy),
    ("grade-ste", 2, 85, "sdpa", two_references), ("grade", 2, 30, "eager", tiny_policy),
    ("ppo", 1, 85, "sdpa", tiny_policy), ("ppo", 3, 30, "sdpa", tiny_policy),
])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_estimate_is_what_a_step_holds(name, checkpoint, batch, length, attention, make):
    """Of tensors, without what is loaded; 101 tokens are more than were measured."""
    policy, config = make(), config_of(name, checkpoint, batch, length)
    policy.causal_lm.set_attn_implementation(attention)
    reward = tiny_reward(policy)
    parts = parts_of(estimate(policy, reward, config, PROMPT), checkpoint)
    method = method_of(policy, reward, config)
    ids = torch.randint(4, 60, (batch, PROMPT))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1:, 0] = False  # of several prompts, most are padded
    first = torch.arange(batch) * length
    with LiveBytes() as live:
        rollout = sample(policy, ids, mask, method.sampling(0), seed=0, first_rows=first)
    assert 0.7 < parts["rollout"] / live.peak < 1.6
    held = sum(t.nbytes for t in (rollout.indices, rollout.weights) if t is not None)
    gc.collect()
    with LiveBytes() as live:
        method.step([rollout], 0, lambda: policy.model.zero_grad(set_to_none=True) or 0.0)
    assert 0.75 < (parts["activations"] + parts["head"] - held) / live.peak < 1.5


def test_a_packed_head_is_part_of_sampling(packed_heads, monkeypatch):
    """Of four responses or more in training, and of prompts in evaluation."""
    policy = tiny_policy("llama")
    # A head that is nearly all that sampling holds.
    policy.embedding = torch.zeros(400 * policy.vocab_size, policy.head.weight.shape[1])
    policy.head = Head(policy.embedding)
    reward, size = tiny_reward(policy), policy.embedding.nbytes
    config = config_of(batch=4)
    parts = estimate(policy, reward, config, PROMPT).parts
    ids = torch.full((4, PROMPT), 5)
    sampling = method_of(policy, reward, config).sampling(0)
    with LiveBytes() as live:
        sample(policy, ids, torch.ones_like(ids, dtype=torch.bool), sampling, seed=0, first_rows=torch.arange(4) * 24)
    assert packed_heads and size < live.peak < parts["rollout"]
    fewer = estimate(policy, reward, config_of(batch=3), PROMPT).parts
    assert size < parts["rollout"] - fewer["rollout"] < 1.5 * size
    config.evaluation.batch_size = 4
    asked = estimate(policy, reward, config, PROMPT).parts["evaluation"]
    assert asked - parts["evaluation"] > size
    monkeypatch.setattr(grade.memory.estimate._Shapes, "scoring", lambda *_: 0)  # which takes more, with so wide a head
    asked = estimate(policy, reward, config, PROMPT).parts["evaluation"]
    config.evaluation.sampler = "top_p"
    assert asked - estimate(policy, reward, config, PROMPT).parts["evaluation"] == size


def test_what_another_engine_samples_takes_no_memory_here():
    policy = tiny_policy("llama")
    here, elsewhere = (
        estimate(policy, tiny_reward(policy), config_of(rollout=rollout), PROMPT).parts
        for rollout in (RolloutConfig(), RolloutConfig(source="responses.jsonl"))
    )
    assert 0 < elsewhere["rollout"] == 2 * 24 * 32 * 8 < here["rollout"]  # the candidates' ids wait for their turn
    assert elsewhere == {**here, "rollout": elsewhere["rollout"]}


@pytest.mark.parametrize("name, attention", [
    ("llama", "sdpa"), ("llama", "eager"), ("qwen3", "sdpa"), ("gemma2", "eager"), ("gpt-neox", "sdpa"),
])
def test_lengths_beyond_the_measured_follow_the_polynomial(name, attention):
    policy = tiny_policy(name)
    policy.causal_lm.set_attn_implementation(attention)
    forward = policy_forward(policy, adapters=True)
    law, found = measure_pass(policy.model, forward, 1000), saved_bytes(policy.model, lambda: forward(200))
    assert law.whole(200) == pytest.approx(found["whole"], rel=1e-6)
    assert law.kept(200) == pytest.approx(found["kept"], rel=1e-6)
    assert found["kept"] + 2 * found["layer"] >= found["whole"] > found["kept"] + found["layer"]  # of two layers


def test_attention_that_keeps_its_scores_is_seen():
    policy = tiny_policy("llama")  # 2 layers of 4 heads
    policy.causal_lm.set_attn_implementation("eager")
    law = measure_pass(policy.model, policy_forward(policy, adapters=True), 1000)
    assert law.whole.quadratic >= 2 * 4 * 4 and law.layer.quadratic >= 4 * 4
    assert law.kept.quadratic < 8  # the mask


def test_what_is_kept_is_what_a_checkpointed_pass_saves():
    policy = tiny_policy("llama")
    forward = policy_forward(policy, adapters=True)
    kept = saved_bytes(policy.model, lambda: forward(48))["kept"]
    policy.enable_activation_checkpointing()
    frozen = (*policy.model.parameters(), *policy.model.buffers())
    saved, constant = {}, {tensor.untyped_storage().data_ptr() for tensor in frozen}

    def save(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def checkpointed(length):
        x = torch.zeros(1, length, policy.head.weight.shape[1], requires_grad=True)
        mask = torch.ones(1, length, dtype=torch.bool)
        mask[:, 0] = False
        with policy.state(adapters=True, activation_checkpointing=True):
            return policy.hidden(x, mask)

    with saved_tensors_hooks(save, lambda tensor: tensor):
        hidden = checkpointed(48)
    found = sum(size for key, size in saved.items() if key not in constant)
    arguments = 48 * 48 + 2 * 48 * 8 * 4 + 48 * 8  # the mask, the rotary angles and the positions: held, not saved
    assert hidden.requires_grad and kept == found + arguments


@pytest.mark.parametrize("reads", ["prompt+response", "response"])
def test_estimating_changes_nothing(reads):
    policy = tiny_policy("qwen3")
    reward, state = tiny_reward(policy, reads), policy._state
    before = {name: p.clone() for name, p in policy.model.named_parameters()}
    flags = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in policy.model.modules()]
    random = torch.get_rng_state()
    estimate(policy, reward, config_of(), PROMPT)
    assert policy._state == state and torch.equal(torch.get_rng_state(), random)
    assert flags == [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in policy.model.modules()]
    for name, parameter in policy.model.named_parameters():
        assert parameter.grad is None and torch.equal(parameter, before[name])


def test_a_reward_with_a_pass_of_its_own_costs_one():
    policy = tiny_policy("llama")
    both, alone = (
        estimate(policy, tiny_reward(policy, reads), config_of(), PROMPT).parts["activations"]
        for reads in ("prompt+response", "response")
    )
    assert alone > 1.2 * both


# -- decision ------------------------------------------------------------------------------------------------


def test_auto_follows_free_memory():
    policy = tiny_policy("llama")
    reward = tiny_reward(policy)

    def checkpoints(free, asked="auto", any_process=bool):
        return plan(policy, reward, config_of(checkpoint=asked), PROMPT, free, any_process).checkpoint

    needed = estimate(policy, reward, config_of(), PROMPT).more(checkpoint=False)
    assert not checkpoints(int(needed / 0.79)) and checkpoints(int(needed / 0.81))
    assert not checkpoints(None)
    assert checkpoints(100 * needed, any_process=lambda tight: True)  # another process has less
    assert checkpoints(100 * needed, asked=True) and not checkpoints(1, asked=False)
    policy.causal_lm.supports_gradient_checkpointing = False
    assert not checkpoints(1)


def test_checkpointing_saves_memory_and_the_line_says_so():
    policy = tiny_policy("llama")
    config = config_of(batch=4, length=60)
    roomy, tight = (plan(policy, tiny_reward(policy), config, PROMPT, free) for free in (20 * GIB, 1))
    assert tight.estimate.total(True) < 0.8 * roomy.estimate.total(False)
    assert re.fullmatch(
        r"memory: about \d MiB at B = 4, P = 16, S = 60, k = 32 \(weights 1 MiB, optimizer 1 MiB; and the "
        r"largest of rollout \d MiB, activations \d MiB \+ head \d MiB, evaluation \d MiB\); 20.0 GiB free; "
        r"activation checkpointing off \(auto\)",
        roomy.line,
    )
    assert "checkpointing on (auto). That may not fit. Set train.batch_size below 4" in tight.line


def test_a_method_made_before_the_decision_does_not_checkpoint():
    config = config_of()
    assert config.method.activation_checkpointing == "auto" and not config.method.checkpoint
    policy = tiny_policy("llama")
    assert not method_of(policy, tiny_reward(policy), config).settings(0).checkpoint


@pytest.mark.parametrize("text, value", [("auto", "auto"), ("true", True), ("false", False)])
def test_the_setting_has_three_values(tmp_path, text, value):
    (tmp_path / "config.yaml").write_text(f"method:\n  activation_checkpointing: {text}\n")
    for config in (
        config_from_yaml(tmp_path / "config.yaml"), load_config("demo", [f"--method.activation_checkpointing={text}"])
    ):
        found = config.method.activation_checkpointing
        assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["maybe", "2", "null"])
def test_other_values_are_refused(text):
    with pytest.raises(GradeError, match=f"^method.activation_checkpointing is {text}: .* be auto or true or false"):
        load_config("demo", [f"--method.activation_checkpointing={text}"])


@pytest.mark.parametrize("rollout, expected", [(1, True), (9, False)])
def test_auto_leaves_off_what_would_not_help(monkeypatch, rollout, expected):
    """Where sampling takes the most, recomputed activations would only take time; and sampling is what to change."""
    policy, config = tiny_policy(), config_of(batch=4)
    parts = dict(weights=0, optimizer=0, rollout=rollout * GIB, activations=4 * GIB, head=GIB, evaluation=0)
    less = {**parts, "activations": GIB}
    monkeypatch.setattr("grade.memory.plan.estimate", lambda *_: Estimate({}, BATCHES, 0, parts, less))
    found = plan(policy, tiny_reward(policy), config, 8, free=1)
    assert found.checkpoint is expected
    assert ("Set generation.batch_size below 4" in found.line) is (rollout == 9)


def test_what_a_container_has_left(monkeypatch, tmp_path):
    for name, text in (("max", "3000"), ("current", "2500"), ("stat", "anon 9\ninactive_file 400\nactive_file 7\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr("grade.machine.CONTROL_GROUP", tmp_path)
    assert free_bytes(torch.device("cpu")) == 900 and free_bytes(torch.device("cpu"), 2) == 450
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(torch.device("cpu")) > 2**20


def test_free_memory_is_a_number_of_this_machine():
    free = free_bytes(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50


@pytest.mark.parametrize("largest, at", [
    ("activations", "3.0 GiB at B = 4,"), ("rollout", "3.0 GiB in sampling at B = 8,"),
    ("evaluation", "3.0 GiB in evaluation at B = 16,"),
])
def test_the_sentence_names_the_phase_that_decides(largest, at):
    parts = dict(weights=GIB, optimizer=0, rollout=2**20, activations=0, head=0, evaluation=2**20 + 1)
    found = Estimate({"P": 2, "S": 2048, "k": 32}, BATCHES, 0, {**parts, largest: 2 * GIB}, None)
    said = found.sentence(checkpoint=True)
    assert said.startswith(f"about {at} P = 2, S = 2,048, k = 32 (weights 1.0 GiB, optimizer 0 MiB; and ")
    assert largest == "rollout" or "rollout 1 MiB" in said
    assert largest == "evaluation" or "evaluation 2 MiB" in said


def test_no_more_prompts_are_evaluated_together_than_there_are():
    policy = tiny_policy("llama")
    config = config_of()
    config.evaluation.batch_size = 64
    few, many, some = (
        estimate(policy, tiny_reward(policy), config, PROMPT, evaluated) for evaluated in (1, 600, None)
    )
    assert few.batches["evaluation"] == 1 and few.largest(False) != "evaluation"
    assert many == some and many.batches["evaluation"] == 64 and many.largest(False) == "evaluation"


# -- running out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error, expected", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."), True),
    (MemoryError(), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
    (RuntimeError("could not create a primitive"), True),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    (ValueError("can't allocate"), False),
])
def test_what_is_out_of_memory(error, expected):
    assert is_out_of_memory(error) is expected


@pytest.mark.parametrize("section, named, absent", [
    ("train", ["activation_checkpointing to true", "train.batch_size below 4 (with train.accumulation_steps above 1 ",
               "generation.batch_size below 4", "generation.max_new_tokens below 24"], "evaluation.batch_size"),
    ("evaluation", ["evaluation.batch_size below 8", "method.head_chunk_mib below 256"], "train.batch_size"),
])
def test_running_out_names_the_step_and_what_to_change(section, named, absent):
    config = replace(config_of(batch=4), evaluation=EvaluationConfig(batch_size=8))
    parts = dict.fromkeys(("weights", "optimizer", "rollout", "activations", "head", "evaluation"), GIB)
    memory = MemoryPlan(config, Estimate({"P": 2, "S": 2048, "k": 32}, BATCHES, 0, parts, parts), None, False, 2**28)
    with pytest.raises(GradeError) as caught, memory.explained("step 7", section):
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore.")
    text = str(caught.value)
    assert "in step 7" in text and "about 4.0 GiB at B = 4, P = 2, S = 2,048, k = 32" in text and "\n" not in text
    assert all(name in text for name in named) and absent not in text
    with pytest.raises(GradeError, match="out of memory in step 8"), memory.explained("step 8", section):
        torch.empty(2**55)  # what the allocator really says
    with pytest.raises(RuntimeError, match="shapes"), memory.explained("step 7", section):
        raise RuntimeError("shapes differ")


def test_a_run_that_is_out_of_memory_keeps_its_checkpoint(tiny_config, capfd):
    config = with_train(tiny_config, save_every=1)
    trainer = Trainer(config, make_accelerator(config), prepare_run_dir(config))
    step = trainer.method.step

    def second_step_fails(rollouts, number, update):
        if number == 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return step(rollouts, number, update)

    trainer.method.step = second_step_fails
    with pytest.raises(GradeError, match=r"^out of memory in step 1, .* at B = 4, P = \d+, S = 8, k = 32 .*batch_size"):
        trainer.fit()
    assert load_state(Path(config.run_dir) / "checkpoints" / "last")["step"] == 1
    assert config_from_yaml(Path(config.run_dir) / "config.yaml").method.activation_checkpointing == "auto"
    said = " ".join(capfd.readouterr().err.split())
    assert said.count("memory: about") == 1 and "activation checkpointing off (auto)" in said


def test_a_validation_that_is_out_of_memory_says_so(tiny_config, monkeypatch):
    def fails(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer = trainer_of(tiny_config)
    monkeypatch.setattr("grade.training.trainer.evaluate", fails)
    with pytest.raises(GradeError, match="the validation evaluation, .*evaluation.batch_size below 8"):
        trainer.fit()


def test_a_trainer_with_little_memory_checkpoints(tiny_config, monkeypatch):
    monkeypatch.setattr("grade.training.trainer.free_bytes", lambda *_: 1)
    trainer = trainer_of(tiny_config)
    assert trainer.method.settings(0).checkpoint and trainer.config.method.activation_checkpointing == "auto"
    assert trainer.train_step()["grad_norm"] > 0
