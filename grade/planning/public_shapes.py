"""Sizes of public models, so that the shipped configs and the page on scaling need no download.

They are what the config.json of each repository on the Hugging Face hub says, as far as sizes go. A folder of your own
with a config.json counts more than this table, and so does the hub's cache on this machine.
"""

from __future__ import annotations

from typing import Any


def _qwen3(width: int, inner: int, layers: int, heads: int, tied: bool) -> dict[str, Any]:
    return dict(
        model_type="qwen3",
        vocab_size=151_936,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=tied,
    )


def _llama3(width: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    return dict(
        model_type="llama",
        vocab_size=128_256,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )


_QWEN25_1_5B: dict[str, Any] = dict(
    model_type="qwen2",
    vocab_size=151_936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
_GPT2_MEDIUM: dict[str, Any] = dict(
    model_type="gpt2", vocab_size=50_257, n_embd=1024, n_layer=24, n_head=16, n_positions=1024
)
PUBLIC: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, True),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, True),
    "Qwen/Qwen3-4B": _qwen3(2560, 9728, 36, 32, True),
    "Qwen/Qwen3-8B": _qwen3(4096, 12_288, 36, 32, False),
    "Qwen/Qwen3-14B": _qwen3(5120, 17_408, 40, 40, False),
    "Qwen/Qwen3-32B": _qwen3(5120, 25_600, 64, 64, False),
    "Qwen/Qwen2.5-1.5B": _QWEN25_1_5B,
    "Qwen/Qwen2.5-1.5B-Instruct": _QWEN25_1_5B,
    "openai-community/gpt2-medium": _GPT2_MEDIUM,
    "meta-llama/Llama-3.1-8B": _llama3(4096, 14_336, 32, 32),
    "meta-llama/Llama-3.1-8B-Instruct": _llama3(4096, 14_336, 32, 32),
    "meta-llama/Llama-3.1-70B": _llama3(8192, 28_672, 80, 64),
    "meta-llama/Llama-3.1-70B-Instruct": _llama3(8192, 28_672, 80, 64),
}
"""What a config.json says of sizes, by hub name."""
