"""What the probe finds in the ways in which a run calls a model: refused by name, or left out where it can be."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from classifiers import LONGROPE
from tiny import (
    CONFIGS,
    FURTHER,
    LLAMA_SIZES,
    SIZES,
    TARGETS,
    KeepDouble,
    TinyTokenizer,
    base_model,
    embeddings_of,
    loaded_policy,
    needs_qwen,
    policy_around,
    tiny_policy,
)
from transformers import AutoTokenizer, BartConfig, LlamaConfig, RecurrentGemmaConfig

from grade.commands.train import train
from grade.errors import GradeError
from grade.model.policy import Policy
from grade.model.probe import probe_head
from grade.rollout import pad_prompts
from grade.sampling.compiled import CompiledDecoding
from grade_kernels import Head

# -- positions -----------------------------------------------------------------------------------------------------


def with_positions(switch, **rope):
    sizes = {**LLAMA_SIZES, "max_position_embeddings": 16} if rope["rope_type"] == "dynamic" else LLAMA_SIZES
    if switch is not None:
        rope["original_max_position_embeddings"] = switch
    return base_model(LlamaConfig(**SIZES, **sizes, rope_parameters={"rope_theta": 1e4, "factor": 4.0, **rope}))


@pytest.mark.parametrize(
    "switch, rope, kind",
    [
        (16, LONGROPE, r"longrope\).* 27 positions.*reward\.max_tokens, to 16 or less"),
        (26, LONGROPE, r"longrope\).* to 26 or less"),
        (None, dict(rope_type="dynamic"), r"dynamic\).* until it is accepted"),
    ],
    ids=["longrope", "longrope at the last token", "dynamic"],
)
def test_positions_that_depend_on_the_length_are_refused_where_a_run_crosses_the_switch(switch, rope, kind):
    policy = policy_around(with_positions(switch, **rope))  # a probe of twelve tokens does not get there
    with pytest.raises(GradeError, match=rf"LlamaForCausalLM depends on the length of the sequence \(rope_type {kind}"):
        Policy(policy.model, TinyTokenizer(), length=27)


@pytest.mark.parametrize(
    "switch, rope",
    [
        (27, LONGROPE),
        (16, dict(rope_type="yarn")),
        (16, dict(rope_type="linear")),
        (16, dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0)),
    ],
    ids=lambda x: x["rope_type"] if isinstance(x, dict) else str(x),
)
def test_positions_that_mean_the_same_in_the_whole_run_are_accepted(switch, rope):
    """And a row's states are the same whatever else is in its batch."""
    base = with_positions(None if rope["rope_type"] == "linear" else switch, **rope)
    policy = Policy(policy_around(base).model, TinyTokenizer(), length=27)
    ids, mask = pad_prompts([[5, 9, 2], list(range(4, 31))], 0)
    with torch.no_grad():
        together = policy.hidden(policy.embed(ids), mask)[0, -3:]
        alone = policy.hidden(policy.embed(ids[:1, -3:]), None)[0]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_a_run_is_probed_at_its_own_length(tiny_config, tiny_model, tmp_path):
    """Prompts of 12 and responses of 8; the head is trained on 32."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    size = settings["hidden_size"] // settings["num_attention_heads"] // 2
    rope = dict(LONGROPE, rope_theta=1e4, factor=4.0, short_factor=[1.0] * size, long_factor=[8.0] * size)
    config = replace(tiny_config, model=replace(tiny_config.model, name=str(folder)))
    for switch, refused in ((31, True), (32, False)):
        settings["rope_parameters"] = {**rope, "original_max_position_embeddings": switch}
        (folder / "config.json").write_text(json.dumps(settings))
        if refused:
            with pytest.raises(GradeError, match="depends on the length.* 32 positions"):
                loaded_policy(config)
        else:
            loaded_policy(config)


# -- merging -------------------------------------------------------------------------------------------------------


def share_between_adapted(base):
    first, second = base.model.layers
    second.self_attn.q_proj.weight = first.self_attn.q_proj.weight


def share_with_another(base):
    first, second = base.model.layers
    second.self_attn.o_proj.weight = first.self_attn.q_proj.weight


def share_by_view(base):
    first, second = base.model.layers
    second.self_attn.q_proj.weight = torch.nn.Parameter(first.self_attn.q_proj.weight.detach().view(32, 32))


def read_past_the_layer(base):
    mlp = base.model.layers[0].mlp
    mlp.forward = lambda x: torch.nn.functional.linear(x @ mlp.up_proj.weight.T, mlp.down_proj.weight)


@pytest.mark.parametrize(
    "share", [share_between_adapted, share_with_another, share_by_view, read_past_the_layer], ids=lambda f: f.__name__
)
def test_an_adapter_is_merged_only_where_its_layer_alone_reads_the_weight(share):
    with KeepDouble(), torch.no_grad():
        base = base_model(CONFIGS["llama"](), torch.float64)
        share(base)
        policy = policy_around(base, ["q_proj", "v_proj", "up_proj"])
        x, _ = embeddings_of(policy)
        expected = policy.hidden(x, None)
        with policy.merged():
            merged = policy.hidden(x, None)
    torch.testing.assert_close(merged, expected, rtol=1e-10, atol=1e-12)
    assert policy.merged_weights() == []


def test_the_probe_leaves_the_adapter_as_it_was():
    base = base_model(CONFIGS["llama"]())
    policy = policy_around(base)
    before = [p.clone() for p in policy.model.parameters()]
    again = Policy(policy.model, TinyTokenizer(), length=27)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))
    assert len(again.merged_weights()) == 4


def test_adapters_that_change_nothing_are_refused():
    base = base_model(CONFIGS["llama"]())
    for layer in base.model.layers:
        mlp = layer.mlp
        mlp.forward = lambda x, mlp=mlp: torch.nn.functional.linear(x @ mlp.up_proj.weight.T, mlp.down_proj.weight)
    with pytest.raises(GradeError, match=r"model\.lora\.target_modules: no adapter there changes"):
        policy_around(base, ["up_proj"])


# -- what is kept of the past --------------------------------------------------------------------------------------


def test_prompts_caches_are_read_in_a_graph_only_where_that_gives_the_gradient():
    policies = {name: tiny_policy(name) for name in (*CONFIGS, *FURTHER)}
    reads = {name: {policy.reads_prompt_cache, policy.keeps_prompt_graph} for name, policy in policies.items()}
    recurrent = [reads.pop(name) for name in ("qwen3.5", "zamba", "mamba") if name in reads]
    assert len(recurrent) >= 2 and all(found == {False} for found in recurrent)
    assert all(found == {True} for found in reads.values())


def reorder_nothing(monkeypatch):
    """What a cache does that keeps states its rows are not counted in."""
    monkeypatch.setattr(
        "grade.model.decoder.select_rows",
        lambda cache, rows: [layer.reorder_cache(torch.arange(len(rows))) for layer in cache.layers],
    )


def repeat_in_another_order(monkeypatch):
    monkeypatch.setattr(
        "grade.model.decoder.repeat_rows",
        lambda cache, copies: cache.reorder_cache(torch.arange(len(cache.layers[0].keys)).repeat(copies)),
    )


@pytest.mark.parametrize("spoil", [reorder_nothing, repeat_in_another_order], ids=lambda f: f.__name__)
def test_a_cache_that_mixes_up_its_rows_is_found(spoil, monkeypatch):
    policy = tiny_policy("llama")
    spoil(monkeypatch)
    with pytest.raises(GradeError, match="LlamaForCausalLM gives other hidden states from its KV cache"):
        Policy(policy.model, TinyTokenizer())


@needs_qwen
def test_a_recurrent_model_is_trained(tiny_config, tiny_model, tmp_path):
    """From a folder: its head, two samples of a prompt, recomputed layers, evaluations."""
    tokenizer, settings = AutoTokenizer.from_pretrained(tiny_model), FURTHER["qwen3.5"]()
    settings.vocab_size = len(tokenizer)
    settings.bos_token_id = settings.eos_token_id = tokenizer.eos_token_id
    settings.pad_token_id = tokenizer.pad_token_id
    folder = tmp_path / "model"
    base_model(settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lora = replace(tiny_config.model.lora, target_modules=TARGETS["qwen3.5"])
    config = replace(
        tiny_config,
        output_dir=str(tmp_path),
        model=replace(tiny_config.model, name=str(folder), lora=lora),
        generation=replace(tiny_config.generation, samples_per_prompt=2),
        method=replace(tiny_config.method, activation_checkpointing=True),
        train=replace(tiny_config.train, steps=2),
    )
    train(config)
    rows = [json.loads(line) for line in open(f"{config.train.run_dir}/metrics.jsonl", encoding="utf-8")]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    evaluation = json.loads(open(f"{config.train.run_dir}/evaluation.json", encoding="utf-8").read())
    assert evaluation["validation"][0]["kl"] < 1e-6 < evaluation["test"]["best"]["kl"]


# -- other paths ---------------------------------------------------------------------------------------------------


def test_layers_that_cannot_be_computed_again_are_refused():
    """A layer that counts its calls gives another result when backward runs it again."""
    policy = tiny_policy()
    calls = []
    layer = policy.causal_lm.model.layers[0].mlp

    def hook(module, args, out):
        calls.append(1)
        return out * (1 + 0.01 * len(calls))

    layer.register_forward_hook(hook)
    with pytest.raises(GradeError, match=r"method\.activation_checkpointing: LlamaForCausalLM has other gradients"):
        policy.enable_activation_checkpointing()


def test_a_static_cache_that_decodes_something_else_is_refused(monkeypatch):
    policy = tiny_policy()
    forward = Policy.forward

    def other(self, embeddings, mask, positions, cache=None):
        hidden = forward(self, embeddings, mask, positions, cache)
        return hidden if mask is None or mask.dim() == 2 else 2 * hidden

    monkeypatch.setattr(Policy, "forward", other)
    with pytest.raises(GradeError, match=r"rollout\.compile: LlamaForCausalLM cannot be decoded with a static cache"):
        CompiledDecoding(policy)


@pytest.mark.parametrize("name", ["mamba", "zamba", pytest.param("qwen3.5", marks=needs_qwen)])
def test_recurrent_models_are_not_compiled(name):
    with pytest.raises(GradeError, match=r"rollout\.compile: .*ForCausalLM has layers that keep"):
        CompiledDecoding(tiny_policy(name))


# -- refusals that name the cause ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_weights_that_are_no_numbers_are_named(name, value):
    base = base_model(CONFIGS["llama"]())
    base.get_parameter(name).data[3, 4] = value
    with pytest.raises(GradeError, match=rf"the weight {name} of this LlamaForCausalLM holds values that are NaN"):
        policy_around(base)


def test_large_weights_are_finite():
    base = base_model(CONFIGS["llama"]())
    base.get_parameter("model.norm.weight").data[:] = 3e38  # their sum is not
    with pytest.raises(GradeError, match="hidden states that are NaN or infinite|does more in its head"):
        policy_around(base)


def test_bart_is_refused_for_its_positions():
    config = BartConfig(
        **SIZES,
        d_model=32,
        decoder_layers=1,
        decoder_attention_heads=4,
        decoder_ffn_dim=48,
        encoder_layers=1,
        encoder_attention_heads=4,
        encoder_ffn_dim=48,
        max_position_embeddings=64,
        is_decoder=True,
        is_encoder_decoder=False,
    )
    with pytest.raises(GradeError, match="BartForCausalLM gives other hidden states under left padding"):
        policy_around(base_model(config))


def test_the_cap_of_recurrent_gemma_is_found():
    """Though the model is refused for another reason: its recurrence reads the padding."""
    config = RecurrentGemmaConfig(
        **SIZES,
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        lru_width=32,
        attention_window_size=8,
        logits_soft_cap=3.0,
    )
    base = base_model(config)
    with pytest.raises(GradeError, match="RecurrentGemmaForCausalLM gives other hidden states under left padding"):
        policy_around(base)
    model = tiny_policy("llama").model
    policy = Policy(model, TinyTokenizer(), probe=False)
    policy.causal_lm, policy.backbone, policy.config = base, base.model, base.config
    policy.head = Head(base.lm_head.weight.detach())
    policy.embedding = base.get_input_embeddings().weight.detach()
    assert probe_head(policy) == (1.0, 3.0)
