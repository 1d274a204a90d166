"""Tiny random models of each architecture, and float64 arithmetic inside transformers' float32 corners."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    OPTConfig,
    Qwen3Config,
    ZambaConfig,
)
from transformers.pytorch_utils import Conv1D

from grade.model.adapter import add_reference
from grade.model.loading import load_policy, load_tokenizer
from grade.model.policy import Policy
from grade.rewards.shared import RewardHead, SharedReward

VOCAB = 61
EOS = 3
SIZES = dict(vocab_size=VOCAB, bos_token_id=1, eos_token_id=EOS, pad_token_id=EOS, initializer_range=0.3)
LLAMA_SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64
)

CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, **LLAMA_SIZES, num_key_value_heads=2, tie_word_embeddings=False),
    "llama-tied": lambda: LlamaConfig(**SIZES, **LLAMA_SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SIZES, **LLAMA_SIZES, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(**SIZES, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt-neox": lambda: GPTNeoXConfig(**SIZES, **LLAMA_SIZES, tie_word_embeddings=False),
    "gemma2": lambda: Gemma2Config(
        **SIZES,
        **LLAMA_SIZES,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=6,
        final_logit_softcapping=3.0,
        attn_logit_softcapping=5.0,
    ),
}
# What keeps something else of earlier positions than keys and values of one width, or calls its layers otherwise.
FURTHER = {
    "deepseek-v3": lambda: DeepseekV3Config(
        **SIZES,
        **LLAMA_SIZES,
        first_k_dense_replace=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=6,
    ),
    "qwen3.5": lambda: transformers.Qwen3_5TextConfig(  # not in every version
        **{**SIZES, "initializer_range": 0.1},
        **{**LLAMA_SIZES, "num_hidden_layers": 4},
        num_key_value_heads=2,
        head_dim=8,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
    ),
    "zamba": lambda: ZambaConfig(  # its two attention layers share their weights
        **{**SIZES, "initializer_range": 0.1},
        **{**LLAMA_SIZES, "num_hidden_layers": 5},
        num_key_value_heads=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=4,
        mamba_dt_rank=2,
        use_mamba_kernels=False,
    ),
    "mamba": lambda: MambaConfig(**SIZES, hidden_size=32, num_hidden_layers=2, state_size=4),
    "opt": lambda: OPTConfig(
        **SIZES,
        init_std=0.3,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
    ),
    "llama4": lambda: Llama4TextConfig(
        **SIZES,
        **LLAMA_SIZES,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        intermediate_size_mlp=48,
        attention_chunk_size=8,
    ),
}
if Version(transformers.__version__) < Version("5.23"):
    # Left padding changed Qwen3.5's states (seen in 5.14), which the probe refuses.
    del FURTHER["qwen3.5"]
needs_qwen = pytest.mark.skipif("qwen3.5" not in FURTHER, reason="this transformers pads Qwen3.5 wrongly")
TARGETS = {
    "deepseek-v3": ["q_b_proj", "kv_b_proj", "o_proj"],
    "qwen3.5": ["q_proj", "in_proj_qkv", "out_proj"],
    "zamba": ["q_proj", "v_proj", "in_proj"],
    "mamba": ["in_proj", "x_proj"],
    "opt": ["q_proj", "v_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "gpt-neox": ["query_key_value", "dense"],
}


class TinyTokenizer:
    """The part of a tokenizer that `Policy` reads. Knows all ids but the last `unknown`."""

    pad_token_id = EOS
    eos_token_id = EOS

    def __init__(self, unknown: int = 0):
        self.known = VOCAB - unknown

    def get_vocab(self):
        return {f"<{i}>": i for i in range(self.known)}

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(str(i) for i in ids)


def tiny_policy(name: str = "llama", *, dtype=torch.float32, seed=0, adapter_scale=0.2, unknown=0, dropout=0.0):
    """A policy on random weights, whose adapter is not zero unless `adapter_scale` is."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_config({**CONFIGS, **FURTHER}[name]())
    targets = TARGETS.get(name, ["q_proj", "k_proj", "v_proj", "o_proj"])
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in base.modules()),
    )
    base.requires_grad_(False)
    model = get_peft_model(base, lora)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=adapter_scale) if adapter_scale else parameter.zero_()
    return Policy(model.to(dtype), TinyTokenizer(unknown))


def two_references() -> Policy:
    """A tiny policy whose second adapter, the reference, is its first as it is now."""
    policy = tiny_policy()
    add_reference(policy.model)
    return Policy(policy.model, policy.tokenizer)


def tiny_reward(policy: Policy, reads: str = "prompt+response", seed: int = 1) -> SharedReward:
    torch.manual_seed(seed)
    head = RewardHead(policy.head.weight.shape[1], 16)
    with torch.no_grad():
        head.layers[-1].weight.mul_(4)
    return SharedReward(policy, head.to(policy.dtype), reads)


class KeepDouble(TorchFunctionMode):
    """float64 stays float64 where transformers drops to float32 (RMSNorm, rotary angles, eager softmax)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if isinstance(first, torch.Tensor) and first.dtype in (torch.float64, torch.int64):
            if func is torch.Tensor.float:
                return first.double()
            if func is torch.Tensor.to and first.dtype is torch.float64 and torch.float32 in args:
                return first
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


ATTENTION = ["q_proj", "v_proj"]


def base_model(config, dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(dtype)


def policy_around(base, targets=None, tokenizer=None, dropout=0.0, **options):
    """A policy on a base model of our own making, with an adapter that is not zero."""
    lora = LoraConfig(
        r=2,
        target_modules=targets or ATTENTION,
        task_type="CAUSAL_LM",
        lora_dropout=dropout,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in base.modules()),
        **options,
    )
    base.requires_grad_(False)
    model = get_peft_model(base, lora)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return Policy(model, tokenizer or TinyTokenizer())


def embeddings_of(policy, length=9, batch=2, seed=0):
    """[B, T, d] of random tokens, and a mask of ones."""
    ids = torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
    return policy.embed(ids), torch.ones(batch, length, dtype=torch.bool)


def loaded_policy(config):
    """The policy that a config names, from its folder."""
    return load_policy(config, load_tokenizer(config.model), torch.device("cpu"))
