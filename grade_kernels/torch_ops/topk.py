"""Exact top-k with a total order: value descending, then lower id."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grade_kernels.common.chunks import Rows, spans

_LOW_WORD = 0xFFFFFFFF
_INT32_MAX = 0x7FFFFFFF
_INT32_MIN = -0x80000000
# Smaller groups than these leave as much to look at as there was.
_LEAST_GROUP = 4
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
    values, ids = _leading(logits, k + 1)
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
    return _LOW_WORD - (_leading(keys, k)[0] & _LOW_WORD)


def _leading(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """torch.topk of values [N, V], which looks at the largest of every group of entries first: (values, ids) [N, k].

    The k largest are in the k groups with the largest maxima: an entry of another group is preceded by the maxima of
    all of these. The values are exact, whatever the ties; which of equal ones an id belongs to is as open as it is in
    torch.topk. With groups of sqrt(V / k) entries the two selections look at 2 sqrt(V k) together, in the place of V.
    """
    n, vocab = values.shape
    size = math.isqrt(vocab // k)
    if size < _LEAST_GROUP or values.device.type != "cpu":
        return torch.topk(values, k)
    groups = vocab // size  # the entries of group j are j, j + groups, j + 2 groups, ...
    maxima = values[:, : groups * size].unflatten(1, (size, groups)).amax(1)
    first = torch.topk(maxima, k, sorted=False).indices  # [N, k]
    offsets = torch.arange(0, groups * size, groups, device=values.device)
    ids = (first[:, None] + offsets[:, None]).view(n, -1)
    if groups * size < vocab:
        rest = torch.arange(groups * size, vocab, device=values.device)
        ids = torch.cat([ids, rest.expand(n, -1)], 1)
    found = torch.topk(values.gather(1, ids), k)
    return found.values, ids.gather(1, found.indices)


def _topk_sort(logits: Tensor, k: int, suppress: Tensor | None) -> Tensor:
    if suppress is not None:
        logits = logits.index_fill(1, suppress, -torch.inf)
    ids = torch.sort(logits, dim=-1, descending=True, stable=True).indices
    if suppress is not None:  # and behind the other -inf entries
        blocked = torch.zeros(logits.shape[1], dtype=torch.uint8, device=logits.device)
        blocked[suppress] = 1
        ids = ids.gather(-1, torch.sort(blocked[ids], dim=-1, stable=True).indices)
    return ids[:, :k]
