"""`grade export`: what is written works in other programs, and computes what the run's policy computes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from tiny import tiny_policy
from transformers import AutoModelForCausalLM

import grade.commands.export
import grade.training.export
from grade import cli
from grade.commands.export import described
from grade.config import Config
from grade.config.reading import config_from_yaml
from grade.errors import GradeError
from grade.model.checkpoint import verified_step
from grade.training.export import Merged, logits_of, merge
from grade.training.trained import load_trained, sampled_prompts
from grade_kernels.common.cpu_products import VARIABLE

LOADED = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (auto.from_pretrained(sys.argv[1]) for auto in (AutoModelForCausalLM, AutoTokenizer))
rows = [torch.tensor([ids]) for ids in eval(sys.argv[2])]
with torch.no_grad():
    torch.save([model(input_ids=row, use_cache=False).logits[0] for row in rows], sys.argv[3])
print(model.generation_config.eos_token_id, tokenizer("the film").input_ids)
"""


def export(*arguments):
    return cli.main(["export", *map(str, arguments)])


def loaded(run_dir, checkpoint, **model):
    config = config_from_yaml(run_dir / "config.yaml")
    for name, value in model.items():
        setattr(config.model, name, value)
    return load_trained(config, run_dir, run_dir / "checkpoints" / checkpoint, torch.device("cpu"))


def test_an_adapter_is_exported_without_the_trainer(trained_run, tmp_path, capsys):
    target = tmp_path / "adapter"
    assert export(trained_run, "--checkpoint", "last", "--to", target) == 0
    assert str(target) in capsys.readouterr().out
    assert verified_step(target) == 4
    names = {path.name for path in target.iterdir()}
    assert {"adapter_model.safetensors", "README.md", "tokenizer.json"} <= names
    assert not any(name.startswith("trainer_state") for name in names)
    weights = (path / "adapter_model.safetensors" for path in (target, trained_run / "checkpoints" / "last"))
    assert len({path.read_bytes() for path in weights}) == 1


def test_a_merged_model_is_plain_transformers_and_the_policy_to_the_bit(trained_run, tmp_path, capsys):
    """Loaded by a process that has none of this program, in a directory with nothing else."""
    target, fresh = tmp_path / "merged", tmp_path / "fresh"
    assert export(trained_run, "--merge", "--to", target) == 0
    said = capsys.readouterr().out
    policy = loaded(trained_run, "best")
    prompts = sampled_prompts(trained_run, policy.tokenizer)
    fresh.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", LOADED, str(target), str(prompts), "logits.pt"],
        cwd=fresh,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == str(policy.eos_ids.item())
    beside = logits_of(policy.causal_lm, prompts)
    with policy.merged():
        expected = logits_of(policy.causal_lm, prompts)
    found = torch.load(fresh / "logits.pt")
    assert len(prompts) == 3 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    largest = max((a - b).abs().max().item() for a, b in zip(expected, beside, strict=True))
    assert f"{largest:.3g} between adapter and merged weights" in said and largest < 1e-4
    card = (target / "README.md").read_text()
    assert "library_name: transformers" in card and "| test | trained" in card and "More Information" not in card


def test_merged_weights_have_the_dtype_of_the_base_and_are_rounded_once(trained_run, tmp_path):
    target = tmp_path / "merged"
    assert export(trained_run, "--merge", "--to", target, "--model.dtype", "bfloat16") == 0
    assert "base in float32" in (target / "README.md").read_text()  # as it was trained
    name = "model.layers.0.self_attn.q_proj.weight"
    found = AutoModelForCausalLM.from_pretrained(target)
    assert found.dtype == torch.bfloat16
    layer = loaded(trained_run, "best", dtype="bfloat16").causal_lm.model.layers[0].self_attn.q_proj
    exact = layer.get_base_layer().weight.double() + layer.get_delta_weight("default").double()
    assert torch.equal(found.state_dict()[name], exact.to(torch.bfloat16))


@pytest.mark.parametrize("lost, warned", [(0.05, False), (0.2, True)])
def test_what_rounding_loses_is_told(lost, warned):
    lines = described(Merged([], from_adapter=lost, of_training=1.0), Config())
    assert f"{lost} between adapter and merged weights" in lines[1] and ("warning: rounding" in lines[-1]) == warned


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gpt-neox", "gemma2", "mamba"])
def test_merging_keeps_what_every_architecture_computes(name, tmp_path):
    policy, prompts = tiny_policy(name), [[5, 7, 11, 13], [17, 19]]
    beside = logits_of(policy.causal_lm, prompts)
    model, merged = policy.causal_lm, merge(policy, prompts)
    for a, b in zip(beside, merged.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert merged.of_training > 100 * merged.from_adapter
    model.save_pretrained(tmp_path)
    again = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path).eval().requires_grad_(False), prompts)
    assert all(torch.equal(a, b) for a, b in zip(again, merged.logits, strict=True))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
def test_a_merged_model_computes_what_other_programs_do_whatever_made_the_policy_s_products(monkeypatch):
    """On some processors oneDNN makes a run's products, and rounds otherwise than the MKL of a plain model."""
    monkeypatch.setenv(VARIABLE, "onednn")
    policy, prompts = tiny_policy(), [[5, 7, 11, 13] * 12]
    model, merged = policy.causal_lm, merge(policy, prompts)
    assert {type(module) for module in model.modules() if isinstance(module, torch.nn.Linear)} == {torch.nn.Linear}
    monkeypatch.setenv(VARIABLE, "mkl")
    assert torch.equal(logits_of(model, prompts)[0], merged.logits[0])


def test_a_model_whose_layers_share_weights_is_not_merged():
    with pytest.raises(GradeError, match="shares the adapted weights"):
        merge(tiny_policy("zamba"), [[5, 7]])


def test_what_was_written_wrongly_is_told_and_deleted(trained_run, tmp_path, monkeypatch, capsys):
    class Damaged(AutoModelForCausalLM):
        @classmethod
        def from_pretrained(cls, *arguments, **options):
            model = AutoModelForCausalLM.from_pretrained(*arguments, **options)
            model.model.norm.weight.data[0] += 1e-3
            return model

    monkeypatch.setattr(grade.training.export, "AutoModelForCausalLM", Damaged)
    assert export(trained_run, "--merge", "--to", tmp_path / "merged") == 2
    assert "does not compute what was merged" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_refused_before_anything_is_loaded(trained_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(grade.commands.export, "load_trained", None)
    full, empty = tmp_path / "full", tmp_path / "run"
    full.mkdir()
    (full / "kept").touch()
    empty.mkdir()
    shutil.copy(trained_run / "config.yaml", empty)
    run, elsewhere = tmp_path / "copy", tmp_path / "elsewhere"
    damaged, foreign = run / "damaged", run / "foreign"
    shutil.copytree(trained_run, run)
    for folder in (damaged, foreign, elsewhere):
        shutil.copytree(trained_run / "checkpoints" / "best", folder)
    (damaged / "adapter_model.safetensors").write_bytes(b"")
    (foreign / "manifest.json").unlink()
    for arguments, words in (
        ([trained_run, "--to", full], "not empty"),
        ([trained_run, "--to", full / "kept"], "is a file"),
        ([empty], "has no checkpoint yet"),
        ([trained_run, "--checkpoint", "step-3"], "has best, best-2, last, resume-2, step-2, step-4"),
        ([run, "--checkpoint", damaged], "is damaged"),
        ([run, "--checkpoint", foreign], "no checkpoint of a run"),
        ([run, "--checkpoint", elsewhere], "does not lie in"),
        ([run, "--checkpoint", trained_run / "checkpoints" / "best"], "does not lie in"),
        ([full], "is not a run directory"),
        ([], "RUN_DIR is missing"),
        ([trained_run, "more"], "unexpected argument 'more'"),
        ([trained_run, "--to", ""], "--to"),
    ):
        for how in ([], ["--merge"]):
            target = [] if "--to" in arguments else ["--to", tmp_path / "target"]
            assert export(*arguments, *how, *target) == 2, arguments
            assert words in capsys.readouterr().err
    assert not (tmp_path / "target").exists() and json.loads((trained_run / "run.json").read_text())
