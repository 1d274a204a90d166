"""Sizes from a config.json: parameters as transformers and the hub count them, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from tiny import CONFIGS, LLAMA_SIZES, SIZES, TARGETS, tiny_policy
from transformers import AutoConfig, AutoModelForCausalLM

from grade.commands.plan import shape_named
from grade.errors import GradeError
from grade.planning.adapter import adapter, whole_backbone
from grade.planning.public_shapes import PUBLIC
from grade.planning.shape import KNOWN, shape_of

QWEN = PUBLIC["Qwen/Qwen3-4B"]
OTHERS = {
    "gemma": dict(head_dim=8, num_key_value_heads=2),
    "gemma3_text": dict(head_dim=8, num_key_value_heads=2),
    "granite": dict(num_key_value_heads=2, attention_bias=True, mlp_bias=True),
    "mistral": dict(num_key_value_heads=2, head_dim=None),
    "olmo2": dict(num_key_value_heads=2),
    "phi3": dict(num_key_value_heads=2),
    "qwen2": dict(num_key_value_heads=2),
    "smollm3": dict(num_key_value_heads=2),
}


@pytest.mark.parametrize("kind", KNOWN)
def test_parameters_are_those_of_transformers(kind):
    """Also where config.json leaves out what it may."""
    name = {"gpt_neox": "gpt-neox"}.get(kind, kind)
    if name in CONFIGS:
        config = CONFIGS[name]()
    else:
        config = AutoConfig.for_model(kind, **SIZES, **LLAMA_SIZES, **OTHERS[kind])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = shape_of(json.loads(config.to_json_string(use_diff=True)), kind)
    assert shape.parameters == model.num_parameters()
    table = model.get_input_embeddings().weight.numel()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert whole_backbone(shape).parameters == shape.parameters - table * (1 if tied else 2)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gpt-neox"])
def test_an_adapter_has_the_parameters_of_pefts(name):
    policy = tiny_policy(name)
    shape = shape_of(policy.causal_lm.config.to_dict(), name)
    targets = TARGETS.get(name, ["q_proj", "k_proj", "v_proj", "o_proj"])
    trained = adapter(shape, 4, targets)
    assert trained.parameters == sum(p.numel() for p in policy.parameters())
    assert trained.tensors == len(policy.parameters())


@pytest.mark.parametrize(
    "name, parameters",
    [  # the totals that the repositories' safetensors files declare, tied tables once
        ("Qwen/Qwen3-0.6B", 596_049_920),
        ("Qwen/Qwen3-4B", 4_022_468_096),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304),
        ("openai-community/gpt2-medium", 354_823_168),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("meta-llama/Llama-3.1-70B", 70_553_706_496),
    ],
)
def test_public_shapes_have_the_published_parameters(name, parameters):
    assert shape_of(PUBLIC[name], name).parameters == parameters


def test_a_folder_needs_only_its_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLIC["Qwen/Qwen3-4B"]))
    assert shape_named("model.name", str(tmp_path), None).layers == 36


@pytest.mark.parametrize("content", [PUBLIC["Qwen/Qwen3-8B"], None])
def test_the_hubs_cache_counts_more_than_the_table(tmp_path, monkeypatch, content):
    import huggingface_hub

    (tmp_path / "config.json").write_text(json.dumps(content))
    found = str(tmp_path / "config.json") if content else None
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args, **kwargs: found)
    assert shape_named("model.name", "Qwen/Qwen3-4B", None).width == (4096 if content else 2560)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"model_type": "mixtral"}, "model_type 'mixtral', whose cost is not known here. Known are gemma, "),
        ({}, "model_type None"),
        ({"model_type": "llama", "hidden_size": 8}, "has no entry 'intermediate_size'"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\], whose cost is not known"),
        *(
            ({**QWEN, key: value}, f"a size that is none: {key} is .*, and must be a whole number from 1")
            for key in ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size", "num_attention_heads")
            for value in ("wide", 0, -1, 2560.5, float("inf"), float("nan"), True, None, [1], 10**400)
        ),
        *(({**QWEN, key: 0}, f"a size that is none: {key} is 0") for key in ("num_key_value_heads", "head_dim")),
        ({**PUBLIC["openai-community/gpt2-medium"], "n_inner": -5}, "a size that is none: n_inner is -5"),
        ({**QWEN, "num_key_value_heads": 5}, "32 heads of queries, 5 of keys"),
        ({**PUBLIC["openai-community/gpt2-medium"], "n_head": 4096}, "cannot be divided so"),
        ({**QWEN, "tie_word_embeddings": "false"}, "tie_word_embeddings=false: it must be true or false"),
    ],
)
def test_what_is_not_known_is_refused(config, message):
    with pytest.raises(GradeError, match=message):
        shape_of(config, "a model")


@pytest.mark.parametrize(
    "name, message",
    [
        ("nobody/nothing", "neither in the hub's cache .* Give --model.name FOLDER with its config.json"),
        ("./nowhere", "there is no nowhere/config.json. Give --model.name FOLDER"),
        ("built-in:other", "the built-in models are countdown, demo"),
        ("a b/c d", "neither in the hub's cache"),
        ("given:model", "given as an object in Python"),
    ],
)
def test_a_model_that_is_not_at_hand_is_refused(name, message):
    with pytest.raises(GradeError, match=message):
        shape_named("model.name", name, None)


def test_a_layer_that_does_not_exist_is_refused():
    shape = shape_of(PUBLIC["openai-community/gpt2-medium"], "gpt2")
    assert adapter(shape, 1, ["c_proj"]).parameters == 24 * (2 * 1024 + 5 * 1024)  # attention's and the MLP's
    assert adapter(shape, 1, ["attn.c_proj"]).parameters == 24 * 2 * 1024
    with pytest.raises(GradeError, match="has 'q_proj', and gpt2 has no linear layer of this name. It has c_attn, c_p"):
        adapter(shape, 16, ["c_attn", "q_proj"])


def test_known_kinds_are_those_of_this_transformers():
    assert all(kind in transformers.CONFIG_MAPPING for kind in KNOWN)
