"""vocab_objective: everything a policy-gradient loss needs from the head, in one sweep over row chunks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grade_kernels import checks
from grade_kernels.backend import backend_for, implementation
from grade_kernels.head import OutputRows
from grade_kernels.torch_ops.chunks import chunk_rows, rows_of, spans
from grade_kernels.torch_ops.head import Head, through_softcap
from grade_kernels.vjp import pull_back


@dataclass(frozen=True)
class VocabObjective:
    """Per position, what `vocab_objective` leaves of the logits; None where it was not asked for.

    float32 (float64 for float64 hidden states), int64 for `indices`; nats.  `logits` and `objective` can be
    differentiated, to the hidden states and once; the rest are values.
    """

    entropy: Tensor  # [...] of the full distribution
    kl: Tensor | None  # [...] exact KL(policy || ref)
    ref_kl: Tensor | None  # [...] exact KL(ref || policy)
    logprob: Tensor | None  # [...] of `tokens` under the full raw distribution
    ref_logprob: Tensor | None  # [...] the same under the reference's
    lse: Tensor  # [...] log-sum-exp of the logits
    ref_lse: Tensor | None  # [...] log-sum-exp of the reference's logits
    indices: Tensor  # [..., k] support
    logits: Tensor  # [..., k] logits at the support
    mass: Tensor  # [...] probability of the support
    objective: Tensor | None  # [...] weighted sum of entropy, kl and ref_kl; None without a weight
    grad_hidden: Tensor | None  # [..., d] d objective / d hidden


_FIELDS = tuple(field.name for field in fields(VocabObjective))


def vocab_objective(
    hidden: Tensor,
    weight: Tensor,
    *,
    indices: Tensor,
    tokens: Tensor | None = None,
    suppress: Sequence[int] | Tensor | None = None,
    ref_hidden: Tensor | None = None,
    entropy_weight: float | Tensor | None = None,
    kl_weight: float | Tensor | None = None,
    ref_kl_weight: float | Tensor | None = None,
    ref_kl: bool = True,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_bytes: int = 2**28,
) -> VocabObjective:
    """Sweep the head over the rows once, keeping O(k + d) numbers a row, their gradients included.

    A policy-gradient loss is a function of the tokens' log-probabilities on the support (`logits`), whose gradient is
    sparse, plus fixed multiples of entropy and KL (`objective`), whose gradient is found in the same sweep.  So the
    backward pass needs no logits again.

    logits = softcap * tanh((scale * hidden @ weight.T + bias) / softcap), in float32 even from 16-bit
    operands; the reference shares weight and bias.  With p the policy, r the reference and w the weights,

        d/dlogits = -w_entropy p (log p + entropy) + w_kl p (log p - log r - kl) + w_ref_kl (p - r)

    and `grad_hidden` is that, pulled back through the soft cap and the head.  Weight and bias get no gradient: the
    head is taken as frozen.

    Parameters
    ----------
    hidden : float [..., d]
        Final hidden states of the policy.
    weight : float [V, d]
        The head; same dtype as `hidden`.
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
    bias : float [V], optional
    scale, softcap : float
        Logit scale (Cohere, Granite) and soft cap (Gemma 2).
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
    512 KiB a thread on a CPU, of 64 MiB elsewhere, or of one row if that is larger), and 32 MiB for a block of the
    weight in float32 where it is a 16-bit one.
    """
    checks.check_head(hidden, weight, bias, scale, softcap)
    leading, vocab = hidden.shape[:-1], weight.shape[0]
    if ref_hidden is not None:
        checks.check_head(ref_hidden, weight, None, scale, softcap, ("ref_hidden", "weight", "bias"))
        checks.check_shape("ref_hidden", ref_hidden, hidden.shape)
    checks.check_support("indices", indices, leading, hidden.device)
    if tokens is not None:
        checks.check_ids("tokens", tokens, leading, hidden.device)
    blocked = checks.suppress_ids(suppress, vocab, hidden.device)
    given = {"entropy_weight": entropy_weight, "kl_weight": kl_weight, "ref_kl_weight": ref_kl_weight}
    for name, value in given.items():
        if value is not None and ref_hidden is None and name != "entropy_weight":
            raise ValueError(f"{name} weights a KL, which needs ref_hidden; pass ref_hidden or leave {name} out")
        _check_weight(name, value, leading, hidden.device)
    ref_kl = ref_kl or ref_kl_weight is not None
    k = indices.shape[-1]
    ops = implementation(backend_for("vocab_objective", hidden, k=k)).objective

    with torch.no_grad():
        head, n = Head(weight, bias, scale, softcap), math.prod(leading)
        out = OutputRows(n)
        rows, ref_rows = rows_of(hidden), None if ref_hidden is None else rows_of(ref_hidden)
        flat_ids, flat_tokens = indices.reshape(n, k), None if tokens is None else tokens.reshape(n)
        weights = [_per_row(value, n, head.dtype, hidden.device) for value in given.values()]

        def sweep(a: int, b: int) -> dict[str, Tensor]:
            """The chunk of rows a..b; its logits are gone on return."""
            logits = head.logits(rows[a:b])
            ref_logits = None if ref_rows is None else head.logits(ref_rows[a:b])
            chosen, *parts = (None if x is None else x[a:b] for x in (flat_tokens, *weights))
            pieces = ops.objective_chunk(logits, ref_logits, blocked, flat_ids[a:b], chosen, parts, ref_kl, softcap)
            if any(part is not None for part in parts):  # the logits are gradients by now
                pieces["grad_hidden"] = head.grad_hidden(logits)
                pieces["objective"] = _weighted_sum(parts, [pieces.get(name) for name in ("entropy", "kl", "ref_kl")])
            if ref_logits is not None and chosen is not None:
                pieces["ref_logprob"] = ref_logits.gather(1, chosen[:, None])[:, 0] - pieces["ref_lse"]
            return pieces

        for a, b in spans(n, chunk_rows(vocab, chunk_bytes, head.dtype.itemsize)):
            out.put(a, b, sweep(a, b))
    found = {**dict.fromkeys(_FIELDS), **out.result(leading)}
    found["logits"], found["objective"] = _ToHidden.apply(
        hidden, found["logits"], found["objective"], found["grad_hidden"], found["indices"], weight, scale, softcap
    )
    return VocabObjective(**found)


class _ToHidden(torch.autograd.Function):
    """(logits at the support, objective), already computed, as functions of the hidden states."""

    @staticmethod
    def forward(ctx, hidden, logits, objective, grad_hidden, indices, weight, scale, softcap):
        ctx.save_for_backward(logits, grad_hidden, indices, weight)
        ctx.options = (scale, softcap, hidden.dtype)
        return logits.clone(), None if objective is None else objective.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logits: Tensor, d_objective: Tensor | None):
        logits, grad_hidden, indices, weight = ctx.saved_tensors
        scale, softcap, dtype = ctx.options
        grad = pull_back(through_softcap(d_logits * scale, logits, softcap), indices, weight)
        if grad_hidden is not None:
            grad += d_objective[..., None] * grad_hidden
        return grad.to(dtype), *[None] * 7


def _weighted_sum(weights: Sequence[Tensor | None], values: Sequence[Tensor | None]) -> Tensor:
    """[r]: sum of weight * value over those that are there; a weight of 0 makes its term 0, even an infinite one."""
    terms = [(w * v).masked_fill(w == 0, 0.0) for w, v in zip(weights, values, strict=True) if w is not None]
    return torch.stack(terms).sum(0)


def _check_weight(name: str, value: float | Tensor | None, leading: torch.Size, device: torch.device) -> None:
    if isinstance(value, Tensor):
        if value.dtype not in checks.FLOAT_DTYPES:
            raise TypeError(f"{name} must be a number or a float tensor, got {value.dtype}; convert it with .float()")
        checks.check_shape(name, value, leading)
        checks.check_device(name, value, device)
    elif value is not None and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number or a float tensor {tuple(leading)}, got {value}")


def _per_row(value: float | Tensor | None, n: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """A weight as [n] in `dtype`."""
    if value is None or isinstance(value, Tensor):
        return value if value is None else value.reshape(n).to(dtype)
    return torch.full((n,), value, dtype=dtype, device=device)
