"""The most that a piece of work holds in memory at a time."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")


def peak_bytes(call: Callable[[], T], device: torch.device) -> tuple[T, int]:
    """(result of `call`, its peak memory above what was allocated before).

    On an accelerator it is the caching allocator's peak. On a CPU it is that of the living tensors that operators
    returned: what one operator allocates and frees inside itself, and what compiled code allocates, is not seen.
    """
    if device.type != "cuda":
        with LiveBytes() as live:
            result = call()
        return result, live.peak
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    torch.cuda.synchronize(device)
    return result, torch.cuda.max_memory_allocated(device) - before


class LiveBytes(TorchDispatchMode):
    """Peak of the bytes in storages that were made while it is active; views count once, arguments never."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given: set[int] | None = None
        out = func(*args, **kwargs)
        for owner, key, size in map(_memory_of, _tensors((out,))):
            if key not in self._known:
                if given is None:
                    given = {_memory_of(t)[1] for t in _tensors((*args, *kwargs.values()))}
                if key not in given:
                    self._now += size
                    self._known[key] = weakref.ref(owner, partial(self._drop, key, size))
        self.peak = max(self.peak, self._now)
        return out

    def _drop(self, key: int, size: int, _: object) -> None:
        del self._known[key]
        self._now -= size


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _memory_of(tensor: Tensor) -> tuple[object, int, int]:
    """(what the memory lives and dies with, its key, its bytes); oneDNN's own layouts have no storage to ask."""
    if tensor.is_mkldnn:
        return tensor, id(tensor), tensor.numel() * tensor.element_size()
    storage = tensor.untyped_storage()
    return storage, storage._cdata, storage.nbytes()


def hand_back() -> None:
    """Give unused memory back, such as what an exception's traceback held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
