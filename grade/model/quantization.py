"""`model.quantization`: the frozen base's linear layers in 4 or 8 bits by bitsandbytes; head and table stay whole.

Sampling and replay must compute the same for a response whatever shares its batch. So 8 bits are plain ones: LLM.int8()
would besides compute columns with a large number (of any row) apart, which lets one response change another.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from grade.config import ModelConfig
from grade.errors import GradeError, reason_of

_TOKENS = 4


def loading_options(model: ModelConfig, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` is given beside the rest; nothing without model.quantization.

    Raises:
        GradeError: bitsandbytes is not installed.
    """
    if model.quantization is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise GradeError(
            f"model.quantization={model.quantization} needs bitsandbytes, which is not installed. Install it (pip "
            "install bitsandbytes), or set model.quantization to null."
        )
    # It says of every layer that its input is cast.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    how = BitsAndBytesConfig(
        load_in_4bit=model.quantization == "4bit",
        load_in_8bit=model.quantization == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=getattr(torch, model.dtype),
        llm_int8_threshold=0.0,
    )
    return {"quantization_config": how, "device_map": {"": device}}  # such a model cannot be moved later


def quantization_of(loaded: PreTrainedModel) -> str | None:
    """ "4bit" or "8bit" of a loaded model, None where its weights are whole."""
    return next((bits for bits in ("4bit", "8bit") if getattr(loaded, f"is_loaded_in_{bits}", False)), None)


def check_quantized(base: PreTrainedModel, model: ModelConfig) -> None:
    """Refuse a quantized base of which nothing is quantized, or through which no gradient comes back on this device.

    Raises:
        GradeError: with the reason.
    """
    name = f"model.quantization={model.quantization}"
    if all(p.is_floating_point() for p in base.parameters()):
        raise GradeError(f"{name}: no layer of this {type(base).__name__} is quantized. Set it to null.")
    table: Any = base.get_input_embeddings()
    embeddings = table.weight[:_TOKENS].detach()[None].clone().requires_grad_()
    reason = "its gradient is not finite"
    try:
        with torch.enable_grad():
            logits = base(inputs_embeds=embeddings, use_cache=False).logits
            (gradient,) = torch.autograd.grad(logits.float().square().mean(), embeddings)
        sound = bool(gradient.isfinite().all())
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, OSError) as error:
        sound, reason = False, reason_of(error)
    if not sound:
        raise GradeError(
            f"{name}: no gradient comes back through this {type(base).__name__} on {base.device.type} ({reason}), and "
            "replay needs it. Set model.quantization to null, or use another device."
        )
