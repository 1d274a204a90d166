"""gumbel_topk: one token per row and its Gumbel-Softmax weights over the top-k candidates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grade_kernels.backend import backend_for, implementation
from grade_kernels.common import checks
from grade_kernels.common.chunks import rows_of
from grade_kernels.common.sample import Support, place
from grade_kernels.sparse import SparseTokens


def gumbel_topk(
    logits: Tensor,
    k: int = 256,
    tau: float | Tensor = 1.0,
    *,
    seed: int,
    rows: Tensor | None = None,
    draw: int = 0,
    indices: Tensor | None = None,
    tokens: Tensor | None = None,
    suppress: Sequence[int] | Tensor | None = None,
    hard: bool = True,
) -> SparseTokens:
    """Sample one token per row at temperature 1 from the top-k, with Gumbel-Softmax weights.

    z = logit + Gumbel over the support; the token is argmax z (the lower id on a tie) and the weights are
    softmax(z / tau) (Jang et al. 2017; Maddison et al. 2017).  `tau` shapes the weights only, never the
    token.

    The support is the exact top-k in the order (value descending, then lower id), whatever the ties, with
    0.0 and -0.0 equal and NaN first.

    Parameters
    ----------
    logits : float [..., V]
        Raw logits.  -inf entries are never sampled and have weight 0, unless a whole support is -inf: its
        weights are NaN.  A row that holds a NaN has mass NaN.
    k : int
        Candidates, 1 <= k <= V.  Not used where `indices` is given.
    tau : float or 0-d float32 or float64
        Temperature of the weights, > 0.  A tensor lies where the logits do, gets no gradient, and is not checked, since
        reading it would wait for the device; a CUDA graph, or code that was compiled, reads what it holds at each call.
        A backward pass must come before it is changed.
    seed : int
        Wraps at 64 bits.
    rows : int64 [...], optional
        Keys the noise of each row; default 0..N-1.  Equal (seed, draw, row, id) is equal noise.
    draw : int
        Which draw of the noise.  Free sampling uses draw 0.  A conditional draw must be another one
        (>= 1): the bits that chose the token are no longer independent of it.
    indices : int64 [..., k], optional
        The support, used as it is; the ids of a row must be distinct.
    tokens : int64 [...], optional
        Draw the noise conditional on these tokens having won.  A token that the support misses takes its
        last place (`place_tokens`), and is never blocked by `suppress`.
    suppress : sequence of ids or int64 [m], optional
        Ids that may not be sampled.  They are left out of the support; where it holds them nevertheless
        (k > V - m, or given `indices`) their weight is 0.  Like all ids in tensors they must lie in 0..V-1, which
        is not checked: reading them would wait for the device.
    hard : bool
        Whether the forward value of the result is the token or the mixture (`SparseTokens.hard`).

    Returns
    -------
    SparseTokens
        `weights` carry the gradient to `logits`, with the noise held fixed:
        dl = (w v - w <w, v>) / tau at the support, 0 elsewhere, in the dtype of `logits`.
        `mass` is sum over the support of exp(logit - lse), lse over the whole raw row.

    Raises
    ------
    TypeError, ValueError
        On wrong dtypes, shapes, devices, k or tau.
    """
    checks.check_float("logits", logits)
    leading, vocab, device = logits.shape[:-1], logits.shape[-1], logits.device
    args = SampleArgs(leading, vocab, device, k, tau, seed, rows, draw, indices, tokens)
    blocked = checks.suppress_ids(suppress, vocab, device)
    backend = backend_for("gumbel_topk", logits, k=args.k)
    return args.sparse(_GumbelTopk.apply(logits, args, blocked, backend), leading, hard)


def place_tokens(indices: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The support with each token in it: where one is missing it takes the last place.

    Parameters
    ----------
    indices : int64 [..., k]
    tokens : int64 [...]

    Returns
    -------
    indices : int64 [..., k]
        A new tensor; the argument is left as it was.
    missed : bool [...]
        Where the token was not in the support.
    """
    leading = tokens.shape if isinstance(tokens, Tensor) else ()
    checks.check_support("indices", indices, leading, indices.device)
    checks.check_ids("tokens", tokens, indices.shape[:-1], indices.device)
    return place(indices, tokens)


class SampleArgs:
    """The validated arguments that `gumbel_topk` and `linear_gumbel_topk` share; tensors are flat, [N, ...]."""

    def __init__(
        self, leading: torch.Size, vocab: int, device: torch.device, k: int, tau: float | Tensor,
        seed: int, rows: Tensor | None, draw: int, indices: Tensor | None, tokens: Tensor | None,
    ):  # fmt: skip
        self.tau = checks.check_tau(tau, device)
        # A tensor is saved as one, so that a backward pass behind a change of it is refused.
        self.tau_tensors = [self.tau] if isinstance(self.tau, Tensor) else []
        self.tau_number = None if self.tau_tensors else self.tau
        n = math.prod(leading)
        if indices is None:
            self.k = checks.check_k(k, vocab)
        else:
            checks.check_support("indices", indices, leading, device)
            self.k = indices.shape[-1]
        if tokens is not None:
            checks.check_ids("tokens", tokens, leading, device)
        self.seed, self.draw = checks.check_int("seed", seed), checks.check_int("draw", draw)
        self.keys = row_keys(rows, leading, device)
        self.indices = None if indices is None else indices.reshape(n, self.k)
        self.chosen = None if tokens is None else tokens.reshape(n)

    def sparse(self, flat: tuple[Tensor, Tensor, Tensor, Tensor], leading: torch.Size, hard: bool) -> SparseTokens:
        """(ids [N, k], weights [N, k], tokens [N], mass [N]) in their leading shape."""
        ids, weights, chosen, mass = flat
        ids, weights = (x.view(*leading, self.k) for x in (ids, weights))
        return SparseTokens(ids, weights, chosen.view(leading), mass.view(leading), hard)


def row_keys(rows: Tensor | None, leading: Sequence[int], device: torch.device) -> Tensor:
    """`rows` checked against the leading shape, or 0..N-1 where it is None; int64 [N]."""
    if rows is None:
        return torch.arange(math.prod(leading), device=device)
    checks.check_ids("rows", rows, leading, device)
    return rows.reshape(-1)


class _GumbelTopk(torch.autograd.Function):
    """(ids [N, k], weights [N, k], tokens [N], mass [N]) of logits [..., V]; the weights have a gradient."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, args: SampleArgs, suppress: Tensor | None, backend: str
    ) -> tuple[Tensor, ...]:
        ids, sample = implementation(backend).sample.select_and_sample(
            rows_of(logits),
            args.k,
            args.tau,
            args.keys,
            args.seed,
            args.draw,
            suppress,
            args.indices,
            args.chosen,
            checks.compute_dtype(logits),
        )
        ctx.save_for_backward(ids, sample.weights, *args.tau_tensors)
        ctx.like, ctx.tau, ctx.backend = (logits.shape, logits.dtype), args.tau_number, backend
        ctx.mark_non_differentiable(ids, sample.tokens, sample.mass)
        return ids, *sample

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _ids: Any, v: Tensor, _tokens: Any, _mass: Any) -> tuple[Tensor | None, ...]:
        ids, weights, *tau = ctx.saved_tensors
        shape, dtype = ctx.like
        ops = implementation(ctx.backend).scatter
        grad = ops.scatter(ids, ops.weights_vjp(weights, v, *(tau or [ctx.tau])), shape[-1], dtype)
        return grad.view(shape), None, None, None


class SampleSupport(torch.autograd.Function):
    """(weights [N, k], tokens [N], mass [N]) from the logits `values` [N, k] of the support `ids`; `lse` [N] is
    of the whole rows.  The weights have a gradient to `values`."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, ids: Tensor, lse: Tensor, args: SampleArgs, backend: str
    ) -> tuple[Tensor, ...]:
        ops = implementation(backend).sample
        sample = ops.sample(Support(ids, values, lse), args.keys, args.seed, args.draw, args.chosen, args.tau)
        ctx.save_for_backward(sample.weights, *args.tau_tensors)
        ctx.tau, ctx.backend = args.tau_number, backend
        ctx.mark_non_differentiable(sample.tokens, sample.mass)
        return tuple(sample)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor, _tokens: Any, _mass: Any) -> tuple[Tensor | None, ...]:
        weights, *tau = ctx.saved_tensors
        grad = implementation(ctx.backend).scatter.weights_vjp(weights, v, *(tau or [ctx.tau]))
        return grad, None, None, None, None
