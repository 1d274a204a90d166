"""What several kernel tests share: errors relative to float64, and a record of the tensors an op makes."""

from __future__ import annotations

import weakref
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from grade_kernels import Head

HALF = [torch.bfloat16, torch.float16]


def rel_err(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error relative to the largest entry of the exact result."""
    value, exact = value.detach().double(), exact.detach().double()
    return float((value - exact).abs().max() / exact.abs().max())


def assert_no_worse(ours: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """Our error is at most plain PyTorch's in the same dtype, or a few roundings.

    The roundings are those of the result (16 bits) or of a handful of float32 operations, where the two
    implementations differ by chance.
    """
    mine, theirs = rel_err(ours, exact), rel_err(plain, exact)
    floor = max(torch.finfo(ours.dtype).eps, 8 * torch.finfo(torch.float32).eps)
    assert mine <= max(theirs, floor), f"{mine:.3g} against plain {theirs:.3g}"


def chunk_pair(n: int, vocab: int, device: str, noise: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [n, vocab] of a policy and of a reference that is near it."""
    logits = torch.randn(n, vocab) * 3
    return logits.to(device), (logits + noise * torch.randn(n, vocab)).to(device)


def supports(n: int, vocab: int, k: int, device: str = "cpu") -> torch.Tensor:
    """Distinct ids [n, k]."""
    return torch.stack([torch.randperm(vocab)[:k] for _ in range(n)]).to(device)


# Head options: plain; with a bias; Cohere's and Granite's logit scale; Gemma 2's soft cap; everything.
HEADS = [{}, {"bias": True}, {"scale": 0.25}, {"softcap": 3.0}, {"bias": True, "scale": -1.5, "softcap": 2.0}]


def make_head(options: dict, vocab: int, width: int, dtype: torch.dtype, device: str = "cpu") -> Head:
    """A random head with these of `HEADS`."""
    options = dict(options)
    weight = torch.randn(vocab, width, dtype=dtype, device=device)
    bias = torch.randn(vocab, dtype=dtype, device=device) if options.pop("bias", False) else None
    return Head(weight, bias, **options)


def assert_same_fields(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Two paths of a sweep agree: ids and logits exactly, NaN in the same places."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        exact = name in ("indices", "logits")
        tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 2e-6}
        torch.testing.assert_close(value, theirs[name], **tolerance, equal_nan=True, msg=name)


class Launches(TorchDispatchMode):
    """Operators that ran while it is active, by name, but for those that only make a view or reserve memory."""

    def __init__(self):
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func is not torch.ops.aten.empty.memory_format:
            self.names[func._schema.name.split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


class Allocations(TorchDispatchMode):
    """Largest tensor (entries) and peak of live bytes among the tensors made while it is active.

    Storages are counted once however many views they have; what an operator allocates and frees inside
    itself is not seen.
    """

    def __init__(self):
        super().__init__()
        self.largest = self.peak = 0
        self._live: dict[int, tuple[int, weakref.ReferenceType]] = {}
        self._before: set[int] = set()

    def ignore(self, *tensors: torch.Tensor) -> Allocations:
        self._before |= {t.untyped_storage().data_ptr() for t in tensors}
        return self

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage.data_ptr() in self._before:
                continue
            self.largest = max(self.largest, storage.nbytes() // tensor.element_size())
            self._live[id(tensor)] = (storage.nbytes(), weakref.ref(tensor))
        storages = {}
        for key, (_, ref) in list(self._live.items()):
            alive = ref()
            if alive is None:
                del self._live[key]
            else:
                storages[alive.untyped_storage().data_ptr()] = alive.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(storages.values()))
        return out
