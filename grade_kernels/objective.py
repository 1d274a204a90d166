"""vocab_objective: everything a policy-gradient loss needs from the head, in one sweep over row chunks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grade_kernels.backend import backend_for, implementation
from grade_kernels.common import checks
from grade_kernels.common.head import Head
from grade_kernels.common.sweep import check_sweep, sweep
from grade_kernels.vjp import pull_back


@dataclass(frozen=True, kw_only=True)
class VocabObjective:
    """Per position, what `vocab_objective` leaves of the logits; None where it was not asked for.

    float32 (float64 for float64 hidden states), int64 for `indices`; nats.  `logits` and `objective` can be
    differentiated, to the hidden states and once; the rest are values.
    """

    entropy: Tensor  # [...] of the full distribution
    kl: Tensor | None = None  # [...] exact KL(policy || ref)
    ref_kl: Tensor | None = None  # [...] exact KL(ref || policy)
    logprob: Tensor | None = None  # [...] of `tokens` under the full raw distribution
    ref_logprob: Tensor | None = None  # [...] the same under the reference's
    lse: Tensor  # [...] log-sum-exp of the logits
    ref_lse: Tensor | None = None  # [...] log-sum-exp of the reference's logits
    indices: Tensor  # [..., k] support
    logits: Tensor  # [..., k] logits at the support
    mass: Tensor  # [...] probability of the support
    objective: Tensor | None = None  # [...] weighted sum of entropy, kl and ref_kl; None without a weight
    grad_hidden: Tensor | None = None  # [..., d] d objective / d hidden


def vocab_objective(
    hidden: Tensor,
    head: Head,
    *,
    indices: Tensor,
    tokens: Tensor | None = None,
    suppress: Sequence[int] | Tensor | None = None,
    ref_hidden: Tensor | None = None,
    entropy_weight: float | Tensor | None = None,
    kl_weight: float | Tensor | None = None,
    ref_kl_weight: float | Tensor | None = None,
    ref_kl: bool = True,
    chunk_bytes: int = 2**28,
) -> VocabObjective:
    """Sweep the head over the rows once, keeping O(k + d) numbers a row, their gradients included.

    A policy-gradient loss is a function of the tokens' log-probabilities on the support (`logits`), whose gradient is
    sparse, plus fixed multiples of entropy and KL (`objective`), whose gradient is found in the same sweep.  So the
    backward pass needs no logits again.

    With p the policy, r the reference and w the weights,

        d/dlogits = -w_entropy p (log p + entropy) + w_kl p (log p - log r - kl) + w_ref_kl (p - r)

    and `grad_hidden` is that, pulled back through the soft cap and the head.  The head gets
    no gradient: it is taken as frozen.

    Parameters
    ----------
    hidden : float [..., d]
        Final hidden states of the policy.
    head : Head
        Of the policy and of the reference; its weight has the dtype of `hidden`.
    indices : int64 [..., k]
        The support that the tokens were sampled from.
    tokens : int64 [...], optional
        Tokens to take the log-probability of; one that the support misses takes its last place.
    suppress : sequence of ids or int64 [m], optional
        Ids that may not be sampled: at -inf in `logits` where the support holds them.  They stay in entropy, kl,
        ref_kl, logprob and lse.
    ref_hidden : float [..., d], optional
        The reference's hidden states; without them there is no KL.
    entropy_weight, kl_weight, ref_kl_weight : float or float tensor [...], optional
        Weights of each row's entropy, KL(policy || ref) and KL(ref || policy) in the gradient; they get none
        themselves.  None leaves the term out, and 0 makes it 0 even in a row where the divergence is infinite.
    ref_kl : bool
        False leaves KL(ref || policy) out where it has no weight either: a CPU then saves a pass over the logits.
    chunk_bytes : int
        Memory bound of the sweep.

    Returns
    -------
    VocabObjective

    Raises
    ------
    TypeError, ValueError
        On wrong dtypes, shapes, devices or options.

    Notes
    -----
    Three products with the head: two forwards, and one backward for all three terms together; the gradient of
    `logits` touches k rows of the head a position.  Between them the
    kernels read a row of V logits twice from each side (once for entropy, kl and the log-sum-exps, once for ref_kl
    and the gradient), 16 V bytes, and write 4 V of gradient over the policy's logits; without `ref_hidden` 8 V and
    4 V, or 4 V without a weight.

    Peak memory beside inputs and outputs: `chunk_bytes` (3 arrays of `chunk_rows(V, chunk_bytes)` rows by
    V columns; more only if a single row needs more), on the PyTorch path the temporaries of a piece (ten arrays of
    512 KiB a thread on a CPU, of 64 MiB elsewhere, or of one row if that is larger), and on a CPU 32 MiB for a
    block of the weight in float32 where it is a 16-bit one, or a copy of a float32 weight where oneDNN makes the
    products.
    """
    blocked = check_sweep(hidden, head, ref_hidden, tokens, suppress)
    leading = hidden.shape[:-1]
    checks.check_support("indices", indices, leading, hidden.device)
    weights = []
    for name, value in (("entropy", entropy_weight), ("kl", kl_weight), ("ref_kl", ref_kl_weight)):
        name += "_weight"
        if value is not None and ref_hidden is None and name != "entropy_weight":
            raise ValueError(f"{name} weights a KL, which needs ref_hidden; pass ref_hidden or leave {name} out")
        weights.append(_per_row(name, value, leading, head.dtype, hidden.device))
    ref_kl = ref_kl or ref_kl_weight is not None
    ops = implementation(backend_for("vocab_objective", hidden, k=indices.shape[-1])).objective

    def take(
        logits: Tensor, ref_logits: Tensor | None, ids: Tensor, chosen: Tensor | None, *parts: Tensor | None
    ) -> dict[str, Tensor]:
        found = ops.objective_chunk(logits, ref_logits, blocked, ids, chosen, parts, ref_kl, head.softcap)
        if any(part is not None for part in parts):  # the logits are gradients by now
            found["grad_hidden"] = head.grad_hidden(logits)
            found["objective"] = _weighted_sum(parts, [found.get(name) for name in ("entropy", "kl", "ref_kl")])
        if ref_logits is not None and chosen is not None:
            found["ref_logprob"] = ref_logits.gather(1, chosen[:, None])[:, 0] - found["ref_lse"]
        return found

    with torch.no_grad():
        found = sweep(take, hidden, head, ref_hidden, (indices, tokens, *weights), chunk_bytes)
    found["logits"], objective = _ToHidden.apply(
        hidden, found["logits"], found.get("objective"), found.get("grad_hidden"), found["indices"],
        head.weight, head.scale, head.softcap,
    )  # fmt: skip
    return VocabObjective(**{**found, "objective": objective})


class _ToHidden(torch.autograd.Function):
    """(logits at the support, objective), already computed, as functions of the hidden states."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, logits: Tensor, objective: Tensor | None, grad_hidden: Tensor | None,
        indices: Tensor, weight: Tensor, scale: float, softcap: float | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        ctx.save_for_backward(logits, grad_hidden, indices, weight)
        ctx.options = (scale, softcap, hidden.dtype)
        return logits.clone(), None if objective is None else objective.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logits: Tensor, d_objective: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, grad_hidden, indices, weight = ctx.saved_tensors
        scale, softcap, dtype = ctx.options
        grad = pull_back(d_logits, indices, Head(weight, None, scale, softcap), logits)
        if grad_hidden is not None and d_objective is not None:
            grad += d_objective[..., None] * grad_hidden
        return grad.to(dtype), *[None] * 7


def _weighted_sum(weights: Sequence[Tensor | None], values: Sequence[Tensor | None]) -> Tensor:
    """[r]: sum of weight * value over those that are there; a weight of 0 makes its term 0, even an infinite one."""
    pairs = zip(weights, values, strict=True)
    terms = [(w * v).masked_fill(w == 0, 0.0) for w, v in pairs if w is not None and v is not None]
    return torch.stack(terms).sum(0)


def _per_row(
    name: str, value: float | Tensor | None, leading: torch.Size, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """A weight, checked, as a tensor [*leading] in `dtype`."""
    if isinstance(value, Tensor):
        if value.dtype not in checks.FLOAT_DTYPES:
            raise TypeError(f"{name} must be a number or a float tensor, got {value.dtype}; convert it with .float()")
        checks.check_shape(name, value, leading)
        checks.check_device(name, value, device)
        return value.to(dtype)
    if value is None:
        return None
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number or a float tensor {tuple(leading)}, got {value}")
    return torch.full(leading, value, dtype=dtype, device=device)
