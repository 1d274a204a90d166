"""Texts as token ids: what a tokenizer puts in front stays, what it puts behind goes, and text stays text.

A review may spell a special token (`</s>`). That is text of its author, not an end of sequence, so no special token
comes from a text: tokenizers are asked to split them, and where one does not (a Unigram vocabulary holds `</s>` as a
piece, a word tokenizer as a word) the spelling is cut in two before it is read again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from grade.config import TokenizerConfig
from grade.errors import GradeError, reason_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS_PER_BATCH = 1024  # texts handed to the tokenizer at once
_TEXT = -1  # stands for a text where a tokenizer puts its own ids around it


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int | None, *, special_tokens: bool = True
) -> list[list[int]]:
    """Token ids of texts that a model is to continue or to read.

    As `tokenizer(text)` gives them, so with BOS exactly where the tokenizer adds it by itself, but without
    tokens that it puts *after* the text: a model has nothing to say after EOS. They are told by position, as
    BOS and EOS may be one id. The policy's prompts and the reward's reviews both come from here.

    Args:
        tokenizer: a transformers tokenizer, fast or slow.
        texts: B texts.
        max_tokens: longest row, BOS included; the end is cut off. None: nothing is.
        special_tokens: start rows with what the tokenizer puts there; false: the texts alone.

    Returns:
        B lists of ids, not padded. A text without tokens gives an empty list, not a lone BOS.

    Raises:
        GradeError: `max_tokens` leaves no room for text, or the tokenizer cannot read one.
    """
    rows: list[list[int]] = []
    for start in range(0, len(texts), _ROWS_PER_BATCH):
        rows += _text_ids(tokenizer, list(texts[start : start + _ROWS_PER_BATCH]))
    sample = next((text for text, row in zip(texts, rows, strict=True) if row), None)
    before = opening_ids(tokenizer, sample) if special_tokens and sample is not None else []
    if max_tokens is not None and max_tokens <= len(before):
        raise GradeError(
            f"A limit of {max_tokens} tokens leaves no room for text: the tokenizer starts every text with "
            f"{len(before)} of its own. Raise task.prompt_max_tokens (prompts) or reward.max_tokens (reviews)."
        )
    # Cut by hand: a tokenizer's own truncation keeps EOS and may cut on the left.
    return [(before + row)[:max_tokens] if row else [] for row in rows]


def encode_chats(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    settings: TokenizerConfig | None = None,
) -> list[list[int]]:
    """Token ids of conversations by the tokenizer's chat template, up to where the assistant's answer begins.

    Args:
        conversations: messages with "role" and "content".
        settings: section `tokenizer`, with a system prompt and what else the template is given; None: the defaults.

    Raises:
        GradeError: there is no template, there are several and none is the default, or it cannot be used.
    """
    settings = settings or TokenizerConfig()
    template = getattr(tokenizer, "chat_template", None)  # a tokenizer of one's own need not have the attribute
    if template is None:
        raise GradeError(
            "model.name: its tokenizer has no chat template, and prompts are conversations. Name an instruct model, "
            "give its tokenizer a template (tokenizer.chat_template), or use prompts that are texts."
        )
    if isinstance(template, dict) and "default" not in template:
        raise GradeError(
            f"model.name: its tokenizer has the chat templates {', '.join(sorted(template))}, and none called "
            "default. Save it with the one to use as its only one (tokenizer.chat_template = "
            f"tokenizer.chat_template[{min(template)!r}])."
        )
    try:
        return [
            list(
                tokenizer.apply_chat_template(
                    with_system(messages, settings.system_prompt),
                    add_generation_prompt=True,
                    return_dict=False,
                    **settings.chat_template_kwargs,
                )
            )
            for messages in conversations
        ]
    except Exception as error:  # a template is a program of its author; jinja2 keeps it in a sandbox
        raise GradeError(
            f"model.name: its chat template cannot write a prompt ({type(error).__name__}: {reason_of(error)}). "
            "Mend the template in the model's folder, or choose another model."
        ) from error


def with_system(messages: Sequence[Mapping[str, Any]], prompt: str | None) -> list[dict[str, Any]]:
    """A conversation as the template gets it, with the system prompt in front unless it has one of its own."""
    own = bool(messages) and messages[0].get("role") == "system"
    first = [] if prompt is None or own else [{"role": "system", "content": prompt}]
    return [*first, *map(dict, messages)]


def _text_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of the texts alone, none of them special unless the tokenizer does not know a part of a text."""
    rows = _call(tokenizer, texts)
    special = _special_tokens(tokenizer)
    for number, row in enumerate(rows):
        if special.keys() & set(row):
            text, spellings = texts[number], "|".join(map(re.escape, special.values()))
            cuts = [match.start() + 1 for match in re.finditer(spellings, text)]
            parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
            ids = [i for part in _call(tokenizer, parts) for i in part]
            rows[number] = [i for i in ids if i not in special]
    return rows


def _call(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    try:
        return tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            padding=False,
            truncation=False,
            verbose=False,
            return_attention_mask=False,
        )["input_ids"]
    except Exception as error:  # the Rust tokenizers raise nothing more special
        raise GradeError(
            f"model.name: its tokenizer cannot read a text of the task ({reason_of(error)}). Choose a model whose "
            "tokenizer has a token for what it does not know."
        ) from error


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Special tokens by id, but for the one of what the tokenizer does not know."""
    special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    special |= {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.pop(tokenizer.unk_token_id, None)
    return special


def opening_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """What the tokenizer puts before every text, told by a text that has tokens."""
    if not tokenizer.is_fast and hasattr(tokenizer, "build_inputs_with_special_tokens"):
        built = tokenizer.build_inputs_with_special_tokens([_TEXT])
        return built[: built.index(_TEXT)]
    marked = tokenizer(
        text,
        add_special_tokens=True,
        split_special_tokens=True,
        return_special_tokens_mask=True,
        padding=False,
        truncation=False,
        verbose=False,
    )
    return marked["input_ids"][: marked["special_tokens_mask"].index(0)]
