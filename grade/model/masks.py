"""Attention masks made without a question to the device.

For SDPA, transformers asks in every forward whether a padding mask leaves anything out, and makes none if not. Each
answer waits until the device has done all it was given, so decoding would wait for every token. Where padding is, a run
knows beforehand, and says so here. The masks stay transformers' own functions, which know what windows, chunks and
recurrent layers need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function


@contextmanager
def known_padding(config: PretrainedConfig, padded: bool) -> Iterator[None]:
    """Inside, masks of models with this config's attention are made for batches of which the host knows this.

    Args:
        padded: whether padding may stand before real positions. False: only after them, if at all, where causal
            attention does not see it, so that no mask is needed and SDPA may take its kernels for plain causal ones.
    """
    kind = getattr(config, "_attn_implementation", None)
    if kind is None or kind not in ALL_MASK_ATTENTION_FUNCTIONS:
        yield
        return
    own = ALL_MASK_ATTENTION_FUNCTIONS[kind]
    ALL_MASK_ATTENTION_FUNCTIONS[kind] = partial(_mask, own, kind, padded)
    try:
        yield
    finally:
        ALL_MASK_ATTENTION_FUNCTIONS[kind] = own


def _mask(own: Callable[..., Any], kind: str, padded: bool, *args: Any, **asked: Any) -> Any:
    """What `own`, one of transformers' mask functions, is `asked` for by name."""
    mask: Tensor | None = asked.get("attention_mask")  # [B, T_past + T] bool
    # Of masks that are more than causal, a model asks for all it needs and nothing is read.
    causal = asked.get("allow_is_causal_skip", True) and not asked.get("allow_is_bidirectional_skip", False)
    if mask is None or not causal:
        return own(*args, **asked)
    if not padded:
        return own(*args, **asked | {"attention_mask": None})
    if kind == "sdpa" and _is_one_token(mask, asked):
        return mask.bool()[:, None, None]  # the newest token sees all that is real: no kernel is needed to say so
    return own(*args, **asked | {"allow_is_causal_skip": False})


def _is_one_token(mask: Tensor, asked: dict[str, Any]) -> bool:
    """Whether the mask is that of the newest position alone, which sees all before it."""
    length = mask.shape[1]
    return (
        asked.get("mask_function") is causal_mask_function
        and asked.get("q_length") == 1
        and asked.get("q_offset") == length - 1
        and asked.get("kv_length") == length
        and asked.get("kv_offset") == 0
    )
