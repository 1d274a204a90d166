"""Attention of one new token per row over a cache, of which a part may be filled, and in which several query heads may
share a key and value head.

While compiling, transformers copies keys and values once a query head that reads them, in every layer and for every
token. For one position the query heads of a group are as well the positions of one head. And a static cache is read to
its end, of which the mask then leaves out what is not filled; here a mask that ends earlier is where reading ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@contextmanager
def grouped_attention() -> Iterator[None]:
    """Inside, layers of sdpa attention call `grouped_sdpa`."""
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = grouped_sdpa
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = own


def grouped_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' `sdpa_attention_forward`, without copies of `key` and `value` where there is one position, and over
    no more of them than the mask has.

    Args:
        query: [B, heads, T, size].
        key, value: [B, heads / groups, capacity, size], of which the first T_past + T are filled.
        attention_mask: [B, 1 or heads, T, T_past + T] bool, True where a key is seen, or of numbers to add; for one
            position it may also cover the whole capacity.
        options: as there.

    Returns:
        ([B, T, heads, size], None).
    """
    batch, heads, length, size = query.shape
    if length == 1 and attention_mask is not None:
        key, value = (x[:, :, : attention_mask.shape[-1]] for x in (key, value))
    shared = key.shape[1]
    masked = attention_mask is not None and attention_mask.shape[1] == 1
    if heads == shared or length > 1 or not masked or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    grouped = query.reshape(batch, shared, heads // shared, size)
    options["is_causal"] = False  # these are no positions, and all of them see what the mask says
    # Without its module it takes heads as they are. [B, groups, heads / groups, size]
    out, _ = sdpa_attention_forward(None, grouped, key, value, attention_mask, **options)
    return out.transpose(1, 2).reshape(batch, 1, heads, out.shape[-1]), None
