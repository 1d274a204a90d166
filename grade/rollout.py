"""A rollout: what was sampled, and what replay needs to see the same draw again.

The prompt, the token ids, the candidate ids they were drawn from (the support of everything after) and the noise rows.
Masks come from positions, never from token ids: a response ends with the first end-of-sequence token, which is part of
it, and pad may equal that token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

_OF_TOKENS = ("tokens", "mask", "indices", "token_weight", "rows", "weights", "missed", "importance")
"""Tensors [B, S, ...] of a rollout."""


@dataclass
class Rollout:
    """B sampled responses. Tensors have the batch first and can be cut along it.

    Args:
        prompt_ids, prompt_mask: [B, P] int64 and bool, left-padded.
        tokens: [B, S] int64; pad after a response's end.
        mask: [B, S] bool, real tokens, end-of-sequence included.
        indices: [B, S, k] int64, the candidates of each draw in the order (logit, then lower id).
        weights: [B, S, k] float32, the mixtures that were fed back; None when tokens were.
        token_weight: [B, S] float32, relaxed weight of the sampled token.
        rows: [B, S] int64, noise rows.
        missed: [B, S] bool, tokens from elsewhere that were not among the policy's candidates; None if sampled here.
        importance: [B, S] float32, weights of the tokens in the loss of a policy gradient, which correct for the engine
            that sampled them; None: all 1.
        min_new_tokens, seed, samples_per_prompt: of the draw. Samples of one prompt stand next to each other.
        split: of the task that the prompts come from; None where they come from elsewhere (rollout.source).
        prompt_index: [B] int64, the numbers of the prompts in that split; None likewise.
        judged: [B, T], what the T functions of the reward have said, NaN where one does not apply; None where
            they have not been asked.
        padded: whether a prompt may have padding before it.
        advantage: [B] float64, the weight of the response's score in a gradient that is followed by the score function;
            None where none is.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    tokens: Tensor
    mask: Tensor
    indices: Tensor
    token_weight: Tensor
    rows: Tensor
    weights: Tensor | None = None
    missed: Tensor | None = None
    importance: Tensor | None = None
    min_new_tokens: int = 0
    ignore_eos: bool = False
    seed: int = 0
    samples_per_prompt: int = 1
    split: str | None = None
    prompt_index: Tensor | None = None
    judged: Tensor | None = None
    padded: bool = True
    advantage: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def cut(self, start: int, stop: int) -> Rollout:
        """Responses start..stop, with the columns that hold only padding left out."""
        part = self._at(slice(start, stop))
        prompts, responses = part.prompt_mask.sum(1), part.mask.sum(1)
        # One answer for all three, since the device has to be waited for.
        prompt, shortest, response = torch.stack([prompts.max(), prompts.min(), responses.max()]).tolist()
        if (stop - start) % self.samples_per_prompt or start % self.samples_per_prompt:
            part.samples_per_prompt = 1  # a prompt's samples are split: treat every response by itself
        ids, mask = (tensor[:, tensor.shape[1] - prompt :] for tensor in (part.prompt_ids, part.prompt_mask))
        of_tokens: dict[str, Any] = {
            name: values[:, :response] for name, values in part._tensors() if name in _OF_TOKENS
        }
        return replace(part, prompt_ids=ids, prompt_mask=mask, padded=shortest < prompt, **of_tokens)

    def of(self, split: str, numbers: Sequence[int]) -> Rollout:
        """The same, with the numbers of its prompts in a split of the task, one a prompt."""
        index = torch.tensor(numbers, device=self.tokens.device).repeat_interleave(self.samples_per_prompt)
        return replace(self, split=split, prompt_index=index)

    def real_prompts(self) -> list[list[int]]:
        """The prompts' token ids, without padding."""
        return [ids[mask].tolist() for ids, mask in zip(self.prompt_ids, self.prompt_mask, strict=True)]

    def real_tokens(self) -> list[list[int]]:
        """The responses' token ids, without padding."""
        return [ids[mask].tolist() for ids, mask in zip(self.tokens, self.mask, strict=True)]

    def ended_by(self, eos_ids: Tensor) -> Tensor:
        """[B] bool: responses whose last real token is one of `eos_ids`."""
        last = self.tokens.gather(1, self.mask.sum(1, keepdim=True) - 1).squeeze(1)
        return torch.isin(last, eos_ids)

    def micro_batches(self, size: int, *, by_length: bool = False) -> Iterator[Rollout]:
        """Cuts of `size` responses.

        Args:
            by_length: put responses of similar length together, so that less padding is computed; the longest come
                first, so that a lack of memory shows at once. Not where that would part the samples of a prompt.
        """
        order = None
        if by_length and self.samples_per_prompt == 1:
            order = self.mask.sum(1).argsort(descending=True, stable=True)
        for start in range(0, len(self), size):
            stop = min(start + size, len(self))
            yield self.cut(start, stop) if order is None else self._at(order[start:stop]).cut(0, stop - start)

    def _at(self, index: Any) -> Rollout:
        """Every tensor at `index`."""
        chosen: dict[str, Any] = {name: values[index] for name, values in self._tensors()}
        return replace(self, **chosen)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for f in fields(self):
            if isinstance(values := getattr(self, f.name), Tensor):
                yield f.name, values


def pad_prompts(
    prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Left-pad token lists to [B, P] ids (int64) and their mask (bool)."""
    width = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.int64)
    mask = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
        mask[row, width - len(prompt) :] = True
    return ids.to(device), mask.to(device)
