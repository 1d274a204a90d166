"""Counts what the host would wait for a GPU for, on tensors of a CPU.

A read of a value (`item`, `tolist`, `bool`, `numpy`) and a shape that depends on values (`nonzero`, indexing by bool)
both wait until the device has finished all it was given; so does a tensor made of a list on it. Each is counted under
the innermost function outside of torch, as "folder/file.py:function".
"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_VALUES = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique2", "unique_dim"}
_VALUES |= {"item", "is_nonzero"}  # in inference mode these come as they are
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
_READS = {"tolist", "numpy", "cpu", "__array__", "pin_memory"}
_MAKES = {"tensor", "as_tensor"}
_TORCH = str(Path(torch.__file__).parent)


class Waits:
    """Active as a context; `at` counts waits by place."""

    def __init__(self) -> None:
        self.at: Counter[str] = Counter()

    def __enter__(self) -> Waits:
        self._stack = ExitStack()
        self._stack.enter_context(_Functions(self))
        self._stack.enter_context(_Operators(self))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def note(self) -> None:
        frame = sys._getframe(1)
        while frame.f_code.co_filename.startswith((_TORCH, __file__, "<")):
            frame = frame.f_back
        path = Path(frame.f_code.co_filename)
        self.at[f"{path.parent.name}/{path.name}:{frame.f_code.co_name}"] += 1

    def total(self) -> int:
        return sum(self.at.values())


class _Operators(TorchDispatchMode):
    def __init__(self, waits: Waits):
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        by_bool = name in _INDEXED and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        by_counts = (
            name == "repeat_interleave" and func._overloadname != "self_int" and not (kwargs or {}).get("output_size")
        )
        if name in _VALUES or by_bool or by_counts:
            self._waits.note()
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self, waits: Waits):
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        copied = name in _MAKES and (kwargs or {}).get("device") is not None and _is_data(args[0])
        if name in _READS or copied:
            self._waits.note()
        return func(*args, **(kwargs or {}))


def _is_data(given: object) -> bool:
    """Whether numbers would be copied to the device: neither a tensor, which may be there, nor nothing at all."""
    return not isinstance(given, torch.Tensor) and given != []
