"""Row chunks: how much of a [N, V] problem is in memory at a time.

There are two sizes.  A *chunk* is a product with the head: large, for the sake of the matrix product.  A
*piece* is what elementwise passes work on: small, so that the temporaries of a chain of passes stay in
the cache of a CPU instead of going through memory each time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Arrays the size of a chunk that are alive at once: the policy's and the reference's logits (gradients
# overwrite them) and one temporary of the product or of the soft cap.
CHUNK_ARRAYS = 3
# Rows that a GPU's matrix units take at a time.
_TILE_ROWS = 128
# Bytes of one array of a piece: per thread on a CPU; large enough to hide kernel launches elsewhere.
_PIECE_BYTES_CPU = 2**19
_PIECE_BYTES = 2**26


def chunk_rows(vocab: int, chunk_bytes: int, itemsize: int = 4) -> int:
    """Rows of a chunk such that 3 arrays [rows, vocab] fit into `chunk_bytes`; at least 1, above 128 a multiple of it.

    `itemsize` is 4 for float32 logits (16-bit and float32 inputs), 8 for float64.
    """
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be at least 1, got {chunk_bytes}")
    rows = chunk_bytes // (CHUNK_ARRAYS * itemsize * vocab)
    return max(1, rows if rows < _TILE_ROWS else rows - rows % _TILE_ROWS)


def piece_rows(width: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows of a piece [rows, width]; at least 1."""
    threads = cpu_threads(device)
    piece_bytes = _PIECE_BYTES_CPU * threads if threads else _PIECE_BYTES
    return max(1, piece_bytes // (dtype.itemsize * width))


def cpu_threads(device: torch.device) -> int:
    """Threads that share the caches an operation runs in, or 0 where small pieces are no use: on an
    accelerator, and under torch.compile, which would unroll the loop over them."""
    return torch.get_num_threads() if device.type == "cpu" and not torch.compiler.is_compiling() else 0


def spans(total: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive parts of at most `size` that cover range(total).

    An empty range is one empty part, so that an empty batch takes the same path and gets its shapes.
    """
    for start in range(0, max(total, 1), size):
        yield start, min(start + size, total)


def pieces(x: Rows, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    return spans(x.shape[0], piece_rows(x.shape[1], dtype, x.device))


class RowView:
    """x [..., V] seen as [N, V] where its leading dimensions cannot be merged (`logits[:, :-1]`, say).

    `reshape` would copy all of x; slicing this copies the rows asked for.
    """

    def __init__(self, x: Tensor):
        self.tensor = x
        self.leading = x.shape[:-1]
        self.shape = (math.prod(self.leading), x.shape[-1])
        self.dtype, self.device = x.dtype, x.device

    def __getitem__(self, rows: slice) -> Tensor:
        flat = torch.arange(rows.start, rows.stop, device=self.device)
        return self.tensor[torch.unravel_index(flat, self.leading)]


Rows = Tensor | RowView  # both have shape (N, V), dtype, device and slices of rows


def rows_of(x: Tensor) -> Rows:
    """x [..., V] as [N, V], without a copy."""
    if _mergeable(x):
        return x.view(math.prod(x.shape[:-1]), x.shape[-1])
    return RowView(x)


def gather(x: Rows, ids: Tensor) -> Tensor:
    """The entries of x [N, V] at ids [N, k]: [N, k]."""
    if isinstance(x, RowView):
        return x.tensor.gather(-1, ids.view(*x.leading, ids.shape[-1])).view(ids.shape)
    return x.gather(-1, ids)


def _mergeable(x: Tensor) -> bool:
    expected = None
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if expected is not None and stride != expected:
            return False
        expected = size * stride
    return True
