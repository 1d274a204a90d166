"""Whether an adapter is put on the base that it was trained on: on another one with the same shapes it would load, and
mean nothing. A checkpoint of ours says in its manifest what the base's weights were, and which transformers had laid
them out in memory; an adapter from elsewhere has but the base's name.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import transformers
from peft import PeftModel
from torch import nn

from grade.errors import GradeError
from grade.hub_names import looks_local, name_anywhere
from grade.terminal import warn_once

_READ = 256  # values of each tensor: training moves some of them in every tensor that it moves


class Base(NamedTuple):
    """The frozen base of an adapter, as a manifest has it.

    Args:
        sha256: over the shape and the first values of every tensor, in bfloat16: the same for a hub name and a folder,
            for float32 and bfloat16, on every device.
        transformers: version by which it was loaded. Another may join or split tensors, and so give the same weights
            another sum. None: not recorded.
    """

    sha256: str
    transformers: str | None


_KNOWN: WeakKeyDictionary[nn.Module, Base] = WeakKeyDictionary()


def remember_base(model: nn.Module, base: Base) -> None:
    """Say what `base_of` answers for a model without an adapter, and for one with: its weights will not all be here."""
    _KNOWN[model] = base


def base_of(model: nn.Module) -> Base | None:
    """The base of a model, with an adapter or without; None of a quantized one, whose values are packed."""
    known = _KNOWN.get(model.get_base_model() if isinstance(model, PeftModel) else model)
    if known is not None:
        return known
    tensors = [p.detach() for name, p in model.named_parameters() if ".lora_" not in name]
    if not all(tensor.is_floating_point() for tensor in tensors):
        return None
    first = [tensor.reshape(-1)[:_READ].to(torch.bfloat16) for tensor in tensors]
    values = torch.cat(first).cpu().view(torch.int16).split([len(part) for part in first])
    told = (f"{tuple(t.shape)} {part.numpy().tobytes().hex()}" for t, part in zip(tensors, values, strict=True))
    return Base(hashlib.sha256("\n".join(sorted(told)).encode()).hexdigest(), transformers.__version__)


def check_base(model: PeftModel, base: Base | None, name: Any, what: str, fix: str) -> None:
    """Refuse to put an adapter on another base than its own.

    Args:
        model: with the base that it is put on.
        base: its own; None: it was not recorded.
        name: of its own base, if that was recorded.
        what, fix: of messages, as of `grade.model.checkpoint.put_adapter`.

    Raises:
        GradeError: the weights are others, and the same transformers has loaded them.
    """
    ours = None if base is None else base_of(model)
    if base is None or ours is None or ours.sha256 == base.sha256:
        return
    theirs, here = name or "one without a name", model.get_base_model().name_or_path or "this model"
    if base.transformers not in (None, ours.transformers):
        warn_once(
            f"warning: {what} was trained on {theirs} with transformers {base.transformers}, and is put on {here} with "
            f"{ours.transformers}. The weights do not look the same; that may come of how the versions lay them out. "
            "If they are not the same, it means nothing there."
        )
        return
    raise GradeError(
        f"{what} was trained on another base than this: on {theirs}, whose weights are not those of {here}. {fix}"
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
