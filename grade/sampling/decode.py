"""Decoding without a graph: hidden states of the newest token, one forward of one position a token, and its draw."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor, nn

from grade.model.decoder import Decoder
from grade.model.decoding import decoding
from grade.model.policy import Policy
from grade.sampling.draw import Sampling, draw_from_product, draw_tokens
from grade.sampling.drawn import Drawn, embedded
from grade.sampling.few_rows import quick_products
from grade.sampling.packed_head import pack, packed_product, worth_packing
from grade_kernels import SparseTokens


class Decoding:
    """How a policy's responses are decoded: plainly, or with `rollout.compile` as `CompiledDecoding` does it.

    Attributes:
        drops_rows: whether responses that have ended may leave the batch.
    """

    drops_rows = True

    def __init__(self, policy: Policy):
        self.policy = policy
        self._packed: Tensor | None = None  # the head, during a rollout

    @contextmanager
    def prepared(self, adapters: bool, sampling: Sampling, responses: int) -> Iterator[None]:
        """For one rollout of at most `responses` at a time: the policy's state, and products in the way that is the
        quickest for so few rows."""
        policy = self.policy
        if sampling.top_p is None and worth_packing(policy.head, responses, sampling.max_new_tokens):
            self._packed = pack(policy.head.weight)
        try:
            with self.state(adapters), quick_products(_layers(policy, adapters), responses):
                yield
        finally:
            self._packed = None

    def state(self, adapters: bool) -> AbstractContextManager:
        """The policy's state for a rollout."""
        return decoding(self.policy) if adapters else self.policy.state(adapters=False)

    def begin(self, sampling: Sampling, *, seed: int, first_rows: Tensor) -> Drawn:
        """Where the draws of a rollout are noted."""
        return Drawn(self.policy, sampling, seed=seed, first_rows=first_rows)

    def kept(self, drawn: Drawn) -> dict[str, Tensor]:
        """What a rollout takes of it, by name; no later one changes it."""
        return drawn.noted()

    def start(self, prompt_ids: Tensor, prompt_mask: Tensor, *, copies: int, steps: int) -> Decoder:
        """Run the prompts [U, P]; `Decoder` has the arguments."""
        return Decoder(self.policy, prompt_ids, prompt_mask, copies=copies, steps=steps)

    def write(self, step: int, decoder: Decoder, drawn: Drawn, suppress: Tensor) -> None:
        """Draw token number `step` of the responses that are still written, inside `prepared`.

        Args:
            suppress: [m] int64, ids that may not be drawn.
        """
        hidden = decoder.hidden if step == 0 else decoder.feed(embedded(drawn.last, self.policy))
        rows = drawn.first_rows + step
        draw = self.draw(hidden, drawn.sampling, seed=drawn.seed, rows=rows, suppress=suppress)
        drawn.last = drawn.put(draw, step)

    def draw(self, hidden: Tensor, sampling: Sampling, *, seed: int, rows: Tensor, suppress: Tensor) -> SparseTokens:
        """`draw_tokens` of [b, d] hidden states, inside `prepared` for the same `sampling`."""
        product = self._product(hidden, sampling)
        draw, states = (draw_tokens, hidden) if product is None else (draw_from_product, product)
        return draw(self.policy, states, sampling, seed=seed, rows=rows, suppress=suppress)

    def _product(self, hidden: Tensor, sampling: Sampling) -> Tensor | None:
        """hidden @ head.weight^T [b, V], which a draw overwrites; None where a draw makes its own."""
        return None if self._packed is None else packed_product(hidden, self._packed)


def _layers(policy: Policy, adapters: bool) -> list[nn.Module]:
    """The modules that a token passes through, without an adapter's own; none of a model that is sharded."""
    if policy.sharding is not None:
        return []
    frozen = None if adapters else policy.frozen_backbone
    own = {m for layer in policy.adapter_layers for m in layer.modules() if m is not layer.get_base_layer()}
    return [m for m in (frozen or policy.backbone).modules() if m not in own]
