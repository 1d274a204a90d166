"""Sampling without a graph: KV cache, top-k Gumbel at temperature 1, end of sequence, masks by position.

A rollout keeps what replay needs to see the same draw again: the prompt, the token ids, the candidate ids they were
drawn from (the support of everything after) and the noise rows. Masks come from positions, never from token ids: a
response ends with the first end-of-sequence token, which is part of it, and pad may equal that token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grade.model.policy import Policy
from grade.rollout import Rollout
from grade.sampling.decode import Decoding
from grade.sampling.draw import Sampling, suppressed_ids

# Decoding asks which rows have ended only this often: the question waits for the device.
_END_CHECK_INTERVAL = 8
# Rows that have ended are dropped once no more than this share goes on: the cache is copied each time.
_DROP_AT = 0.75


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
    policy: Policy,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    sampling: Sampling,
    *,
    seed: int,
    first_rows: Tensor,
    samples_per_prompt: int = 1,
    adapters: bool = True,
    decoding: Decoding | None = None,
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
    suppress = suppressed_ids(policy, sampling.min_new_tokens, sampling.ignore_eos)
    out = decoding.begin(sampling, seed=seed, first_rows=first_rows)
    # Inference mode takes a tenth off a token of a small model. Its tensors may never enter a graph, so what a rollout
    # keeps is made outside.
    with decoding.prepared(adapters, sampling, len(first_rows)), torch.inference_mode():
        decoder = decoding.start(prompt_ids, prompt_mask, copies=samples_per_prompt, steps=steps)
        for step in range(steps):
            decoding.write(step, decoder, out, suppress(step))
            if not sampling.ignore_eos and (step + 1) % _END_CHECK_INTERVAL == 0 and step + 1 < steps:
                going = out.alive.nonzero().squeeze(1)
                if not policy.going_on(len(going) > 0):
                    break
                if decoding.drops_rows and 0 < len(going) <= _DROP_AT * len(out.alive):
                    decoder.keep(going)
                    out.keep(going)
    if samples_per_prompt > 1:
        prompt_ids, prompt_mask = (x.repeat_interleave(samples_per_prompt, dim=0) for x in (prompt_ids, prompt_mask))
    kept = decoding.kept(out)
    rollout = Rollout(
        prompt_ids,
        prompt_mask,
        kept["tokens"],
        kept["mask"],
        kept["indices"],
        kept["token_weight"],
        first_rows[:, None] + torch.arange(steps, device=first_rows.device),  # [B, S]
        weights=kept.get("weights"),
        min_new_tokens=sampling.min_new_tokens,
        ignore_eos=sampling.ignore_eos,
        seed=seed,
        samples_per_prompt=samples_per_prompt,
    )
    return rollout.cut(0, len(rollout))
