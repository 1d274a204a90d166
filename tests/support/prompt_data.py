"""A small tokenizer with a chat template that can be told not to think."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if thinking | default(true) %}<think>{% endif %}{% endif %}"
)


def chat_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """Characters as tokens, about a hundred."""
    pieces = ["<eos>", "<bos>", "<unk>", *map(chr, range(33, 127)), "▁"]
    inner = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(prepend_scheme="never"), decoders.Metaspace()
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<eos>",
        chat_template=TEMPLATE,
    )
