"""Tiny sequence classifiers over the vocabulary of the tiny policies."""

from __future__ import annotations

import torch
from tiny import EOS, VOCAB
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForSequenceClassification,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

SAME = {f"<{i}>": i for i in range(VOCAB)}
PAD = 60  # the unused last id, where pad must differ from EOS
LONGROPE = dict(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[8.0] * 4)


def save_tokenizer(folder, vocabulary):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<0>")), unk_token="<0>"
    )
    tokenizer.save_pretrained(folder)
    assert tokenizer.get_vocab() == vocabulary


def classifier(config_class=LlamaConfig, *, labels=3, dtype=torch.float32, seed=5, **options):
    """A tiny classifier of its own width and weights over the policy's vocabulary."""
    common = dict(vocab_size=VOCAB, num_labels=labels, bos_token_id=1, eos_token_id=EOS, initializer_range=0.3)
    if config_class is GPT2Config:
        sizes = dict(n_embd=24, n_layer=2, n_head=2, n_positions=64)
    else:
        sizes = dict(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=12,
            max_position_embeddings=64,
        )
    if config_class is Gemma2Config:
        sizes.update(sliding_window=4)
    torch.manual_seed(seed)
    config = config_class(**{**common, **sizes, "pad_token_id": PAD, **options})
    return AutoModelForSequenceClassification.from_config(config).to(dtype)
