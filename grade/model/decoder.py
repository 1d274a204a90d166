"""Hidden states of the newest tokens of a batch of responses, token by token behind a cache."""

from __future__ import annotations

from typing import Any  # `policy` is a grade.model.policy.Policy, whose file needs this one

from torch import Tensor

from grade.model.cache import repeat_rows, select_rows


class Decoder:
    """The responses to a batch of prompts, under the state that the policy is in.

    What does not change from token to token is done once: the prompt, for all its samples, and whether anything is
    padded at all, without which no mask is made.

    Args:
        policy: `grade.model.policy.Policy`, whose probe decodes too.
        prompt_ids, prompt_mask: [U, P], left-padded.
        copies: responses to each prompt.
        steps: tokens that will be fed, at most.

    Attributes:
        hidden: [U * copies, d], states that predict the first tokens.
        cache: keys and values of all positions so far.
    """

    def __init__(self, policy: Any, prompt_ids: Tensor, prompt_mask: Tensor, *, copies: int, steps: int):
        self._policy, self._length = policy, prompt_ids.shape[1]
        self.cache = policy.new_cache(self._length + steps)
        padded = not bool(prompt_mask.all())
        hidden = policy.hidden(policy.embed(prompt_ids), prompt_mask if padded else None, self.cache)[:, -1]
        if copies > 1:
            repeat_rows(self.cache, copies)
            hidden, prompt_mask = (x.repeat_interleave(copies, dim=0) for x in (hidden, prompt_mask))
        self.hidden = hidden
        self._mask = None  # [B, P + steps]
        if padded:
            self._mask = prompt_mask.new_ones(len(prompt_mask), self._length + steps)
            self._mask[:, : self._length] = prompt_mask

    def feed(self, embeddings: Tensor) -> Tensor:
        """[B, d] embeddings of the newest tokens -> [B, d] states that predict the next."""
        self._length += 1
        mask = None if self._mask is None else self._mask[:, : self._length]
        return self._policy.hidden(embeddings[:, None], mask, self.cache)[:, 0]

    def keep(self, rows: Tensor) -> None:
        """Go on with these responses only; [b] int64, positions in the batch."""
        select_rows(self.cache, rows)
        if self._mask is not None:
            self._mask = self._mask[rows]
