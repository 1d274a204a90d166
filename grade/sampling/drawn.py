"""What a batch of responses is so far: the draws, where their noise comes from, and which responses go on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grade.model.policy import Policy
from grade.sampling.draw import Sampling
from grade_kernels import SparseTokens, soft_embedding


class Drawn:
    """The draws of B responses, as `Rollout` has them; those that have ended may be dropped from the batch.

    Args:
        first_rows: [B] int64, noise row of each response's first token.

    Attributes:
        where: [b], the responses that the rows of a draw belong to.
        alive: [b] bool, those that have not ended.
        first_rows: [b], theirs.
        weights: [B, S, k] where mixtures are fed, else None.
        last: the newest draw [b].
        at: [1] int64, the number of the next token, for compiled code, which counts it up itself.
    """

    last: SparseTokens

    def __init__(self, policy: Policy, sampling: Sampling, *, seed: int, first_rows: Tensor):
        batch, device = len(first_rows), policy.device
        size = (batch, sampling.max_new_tokens)
        exact = torch.promote_types(policy.dtype, torch.float32)
        self.sampling, self.seed, self.first_rows = sampling, seed, first_rows
        self.pad_id, self.eos_ids = policy.pad_id, policy.eos_ids
        self.tokens = torch.full(size, policy.pad_id, device=device)
        self.mask = torch.zeros(size, dtype=torch.bool, device=device)
        self.indices = torch.zeros(*size, sampling.top_k, dtype=torch.int64, device=device)
        self.token_weight = torch.zeros(size, dtype=exact, device=device)
        self.weights: Tensor | None = None
        if sampling.soft:
            self.weights = torch.zeros(*size, sampling.top_k, dtype=exact, device=device)
        self.where = torch.arange(batch, device=device)
        self.alive = torch.ones(batch, dtype=torch.bool, device=device)
        self.at = torch.zeros(1, dtype=torch.int64, device=device)

    def restart(self, *, seed: int, first_rows: Tensor) -> None:
        """Forget all draws, for other responses in the same memory."""
        self.seed = seed
        self.first_rows.copy_(first_rows)
        self.tokens.fill_(self.pad_id)
        self.alive.fill_(True)
        for tensor in (self.mask, self.indices, self.token_weight, self.weights, self.at):
            if tensor is not None:
                tensor.zero_()

    def tensors(self) -> list[Tensor]:
        """All of them but the newest draw."""
        return [value for value in vars(self).values() if isinstance(value, Tensor)]

    def noted(self) -> dict[str, Tensor]:
        """All draws, by their names in `Rollout`."""
        noted = {name: getattr(self, name) for name in ("tokens", "mask", "indices", "token_weight", "weights")}
        return {name: value for name, value in noted.items() if value is not None}

    def put(self, draw: SparseTokens, at: int | Tensor) -> SparseTokens:
        """Note a draw [b] as token number `at`, an int or [1]; what is to be fed, pad for those that had ended."""
        draw = replace(draw, tokens=torch.where(self.alive, draw.tokens, self.pad_id))
        here = (self.where, at)
        self.tokens[here], self.mask[here], self.indices[here] = draw.tokens, self.alive, draw.indices
        self.token_weight[here] = (draw.weights * (draw.indices == draw.tokens[:, None])).sum(-1)
        if self.weights is not None:
            self.weights[here] = draw.weights
        if not self.sampling.ignore_eos:
            self.alive &= ~torch.isin(draw.tokens, self.eos_ids)
        return draw

    def before(self, at: Tensor) -> SparseTokens:
        """The draw before token number `at`, [1], as it was noted; no rows may have been dropped."""
        at = at - 1
        tokens, weight, indices = (
            x.index_select(1, at).squeeze(1) for x in (self.tokens, self.token_weight, self.indices)
        )
        # The weights of a token that is fed itself are not noted, and nobody reads them; nor the mass of the support,
        # in whose place is what is at hand.
        weights = indices.to(weight.dtype) if self.weights is None else self.weights.index_select(1, at).squeeze(1)
        return SparseTokens(indices, weights, tokens, weight, hard=self.weights is None)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch only, [b]."""
        draw = self.last
        kept: dict[str, Any] = {name: getattr(draw, name)[rows] for name in ("indices", "weights", "tokens", "mass")}
        self.last = replace(draw, **kept)
        self.where, self.alive, self.first_rows = self.where[rows], self.alive[rows], self.first_rows[rows]


def embedded(draw: SparseTokens, policy: Policy) -> Tensor:
    """[b, d], what is fed of a draw."""
    return soft_embedding(draw, policy.embedding) * policy.embedding_scale
