"""The frozen base's decoder layers, sharded over the processes of a run (`model.fsdp`): PyTorch's FSDP2.

Every process keeps its share of each layer and gathers a layer's weights for as long as a pass is in it. What stays
whole in every process is the embedding table, the head and the last norm, which sampling, the sweep over the vocabulary
and every hop read from end to end, and the adapter: its gradients are summed once an update, as without sharding, and
the base has none. So the passes of replay send no gradients, only weights.

A pass waits for the other processes, so all of them must make the same ones, in the same order. Loops whose end depends
on a process' own responses ask `Sharding.any_process` whether another goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from grade.errors import GradeError, reason_of
from grade.model.adapter_base import base_of, remember_base
from grade.model.backbone import backbone_of
from grade.processes import any_process, everywhere, main_process_first, shared

ON_META = {"": "meta"}
"""The device map of a model without memory for its weights."""


@dataclass(frozen=True)
class Sharding:
    """The processes that share a base.

    Args:
        accelerator: of more than one process.
    """

    accelerator: Accelerator

    def any_process(self, wanted: bool) -> bool:
        """Whether any process wants something."""
        return any_process(self.accelerator, wanted)

    def largest(self, value: float) -> float:
        """The largest of the processes' values."""
        return max(everywhere(self.accelerator, value))


def load_sharded(load: Callable[..., tuple[PreTrainedModel, Any]], accelerator: Accelerator) -> PreTrainedModel:
    """A base whose decoder layers lie sharded on the processes' devices.

    The main process alone reads weights, into its machine's memory, and sends them tensor by tensor; the others build
    the model without memory for them. So no device ever holds more than its share and one tensor.

    Args:
        load: given further arguments of `from_pretrained`, the frozen model and what else there is to say of it; it
            refuses a model that cannot be used.

    Raises:
        GradeError: in every process: the model cannot be loaded, or not be sharded.
    """
    main = accelerator.is_main_process
    with main_process_first(accelerator):
        base, _ = load() if main else load(device_map=ON_META)
        base.requires_grad_(False)
        layers = decoder_layers(base)
        known = base_of(base) if main else None
    names = {id(module): name for name, module in base.named_modules()}
    backbone = base.get_submodule(shared(accelerator, names[id(backbone_of(base))]))
    known = shared(accelerator, known)
    if known is not None:
        remember_base(base, known)
    whole = {name: tensor.detach() for name, tensor in base.state_dict().items()} if main else {}
    try:
        _shard(base, backbone, layers, accelerator)
        _fill(base, whole, accelerator.device)
    except (RuntimeError, ValueError, NotImplementedError, AssertionError) as error:
        raise GradeError(
            f"model.fsdp: {type(base).__name__} cannot be sharded ({reason_of(error)}). Set it to false, or choose "
            "another model."
        ) from error
    return base


def decoder_layers(base: PreTrainedModel) -> list[nn.Module]:
    """The modules of which transformers says that a device holds them whole, without those inside others.

    Raises:
        GradeError: it names none.
    """
    names = set(getattr(base, "_no_split_modules", None) or ())
    inner: set[int] = set()
    found = []
    for module in base.modules():
        if id(module) not in inner and type(module).__name__ in names and any(True for _ in module.parameters()):
            found.append(module)
            inner |= {id(below) for below in module.modules()}
    if not found:
        raise GradeError(
            f"model.fsdp: transformers does not say what the layers of {type(base).__name__} are. Set it to false, or "
            "choose another model."
        )
    return found


def _shard(base: PreTrainedModel, backbone: nn.Module, layers: list[nn.Module], accelerator: Accelerator) -> None:
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    of_layers = {id(p) for layer in layers for p in layer.parameters()}
    whole = {p for p in base.parameters() if id(p) not in of_layers}
    units: list[Any] = [fully_shard(layer, mesh=mesh, reshard_after_forward=True) for layer in layers]
    fully_shard(backbone, mesh=mesh, ignored_params=whole)  # the root: it holds no weights, and ends every pass
    # By themselves they would fetch what the last pass of any kind suggests, and in a repeated backward pass nothing.
    for before, unit in zip(units, units[1:], strict=False):
        before.set_modules_to_forward_prefetch([unit])
        unit.set_modules_to_backward_prefetch([before])
    units[0].set_modules_to_backward_prefetch([units[0]])


def _fill(base: PreTrainedModel, whole: dict[str, Any], device: torch.device) -> None:
    """Put the main process' weights and buffers in every process' place for them.

    Args:
        whole: the main process' weights by name; empty in the others.
    """
    if whole:
        base.to(device)
    else:
        base.to_empty(device=device)
        base.tie_weights()  # as the main process' are
    set_model_state_dict(base, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for buffer in base.buffers():  # some are in no state dictionary
        torch.distributed.broadcast(buffer, 0)
