"""The loop over chunks of rows that `vocab_head` and `vocab_objective` share, and the checks of their arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from grade_kernels.common import checks
from grade_kernels.common.chunks import chunk_rows, rows_of, spans
from grade_kernels.common.head import Head, check_hidden


def check_sweep(
    hidden: Tensor,
    head: Head,
    ref_hidden: Tensor | None,
    tokens: Tensor | None,
    suppress: Sequence[int] | Tensor | None,
) -> Tensor | None:
    """The arguments that both operations have; `suppress` as a tensor of ids, or None."""
    check_hidden("hidden", hidden, head)
    if ref_hidden is not None:
        check_hidden("ref_hidden", ref_hidden, head)
        checks.check_shape("ref_hidden", ref_hidden, hidden.shape)
    if tokens is not None:
        checks.check_ids("tokens", tokens, hidden.shape[:-1], hidden.device)
    return checks.suppress_ids(suppress, head.weight.shape[0], hidden.device)


def sweep(
    take: Callable[..., dict[str, Tensor]],
    hidden: Tensor,
    head: Head,
    ref_hidden: Tensor | None,
    per_row: Sequence[Tensor | None],
    chunk_bytes: int,
) -> dict[str, Tensor]:
    """What `take` makes of every chunk of rows, joined: tensors [..., *] by name.

    take(logits [r, V], ref_logits [r, V] or None, *rows of `per_row`) returns tensors [r, *] by name, and may
    overwrite the logits.  hidden and ref_hidden are [..., d], those of `per_row` [..., *] or None.
    """
    leading = hidden.shape[:-1]
    n = math.prod(leading)
    rows, ref_rows = rows_of(hidden), None if ref_hidden is None else rows_of(ref_hidden)
    flat = [x if x is None else x.reshape(n, *x.shape[len(leading) :]) for x in per_row]
    out: dict[str, Tensor] = {}

    def chunk(a: int, b: int) -> dict[str, Tensor]:
        """What is kept of the rows a..b; on return nothing holds their logits, before the next chunk is made."""
        logits = head.logits(rows[a:b])
        ref_logits = None if ref_rows is None else head.logits(ref_rows[a:b])
        return take(logits, ref_logits, *(x if x is None else x[a:b] for x in flat))

    for a, b in spans(n, chunk_rows(head.weight.shape[0], chunk_bytes, head.dtype.itemsize)):
        for name, piece in chunk(a, b).items():
            if name not in out:
                out[name] = piece.new_empty(n, *piece.shape[1:])
            out[name][a:b] = piece
    return {name: x.view((*leading, *x.shape[1:])) for name, x in out.items()}
