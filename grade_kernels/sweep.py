"""vocab_head: everything a replay needs from the head, in one sweep over row chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grade_kernels.backend import backend_for, implementation
from grade_kernels.common import checks
from grade_kernels.common.head import Head
from grade_kernels.common.sweep import check_sweep, sweep


@dataclass(frozen=True, kw_only=True)
class VocabHead:
    """Per position, what `vocab_head` leaves of the logits; None where it was not asked for.

    float32 (float64 for float64 hidden states), int64 for `indices`; nats.
    """

    kl: Tensor | None = None  # [...] exact KL in the direction asked for
    entropy: Tensor  # [...] of the full distribution
    logprob: Tensor | None = None  # [...] of `tokens` under the full raw distribution
    lse: Tensor  # [...] log-sum-exp of the logits
    ref_lse: Tensor | None = None  # [...] log-sum-exp of the reference's logits
    indices: Tensor | None = None  # [..., k] support
    logits: Tensor | None = None  # [..., k] logits at the support
    mass: Tensor | None = None  # [...] probability of the support
    grad_hidden: Tensor | None = None  # [..., d] d kl / d hidden
    grad_ref_hidden: Tensor | None = None  # [..., d] d kl / d ref_hidden


def vocab_head(
    hidden: Tensor,
    head: Head,
    *,
    ref_hidden: Tensor | None = None,
    indices: Tensor | None = None,
    k: int | None = 256,
    tokens: Tensor | None = None,
    suppress: Sequence[int] | Tensor | None = None,
    direction: str = "policy_ref",
    grad: bool = False,
    chunk_bytes: int = 2**28,
) -> VocabHead:
    """Sweep the head over the rows once, without a graph, keeping O(k + d) numbers a row.

    Parameters
    ----------
    hidden : float [..., d]
        Final hidden states of the policy.
    head : Head
        Of the policy and of the reference; its weight has the dtype of `hidden`.
    ref_hidden : float [..., d], optional
        The reference's hidden states; without them there is no KL.
    indices : int64 [..., k], optional
        The support.  Default: the exact top-k, ordered by (value descending, lower id).
    k : int or None
        Candidates where `indices` is not given; None for no support at all.
    tokens : int64 [...], optional
        Tokens to take the log-probability of; one that the support misses takes its last place.
    suppress : sequence of ids or int64 [m], optional
        Ids that may not be sampled: left out of the support, or at -inf in `logits` where it holds them
        anyway.  They stay in kl, entropy, logprob and lse.
    direction : "policy_ref" or "ref_policy"
        kl(policy || ref) or kl(ref || policy).
    grad : bool
        Also pull the gradient of each row's KL, with unit weight, back to the hidden states.
    chunk_bytes : int
        Memory bound of the sweep.

    Returns
    -------
    VocabHead

    Raises
    ------
    TypeError, ValueError
        On wrong dtypes, shapes, devices or options.

    Notes
    -----
    Peak memory beside inputs and outputs: `chunk_bytes` (3 arrays of `chunk_rows(V, chunk_bytes)` rows by
    V columns; more only if a single row needs more), the temporaries of a piece (ten arrays of 512 KiB a
    thread on a CPU, of 64 MiB elsewhere, or of one row if that is larger), 64 MiB of sorting keys for the
    top-k, and on a CPU 32 MiB for a block of the weight in float32 where it is a 16-bit one, or a copy of a float32
    weight where oneDNN makes the products.
    """
    blocked = check_sweep(hidden, head, ref_hidden, tokens, suppress)
    checks.check_choice("direction", direction, checks.DIRECTIONS)
    if grad and ref_hidden is None:
        raise ValueError("grad=True asks for the gradient of the KL, which needs ref_hidden")
    if indices is not None:
        checks.check_support("indices", indices, hidden.shape[:-1], hidden.device)
        k = indices.shape[-1]
    elif k is not None:
        k = checks.check_k(k, head.weight.shape[0])
    ops = implementation(backend_for("vocab_head", hidden, k=k)).sweep

    def take(logits: Tensor, ref_logits: Tensor | None, ids: Tensor | None, chosen: Tensor | None) -> dict[str, Tensor]:
        found = ops.head_chunk(logits, ref_logits, k, blocked, ids, chosen, direction, grad, head.softcap)
        if grad and ref_logits is not None:  # the logits are gradients by now
            found |= {"grad_hidden": head.grad_hidden(logits), "grad_ref_hidden": head.grad_hidden(ref_logits)}
        return found

    with torch.no_grad():
        return VocabHead(**sweep(take, hidden, head, ref_hidden, (indices, tokens), chunk_bytes))
