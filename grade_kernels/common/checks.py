"""Shared validation: every public function refuses bad arguments in words.

Checks look at types, shapes, dtypes and devices, never at the values of a tensor, so that none of
them waits for the device.  Ids out of range are therefore the caller's to avoid.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DIRECTIONS = ("policy_ref", "ref_policy")
ESTIMATORS = ("gumbel", "rao", "straight_through", "reinmax")


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any of the tensors is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def check_float(name: str, tensor: Tensor, min_dim: int = 1) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}; "
            f"convert it, for example with {name}.float()"
        )
    if tensor.dim() < min_dim:
        raise ValueError(f"{name} must have at least {min_dim} dimension(s), got shape {tuple(tensor.shape)}")
    if tensor.shape[-1] == 0:
        raise ValueError(f"the last dimension of {name} is empty: shape {tuple(tensor.shape)}")


def check_ids(name: str, tensor: Tensor, leading: Sequence[int], device: torch.device) -> None:
    """An int64 tensor of exactly the shape `leading`, on `device`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {tensor.dtype}; convert it with {name}.long()")
    check_shape(name, tensor, leading)
    check_device(name, tensor, device)


def check_support(name: str, tensor: Tensor, leading: Sequence[int], device: torch.device) -> None:
    """An int64 tensor [*leading, k] with k >= 1."""
    if isinstance(tensor, Tensor) and (tensor.dim() == 0 or tensor.shape[-1] == 0):
        raise ValueError(f"{name} must end in a non-empty candidate dimension, got {tuple(tensor.shape)}")
    k = tensor.shape[-1] if isinstance(tensor, Tensor) else 0
    check_ids(name, tensor, (*leading, k), device)


def check_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} but the other inputs are on {device}; move it with .to()")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_positive(name: str, value: float) -> None:
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a python number, not a tensor: reading one waits for the device")
    if not 0 < value < math.inf:  # also refuses NaN
        raise ValueError(f"{name} must be a finite number above 0, got {value}")


def check_tau(tau: float | Tensor, device: torch.device) -> float | Tensor:
    """A temperature: a number above 0, or a 0-d float tensor of a value that is not read."""
    if not isinstance(tau, Tensor):
        check_positive("tau", tau)
        return float(tau)
    if tau.dim() or tau.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"tau must be a python number or a float32 or float64 tensor of no dimension, got {tau.dtype} of shape "
            f"{tuple(tau.shape)}"
        )
    if tau.requires_grad:
        raise ValueError("tau requires a gradient, and gets none here; detach it with tau.detach()")
    check_device("tau", tau, device)
    return tau


def check_int(name: str, value: int) -> int:
    """`value` as a python int: python and numpy integers pass, bools, floats and tensors do not."""
    if isinstance(value, (bool, Tensor)):
        raise TypeError(f"{name} must be a python integer, got {type(value).__name__}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a python integer, got {type(value).__name__}") from None


def check_k(k: int, vocab_size: int) -> int:
    k = check_int("k", k)
    if not 1 <= k <= vocab_size:
        raise ValueError(f"k must be between 1 and the vocabulary size {vocab_size}, got {k}")
    return k


def suppress_ids(suppress: Sequence[int] | Tensor | None, vocab_size: int, device: torch.device) -> Tensor | None:
    """`suppress` as a 1-D int64 tensor on `device`, or None where there is nothing to suppress."""
    if suppress is None:
        return None
    if isinstance(suppress, Tensor):
        check_ids("suppress", suppress, (suppress.numel(),), device)
        return suppress if suppress.numel() else None
    ids = [check_int("every id in suppress", i) for i in suppress]
    for i in ids:
        if not 0 <= i < vocab_size:
            raise ValueError(f"suppress holds id {i}, outside the vocabulary 0..{vocab_size - 1}")
    if not ids:
        return None
    # Written by the device, run by run of neighbours: a copy from the host would wait for it or, from pinned memory, be
    # read again by a CUDA graph long after that memory has become something else.
    ids = sorted(set(ids))
    breaks = [at for at in range(1, len(ids)) if ids[at] != ids[at - 1] + 1]
    runs = zip([0, *breaks], [*breaks, len(ids)], strict=True)
    return torch.cat([torch.arange(ids[a], ids[b - 1] + 1, device=device) for a, b in runs])


def check_table(name: str, weight: Tensor, width: int | None = None, device: torch.device | None = None) -> None:
    """A float table [V, d]; `width` and `device` are those it must have, where they are known."""
    check_float(name, weight)
    if weight.dim() != 2:
        raise ValueError(f"{name} must be [vocabulary, width], got shape {tuple(weight.shape)}")
    if width is not None and weight.shape[1] != width:
        raise ValueError(f"{name} has rows of width {weight.shape[1]}, expected {width}")
    if device is not None:
        check_device(name, weight, device)
