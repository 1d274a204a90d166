"""A KV cache that is written in place: for decoding a known number of tokens without a graph."""

from __future__ import annotations

from typing import Optional

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class ReservedLayer(DynamicLayer):
    """`DynamicLayer` with room for `capacity` positions, of which it returns those so far.

    The original concatenates, which copies every key and value for every token. Written values may not be part of a
    graph: backward would find them overwritten.
    """

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity
        self._room: Optional[Tensor] = None  # [2, B, heads, capacity, head size]
        self._view: Optional[Tensor] = None  # the keys in it, as long as nobody has put others in their place

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        total = past + key_states.shape[-2]
        if total > self.capacity:
            raise ValueError(f"a cache for {self.capacity} positions was given {total}")
        if self._room is None or self.keys is not self._view:  # new, or repeated for several samples
            room = key_states.new_empty(2, *key_states.shape[:2], self.capacity, key_states.shape[-1])
            if past:
                room[0, :, :, :past], room[1, :, :, :past] = self.keys, self.values
            self._room = room
        self._room[0, :, :, past:total] = key_states
        self._room[1, :, :, past:total] = value_states
        self.keys, self.values = self._room[0, :, :, :total], self._room[1, :, :, :total]
        self._view = self.keys
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._room = self._view = None  # layer by layer, or all would stand twice until the next token


def decoding_cache(config, capacity: int) -> DynamicCache:
    """A cache for up to `capacity` positions of a model with this config.

    Layers with a window keep transformers' own, which is short.
    """
    cache = DynamicCache(config=config)
    cache.layers = [ReservedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
