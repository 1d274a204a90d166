"""Exact top-k with a total order: value descending, then lower id."""

from __future__ import annotations

import torch
from torch import Tensor

from grade_kernels.common.chunks import Rows, spans

_LOW_WORD = 0xFFFFFFFF
_INT32_MAX = 0x7FFFFFFF
_INT32_MIN = -0x80000000
# Bytes of sorting keys at a time; torch.topk takes one thread a row, so these are many rows.
_KEY_BYTES = 2**25


def topk_ids(logits: Rows, k: int, suppress: Tensor | None = None) -> Tensor:
    """Ids int64 [N, k] of the k largest of logits [N, V], ordered by (value descending, lower id).

    NaN sorts first, as in torch.topk.  `suppress` (int64 [m]) sorts after everything, -inf included, by id.
    """
    n, vocab = logits.shape
    select = _topk_sort if logits.dtype == torch.float64 else _topk_keys
    out = torch.empty(n, k, dtype=torch.int64, device=logits.device)
    # 16-bit values are full of ties. To ask for them would break a graph, and elsewhere than on a CPU wait for the
    # device.
    quick = logits.device.type == "cpu" and logits.dtype.itemsize >= 4 and k < vocab
    quick = quick and not torch.compiler.is_compiling()
    for a, b in spans(n, max(1, _KEY_BYTES // (8 * vocab))):
        part = logits[a:b]
        if not quick:
            out[a:b] = select(part, k, suppress)
            continue
        out[a:b], untied = _topk_untied(part, k, suppress)
        if not untied.all():
            out[a:b][~untied] = select(part[~untied], k, suppress)
    return out


def _topk_untied(logits: Tensor, k: int, suppress: Tensor | None) -> tuple[Tensor, Tensor]:
    """(ids [r, k], where they are sure [r]): where the first k + 1 values of a row differ, torch.topk has no choice."""
    if suppress is not None:
        logits = logits.index_fill(1, suppress, -torch.inf)
    values, ids = logits.topk(k + 1)
    return ids[:, :k], (values[:, 1:] < values[:, :-1]).all(-1)  # false beside a NaN


def _topk_keys(logits: Tensor, k: int, suppress: Tensor | None) -> Tensor:
    # One int64 key per entry, distinct and ordered as wanted: the float's bits, made monotonic, above the
    # complement of the id.  16-bit floats are exact in float32.
    values = logits.float() + 0.0  # -0.0 + 0.0 is 0.0: the two zeros are one value
    values.masked_fill_(values.isnan(), torch.nan)  # one NaN, with its sign bit clear
    order = values.view(torch.int32)
    order ^= (order >> 31).bitwise_and_(_INT32_MAX)
    if suppress is not None:
        order.index_fill_(1, suppress, _INT32_MIN)  # -inf maps to a larger key
    keys = order.long()
    keys <<= 32
    keys |= torch.arange(_LOW_WORD, _LOW_WORD - logits.shape[1], -1, device=logits.device)
    return _LOW_WORD - (torch.topk(keys, k).values & _LOW_WORD)


def _topk_sort(logits: Tensor, k: int, suppress: Tensor | None) -> Tensor:
    if suppress is not None:
        logits = logits.index_fill(1, suppress, -torch.inf)
    ids = torch.sort(logits, dim=-1, descending=True, stable=True).indices
    if suppress is not None:  # and behind the other -inf entries
        blocked = torch.zeros(logits.shape[1], dtype=torch.uint8, device=logits.device)
        blocked[suppress] = 1
        ids = ids.gather(-1, torch.sort(blocked[ids], dim=-1, stable=True).indices)
    return ids[:, :k]
