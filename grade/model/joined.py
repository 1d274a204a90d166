"""Linear layers that read one tensor (queries, keys and values; gate and up) as one product, where there is no graph.

A token of a small batch costs its launches. The weights of such layers are laid below each other in memory, once, each
still a tensor of its own, and one product reads them all. Copies of their adapters lie beside them in the weights'
dtype, the first factors below each other, the second ones on the diagonal of one matrix: two products more, of which
the last adds to the first without rounding between them. Queries, keys and values with adapters take nine products
one by one, and a dozen operations besides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from grade.model.frozen_linear import FrozenLinear

_LINEAR = (nn.Linear, FrozenLinear)
"""Classes whose forward is known: a subclass may have one of its own."""
_JOINED_DTYPES = (torch.bfloat16, torch.float32)
"""float16 has too few exponents for the factors of a young adapter."""


class JoinedLayers:
    """The groups of a model's layers that read one tensor.

    Args:
        backbone: whose layers these are.
        call: runs the backbone once, on a few tokens; what reads one tensor in it does so in every pass.
    """

    def __init__(self, backbone: nn.Module, call: Callable[[], object]):
        self._groups = [_Group(modules) for modules in _reading_one_tensor(backbone, call)]

    def give_up(self) -> None:
        """Join none of them."""
        self._groups = []

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied model has none yet: its weights do not lie below each other, and these would be kept for nothing."""

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, passes without a graph and with adapters make one product of each group.

        A group stays as it is where a layer of it is hooked, replaced or merged by somebody else.
        """
        groups = [group for group in self._groups if group.is_free()]
        try:
            for group in groups:
                group.join()
            yield
        finally:
            for group in groups:
                group.part()


class _Group:
    """Layers that read one tensor, some of them with an adapter: `modules`, in the order in which they are called."""

    def __init__(self, modules: Sequence[nn.Module]):
        self._modules = modules
        self._linears = [_linear_of(module) for module in modules]
        self._adapted = [module for module in modules if isinstance(module, LoraLinear)]
        self._sizes = [linear.out_features for linear in self._linears]
        self._input: Tensor | None = None  # what the outputs are of, as long as not all are taken
        self._outputs: Sequence[Tensor] = ()
        self._left = 0
        with torch.inference_mode(False), torch.no_grad():
            self._weight, self._bias = self._stack()
            self._adapters = self._room()

    def _stack(self) -> tuple[Tensor, Tensor | None]:
        """Weights [O, d] and biases [O] below each other; each layer's own becomes a part of the first."""
        weight = torch.cat([linear.weight for linear in self._linears])
        for linear, part in zip(self._linears, weight.split(self._sizes), strict=True):
            linear.weight.data = part
        if all(linear.bias is None for linear in self._linears):
            return weight, None
        biases = [weight.new_zeros(n) if b is None else b for b, n in zip(self._biases(), self._sizes, strict=True)]
        return weight, torch.cat(biases)

    def _biases(self) -> list[Tensor | None]:
        return [linear.bias for linear in self._linears]

    def _room(self) -> tuple[Tensor, Tensor] | None:
        """Zeros for the adapters' factors [R, d] and [R, O]."""
        if not self._adapted:
            return None
        rank = sum(layer.r[name] for layer in self._adapted for name in layer.active_adapters)
        return self._weight.new_zeros(rank, self._weight.shape[1]), self._weight.new_zeros(rank, len(self._weight))

    def is_free(self) -> bool:
        """Whether nobody else has put something in the place of one of the layers, or listens to what it computes."""
        inside = [m for module in self._modules for m in module.modules() if m is not module]
        heard = any(m._forward_hooks or m._forward_pre_hooks for m in inside)
        places = self._weight.split(self._sizes)
        pairs = zip((linear.weight for linear in self._linears), places, strict=True)
        moved = any(weight.data_ptr() != place.data_ptr() for weight, place in pairs)
        replaced = any("forward" in vars(module) for module in self._modules)
        return not (heard or moved or replaced or any(layer.merged for layer in self._adapted))

    @torch.no_grad()
    def join(self) -> None:
        """Let the layers' forwards be parts of the group's, with the adapters as they are now."""
        if self._adapters is not None:
            first, second = self._adapters
            rank = column = 0
            layer: Any
            for layer, size in zip(self._modules, self._sizes, strict=True):
                for name in layer.active_adapters if isinstance(layer, LoraLinear) else ():
                    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
                    first[rank : rank + len(a)] = a
                    second[rank : rank + len(a), column : column + size] = b.T * layer.scaling[name]
                    rank += len(a)
                column += size
        for index, module in enumerate(self._modules):
            module.forward = self._forward(index, module.forward)

    def part(self) -> None:
        """Let the layers be as they were."""
        for module in self._modules:
            vars(module).pop("forward", None)
        self._input, self._outputs = None, ()

    def _forward(self, index: int, own: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self._input is not x:
                if args or kwargs or torch.is_grad_enabled() or not all(map(_computes_adapter, self._adapted)):
                    return own(x, *args, **kwargs)
                self._input, self._outputs, self._left = x, self._product(x), len(self._modules)
            found = self._outputs[index]
            self._left -= 1
            if self._left == 0:
                self._input, self._outputs = None, ()
            return found

        return forward

    def _product(self, x: Tensor) -> Sequence[Tensor]:
        """[..., d] -> the layers' outputs, parts of one tensor."""
        out = nn.functional.linear(x, self._weight, self._bias)
        if self._adapters is not None:
            first, second = self._adapters
            inner = nn.functional.linear(x, first)
            if torch.compiler.is_compiling():  # the sum is a part of what reads it then, and of no launch of its own
                out = out + inner @ second
            else:
                out.view(-1, out.shape[-1]).addmm_(inner.view(-1, len(first)), second)
        return out.split(self._sizes, -1)


def _computes_adapter(layer: LoraLinear) -> bool:
    """Whether its next forward has its adapter beside it, without dropout."""
    return not layer.disable_adapters and not any(dropout.training for dropout in layer.lora_dropout.values())


def _linear_of(module: nn.Module) -> nn.Linear:
    return module.base_layer if isinstance(module, LoraLinear) else module  # type: ignore[return-value]


def _reading_one_tensor(backbone: nn.Module, call: Callable[[], object]) -> list[list[nn.Module]]:
    """Layers that can be joined, group by group: several that read one tensor, or one with an adapter."""
    within = {inner for m in backbone.modules() if isinstance(m, LoraLinear) for inner in m.modules() if inner is not m}
    layers = [m for m in backbone.modules() if m not in within and (type(m) in _LINEAR or isinstance(m, LoraLinear))]
    read: list[tuple[Tensor, nn.Module]] = []  # the tensors too: a number of one that has gone is another's later
    hooks = [
        layer.register_forward_pre_hook(lambda module, args: read.append((args[0], module)) if args else None)
        for layer in layers
    ]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    calls = Counter(module for _, module in read)
    readers = Counter(_address(p) for m in backbone.modules() for p in m.parameters(recurse=False))
    groups: dict[tuple, list[nn.Module]] = {}
    for x, module in read:
        weight = _linear_of(module).weight
        if calls[module] == 1 and _can_be_joined(module) and readers[_address(weight)] == 1:
            groups.setdefault((id(x), weight.dtype, weight.device), []).append(module)
    return [group for group in groups.values() if len(group) > 1 or isinstance(group[0], LoraLinear)]


def _address(weight: Tensor) -> int:
    on_meta = weight.untyped_storage().data_ptr() == 0  # where there is none
    return id(weight) if on_meta else weight.data_ptr()


def _can_be_joined(module: nn.Module) -> bool:
    """Whether it computes a product with a frozen weight and, where it has an adapter, a plain product beside it."""
    linear = _linear_of(module)
    if type(linear) not in _LINEAR or linear.weight.requires_grad or linear.weight.dtype not in _JOINED_DTYPES:
        return False
    if not isinstance(module, LoraLinear):
        return True
    return not (
        module.fan_in_fan_out
        or any(module.use_dora.values())
        or any(module.lora_variant)
        or any(factor.bias is not None for factor in module.lora_B.values())
    )
