"""vocab_head: everything a replay needs from the head, in one sweep over row chunks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from grade_kernels import checks
from grade_kernels.backend import backend_for, implementation
from grade_kernels.torch_ops.chunks import chunk_rows, rows_of, spans
from grade_kernels.torch_ops.head import Head


@dataclass(frozen=True)
class VocabHead:
    """Per position, what `vocab_head` leaves of the logits; None where it was not asked for.

    float32 (float64 for float64 hidden states), int64 for `indices`; nats.
    """

    kl: Tensor | None  # [...] exact KL in the direction asked for
    entropy: Tensor  # [...] of the full distribution
    logprob: Tensor | None  # [...] of `tokens` under the full raw distribution
    lse: Tensor  # [...] log-sum-exp of the logits
    ref_lse: Tensor | None  # [...] log-sum-exp of the reference's logits
    indices: Tensor | None  # [..., k] support
    logits: Tensor | None  # [..., k] logits at the support
    mass: Tensor | None  # [...] probability of the support
    grad_hidden: Tensor | None  # [..., d] d kl / d hidden
    grad_ref_hidden: Tensor | None  # [..., d] d kl / d ref_hidden


_FIELDS = tuple(field.name for field in fields(VocabHead))


def vocab_head(
    hidden: Tensor,
    weight: Tensor,
    *,
    ref_hidden: Tensor | None = None,
    indices: Tensor | None = None,
    k: int | None = 256,
    tokens: Tensor | None = None,
    suppress: Sequence[int] | Tensor | None = None,
    direction: str = "policy_ref",
    grad: bool = False,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_bytes: int = 2**28,
) -> VocabHead:
    """Sweep the head over the rows once, without a graph, keeping O(k + d) numbers a row.

    logits = softcap * tanh((scale * hidden @ weight.T + bias) / softcap), in float32 even from 16-bit
    operands; the reference shares weight and bias.

    Parameters
    ----------
    hidden : float [..., d]
        Final hidden states of the policy.
    weight : float [V, d]
        The head; same dtype as `hidden`.
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
    bias : float [V], optional
    scale, softcap : float
        Logit scale (Cohere, Granite) and soft cap (Gemma 2).
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
    top-k, and 32 MiB for a block of the weight in float32 where it is a 16-bit one.
    """
    checks.check_head(hidden, weight, bias, scale, softcap)
    checks.check_choice("direction", direction, checks.DIRECTIONS)
    leading, vocab = hidden.shape[:-1], weight.shape[0]
    if ref_hidden is not None:
        checks.check_head(ref_hidden, weight, None, scale, softcap, ("ref_hidden", "weight", "bias"))
        checks.check_shape("ref_hidden", ref_hidden, hidden.shape)
    elif grad:
        raise ValueError("grad=True asks for the gradient of the KL, which needs ref_hidden")
    if tokens is not None:
        checks.check_ids("tokens", tokens, leading, hidden.device)
    if indices is not None:
        checks.check_support("indices", indices, leading, hidden.device)
        k = indices.shape[-1]
    elif k is not None:
        k = checks.check_k(k, vocab)
    blocked = checks.suppress_ids(suppress, vocab, hidden.device)
    ops = implementation(backend_for("vocab_head", hidden, k=k)).sweep

    with torch.no_grad():
        head, n = Head(weight, bias, scale, softcap), math.prod(leading)
        out = OutputRows(n)
        rows, ref_rows = rows_of(hidden), None if ref_hidden is None else rows_of(ref_hidden)
        flat_tokens = None if tokens is None else tokens.reshape(n)
        flat_ids = None if indices is None else indices.reshape(n, k)
        def sweep(a: int, b: int) -> dict[str, Tensor]:
            """The chunk of rows a..b; its logits are gone on return."""
            logits = head.logits(rows[a:b])
            ref_logits = None if ref_rows is None else head.logits(ref_rows[a:b])
            ids, chosen = (None if x is None else x[a:b] for x in (flat_ids, flat_tokens))
            fields = ops.head_chunk(logits, ref_logits, k, blocked, ids, chosen, direction, grad, softcap)
            if grad:  # the logits are gradients by now
                fields |= {"grad_hidden": head.grad_hidden(logits), "grad_ref_hidden": head.grad_hidden(ref_logits)}
            return fields

        for a, b in spans(n, chunk_rows(vocab, chunk_bytes, head.dtype.itemsize)):
            out.put(a, b, sweep(a, b))
        return VocabHead(**{**dict.fromkeys(_FIELDS), **out.result(leading)})


class OutputRows:
    """Output tensors [N, ...], allocated when their first rows arrive."""

    def __init__(self, n: int):
        self.n = n
        self.tensors: dict[str, Tensor] = {}

    def put(self, a: int, b: int, pieces: dict[str, Tensor]) -> None:
        for name, piece in pieces.items():
            if name not in self.tensors:
                self.tensors[name] = piece.new_empty(self.n, *piece.shape[1:])
            self.tensors[name][a:b] = piece

    def result(self, leading: torch.Size) -> dict[str, Tensor]:
        """The tensors, [*leading, ...] by name."""
        return {name: t.view((*leading, *t.shape[1:])) for name, t in self.tensors.items()}
