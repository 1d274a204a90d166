"""`model.adapter` and `model.reference`: what a policy goes on from, and what KL is measured to."""

from __future__ import annotations

import json
import shutil
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import embeddings_of, loaded_policy, tiny_policy, tiny_reward, two_references
from tiny_run import adapter_of, changed, stopped_after, timeless
from transformers import AutoModelForCausalLM, AutoTokenizer

from grade import GradeTrainer
from grade.commands.evaluate import evaluate_run
from grade.config import LoraSettings
from grade.errors import GradeError
from grade.model.adapter import REFERENCE
from grade.model.checkpoint import load_adapter
from grade.model.passes import base_pass, fed_embeddings, policy_pass
from grade.model.probe import relative_error
from grade.processes import make_accelerator
from grade.replay.replay import ReplaySettings, replay
from grade.replay.score import ScoreSettings, score
from grade.rollout import pad_prompts
from grade.sampling.draw import Sampling
from grade.sampling.sample import sample
from grade.training.run_folder import prepare_run_dir
from grade.training.trainer import Trainer


@pytest.fixture(scope="module")
def adapter(trained_run):
    return trained_run / "checkpoints" / "last"


def going_on(config, adapter, **model):
    """The tiny run from that adapter, with LoRA's settings left out."""
    return changed(config, model={"adapter": str(adapter), "lora": LoraSettings(), **model})


def rollout_of(policy, dtype=torch.float32):
    ids, mask = pad_prompts([[5, 9, 2, 7], [6, 8]], 0)
    return sample(policy, ids, mask, Sampling(6, 2, 16, 1.0), seed=3, samples_per_prompt=2, first_rows=torch.arange(4))


# -- loading -------------------------------------------------------------------------------------------------------


def test_weights_and_settings_are_the_adapters(tiny_config, adapter):
    policy = loaded_policy(going_on(tiny_config, adapter))
    settings = policy.model.peft_config["default"]
    assert (settings.r, settings.lora_alpha) == (4, 8) and not policy.has_reference
    saved = load_file(adapter / "adapter_model.safetensors")
    ours = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    assert len(saved) == len(ours)
    assert all(torch.equal(saved[name.replace(".default", "")], p) for name, p in ours.items())


@pytest.mark.parametrize(
    "lora, message",
    [
        (LoraSettings(r=8), "model.lora.r is 8, but model.adapter=.* has 4"),
        (LoraSettings(alpha=3), "model.lora.alpha is 3, but .* has 8"),
        (LoraSettings(target_modules=["up_proj"]), "model.lora.target_modules is up_proj, but .*Leave model.lora out"),
    ],
)
def test_settings_that_contradict_it_are_refused(tiny_config, adapter, lora, message):
    with pytest.raises(GradeError, match=message):
        loaded_policy(going_on(tiny_config, adapter, lora=lora))


def test_what_is_no_plain_lora_adapter_is_refused(tiny_config, adapter, trained_run, tmp_path):
    with pytest.raises(GradeError, match="no adapter here .*It is a run: name .*checkpoints/best"):
        loaded_policy(going_on(tiny_config, trained_run))
    copied = tmp_path / "adapter"
    shutil.copytree(adapter, copied)
    (copied / "manifest.json").unlink()
    path = copied / "adapter_config.json"
    before = json.loads(path.read_text())
    for change, message in (
        ({"use_dora": True}, r"more than a LoRA adapter .*\(use_dora in"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"peft_type": "LOHA"}, "of the kind .*Name a LoRA adapter"),
        ({"target_modules": ["nothing"]}, "does not fit model.name"),
        ({"target_modules": ["q_proj"]}, "tensors are missing from it and .* have no place here. Name the model"),
        ({"target_modules": ["lm_head", "q_proj"]}, "does not fit model.name"),
    ):
        path.write_text(json.dumps({**before, **change}))
        with pytest.raises(GradeError, match=message):
            loaded_policy(going_on(tiny_config, copied))


def test_another_base_of_the_same_shapes_is_refused(tiny_config, tiny_model, adapter, tmp_path, capfd, monkeypatch):
    moved = tmp_path / "moved"
    shutil.copytree(tiny_model, moved)
    loaded_policy(going_on(tiny_config, adapter, name=str(moved), dtype="bfloat16"))  # the same weights, told by value
    assert "was trained on" not in capfd.readouterr().err
    foreign = tmp_path / "foreign"  # which says the name of its base alone
    shutil.copytree(adapter, foreign)
    (foreign / "manifest.json").unlink()
    loaded_policy(going_on(tiny_config, foreign))
    assert "was trained on" not in capfd.readouterr().err
    loaded_policy(going_on(tiny_config, foreign, name=str(moved)))
    words = f"model.adapter={foreign} was trained on {tiny_model}, and is put on {moved}. Nothing tells"
    assert words in " ".join(capfd.readouterr().err.split())
    weights = load_file(moved / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, moved / "model.safetensors", {"format": "pt"})
    with pytest.raises(GradeError, match=r"trained on another base than this: on .*, whose .*/moved\. Name the model"):
        loaded_policy(going_on(tiny_config, adapter, name=str(moved)))
    monkeypatch.setattr("transformers.__version__", "99.0")  # which may have laid the same weights out otherwise
    loaded_policy(going_on(tiny_config, adapter, name=str(moved)))
    assert "and is put on" in (said := " ".join(capfd.readouterr().err.split())) and "with 99.0." in said


def test_the_base_that_a_given_peft_model_names_is_compared(tiny_model, capfd):
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    given = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    for ours, theirs, refused in (("a/one", "b/one", False), ("a/one", "a/two", True), ("a/one", "./one", False)):
        base.name_or_path, given.peft_config["default"].base_model_name_or_path = ours, theirs
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        make = partial(GradeTrainer, given, lambda completions: [], ["We saw it."], tokenizer=tokenizer)
        if refused:
            with pytest.raises(GradeError, match="model: its adapter was trained on a/two, and is put on a/one"):
                make()
        else:
            make()
            assert f"was trained on {theirs}, and is put on {ours}" in " ".join(capfd.readouterr().err.split())


def test_an_edited_pattern_makes_another_adapter(tiny_config, adapter, tmp_path):
    shutil.copytree(adapter, copied := tmp_path / "adapter")
    (copied / "manifest.json").unlink()
    before = loaded_policy(going_on(tiny_config, copied))
    path = copied / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "alpha_pattern": {"q_proj": 64}}))
    assert loaded_policy(going_on(tiny_config, copied)).started_from != before.started_from
    with pytest.raises(GradeError, match="trained with alpha_pattern"):
        load_adapter(copied, before)


# -- the reference -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reads", ["prompt+response", "response"])
def test_kl_to_the_policy_as_it_started_is_zero_until_it_moves(reads):
    policy = two_references()
    assert policy.has_reference and len(policy.parameters()) == len(tiny_policy().parameters())
    reward, rollout = tiny_reward(policy, reads), rollout_of(policy)
    settings = ScoreSettings(prompt_cache=False)
    assert (score(policy, reward, rollout, settings).kl == 0).all()
    assert (score(policy, reward, rollout, settings, adapters=False).kl[rollout.mask] > 0).all()  # the base moved away
    before = adapter_of(policy)
    reference = [p.clone() for n, p in policy.model.named_parameters() if f".{REFERENCE}." in n]
    weight = torch.full((len(rollout),), 0.25)
    replay(
        policy,
        reward,
        rollout,
        ReplaySettings(tau=1.0),
        reward_weight=weight,
        kl_weight=torch.full(rollout.mask.shape, 0.1),
    )
    torch.optim.SGD(policy.parameters(), 0.1).step()
    assert not torch.equal(adapter_of(policy), before)
    assert all(map(torch.equal, reference, [p for n, p in policy.model.named_parameters() if f".{REFERENCE}." in n]))
    assert score(policy, reward, rollout, settings).kl.max() > 1e-6


@pytest.mark.parametrize("prompt_cache, checkpoint", [(True, False), (False, False), (False, True)])
def test_the_reference_has_a_pass_of_its_own_and_the_reward_keeps_the_base(prompt_cache, checkpoint):
    """States and gradients at the embeddings are those of two passes: the base's, and the policy's before it moved."""
    policy = two_references()
    policy.enable_activation_checkpointing()
    plain = tiny_policy()
    rollout = rollout_of(plain)
    x = fed_embeddings(rollout, plain.embedding, 1.0).requires_grad_()
    expected = base_pass(plain, rollout, x, prompt_cache=False).response, policy_pass(plain, rollout, x)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1)
    found = base_pass(policy, rollout, x, prompt_cache=prompt_cache, activation_checkpointing=checkpoint)
    alone = base_pass(policy, rollout, x, prompt_cache=prompt_cache, reads_base=False)
    weights = torch.linspace(-1, 1, x.numel()).view_as(x) * rollout.mask[..., None]
    gradients = []
    for states in (expected, (found.response, found.reference)):
        gradients.append(torch.autograd.grad([s[rollout.mask] for s in states], x, [weights[rollout.mask]] * 2)[0])
    for value, other in zip((found.response, found.reference, alone.reference), (*expected, expected[1]), strict=True):
        assert torch.allclose(value[rollout.mask], other[rollout.mask], atol=1e-5)
    assert relative_error(*gradients) < 1e-4 and gradients[0].abs().max() > 0.1


def test_states_nest_with_a_reference():
    policy = two_references()
    x, mask = embeddings_of(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1)
        own = policy.hidden(x, mask)
        with policy.state(adapters=False):
            base = policy.hidden(x, mask)
            with policy.state(adapters=False, reference=True):
                assert not torch.equal(policy.hidden(x, mask), base) and not torch.equal(policy.hidden(x, mask), own)
            assert torch.equal(policy.hidden(x, mask), base)
        with policy.merged():
            assert torch.allclose(policy.hidden(x, mask), own, atol=1e-5)
        assert torch.equal(policy.hidden(x, mask), own)


# -- a run ---------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_from_an_adapter_resumes_and_knows_it(tiny_config, adapter, tmp_path, capsys):
    copied = tmp_path / "adapter"
    shutil.copytree(adapter, copied)
    config = going_on(tiny_config, copied, reference="initial")
    stopped_after(config)
    last = Trainer(again := changed(config, train={"resume": True}), make_accelerator(again), prepare_run_dir(again))
    last.fit()
    whole = changed(config, train={"run_dir": str(tmp_path / "whole")})
    trainer = Trainer(whole, make_accelerator(whole), prepare_run_dir(whole))
    started = adapter_of(trainer.policy)
    trainer.fit()
    assert torch.equal(adapter_of(last.policy), adapter_of(trainer.policy))
    assert not torch.equal(adapter_of(trainer.policy), started)
    rows = [timeless(tmp_path / folder / "metrics.jsonl") for folder in ("run", "whole")]
    kl = [row["kl"] for row in rows[0] if "kl" in row]
    assert rows[0] == rows[1] and len(kl) == 4 and abs(kl[0]) < 1e-5 < kl[-1]
    said = " ".join(capsys.readouterr().err.split())
    assert "goes on from" in said and "the reference of KL is the policy as it started" in said
    card = (tmp_path / "whole" / "checkpoints" / "last" / "README.md").read_text(encoding="utf-8")
    assert "KL to the base" not in card and card.count("KL to the policy as it started") == 2
    names = load_file(tmp_path / "whole" / "checkpoints" / "last" / "adapter_model.safetensors")
    assert not any(REFERENCE in name for name in names)
    rows = evaluate_run(whole, tmp_path / "whole", "last", "validation")
    assert rows[0].model == "base" and min(row.kl for row in rows) > 1e-4  # the base is not where the run started

    (copied / "manifest.json").unlink()
    weights = copied / "adapter_model.safetensors"
    tensors = {name: tensor + 1 for name, tensor in load_file(weights).items()}
    save_file(tensors, weights)
    with pytest.raises(GradeError, match="made with something else: the adapter of model.adapter"):
        evaluate_run(whole, tmp_path / "whole", "last", "validation")
