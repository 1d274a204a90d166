"""What `vocab_head` takes from one chunk of logits."""

from __future__ import annotations

from torch import Tensor

from grade_kernels.common.chunks import pieces
from grade_kernels.common.head import through_softcap
from grade_kernels.common.stats import KLStats, TokenStats
from grade_kernels.torch_ops import kl as kl_ops
from grade_kernels.torch_ops.logprob import exponentials, piece_stats
from grade_kernels.torch_ops.sample import candidates


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

    logits, ref_logits : float32 or float64 [r, V]
        With `grad` each is overwritten by the gradient of its row's KL before the soft cap.
    k : None for no support; otherwise `indices` int64 [r, k] or, where it is None, the top-k
    tokens : int64 [r] or None
    """
    dtype = logits.dtype
    token, kl = (stats.empty(logits.shape[0], dtype, logits.device) for stats in (TokenStats, KLStats))
    support = None if k is None else candidates(logits, k, suppress, indices, tokens, dtype)
    policy_first = direction == "policy_ref"
    for a, b in pieces(logits, dtype):
        part = logits[a:b]
        exps = exponentials(part)
        token.put(a, b, piece_stats(part, None if tokens is None else tokens[a:b], exps))
        if ref_logits is None:
            continue
        ref_part = ref_logits[a:b]
        sides = (part, exps), (ref_part, exponentials(ref_part))
        (p, exp_p), (q, exp_q) = sides if policy_first else sides[::-1]
        divergence = kl_ops.divergence(p, q, exp_p, exp_q, grad)
        kl.put(a, b, divergence.stats)
        for side, d_side in ((p, divergence.grad_p), (q, divergence.grad_q)):
            if d_side is not None:  # the last use of the logits
                side.copy_(through_softcap(d_side, side, softcap))
    return row_fields(token, None if ref_logits is None else kl, tokens is not None, support, policy_first)


def row_fields(
    token: TokenStats,
    kl: KLStats | None,
    with_tokens: bool,
    support: tuple[Tensor, Tensor] | None,
    policy_first: bool = True,
) -> dict[str, Tensor]:
    """The fields of a sweep, by name: statistics of rows and their support (ids, logits), where there are any."""
    out = {"entropy": token.entropy, "lse": token.lse}
    if with_tokens:
        out["logprob"] = token.logprob
    if support is not None:
        ids, values = support
        out |= {"indices": ids, "logits": values, "mass": (values - token.lse[:, None]).exp().sum(-1)}
    if kl is not None:
        out |= {"kl": kl.kl, "ref_lse": kl.lse_q if policy_first else kl.lse_p}
    return out
