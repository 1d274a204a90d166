"""Tiny random models of transformers' causal language models: their own configs, with every size made small."""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY = 61
EOS = 3
CONTEXT = 64
# More weights than these are no tiny model: some size was not made small.
MOST_WEIGHTS = 4_000_000

# What sizes are called in the configs; names that a config does not have are not given to it.
_SIZES: dict[int, str] = {
    VOCABULARY: ("unpadded_vocab_size vocab_size vocab_size_per_layer_input"),
    CONTEXT: ("index_topk max_position_embeddings max_seq_len max_target_positions model_max_length n_ctx n_positions"),
    48: (
        "decoder_ffn_dim dense_intermediate_size dff dim_ff encoder_ffn_dim feed_forward_size ffn_dim "
        "ffn_hidden_size intermediate_size intermediate_size_mlp n_inner prefix_dense_intermediate_size"
    ),
    32: (
        "d_model dim dim_model_base emb_dim embedding_dim embedding_size hidden_size input_embedding_size "
        "lru_width n_embd word_embed_proj_dim"
    ),
    16: (
        "expert_ffn_hidden_size moe_intermediate_size moe_latent_size moe_shared_expert_intermediate_size "
        "ple_embed_dim rel_extent shared_expert_intermediate_size shared_experts_intermediate_size "
        "shared_intermediate_size"
    ),
    8: (
        "attention_chunk_size attention_head_size attention_window_size chunk_size d_head dim_head "
        "gated_norm_rank head_dim hidden_size_per_layer_input index_head_dim indexer_head_dim "
        "kv_channels kv_lora_rank laurel_rank linear_head_dim linear_key_head_dim linear_value_head_dim "
        "local_attention_window_len loop_gate_rank mamba_chunk_size mamba_d_head mamba_head_dim mamba_headdim "
        "mamba_num_heads o_lora_rank q_lora_rank qk_head_dim qk_nope_head_dim router_hidden_size sliding_window "
        "sliding_window_size swa_head_dim window_size"
    ),
    4: (
        "attention_heads decoder_attention_heads encoder_attention_heads index_n_heads indexer_n_heads "
        "linear_num_heads linear_num_value_heads mamba_d_state mamba_dt_rank moe_num_experts n_head n_heads "
        "n_routed_experts num_attention_heads num_decoder_attention_heads num_encoder_attention_heads num_experts "
        "num_heads num_local_experts qk_rope_head_dim rotary_dim ssm_state_size state_size "
        "swa_num_attention_heads time_step_rank v_head_dim"
    ),
    2: (
        "altup_num_inputs indexer_kv_heads linear_num_key_heads moe_k moe_topk n_mamba_heads num_experts_per_tok "
        "num_experts_per_token num_key_value_heads num_kv_heads num_query_groups swa_num_key_value_heads "
        "top_k_experts"
    ),
    1: (
        "first_k_dense_replace mamba_n_groups mamba_ngroups moe_num_shared_experts n_group n_groups "
        "n_shared_experts num_expert_group num_nextn_predict_layers num_shared_experts o_groups topk_group"
    ),
}
_LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "encoder_layers",
    "num_decoder_layers",
    "num_encoder_layers",
)
# A deviation of the weights at which layers do something and rounding is not amplified.
_SPREAD = {"initializer_range": 0.08, "init_std": 0.08}
# What an architecture needs beside, or in the place of, those.
_OWN: dict[str, dict] = {
    "BambaConfig": dict(mamba_n_heads=8, attn_layer_indices=[1]),
    "Dots3NoteTextConfig": dict(num_key_value_heads=4),
    "GPTNeoConfig": dict(attention_types=[[["global", "local"], 1]]),
    "GraniteMoeHybridConfig": dict(mamba_n_heads=8, layer_types=["mamba", "attention"]),
    "Gemma3nTextConfig": dict(num_kv_shared_layers=0),
    "Lfm2Config": dict(layer_types=["conv", "full_attention"]),
    "Lfm2MoeConfig": dict(num_dense_layers=1, layer_types=["conv", "full_attention"]),
    "Mamba2Config": dict(num_heads=8),
    "Qwen4ExpTextConfig": dict(indexer_budget=8, indexer_compress_ratio=2, indexer_kv_heads=1),
    "RemBertConfig": dict(output_embedding_size=32),
    "RoCBertConfig": dict(enable_pronunciation=False, enable_shape=False),
    "Zamba2Config": dict(layers_block_type=["mamba", "mamba", "hybrid", "mamba", "hybrid"], num_hidden_layers=5),
    "ZambaConfig": dict(attn_layer_period=2, attn_layer_offset=1, num_hidden_layers=5, num_key_value_heads=4),
    "ZayaConfig": dict(num_experts_per_tok=1),
}


def small_config(kind: type) -> Any:
    """An instance of this config class of transformers with small sizes, two layers, or more where two have not every
    kind of layer that its defaults have.

    Raises:
        ValueError: it is the config of several models.
        Exception: whatever its class raises where the sizes do not go together.
    """
    default = kind()
    if default.get_text_config() is not default:
        raise ValueError("it has a config of several models")
    known = default.to_dict()
    given = {name: size for size, names in _SIZES.items() for name in names.split()} | _SPREAD
    if "qk_rope_head_dim" in known:
        # Multi-head latent attention: keys of the rotated part, of both, and as many heads of them as of queries.
        given |= dict(head_dim=4, qk_head_dim=12, num_key_value_heads=4)
    given |= dict(bos_token_id=1, eos_token_id=EOS, pad_token_id=0, is_decoder=True, is_encoder_decoder=False)
    given = {name: value for name, value in given.items() if name in known}
    for layers in (2, 4, 6):
        sizes = given | {name: layers for name in _LAYERS if name in known} | _OWN.get(kind.__name__, {})
        config = kind(**sizes)
        if set(getattr(config, "layer_types", None) or ()) >= set(getattr(default, "layer_types", None) or ()):
            break
    return config


def small_model(kind: type, model: Any) -> Any:
    """A random model of this class in float32.

    Raises:
        ValueError: it has too many weights, or gives no numbers.
        Exception: whatever its class raises where the sizes do not go together.
    """
    config = small_config(kind)
    with torch.device("meta"):
        weights = sum(p.numel() for p in model._from_config(config).parameters())
    if weights > MOST_WEIGHTS:
        raise ValueError(f"it has {weights:,} weights at sizes that make others small")
    torch.manual_seed(0)
    made = model._from_config(config).float().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.numel() > 1 and parameter.std() == 0:  # at such a start some layers do nothing
                parameter.add_(0.1 * torch.randn(parameter.shape))
        logits = made(input_ids=torch.arange(1, 13)[None], use_cache=False).logits
    if not logits.isfinite().all():
        raise ValueError("its logits are NaN or infinite with random weights")
    return made


def architectures() -> list[tuple[type, type]]:
    """(config class, model class) of every causal language model that the installed transformers has, by name."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    found: set[tuple[type, type]] = set()
    for kind, models in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        found |= {(kind, model) for model in (models if isinstance(models, tuple) else (models,))}
    return sorted(found, key=lambda pair: (pair[1].__name__, pair[0].__name__))
