"""logits_kl: exact full-vocabulary KL of raw logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grade_kernels.backend import backend_for, implementation
from grade_kernels.common import checks
from grade_kernels.common.chunks import rows_of
from grade_kernels.common.stats import KLStats


def logits_kl(logits: Tensor, ref_logits: Tensor, direction: str = "policy_ref") -> Tensor:
    """Exact KL over the vocabulary, per row, in nats.

    Parameters
    ----------
    logits, ref_logits : float [..., V]
        Raw logits of the policy and of the reference; the dtypes may differ.
    direction : "policy_ref" or "ref_policy"
        kl(policy || ref) or kl(ref || policy).

    Returns
    -------
    Tensor [...]
        float32 (float64 if either input is float64).  Never negative; exactly 0 for identical inputs;
        accurate for nearly equal ones (`torch_ops.kl`).  An entry that is -inf on both sides does not
        count.  +inf where the first distribution of the direction has mass that the second excludes with
        -inf; the gradient of such a row is NaN, unless the gradient that reaches it is 0.

        Gradients go to the sides that require them, computed in float32 (float64) and returned in the
        dtype of the side: p (log p - log q - KL) for the first distribution p of the direction, q - p for
        the second, q.  Saved beside the inputs: six scalars a row.

        Inputs that are log-probabilities already are logits too: the value is the same, and the gradient is
        that of the KL of their softmax, q - p, orthogonal to shifts of a row.  `torch.nn.functional.kl_div`
        and Liger take log q as it is and have the gradient -p.  The two agree once they are pulled back
        through the `log_softmax` that made the input.

    Raises
    ------
    TypeError, ValueError
        On wrong dtypes, unequal shapes or devices, or an unknown direction.
    """
    checks.check_float("logits", logits)
    checks.check_float("ref_logits", ref_logits)
    checks.check_shape("ref_logits", ref_logits, logits.shape)
    checks.check_device("ref_logits", ref_logits, logits.device)
    checks.check_choice("direction", direction, checks.DIRECTIONS)
    backend = backend_for("logits_kl", logits, ref_logits)
    if direction == "policy_ref":
        return _KL.apply(logits, ref_logits, backend)
    return _KL.apply(ref_logits, logits, backend)


class _KL(torch.autograd.Function):
    """KL(p || q) of p_logits and q_logits [..., V]."""

    @staticmethod
    def forward(ctx: Any, p_logits: Tensor, q_logits: Tensor, backend: str) -> Tensor:
        dtype = checks.compute_dtype(p_logits, q_logits)
        stats = implementation(backend).kl.kl_stats(rows_of(p_logits), rows_of(q_logits), dtype)
        ctx.backend = backend
        ctx.save_for_backward(p_logits, q_logits, *stats)
        return stats.kl.view(p_logits.shape[:-1]).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        p_logits, q_logits, *saved = ctx.saved_tensors
        p_rows, q_rows = rows_of(p_logits), rows_of(q_logits)
        out_p, out_q = (
            torch.empty(x.shape, dtype=x.dtype, device=x.device) if wanted else None
            for x, wanted in zip((p_rows, q_rows), ctx.needs_input_grad[:2], strict=True)
        )
        kl_grads = implementation(ctx.backend).kl.kl_grads
        kl_grads(p_rows, q_rows, KLStats(*saved), grad.reshape(-1), out_p, out_q)
        return *(out if out is None else out.view(p_logits.shape) for out in (out_p, out_q)), None
