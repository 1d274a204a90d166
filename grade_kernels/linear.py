"""linear_*: the same operations from hidden states and the head weight, streamed over row chunks.

No [N, V] array exists in either direction: the backward pass recomputes each chunk of logits.  Gradients of
hidden states, of the head's weight and of its bias are computed only where they are required, accumulated in
float32 (float64 for float64) and returned in the dtype of their tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grade_kernels.backend import backend_for, implementation
from grade_kernels.common import checks
from grade_kernels.common.chunks import chunk_rows, rows_of, spans
from grade_kernels.common.head import Head, check_hidden, through_softcap
from grade_kernels.common.stats import KLStats, TokenStats
from grade_kernels.sample import SampleArgs, SampleSupport
from grade_kernels.sparse import SparseTokens


def linear_kl(
    hidden: Tensor,
    head: Head,
    ref_hidden: Tensor,
    ref_head: Head | None = None,
    direction: str = "policy_ref",
    *,
    chunk_bytes: int = 2**28,
) -> Tensor:
    """`logits_kl` of the logits of two hidden states: exact KL per row, in nats.

    Parameters
    ----------
    hidden, ref_hidden : float [..., d] and [..., d_ref]
    head : Head
    ref_head : Head, optional
        The reference's own, of the same vocabulary and soft cap.  Default: the reference shares `head`, and both
        sides' gradients go there.
    direction : "policy_ref" or "ref_policy"
    chunk_bytes : int
        Bound on the logits and temporaries alive at once, as in `vocab_head`.

    Returns
    -------
    Tensor [...], float32 or float64
    """
    check_hidden("hidden", hidden, head)
    checks.check_choice("direction", direction, checks.DIRECTIONS)
    if ref_head is None:
        check_hidden("ref_hidden", ref_hidden, head)
        ref_parts: tuple[Any, ...] = (None, None, head.scale)
    else:
        check_hidden("ref_hidden", ref_hidden, ref_head, "ref_head")
        checks.check_shape("ref_head.weight", ref_head.weight, (head.weight.shape[0], ref_hidden.shape[-1]))
        if head.dtype != ref_head.dtype:
            raise TypeError(
                f"head.weight is {head.weight.dtype} but ref_head.weight is {ref_head.weight.dtype}; "
                "make both float64 or neither"
            )
        if head.softcap != ref_head.softcap:
            raise ValueError(
                f"ref_head.softcap is {ref_head.softcap} but head.softcap is {head.softcap}; both sides have one cap"
            )
        ref_parts = (ref_head.weight, ref_head.bias, ref_head.scale)
    checks.check_shape("ref_hidden", ref_hidden, (*hidden.shape[:-1], ref_hidden.shape[-1]))
    checks.check_device("ref_hidden", ref_hidden, hidden.device)
    options = (head.softcap, chunk_bytes, direction == "ref_policy", backend_for("linear_kl", hidden))
    return _LinearKL.apply(hidden, head.weight, head.bias, head.scale, ref_hidden, *ref_parts, *options)


def linear_token_logprob(
    hidden: Tensor, head: Head, tokens: Tensor, *, chunk_bytes: int = 2**28
) -> tuple[Tensor, Tensor]:
    """`token_logprob` of the logits of hidden states [..., d]: (logprob, entropy) [...] each, in nats.

    `tokens` is int64 [...].
    """
    check_hidden("hidden", hidden, head)
    checks.check_ids("tokens", tokens, hidden.shape[:-1], hidden.device)
    options = (head.scale, head.softcap, chunk_bytes, backend_for("linear_token_logprob", hidden))
    return _LinearTokenLogprob.apply(hidden, head.weight, head.bias, tokens, *options)


def linear_gumbel_topk(
    hidden: Tensor,
    head: Head,
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
    chunk_bytes: int = 2**28,
) -> SparseTokens:
    """`gumbel_topk` of the logits of hidden states [..., d]; see there for everything else.

    The gradient of `hidden` is `pull_back`'s, so the backward pass touches k rows of the weight a position and no
    logits.
    """
    check_hidden("hidden", hidden, head)
    leading, vocab = hidden.shape[:-1], head.weight.shape[0]
    args = SampleArgs(leading, vocab, hidden.device, k, tau, seed, rows, draw, indices, tokens)
    blocked = checks.suppress_ids(suppress, vocab, hidden.device)
    backend = backend_for("linear_gumbel_topk", hidden, k=args.k)
    ops, n, k = implementation(backend).sample, math.prod(leading), args.k
    with torch.no_grad():
        ids = torch.empty(n, k, dtype=torch.int64, device=hidden.device)
        values = torch.empty(n, k, dtype=head.dtype, device=hidden.device)
        lse = values.new_empty(n)
        for a, b, _, logits in _chunks(hidden, head, chunk_bytes):
            given, chosen = (None if x is None else x[a:b] for x in (args.indices, args.chosen))
            ids[a:b], values[a:b], lse[a:b] = ops.select(logits, k, blocked, given, chosen, head.dtype)
    values = _SupportLogits.apply(hidden, head.weight, head.bias, ids, values, head.scale, head.softcap, backend)
    return args.sparse((ids, *SampleSupport.apply(values, ids, lse, args, backend)), leading, hard)


_Chunk = tuple[int, int, Tensor, Tensor]  # start, stop, rows of the hidden states, their logits


def _chunks(hidden: Tensor, head: Head, chunk_bytes: int) -> Iterator[_Chunk]:
    rows, size = rows_of(hidden), chunk_rows(head.weight.shape[0], chunk_bytes, head.dtype.itemsize)
    for a, b in spans(rows.shape[0], size):
        part = rows[a:b]
        yield a, b, part, head.logits(part)


def _paired_chunks(
    p_hidden: Tensor, p_head: Head, q_hidden: Tensor, q_head: Head, chunk_bytes: int
) -> Iterator[tuple[_Chunk, _Chunk]]:
    # The two heads have one vocabulary and one dtype to compute in, so their chunks have the same rows.
    return zip(_chunks(p_hidden, p_head, chunk_bytes), _chunks(q_hidden, q_head, chunk_bytes), strict=True)


class _HeadGrads:
    """Gradients of (hidden, weight, bias) as far as they are wanted, filled chunk by chunk."""

    def __init__(self, hidden: Tensor, head: Head, wanted: Sequence[bool], into: _HeadGrads | None = None):
        self.head, self.like = head, (hidden, head.weight, head.bias)
        self.any = any(wanted)
        self.hidden = hidden.new_empty(hidden.shape) if wanted[0] else None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        if into is not None:
            self.weight, self.bias = into.weight, into.bias
            return
        if wanted[1]:  # zeros_like would keep the strides of an expanded weight
            self.weight = head.weight.new_zeros(head.weight.shape, dtype=head.dtype)
        if head.bias is not None and wanted[2]:
            self.bias = head.bias.new_zeros(head.bias.shape, dtype=head.dtype)

    def add(self, a: int, b: int, rows: Tensor, d_raw: Tensor) -> None:
        """`d_raw` [r, V] is the gradient before the soft cap, of `rows` [r, d]."""
        if self.hidden is not None:
            self.hidden.view(-1, rows.shape[1])[a:b] = self.head.grad_hidden(d_raw)
        if self.weight is not None:
            self.head.add_grad_weight(d_raw, rows, self.weight)
        if self.bias is not None:
            self.bias += d_raw.sum(0)

    def result(self) -> tuple[Tensor | None, ...]:
        pairs = zip((self.hidden, self.weight, self.bias), self.like, strict=True)
        return tuple(None if g is None or x is None else g.to(x.dtype) for g, x in pairs)


class _LinearKL(torch.autograd.Function):
    """KL of two heads; ref_weight None means that the reference shares the policy's weight and bias."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float,
        ref_hidden: Tensor, ref_weight: Tensor | None, ref_bias: Tensor | None, ref_scale: float,
        softcap: float | None, chunk_bytes: int, swap: bool, backend: str,
    ) -> Tensor:  # fmt: skip
        head = Head(weight, bias, scale, softcap)
        ref_head = head if ref_weight is None else Head(ref_weight, ref_bias, ref_scale, softcap)
        leading = hidden.shape[:-1]
        stats = KLStats.empty(math.prod(leading), head.dtype, hidden.device)
        kl_stats = implementation(backend).kl.kl_stats
        for (a, b, _, logits), (_, _, _, ref) in _paired_chunks(hidden, head, ref_hidden, ref_head, chunk_bytes):
            pair = (ref, logits) if swap else (logits, ref)
            stats.put(a, b, kl_stats(*pair, head.dtype))
        ctx.save_for_backward(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, *stats)
        ctx.options = (scale, ref_scale, softcap, chunk_bytes, swap, backend)
        return stats.kl.view(leading).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, *saved = ctx.saved_tensors
        scale, ref_scale, softcap, chunk_bytes, swap, backend = ctx.options
        kl_grads = implementation(backend).kl.kl_grads
        stats, row_weights, wanted = KLStats(*saved), grad.reshape(-1), ctx.needs_input_grad
        head = Head(weight, bias, scale, softcap)
        grads = _HeadGrads(hidden, head, wanted[:3])
        if ref_weight is None:  # both sides add to one weight gradient
            ref_head = head
            ref_grads = _HeadGrads(ref_hidden, head, (wanted[4], *wanted[1:3]), into=grads)
        else:
            ref_head = Head(ref_weight, ref_bias, ref_scale, softcap)
            ref_grads = _HeadGrads(ref_hidden, ref_head, wanted[4:7])
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
        d_ref_hidden, *d_ref_head = ref_grads.result()
        if ref_weight is None:
            d_ref_head = [None, None]
        return *grads.result(), None, d_ref_hidden, *d_ref_head, *[None] * 5


class _LinearTokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor,
        scale: float, softcap: float | None, chunk_bytes: int, backend: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
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
    def backward(ctx: Any, d_logprob: Tensor, d_entropy: Tensor) -> tuple[Tensor | None, ...]:
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
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, values: Tensor,
        scale: float, softcap: float | None, backend: str,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(hidden, weight, bias, ids, values)
        ctx.options = (scale, softcap, backend)
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
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
