"""What `vocab_head` takes from one chunk of logits: one read for the statistics, one for the gradients.

A program takes a row.  The second read follows the first at once; whether it comes from the L2 cache depends on the
rows in flight: two of 151,936 in float32 are 1.2 MB, and 132 of those pairs exceed the 50 MB of an H200 three times, so
count on two reads and a write of every logit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grade_kernels.triton_ops import device, noise, online, sample
from grade_kernels.triton_ops.launch import launch, next_power_of_2, vector_width
from grade_kernels.triton_ops.suppress import suppress_bits

_WARPS = 8
_ENTRIES = 16  # of each side that a thread takes per tile
FIELDS = ("entropy", "lse", "logprob", "mass", "kl", "ref_lse")  # what a kernel writes of a row; 0 where not asked for


@triton.jit(do_not_specialize=["n", "k"], do_not_specialize_on_alignment=["given", "tokens"])
def _head_kernel(
    policy, ref, given, tokens, bits, stats, ids_out, values_out, n, k, inverse_cap, vocab, policy_stride, ref_stride,
    POLICY_FIRST: tl.constexpr, GRAD: tl.constexpr, KEPT: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    policy = device.aligned(policy, row * policy_stride, WIDTH)
    stats += row
    n = n.to(tl.int64)
    if ref is not None:
        ref = device.aligned(ref, row * ref_stride, WIDTH)
        if POLICY_FIRST:
            kl, peak_p, norm_p, peak_q, norm_q, shift, entropy = online.kl_row(
                policy, ref, vocab, 1, LANES, WIDTH, STEPS
            )
            peak, norm, ref_lse = peak_p, norm_p, peak_q + norm_q
        else:
            kl, peak_p, norm_p, peak_q, norm_q, shift, entropy = online.kl_row(
                ref, policy, vocab, 2, LANES, WIDTH, STEPS
            )
            peak, norm, ref_lse = peak_q, norm_q, peak_p + norm_p
    else:
        peak, norm, entropy = online.lse_row(policy, vocab, LANES, WIDTH, STEPS)
        kl, ref_lse = 0.0, 0.0
    store_row(
        policy, row, k, given, tokens, bits, stats, ids_out, values_out, n, entropy, peak, norm, kl, ref_lse, KEPT
    )
    if GRAD:
        tl.debug_barrier()  # other threads have read the token's and the support's logits
        p, q = policy, ref
        if not POLICY_FIRST:
            p, q = ref, policy
        online.write_kl_grads(
            p, q, p, q, vocab, None, inverse_cap, kl, peak_p, norm_p, peak_q, norm_q, shift, LANES, WIDTH, STEPS
        )


@triton.jit
def store_row(
    policy, row, k, given, tokens, bits, stats, ids_out, values_out, n, entropy, peak, norm, kl, ref_lse,
    KEPT: tl.constexpr,
):  # fmt: skip
    """`FIELDS` of a row at `stats`, and its support where there is one."""
    logprob, mass = 0.0, 0.0
    token = tl.full([], 0, tl.int64)
    if tokens is not None:
        token = tl.load(tokens + row)
        logprob = (tl.load(policy + token) - peak) - norm
    if given is not None:
        lane = tl.arange(0, KEPT)
        inside = lane < k
        ids = tl.load(given + row * k + lane, mask=inside, other=0)
        ids, values = noise.read_support(policy, ids, lane, k, token, bits, tokens is not None)
        mass = tl.sum(tl.where(inside, tl.exp2(((values - peak) - norm) * online.LOG2E), 0.0), axis=0)
        tl.store(ids_out + row * k + lane, ids, mask=inside)
        tl.store(values_out + row * k + lane, values, mask=inside)
    tl.store(stats, entropy)
    tl.store(stats + n, peak + norm)
    tl.store(stats + 2 * n, logprob)
    tl.store(stats + 3 * n, mass)
    tl.store(stats + 4 * n, kl)
    tl.store(stats + 5 * n, ref_lse)


def head_chunk(
    logits: Tensor,
    ref_logits: Tensor | None,
    k: int | None,
    suppress: Tensor | None,
    indices: Tensor | None,
    tokens: Tensor | None,
    direction: str,
    grad: bool,
    softcap: float | None,
) -> dict[str, Tensor]:
    """The fields of `VocabHead` for r rows, except the gradients of hidden states.

    logits, ref_logits : float32 [r, V]
        With `grad` each is overwritten by the gradient of its row's KL before the soft cap.
    k : None for no support; otherwise `indices` int64 [r, k] or, where it is None, the top-k
    tokens : int64 [r] or None
    """
    if k is not None and indices is None:
        indices = sample.select(logits, k, suppress, None, tokens, torch.float32).ids
    given = indices if k is not None else None
    args = (logits, ref_logits, given, tokens, suppress, direction == "policy_ref")
    grad = grad and ref_logits is not None
    stats, ids, values = _head_sweep_grads(*args, softcap) if grad else _head_sweep(*args)
    return wanted_fields(stats, ids, values, ref_logits is not None, tokens is not None, given is not None)


def wanted_fields(
    stats: Tensor, ids: Tensor, values: Tensor, with_ref: bool, with_tokens: bool, with_support: bool = True
) -> dict[str, Tensor]:
    """The fields of a sweep, by name, without those that were not asked for."""
    out = dict(zip(FIELDS, stats.unbind(), strict=False)) | {"indices": ids, "logits": values}
    missing = set() if with_tokens else {"logprob"}
    missing |= set() if with_ref else {"kl", "ref_lse"}
    missing |= set() if with_support else {"mass", "indices", "logits"}
    return {name: value for name, value in out.items() if name not in missing}


@torch.library.custom_op("grade_kernels::head_sweep", mutates_args=())
def _head_sweep(
    logits: Tensor,
    ref_logits: Tensor | None,
    indices: Tensor | None,
    tokens: Tensor | None,
    suppress: Tensor | None,
    policy_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(`FIELDS` [6, r], support [r, k], its logits [r, k]); k is 0 without indices."""
    sides = (logits, ref_logits, indices, tokens, suppress)
    return sweep_rows(_head_kernel, len(FIELDS), *sides, softcap=None, POLICY_FIRST=policy_first, GRAD=False)


@torch.library.custom_op("grade_kernels::head_sweep_grads", mutates_args=("logits", "ref_logits"))
def _head_sweep_grads(
    logits: Tensor,
    ref_logits: Tensor,
    indices: Tensor | None,
    tokens: Tensor | None,
    suppress: Tensor | None,
    policy_first: bool,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same; the gradients of the KL overwrite the logits."""
    sides = (logits, ref_logits, indices, tokens, suppress)
    return sweep_rows(_head_kernel, len(FIELDS), *sides, softcap=softcap, POLICY_FIRST=policy_first, GRAD=True)


def sweep_rows(
    kernel: Any,
    rows_of_stats: int,
    logits: Tensor,
    ref_logits: Tensor | None,
    indices: Tensor | None,
    tokens: Tensor | None,
    suppress: Tensor | None,
    *weights: Tensor | None,
    softcap: float | None,
    scattered: int = _ENTRIES,
    max_registers: int | None = None,
    **constants: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch a sweep, a program a row: (statistics [rows_of_stats, r], support [r, k], its logits [r, k]).

    A thread takes `_ENTRIES` of each side per tile, `scattered` where they are not adjacent.
    """
    stats, ids, values = outputs(rows_of_stats, logits, indices)
    n, vocab = logits.shape
    bits = None if indices is None else suppress_bits(suppress, vocab, logits.device)
    given, chosen, *per_row = (x if x is None else x.contiguous() for x in (indices, tokens, *weights))
    width, k = vector_width(*(x for x in (logits, ref_logits) if x is not None)), ids.shape[1]
    launch(
        kernel, (n,), logits, ref_logits, given, chosen, bits, *per_row, stats, ids, values, n, k,
        None if softcap is None else 1.0 / softcap, vocab, logits.stride(0),
        0 if ref_logits is None else ref_logits.stride(0),
        num_warps=_WARPS, max_registers=max_registers, KEPT=next_power_of_2(k), LANES=32 * _WARPS, WIDTH=width,
        STEPS=(_ENTRIES if width > 1 else scattered) // width, **constants,
    )  # fmt: skip
    return stats, ids, values


def outputs(rows_of_stats: int, logits: Tensor, indices: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What `sweep_rows` returns, unwritten; k is 0 without indices."""
    n, k = logits.shape[0], 0 if indices is None else indices.shape[1]
    stats = logits.new_empty(rows_of_stats, n, dtype=torch.float32)
    return stats, logits.new_empty(n, k, dtype=torch.int64), stats.new_empty(n, k)


@_head_sweep.register_fake
@_head_sweep_grads.register_fake
def _(logits: Tensor, ref_logits: Tensor | None, indices: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return outputs(len(FIELDS), logits, indices)
