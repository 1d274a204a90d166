"""Measure on a few tokens that a model is what `grade.model.policy` takes it for.

Architectures differ in what surrounds the transformer: Gemma scales embeddings (in the embedding module or in the
forward, depending on the transformers version), Gemma-2 soft-caps logits, Cohere and Granite scale them. Each probe
runs the model's own code on both sides of a claim and compares, so a model that does something else is refused by
name instead of being trained on a wrong gradient.
"""

from __future__ import annotations

import math
from typing import Any  # `policy` is a grade.model.policy.Policy, whose file needs this one

import torch
from torch import Tensor
from transformers import PretrainedConfig

from grade.errors import GradeError, reason_of

PROBE_TOKENS = 12
_PROBE_ROWS = 4096  # of the head: a few thousand logits settle its shape without a float32 copy of all of it


def tolerance_of(dtype: torch.dtype) -> float:
    """Largest relative error that rounding explains: a few hundred ulps, accumulated through the layers, but never
    so much that a wrong model passes (300 ulps of bfloat16 are 2.3)."""
    return min(max(300 * torch.finfo(dtype).eps, 1e-5), 0.1)


def relative_error(value: Tensor, expected: Tensor) -> float:
    """inf where either holds a NaN, which no tolerance would catch."""
    value, expected = value.double(), expected.double()
    error = ((value - expected).norm() / expected.norm().clamp_min(1e-300)).item()
    return math.inf if math.isnan(error) else error


def refusal(policy: Any, reason: str) -> GradeError:
    return GradeError(
        f"model.name: {type(policy.causal_lm).__name__} {reason}, so replay would compute wrong gradients for it. "
        "Choose another model."
    )


def probe_ids(policy: Any) -> Tensor:
    """[1, n] ids spread over the vocabulary, the same every time."""
    return torch.arange(1, PROBE_TOKENS + 1, device=policy.device)[None] * 7919 % policy.embedding.shape[0]


def check_finite(policy: Any) -> None:
    """Raises:
    GradeError: a weight is NaN or infinite, and everything computed from it: no probe could say why.
    """
    for name, weight in policy.model.named_parameters():
        if weight.is_floating_point() and not _is_finite(weight.detach()):
            name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            raise GradeError(
                f"model.name: the weight {name} of this {type(policy.causal_lm).__name__} holds values that are NaN or "
                "infinite: its files are damaged, or too large for model.dtype. Mend them, or choose another model."
            )


def _is_finite(weight: Tensor) -> bool:
    """By their sum, which needs no second tensor; a sum that is not may still be one of finite numbers."""
    total = weight.sum(dtype=torch.promote_types(weight.dtype, torch.float32))
    return bool(total.isfinite()) or bool(weight.isfinite().all())


@torch.no_grad()
def probe_embedding(policy: Any) -> float:
    """The factor c with embedding_module(ids) = c * E[ids].

    Raises:
        GradeError: the embedding module is no scaled table.
    """
    ids = probe_ids(policy)
    out, rows = policy.causal_lm.get_input_embeddings()(ids), policy.embedding[ids]
    if torch.equal(out, rows):
        return 1.0
    scale = (out.double() * rows.double()).sum().item() / rows.double().square().sum().item()
    # The scale is stored in the table's dtype, so rounding it there gives the very product the model computes.
    scale = torch.tensor(scale).to(rows.dtype).item()
    if relative_error(rows * scale, out) > 2 * torch.finfo(rows.dtype).eps:
        raise refusal(policy, "does more in its input embedding than scale the rows of a table")
    return scale


@torch.no_grad()
def probe_head(policy: Any) -> tuple[float, float | None]:
    """Logit scale and soft-cap, found by handing the model's own head hidden states of our choice.

    Returns:
        (scale, cap): logits = cap * tanh((scale * hidden @ W^T + bias) / cap); cap is None where nothing is capped.

    Raises:
        GradeError: the head does something else.
    """
    generator = torch.Generator().manual_seed(0)
    width = policy.head.weight.shape[1]
    unit = torch.randn(1, PROBE_TOKENS, width, generator=generator).to(policy.device)
    weight = policy.head.weight[:_PROBE_ROWS].to(torch.promote_types(policy.dtype, torch.float32))
    unit = unit.to(weight.dtype)
    typical = (unit[0, :1] @ weight.T).std().item()
    if typical == 0:
        raise refusal(policy, "has a head of zeros, or of one row only")
    tolerance = tolerance_of(policy.dtype)

    def compare(magnitude: float) -> tuple[Tensor, Tensor]:
        """The model's logits and the bare product, for hidden states that give logits of this magnitude."""
        hidden = (unit * (magnitude / typical)).to(policy.dtype)
        own = _logits_of_hidden(policy, hidden)[..., :_PROBE_ROWS]
        return own.to(weight.dtype), hidden.to(weight.dtype) @ weight.T

    bias = 0.0 if policy.head.bias is None else policy.head.bias[:_PROBE_ROWS].to(weight.dtype)
    logits, product = compare(0.05)  # small enough that a cap of 1 or more is still a straight line
    scale = (((logits - bias) * product).sum() / product.square().sum()).item()
    known = [1.0, getattr(policy.config, "logit_scale", None), _inverse(policy.config, "logits_scaling")]
    nearest = min((x for x in known if x is not None), key=lambda x: abs(scale - x))
    if abs(scale - nearest) <= 1e-2 * abs(nearest):
        scale = nearest  # the fit carries rounding; the config's number does not
    logits, product = compare(60.0)
    straight = scale * product + bias
    if relative_error(straight, logits) < tolerance:
        return scale, None
    config = policy.config.get_text_config()
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):  # Gemma's, Griffin's, xLSTM's
        cap = getattr(config, name, None)
        if cap and relative_error(cap * torch.tanh(straight / cap), logits) < tolerance:
            return scale, float(cap)
    raise refusal(policy, "does more in its head than a matrix product, a scale and a soft-cap")


def _inverse(config: PretrainedConfig, name: str) -> float | None:
    value = getattr(config, name, None)
    return 1.0 / value if value else None


def _logits_of_hidden(policy: Any, hidden: Tensor) -> Tensor:
    """The model's logits if its backbone had returned `hidden` [1, n, d]."""

    replaced = []

    def replace(module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        replaced.append(True)
        output.last_hidden_state = hidden
        return output

    handle = policy.backbone.register_forward_hook(replace, with_kwargs=True)
    try:
        logits = policy.causal_lm(input_ids=probe_ids(policy), use_cache=False).logits
    finally:
        handle.remove()
    if not replaced:
        raise refusal(policy, "calls no model inside it that gives the hidden states of its head")
    return logits


@torch.no_grad()
def probe_passes(policy: Any) -> None:
    """Embeddings stand for ids, later tokens do not reach back, padding changes nothing, no gradient either.

    Raises:
        GradeError: naming the claim that fails.
    """
    missing = [name for name in ("inputs_embeds", "attention_mask") if not policy.takes(name)]
    if policy.cache_name is None:
        missing.append("cache of earlier positions")
    if missing:
        raise refusal(policy, f"takes no {' and no '.join(missing)}")
    ids, tolerance = probe_ids(policy), tolerance_of(policy.dtype)
    embeddings = policy.embed(ids)
    mask = torch.ones_like(ids, dtype=torch.bool)
    own = policy.backbone(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
    try:
        hidden = policy.hidden(embeddings, mask, padded=False)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        reason = reason_of(error)
        raise refusal(policy, f"reads the ids beside their embeddings, or cannot do without ({reason})") from error
    if not torch.equal(embeddings, policy.embed(ids)):
        raise refusal(policy, "writes into the embeddings that it is given")
    if not hidden.isfinite().all():
        raise refusal(policy, f"gives hidden states that are NaN or infinite in model.dtype={policy.dtype}")
    if relative_error(hidden, own) > tolerance:
        raise refusal(policy, "gives other hidden states for inputs_embeds than for the same input_ids")

    changed = embeddings.clone()
    changed[:, -1] = -changed[:, -1]
    if relative_error(policy.hidden(changed, mask)[:, :-1], hidden[:, :-1]) > tolerance:
        raise refusal(policy, "lets a token change the hidden states before it: it is not causal")

    padded = torch.cat([embeddings[:, :3], embeddings], dim=1)
    padded_mask = torch.cat([torch.zeros_like(mask[:, :3]), mask], dim=1)
    if relative_error(policy.hidden(padded, padded_mask)[:, 3:], hidden) > tolerance:
        raise refusal(policy, "gives other hidden states under left padding")
    followed = torch.cat([embeddings, embeddings[:, :3]], dim=1)
    followed_mask = torch.cat([mask, torch.zeros_like(mask[:, :3])], dim=1)
    if relative_error(policy.hidden(followed, followed_mask, padded=False)[:, :-3], hidden) > tolerance:
        raise refusal(policy, "gives other hidden states before padding")
    under_padding = input_gradient(policy, padded, padded_mask)
    if relative_error(under_padding, input_gradient(policy, embeddings, mask)) > tolerance:
        raise refusal(policy, "has other gradients under left padding")


def input_gradient(policy: Any, embeddings: Tensor, mask: Tensor) -> Tensor:
    """[B, n, d], the gradient of a fixed combination of the last n = 12 states at their embeddings."""
    with torch.enable_grad():
        leaf = embeddings.detach().clone().requires_grad_()
        states = policy.hidden(leaf, mask)[:, -PROBE_TOKENS:]
        (gradient,) = torch.autograd.grad(states, leaf, combination(states))
    return gradient[:, -PROBE_TOKENS:]


def combination(states: Tensor) -> Tensor:
    """Fixed weights of every one of these numbers, to differentiate their sum."""
    return torch.arange(states.numel(), device=states.device).cos().to(states.dtype).view_as(states)
