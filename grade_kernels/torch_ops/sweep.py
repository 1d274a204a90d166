"""What `vocab_head` takes from one chunk of logits."""

from __future__ import annotations

from torch import Tensor

from grade_kernels.torch_ops import kl as kl_ops
from grade_kernels.torch_ops.logprob import token_stats
from grade_kernels.torch_ops.sample import select


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
    stats = token_stats(logits, tokens, dtype)
    out = {"entropy": stats.entropy, "lse": stats.lse}
    if tokens is not None:
        out["logprob"] = stats.logprob
    if k is not None:
        support = select(logits, k, suppress, indices, tokens, dtype)
        mass = (support.values - stats.lse[:, None]).exp().sum(-1)
        out |= {"indices": support.ids, "logits": support.values, "mass": mass}
    if ref_logits is not None:
        policy_first = direction == "policy_ref"
        pair = (logits, ref_logits) if policy_first else (ref_logits, logits)
        kl = kl_ops.kl_stats(*pair, dtype)
        out |= {"kl": kl.kl, "ref_lse": kl.lse_q if policy_first else kl.lse_p}
        if grad:  # the last use of the logits
            kl_ops.kl_grads(*pair, kl, None, *pair, softcap)
    return out
