"""The local rules: from the effect of each candidate to the gradient at the logits of the support.

One launch for each model; the last one also applies the rule, with its noise in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grade_kernels.triton_ops import embedding
from grade_kernels.triton_ops.embedding import tile_dots
from grade_kernels.triton_ops.launch import launch, next_power_of_2, words
from grade_kernels.triton_ops.noise import noisy_logits, softmax_vjp, tempered_softmax

# Candidates of a warp where the rule is applied: 4 of a thread up to k = 1024, which leaves registers for the noise.
_LANES_PER_WARP = 128


def candidate_grad(grads: list[Tensor], tables: list[Tensor], ids: Tensor) -> Tensor:
    """v float32 [N, k] = sum over models of <grad [N, d_e], table[ids] [N, k, d_e]>."""
    return embedding.summed_dots(grads, tables, ids)


def token_vjp(
    grads: list[Tensor],
    tables: list[Tensor],
    logits: Tensor,
    ids: Tensor,
    tokens: Tensor | None,
    keys: Tensor,
    estimator: str,
    tau: float,
    seed: int,
    draws: range,
    dtype: torch.dtype,
) -> Tensor:
    """dlogits float32 [N, k] by the rules that `grade_kernels.vjp.SoftTokenRule` writes down.

    `draws` are those of the noise, for gumbel and rao: the free draw is 0, the others are conditional on
    `tokens` [N].  `dtype` is float32, the only one the kernels compute in.
    """
    return _token_vjp(
        grads, tables, logits, ids, tokens, keys, estimator, float(tau), *words(seed), draws.start, len(draws)
    )


@torch.library.custom_op("grade_kernels::token_vjp", mutates_args=())
def _token_vjp(
    grads: Sequence[Tensor],
    tables: Sequence[Tensor],
    logits: Tensor,
    ids: Tensor,
    tokens: Tensor | None,
    keys: Tensor,
    estimator: str,
    tau: float,
    seed_low: int,
    seed_high: int,
    first_draw: int,
    draws: int,
) -> Tensor:
    n, k = logits.shape
    out = torch.empty(n, k, dtype=torch.float32, device=logits.device)
    ids = ids.contiguous()
    for number, (grad, table) in enumerate(zip(grads[:-1], tables[:-1], strict=True)):
        embedding.add_dots(grad, table, ids, out, add=number > 0)
    (grad, grad_stride), (table, table_stride) = map(embedding.with_row_stride, (grads[-1], tables[-1]))
    row = next_power_of_2(k)
    warps = max(4, min(8, row // _LANES_PER_WARP))
    launch(
        _token_vjp_kernel,
        (n,),
        grad,
        table,
        ids,
        out,
        logits.contiguous(),
        None if tokens is None else tokens.contiguous(),
        keys.contiguous(),
        grad_stride,
        table_stride,
        table.shape[1],
        k,
        tau,
        seed_low,
        seed_high,
        first_draw,
        draws,
        num_warps=warps,
        ESTIMATOR=estimator,
        CONDITIONAL=first_draw > 0,
        ADD=len(grads) > 1,
        KP=row,
        **embedding.dots_tile(table, warps),
    )
    return out


@_token_vjp.register_fake
def _(grads: Sequence[Tensor], tables: Sequence[Tensor], logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape, dtype=torch.float32)


@triton.jit(do_not_specialize=["k", "seed_low", "seed_high", "first_draw", "draws"])
def _token_vjp_kernel(
    grad,
    table,
    ids,
    out,
    logits,
    tokens,
    keys,
    grad_stride,
    table_stride,
    d,
    k,
    tau,
    seed_low,
    seed_high,
    first_draw,
    draws,
    ESTIMATOR: tl.constexpr,
    CONDITIONAL: tl.constexpr,
    ADD: tl.constexpr,
    KP: tl.constexpr,
    STEPS: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    ids += row * k
    out += row * k
    for first in range(0, k, STEPS * GROUPS):
        tile_dots(
            grad + row * grad_stride, table, ids, out, first, k, d, table_stride, ADD, STEPS, GROUPS, LANES, WIDTH
        )
    # The row of dot products goes through the output, from the layout of the tiles to one lane a candidate.
    tl.debug_barrier()
    lane = tl.arange(0, KP)
    valid = lane < k
    v = tl.load(out + lane, mask=valid, other=0.0)
    row_ids = tl.load(ids + lane, mask=valid, other=0)
    values = tl.load(logits + row * k + lane, mask=valid, other=float("-inf")).to(tl.float32)
    tl.debug_barrier()  # every thread has read before one overwrites
    if ESTIMATOR == "straight_through":
        result = softmax_vjp(tempered_softmax(values, valid, 1.0), v)
    elif ESTIMATOR == "reinmax":
        one_hot = (valid & (row_ids == tl.load(tokens + row))).to(tl.float32)
        midpoint = (one_hot + tempered_softmax(values, valid, tau)) * 0.5
        # Without the token in the support the midpoint sums to 1/2.
        pushed = midpoint * (v - tl.sum(midpoint * v, axis=0))
        result = 2.0 * pushed - 0.5 * softmax_vjp(tempered_softmax(values, valid, 1.0), v)
    else:
        key, token = tl.load(keys + row), row
        if CONDITIONAL:
            token = tl.load(tokens + row)
        total = tl.zeros([KP], tl.float32)
        for i in range(0, draws):
            z = noisy_logits(values, row_ids, valid, key, seed_low, seed_high, first_draw + i, token, CONDITIONAL)
            total += softmax_vjp(tempered_softmax(z, valid, tau), v)
        result = total / tau / draws
    tl.store(out + lane, result, mask=valid)
