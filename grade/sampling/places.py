"""Where the positions of a batch of responses are kept for compiled code: in memory that stays where it is."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache, StaticCache

# Prompts differ in length, and every other capacity is compiled anew.
_CAPACITY_STEP = 64


def capacity_of(length: int) -> int:
    """Positions of a cache for `length` of them."""
    return -(-length // _CAPACITY_STEP) * _CAPACITY_STEP


class Places:
    """Where the positions of a batch of responses are kept.

    Attributes:
        cache: keys and values, [B, heads, capacity, size] each in every layer.
        mask: [B, 1, 1, capacity], False where a prompt is padded.
        lengths: [B, 1], real tokens of the prompts.
        start: [1], the prompts' length with padding.
    """

    def __init__(self, cache: StaticCache, batch: int, capacity: int, device: torch.device):
        self.cache = cache
        self.mask = torch.ones(batch, 1, 1, capacity, dtype=torch.bool, device=device)
        self.lengths = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.start = torch.zeros(1, dtype=torch.int64, device=device)

    def seen(self, length: int | Tensor) -> Tensor:
        """[B, 1, 1, capacity], True where a position is real and one of the first `length`, a number or [1]."""
        return self.mask & (torch.arange(self.mask.shape[-1], device=self.mask.device) < length)

    def fill(self, prompts: Cache, prompt_mask: Tensor) -> None:
        """Begin with the prompts [B, P], of which `prompts` has keys and values."""
        for layer, prompt in zip(self.cache.layers, prompts.layers, strict=True):
            layer.update(prompt.keys, prompt.values)
        self.mask.fill_(True)
        self.mask[:, 0, 0, : prompt_mask.shape[1]] = prompt_mask
        self.lengths.copy_(prompt_mask.sum(1, keepdim=True))
        self.start.fill_(prompt_mask.shape[1])


def remember(*tensors: Tensor | None) -> None:
    """Tell the compiler that the tensors stay where they are, or graphs would copy them for every token."""
    for tensor in tensors:
        if tensor is not None:
            torch._dynamo.mark_static_address(tensor, guard=False)
