"""The table of architectures: what is measured of one, and how it is told."""

from __future__ import annotations

import json

import pytest

import benchmarks.architectures
from benchmarks import architectures
from benchmarks.small_models import architectures as known
from benchmarks.small_models import small_config


def row_of(model, config=None):
    kind, model = next((k, m) for k, m in known() if m.__name__ == model and (config is None or k.__name__ == config))
    return architectures.measure(kind, model)


@pytest.mark.parametrize(
    "model, config, paths",
    [
        ("LlamaForCausalLM", "LlamaConfig", dict(checkpointing=True, merged=True, prompt_cache=True, compile=True)),
        ("Gemma2ForCausalLM", None, dict(checkpointing=True, merged=True, prompt_cache=True, compile=False)),
        ("Mamba2ForCausalLM", None, dict(checkpointing=True, merged=True, prompt_cache=False, compile=False)),
    ],
)
def test_what_works_has_the_published_gradient(model, config, paths):
    row = row_of(model, config)
    assert row["status"] == "works", row
    assert {name: row[name] for name in paths} == paths
    assert 0 < row["gradient_error"] < 1e-5


@pytest.mark.parametrize(
    "model, status, reason",
    [
        ("OpenAIGPTLMHeadModel", "refused", "takes no cache of earlier positions"),
        ("BartForCausalLM", "refused", "gives other hidden states under left padding"),
        ("BertLMHeadModel", "refused", "more in its head than a matrix product, a scale and a soft-cap"),
        ("FuyuForCausalLM", "not tried", "it has a config of several models"),
    ],
)
def test_what_does_not_work_says_why(model, status, reason):
    row = row_of(model)
    assert row["status"] == status and row["reason"].endswith(reason)


def test_a_wrong_gradient_is_no_working_model(monkeypatch):
    monkeypatch.setattr(benchmarks.architectures, "_gradient_error", lambda policy: float("nan"))
    assert row_of("OPTForCausalLM")["status"] == "fails"


def test_small_models_have_every_kind_of_layer():
    from transformers import Qwen3_5TextConfig

    assert set(small_config(Qwen3_5TextConfig).layer_types) == {"linear_attention", "full_attention"}


def test_the_table_says_what_was_kept(tmp_path, capsys):
    file = tmp_path / "found.json"
    architectures.main(["--only", "OpenAIGPT,OPT", "--save", str(file)])
    printed = capsys.readouterr().out
    assert "1 work, 1 refused, 0 fail, 0 not tried." in printed
    assert "| OpenAIGPTLMHeadModel | takes no cache of earlier positions |" in printed
    architectures.main(["--table", str(file)])
    assert capsys.readouterr().out == printed
    file.write_text(json.dumps({"rows": []}))
    with pytest.raises(SystemExit, match="has no entry 'date'"):
        architectures.main(["--table", str(file)])
