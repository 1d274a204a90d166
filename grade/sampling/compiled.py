"""`rollout.compile`: decoding by one compiled step over a static KV cache, in CUDA graphs on a GPU.

A token of a small batch is hundreds of small operations that cost more to launch than to run. Shapes must not change
for them to be recorded, so the cache has its final length from the start, a mask says how far it is filled, and
rows that have ended stay in the batch. On a CPU nothing is recorded, and the step is compiled for every length that
the mask may have: attention reads the filled part only.

On a GPU the draw is a few kernels of ours already; from a packed head, on a CPU, it is a hundred operations on [B, k],
so it is compiled too.

Before compiled code runs, torch compares all that it was compiled for (hundreds of comparisons, a tenth of a token of
a small model). From one token of a rollout to the next only numbers change, so it compares at the first one.
"""

from __future__ import annotations

import math
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from grade.errors import GradeError, reason_of
from grade.model.compiler import compiler_failure, explained
from grade.model.decoding import decoding
from grade.model.inductor import vector_options
from grade.model.policy import Policy
from grade.model.probe import tolerance_of
from grade.model.probe_decoding import decoding_error
from grade.sampling.decode import Decoder, Decoding
from grade.sampling.draw import Sampling, draw_from_product
from grade.sampling.few_rows import weight_first
from grade.sampling.grouped_attention import grouped_attention
from grade.sampling.packed_head import made_at_once
from grade_kernels import SparseTokens

_SETTING = "rollout.compile"
# Prompts differ in length, and every other capacity is compiled anew.
_CAPACITY_STEP = 64
# Caches that are kept, one a number of rows. A step's rollouts have two: the full ones', and the rest's.
MOST_CACHES = 2


def capacity_of(length: int) -> int:
    """Positions of a cache for `length` of them."""
    return -(-length // _CAPACITY_STEP) * _CAPACITY_STEP


class CompiledDecoding(Decoding):
    """What one rollout leaves to the next: the compiled step, and the caches whose addresses it has recorded.

    Raises:
        GradeError: the policy's attention needs another kind of mask or cache, or there is no compiler.
    """

    drops_rows = False

    def __init__(self, policy: Policy):
        super().__init__(policy)
        config = policy.config.get_text_config()
        kinds = {type(layer).__name__ for layer in policy.new_cache().layers if type(layer) is not DynamicLayer}
        if kinds:
            kinds = set(getattr(config, "layer_types", None) or kinds) - {"full_attention"}
            raise GradeError(
                f"rollout.compile: {type(policy.causal_lm).__name__} has layers that keep something else than all "
                f"earlier positions ({', '.join(sorted(kinds))}), for which the compiled step has no cache. Set "
                "rollout.compile=false."
            )
        attention = getattr(config, "_attn_implementation", None)
        if attention != "sdpa":
            raise GradeError(
                f"rollout.compile: model.attn_implementation is {attention}, and the compiled step masks its cache as "
                "sdpa does. Set model.attn_implementation=sdpa, or rollout.compile=false."
            )
        if getattr(config, "alibi", False):
            raise GradeError(
                f"rollout.compile: {type(policy.causal_lm).__name__} makes its positions (alibi) from another kind of "
                "mask. Set rollout.compile=false."
            )
        if not hasattr(StaticLayer(1), "cumulative_length"):
            raise GradeError(
                "rollout.compile: this version of transformers counts a static cache's positions in a way that cannot "
                "be compiled. Install a newer one (5.23 was tested), or set rollout.compile=false."
            )
        if policy.device.type == "cpu":
            try:
                _find_compiler()
            except (RuntimeError, OSError) as error:
                raise compiler_failure(_SETTING, error) from error
        self._config = config
        self._caches: dict[int, StaticCache] = {}  # by their rows, the one used last at the end
        self._drawn_from: set[tuple[torch.Size, torch.Size]] = set()  # shapes, in this rollout
        self._step = self._forward
        self._probe()
        # What several operations read is computed once: of the angles of rotary positions every layer would otherwise
        # compute its own sines, one number at a time.
        how: dict[str, dict[str, Any]] = {
            "cpu": {"options": {"cpp_wrapper": True, **vector_options(), "realize_reads_threshold": 0}},
            "cuda": {"mode": "reduce-overhead"},
        }
        self._step = torch.compile(self._forward, dynamic=False, **how.get(policy.device.type, {}))
        if policy.device.type == "cpu":
            # Not dynamic=False: the temperature changes.
            self._draw = torch.compile(draw_from_product, options=vector_options())

    @torch.inference_mode()
    def _probe(self) -> None:
        """Before anything is compiled, the step decodes what a parallel pass computes.

        Raises:
            GradeError: it does not.
        """
        name = type(self.policy.causal_lm).__name__
        reason = "it gives other hidden states than a parallel pass"
        try:
            error = decoding_error(self.policy, self.start, drops_rows=False)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as failure:
            error, reason = math.inf, reason_of(failure)
        self._caches.clear()
        if error > tolerance_of(self.policy.dtype):
            raise GradeError(
                f"rollout.compile: {name} cannot be decoded with a static cache ({reason}). Set rollout.compile=false."
            )

    def state(self, adapters: bool) -> AbstractContextManager:
        """As for the plain one, but CUDA graphs have recorded where the weights are, so none are merged there."""
        if adapters and self.policy.device.type == "cuda":
            return decoding(self.policy, recorded=True)
        return super().state(adapters)

    def start(self, prompt_ids: Tensor, prompt_mask: Tensor, *, copies: int, steps: int) -> CompiledDecoder:
        return CompiledDecoder(self, prompt_ids, prompt_mask, copies=copies, steps=steps)

    @contextmanager
    def prepared(self, adapters: bool, sampling: Sampling, responses: int) -> Iterator[None]:
        self._drawn_from.clear()
        with super().prepared(adapters, sampling, responses):
            yield

    def draw(self, hidden: Tensor, sampling: Sampling, *, seed: int, rows: Tensor, suppress: Tensor) -> SparseTokens:
        like = (hidden.shape, suppress.shape)  # nothing else that is compiled for changes within a rollout
        with explained(_SETTING), _unchecked(like in self._drawn_from):
            draw = super().draw(hidden, sampling, seed=seed, rows=rows, suppress=suppress)
        self._drawn_from.add(like)
        return draw

    def cache(self, batch: int, length: int) -> StaticCache:
        """An empty cache for `length` positions or more; an earlier rollout's where one fits, as any other address or
        size is compiled or recorded anew."""
        capacity = capacity_of(length)
        cache = self._caches.pop(batch, None)
        if cache is not None and cache.layers[0].max_cache_len >= capacity:
            cache.reset()
        else:
            cache = StaticCache(config=self._config, max_cache_len=capacity)
        self._caches[batch] = cache
        if len(self._caches) > MOST_CACHES:
            del self._caches[next(iter(self._caches))]
        return cache

    def _product(self, hidden: Tensor, sampling: Sampling) -> Tensor | None:
        """On a CPU of every head in float32, packed or not: it is the rest of the draw that is worth compiling."""
        product, head = super()._product(hidden, sampling), self.policy.head
        whole = sampling.top_p is None and head.weight.dtype == torch.float32 and made_at_once(head, len(hidden))
        if product is None and whole and hidden.device.type == "cpu":
            return weight_first(hidden, head.weight)
        return product

    def step(
        self, embeddings: Tensor, mask: Tensor, positions: Tensor, cache: StaticCache, *, checked: bool = True
    ) -> Tensor:
        """[B, 1, d], mask [B, 1, 1, length or capacity] and positions [B, 1] -> [B, 1, d].

        Args:
            checked: compare all that the step was compiled for; False: only numbers and the mask's length have changed
                since a call that did.
        """
        if self.policy.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        elif checked:
            torch._dynamo.mark_dynamic(mask, 3)
        with explained(_SETTING), grouped_attention(), _unchecked(not checked):
            hidden = self._step(embeddings, mask, positions, cache)
        return hidden.clone() if self.policy.device.type == "cuda" else hidden  # the graph's output is overwritten

    def _forward(self, embeddings: Tensor, mask: Tensor, positions: Tensor, cache: StaticCache) -> Tensor:
        return self.policy.forward(embeddings, mask, positions, cache)


def _unchecked(known: bool) -> AbstractContextManager:
    """Where it is known that compiled code fits what it is given, it is not compared again."""
    return torch.compiler.set_stance(skip_guard_eval_unsafe=True) if known else nullcontext()


def _find_compiler() -> None:
    """Raises what torch.compile would raise at its first call, or OSError where that is a compiler's message."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # takes seconds, and is torch's own affair

    get_cpp_compiler()
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if sys.platform == "linux" and not header.is_file():  # elsewhere torch looks in other places too
        raise OSError(f"{header} is missing, which comes with Python's development files")


class CompiledDecoder(Decoder):
    """For a batch that keeps its shape; the prompt runs as it does otherwise."""

    def __init__(self, decoding: CompiledDecoding, prompt_ids: Tensor, prompt_mask: Tensor, *, copies: int, steps: int):
        super().__init__(decoding.policy, prompt_ids, prompt_mask, copies=copies, steps=0)
        prompt_mask = prompt_mask.repeat_interleave(copies, dim=0)
        self._decoding, prompts = decoding, self.cache
        self.cache = decoding.cache(len(prompt_mask), self._length + steps)
        for layer, prompt in zip(self.cache.layers, prompts.layers, strict=True):
            layer.update(prompt.keys, prompt.values)
        self._filled = prompt_mask.new_zeros(len(prompt_mask), 1, 1, self.cache.layers[0].max_cache_len)
        self._filled[:, 0, 0, : self._length] = prompt_mask
        self._positions = prompt_mask.sum(1, keepdim=True)
        self._fits = False  # whether the step has been called with this cache

    def feed(self, embeddings: Tensor) -> Tensor:
        """[B, d] embeddings of the newest tokens -> [B, d] states that predict the next."""
        self._filled[..., self._length] = True
        self._length += 1
        mask = self._filled if embeddings.device.type == "cuda" else self._filled[..., : self._length]
        hidden = self._decoding.step(embeddings[:, None], mask, self._positions, self.cache, checked=not self._fits)
        self._fits = True
        self._positions += 1
        return hidden[:, 0]
