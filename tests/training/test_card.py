"""What lies in a checkpoint beside the weights: the tokenizer, a base that is found from anywhere, the model card; and
what run.json says of who made the run."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from forked import forked
from tiny_run import stopped_after, with_train

from grade import __version__
from grade.config import Config
from grade.config.reading import config_from_yaml
from grade.hub_names import name_anywhere
from grade.model.checkpoint import verified_step
from grade.processes import make_accelerator
from grade.training.card import model_card
from grade.training.run_folder import _written, prepare_run_dir
from grade.training.sessions import command_line, git_commit
from grade.training.trainer import Trainer

CHECKPOINTS = ("best", "last", "step-2", "step-4")


def card_of(run_dir, checkpoint):
    return (run_dir / "checkpoints" / checkpoint / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_checkpoint_says_what_it_is(trained_run, checkpoint):
    folder = trained_run / "checkpoints" / checkpoint
    card, config = card_of(trained_run, checkpoint), config_from_yaml(trained_run / "config.yaml")
    step = verified_step(folder)
    assert "More Information Needed" not in card
    for words in (
        config.model.name,
        "probability of",
        "grade-ste",
        "LoRA of rank 4",
        "| learning rate | 0.001",
        f"after {step} of 4 optimizer steps",
        f"grade {__version__}",
        "AutoPeftModelForCausalLM",
    ):
        assert words in card, words
    evaluations = json.loads((trained_run / "evaluation.json").read_text())
    row = next(row for row in evaluations["validation"] if row["step"] == step)
    for of in (evaluations["validation"][0], row):
        assert f"{of['reward']:.3f} ± {of['reward_stderr']:.3f} | {of['kl']:.3f} | {of['entropy']:.2f}" in card
    tested = f"| test | trained, step {step} | 16 | {evaluations['test']['best']['reward']:.3f}"
    assert (tested in card) == (checkpoint == "best")
    session = json.loads((trained_run / "run.json").read_text())["sessions"][0]
    assert session["command"] in card and session["started"] not in card and str(trained_run) not in card
    manifest = json.loads((folder / "manifest.json").read_text())["files"]
    assert {"README.md", "tokenizer.json", "tokenizer_config.json"} <= set(manifest)


def test_the_settings_in_a_card_give_the_run_again(trained_run, tmp_path):
    card = card_of(trained_run, "best")
    (tmp_path / "again.yaml").write_text(card.split("```yaml\n")[1].split("```")[0])
    ran, again = config_from_yaml(trained_run / "config.yaml"), config_from_yaml(tmp_path / "again.yaml")
    assert replace(again, output_dir=ran.output_dir, train=replace(again.train, run_dir=ran.train.run_dir)) == ran


def test_a_card_is_read_by_the_hub():
    """Its metadata names what is on the hub, and no folder of this machine; what holds a | stays in its cell."""
    config = Config()
    row = {
        "split": "validation",
        "model": "base",
        "step": 0,
        "prompts": 4,
        "reward": 0.5,
        "reward_stderr": 0.1,
        "kl": 0.0,
        "entropy": 3.0,
        "unique_token_ratio": 0.9,
        "mean_length": 8.0,
        "eos_rate": 0.25,
        "details": {"solve_rate": 0.25},
    }
    card = model_card(config, {"reward": "the label 'a|b'"}, 3, [row])
    assert "the label 'a\\|b' is raised" in card and "solve_rate" in card
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["base_model"] == config.model.name and metadata["datasets"] == [config.task.dataset]
    assert "| coefficient 0.1, policy_ref," in card
    config.method.target_kl = 0.5
    card = model_card(config, {}, 3, [])
    assert "| coefficient from 0.1, steered to a KL of 0.5 nats, policy_ref, token_mean |" in card
    config.model.name, config.task.dataset = "/a/folder", "./data"
    assert not {"base_model", "datasets"} & set(yaml.safe_load(model_card(config, {}, 3, []).split("---\n")[1]))


def test_peft_loads_a_checkpoint_from_any_directory(trained_run, tmp_path):
    """From a directory in which the base's name, given relative to another one, means nothing."""
    code = (
        "import sys; from peft import AutoPeftModelForCausalLM; from transformers import AutoTokenizer\n"
        "m = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]); t = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "print(m(**t('the film', return_tensors='pt')).logits.sum().item(), m.active_adapters)"
    )
    (tmp_path / "program.py").write_text(code)
    program = [tmp_path / "program.py", trained_run / "checkpoints" / "best"]
    ((status, said, errors),) = forked([(program, {})], cwd=tmp_path, timeout=120)
    assert status == 0 and "['default']" in said, errors


def test_a_base_is_named_so_that_it_is_found_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert name_anywhere("models/mine") == str(tmp_path / "models" / "mine")
    assert name_anywhere("Qwen/Qwen3-4B") == "Qwen/Qwen3-4B"


def test_the_chat_template_is_saved_and_everything_is_deleted_with_the_run(tiny_config):
    config = with_train(tiny_config, steps=1)
    trainer = Trainer(config, make_accelerator(config), prepare_run_dir(config))
    trainer.policy.tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    trainer.fit()
    last = trainer.run_dir / "checkpoints" / "last"
    assert (last / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (last / "additional_chat_templates" / "tools.jinja").is_file() and verified_step(last) == 1
    assert {path for path in last.rglob("*")} <= set(_written(trainer.run_dir))


def test_who_made_a_run_is_recorded_and_changes_nothing_else(trained_run, tiny_config):
    """A run that was stopped has a second session, and the same cards as one that was not."""
    stopped_after(with_train(tiny_config, keep_adapters=True))
    (first,) = json.loads((Path(tiny_config.run_dir) / "run.json").read_text())["sessions"]
    assert first["started"] <= first["ended"]
    resumed = with_train(tiny_config, keep_adapters=True, resume=True)
    Trainer(resumed, make_accelerator(resumed), prepare_run_dir(resumed)).fit()
    record = json.loads((Path(tiny_config.run_dir) / "run.json").read_text())
    before, second = record.pop("sessions")
    assert first["deterministic"] is False
    assert before == first and (first["after_step"], second["after_step"]) == (0, 2)
    assert second["versions"]["torch"] == torch.__version__ and second["machine"]["cpu"] and second["processes"] == 1
    undisturbed = json.loads((trained_run / "run.json").read_text())
    assert undisturbed.pop("sessions") and undisturbed == record
    for checkpoint in CHECKPOINTS:
        assert card_of(Path(tiny_config.run_dir), checkpoint) == card_of(trained_run, checkpoint)


def test_commands_are_written_as_a_shell_takes_them(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/opt/x/grade/__main__.py", "train", "my config.yaml"])
    assert command_line() == "grade train 'my config.yaml'"
    monkeypatch.setattr(sys, "argv", ["/home/me/try.py", "--x", "1"])
    assert command_line() == "python try.py --x 1"


def test_a_commit_is_that_of_the_code(tmp_path):
    """An installed package that lies in another project's repository is not of that project's commit."""

    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e", "-C", tmp_path, *arguments], check=True)

    git("init", "-q")
    (tmp_path / "kept.py").write_text("1")
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "module.py").write_text("1")
    git("add", "kept.py")
    git("commit", "-q", "-m", "m")
    commit = git_commit(tmp_path)
    assert len(commit) == 40 and git_commit(tmp_path / "installed") is None
    (tmp_path / "kept.py").write_text("2")
    assert git_commit(tmp_path) == f"{commit}-dirty"
