"""`model.finetuning: full`: every weight of the backbone is trained beside a frozen copy of it."""

from __future__ import annotations

import pytest
import torch
from tiny import CONFIGS, TinyTokenizer, base_model, embeddings_of, loaded_policy, tiny_reward
from tiny_run import adapter_of, changed, stopped_after, timeless
from transformers import AutoModelForCausalLM

from grade.commands.evaluate import evaluate_run
from grade.commands.export import export_run
from grade.commands.generate import generate_from
from grade.config import validate
from grade.config.reading import load_config
from grade.errors import GradeError
from grade.model.policy import Policy
from grade.processes import make_accelerator
from grade.replay.replay import ReplaySettings, replay
from grade.rollout import pad_prompts
from grade.sampling.draw import Sampling
from grade.sampling.sample import sample
from grade.training.run_folder import prepare_run_dir
from grade.training.trainer import Trainer

NAMES = ["llama", "llama-tied", "gpt2", "gemma2"]


def full_policy(name="llama"):
    return Policy(base_model(CONFIGS[name]()), TinyTokenizer())


@pytest.mark.parametrize("name", NAMES)
def test_every_weight_of_the_backbone_is_trained_and_the_base_stays(name):
    policy = full_policy(name)
    trained = {id(p) for p in policy.parameters()}
    shared = {id(m.weight) for m in (policy.causal_lm.get_input_embeddings(), policy.causal_lm.get_output_embeddings())}
    assert trained == {id(p) for p in policy.backbone.parameters()} - shared
    assert {id(p) for p in policy.frozen_backbone.parameters()} & trained == set()
    assert {id(p) for p in policy.frozen_backbone.parameters()} & shared  # the table is not kept twice
    x, mask = embeddings_of(policy)
    with torch.no_grad():
        before = policy.hidden(x, mask)
        for parameter in policy.parameters():
            parameter.add_(0.05)
        with policy.state(adapters=False):
            assert torch.equal(policy.hidden(x, mask), before)
        assert not torch.equal(policy.hidden(x, mask), before)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_replay_gives_every_weight_its_gradient(checkpoint):
    policy = full_policy()
    policy.enable_activation_checkpointing()
    reward = tiny_reward(policy)
    ids, mask = pad_prompts([[5, 9, 2, 7], [6, 8]], 0)
    rollout = sample(policy, ids, mask, Sampling(6, 2, 16, 1.0), seed=3, first_rows=torch.arange(2))
    settings = ReplaySettings(tau=1.0, activation_checkpointing=checkpoint, max_hops=6, hop_tol=0.0)
    result = replay(
        policy,
        reward,
        rollout,
        settings,
        reward_weight=torch.full((2,), 0.5),
        kl_weight=torch.full(rollout.mask.shape, 0.1),
    )
    assert result.kl.abs().max() < 1e-6
    gradients = [p.grad for p in policy.parameters()]
    assert all(g is not None and g.abs().max() > 0 for g in gradients)
    assert all(p.grad is None for p in policy.frozen_backbone.parameters())
    if checkpoint:
        expected = full_policy()
        replay(
            expected,
            tiny_reward(expected),
            rollout,
            ReplaySettings(tau=1.0, max_hops=6, hop_tol=0.0),
            reward_weight=torch.full((2,), 0.5),
            kl_weight=torch.full(rollout.mask.shape, 0.1),
        )
        for found, parameter in zip(gradients, expected.parameters(), strict=True):
            assert (found - parameter.grad).norm() < 1e-4 * parameter.grad.norm()


def test_a_run_saves_whole_models_resumes_and_is_used(tiny_config, tmp_path, capsys):
    config = changed(tiny_config, model={"finetuning": "full"}, train={"learning_rate": 1e-4})
    stopped_after(config)
    again = changed(config, train={"resume": True})
    last = Trainer(again, make_accelerator(again), prepare_run_dir(again))
    last.fit()
    run_dir = tmp_path / "whole"
    whole = changed(config, train={"run_dir": str(run_dir)})
    trainer = Trainer(whole, make_accelerator(whole), prepare_run_dir(whole))
    started = adapter_of(trainer.policy)
    trainer.fit()
    assert torch.equal(adapter_of(last.policy), adapter_of(trainer.policy))
    assert not torch.equal(adapter_of(trainer.policy), started)
    assert timeless(tmp_path / "run" / "metrics.jsonl") == timeless(run_dir / "metrics.jsonl")

    plain = AutoModelForCausalLM.from_pretrained(str(export_run(whole, run_dir, "last", False, None)))
    trained = dict(plain.named_parameters())
    assert all(torch.equal(trained[n], p) for n, p in last.policy.causal_lm.named_parameters())
    assert "AutoModelForCausalLM loads it" in capsys.readouterr().out
    with pytest.raises(GradeError, match="no adapter to merge"):
        export_run(whole, run_dir, "last", True, None)
    rows = evaluate_run(whole, run_dir, "last", "validation")
    assert rows[0].kl == pytest.approx(0, abs=1e-6) and rows[1].kl > 1e-6
    capsys.readouterr()
    generate_from(whole, run_dir, ["The film"], checkpoint="last")
    assert capsys.readouterr().out.strip()
    with pytest.raises(GradeError, match="model.safetensors is missing, but model.finetuning is full"):
        (run_dir / "checkpoints" / "last" / "model.safetensors").rename(run_dir / "moved")
        (run_dir / "checkpoints" / "last" / "adapter_config.json").write_text("{}")
        evaluate_run(whole, run_dir, "last", "validation")


def test_it_is_refused_where_it_cannot_be(tiny_config, monkeypatch):
    for model in ({"dtype": "bfloat16"}, {"quantization": "4bit"}, {"adapter": "somewhere"}):
        (name,) = model
        with pytest.raises(GradeError, match=f"model.finetuning=full .*but model.{name} is .* Set it to"):
            validate(changed(tiny_config, model={"finetuning": "full", **model}))
    monkeypatch.setattr("grade.model.loading.free_bytes", lambda *_: 2**20)
    with pytest.raises(GradeError, match="would take .* GiB to train .* GiB are free. Train an adapter"):
        loaded_policy(changed(tiny_config, model={"finetuning": "full"}))


def test_in_yaml_lora_null_means_it_and_an_empty_section_does_not(tmp_path):
    path = tmp_path / "mine.yaml"
    for text, expected in (("null", "full"), ("~", "full"), ("", "lora"), ("# r: 3", "lora")):
        path.write_text(f"model:\n  lora: {text}\n")
        assert load_config(path).model.finetuning == expected
