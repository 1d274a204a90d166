"""gumbel_topk: one token per row and its Gumbel-Softmax weights over the top-k candidates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grade_kernels import checks
from grade_kernels.backend import backend_for
from grade_kernels.sparse import SparseTokens
from grade_kernels.torch_ops import support as ops
from grade_kernels.torch_ops.chunks import rows_of
from grade_kernels.torch_ops.logprob import log_sum_exp
from grade_kernels.torch_ops.topk import topk_ids


def gumbel_topk(
    logits: Tensor,
    k: int = 256,
    tau: float = 1.0,
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
    tau : float
        Temperature of the weights, > 0.
    seed : int
        Wraps at 64 bits.
    rows : int64 [...], optional
        Keys the noise of each row; default 0..N-1.  Equal (seed, draw, row, id) is equal noise.
    draw : int
        Which draw of the noise.  Free sampling uses draw 0.  A conditional draw must be another one
        (>= 1): the bits that chose the token are no longer independent of it.
    indices : int64 [..., k], optional
        The support, used as it is.
    tokens : int64 [...], optional
        Draw the noise conditional on these tokens having won.  A token that the support misses takes its
        last place (`place_tokens`), and is never blocked by `suppress`.
    suppress : sequence of ids or int64 [m], optional
        Ids that may not be sampled.  They are left out of the support; where it holds them nevertheless
        (k > V - m, or given `indices`) their weight is 0.
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
    args = SampleArgs.checked(leading, vocab, device, k, tau, seed, rows, draw, indices, tokens)
    blocked = checks.suppress_ids(suppress, vocab, device)
    backend_for("gumbel_topk", logits)
    with torch.no_grad():
        flat = rows_of(logits)
        lse = log_sum_exp(flat, checks.compute_dtype(logits)).view(leading)
        ids = topk_ids(flat, args.k, blocked).view(*leading, args.k) if indices is None else indices
        if tokens is not None:
            ids, _ = place_tokens(ids, tokens)
    values = logits.gather(-1, ids).to(checks.compute_dtype(logits))
    return sample_support(values, ids, lse, args, tokens, blocked, hard)


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
    missed = ~(indices == tokens.unsqueeze(-1)).any(-1)
    last = torch.where(missed, tokens, indices[..., -1])
    return torch.cat([indices[..., :-1], last.unsqueeze(-1)], dim=-1), missed


class SampleArgs:
    """The validated arguments that `gumbel_topk` and `linear_gumbel_topk` share."""

    def __init__(self, k: int, tau: float, seed: int, rows: Tensor, draw: int):
        self.k, self.tau, self.seed, self.rows, self.draw = k, tau, seed, rows, draw

    @classmethod
    def checked(cls, leading, vocab, device, k, tau, seed, rows, draw, indices, tokens) -> SampleArgs:
        checks.check_positive("tau", tau)
        if indices is None:
            k = checks.check_k(k, vocab)
        else:
            checks.check_support("indices", indices, leading, device)
            k = indices.shape[-1]
        if tokens is not None:
            checks.check_ids("tokens", tokens, leading, device)
        seed, draw = checks.check_int("seed", seed), checks.check_int("draw", draw)
        return cls(k, tau, seed, row_keys(rows, leading, device), draw)


def row_keys(rows: Tensor | None, leading: Sequence[int], device: torch.device) -> Tensor:
    """`rows` checked against the leading shape, or 0..N-1 where it is None; int64 [N]."""
    if rows is None:
        return torch.arange(torch.Size(leading).numel(), device=device)
    checks.check_ids("rows", rows, leading, device)
    return rows.reshape(-1)


def sample_support(
    values: Tensor,
    ids: Tensor,
    lse: Tensor,
    args: SampleArgs,
    tokens: Tensor | None,
    suppress: Tensor | None,
    hard: bool,
) -> SparseTokens:
    """Sample from the logits `values` [..., k] of the support `ids`; `lse` [...] is of the whole row."""
    values = block(values, ids, suppress, tokens)
    n, k = lse.numel(), ids.shape[-1]
    flat_ids = ids.reshape(n, k)
    flat_tokens = None if tokens is None else tokens.reshape(n)
    with torch.no_grad():
        mass = (values - lse.unsqueeze(-1)).exp().sum(-1)
        z = ops.noisy_logits(values.reshape(n, k), flat_ids, args.rows, args.seed, args.draw, flat_tokens)
        chosen = ops.winner(z, flat_ids).view(lse.shape) if tokens is None else tokens
    weights = _TemperedSoftmax.apply(values, z.view(values.shape), args.tau)
    return SparseTokens(ids, weights, chosen, mass, hard)


def block(values: Tensor, ids: Tensor, suppress: Tensor | None, tokens: Tensor | None) -> Tensor:
    """Candidate logits with the suppressed ids at -inf, except where one is the given token."""
    if suppress is None:
        return values
    blocked = torch.isin(ids, suppress)
    if tokens is not None:
        blocked = blocked & (ids != tokens.unsqueeze(-1))
    return values.masked_fill(blocked, -torch.inf)


class _TemperedSoftmax(torch.autograd.Function):
    """softmax(z / tau) as a function of the logits, z - logits held fixed.

    z comes ready-made: a conditional z is no differentiable shift of the logits at -inf.
    """

    @staticmethod
    def forward(ctx, values: Tensor, z: Tensor, tau: float) -> Tensor:
        weights = ops.tempered_softmax(z, tau)
        ctx.save_for_backward(weights)
        ctx.tau = tau
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx, v: Tensor):
        (weights,) = ctx.saved_tensors
        return ops.softmax_vjp(weights, v) / ctx.tau, None, None
