"""Measure that every way in which a run calls a model gives what its parallel pass gives.

A run decodes behind a cache (with padding, several samples of a prompt, rows that leave the batch), reads a prompt's
cache inside a graph, recomputes layers, and merges the adapter into the weights. What a model cannot do is found here,
before anything is trained on it: refused by name, or left out where a run can do without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any  # `policy` is a grade.model.policy.Policy, whose file needs this one

import torch
from torch import Tensor

from grade.errors import GradeError, reason_of
from grade.model.cache import repeat_rows
from grade.model.decoder import Decoder
from grade.model.probe import (
    PROBE_TOKENS,
    combination,
    input_gradient,
    probe_ids,
    refusal,
    relative_error,
    tolerance_of,
)

_COPIES = 2
_STEPS = 7
_DROP_AFTER = 3
# Of the adapter that probes merging, the norm of what it adds to a weight as a share of the weight's.
_ADAPTER_SHARE = 0.05


@torch.inference_mode()
def probe_decoding(policy: Any) -> None:
    """Decoding gives the states of a parallel pass: with and without padding, samples and rows that leave the batch.

    Raises:
        GradeError: it gives others.
    """
    error = decoding_error(policy, lambda *args, **sizes: Decoder(policy, *args, **sizes), drops_rows=True)
    if error > tolerance_of(policy.dtype):
        raise refusal(policy, "gives other hidden states from its KV cache than from a parallel pass")


def decoding_error(policy: Any, start: Callable[..., Decoder], *, drops_rows: bool) -> float:
    """Relative error of decoded states, against each response alone in one pass without padding or cache.

    Args:
        start: given prompt ids, their mask, `copies` and `steps`, a decoder.
        drops_rows: let the batch's second and third response of four leave it on the way.
    """
    found, expected = [], []
    for lengths in ((5, 3), (4,)):  # padded, and not
        prompts, mask, sequences = _sequences(policy, lengths)
        copies = len(sequences) // len(lengths)
        alone = [policy.hidden(policy.embed(ids)[None], None)[0, -_STEPS - 1 :] for ids in sequences]
        responses = torch.stack([ids[-_STEPS:] for ids in sequences])
        decoder = start(prompts, mask, copies=copies, steps=_STEPS)
        rows = torch.arange(len(sequences), device=policy.device)
        found.append(decoder.hidden.clone())
        expected += [states[0] for states in alone]
        for step in range(_STEPS):
            if drops_rows and step == _DROP_AFTER and len(rows) > 2:
                rows = rows[[0, -1]]
                decoder.keep(rows)
            found.append(decoder.feed(policy.embed(responses[rows, step])))
            expected += [alone[row][step + 1] for row in rows.tolist()]
    return relative_error(torch.cat(found), torch.stack(expected))


def _sequences(policy: Any, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Prompts of these lengths, [U, P] ids and mask, and for each two samples, [P_u + 7] ids without padding."""
    ids = probe_ids(policy)[0]
    width = max(lengths)
    prompts = torch.stack([ids.roll(shift)[:width] for shift in range(len(lengths))])
    mask = torch.arange(width, device=policy.device) >= torch.tensor([[width - n] for n in lengths]).to(policy.device)
    sequences = [
        torch.cat([prompts[u, width - length :], ids.roll(3 + _COPIES * u + copy)[:_STEPS]])
        for u, length in enumerate(lengths)
        for copy in range(_COPIES)
    ]
    return prompts, mask, sequences


@torch.inference_mode()
def probe_length(policy: Any, length: int) -> None:
    """A sequence as long as the run's longest: its beginning is what it is alone, and its end is decoded as computed.

    Some positions (longrope, dynamic NTK) mean another thing in a longer sequence, so keys in a cache would be those of
    a shorter one, and what is computed of a response would depend on the others in its batch.

    Args:
        length: positions of it.

    Raises:
        GradeError: the model cannot have sequences of this length.
    """
    tail = 3
    if length <= PROBE_TOKENS + tail:
        return
    tolerance = tolerance_of(policy.dtype)
    ids = (torch.arange(1, length + 1, device=policy.device) * 7919 % policy.embedding.shape[0])[None]
    embeddings = policy.embed(ids)
    hidden = policy.hidden(embeddings, None)
    if relative_error(hidden[:, :PROBE_TOKENS], policy.hidden(embeddings[:, :PROBE_TOKENS], None)) > tolerance:
        raise _length_refusal(policy, length)
    decoder = Decoder(policy, ids[:, :-tail], torch.ones_like(ids[:, :-tail], dtype=torch.bool), copies=1, steps=tail)
    states = [decoder.hidden, *(decoder.feed(embeddings[:, at]) for at in range(length - tail, length))]
    if relative_error(torch.stack(states, 1), hidden[:, -tail - 1 :]) > tolerance:
        raise refusal(
            policy, f"gives other hidden states from its KV cache than from a parallel pass over {length} positions"
        )


def _length_refusal(policy: Any, length: int) -> GradeError:
    rope = getattr(policy.config.get_text_config(), "rope_parameters", None) or {}
    switch = rope.get("original_max_position_embeddings")
    kind = f" (rope_type {rope['rope_type']})" if rope.get("rope_type") else ""
    most = f"to {switch} or less" if switch and switch < length else "until it is accepted"
    return GradeError(
        f"model.name: what a position means to this {type(policy.causal_lm).__name__} depends on the length of the "
        f"sequence{kind}, and changes within the {length} positions of this run's longest: what is sampled would not "
        "be what replay computes. Lower task.prompt_max_tokens + generation.max_new_tokens, and reward.max_tokens, "
        f"{most}, or choose another model."
    )


@torch.no_grad()
def probe_prompt_cache(policy: Any) -> tuple[bool, bool]:
    """(Whether a pass with a graph may read prompts' caches, as the base pass does where it can: same states, same
    gradient at the response. Whether these may be part of the graph, as in the policy's pass: same at the prompt, too.)

    Never where recurrent states are kept: layers overwrite them, which a graph notices, or start several tokens from
    none, whose error can be small enough to pass for rounding.
    """
    if any(hasattr(layer, "conv_states") for layer in policy.new_cache().layers):
        return False, False
    prompts, mask, sequences = _sequences(policy, (5, 3))
    responses = policy.embed(torch.stack([ids[-_STEPS:] for ids in sequences]))
    whole = torch.cat([mask, torch.ones_like(mask[:, :1]).expand(-1, _STEPS)], dim=1)
    whole = whole.repeat_interleave(_COPIES, dim=0)

    @torch.enable_grad()
    def result(cached: bool, graph: bool = True) -> tuple[Tensor, ...]:
        """The prompts' last states and the responses', gradients at the responses and, with `graph`, at the prompts."""
        leaf, before = (x.detach().clone().requires_grad_() for x in (responses, policy.embed(prompts)))
        if cached:
            cache = policy.new_cache()
            with torch.set_grad_enabled(graph):
                last = policy.hidden(before, mask, cache)[:, -1:].repeat_interleave(_COPIES, dim=0)
                repeat_rows(cache, _COPIES)
            states = torch.cat([last, policy.hidden(leaf, whole, cache)], dim=1)
        else:
            both = torch.cat([before.repeat_interleave(_COPIES, dim=0), leaf], dim=1)
            states = policy.hidden(both, whole)[:, -_STEPS - 1 :]
        at = [leaf, before] if graph else [leaf]
        return (states.detach(), *torch.autograd.grad(states, at, combination(states)))

    with policy.state(adapters=False):
        expected = result(cached=False)
        found = []
        for graph in (False, True):
            try:
                errors = [relative_error(b, a) for a, b in zip(expected, result(True, graph), strict=False)]
            except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, NotImplementedError):
                errors = [torch.inf]
            found.append(max(errors) <= tolerance_of(policy.dtype))
    return found[0], all(found)


@torch.no_grad()
def probe_merged(policy: Any) -> bool:
    """Whether the weights with an adapter added compute what they compute with the adapter beside them. Code that reads
    a weight past its layer, or shares it, does not. The adapter comes back as it was.

    Raises:
        GradeError: adapters change nothing at all.
    """
    embeddings = policy.embed(probe_ids(policy))
    with noticed_adapter(policy):
        beside = policy.hidden(embeddings, None)
        with policy.state(adapters=False):
            base = policy.hidden(embeddings, None)
        if torch.equal(base, beside):
            raise GradeError(
                f"model.lora.target_modules: no adapter there changes what this {type(policy.causal_lm).__name__} "
                "computes, so nothing would be trained. Name other layers."
            )
        if not all(layer.get_base_layer().weight.is_floating_point() for layer in policy.adapter_layers):
            return False  # there is nothing to add to
        with policy.merged():
            merged = policy.hidden(embeddings, None)
    return relative_error(merged, beside) <= tolerance_of(policy.dtype)


@contextmanager
def noticed_adapter(policy: Any) -> Iterator[None]:
    """Inside, the adapter adds to each weight a random matrix of a certain share of its norm."""
    layers = policy.adapter_layers
    matrices = [layer.lora_B[name].weight for layer in layers for name in layer.active_adapters]
    before = [matrix.data for matrix in matrices]
    generator = torch.Generator().manual_seed(0)
    try:
        for layer in layers:
            for name in layer.active_adapters:
                matrix = layer.lora_B[name].weight
                matrix.data = torch.randn(matrix.shape, generator=generator).to(matrix)
                weight, delta = layer.get_base_layer().weight, layer.get_delta_weight(name)
                # Packed numbers have no norm: taken is that of a layer that keeps lengths.
                size = weight.norm() if weight.is_floating_point() else delta.new_tensor(layer.out_features).sqrt()
                share = delta.norm() / size.clamp_min(1e-30)
                matrix.data = matrix.data * (_ADAPTER_SHARE / share.clamp_min(1e-30))
        yield
    finally:
        for matrix, data in zip(matrices, before, strict=True):
            matrix.data = data


def probe_recomputation(policy: Any) -> None:
    """Recomputed layers give the gradients of those that are not.

    Raises:
        GradeError: they give others, or cannot be recomputed.
    """
    embeddings = policy.embed(probe_ids(policy))
    mask = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=policy.device)
    plain = input_gradient(policy, embeddings, mask)
    reason = "has other gradients when its layers are computed again in backward"
    try:
        with policy.state(adapters=True, activation_checkpointing=True):
            recomputed = input_gradient(policy, embeddings, mask)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        recomputed, reason = plain * torch.nan, f"cannot compute its layers again in backward ({reason_of(error)})"
    if relative_error(recomputed, plain) > tolerance_of(policy.dtype):
        name = type(policy.causal_lm).__name__
        raise GradeError(f"method.activation_checkpointing: {name} {reason}. Set it to false.")
