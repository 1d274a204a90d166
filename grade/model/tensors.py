"""Tensors told by content, which have the same digest in every process and on every device; sums in a fixed order."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def running_sum(x: Tensor, dim: int) -> Tensor:
    """`x.cumsum(dim)`, which torch refuses on a GPU where operations are to give the same bits each time: then a CPU
    takes it."""
    if x.is_cuda and x.is_floating_point() and torch.are_deterministic_algorithms_enabled():
        return x.cpu().cumsum(dim).to(x.device)
    return x.cumsum(dim)


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, dtypes and values; sparse tensors by their entries, quantized ones by what they stand
    for, and of those on the device "meta", which have no values, without them."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        for part in _strided(tensor):
            plain = part.cpu().resolve_conj().resolve_neg().contiguous()
            digest.update(plain.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _strided(tensor: Tensor) -> list[Tensor]:
    """The tensors that hold a tensor's values in the plain layout."""
    if tensor.is_meta:
        return []
    if tensor.is_quantized:
        return [tensor.dequantize()]
    if tensor.is_mkldnn:
        return [tensor.to_dense()]
    if tensor.layout is torch.strided:
        return [tensor]
    entries = tensor.to_sparse().coalesce()  # not dense: its shape may be far larger than what it holds
    return [entries.indices(), entries.values()]
