"""The cache of what a model keeps of earlier positions: keys and values, recurrent states, or both.

For decoding a known number of tokens without a graph, keys and values are written in place. Rows of any cache are
repeated and selected here, by the one interface that transformers has for every kind of layer (beam search's).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer


class ReservedLayer(DynamicLayer):
    """`DynamicLayer` with room for `capacity` positions, of which it returns those so far.

    The original concatenates, which copies every key and value for every token. Written values may not be part of a
    graph: backward would find them overwritten.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity
        self._rooms: list[Tensor] | None = None  # keys' and values', each [B, heads, capacity, size]
        self._view: Tensor | None = None  # the keys in it, as long as nobody has put others in their place

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        total = past + key_states.shape[-2]
        if total > self.capacity:
            raise ValueError(f"a cache for {self.capacity} positions was given {total}")
        given = (key_states, value_states)
        if self._rooms is None or self.keys is not self._view:  # new, or of other rows than before
            self._rooms = [x.new_empty(*x.shape[:-2], self.capacity, x.shape[-1]) for x in given]
            if past:
                for room, before in zip(self._rooms, (self.keys, self.values), strict=True):
                    room[..., :past, :] = before
        for room, new in zip(self._rooms, given, strict=True):
            room[..., past:total, :] = new
        self.keys, self.values = (room[..., :total, :] for room in self._rooms)
        self._view = self.keys
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._rooms = self._view = None  # layer by layer, or all would stand twice until the next token


def decoding_cache(config: PretrainedConfig, capacity: int) -> DynamicCache:
    """A cache for up to `capacity` positions of a model with this config.

    Layers with a window or with recurrent states keep transformers' own, which are short.
    """
    cache = DynamicCache(config=config)
    cache.layers = [ReservedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def is_recurrent(cache: Cache) -> bool:
    """Whether it holds recurrent states alone, and so cannot say how many positions it has seen."""
    return bool(cache.layers) and not any(hasattr(layer, "keys") for layer in cache.layers)


def select_rows(cache: Cache, rows: Tensor) -> None:
    """Put the batch's rows [b] int64 in the place of all, in this order, as often as they are named."""
    cache.reorder_cache(rows)


def repeat_rows(cache: Cache, copies: int) -> None:
    """Every row `copies` times, its copies next to each other."""
    sizes = {len(x) for layer in cache.layers for x in kept_tensors(layer)}
    if len(sizes) != 1:
        raise ValueError(f"the layers of the cache hold batches of different sizes ({sorted(sizes)})")
    device = next(x.device for layer in cache.layers for x in kept_tensors(layer))
    select_rows(cache, torch.arange(sizes.pop(), device=device).repeat_interleave(copies))


def kept_tensors(layer: CacheLayerMixin) -> list[Tensor]:
    """Keys and values that a layer of a cache holds, [B, heads, T, size] each, and its recurrent states [B, ...]."""
    return attention_tensors(layer) + state_tensors(layer)


def attention_tensors(layer: CacheLayerMixin) -> list[Tensor]:
    """Its keys and values."""
    return [x for x in (getattr(layer, "keys", None), getattr(layer, "values", None)) if x is not None and x.numel()]


def state_tensors(layer: CacheLayerMixin) -> list[Tensor]:
    """Its recurrent and convolution states, whose size does not depend on the length."""
    found = []
    for name in ("conv_states", "recurrent_states"):
        states = getattr(layer, name, None)  # one, or in newer versions a dictionary of several
        found += list(states.values()) if isinstance(states, dict) else [states]
    return [x for x in found if x is not None]
