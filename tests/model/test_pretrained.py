"""Models by name: what looks like a path stays here, no code of a folder runs unasked, and files are told by fault."""

from __future__ import annotations

import json
import pickle
import socket
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from classifiers import SAME, classifier, save_tokenizer
from tiny import CONFIGS, loaded_policy
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, LlamaConfig, MambaConfig, MptConfig

from grade.config import Config
from grade.errors import GradeError, reason_of
from grade.hub_names import looks_local
from grade.model.checkpoint import load_adapter, save_checkpoint
from grade.model.loading import load_tokenizer
from grade.model.pretrained import Pretrained, context_of
from grade.rewards.classifier import check_classifier


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """Hosts that were looked up; a question on the terminal would find no terminal."""
    hosts = []

    def look_up(host, *_, **__):
        hosts.append(host)
        raise OSError("tests do not use the network")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(sys, "stdin", None)
    return hosts


@pytest.fixture
def folder(tmp_path):
    """A whole model."""
    torch.manual_seed(0)
    folder = tmp_path / "somebody" / "model"
    AutoModelForCausalLM.from_config(CONFIGS["llama"]()).save_pretrained(folder)
    save_tokenizer(folder, SAME)
    return folder


def config_for(name, **model):
    config = Config()
    config.model = replace(config.model, name=str(name), dtype="float32", **model)
    config.generation.top_k = 16
    config.task.prompt_max_tokens, config.generation.max_new_tokens, config.reward.max_tokens = 8, 16, 16
    return config


def load(name, **model):
    return loaded_policy(config_for(name, **model))


def test_a_whole_folder_loads_and_nothing_is_looked_up(folder, asked, monkeypatch):
    assert load(folder).vocab_size == 61
    monkeypatch.chdir(folder.parent.parent)
    assert load("somebody/model").vocab_size == 61  # a folder of that name is here
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load("~/model").vocab_size == 61
    assert not asked


@pytest.mark.parametrize(
    "name, local",
    [
        ("gpt2", False),
        ("org/model", False),
        ("./model", True),
        ("../model", True),
        ("/model", True),
        ("~/model", True),
        ("runs/x/checkpoints/best", True),
        ("C:\\models", True),
        ("x" * 5000, False),
        ("a\0b", False),
    ],
)
def test_what_looks_like_a_path(name, local, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert looks_local(name) is local
    if "/" in name and not local:
        (tmp_path / name).mkdir(parents=True)
        assert looks_local(name)


MISSING = {
    "config.json": "has no config.json",
    "model.safetensors": "has no weights .model.safetensors or pytorch_model.bin.*not looked up at the hub",
    "tokenizer": "has no tokenizer .*save_pretrained.FOLDER",
}


@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize("named", ["path", "as on the hub"])
def test_an_incomplete_folder_names_the_file_and_asks_nobody(folder, asked, monkeypatch, missing, named):
    for file in folder.glob(f"{missing}*"):
        file.unlink()
    monkeypatch.chdir(folder.parent.parent)
    with pytest.raises(GradeError, match=f"model.name=.*cannot be loaded: .*{MISSING[missing]}"):
        load(folder if named == "path" else "somebody/model")
    assert not asked


def test_an_index_without_its_parts_names_the_part(folder, asked):
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    (folder / "model-1.safetensors").touch()
    with pytest.raises(GradeError, match="lacks model-2.safetensors, which model.safetensors.index.json names"):
        load(folder)
    index.write_text("{")
    with pytest.raises(GradeError, match="model.name=.*cannot be loaded: "):
        load(folder)
    assert not asked


@pytest.mark.parametrize("name", ["./nowhere", "~/nowhere", "runs/none/checkpoints/best"])
def test_a_path_without_a_folder_is_no_hub_name(name, asked):
    for setting in ("model.name", "reward.model"):
        with pytest.raises(GradeError, match=f"{setting}={name} cannot be loaded: .*no folder here"):
            Pretrained(setting, name)
    assert not asked


@pytest.mark.parametrize("whole", [False, True])
def test_an_adapter_given_as_a_model_says_so(folder, asked, whole):
    """transformers would fetch its base from the hub, though a model lies in the very folder."""
    settings = {"base_model_name_or_path": "some/base", "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    if not whole:
        (folder / "config.json").unlink()
    for setting in ("model.name", "reward.model"):
        with pytest.raises(GradeError, match=f"{setting}=.*it is an adapter .* of the model some/base, not a model"):
            Pretrained(setting, str(folder))
    assert not asked


def test_an_adapter_on_the_hub_is_told_before_its_tokenizer_is_read(tmp_path, asked, monkeypatch):
    found = tmp_path / "adapter_config.json"
    found.write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    monkeypatch.setattr("grade.model.pretrained.find_adapter_config_file", lambda name, **_: str(found))
    monkeypatch.setattr("grade.model.pretrained.without_waiting", nullcontext)  # which asks whether the hub is there
    with pytest.raises(GradeError, match="model.name=org/adapter .* it is an adapter .* of the model some/base"):
        load_tokenizer(config_for("org/adapter").model)
    assert not asked


def test_adapters_are_written_and_read_without_the_hub(folder, asked, monkeypatch):
    """peft asks the hub for the base's config when it saves, and for weights that an adapter's folder lacks."""
    policy = load(folder)
    policy.model.peft_config["default"].base_model_name_or_path = "some/base"
    monkeypatch.chdir(folder.parent.parent)
    saved = Path("somebody/adapter")
    save_checkpoint(saved, policy, 1)
    load_adapter(saved, policy)
    (saved / "manifest.json").unlink()
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(GradeError, match="no adapter is saved there .adapter_model.safetensors is missing"):
        load_adapter(saved, policy)
    assert not asked


class Evil:
    """A pickle that runs code where it is read without care."""

    def __reduce__(self):
        return (exec, ("import sys; sys.modules['evil_ran'] = sys",))


@pytest.mark.parametrize("content", [pickle.dumps({"a": Evil()}, protocol=2), b"no pickle at all"])
def test_a_pickle_that_is_not_safe_is_refused_in_words(folder, content):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(GradeError, match="its weights are a pickle .* could run code. Save it as safe") as refusal:
        load(folder)
    assert "evil_ran" not in sys.modules and "weights_only" not in str(refusal.value)


OWN_CODE = """
import sys
sys.modules["own_code_ran"] = sys
from transformers import LlamaConfig, LlamaForCausalLM

class Config(LlamaConfig):
    model_type = "own"

class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.fixture
def with_code(folder, monkeypatch, tmp_path):
    """A model whose classes come with it."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_code_ran", raising=False)
    settings = json.loads((folder / "config.json").read_text())
    auto_map = {
        name: f"own.{kind}"
        for name, kind in (
            ("AutoConfig", "Config"),
            ("AutoModelForCausalLM", "Model"),
            ("AutoModelForSequenceClassification", "Model"),
        )
    }
    (folder / "config.json").write_text(json.dumps({**settings, "model_type": "own", "auto_map": auto_map}))
    (folder / "own.py").write_text(OWN_CODE)
    return folder


def test_no_code_of_a_folder_runs_and_no_question_is_asked(with_code, capsys):
    with pytest.raises(GradeError, match="model.name=.*comes with code of its own.* model.trust_remote_code to true"):
        load(with_code)
    with pytest.raises(GradeError, match="reward.model=.*code of its own. No code of a reward's folder is run"):
        check_classifier(str(with_code), load_tokenizer(config_for(with_code).model), judged=8, positive_label=None)
    assert "own_code_ran" not in sys.modules and "[y/N]" not in "".join(capsys.readouterr())


def test_code_of_a_folder_runs_where_the_setting_says_so(with_code):
    policy = load(with_code, trust_remote_code=True)
    assert "own_code_ran" in sys.modules and type(policy.causal_lm).__name__ == "Model"


def test_known_classes_are_taken_although_there_is_code(with_code):
    settings = json.loads((with_code / "config.json").read_text())
    (with_code / "config.json").write_text(json.dumps({**settings, "model_type": "llama"}))
    assert type(load(with_code).causal_lm).__name__ == "LlamaForCausalLM" and "own_code_ran" not in sys.modules


BROKEN = {
    "config.json": ('{"a": ', "not a valid JSON file"),
    "tokenizer.json": ('{"a": 1}', "KeyError: 'added_tokens'"),
    "model.safetensors": ("nothing", "[Hh]eader"),
}


@pytest.mark.parametrize("file", BROKEN)
def test_broken_files_are_told_by_their_reason(folder, file):
    content, reason = BROKEN[file]
    (folder / file).write_text(content)
    with pytest.raises(GradeError, match=f"model.name=.*cannot be loaded: .*{reason}") as refusal:
        load(folder)
    assert "\n" not in str(refusal.value)


def test_a_tokenizer_of_special_tokens_only_is_refused(folder):
    """Some architectures get such a one where its files are missing, and every prompt would be empty."""
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "model_type": "gpt2"}))
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(GradeError, match="model.name=.*its tokenizer has no vocabulary, only special tokens"):
        load_tokenizer(config_for(folder).model)


def test_a_complete_classifier_is_read_without_the_hub(tmp_path, folder, asked):
    classifier(labels=1).save_pretrained(tmp_path / "judge")
    save_tokenizer(tmp_path / "judge", SAME)
    check_classifier(str(tmp_path / "judge"), load_tokenizer(config_for(folder).model), judged=8, positive_label=None)
    assert not asked


@pytest.mark.parametrize(
    "config, context",
    [
        (LlamaConfig(max_position_embeddings=99), 99),
        (GPT2Config(n_positions=77), 77),
        (MptConfig(max_seq_len=55), 55),
        (BloomConfig(), None),
        (MambaConfig(), None),
    ],
    ids=lambda x: getattr(x, "model_type", None),
)
def test_the_context_of_an_architecture(config, context):
    assert context_of(config) == context


# -- what another library says -------------------------------------------------------------------------------------

CHOICES = "Couldn't instantiate the backend tokenizer from one of: \n(1) a file, \n(2) a slow one or \n(3) a class. \n"


@pytest.mark.parametrize(
    "message, reason",
    [
        ("Short.", "Short."),
        ("", "ValueError"),
        ("one\n\n  two\u2028still two \n", "one two still two"),
        (CHOICES + "You need to have sentencepiece.", "You need to have sentencepiece."),
        ("Unrecognized class.\n" + "Choose one of " + "x, " * 500, "Unrecognized class."),
        (
            "Couldn't cast\n" + "a: int\n" * 200 + "because column names don't match",
            "Couldn't cast " + "a: int " * 55 + "... because column names don't match",
        ),
        ("y" * 1000, "y" * 240 + " ..."),
    ],
)
def test_the_reason_is_kept(message, reason):
    assert reason_of(ValueError(message)) == reason


def test_a_missing_key_is_told_as_one():
    assert reason_of(KeyError("added_tokens")) == "KeyError: 'added_tokens'"
