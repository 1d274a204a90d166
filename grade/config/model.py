"""The settings of the policy: a language model and its adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from grade.config.bounds import WEIGHT, setting


@dataclass
class LoraSettings:
    """The trainable adapter (peft LoRA). Everything else stays frozen. With model.adapter, r, alpha and target_modules
    at their defaults mean the adapter's own."""

    r: int = setting(16, ge=1, le=8192)
    """Rank."""
    alpha: float = setting(32.0, gt=0, le=WEIGHT)
    """Scale numerator: updates are multiplied by alpha / r."""
    dropout: float = setting(0.05, ge=0, lt=1)
    """Adapter dropout, a probability. Only active with method.replay_dropout."""
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    """Names of the linear layers that get an adapter. Not the head, not the embedding."""


@dataclass
class ModelConfig:
    """The policy: a causal language model, frozen, with an adapter."""

    name: str = "Qwen/Qwen3-0.6B"
    """Hub name or folder of a transformers causal language model."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the frozen weights. Adapters are float32. Not float16: small gradients would vanish in it."""
    attn_implementation: str | None = None
    """Attention as transformers names it (sdpa, eager, flash_attention_2); null: transformers' choice."""
    trust_remote_code: bool = False
    """Let code that comes with the model's files (auto_map) run here. Look at it first: it may do anything."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Linear layers of the frozen base in so many bits (bitsandbytes); head and embedding table keep model.dtype. 8bit
    needs bfloat16."""
    adapter: str | None = None
    """Folder or hub name of a LoRA adapter to go on from, whose rank, alpha and target modules hold; null: a new one,
    which begins as the base."""
    reference: Literal["base", "initial"] = "base"
    """What KL is measured to: the frozen base, or the policy as it started, which model.adapter makes another."""
    finetuning: Literal["lora", "full"] = "lora"
    """`lora`: an adapter is trained. `full` (in YAML also `lora: null`): every weight is, but head and embedding table,
    beside a frozen copy."""
    fsdp: bool = setting(False, role="speed")
    """Shard the frozen base's decoder layers over the processes of the run (PyTorch's FSDP2), where one device cannot
    hold them. Every layer is gathered for each pass through it. One process has the whole base."""
    lora: LoraSettings = field(default_factory=LoraSettings)
