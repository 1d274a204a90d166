"""soft_token_vjp: the gradient of a sampled token with respect to the logits it was drawn from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grade_kernels.backend import backend_for, implementation
from grade_kernels.common import checks
from grade_kernels.common.head import Head, check_is_head, through_softcap
from grade_kernels.sample import row_keys


@dataclass(frozen=True)
class SoftTokenGrad:
    """float32 (float64 if an input is float64)."""

    dlogits: Tensor  # [..., k] at the support
    dhidden: Tensor | None  # [..., d], pulled back through the head; None without one


class SoftTokenRule:
    """dL / d(embedding of a fed token) to dL / d(logits) over its support, and on to the hidden state.

    rule(grad, table) takes gradients that come one after the other and is linear in them.  With
    v_j = <dL/dX, E[i_j]>, summed over the models that were fed the token, l the logits at the support
    and J(q) v = q * (v - <q, v>), every softmax being over the support, dL/dl is

    gumbel
        J(w) v / tau, w the Gumbel-Softmax weights of the draw: of the free draw 0 that sampled the token,
        regenerated from (seed, rows), or with `conditional` of draw 1 conditional on the token, for tokens
        that another engine sampled.  It is the rule of hard and of soft GRADE alike.
    rao
        The mean of J(w) v / tau over draws 1..samples conditional on the token (Paulus et al. 2021).
    straight_through
        J(softmax(l)) v, no noise and no tau (Bengio et al. 2013).
    reinmax
        2 J((onehot(token) + softmax(l / tau)) / 2) v - J(softmax(l)) v / 2 (Liu et al. 2023, algorithm 2:
        tau shapes the first distribution only, and there is no factor 1/tau, because both Jacobians are
        taken with respect to the logits of a softmax at temperature 1; second-order accurate at tau = 1.
        The authors' own code refuses tau < 1; here it is computed as written, to be measured).

    All four sum to 0 over the support.

    Parameters
    ----------
    logits : float [..., k]
        At the support, after scale and soft cap.  -inf entries get gradient 0.
    indices : int64 [..., k]
    tokens : int64 [...]
        Needed by rao, reinmax and `conditional`; must be in the support (`place_tokens`).  Where one is
        not, its conditional draw is a free one and its one-hot is 0.
    tau : float
        > 0.
    estimator : "gumbel", "rao", "straight_through" or "reinmax"
    seed, rows
        As given to `gumbel_topk`; `seed` is needed by gumbel and rao.
    samples : int
        Conditional draws of rao, >= 1.
    conditional : bool
        See gumbel.
    head : Head, optional
        With it, dhidden is dlogits pulled back to the hidden state (`pull_back`).
    keep_bytes : int
        The rule's weights do not depend on the gradient.  On the PyTorch path the first call keeps them if they
        take at most as many bytes: 4 (8 in float64) for each of N * k candidates, times `samples` for rao and times
        2 for reinmax.  The kernels of the Triton path regenerate them in registers every time.

    Tensors must not change while the rule is in use.

    Raises
    ------
    TypeError, ValueError
        On wrong dtypes, shapes, devices or options.
    """

    def __init__(
        self,
        *,
        logits: Tensor,
        indices: Tensor,
        tokens: Tensor | None = None,
        tau: float = 1.0,
        estimator: str = "gumbel",
        seed: int | None = None,
        rows: Tensor | None = None,
        samples: int = 16,
        conditional: bool = False,
        head: Head | None = None,
        keep_bytes: int = 2**28,
    ):
        checks.check_float("logits", logits)
        leading, k = logits.shape[:-1], logits.shape[-1]
        checks.check_ids("indices", indices, logits.shape, logits.device)
        checks.check_positive("tau", tau)
        checks.check_choice("estimator", estimator, checks.ESTIMATORS)
        if checks.check_int("samples", samples) < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        if checks.check_int("keep_bytes", keep_bytes) < 0:
            raise ValueError(f"keep_bytes must be at least 0, got {keep_bytes}")
        if tokens is not None:
            checks.check_ids("tokens", tokens, leading, logits.device)
        elif estimator in ("rao", "reinmax") or conditional:
            wanted = f"estimator={estimator!r}" + (" with conditional=True" if conditional else "")
            raise ValueError(f"{wanted} needs tokens, the sampled ids {tuple(leading)}")
        if estimator in ("gumbel", "rao"):
            if seed is None:
                raise ValueError(f"estimator={estimator!r} needs the seed of the noise")
            seed = checks.check_int("seed", seed)
        keys = row_keys(rows, leading, logits.device)
        if head is not None:
            check_is_head("head", head)
            checks.check_device("head.weight", head.weight, logits.device)
        n = math.prod(leading)
        draws = range(1, samples + 1) if estimator == "rao" else range(1, 2) if conditional else range(1)
        self._indices, self._values = indices, logits.detach().reshape(n, k)
        self._draws = (None if tokens is None else tokens.reshape(n), keys, estimator, tau, seed or 0, draws)
        self._head = head
        self._terms = {"rao": samples, "reinmax": 2}.get(estimator, 1)
        self._keep_bytes = keep_bytes
        self._kept: dict[torch.dtype, list[tuple[float, Tensor]]] = {}

    def __call__(
        self, grad_embedding: Tensor | Sequence[Tensor], embedding: Tensor | Sequence[Tensor]
    ) -> SoftTokenGrad:
        """No graph is made; memory is a few arrays [N, k] and the chunks of `torch_ops.embedding`.

        Parameters
        ----------
        grad_embedding : float [..., d_e], or a sequence of them
            dL/dX, one for each model.
        embedding : float [V, d_e], or an equally long sequence
            Each model's own embedding table.

        Raises
        ------
        TypeError, ValueError
            On wrong dtypes, shapes or devices.
        """
        with torch.no_grad():
            return self._apply(grad_embedding, embedding)

    def _apply(self, grad_embedding: Tensor | Sequence[Tensor], embedding: Tensor | Sequence[Tensor]) -> SoftTokenGrad:
        grads, tables, ids = _pairs(grad_embedding, embedding, self._indices)
        values, head, shape = self._values, self._head, self._indices.shape
        sides = [*grads, *tables, *([] if head is None else [head.weight])]
        backend = backend_for("soft_token_vjp", values, *sides, k=shape[-1])
        ops, dtype = implementation(backend).vjp, checks.compute_dtype(values, *grads, *tables)
        if backend == "torch" and self._terms * values.numel() * dtype.itemsize <= self._keep_bytes:
            if dtype not in self._kept:
                self._kept[dtype] = list(ops.rule_terms(values.to(dtype), ids, *self._draws))
            grad = ops.apply_terms(self._kept[dtype], ops.candidate_grad(grads, tables, ids).to(dtype))
        else:
            grad = ops.token_vjp(grads, tables, values, ids, *self._draws, dtype)
        grad = grad.view(shape)
        if head is None:
            return SoftTokenGrad(grad, None)
        return SoftTokenGrad(grad, pull_back(grad, self._indices, head, values.view(shape)))


def soft_token_vjp(
    grad_embedding: Tensor | Sequence[Tensor], embedding: Tensor | Sequence[Tensor], **rule: Any
) -> SoftTokenGrad:
    """One call of the `SoftTokenRule` that the keyword arguments make; errors and results are its."""
    return SoftTokenRule(**{"keep_bytes": 0, **rule})(grad_embedding, embedding)


@torch.no_grad()
def candidate_grad(
    grad_embedding: Tensor | Sequence[Tensor], embedding: Tensor | Sequence[Tensor], indices: Tensor
) -> Tensor:
    """v_j = sum over models of <grad, E[i_j]>: the first-order effect of each candidate.

    Parameters
    ----------
    grad_embedding : float [..., d_e], or a sequence of them
    embedding : float [V, d_e], or an equally long sequence; the widths may differ between models
    indices : int64 [..., k]

    Returns
    -------
    Tensor [..., k]
        float32 (float64 if an input is float64).
    """
    grads, tables, ids = _pairs(grad_embedding, embedding, indices)
    ops = implementation(backend_for("candidate_grad", *grads, *tables, k=ids.shape[1])).vjp
    return ops.candidate_grad(grads, tables, ids).view(indices.shape)


def _pairs(
    grad_embedding: Tensor | Sequence[Tensor], embedding: Tensor | Sequence[Tensor], indices: Tensor
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(gradients [N, d_e], tables [V, d_e], ids [N, k]), checked."""
    grads = [grad_embedding] if isinstance(grad_embedding, Tensor) else list(grad_embedding)
    tables = [embedding] if isinstance(embedding, Tensor) else list(embedding)
    if len(grads) != len(tables) or not grads:
        raise ValueError(
            f"grad_embedding and embedding must pair up one to one, got {len(grads)} gradient(s) "
            f"and {len(tables)} table(s)"
        )
    for grad, table in zip(grads, tables, strict=True):
        checks.check_float("grad_embedding", grad)
        checks.check_support("indices", indices, grad.shape[:-1], grad.device)
        checks.check_table("embedding", table, grad.shape[-1], grad.device)
    k, n = indices.shape[-1], math.prod(grads[0].shape[:-1])
    return [grad.reshape(n, grad.shape[-1]) for grad in grads], tables, indices.reshape(n, k)


@torch.no_grad()
def pull_back(dlogits: Tensor, indices: Tensor, head: Head, logits: Tensor | None = None) -> Tensor:
    """A sparse gradient at the logits, pulled back to the hidden state.

    scale * sum_j dlogits_j (1 - (logits_j / softcap)^2) weight[i_j], without the square where there is no soft cap.

    Parameters
    ----------
    dlogits : float [..., k]
    indices : int64 [..., k]
    head : Head
    logits : float [..., k]
        At the support; needed with a soft cap only.

    Returns
    -------
    Tensor [..., d]
        float32 (float64 if an input is float64).

    Raises
    ------
    TypeError, ValueError
        On wrong dtypes, shapes or devices, or a soft cap without `logits`.
    """
    checks.check_float("dlogits", dlogits)
    checks.check_ids("indices", indices, dlogits.shape, dlogits.device)
    check_is_head("head", head)
    checks.check_device("head.weight", head.weight, dlogits.device)
    weight, dtype = head.weight, checks.compute_dtype(dlogits, head.weight)
    d_raw = dlogits.to(dtype) * head.scale
    if head.softcap is not None:
        if logits is None:
            raise ValueError("head has a soft cap, whose derivative needs logits; pass those at the support")
        checks.check_float("logits", logits)
        checks.check_shape("logits", logits, dlogits.shape)
        through_softcap(d_raw, logits.to(dtype), head.softcap)
    leading, k = dlogits.shape[:-1], dlogits.shape[-1]
    n = math.prod(leading)
    ops = implementation(backend_for("pull_back", dlogits, weight)).embedding
    flat = ops.weighted_sum(d_raw.reshape(n, k), indices.reshape(n, k), weight)
    return flat.view(*leading, weight.shape[1])
