"""linear_*: the same operations from hidden states and the head weight, streamed over row chunks.

The head is logits = softcap * tanh((scale * hidden @ weight.T + bias) / softcap), in float32 even from
16-bit operands.  No [N, V] array exists in either direction: the backward pass recomputes each chunk of
logits.  Gradients of hidden, weight and bias are computed only where they are required, accumulated in
float32 (float64 for float64) and returned in the dtype of their tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grade_kernels import checks
from grade_kernels.backend import backend_for, implementation
from grade_kernels.gumbel import SampleArgs, SampleSupport
from grade_kernels.sparse import SparseTokens
from grade_kernels.stats import KLStats, TokenStats
from grade_kernels.torch_ops.chunks import chunk_rows, rows_of, spans
from grade_kernels.torch_ops.head import Head, through_softcap


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor | None = None,
    direction: str = "policy_ref",
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_bytes: int = 2**28,
) -> Tensor:
    """`logits_kl` of the logits of two hidden states: exact KL per row, in nats.

    Parameters
    ----------
    hidden, ref_hidden : float [..., d] and [..., d_ref]
    weight : float [V, d]
    ref_weight : float [V, d_ref], optional
        The reference's own head, with `ref_bias`.  Default: the reference shares weight and bias, and both
        sides' gradients go there.
    direction : "policy_ref" or "ref_policy"
    bias, ref_bias : float [V], optional
    scale, softcap : float
        Apply to both sides.
    chunk_bytes : int
        Bound on the logits and temporaries alive at once, as in `vocab_head`.

    Returns
    -------
    Tensor [...], float32 or float64
    """
    checks.check_head(hidden, weight, bias, scale, softcap)
    checks.check_choice("direction", direction, checks.DIRECTIONS)
    if ref_weight is None:
        if ref_bias is not None:
            raise ValueError("ref_bias goes with ref_weight; without ref_weight the reference shares bias")
        checks.check_head(ref_hidden, weight, bias, scale, softcap, ("ref_hidden", "weight", "bias"))
    else:
        names = ("ref_hidden", "ref_weight", "ref_bias")
        checks.check_head(ref_hidden, ref_weight, ref_bias, scale, softcap, names)
        checks.check_shape("ref_weight", ref_weight, (weight.shape[0], ref_hidden.shape[-1]))
        if checks.compute_dtype(weight) != checks.compute_dtype(ref_weight):
            raise TypeError(
                f"weight is {weight.dtype} but ref_weight is {ref_weight.dtype}; make both float64 or neither"
            )
    checks.check_shape("ref_hidden", ref_hidden, (*hidden.shape[:-1], ref_hidden.shape[-1]))
    checks.check_device("ref_hidden", ref_hidden, hidden.device)
    backend = backend_for("linear_kl", hidden)
    options = (scale, softcap, chunk_bytes, direction == "ref_policy", backend)
    return _LinearKL.apply(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, *options)


def linear_token_logprob(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_bytes: int = 2**28,
) -> tuple[Tensor, Tensor]:
    """`token_logprob` of the logits of hidden states: (logprob, entropy) [...] each, in nats.

    `hidden` float [..., d], `weight` float [V, d], `tokens` int64 [...], `bias` float [V].
    """
    checks.check_head(hidden, weight, bias, scale, softcap)
    checks.check_ids("tokens", tokens, hidden.shape[:-1], hidden.device)
    backend = backend_for("linear_token_logprob", hidden)
    return _LinearTokenLogprob.apply(hidden, weight, bias, tokens, scale, softcap, chunk_bytes, backend)


def linear_gumbel_topk(
    hidden: Tensor,
    weight: Tensor,
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
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_bytes: int = 2**28,
) -> SparseTokens:
    """`gumbel_topk` of the logits of hidden states [..., d]; see there for everything else.

    The gradient of `hidden` is the sparse pull-back scale * sum_j dl_j weight[i_j] (with the derivative of
    the soft cap), so the backward pass touches k rows of `weight` a position and no logits.
    """
    checks.check_head(hidden, weight, bias, scale, softcap)
    leading, vocab = hidden.shape[:-1], weight.shape[0]
    args = SampleArgs(leading, vocab, hidden.device, k, tau, seed, rows, draw, indices, tokens)
    blocked = checks.suppress_ids(suppress, vocab, hidden.device)
    backend = backend_for("linear_gumbel_topk", hidden, k=args.k)
    ops, n, k = implementation(backend).sample, math.prod(leading), args.k
    head = Head(weight, bias, scale, softcap)
    with torch.no_grad():
        ids = torch.empty(n, k, dtype=torch.int64, device=hidden.device)
        values = torch.empty(n, k, dtype=head.dtype, device=hidden.device)
        lse = values.new_empty(n)
        for a, b, _, logits in _chunks(hidden, head, chunk_bytes):
            given, chosen = (None if x is None else x[a:b] for x in (args.indices, args.given))
            ids[a:b], values[a:b], lse[a:b] = ops.select(logits, k, blocked, given, chosen, head.dtype)
    values = _SupportLogits.apply(hidden, weight, bias, ids, values, scale, softcap, backend)
    return args.tokens((ids, *SampleSupport.apply(values, ids, lse, args, backend)), leading, hard)


def _chunks(hidden: Tensor, head: Head, chunk_bytes: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """(start, stop, hidden rows, their logits) over hidden [..., d]."""
    rows, size = rows_of(hidden), chunk_rows(head.weight.shape[0], chunk_bytes, head.dtype.itemsize)
    for a, b in spans(rows.shape[0], size):
        part = rows[a:b]
        yield a, b, part, head.logits(part)


def _paired_chunks(p_hidden: Tensor, p_head: Head, q_hidden: Tensor, q_head: Head, chunk_bytes: int):
    # The two heads have one vocabulary and one dtype to compute in, so their chunks have the same rows.
    return zip(_chunks(p_hidden, p_head, chunk_bytes), _chunks(q_hidden, q_head, chunk_bytes), strict=True)


class _HeadGrads:
    """Gradients of (hidden, weight, bias) as far as they are wanted, filled chunk by chunk."""

    def __init__(self, hidden: Tensor, head: Head, wanted: Sequence[bool], into: _HeadGrads | None = None):
        self.head, self.like = head, (hidden, head.weight, head.bias)
        self.any = any(wanted)
        self.hidden = hidden.new_empty(hidden.shape) if wanted[0] else None
        if into is not None:
            self.weight, self.bias = into.weight, into.bias
            return
        # zeros_like would keep the strides of an expanded weight
        self.weight = head.weight.new_zeros(head.weight.shape, dtype=head.dtype) if wanted[1] else None
        self.bias = head.bias.new_zeros(head.bias.shape, dtype=head.dtype) if wanted[2] else None

    def add(self, a: int, b: int, rows: Tensor, d_raw: Tensor) -> None:
        """`d_raw` [r, V] is the gradient before the soft cap, of `rows` [r, d]."""
        if self.hidden is not None:
            self.hidden.view(-1, rows.shape[1])[a:b] = self.head.grad_hidden(d_raw)
        if self.weight is not None:
            self.head.add_grad_weight(d_raw, rows, self.weight)
        if self.bias is not None:
            self.bias += d_raw.sum(0)

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        grads = (self.hidden, self.weight, self.bias)
        return tuple(g if g is None else g.to(x.dtype) for g, x in zip(grads, self.like, strict=True))


class _LinearKL(torch.autograd.Function):
    """KL of two heads; ref_weight None means that the reference shares the policy's weight and bias."""

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, scale, softcap, chunk_bytes, swap, backend
    ):
        head, ref_head = _two_heads(weight, bias, ref_weight, ref_bias, scale, softcap)
        leading = hidden.shape[:-1]
        stats = KLStats.empty(math.prod(leading), head.dtype, hidden.device)
        kl_stats = implementation(backend).kl.kl_stats
        chunks = _paired_chunks(hidden, head, ref_hidden, ref_head, chunk_bytes)
        for (a, b, _, logits), (_, _, _, ref) in chunks:
            pair = (ref, logits) if swap else (logits, ref)
            stats.put(a, b, kl_stats(*pair, head.dtype))
        ctx.save_for_backward(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, *stats)
        ctx.options = (scale, softcap, chunk_bytes, swap, backend)
        return stats.kl.view(leading).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, *saved = ctx.saved_tensors
        scale, softcap, chunk_bytes, swap, backend = ctx.options
        kl_grads = implementation(backend).kl.kl_grads
        stats, row_weights, wanted = KLStats(*saved), grad.reshape(-1), ctx.needs_input_grad
        head, ref_head = _two_heads(weight, bias, ref_weight, ref_bias, scale, softcap)
        grads = _HeadGrads(hidden, head, wanted[:3])
        if ref_weight is None:  # both sides add to one weight gradient
            ref_grads = _HeadGrads(ref_hidden, ref_head, (wanted[3], *wanted[1:3]), into=grads)
        else:
            ref_grads = _HeadGrads(ref_hidden, ref_head, wanted[3:6])
        chunks = _paired_chunks(hidden, head, ref_hidden, ref_head, chunk_bytes)
        for (a, b, rows, logits), (_, _, ref_rows, ref) in chunks:
            # The last use of the logits: their gradients overwrite them.
            outs = (logits if grads.any else None, ref if ref_grads.any else None)
            pair, outs = ((ref, logits), outs[::-1]) if swap else ((logits, ref), outs)
            kl_grads(*pair, stats.rows(a, b), row_weights[a:b], *outs, softcap)
            if grads.any:
                grads.add(a, b, rows, logits)
            if ref_grads.any:
                ref_grads.add(a, b, ref_rows, ref)
        ref_result = ref_grads.result()
        if ref_weight is None:
            ref_result = (ref_result[0], None, None)
        return *grads.result(), *ref_result, *[None] * 5


def _two_heads(weight, bias, ref_weight, ref_bias, scale, softcap) -> tuple[Head, Head]:
    head = Head(weight, bias, scale, softcap)
    return head, head if ref_weight is None else Head(ref_weight, ref_bias, scale, softcap)


class _LinearTokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, tokens, scale, softcap, chunk_bytes, backend):
        head, flat = Head(weight, bias, scale, softcap), tokens.reshape(-1)
        stats = TokenStats.empty(flat.numel(), head.dtype, hidden.device)
        token_stats = implementation(backend).logprob.token_stats
        for a, b, _, logits in _chunks(hidden, head, chunk_bytes):
            stats.put(a, b, token_stats(logits, flat[a:b], head.dtype))
        ctx.save_for_backward(hidden, weight, bias, tokens, *stats)
        ctx.options = (scale, softcap, chunk_bytes, backend)
        return stats.logprob.view(tokens.shape).clone(), stats.entropy.view(tokens.shape).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_logprob: Tensor, d_entropy: Tensor):
        hidden, weight, bias, tokens, *saved = ctx.saved_tensors
        stats = TokenStats(*saved)
        scale, softcap, chunk_bytes, backend = ctx.options
        token_stats_grad = implementation(backend).logprob.token_stats_grad
        head, flat = Head(weight, bias, scale, softcap), tokens.reshape(-1)
        d_logprob, d_entropy = d_logprob.reshape(-1), d_entropy.reshape(-1)
        grads = _HeadGrads(hidden, head, ctx.needs_input_grad[:3])
        for a, b, rows, logits in _chunks(hidden, head, chunk_bytes):
            upstream = (d_logprob[a:b], d_entropy[a:b])
            token_stats_grad(logits, flat[a:b], stats.rows(a, b), *upstream, logits, softcap)
            grads.add(a, b, rows, logits)
        return *grads.result(), *[None] * 5


class _SupportLogits(torch.autograd.Function):
    """The logits [N, k] at the support, already computed, as a function of hidden [..., d], weight and bias."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, ids, values, scale, softcap, backend):
        ctx.save_for_backward(hidden, weight, bias, ids, values)
        ctx.options = (scale, softcap, backend)
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        hidden, weight, bias, ids, values = ctx.saved_tensors
        scale, softcap, backend = ctx.options
        ops, (vocab, width) = implementation(backend).embedding, weight.shape
        d_raw = through_softcap(grad.clone(), values, softcap)
        d_hidden = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_hidden = ops.weighted_sum(d_raw, ids, weight).mul_(scale)
            d_hidden = d_hidden.view(hidden.shape).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            d_weight = ops.scatter_sum(d_raw, ids, hidden.reshape(-1, width), vocab)
            d_weight = d_weight.mul_(scale).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            ones = d_raw.new_ones(d_raw.shape[0], 1)
            d_bias = ops.scatter_sum(d_raw, ids, ones, vocab)[:, 0].to(bias.dtype)
        return d_hidden, d_weight, d_bias, *[None] * 5
