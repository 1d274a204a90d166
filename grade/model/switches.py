"""The switches of the shared weights: adapter, dropout and recomputation, for the forward that comes next.

They are module state, but activation checkpointing runs a forward again during backward, when the switches may stand
elsewhere. So every recomputed layer records the state of its own forward and puts it back for the recomputation
(`Switches.recomputation_contexts`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from grade.model.adapter import REFERENCE, TRAINED
from grade.model.compiled_layers import CompiledLayers


class State(NamedTuple):
    """What the next forward of the shared weights is: the policy, the base or, with the second adapter, the reference;
    with or without adapter dropout; its layers recomputed in backward or not, by compiled code or their own."""

    adapters: bool
    dropout: bool
    activation_checkpointing: bool = False
    reference: bool = False
    compiled: bool = False


class Switches:
    """Sets the layers of a model to a state.

    Args:
        adapter_layers: the layers that have an adapter.
        recomputable: the layers that transformers can compute again in backward.
        has_reference: whether the adapter layers have a second, frozen adapter, the reference.

    Attributes:
        state: what the next forward is.
    """

    def __init__(
        self,
        adapter_layers: Sequence[BaseTunerLayer],
        recomputable: Sequence[GradientCheckpointingLayer],
        has_reference: bool,
    ):
        self._adapter_layers, self._recomputable, self._has_reference = adapter_layers, recomputable, has_reference
        self.state = State(adapters=True, dropout=False)
        self._compiled: CompiledLayers | None = None

    def apply(self, state: State) -> None:
        """Let the next forward be of this state."""
        previous, self.state = self.state, state
        if self._compiled is not None:
            kind = (state.adapters, state.dropout, state.reference)
            self._compiled.follow(kind if state.compiled else None)
        as_before = dict(activation_checkpointing=previous.activation_checkpointing, compiled=previous.compiled)
        if state._replace(**as_before) != previous:
            for layer in self._adapter_layers:
                # Not set_adapter(): it also flips requires_grad, and autograd drops the gradients of a leaf whose flag
                # is down while a recomputation of the base runs inside its backward.
                if self._has_reference:
                    layer._active_adapter = [REFERENCE if state.reference else TRAINED]
                # Not enable_adapters(), for the same reason.
                layer._disable_adapters = not state.adapters
                for dropout in layer.lora_dropout.values():
                    dropout.train(state.dropout)
        if state.activation_checkpointing != previous.activation_checkpointing:
            # transformers checkpoints a layer only while its training flag is up. Raising it on the layer alone
            # leaves every module below it in eval mode; the layer's own code sees it down again (`_LayerState`).
            for layer in self._recomputable:
                layer.training = state.activation_checkpointing

    def compile_layers(self, wanted: bool = True) -> None:
        """Let layers of a state that is `compiled` run compiled code; what has been compiled before is dropped.

        Raises:
            GradeError: the layers cannot be compiled.
        """
        inner = {below for layer in self._recomputable for below in layer.modules() if below is not layer}
        outer = [layer for layer in self._recomputable if layer not in inner]
        self._compiled = CompiledLayers(outer) if wanted else None

    @property
    def compilations(self) -> int:
        """Graphs that have been compiled of layers."""
        return 0 if self._compiled is None else self._compiled.compilations

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Inside, layers run their own code, whatever the state."""
        compiled, self._compiled = self._compiled, None
        try:
            yield
        finally:
            self._compiled = compiled

    def gradients_of_inputs(self) -> AbstractContextManager:
        """A context for backward passes through compiled layers that need no gradient of a weight: they leave it out.
        Without compiled layers autograd does so by itself."""
        return nullcontext() if self._compiled is None else self._compiled.gradients_of_inputs()

    def recomputation_contexts(self) -> tuple[_LayerState, _LayerState]:
        """Contexts of a layer's forward and of its recomputation, which sees the state of that forward."""
        return _LayerState(self), _LayerState(self)


class _LayerState:
    """Inside a layer that is recomputed: the state in which it was called, training flags down (Falcon calls dropout
    with the layer's own flag). Entered for the forward, and again by every backward through a kept graph."""

    def __init__(self, switches: Switches):
        self._switches, self._own = switches, switches.state._replace(activation_checkpointing=False)
        self._previous: list[State] = []

    def __enter__(self) -> None:
        self._previous.append(self._switches.state)
        self._switches.apply(self._own)

    def __exit__(self, *_: object) -> None:
        self._switches.apply(self._previous.pop())
