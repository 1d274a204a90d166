"""`train.compile`: a model's layers in training's passes, as code that is compiled once for all layers of a kind.

A layer is a hundred small operations, and a step of replay passes through each in two forwards, a backward for every
hop and one more for the adapter. Compiled they are the matrix products and a few fused kernels. Layers of one class
differ in their weights alone, which are inputs of the code, and so do batches in their sizes: it is compiled once for
each kind of pass (policy, base, behind a prompt's cache, ...), and not once a layer or a length.

Three things that PyTorch would do otherwise:

- A hop asks for the gradient at what was fed and for no weight's, nor for that at the prompt's keys and values. Eager
  autograd then leaves these out, compiled code has them all. So of each backward there is a second one without them,
  taken inside `gradients_of_inputs`.
- A hop keeps the graph for the next, so a backward may not overwrite what its forward saved.
- A cache is Python's own object, which holds all layers' keys, and code that reads it is compiled for one layer. What a
  layer gets here holds the keys and values of that layer (`Held`), or takes them for it (`Filled`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from grade.errors import GradeError
from grade.model.compiler import explained
from grade.model.inductor import take_quicker_products, vector_options

MOST_KINDS = 4
"""Kinds of layers of which one pass may be made; more means that each is compiled for itself."""


class Held:
    """Stands for the cache in a compiled layer that reads the keys and values of earlier positions, and keeps none.

    Args:
        keys, values: [B, heads, T_past, size] each.
    """

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """[B, heads, T, size] each -> [B, heads, T_past + T, size] each."""
        return torch.cat([self.keys, keys], dim=-2), torch.cat([self.values, values], dim=-2)


class Filled:
    """Stands for the empty cache in a compiled layer, which is given the keys and values [B, heads, T, size] each."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        self.keys, self.values = keys, values
        return keys, values


class CompiledLayers:
    """Puts compiled code in the place of layers' `forward`, for as long as a pass wants it.

    Args:
        layers: transformers' `GradientCheckpointingLayer`s that a pass goes through, of which none is inside another.

    Attributes:
        compilations: graphs so far.

    Raises:
        GradeError: there are no layers, or code of others stands in their place.
    """

    def __init__(self, layers: Sequence[GradientCheckpointingLayer]):
        if not layers:
            raise failed("transformers does not say what the layers of this model are")
        if any("forward" in vars(layer) for layer in layers):
            raise failed("the forward of its layers has been replaced")
        for layer in layers:  # on the layer itself, where it may change without changing what code was compiled for
            layer.gradient_checkpointing = bool(layer.gradient_checkpointing)
        self.compilations = 0
        self._calls = {layer: partial(self._run, layer, _number_of(layer)) for layer in layers}
        self._compiled: dict[_Kind, Callable[..., Any]] = {}
        self._kinds: dict[_Kind, int] = {}
        self._recomputed: dict[GradientCheckpointingLayer, bool] = {}
        self._pass: Hashable = None
        self._inputs: dict[Tensor, Tensor] = {}  # of this pass
        # Read by the threads in which autograd runs the backward of a GPU: neither theirs nor a context's own.
        self._inputs_only = False
        # Compiled with it, a backward refuses to keep its graph; it is asked for when it runs, too.
        torch._functorch.config.donated_buffer = False

    def follow(self, kind: Hashable | None) -> None:
        """Let the next pass be compiled as one of this kind; None: let layers run their own code."""
        if kind == self._pass:
            return
        self._inputs.clear()
        if kind is None or self._pass is None:
            for layer, call in self._calls.items():
                if kind is None:
                    del layer.forward
                    if self._recomputed[layer]:
                        layer.gradient_checkpointing = True
                else:  # `_run` asks for the recomputation, so that the code is the same with and without
                    self._recomputed[layer] = bool(layer.gradient_checkpointing)
                    if self._recomputed[layer]:
                        layer.gradient_checkpointing = False
                    layer.forward = call
        self._pass = kind

    @contextmanager
    def gradients_of_inputs(self) -> Iterator[None]:
        """Inside, backward passes leave out the gradients of weights and of a cache."""
        before, self._inputs_only = self._inputs_only, True
        try:
            yield
        finally:
            self._inputs_only = before

    def _run(self, layer: GradientCheckpointingLayer, number: int | None, *args: Any, **kwargs: Any) -> Any:
        """What `layer` computes of what its model gives it."""
        values, cache, read = [], None, None
        for name, value in [*(("", value) for value in args), *kwargs.items()]:
            if isinstance(value, Cache):
                cache, value = value, _held(value, number)
                if value is None:  # it keeps something else
                    return type(layer).forward(layer, *args, **kwargs)
                read = value
            values.append(self._input(name, value))
        args, kwargs = tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :], strict=True))
        masked = kwargs.get("attention_mask") is not None
        call = partial(self._code(_Kind(self._pass, type(read), masked, torch.is_grad_enabled())), layer)
        if isinstance(read, Filled):
            out = call(*args, **kwargs)
            if cache is not None and number is not None and read.keys is not None and read.values is not None:
                cache.layers[number].update(read.keys, read.values)
            return out
        if layer.training and self._recomputed[layer] and torch.is_grad_enabled():
            again: Any = layer._gradient_checkpointing_func
            return again(partial(call, **kwargs), *args)
        return call(*args, **kwargs)

    def _input(self, name: str, value: Any) -> Any:
        """`value` as a layer is given it, such that code for one batch is code for all.

        Sizes that follow from the batch are left open. Code is also compiled for strides, and for the tensor that a
        view is of, so what needs no gradient is handed over contiguous and as no view. All layers of a pass are given
        the same masks and positions, which are copied once.
        """
        if isinstance(value, (tuple, list)):
            return type(value)([self._input(name, part) for part in value])
        if isinstance(value, Held):
            for tensor in (value.keys, value.values):
                _leave_open(tensor, (0, 2))
        if not isinstance(value, Tensor):
            return value
        if value.requires_grad:
            plain = value.clone() if value._is_view() else value
        else:
            plain = self._inputs[value] if value in self._inputs else value.detach().contiguous().data
        features = value.is_floating_point() and "mask" not in name and value.ndim > 2
        _leave_open(plain, (0, 1) if features else range(value.ndim))
        if name not in ("", "hidden_states"):  # every layer's own, which would be kept for the whole pass
            self._inputs[value] = plain
        return plain

    def _code(self, kind: _Kind) -> Callable[..., Any]:
        """The compiled code of layers in a pass of this kind."""
        if kind not in self._compiled:
            # torch counts what it has compiled of a code object, and gives up after some.
            own = FunctionType(_forward.__code__.replace(), _forward.__globals__, "layer")
            compiled = torch.compile(own, backend=partial(self._compile, kind), fullgraph=True)
            self._compiled[kind] = _explained(compiled)
        return self._compiled[kind]

    def _compile(self, kind: _Kind, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """torch.compile's backend: Inductor, with a second backward where weights have gradients."""
        from torch._inductor.compile_fx import compile_fx  # takes seconds, and is torch's own affair

        self.compilations += 1
        self._kinds[kind] = self._kinds.get(kind, 0) + 1
        if self._kinds[kind] > 2 * MOST_KINDS:  # twice, as a size of 1 is compiled for itself
            raise RuntimeError("its layers differ so much that each would be compiled for itself")
        given = [node for node in graph.graph.nodes if node.op == "placeholder"]
        spared = [isinstance(node.meta.get("example_value"), nn.Parameter) or _is_held(node) for node in given]
        half: Any = partial(self._compile_half, spared if kind.cache is not Filled else [])
        patches: dict[str, Any] = dict(vector_options())
        if torch.are_deterministic_algorithms_enabled():
            patches["deterministic"] = True
        # Autograd's cache on disk would keep one of the two backwards. Inductor's own keeps the code of both.
        with torch._functorch.config.patch(enable_autograd_cache=False):
            compiled: Any = compile_fx(graph, inputs, inner_compile=half, config_patches=patches)
        return compiled

    def _compile_half(
        self, spared: Sequence[bool], graph: torch.fx.GraphModule, inputs: Sequence[Any], **how: Any
    ) -> Callable[..., Any]:
        """A forward, or a backward and the same without the gradients that hops do not ask for.

        Args:
            spared: at which of the inputs of the forward, whose gradients a backward returns in their order; none of
                what no hop passes through.
        """
        from torch._inductor.compile_fx import compile_fx_inner

        take_quicker_products(graph)
        if not how.get("is_backward"):
            return compile_fx_inner(graph, inputs, **how)
        fewer = copy.deepcopy(graph)
        (output,) = (node for node in fewer.graph.nodes if node.op == "output")
        gradients = list(output.args[0])
        if len(gradients) != len(spared) or not any(
            spare and gradient is not None for spare, gradient in zip(spared, gradients, strict=True)
        ):
            return compile_fx_inner(graph, inputs, **how)
        left = [None if spare else gradient for spare, gradient in zip(spared, gradients, strict=True)]
        output.args = (type(output.args[0])(left),)
        fewer.graph.eliminate_dead_code()
        fewer.recompile()
        whole, part = compile_fx_inner(graph, inputs, **how), compile_fx_inner(fewer, inputs, **how)

        def backward(arguments: list[Any]) -> Any:
            return (part if self._inputs_only else whole)(arguments)

        backward._boxed_call = True  # type: ignore[attr-defined]
        return backward


class _Kind(NamedTuple):
    """Of a pass; layers of one are compiled together.

    Attributes:
        state: what `CompiledLayers.follow` was told.
        cache: what stands for it, `Held`, `Filled` or None's type.
    """

    state: Hashable
    cache: type
    masked: bool
    graph: bool


def _forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


def _number_of(layer: nn.Module) -> int | None:
    """The layer's number in a cache; None where it keeps nothing there, or at several places."""
    numbers = {n for m in layer.modules() if isinstance(n := getattr(m, "layer_idx", None), int)}
    return numbers.pop() if len(numbers) == 1 else None


def _held(cache: Cache, number: int | None) -> Held | Filled | None:
    """What a layer's code reads of a cache, or what it fills; None where it has to be given the cache itself."""
    if number is None or number >= len(cache.layers):
        return None
    layer = cache.layers[number]
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        return None
    return Held(layer.keys, layer.values) if layer.is_initialized else Filled()


def _is_held(node: torch.fx.Node) -> bool:
    """Whether an input of a graph is the keys or the values of a `Held`, the one object whose attributes are inputs."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    return getattr(source, "member", None) in ("keys", "values")


def _leave_open(tensor: Tensor, dims: Iterable[int]) -> None:
    for dim in dims:
        if tensor.shape[dim] > 1:  # a size of 1 is another code in any case
            torch._dynamo.maybe_mark_dynamic(tensor, dim)


def failed(reason: str) -> GradeError:
    """Why layers cannot be compiled, and what to do."""
    return GradeError(f"train.compile: {reason}. Set train.compile=false.")


def _explained(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The same; a failure of torch.compile is a GradeError that says what to do."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with explained("train.compile"):
            return compiled(*args, **kwargs)

    return call
