"""What `vocab_objective` takes from one chunk of logits: one read for the statistics, one for ref_kl and the gradient.

A program takes a row, as in `sweep`.  The reverse divergence costs no read of its own: with the difference of the
log-sum-exps known, KL(r || p) = sum_i r_i phi(log p_i - log r_i) is a plain sum over the entries that the gradient
needs anyway, and none of the three gradients needs its value.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grade_kernels.triton_ops import device, online, sweep

# Entries of each side that a thread takes per tile where they are not adjacent: each needs an address.  The second
# read, which shares less work among them, takes half as many.
_SCATTERED = 8
_MAX_REGISTERS = 128  # two programs a multiprocessor; left free, NVIDIA's compiler spills to fit a third
_ROWS = len(sweep.FIELDS) + 1  # KL(ref || policy) comes last


@triton.jit(
    do_not_specialize=["n", "k"],
    do_not_specialize_on_alignment=["given", "tokens", "entropy_weights", "kl_weights", "ref_kl_weights"],
)
def _objective_kernel(
    policy, ref, given, tokens, bits, entropy_weights, kl_weights, ref_kl_weights, stats, ids_out, values_out, n, k,
    inverse_cap, vocab, policy_stride, ref_stride,
    KEPT: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    policy = device.aligned(policy, row * policy_stride, WIDTH)
    stats += row
    n = n.to(tl.int64)
    kl, ref_kl, peak_q, norm_q, shift = 0.0, 0.0, 0.0, 0.0, 0.0
    if ref is not None:
        ref = device.aligned(ref, row * ref_stride, WIDTH)
        kl, peak, norm, peak_q, norm_q, shift, entropy = online.kl_row(policy, ref, vocab, 1, LANES, WIDTH, STEPS)
    else:
        peak, norm, entropy = online.lse_row(policy, vocab, LANES, WIDTH, STEPS)
    sweep.store_row(
        policy, row, k, given, tokens, bits, stats, ids_out, values_out, n, entropy, peak, norm, kl, peak_q + norm_q,
        KEPT,
    )  # fmt: skip
    w_entropy, w_kl, w_ref_kl = None, None, None
    if entropy_weights is not None:
        w_entropy = tl.load(entropy_weights + row)
    if kl_weights is not None:
        w_kl = tl.load(kl_weights + row)
    if ref_kl_weights is not None:
        w_ref_kl = tl.load(ref_kl_weights + row)
    if (w_entropy is not None) or (w_kl is not None) or (w_ref_kl is not None):
        tl.debug_barrier()  # other threads have read the token's and the support's logits
    if (ref is not None) or (w_entropy is not None):
        ref_kl = ref_kl_and_grad(
            policy, ref, vocab, w_entropy, w_kl, w_ref_kl, inverse_cap, entropy, kl, peak, norm, peak_q, norm_q, shift,
            LANES, WIDTH, STEPS // 2,
        )  # fmt: skip
    tl.store(stats + 6 * n, ref_kl)


@triton.jit
def ref_kl_and_grad(
    policy, ref, vocab, w_entropy, w_kl, w_ref_kl, inverse_cap, entropy, kl, peak_p, norm_p, peak_q, norm_q, shift,
    LANES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """KL(ref || policy) of the row, 0 without `ref`; with a weight the gradient overwrites the policy's logits.

    Each entry is read first, by the thread that writes it.
    """
    TILE: tl.constexpr = LANES * WIDTH * STEPS
    offsets = device.tile_offsets(LANES, WIDTH, STEPS)
    total = tl.zeros([LANES], tl.float32)
    for i in range(0, tl.cdiv(vocab, TILE)):
        columns = i * TILE + offsets
        here = columns < vocab
        x = tl.load(policy + columns, mask=here, other=float("-inf"))
        grad = tl.zeros_like(x)
        if w_entropy is not None:
            logp = (x - peak_p) - norm_p
            # 0 log 0 = 0; a NaN row keeps its NaN through the probability.
            inner = tl.where(logp > float("-inf"), logp, 0.0) + entropy
            grad += weighted(w_entropy, -device.exp(logp) * inner)
        if ref is not None:
            y = tl.load(ref + columns, mask=here, other=float("-inf"))
            d_kl, gap = online.kl_grad(x, y, kl, peak_p, norm_p, peak_q, norm_q, shift)
            terms = ref_kl_terms(x, y, gap, peak_q, norm_q, shift)
            total += device.lane_sum(device.by_lane(terms, LANES, WIDTH, STEPS))
            if w_kl is not None:
                grad += weighted(w_kl, d_kl)
            if w_ref_kl is not None:
                grad -= weighted(w_ref_kl, gap)
        if (w_entropy is not None) or (w_kl is not None) or (w_ref_kl is not None):
            if inverse_cap is not None:
                grad = online.uncap(grad, x, inverse_cap)
            tl.store(policy + columns, grad, mask=here)
    return tl.sum(total, axis=0)


@triton.jit
def ref_kl_terms(p, q, gap, peak_q, norm_q, shift):
    """q phi(u), u = log p - log q, at entries of a row, where gap = q - p: terms of KL(q || p), never negative.

    Both -inf: 0.  q = 0 < p: it is p.  q > 0 = p: inf, also where q has underflown.
    """
    prob = device.exp((q - peak_q) - norm_q)
    u = shift - (q - p)
    near = prob * (u * u * online.phi_ratio(u))
    far = -gap - prob * tl.where(q == float("-inf"), 0.0, u)
    terms = tl.where(tl.abs(u) <= online.NEAR, near, far)
    return tl.where(u == float("-inf"), float("inf"), terms)


@triton.jit
def weighted(weight, term):
    """0 where the weight is, even if the term is not finite."""
    return tl.where(weight == 0.0, 0.0, weight * term)


def objective_chunk(
    logits: Tensor,
    ref_logits: Tensor | None,
    suppress: Tensor | None,
    indices: Tensor,
    tokens: Tensor | None,
    weights: tuple[Tensor | None, Tensor | None, Tensor | None],
    ref_kl: bool,
    softcap: float | None,
) -> dict[str, Tensor]:
    """The fields of `VocabObjective` for r rows, except the gradient of the hidden states.

    logits, ref_logits : float32 [r, V]
        With any weight the first is overwritten by the gradient of the weighted sum before the soft cap.
    indices : int64 [r, k]
    tokens : int64 [r] or None
    weights : float32 [r] each, of entropy, kl and ref_kl; those of kl and ref_kl are None without `ref_logits`
    ref_kl : whether KL(ref || policy) is wanted; the kernel finds it in any case, beside the gradient
    """
    args = (logits, ref_logits, indices, tokens, suppress)
    if any(weight is not None for weight in weights):
        stats, ids, values = _objective_grad(*args, *weights, softcap)
    else:
        stats, ids, values = _objective(*args)
    out = sweep.wanted_fields(stats, ids, values, ref_logits is not None, tokens is not None)
    return out | {"ref_kl": stats[-1]} if ref_logits is not None and ref_kl else out


@torch.library.custom_op("grade_kernels::objective", mutates_args=())
def _objective(
    logits: Tensor, ref_logits: Tensor | None, indices: Tensor, tokens: Tensor | None, suppress: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(`sweep.FIELDS` and KL(ref || policy) [7, r], support [r, k], its logits [r, k])."""
    return _launch(logits, ref_logits, indices, tokens, suppress, None, None, None)


@torch.library.custom_op("grade_kernels::objective_grad", mutates_args=("logits",))
def _objective_grad(
    logits: Tensor,
    ref_logits: Tensor | None,
    indices: Tensor,
    tokens: Tensor | None,
    suppress: Tensor | None,
    entropy_weights: Tensor | None,
    kl_weights: Tensor | None,
    ref_kl_weights: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same; the gradient overwrites the logits."""
    weights = (entropy_weights, kl_weights, ref_kl_weights)
    return _launch(logits, ref_logits, indices, tokens, suppress, *weights, softcap=softcap)


def _launch(*args: Any, softcap: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return sweep.sweep_rows(
        _objective_kernel, _ROWS, *args, softcap=softcap, scattered=_SCATTERED, max_registers=_MAX_REGISTERS
    )


@_objective.register_fake
@_objective_grad.register_fake
def _(logits: Tensor, ref_logits: Tensor | None, indices: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return sweep.outputs(_ROWS, logits, indices)
