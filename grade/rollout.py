"""Sampling without a graph: KV cache, top-k Gumbel at temperature 1, end of sequence, masks by position.

A rollout keeps what replay needs to see the same draw again: the prompt, the token ids, the candidate ids they were
drawn from (the support of everything after) and the noise rows. Masks come from positions, never from token ids: a
response ends with the first end-of-sequence token, which is part of it, and pad may equal that token.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Iterator, Optional, Sequence

import torch
from torch import Tensor

from grade.decoding import Decoding
from grade.drawing import Sampling, suppressed_ids
from grade.model import Policy
from grade_kernels import SparseTokens, soft_embedding

# Decoding asks which rows have ended only this often: the question waits for the device.
_END_CHECK_INTERVAL = 8
# Rows that have ended are dropped once no more than this share goes on: the cache is copied each time.
_DROP_AT = 0.75


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
        min_new_tokens, seed, samples_per_prompt: of the draw. Samples of one prompt stand next to each other.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    tokens: Tensor
    mask: Tensor
    indices: Tensor
    token_weight: Tensor
    rows: Tensor
    weights: Optional[Tensor] = None
    missed: Optional[Tensor] = None
    min_new_tokens: int = 0
    ignore_eos: bool = False
    seed: int = 0
    samples_per_prompt: int = 1

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def cut(self, start: int, stop: int) -> Rollout:
        """Responses start..stop, with the columns that hold only padding left out."""
        part = {}
        for f in fields(self):
            value = getattr(self, f.name)
            part[f.name] = value[start:stop] if isinstance(value, Tensor) else value
        prompt = int(part["prompt_mask"].sum(1).max())
        response = int(part["mask"].sum(1).max())
        for name in ("prompt_ids", "prompt_mask"):
            part[name] = part[name][:, part[name].shape[1] - prompt:]
        for name in ("tokens", "mask", "indices", "token_weight", "rows", "weights", "missed"):
            if part[name] is not None:
                part[name] = part[name][:, :response]
        if (stop - start) % self.samples_per_prompt or start % self.samples_per_prompt:
            part["samples_per_prompt"] = 1  # a prompt's samples are split: treat every response by itself
        return replace(self, **part)

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
            yield self.cut(start, stop) if order is None else self._rows(order[start:stop]).cut(0, stop - start)

    def _rows(self, rows: Tensor) -> Rollout:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: value[rows] for name, value in tensors.items()})


def pad_prompts(prompts: Sequence[Sequence[int]], pad_id: int, device=None) -> tuple[Tensor, Tensor]:
    """Left-pad token lists to [B, P] ids (int64) and their mask (bool)."""
    width = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.int64)
    mask = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt):] = torch.tensor(prompt, dtype=torch.int64)
        mask[row, width - len(prompt):] = True
    return ids.to(device), mask.to(device)


def support_is_allowed(policy: Policy, rollout: Rollout) -> Tensor:
    """[B, S, k] bool: candidates that could be sampled. False only where k exceeds what was left to choose from."""
    banned = torch.zeros(policy.vocab_size, dtype=torch.bool, device=policy.device)
    banned[policy.suppressed] = True
    allowed = ~banned[rollout.indices]
    if rollout.min_new_tokens > 1 and not rollout.ignore_eos:
        early = slice(0, rollout.min_new_tokens - 1)
        allowed[:, early] &= ~torch.isin(rollout.indices[:, early], policy.eos_ids)
    return allowed


@torch.no_grad()
def sample(
    policy: Policy, prompt_ids: Tensor, prompt_mask: Tensor, sampling: Sampling, *,
    seed: int, first_rows: Tensor, samples_per_prompt: int = 1, adapters: bool = True,
    decoding: Optional[Decoding] = None,
) -> Rollout:
    """Draw responses.

    Args:
        prompt_ids, prompt_mask: [U, P], left-padded, one row per distinct prompt.
        seed: keys the noise together with the row, so the same seed and rows give the same noise in any batch.
        first_rows: [B] int64, noise row of each response's first token; its s-th token uses first_rows + s.
        samples_per_prompt: responses per prompt, B = U * samples_per_prompt; the prompt is computed once.
        adapters: sample from the policy, or from the frozen base.
        decoding: how hidden states and draws are computed; None is `Decoding(policy)`.

    Returns:
        A rollout of B responses, at most `sampling.max_new_tokens` long.
    """
    steps = sampling.max_new_tokens
    decoding = decoding or Decoding(policy)
    rows = first_rows[:, None] + torch.arange(steps, device=first_rows.device)  # [B, S]
    suppress = [
        suppressed_ids(policy, step, sampling.min_new_tokens, sampling.ignore_eos) for step in range(steps)
    ]
    out = _Drawn(policy, len(prompt_ids) * samples_per_prompt, sampling)
    # Inference mode takes a tenth off a token of a small model. Its tensors may never enter a graph, so what a rollout
    # keeps is made outside.
    with decoding.prepared(adapters, sampling, len(out.alive)), torch.inference_mode():
        decoder = decoding.start(prompt_ids, prompt_mask, copies=samples_per_prompt, steps=steps)
        hidden = decoder.hidden  # [b, d] of the b <= B responses that are still written
        for step in range(steps):
            draw = decoding.draw(hidden, sampling, seed=seed, rows=rows[out.where, step], suppress=suppress[step])
            draw = out.put(step, draw)
            if not sampling.ignore_eos and (step + 1) % _END_CHECK_INTERVAL == 0:
                going = out.alive.nonzero().squeeze(1)
                if not len(going):
                    break
                if decoding.drops_rows and len(going) <= _DROP_AT * len(out.alive):
                    decoder.keep(going)
                    draw = out.keep(going, draw)
            if step + 1 < steps:
                hidden = decoder.feed(soft_embedding(draw, policy.embedding) * policy.embedding_scale)
    if samples_per_prompt > 1:
        prompt_ids, prompt_mask = (x.repeat_interleave(samples_per_prompt, dim=0) for x in (prompt_ids, prompt_mask))
    rollout = Rollout(
        prompt_ids, prompt_mask, out.tokens, out.mask, out.indices, out.token_weight, rows, weights=out.weights,
        min_new_tokens=sampling.min_new_tokens, ignore_eos=sampling.ignore_eos, seed=seed,
        samples_per_prompt=samples_per_prompt,
    )
    return rollout.cut(0, len(rollout))


class _Drawn:
    """The draws of B responses so far, as `Rollout` has them; those that have ended may be dropped from the batch."""

    def __init__(self, policy: Policy, batch: int, sampling: Sampling):
        self.policy, self.sampling = policy, sampling
        size, device = (batch, sampling.max_new_tokens), policy.device
        exact = dict(dtype=torch.promote_types(policy.dtype, torch.float32), device=device)
        self.tokens = torch.full(size, policy.pad_id, device=device)
        self.mask = torch.zeros(size, dtype=torch.bool, device=device)
        self.indices = torch.zeros(*size, sampling.top_k, dtype=torch.int64, device=device)
        self.token_weight = torch.zeros(size, **exact)
        self.weights = torch.zeros(*size, sampling.top_k, **exact) if sampling.soft else None
        self.where = torch.arange(batch, device=device)  # [b], the responses that the rows of a draw belong to
        self.alive = torch.ones(batch, dtype=torch.bool, device=device)  # [b]

    def put(self, step: int, draw: SparseTokens) -> SparseTokens:
        """Note a step's draw [b]; what is to be fed, pad for those that had ended."""
        draw = replace(draw, tokens=torch.where(self.alive, draw.tokens, self.policy.pad_id))
        at = (self.where, step)
        self.tokens[at], self.mask[at], self.indices[at] = draw.tokens, self.alive, draw.indices
        self.token_weight[at] = (draw.weights * (draw.indices == draw.tokens[:, None])).sum(-1)
        if self.weights is not None:
            self.weights[at] = draw.weights
        if not self.sampling.ignore_eos:
            self.alive = self.alive & ~torch.isin(draw.tokens, self.policy.eos_ids)
        return draw

    def keep(self, rows: Tensor, draw: SparseTokens) -> SparseTokens:
        """Go on with these rows of the batch only; the draw's share of them."""
        self.where, self.alive = self.where[rows], self.alive[rows]
        return replace(
            draw, indices=draw.indices[rows], weights=draw.weights[rows], tokens=draw.tokens[rows], mass=draw.mass[rows]
        )
