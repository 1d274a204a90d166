"""Kernels of what torch.compile makes of a program for a GPU, counted on a machine without one.

Inductor lowers and fuses for a GPU that is described to it; only making machine code would need one. A kernel is then
what its scheduler would generate or call: fused operations, or a product or attention of a library.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.launch_counter import CUDA, H200, META, Counting

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

_NAMES: dict[str, Any] = dict(
    get_device_properties=lambda device=None: H200,
    is_available=lambda: True,
    current_device=lambda: 0,
    device_count=lambda: 1,
)


class Graphs:
    """What was compiled inside `compiled_by(found)`.

    Attributes:
        calls: of all the functions together.
        traced: by function, its operators as a graph, and what these are given.
    """

    def __init__(self, found: Counting, trace: bool):
        self._found, self._trace = found, trace
        self.calls = 0
        self.traced: dict[Callable, tuple[torch.fx.GraphModule, list[Tensor]]] = {}

    def compile(self, function: Callable, **options: Any) -> Callable:
        """In the place of torch.compile: the function as it stands, whose work is in the phase "graph"."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with mock.patch.object(torch.compiler, "is_compiling", lambda: True):
                if self._trace and function not in self.traced:
                    with self._found.uncounted():
                        self.traced[function] = _traced(lambda: function(*args, **kwargs))
                self.calls += 1
                with self._found.phase("graph"):
                    return function(*args, **kwargs)

        return call

    def kernels(self) -> int:
        """Of all the functions, each called once. Outside `counting`."""
        return sum(kernels(*each) for each in self.traced.values())


@contextlib.contextmanager
def compiled_by(found: Counting, *, trace: bool = True) -> Iterator[Graphs]:
    """Inside, torch.compile is that of `Graphs`.

    Args:
        trace: for their kernels.
    """
    graphs = Graphs(found, trace)
    with mock.patch.object(torch, "compile", graphs.compile):
        yield graphs


def _traced(call: Callable[[], Any]) -> tuple[torch.fx.GraphModule, list[Tensor]]:
    """The operators of a call, with inputs in the place of all tensors that they read, and these."""
    from torch._inductor.decomposition import select_decomp_table  # takes seconds
    from torch.fx.experimental.proxy_tensor import make_fx

    module = make_fx(call, decomposition_table=select_decomp_table())()
    module.graph.eliminate_dead_code()
    inputs: list[Tensor] = []
    for node in list(module.graph.nodes):
        if node.op == "get_attr":
            inputs.insert(0, getattr(module, node.target))
            with module.graph.inserting_before(next(iter(module.graph.nodes))):
                node.replace_all_uses_with(module.graph.placeholder(f"given_{len(inputs)}"))
            module.graph.erase_node(node)
    module.recompile()
    # As torch.compile has it: what is written in place is new until the end, where it is copied to its place.
    module = make_fx(torch.func.functionalize(module, remove="mutations"))(*inputs)
    module.graph.eliminate_dead_code()
    to_gpu(module)
    return module, inputs


def kernels(module: torch.fx.GraphModule, inputs: list[Tensor]) -> int:
    """That Inductor launches for a graph on a GPU."""
    from torch._inductor import config
    from torch._inductor.compile_fx import FakeTensorProp, _recursive_joint_graph_passes
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    with fake:
        given = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=CUDA) for t in inputs]
    # Folding constants would compute on the device.
    with config.patch(joint_graph_constant_folding=False), torch.no_grad():
        FakeTensorProp(module, mode=fake).propagate(*given)
        _recursive_joint_graph_passes(module)
        return scheduled(module, given, fake, is_inference=True)


def scheduled(
    module: torch.fx.GraphModule,
    given: Sequence[Any],
    fake: FakeTensorMode,
    *,
    is_inference: bool = False,
    is_backward: bool = False,
) -> int:
    """Kernels of a graph after its joint passes.

    Args:
        given: fake tensors on a GPU, and sizes.
        is_inference, is_backward: as Inductor takes them.
    """
    from torch._inductor.compile_fx import FakeTensorProp, _recursive_post_grad_passes, view_to_reshape
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes import reinplace
    from torch._inductor.graph import GraphLowering
    from torch._inductor.ir import MultiOutput
    from torch._inductor.virtualized import V

    # What a scatter is tried with, to see whether shapes fit, is the one operator that asks for a device.
    fits = mock.patch.object(reinplace, "_inplace_generalized_scatter", lambda into, *_: into)
    tracing = torch._guards.tracing(torch._guards.TracingContext(fake))
    with fits, torch.no_grad(), V.set_fake_mode(fake), tracing:
        view_to_reshape(module)
        FakeTensorProp(module, mode=fake).propagate(*given)
        _recursive_post_grad_passes(module, is_inference=is_inference)
        how: dict[str, Any] = {"is_inference": is_inference, "is_backward": is_backward}
        lowering = GraphLowering(module, example_inputs=given, shape_env=fake.shape_env, **how)
        with _described(), V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
            lowering.run(*given)
            lowering._update_scheduler()
    return sum(not isinstance(node.node, MultiOutput) for node in lowering.scheduler.nodes)


def to_gpu(module: torch.fx.GraphModule) -> None:
    """Let a graph's operators name a GPU where they name the meta device."""
    for node in module.graph.nodes:
        node.kwargs = {name: CUDA if value == META else value for name, value in node.kwargs.items()}
        node.args = tuple(CUDA if isinstance(value, torch.device) else value for value in node.args)
        node.meta.clear()
    module.recompile()


@contextlib.contextmanager
def _described() -> Iterator[None]:
    """Inside, Inductor finds an H200."""
    from torch._dynamo.device_interface import get_interface_for_device
    from torch.utils._triton import has_triton

    interface = get_interface_for_device("cuda")
    with ExitStack() as stack:
        has_triton.cache_clear()  # it keeps whether there is a GPU
        stack.callback(has_triton.cache_clear)
        for name, answer in _NAMES.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
            stack.enter_context(mock.patch.object(interface, name, staticmethod(answer)))
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: (9, 0)))
        stack.enter_context(
            mock.patch.object(interface, "get_compute_capability", staticmethod(lambda device=None: 90))
        )
        for name in ("get_device_properties", "current_device"):
            stack.enter_context(mock.patch.object(interface.Worker, name, staticmethod(_NAMES[name])))
        yield
