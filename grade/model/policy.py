"""The policy: one causal language model seen twice, with its adapter on (policy) and off (frozen base).

This is the whole contract between `grade` and transformers. A model fits when
    hidden = backbone(inputs_embeds=X, attention_mask, position_ids)       # after the final norm
    logits = cap * tanh((scale * hidden @ W^T + bias) / cap)               # cap, bias optional
    X      = embedding_scale * E[ids]
holds; `grade.model.probe` measures that it does, and finds `scale`, `cap` and `embedding_scale`, before any run.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from grade.errors import GradeError, reason_of
from grade.model.adapter import REFERENCE
from grade.model.backbone import backbone_of, frozen_copy
from grade.model.cache import decoding_cache, is_recurrent
from grade.model.end_of_sequence import end_ids
from grade.model.frozen_linear import quicken
from grade.model.joined import JoinedLayers
from grade.model.masks import known_padding
from grade.model.probe import check_finite, probe_embedding, probe_head, probe_passes
from grade.model.probe_decoding import (
    probe_decoding,
    probe_length,
    probe_merged,
    probe_prompt_cache,
    probe_recomputation,
)
from grade.model.sharding import Sharding
from grade.model.switches import State, Switches
from grade_kernels import Head

_Together = Callable[[], AbstractContextManager]


class Policy:
    """A peft model with the pieces replay needs.

    Args:
        model: `PeftModel` around a transformers causal language model, whose adapter is trained; or the language model
            itself: every weight of its backbone is then trained but head and embedding table, which replay shares with
            the base, and the base is a frozen copy of the rest.
        tokenizer: its tokenizer.
        probe: measure on a few tokens that the model fits the contract above, and that every way in which a run calls
            it agrees with a parallel pass. Costs a few dozen tiny forwards.
        length: positions of the longest sequence of the run, which the probe tries once too; 0: no such try.
        sharding: of the base's layers over processes, which then make all passes together; None: they are whole here.

    Attributes:
        backbone: the transformer without its head.
        frozen_backbone: the base's, where the backbone's own weights are trained; None where an adapter is.
        modules: all that holds weights.
        cache_name: what the backbone calls its cache; None where it takes none, which the probe refuses.
        adapter_layers: the layers that have one.
        switches: what the next forward is, and whether layers are compiled.
        has_reference: whether a second, frozen adapter is the reference (`grade.model.adapter.add_reference`), and not
            the base.
        started_from: SHA-256 of the adapter that it went on from; None: it began as the base.
        given: whether a program gave the model as an object, which no setting names.
        reads_prompt_cache: whether a pass with a graph may read a prompt's cache (see `grade.model.passes`).
        keeps_prompt_graph: whether gradients also flow through such a cache to what the prompt was computed from.
        embedding: [V, d] input table; `embedding_scale` multiplies its rows.
        head: weight [V, d], bias, logit scale and soft cap.
        suppressed: [n] int64, ids the tokenizer does not know (padding of the vocabulary); never sampled.
        eos_ids: [m] int64, ids that end a response.

    Raises:
        GradeError: the model does something between embedding and logits that replay would get wrong.
    """

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        probe: bool = True,
        length: int = 0,
        sharding: Sharding | None = None,
    ):
        self.model, self.tokenizer, self.sharding = model, tokenizer, sharding
        self.causal_lm: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self.config = self.causal_lm.config
        self.backbone = backbone_of(self.causal_lm)
        self.frozen_backbone = None if isinstance(model, PeftModel) else frozen_copy(self.causal_lm, self.backbone)
        self.modules = nn.ModuleList(m for m in (self.model, self.frozen_backbone) if m is not None)
        if sharding is None:
            quicken(self.modules)
        self._names = frozenset(inspect.signature(self.backbone.forward).parameters)
        # transformers 5.24 renamed `past_key_values`, in Mamba `cache_params`, and warns at the old names.
        self.cache_name = next(filter(self.takes, ("cache", "past_key_values", "cache_params")), None)
        self.adapter_layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
        self.has_reference = isinstance(model, PeftModel) and REFERENCE in model.peft_config
        self.started_from: str | None = None
        self.given = False
        self._recomputable = [m for m in self.modules.modules() if isinstance(m, GradientCheckpointingLayer)]
        self.switches = Switches(self.adapter_layers, self._recomputable, self.has_reference)
        model.eval()

        head, table = self.causal_lm.get_output_embeddings(), self.causal_lm.get_input_embeddings()
        if head is None or isinstance(head, BaseTunerLayer) or isinstance(table, BaseTunerLayer):
            raise GradeError(
                "model.lora.target_modules (or model.adapter) reaches the head or the embedding, or the model has no "
                "head: replay shares both with the frozen base. Adapt inner layers only."
            )
        self.embedding, self.embedding_scale = table.weight.detach(), 1.0
        bias = getattr(head, "bias", None)
        self.head = Head(head.weight.detach(), None if bias is None else bias.detach())
        self.reads_prompt_cache = self.keeps_prompt_graph = self._merges = True
        self.probed = probe
        self.joined: JoinedLayers | None = None  # made at the first use of `grade.model.decoding`
        if probe:
            self._probe(length)

        known = torch.tensor(sorted(set(tokenizer.get_vocab().values())))
        unknown = torch.ones(self.vocab_size, dtype=torch.bool)
        unknown[known[known < self.vocab_size]] = False
        self.suppressed = unknown.nonzero().squeeze(1).to(self.device)
        ends = end_ids(self.causal_lm, tokenizer, self.vocab_size)
        self.eos_ids = torch.tensor(list(ends), dtype=torch.int64, device=self.device)
        # Pad only fills positions that masks exclude, so any id will do; eos may double as pad.
        pad = tokenizer.pad_token_id
        self.pad_id = pad if pad is not None and 0 <= pad < len(self.embedding) else int(self.eos_ids[0])

    def _probe(self, length: int) -> None:
        check_finite(self)
        try:
            self.embedding_scale = probe_embedding(self)
            scale, softcap = probe_head(self)
            self.head = replace(self.head, scale=scale, softcap=softcap)
            probe_passes(self)
            probe_decoding(self)
            if length:
                probe_length(self, length)
            self.reads_prompt_cache, self.keeps_prompt_graph = probe_prompt_cache(self)
            self._merges = self.trains_all or (self.sharding is None and probe_merged(self))
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
            raise GradeError(
                f"model.name: {type(self.causal_lm).__name__} cannot run the passes that replay needs "
                f"({reason_of(error)}). Choose another model."
            ) from error

    @property
    def trains_all(self) -> bool:
        """Whether the backbone's own weights are trained, and not an adapter."""
        return self.frozen_backbone is not None

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def vocab_size(self) -> int:
        return self.head.weight.shape[0]

    def going_on(self, wanted: bool) -> bool:
        """Whether a loop of passes goes on: where this process wants it or, as all processes or none pass through
        sharded layers, any of them."""
        return wanted if self.sharding is None else self.sharding.any_process(wanted)

    def parts_failing_together(self, together: _Together) -> tuple[_Together, _Together]:
        """(context of a loop of passes, context of a part of it), in which a reward that fails in one process does in
        all (`grade.processes.failing_together`): behind the loop or, as all processes or none pass through sharded
        layers, behind every part."""
        return (together, nullcontext) if self.sharding is None else (nullcontext, together)

    def parameters(self) -> list[torch.nn.Parameter]:
        """The trainable parameters, in a fixed order."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def takes(self, name: str) -> bool:
        """Whether the backbone's signature names this argument; what it takes beside them it may ignore."""
        return name in self._names

    def embed(self, ids: Tensor) -> Tensor:
        """[...] ids -> [..., d], what the model itself feeds for them."""
        return torch.nn.functional.embedding(ids, self.embedding) * self.embedding_scale

    def new_cache(self, capacity: int | None = None) -> DynamicCache:
        """An empty KV cache. With `capacity` it is written in place: room for as many positions, and no graph."""
        config = self.config.get_text_config()
        return DynamicCache(config=config) if capacity is None else decoding_cache(config, capacity)

    def hidden(
        self, embeddings: Tensor, mask: Tensor | None, cache: DynamicCache | None = None, *, padded: bool = True
    ) -> Tensor:
        """Final hidden states of `embeddings`, under the current state.

        Args:
            embeddings: [B, T, d], the last T positions of the sequence; earlier ones are in `cache`.
            mask: [B, T_past + T] bool, real positions of the whole sequence; left padding is fine. None: all are.
            cache: grows in place by T positions.
            padded: whether a padding position may stand before a real one. False saves the mask of its attention, and
                leaves open what the states at padding are.

        Returns:
            [B, T, d].
        """
        batch, length = embeddings.shape[:2]
        positions = None
        if cache is not None and is_recurrent(cache):
            mask = None if mask is None else mask[:, -length:]  # there are no earlier positions to be seen
        if not self.takes("position_ids"):
            pass
        elif mask is None:
            past = 0 if cache is None else cache.get_seq_length()
            positions = torch.arange(past, past + length, device=embeddings.device).expand(batch, -1)
        else:
            positions = (mask.long().cumsum(dim=1) - 1).clamp_min(0)[:, -length:]
        if mask is None:
            return self.forward(embeddings, None, positions, cache)
        with known_padding(self.backbone.config, padded):
            return self.forward(embeddings, mask.long(), positions, cache)

    def forward(
        self, embeddings: Tensor, mask: Tensor | None, positions: Tensor | None, cache: Cache | None = None
    ) -> Tensor:
        """The backbone's final hidden states [B, T, d], by the names that its signature has for what it is given.

        Args:
            mask: [B, T_past + T] int64, or a mask of its attention's own shape.
            positions: [B, T] int64, ignored by a model that finds them itself.
        """
        given = {"inputs_embeds": embeddings, "attention_mask": mask, "use_cache": cache is not None}
        if self.cache_name is not None:
            given[self.cache_name] = cache
        if self.takes("position_ids"):
            given["position_ids"] = positions
        backbone = self.backbone
        if self.frozen_backbone is not None and not self.switches.state.adapters:
            backbone = self.frozen_backbone
        return backbone(**given).last_hidden_state

    # -- state -----------------------------------------------------------------------------------------------

    @contextmanager
    def state(
        self,
        *,
        adapters: bool,
        dropout: bool = False,
        activation_checkpointing: bool = False,
        reference: bool = False,
        compiled: bool = False,
    ) -> Iterator[None]:
        """Run forwards as the policy (`adapters=True`) or as the frozen base.

        Args:
            reference: run them as what KL is measured to, whatever `adapters` is: the second adapter, or the base.
            dropout: adapter dropout on. Every other dropout is always off.
            activation_checkpointing: recompute these forwards' layers in backward (after
                `enable_activation_checkpointing`).
            compiled: run these forwards' layers, and the backward passes through them, as compiled code (after
                `Switches.compile_layers`).
        """
        previous = self.switches.state
        if reference:
            adapters, dropout = self.has_reference, False
        reference = reference and self.has_reference
        self.switches.apply(State(adapters, dropout, activation_checkpointing, reference, compiled))
        try:
            yield
        finally:
            self.switches.apply(previous)

    @property
    def merges(self) -> bool:
        """Whether the model computes with an adapter added to its weights what it computes with the adapter beside
        them: it reads each of these weights through its layer, and no other module reads it. Not of sharded layers."""
        if self.sharding is not None:
            return False
        weights = [layer.get_base_layer().weight for layer in self.adapter_layers]
        readers = Counter(w.data_ptr() for m in self.model.modules() for w in m.parameters(recurse=False))
        return self._merges and not any(readers[weight.data_ptr()] > 1 for weight in weights)

    def merged_weights(self) -> list[torch.nn.Parameter]:
        """The weights of which `merged` makes copies.

        An empty list if they are 16-bit, since rounding to them would lose what a small adapter changes, or if the
        model does not compute the same with them (`merges`).
        """
        weights = [layer.get_base_layer().weight for layer in self.adapter_layers]
        return weights if self.merges and all(weight.dtype.itemsize >= 4 for weight in weights) else []

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Run forwards as the policy with its adapter added to the weights, which saves two products a layer and token.

        Without a graph, and exact up to rounding. The base weights come back to the bit: they are set aside, not
        subtracted from. Where there are no `merged_weights` the adapter stays beside them.
        """
        kept = self.merged_weights()
        before = [weight.data for weight in kept]
        with self.state(adapters=not kept):
            try:
                with torch.no_grad():
                    for layer, weight in zip(self.adapter_layers if kept else [], kept, strict=True):
                        weight.data = sum((layer.get_delta_weight(name) for name in layer.active_adapters), weight.data)
                yield
            finally:
                for weight, data in zip(kept, before, strict=True):
                    weight.data = data

    @property
    def supports_activation_checkpointing(self) -> bool:
        """Whether the architecture has layers that transformers can compute again in backward."""
        return bool(self._recomputable) and self.causal_lm.supports_gradient_checkpointing

    def enable_activation_checkpointing(self) -> None:
        """Let `state(activation_checkpointing=True)` recompute layers in backward.

        Raises:
            GradeError: the architecture has no such layers, or they give other gradients.
        """
        if not self.supports_activation_checkpointing:
            raise GradeError(
                f"method.activation_checkpointing: {type(self.causal_lm).__name__} has no layers that transformers "
                "can checkpoint. Set it to false."
            )
        for part in filter(None, (self.causal_lm, self.frozen_backbone)):
            enable = getattr(part, "activation_checkpointing_enable", None)  # transformers >= 5.20
            enable = enable or part.gradient_checkpointing_enable
            enable({"use_reentrant": False, "context_fn": self.switches.recomputation_contexts})
        probe_recomputation(self)
