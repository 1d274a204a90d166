"""Kernels of layers that `train.compile` compiles, in a pass and in its backward, counted on a machine without a GPU.

torch.compile traces and partitions them as it does in a run. What runs is each graph's operators, which cost nothing on
the meta device, and its kernels are those that Inductor schedules for an H200 (`benchmarks/launch_graphs.py`).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from benchmarks.launch_counter import CUDA, Counting, Work, attention
from benchmarks.launch_graphs import scheduled, to_gpu
from grade.model.policy import Policy


class Half:
    """Of a layer in one kind of pass the forward, or the backward with or without the gradients of weights.

    Args:
        graph: its operators.
        inputs: fake tensors and sizes, as torch.compile gives them to Inductor.
        how: as Inductor takes it.
    """

    def __init__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any], **how: bool):
        self._graph, self._inputs, self._how = copy.deepcopy(graph), list(inputs), how
        self._kernels: int | None = None

    def kernels(self) -> int:
        """That Inductor launches for it on a GPU. Outside `counting`."""
        if self._kernels is None:
            fake: Any = torch._guards.detect_fake_mode(self._inputs)
            with fake:
                given = [_on_gpu(value) for value in self._inputs]
            to_gpu(self._graph)
            self._kernels = scheduled(self._graph, given, fake, **self._how)
        return self._kernels


def _on_gpu(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CUDA)


class Halves:
    """What was compiled inside `compiling_layers`, by the names under which calls are noted."""

    def __init__(self) -> None:
        self._by_name: dict[str, Half] = {}

    def add(self, half: Half) -> str:
        """Its name."""
        name = f"compiled {len(self._by_name) + 1}"
        self._by_name[name] = half
        return name

    def launches(self, work: Work) -> int:
        """Of work in which each call of a half was noted as one launch. Outside `counting`."""
        called = [name for name in self._by_name if work.operators[name]]
        return work.launches + sum(work.operators[name] * (self._by_name[name].kernels() - 1) for name in called)


@contextlib.contextmanager
def compiling_layers(policy: Policy, found: Counting) -> Iterator[Halves]:
    """Inside, which is inside `counting`, training's passes run compiled layers."""
    from torch._inductor import compile_fx, config  # takes seconds

    halves, compile_ = Halves(), torch.compile

    def half(graph: torch.fx.GraphModule, inputs: Sequence[Any], **how: Any) -> Callable:
        inference, backward = bool(how.get("is_inference")), bool(how.get("is_backward"))
        name = halves.add(Half(graph, inputs, is_inference=inference, is_backward=backward))

        def call(arguments: list[Any]) -> Any:
            read = [value for value in arguments if isinstance(value, Tensor)]
            with _uncounted():
                written = graph(*arguments)
                found.launched(name, read, [value for value in written if isinstance(value, Tensor)])
            arguments.clear()
            return written

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    def compiled(function: Callable, **options: Any) -> Callable:
        code = compile_(function, **options)

        def call(*args: Any, **kwargs: Any) -> Any:
            chosen = mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention)
            with _uncounted(), chosen:
                return code(*args, **kwargs)

        return call

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "compile", compiled))
        stack.enter_context(mock.patch.object(compile_fx, "compile_fx_inner", half))
        # Inductor takes what has no values for constants.
        stack.enter_context(config.patch(joint_graph_constant_folding=False))
        policy.switches.compile_layers()
        stack.callback(policy.switches.compile_layers, False)
        yield halves


@contextlib.contextmanager
def _uncounted() -> Iterator[None]:
    """Inside, tensors say where they are, and operators are not noted: torch.compile follows no mode."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield
