"""Launches, bytes and waits of code for a GPU, counted on a machine without one.

Tensors lie on torch's meta device, which has shapes and no values, and say that they lie on a GPU, so that code takes
the ways that it takes there. Every operator that computes is a launch, and so is an operation of this package, most of
which are one kernel; kernels that are launched past an operation are recorded by their launcher. Where code asks for
values, they are those of a batch in which no position is padding, no response ends early and no hop converges.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
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
# Of an H200 SXM, as far as torch and the launchers ask for it.
H200 = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20,
    total_memory=141 * 10**9,
    gcnArchName="",
)
# Operators that are another number of kernels than one, in PyTorch's own code for CUDA.
KERNELS = {
    "_scaled_dot_product_flash_attention_backward": 3,
    "_scaled_dot_product_efficient_attention_backward": 2,
    "isin": 3,
    "nonzero": 3,
    "sort": 2,
}
# Operators that read rows of their first tensor, as many as they write.
_READS_ROWS = ("embedding", "index_select", "index", "gather")
# A launch over lists of tensors takes so many blocks of so many numbers, and of 1, 2, ... lists so many tensors each.
_LIST_BLOCKS, _BLOCK_NUMBERS, _LIST_TENSORS = 320, 65536, (110, 64, 48, 36, 30)
NUMBERS = ("launches", "waits", "moved", "least")


@dataclass
class Work:
    """What was asked of the device.

    Attributes:
        launches: of kernels, and copies.
        waits: times that the host waits for the device: for a value, or for a copy from or to pageable memory.
        moved: bytes that the launches read and write, each by itself.
        least: bytes that had been there before, each place once: weights, caches, what is given. Nothing that keeps the
            rest on the chip moves less.
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
        operators = Counter(self.operators)
        for name, count in other.operators.items():
            operators[name] += sign * count
        numbers = {name: getattr(self, name) + sign * getattr(other, name) for name in NUMBERS}
        return Work(**numbers, operators=+operators)


class Counting:
    """The work inside `counting()`, so far and by phases.

    Attributes:
        phases: work by the names that `phase` was given.
        answers: what lists of whole numbers hold that code asks for, by their length; those of others are ones.
    """

    def __init__(self, recorded: list[launch.Launch]):
        self.phases: dict[str, Work] = {}
        self.answers: dict[int, list[int]] = {}
        self._recorded, self._work = recorded, Work()
        self._made: set[StorageWeakRef] = set()
        self._read: set[tuple] = set()

    def work(self) -> Work:
        """All since the beginning."""
        for each in self._recorded:
            if 0 not in each.grid:
                tensors = [a for a in each.args if isinstance(a, Tensor)]
                self.launched(f"triton.{each.kernel.__name__}", tensors, [], rows=_rows_named(tensors))
        self._recorded.clear()
        return Work() + self._work

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add what happens inside to the phase of this name. What is there at its beginning had been there before."""
        before = self.work()
        self._read.clear()
        self._made.clear()
        yield
        self.phases[name] = self.phases.get(name, Work()) + self.work() - before

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """What happens inside is no work."""
        before = self.work()
        yield
        self.work()
        self._work = before

    def launched(
        self,
        name: str,
        read: Sequence[Tensor],
        written: Sequence[Tensor],
        *,
        kernels: int = 1,
        rows: tuple[int, int] | None = None,
    ) -> None:
        """Note a launch.

        Args:
            rows: (n, m): of a matrix with more than n rows m are read at most.
        """
        done = sum(map(size_of, written))
        moved = done
        for number, tensor in enumerate(read):
            size = size_of(tensor)
            if number == 0 and name in _READS_ROWS:
                size = min(size, done)
            if rows is not None and tensor.dim() == 2 and len(tensor) > rows[0]:
                size = min(size, rows[1] * tensor.shape[1] * tensor.dtype.itemsize)
            moved += size
            storage = StorageWeakRef(tensor.untyped_storage())
            place = (storage, tensor.storage_offset(), tuple(tensor.shape))
            if storage not in self._made and place not in self._read:
                self._read.add(place)
                self._work.least += size
        self._work.launches += kernels
        self._work.moved += moved
        self._work.operators[name] += kernels
        self.made(written)

    def made(self, tensors: Sequence[Tensor]) -> None:
        """Note that these were not there before."""
        self._made.update(StorageWeakRef(tensor.untyped_storage()) for tensor in tensors)

    def waited(self) -> None:
        """Note that the host waits."""
        self._work.waits += 1


def size_of(tensor: Tensor) -> int:
    """Bytes of a tensor's different places: an expanded dimension counts once."""
    return math.prod(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step) * tensor.dtype.itemsize


def _rows_named(tensors: list[Tensor]) -> tuple[int, int] | None:
    """(n, m) of the largest ids [n, ...], m in all, that a kernel is given: it reads these rows of a table."""
    ids = [t for t in tensors if t.dtype == torch.int64 and t.dim()]
    return max(((len(t), t.numel()) for t in ids), key=lambda each: each[1], default=None)


@contextlib.contextmanager
def counting() -> Iterator[Counting]:
    """Count what happens inside. What that is given was made before, on the meta device."""
    with mock.patch.object(torch.cuda, "get_device_properties", lambda device=None: H200):
        _forget_devices()
        with launch.recording() as recorded:
            found = Counting(recorded)
            with _OnGpu(found), _Launches(found):
                yield found
    _forget_devices()


def _forget_devices() -> None:
    """What the launchers keep of the device."""
    launch.warp_size.cache_clear()
    launch.multiprocessors.cache_clear()


class _OnGpu(TorchFunctionMode):
    """Tensors on the meta device say that they are on the GPU, and what is to be made there is made on meta."""

    def __init__(self, found: Counting):
        self._found = found

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if name == "__get__":
            return _attribute(function, args)
        if name == "scaled_dot_product_attention":
            return attention(*args, **kwargs)
        copies = _is_gpu(kwargs.get("device")) and name in ("tensor", "as_tensor")
        if _is_gpu(kwargs.get("device")):
            kwargs["device"] = META
        args = tuple(META if _is_gpu(a) else a for a in args)
        if name in ("tolist", "numpy") and function_free(lambda: args[0].device == META):
            self._found.waited()
            values = torch.ones(args[0].shape, dtype=args[0].dtype)
            if values.dtype == torch.int64 and values.dim() == 1 and len(values) in self._found.answers:
                values = torch.tensor(self._found.answers[len(values)])
            return getattr(values, name)()
        found = function(*args, **kwargs)
        if copies and found.numel():
            self._found.launched("copy", [], [])
            self._found.waited()
        return found


def function_free(call: Any) -> Any:
    """What `call` returns where tensors say where they are."""
    with torch._C.DisableTorchFunction():
        return call()


def _attribute(function: Any, args: Any) -> Any:
    """An attribute of a tensor, as one on the GPU has it."""
    found, name = function(*args), getattr(function.__self__, "__name__", "")
    on_meta = name in ("device", "is_cuda", "is_meta") and function_free(lambda: args[0].device == META)
    return {"device": CUDA, "is_cuda": True, "is_meta": False}[name] if on_meta else found


def _is_gpu(device: Any) -> bool:
    if isinstance(device, str):
        return device.split(":")[0] == "cuda"
    return isinstance(device, torch.device) and device.type == "cuda"


def attention(
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
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if attn_mask.dtype == torch.bool:
        seen, unseen = (query.new_full((), number) for number in (0.0, -math.inf))
        attn_mask = torch.where(attn_mask, seen, unseen)
    bias = attn_mask.expand(*query.shape[:3], key.shape[2])
    graph = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, bias, graph, dropout_p, is_causal, scale=scale)[0]


class _Launches(TorchDispatchMode):
    """Counts operators on meta tensors, and answers those that need values."""

    def __init__(self, found: Counting):
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name.split("::")[1]
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        here = [x for x in read if x.device == META]
        if name == "dropout" and not args[2]:
            return args[0]
        if name == "_local_scalar_dense" and here:
            self._found.waited()
            return torch.ones((), dtype=here[0].dtype).item()
        if torch.is_inference_mode_enabled() and function._can_decompose():
            with self:  # in that mode, operators that others are made of come here whole
                whole = function.decompose(*args, **kwargs)
            if whole is not NotImplemented:
                return whole
        if name == "nonzero" and here:
            self._found.waited()
            out = here[0].new_empty(here[0].numel(), here[0].dim(), dtype=torch.int64)
        elif name == "_to_copy" and here and torch.device(kwargs.get("device") or META).type == "cpu":
            self._found.waited()
            out = torch.ones(here[0].shape, dtype=kwargs.get("dtype") or here[0].dtype)
        else:
            out = function(*args, **kwargs)
        written = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if here or any(x.device == META for x in written):
            self._note(function, name, args, read, written)
        return out

    def _note(self, function: Any, name: str, args: Any, read: list[Tensor], written: list[Tensor]) -> None:
        mutates = function._schema.is_mutable
        storages = {StorageWeakRef(x.untyped_storage()) for x in read}
        if written and not mutates and all(StorageWeakRef(x.untyped_storage()) in storages for x in written):
            return  # a view
        if name.startswith(("empty", "new_empty")) or name == "detach_":
            self._found.made(written)
            return
        if name in ("copy_", "_to_copy") and any(x.device.type == "cpu" and x.dim() for x in read):
            self._found.waited()
        kernels = KERNELS.get(name, 1)
        if name.startswith("_foreach"):
            kernels = list_launches(args)
            written = [x for x in tree_leaves(args[0]) if isinstance(x, Tensor)] if mutates else written
        self._found.launched(name, [x for x in read if x.device == META], written, kernels=kernels)


def list_launches(args: Sequence[Any]) -> int:
    """Launches of an operator over lists of tensors."""
    lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)]
    if lists[0][0].device != META:
        return 0
    most, launches, tensors, blocks = _LIST_TENSORS[min(len(lists), 5) - 1], 0, 0, 0
    for tensor in lists[0]:
        tensors += 1
        for left in reversed(range(-(-tensor.numel() // _BLOCK_NUMBERS))):
            blocks += 1
            if blocks == _LIST_BLOCKS:  # the next launch begins with what is left of this tensor
                launches, blocks, tensors = launches + 1, 0, min(left, 1)
        if tensors == most:
            launches, blocks, tensors = launches + 1, 0, 0
    return launches + (blocks > 0)
