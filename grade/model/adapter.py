"""The adapter that a policy goes on from (`model.adapter`), and the frozen second one that may be its reference.

peft knows many kinds of adapters. Taken are plain LoRA ones, whose whole effect is a product added to linear layers:
that is what sampling merges, what checkpoints hold, and what is switched off for the base.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel, PeftType

from grade.config import LoraSettings
from grade.errors import GradeError, reason_of
from grade.hub_names import looks_local

TRAINED, REFERENCE = "default", "reference"
"""Names of the adapters in a policy's peft model; the second is there with `model.reference: initial` only."""

_KEPT = (
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "fan_in_fan_out",
)
_REFUSED = (
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "use_dora",
    "lora_bias",
    "use_qalora",
    "alora_invocation_tokens",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "megatron_config",
)
"""What changes more of a model than linear layers, or otherwise than by a product."""
_OF_OTHER_WEIGHTS = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Initialisations that change the base, on which alone such an adapter means what it was trained to."""


def adapter_folder(name: str) -> Path:
    """The folder of the adapter that `model.adapter` names, fetched from the hub if it is no path.

    Raises:
        GradeError: there is no adapter.
    """
    if looks_local(name):
        folder = Path(name).expanduser()
        if not (folder / "adapter_config.json").is_file():
            run = folder / "checkpoints" / "best"
            hint = f"It is a run: name {run}." if run.is_dir() else "Name a folder that peft wrote, or a checkpoint."
            raise GradeError(f"model.adapter={name}: there is no adapter here (adapter_config.json is missing). {hint}")
        return folder
    try:
        folder = Path(snapshot_download(name, allow_patterns=["adapter_config.json", "adapter_model.*"]))
    except Exception as error:  # of any class: of the network, of its cache, of what the hub answers
        raise GradeError(
            f"model.adapter={name} cannot be loaded: {reason_of(error).rstrip('.')}. Name a folder with an adapter, or "
            "an adapter of the hub while it can be reached (`grade doctor` tells)."
        ) from error
    if not (folder / "adapter_config.json").is_file():
        raise GradeError(f"model.adapter={name} is no adapter: it has no adapter_config.json. Name one.")
    return folder


def settings_of(name: str, folder: Path, lora: LoraSettings) -> LoraConfig:
    """An adapter's own settings, with the dropout of `lora`.

    Args:
        name: model.adapter, for messages.
        lora: r, alpha and target_modules may be left at their defaults, or must be the adapter's.

    Raises:
        GradeError: the adapter is of another kind, or `lora` says something else.
    """
    try:
        saved = LoraConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise GradeError(f"model.adapter={name}: adapter_config.json is damaged ({reason_of(error)}).") from error
    if saved.peft_type != PeftType.LORA:
        raise GradeError(f"model.adapter={name} is of the kind {saved.peft_type}. Name a LoRA adapter.")
    more = more_than_lora(saved)
    if more:
        raise GradeError(
            f"model.adapter={name} is more than a LoRA adapter of linear layers ({', '.join(more)} in "
            "adapter_config.json), which cannot be switched off beside a frozen base. Merge it into its base (peft's "
            "merge_and_unload), save that, and name its folder as model.name."
        )
    default, theirs = LoraSettings(), saved.target_modules
    for setting, ours, own, unset in (
        ("r", lora.r, saved.r, default.r),
        ("alpha", lora.alpha, saved.lora_alpha, default.alpha),
        (
            "target_modules",
            set(lora.target_modules),
            theirs if isinstance(theirs, str) else set(theirs or ()),
            set(default.target_modules),
        ),
    ):
        if ours not in (unset, own):
            shown = [", ".join(sorted(x)) if isinstance(x, set) else x for x in (ours, own)]
            raise GradeError(
                f"model.lora.{setting} is {shown[0]}, but model.adapter={name} has {shown[1]}, and its weights mean "
                "nothing else. Leave model.lora out, or set it to the adapter's."
            )
    return LoraConfig(**kept_settings(saved), lora_dropout=lora.dropout, task_type="CAUSAL_LM")


def kept_settings(settings: LoraConfig) -> dict[str, Any]:
    """What decides where an adapter's weights go and how they count."""
    return {field: getattr(settings, field) for field in _KEPT if hasattr(settings, field)}


def more_than_lora(settings: LoraConfig) -> list[str]:
    """What makes an adapter more than products added to linear layers of an unchanged base; empty for a plain one."""
    more = [field for field in _REFUSED if getattr(settings, field, None)]
    more += [] if settings.bias == "none" else ["bias"]
    start = str(settings.init_lora_weights).lower()
    return more + ([start] if start.startswith(_OF_OTHER_WEIGHTS) else [])


def add_reference(model: PeftModel) -> None:
    """Keep the trained adapter as it is now, frozen, as a second one: `Policy` makes it the reference.

    Without a state of its own, peft's switches would freeze and unfreeze the two by turns; the policy's do not.
    """
    settings = deepcopy(model.peft_config[TRAINED])
    settings.inference_mode = True
    trained = [p for p in model.parameters() if p.requires_grad]
    model.add_adapter(REFERENCE, settings)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, parameter in parameters.items():
            if f".{REFERENCE}." in key:
                parameter.copy_(parameters[key.replace(f".{REFERENCE}.", f".{TRAINED}.")])
                parameter.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
