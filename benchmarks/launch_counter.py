"""Launches, bytes and waits of code for a GPU, counted on a machine without one.

Tensors lie on torch's meta device, which has shapes and no values, and say that they lie on a GPU, so that code takes
the ways that it takes there. Every operator that computes is a launch; ways through the values are those of a batch in
which no position is padding, no response ends early and no hop converges. Triton's kernels are recorded by their own
launcher.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grade_kernels.triton_ops import launch

CUDA, META = torch.device("cuda", 0), torch.device("meta")
# Of an H200 or H100 SXM.
PROCESSORS = 132
# Operators that are another number of kernels than one: those of flash attention's backward pass are three, of the
# others as many as PyTorch 2.13 launches for small inputs.
KERNELS = {
    "_scaled_dot_product_flash_attention_backward": 3,
    "_scaled_dot_product_efficient_attention_backward": 2,
    "isin": 3,
    "nonzero": 3,
    "sort": 2,
}
_READS_ROWS = ("embedding", "index_select", "index", "gather")
"""Operators that read rows of their first tensor, as many as they write."""
# A launch over a list of tensors takes so many blocks of so many elements, and so many tensors of each of 1, 2, ... lists.
_LIST_BLOCKS, _BLOCK_ELEMENTS, _LIST_TENSORS = 320, 65536, (110, 64, 48, 36, 30)


NUMBERS = ("launches", "waits", "moved", "least")


@dataclass
class Work:
    """What was asked of the device.

    Attributes:
        launches: of kernels, and copies.
        waits: times that the host waits for the device: for a value, or for a copy to or from it.
        moved: bytes of what the launches read and write, each by itself.
        least: bytes of these that had been there before or remain, each once; a program that keeps everything else on
            the chip moves no more.
        operators: launches by name.
    """

    launches: int = 0
    waits: int = 0
    moved: int = 0
    least: int = 0
    operators: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: Work) -> Work:
        return self._with(other, 1)

    def __sub__(self, other: Work) -> Work:
        return self._with(other, -1)

    def _with(self, other: Work, sign: int) -> Work:
        numbers = (getattr(self, name) + sign * getattr(other, name) for name in NUMBERS)
        operators = Counter(self.operators)
        for name, count in other.operators.items():
            operators[name] += sign * count
        return Work(*numbers, +operators)


class Counting:
    """Inside `counting()`: the work so far, and by phases.

    Attributes:
        phases: work by the names that `phase` was given.
    """

    def __init__(self, recorded: list[launch.Launch]):
        self.phases: dict[str, Work] = {}
        self._recorded, self._work = recorded, Work()
        self._made: set[StorageWeakRef] = set()
        self._read: set[tuple] = set()

    def work(self) -> Work:
        """All since the beginning."""
        for each in self._recorded:
            tensors = [a for a in each.args if isinstance(a, Tensor)]
            ids = max((t.numel() for t in tensors if t.dtype == torch.int64), default=0)
            self.launched(f"triton.{each.kernel.__name__}", tensors, [], ids=ids)
        self._recorded.clear()
        return Work(**{**vars(self._work), "operators": self._work.operators.copy()})

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add what happens inside to the phase of this name."""
        before = self.work()
        self._read.clear()
        self._made.clear()
        yield
        self.phases[name] = self.phases.get(name, Work()) + self.work() - before

    def launched(
        self, name: str, read: list[Tensor], written: list[Tensor], *, kernels: int = 1, ids: int | None = None
    ) -> None:
        """Note a launch.

        Args:
            ids: of one of our own kernels, the row numbers that it is given; from a weight it reads the rows they name.
        """
        self._work.launches += kernels
        self._work.operators[name] += kernels
        rows = max((size_of(t) for t in written), default=0) if name in _READS_ROWS else None
        for number, tensor in enumerate(read):
            size = size_of(tensor)
            if rows is not None and number == 0:
                size = min(size, rows)
            if ids is not None and isinstance(tensor, torch.nn.Parameter):
                size = min(size, ids * tensor.shape[-1] * tensor.dtype.itemsize)
            self._work.moved += size
            storage = StorageWeakRef(tensor.untyped_storage())
            place = (storage, tensor.storage_offset(), tuple(tensor.shape))
            if storage not in self._made and place not in self._read:
                self._read.add(place)
                self._work.least += size
        self._work.moved += sum(map(size_of, written))
        self.made(written)

    def made(self, tensors: list[Tensor]) -> None:
        """Note that these were not there before."""
        self._made.update(StorageWeakRef(tensor.untyped_storage()) for tensor in tensors)

    def waited(self, name: str) -> None:
        self._work.waits += 1
        self._work.operators[f"wait: {name}"] += 0


def size_of(tensor: Tensor) -> int:
    """Bytes of the elements that are different places: an expanded dimension counts once."""
    return math.prod(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step) * tensor.dtype.itemsize


@contextlib.contextmanager
def counting() -> Iterator[Counting]:
    """Count what happens inside. What it is given was made before, on the meta device."""
    device = SimpleNamespace(multi_processor_count=PROCESSORS, warp_size=32)
    with mock.patch.object(torch.cuda, "get_device_properties", lambda which=None: device):
        _forget_devices()
        with launch.recording() as recorded:
            found = Counting(recorded)
            with _Pretending(found), _Launches(found):
                yield found
    _forget_devices()


def _forget_devices() -> None:
    """What the launchers keep of the device."""
    launch.warp_size.cache_clear()
    launch.multiprocessors.cache_clear()


class _Pretending(TorchFunctionMode):
    """Tensors on the meta device say that they are on the GPU, and what is to be made there is made on meta."""

    def __init__(self, found: Counting):
        self._found = found

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if name == "__get__":
            return self._attribute(function, args)
        if name == "scaled_dot_product_attention":
            return _attention(*args, **kwargs)
        if _on_gpu(kwargs.get("device")):
            kwargs["device"] = META
            if name in ("tensor", "as_tensor"):
                self._found.launched("copy", [], [])
                self._found.waited("copy")
        args = tuple(META if _on_gpu(a) else a for a in args)
        if name in ("tolist", "numpy") and _is_meta(args[0]):
            self._found.waited(name)
            return getattr(torch.ones(args[0].shape, dtype=args[0].dtype), name)()
        return function(*args, **kwargs)

    @staticmethod
    def _attribute(function: Any, args: Any) -> Any:
        found = function(*args)
        which = getattr(function.__self__, "__name__", "")
        if which == "device" and found.type == "meta":
            return CUDA
        if which in ("is_cuda", "is_meta"):
            return which == "is_cuda" and _is_meta(args[0])
        return found


def _is_meta(tensor: Any) -> bool:
    with torch._C.DisableTorchFunction():
        return isinstance(tensor, Tensor) and tensor.device.type == "meta"


def _on_gpu(device: Any) -> bool:
    if isinstance(device, str):
        return device.split(":")[0] == "cuda"
    return isinstance(device, torch.device) and device.type == "cuda"


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """By the kernel that PyTorch takes for 16 bits: flash attention, or with a mask the memory-efficient one."""
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
    if attn_mask.dtype == torch.bool:
        seen, unseen = (query.new_full((), value) for value in (0.0, -math.inf))
        attn_mask = torch.where(attn_mask, seen, unseen)
    bias = attn_mask.expand(*query.shape[:3], key.shape[2])
    needs = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, needs, dropout_p, is_causal, scale=scale
    )[0]


class _Launches(TorchDispatchMode):
    """Counts operators on meta tensors, and answers those that need values."""

    def __init__(self, found: Counting):
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name.split("::")[1]
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        here = [x for x in read if x.device.type == "meta"]
        if name == "_local_scalar_dense" and here:
            self._found.waited(name)
            return torch.ones((), dtype=here[0].dtype).item()
        if name == "dropout" and not args[2]:
            return args[0]
        if torch.is_inference_mode_enabled() and function._can_decompose():
            with self:
                whole = function.decompose(*args, **kwargs)
            if whole is not NotImplemented:
                return whole
        if name == "nonzero" and here:
            self._found.waited(name)
            out = here[0].new_empty(here[0].numel(), here[0].dim(), dtype=torch.int64)
        elif name == "_to_copy" and here and _leaves(kwargs):
            self._found.waited(name)
            out = torch.ones(here[0].shape, dtype=kwargs.get("dtype") or here[0].dtype)
        else:
            out = function(*args, **kwargs)
        written = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if here or any(x.device.type == "meta" for x in written):
            self._note(function, name, args, read, written)
        return out

    def _note(self, function: Any, name: str, args: Any, read: list[Tensor], written: list[Tensor]) -> None:
        mutates = function._schema.is_mutable
        storages = {StorageWeakRef(x.untyped_storage()) for x in read}
        views = bool(written) and all(StorageWeakRef(x.untyped_storage()) in storages for x in written)
        if name.startswith(("empty", "new_empty")) or (views and not mutates) or name in ("lift_fresh", "alias"):
            if not views:
                self._found.made(written)
            return
        if any(x.device.type == "cpu" and x.dim() for x in read) and name in ("copy_", "_to_copy"):
            self._found.waited("copy")
        kernels = KERNELS.get(name, 1)
        if name.startswith("_foreach"):
            kernels = list_launches(args)
            written = [x for x in tree_leaves(args[0]) if isinstance(x, Tensor)] if mutates else written
        self._found.launched(name, read, written, kernels=kernels)


def _leaves(kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "cpu"


def list_launches(args: tuple) -> int:
    """Launches of an operator over lists of tensors."""
    lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)]
    most, launches, tensors, blocks = _LIST_TENSORS[min(len(lists), 5) - 1], 0, 0, 0
    for tensor in lists[0]:
        tensors += 1
        for _ in range(-(-tensor.numel() // _BLOCK_ELEMENTS)):
            blocks += 1
            if blocks == _LIST_BLOCKS:
                launches, blocks, tensors = launches + 1, 0, 0
        if tensors == most:
            launches, blocks, tensors = launches + 1, 0, 0
    return launches + (blocks > 0)
