"""A run's policy as a folder for other programs: the adapter by itself, or a whole model with the adapter merged in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from grade.errors import GradeError, reason_of, writing
from grade.files import check_writable, replaced_folder
from grade.model.checkpoint import CARD_FILE, copy_adapter, save_tokenizer, verified_step
from grade.model.frozen_linear import unquicken
from grade.model.policy import Policy
from grade.model.quantization import quantization_of


class Merged(NamedTuple):
    """What a merged model computes, and how far it is from the adapter beside its base.

    Attributes:
        logits: [T, V] of each prompt, on the CPU.
        from_adapter: largest difference of a logit to the policy with its adapter beside the weights.
        of_training: largest difference of a logit between that policy and the base model.
    """

    logits: list[Tensor]
    from_adapter: float
    of_training: float


def check_target(target: Path, setting: str = "--to") -> None:
    """Refuse a folder that holds something, or cannot be written, before any work.

    Raises:
        GradeError: naming it.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        kind = "a folder that is not empty" if target.is_dir() else "a file"
        raise GradeError(f"{setting}: {target} is {kind}, and nothing is overwritten. Name another one.")
    check_writable(setting, target)


def export_adapter(checkpoint: Path, target: Path, setting: str = "--to") -> None:
    """Write a checkpoint without the trainer's state: adapter, tokenizer, card.

    Args:
        checkpoint: its folder.
        target: missing or empty.

    Raises:
        GradeError: the checkpoint is damaged, or the target cannot be written.
    """
    check_target(target, setting)
    verified_step(checkpoint)
    with writing(target, setting), replaced_folder(target) as fresh:
        copy_adapter(checkpoint, fresh)


def export_merged(
    load: Callable[[], Policy],
    target: Path,
    prompts: Callable[[object], Sequence[Sequence[int]]],
    card: str,
    setting: str = "--to",
) -> Merged:
    """Write a plain transformers folder, load it again and compare: it must compute, to the bit, what was merged.

    Args:
        load: gives the policy, of which nothing is kept while the folder is loaded.
        target: missing or empty.
        prompts: given the tokenizer, token ids of a few texts.
        card: the model card.

    Raises:
        GradeError: the adapter cannot be merged, the target cannot be written, or holds something else in the end;
            nothing of it is then left.
    """
    check_target(target, setting)
    with writing(target, setting), replaced_folder(target) as fresh:
        again, merged, rows = _write(load(), fresh, prompts, card)
        try:
            written = logits_of(again(fresh), rows)
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
            raise GradeError(f"{setting}: what was written cannot be loaded ({reason_of(error)}).") from error
        wrong = _largest(written, merged.logits)
        if wrong or any(a.dtype != b.dtype for a, b in zip(written, merged.logits, strict=True)):
            raise GradeError(
                f"{setting}: what was written does not compute what was merged (a logit differs by {wrong:g}), and is "
                "deleted. Export without --merge; please report the model."
            )
    return merged


def _write(
    policy: Policy, folder: Path, prompts: Callable[[object], Sequence[Sequence[int]]], card: str
) -> tuple[Callable[[Path], torch.nn.Module], Merged, Sequence[Sequence[int]]]:
    """Write the folder; how to load it, what it must compute, on which ids."""
    model, device, rows = policy.causal_lm, policy.device, prompts(policy.tokenizer)
    options = {"attn_implementation": policy.config._attn_implementation}
    if getattr(policy.config, "auto_map", None):  # its code has run here, by the user's word
        options["trust_remote_code"] = True
    merged = merge(policy, rows)
    model.save_pretrained(str(folder))
    save_tokenizer(policy.tokenizer, folder)
    (folder / CARD_FILE).write_text(card, encoding="utf-8", errors="backslashreplace")

    def again(place: Path) -> torch.nn.Module:
        found: Any = AutoModelForCausalLM.from_pretrained(str(place), local_files_only=True, **options)
        return found.to(device).eval().requires_grad_(False)  # torch has convolutions of its own for what is trained

    return again, merged, rows


def merge(policy: Policy, prompts: Sequence[Sequence[int]]) -> Merged:
    """Add the adapter to the weights of `policy.causal_lm`, which is a plain transformers model then, in its dtype and
    with the generation config of the run: it ends where the run's responses did. The policy is used up.

    A sum is rounded once, from float32 or better. What of a small adapter is lost in 16 bits, the result tells.

    Raises:
        GradeError: the model does not compute the same with merged weights.
    """
    if policy.trains_all:
        raise GradeError(
            "--merge: model.finetuning=full has no adapter to merge: its checkpoint is a whole model. Export it "
            "without --merge."
        )
    bits = quantization_of(policy.causal_lm)
    if bits is not None:
        raise GradeError(
            f"--merge: the base is quantized (model.quantization={bits}), and its weights have no room for an adapter. "
            "Export the adapter without --merge, or merge it into the whole weights with --model.quantization null."
        )
    if not policy.merges:
        raise GradeError(
            f"--merge: {type(policy.causal_lm).__name__} shares the adapted weights between modules, or reads them "
            "past their layers: it would compute something else. Export the adapter without --merge."
        )
    with policy.state(adapters=False):
        base = logits_of(policy.causal_lm, prompts)
    beside = logits_of(policy.causal_lm, prompts)
    with torch.no_grad():
        layers: list[Any] = list(policy.adapter_layers)
        for layer in layers:
            weight = layer.get_base_layer().weight
            exact = torch.promote_types(weight.dtype, torch.float32)
            added = [layer.get_delta_weight(name).to(exact) for name in layer.active_adapters]
            weight.data = sum(added, weight.data.to(exact)).to(weight.dtype)
    plain: Any = policy.model.unload()
    unquicken(plain)
    generation: Any = getattr(plain, "generation_config", None)
    if generation is not None:
        ends = policy.eos_ids.tolist()
        generation.eos_token_id = ends if len(ends) > 1 else ends[0]
        generation.pad_token_id = policy.pad_id
        try:
            generation.validate(strict=True)
        except ValueError:  # settings of a sampler without do_sample, which transformers reads and does not write
            generation.do_sample = True
    logits = logits_of(plain, prompts)
    return Merged(logits, _largest(logits, beside), _largest(beside, base))


@torch.no_grad()
def logits_of(model: Any, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """[T, V] for each prompt, on the CPU; each by itself, so that no padding is read."""
    device = model.get_input_embeddings().weight.device
    rows = (torch.tensor([list(prompt)], device=device) for prompt in prompts)
    return [model(input_ids=row, use_cache=False).logits[0].cpu() for row in rows]


def _largest(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    pairs = zip(first, second, strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)
