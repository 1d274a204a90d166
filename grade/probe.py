"""Measure on a few tokens that a model is what `grade.model` takes it for.

Architectures differ in what surrounds the transformer: Gemma scales embeddings (in the embedding module or in the
forward, depending on the transformers version), Gemma-2 soft-caps logits, Cohere and Granite scale them. Each probe
runs the model's own code on both sides of a claim and compares, so a model that does something else is refused by
name instead of being trained on a wrong gradient.
"""

from __future__ import annotations

import math
from typing import Optional, Tuple

import torch
from torch import Tensor

from grade.config import GradeError

_PROBE_TOKENS = 12
_PROBE_ROWS = 4096  # of the head: a few thousand logits settle its shape without a float32 copy of all of it


def _tolerance(dtype: torch.dtype) -> float:
    """Largest relative error that rounding explains: a few hundred ulps, accumulated through the layers, but never
    so much that a wrong model passes (300 ulps of bfloat16 are 2.3)."""
    return min(max(300 * torch.finfo(dtype).eps, 1e-5), 0.1)


def _relative_error(value: Tensor, expected: Tensor) -> float:
    """inf where either holds a NaN, which no tolerance would catch."""
    value, expected = value.double(), expected.double()
    error = ((value - expected).norm() / expected.norm().clamp_min(1e-300)).item()
    return math.inf if math.isnan(error) else error


def _refuse(policy, reason: str) -> GradeError:
    return GradeError(
        f"model.name: {type(policy.causal_lm).__name__} {reason}, so replay would compute wrong gradients for it. "
        "Choose another model."
    )


def _probe_ids(policy) -> Tensor:
    """[1, n] ids spread over the vocabulary, the same every time."""
    return torch.arange(1, _PROBE_TOKENS + 1, device=policy.device)[None] * 7919 % policy.embedding.shape[0]


@torch.no_grad()
def probe_embedding(policy) -> float:
    """The factor c with embedding_module(ids) = c * E[ids].

    Raises:
        GradeError: the embedding module is no scaled table.
    """
    ids = _probe_ids(policy)
    out, rows = policy.causal_lm.get_input_embeddings()(ids), policy.embedding[ids]
    if torch.equal(out, rows):
        return 1.0
    scale = (out.double() * rows.double()).sum().item() / rows.double().square().sum().item()
    # The scale is stored in the table's dtype, so rounding it there gives the very product the model computes.
    scale = torch.tensor(scale).to(rows.dtype).item()
    if _relative_error(rows * scale, out) > 2 * torch.finfo(rows.dtype).eps:
        raise _refuse(policy, "does more in its input embedding than scale the rows of a table")
    return scale


@torch.no_grad()
def probe_head(policy) -> Tuple[float, Optional[float]]:
    """Logit scale and soft-cap, found by handing the model's own head hidden states of our choice.

    Returns:
        (scale, cap): logits = cap * tanh((scale * hidden @ W^T + bias) / cap); cap is None where nothing is capped.

    Raises:
        GradeError: the head does something else.
    """
    generator = torch.Generator().manual_seed(0)
    width = policy.head.shape[1]
    unit = torch.randn(1, _PROBE_TOKENS, width, generator=generator).to(policy.device)
    weight = policy.head[:_PROBE_ROWS].to(torch.promote_types(policy.dtype, torch.float32))
    unit = unit.to(weight.dtype)
    typical = (unit[0, :1] @ weight.T).std().item()
    tolerance = _tolerance(policy.dtype)

    def compare(magnitude: float) -> Tuple[Tensor, Tensor]:
        """The model's logits and the bare product, for hidden states that give logits of this magnitude."""
        hidden = (unit * (magnitude / typical)).to(policy.dtype)
        own = _logits_of_hidden(policy, hidden)[..., :_PROBE_ROWS]
        return own.to(weight.dtype), hidden.to(weight.dtype) @ weight.T

    bias = 0.0 if policy.head_bias is None else policy.head_bias[:_PROBE_ROWS].to(weight.dtype)
    logits, product = compare(0.05)  # small enough that a cap of 1 or more is still a straight line
    scale = (((logits - bias) * product).sum() / product.square().sum()).item()
    known = [1.0, getattr(policy.config, "logit_scale", None), _inverse(policy.config, "logits_scaling")]
    nearest = min((x for x in known if x is not None), key=lambda x: abs(scale - x))
    if abs(scale - nearest) <= 1e-2 * abs(nearest):
        scale = nearest  # the fit carries rounding; the config's number does not
    logits, product = compare(60.0)
    straight = scale * product + bias
    if _relative_error(straight, logits) < tolerance:
        return scale, None
    cap = getattr(policy.config.get_text_config(), "final_logit_softcapping", None)
    if cap and _relative_error(cap * torch.tanh(straight / cap), logits) < tolerance:
        return scale, float(cap)
    raise _refuse(policy, "does more in its head than a matrix product, a scale and a soft-cap")


def _inverse(config, name: str) -> Optional[float]:
    value = getattr(config, name, None)
    return 1.0 / value if value else None


def _logits_of_hidden(policy, hidden: Tensor) -> Tensor:
    """The model's logits if its backbone had returned `hidden` [1, n, d]."""

    replaced = []

    def replace(module, args, kwargs, output):
        replaced.append(True)
        output.last_hidden_state = hidden
        return output

    handle = policy.backbone.register_forward_hook(replace, with_kwargs=True)
    try:
        logits = policy.causal_lm(input_ids=_probe_ids(policy), use_cache=False).logits
    finally:
        handle.remove()
    if not replaced:
        raise _refuse(policy, "does not call its `base_model` as one module")
    return logits


@torch.no_grad()
def probe_passes(policy) -> None:
    """Embeddings stand for ids, later tokens do not reach back, padding and the KV cache change nothing (padding no
    gradient either).

    Raises:
        GradeError: naming the claim that fails.
    """
    ids, tolerance = _probe_ids(policy), _tolerance(policy.dtype)
    embeddings = policy.embed(ids)
    mask = torch.ones_like(ids, dtype=torch.bool)
    hidden = policy.hidden(embeddings, mask)

    own = policy.backbone(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
    if _relative_error(hidden, own) > tolerance:
        raise _refuse(policy, "gives other hidden states for inputs_embeds than for the same input_ids")

    changed = embeddings.clone()
    changed[:, -1] = -changed[:, -1]
    if _relative_error(policy.hidden(changed, mask)[:, :-1], hidden[:, :-1]) > tolerance:
        raise _refuse(policy, "lets a token change the hidden states before it: it is not causal")

    padded = torch.cat([embeddings[:, :3], embeddings], dim=1)
    padded_mask = torch.cat([torch.zeros_like(mask[:, :3]), mask], dim=1)
    if _relative_error(policy.hidden(padded, padded_mask)[:, 3:], hidden) > tolerance:
        raise _refuse(policy, "gives other hidden states under left padding")

    cache, split = policy.new_cache(), _PROBE_TOKENS // 2
    parts = [policy.hidden(embeddings[:, :split], mask[:, :split], cache)]
    parts.append(policy.hidden(embeddings[:, split:], mask, cache))
    if _relative_error(torch.cat(parts, dim=1), hidden) > tolerance:
        raise _refuse(policy, "gives other hidden states from its KV cache than from a parallel pass")

    def input_gradient(embeddings: Tensor, mask: Tensor) -> Tensor:
        """Of a fixed combination of the real tokens' states, at their embeddings."""
        with torch.enable_grad():
            leaf = embeddings.detach().clone().requires_grad_()
            states = policy.hidden(leaf, mask)[:, -_PROBE_TOKENS:]
            direction = torch.arange(states.numel()).cos().to(states).view_as(states)
            (gradient,) = torch.autograd.grad(states, leaf, direction)
        return gradient[:, -_PROBE_TOKENS:]

    if _relative_error(input_gradient(padded, padded_mask), input_gradient(embeddings, mask)) > tolerance:
        raise _refuse(policy, "has other gradients under left padding")
