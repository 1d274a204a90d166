"""Whether an adapter is put on the base that it was trained on: on another one with the same shapes it would load, and
mean nothing. A checkpoint of ours says in its manifest what the base's weights were; an adapter from elsewhere has but
the base's name.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from peft import PeftModel

from grade.errors import GradeError
from grade.hub_names import looks_local, name_anywhere
from grade.terminal import warn_once

_READ = 256  # values of each tensor: training moves some of them in every tensor that it moves


def base_digest(model: PeftModel) -> str | None:
    """SHA-256 over the shape and the first values of every tensor of the frozen base, in bfloat16: the same for a hub
    name and a folder, for float32 and bfloat16, on every device. None of a quantized base, whose values are packed."""
    tensors = [p.detach() for name, p in model.named_parameters() if ".lora_" not in name]
    if not all(tensor.is_floating_point() for tensor in tensors):
        return None
    first = [tensor.reshape(-1)[:_READ].to(torch.bfloat16) for tensor in tensors]
    values = torch.cat(first).cpu().view(torch.int16).split([len(part) for part in first])
    told = (f"{tuple(t.shape)} {part.numpy().tobytes().hex()}" for t, part in zip(tensors, values, strict=True))
    return hashlib.sha256("\n".join(sorted(told)).encode()).hexdigest()


def check_base(model: PeftModel, digest: str | None, name: Any, what: str, fix: str) -> None:
    """Refuse to put an adapter on another base than its own.

    Args:
        model: with the base that it is put on.
        digest: `base_digest` of its own base; None: it was not recorded.
        name: of its own base, if that was recorded.
        what, fix: of messages, as of `grade.model.checkpoint.put_adapter`.

    Raises:
        GradeError: the weights are others.
    """
    ours = None if digest is None else base_digest(model)
    if ours is not None and ours != digest:
        raise GradeError(
            f"{what} was trained on another base than this: on {name or 'one without a name'}, whose weights are not "
            f"those of {model.get_base_model().name_or_path or 'this model'}. {fix}"
        )


def check_base_name(name: str | None, ours: str, what: str, fix: str) -> None:
    """Compare the names of bases, where nothing else is known of an adapter's own.

    Args:
        name, ours: of the adapter's own base, and of the one that it is put on.

    Raises:
        GradeError: both are at the hub, and are different models there.
    """
    if not name or not ours or name_anywhere(name) == name_anywhere(ours):
        return
    elsewhere = not any(looks_local(each) or ":" in each for each in (name, ours))
    if elsewhere and name.rpartition("/")[2].casefold() != ours.rpartition("/")[2].casefold():
        raise GradeError(
            f"{what} was trained on {name}, and is put on {ours}: its weights would mean nothing there. {fix} If both "
            "are the same model, write the name into base_model_name_or_path of its adapter_config.json."
        )
    warn_once(
        f"warning: {what} was trained on {name}, and is put on {ours}. Nothing tells whether those are the same "
        "weights: if they are not, it means nothing there."
    )
