"""The transformer below the head of a causal language model: which module it is, and a frozen copy of it."""

from __future__ import annotations

from contextlib import suppress
from copy import deepcopy

import torch
from torch import nn
from transformers import PreTrainedModel


@torch.no_grad()
def backbone_of(causal_lm: PreTrainedModel) -> nn.Module:
    """The outermost model that a forward of `causal_lm` calls: what its head reads. It need not be its `base_model`, in
    OPT that is never called, in Llama-4 it is `causal_lm` itself."""
    called = []
    inner = [m for m in causal_lm.modules() if isinstance(m, PreTrainedModel) and m is not causal_lm]
    hooks = [m.register_forward_pre_hook(lambda module, args: called.append(module)) for m in inner]
    expected = suppress(RuntimeError, TypeError, ValueError, AttributeError, IndexError)  # the probe says the same
    try:
        with expected:
            causal_lm(input_ids=torch.ones(1, 2, dtype=torch.int64, device=causal_lm.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return called[0] if called else causal_lm.base_model


def frozen_copy(causal_lm: PreTrainedModel, backbone: nn.Module) -> nn.Module:
    """The backbone as it is now, frozen, with the same embedding table; what is left of the original is trainable."""
    head, table = causal_lm.get_output_embeddings(), causal_lm.get_input_embeddings()
    shared = [p for module in (head, table) if module is not None for p in module.parameters()]
    copied = deepcopy(backbone, {id(p): p for p in shared}).requires_grad_(False).eval()
    causal_lm.requires_grad_(False)
    backbone.requires_grad_(True)
    for parameter in shared:
        parameter.requires_grad_(False)
    return copied
