"""`rollout.compile`: decoding by compiled code over a static KV cache, in CUDA graphs on a GPU.

A token of a small batch is hundreds of small operations that cost more to launch than to run. Shapes must not change
for them to be recorded, so the cache has its final length from the start, a mask says how far it is filled, and
rows that have ended stay in the batch.

On a GPU all of a token, from what is fed of the draw before to its own draw, is one graph, which the host launches
once. It reads and writes the same memory every time: what lies elsewhere would be copied there for every token
(`grade.sampling.places`).

On a CPU nothing is recorded. The step is compiled for every length that the mask may have, since attention reads the
filled part only; and the draw, which is a few kernels of ours on a GPU, is a hundred operations on [B, k] behind the
head's product, which may be a library's (`grade.sampling.packed_head`). So the two are compiled apart.

Before compiled code runs, torch compares all that it was compiled for (hundreds of comparisons, a tenth of a token of
a small model). From one token of a rollout to the next only numbers change, so it compares at the first one.
"""

from __future__ import annotations

import math
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
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
from grade.sampling.draw import Sampling, draw_from_product, draw_tokens
from grade.sampling.drawn import Drawn, embedded
from grade.sampling.few_rows import weight_first
from grade.sampling.grouped_attention import grouped_attention
from grade.sampling.packed_head import made_at_once
from grade.sampling.places import Places, capacity_of, remember
from grade_kernels import SparseTokens
from grade_kernels.common.checks import check_positive

_SETTING = "rollout.compile"
# Numbers of rows whose memory is kept. A step's rollouts have two: the full ones', and the rest's.
MOST_BATCHES = 2
# Where torch stops at the number of shapes for which it compiles a function, 8, calls that are not compared would fail.
# Lengths, batches and trainings of one process may be more; each is compiled once.
_LIMITS = {"recompile_limit": 2**16, "accumulated_recompile_limit": 2**16}


class CompiledDecoding(Decoding):
    """What one rollout leaves to the next: compiled code, and the memory whose addresses it has recorded.

    Compiled code has the noise's seed as a constant, so that another one is compiled anew.

    Args:
        one_graph: make one graph of all that a token is; None: on a GPU.

    Raises:
        GradeError: the policy's attention needs another kind of mask or cache, or there is no compiler.
    """

    drops_rows = False

    def __init__(self, policy: Policy, *, one_graph: bool | None = None):
        super().__init__(policy)
        self._one_graph = policy.device.type == "cuda" if one_graph is None else one_graph
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
        self._places: dict[int, Places] = {}  # by their rows, the ones used last at the end
        self._noted: dict[int, Drawn] = {}  # likewise
        self._ids: dict[int, Tensor] = {}  # that may not be drawn, by their number
        self._newest_ids: Tensor | None = None  # of this rollout, whose values are there
        self._known: set[tuple] = set()  # calls of this rollout, with the shapes that change within it
        self._tau = torch.ones((), dtype=torch.promote_types(policy.dtype, torch.float32), device=policy.device)
        self._probe()
        if self._one_graph:
            remember(self._tau, policy.embedding, policy.head.weight, policy.head.bias)
            self._token = torch.compile(self._next_token, dynamic=False, mode="reduce-overhead")
            return
        # What several operations read is computed once: of the angles of rotary positions every layer would otherwise
        # compute its own sines, one number at a time.
        options = {"cpp_wrapper": True, **vector_options(), "realize_reads_threshold": 0}
        self._states = torch.compile(self._next_states, dynamic=False, options=options)
        self._finish = torch.compile(self._note, dynamic=False, options=vector_options())

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
        self._places.clear()
        if error > tolerance_of(self.policy.dtype):
            raise GradeError(
                f"rollout.compile: {name} cannot be decoded with a static cache ({reason}). Set rollout.compile=false."
            )

    def state(self, adapters: bool) -> AbstractContextManager:
        """As for the plain one, but graphs have recorded where the weights are, so none are merged there."""
        if adapters and self._one_graph:
            return decoding(self.policy, recorded=True)
        return super().state(adapters)

    def start(self, prompt_ids: Tensor, prompt_mask: Tensor, *, copies: int, steps: int) -> CompiledDecoder:
        return CompiledDecoder(self, prompt_ids, prompt_mask, copies=copies, steps=steps)

    @contextmanager
    def prepared(self, adapters: bool, sampling: Sampling, responses: int) -> Iterator[None]:
        self._known.clear()
        self._newest_ids = None
        with super().prepared(adapters, sampling, responses):
            yield

    def begin(self, sampling: Sampling, *, seed: int, first_rows: Tensor) -> Drawn:
        """As for the plain one, with the temperature in a tensor; in one graph an earlier rollout's, if it fits."""
        if not isinstance(sampling.tau, Tensor):
            check_positive("tau", sampling.tau)  # nobody reads the tensor to check it
        self._tau.fill_(sampling.tau)
        ours = replace(sampling, tau=self._tau)
        if not self._one_graph:
            return Drawn(self.policy, ours, seed=seed, first_rows=first_rows)
        drawn = self._noted.pop(len(first_rows), None)
        # Compared without the tensors, whose comparison waits for the device.
        if drawn is None or replace(drawn.sampling, tau=1.0) != replace(sampling, tau=1.0):
            drawn = Drawn(self.policy, ours, seed=seed, first_rows=first_rows.clone())
            remember(*drawn.tensors())
        else:
            drawn.restart(seed=seed, first_rows=first_rows)
        _keep(self._noted, len(first_rows), drawn)
        return drawn

    def kept(self, drawn: Drawn) -> dict[str, Tensor]:
        noted = super().kept(drawn)
        return {name: tensor.clone() for name, tensor in noted.items()} if self._one_graph else noted

    def places(self, batch: int, length: int) -> Places:
        """Empty ones for `length` positions or more; an earlier rollout's where they fit, as any other address or size
        is compiled or recorded anew."""
        capacity = capacity_of(length)
        places = self._places.pop(batch, None)
        if places is not None and places.mask.shape[-1] >= capacity:
            places.cache.reset()
        else:
            cache = StaticCache(config=self._config, max_cache_len=capacity)
            places = Places(cache, batch, capacity, self.policy.device)
            if self._one_graph:
                remember(places.mask, places.lengths, places.start)
        _keep(self._places, batch, places)
        return places

    def write(self, step: int, decoder: Decoder, drawn: Drawn, suppress: Tensor) -> None:
        """As for the plain one; a token after the first by compiled code."""
        assert isinstance(decoder, CompiledDecoder)
        places, hidden = decoder.places, decoder.hidden
        if self._one_graph:
            if step == 0:
                self._note(draw_tokens, hidden, drawn, suppress)
                return
            ids = self._suppressed(suppress, drawn.sampling)
            torch.compiler.cudagraph_mark_step_begin()
            with self._compiled("token", ids.shape):
                self._token(drawn, places, ids)
            return
        if step > 0:
            mask = self.mask(places, decoder.length_with(step))
            if step == 1:
                torch._dynamo.mark_dynamic(mask, 3)
            with self._compiled("states"):
                hidden = self._states(drawn, mask, places.lengths, places.cache)
        product = self._product(hidden, drawn.sampling)
        if product is None:
            self._note(draw_tokens, hidden, drawn, suppress)
            return
        with self._compiled("finish", suppress.shape):
            self._finish(draw_from_product, product, drawn, suppress)

    def mask(self, places: Places, length: int) -> Tensor:
        """[B, 1, 1, length] or, for one graph, [B, 1, 1, capacity]: which of the first `length` positions are seen."""
        return places.seen(length) if self._one_graph else places.mask[..., :length]

    def _suppressed(self, suppress: Tensor, sampling: Sampling) -> Tensor:
        """The same ids [n] in memory of their own: none, or the first once more up to the most that there can be, so
        that all tokens are one graph. A nucleus adds up their probabilities, so there each is once."""
        number = len(suppress)
        if number and sampling.top_p is None:
            number = len(self.policy.suppressed) + len(self.policy.eos_ids)
        if number not in self._ids:
            self._ids[number] = torch.zeros(number, dtype=torch.int64, device=self.policy.device)
            remember(self._ids[number])
        kept = self._ids[number]
        if suppress is not self._newest_ids and number:
            kept[: len(suppress)], kept[len(suppress) :] = suppress, suppress[:1]
            self._newest_ids = suppress
        return kept

    @contextmanager
    def _compiled(self, *call: Any) -> Iterator[None]:
        """Run compiled code, unless it is known to fit without comparing what it was compiled for."""
        known, unchecked = call in self._known, torch.compiler.set_stance
        how = unchecked(skip_guard_eval_unsafe=True) if known else torch._dynamo.config.patch(_LIMITS)
        with explained(_SETTING), grouped_attention(), how:
            yield
        self._known.add(call)

    def _product(self, hidden: Tensor, sampling: Sampling) -> Tensor | None:
        """On a CPU of every head in float32, packed or not: it is the rest of the draw that is worth compiling."""
        product, head = super()._product(hidden, sampling), self.policy.head
        whole = sampling.top_p is None and head.weight.dtype == torch.float32 and made_at_once(head, len(hidden))
        if product is None and whole and hidden.device.type == "cpu":
            return weight_first(hidden, head.weight)
        return product

    def forward(self, embeddings: Tensor, mask: Tensor, positions: Tensor, cache: StaticCache) -> Tensor:
        """[B, d], mask [B, 1, 1, length or capacity] and positions [B, 1] -> [B, d]."""
        return self.policy.forward(embeddings[:, None], mask, positions, cache)[:, 0]

    def _next_states(self, drawn: Drawn, mask: Tensor, lengths: Tensor, cache: StaticCache) -> Tensor:
        """[B, d], states that predict the next token, from the draw of the newest."""
        fed = embedded(drawn.before(drawn.at), self.policy)
        return self.forward(fed, mask, lengths + drawn.at - 1, cache)

    def _next_token(self, drawn: Drawn, places: Places, suppress: Tensor) -> None:
        """All of a token but the first, its states and its draw."""
        hidden = self._next_states(drawn, places.seen(places.start + drawn.at), places.lengths, places.cache)
        self._note(draw_tokens, hidden, drawn, suppress)

    def _note(self, draw: Callable[..., SparseTokens], states: Tensor, drawn: Drawn, suppress: Tensor) -> None:
        """Note the next token's draw, by `draw_tokens` of hidden states or by `draw_from_product` of the product."""
        rows = drawn.first_rows + drawn.at
        noise = {"seed": drawn.seed, "rows": rows, "suppress": suppress}
        drawn.put(draw(self.policy, states, drawn.sampling, **noise), drawn.at)
        drawn.at += 1


def _keep(kept: dict[int, Any], rows: int, newest: Any) -> None:
    """Keep it, and of the others those that were used last."""
    kept[rows] = newest
    if len(kept) > MOST_BATCHES:
        del kept[next(iter(kept))]


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
        self._decoding, self._fed = decoding, 0
        self.places = decoding.places(len(prompt_mask), self._length + steps)
        self.places.fill(self.cache, prompt_mask)
        self.cache = self.places.cache

    def length_with(self, step: int) -> int:
        """Positions of prompt and response once token number `step` is drawn from what came before."""
        return self._length + step

    def feed(self, embeddings: Tensor) -> Tensor:
        """[B, d] embeddings of the newest tokens -> [B, d] states that predict the next, without compiling."""
        self._fed += 1
        mask = self._decoding.mask(self.places, self.length_with(self._fed))
        positions = self.places.lengths + self._fed - 1
        with grouped_attention():
            return self._decoding.forward(embeddings, mask, positions, self.places.cache)
