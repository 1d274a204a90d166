"""The settings of sampling: how responses are drawn, and where training's come from."""

from __future__ import annotations

from dataclasses import dataclass

from grade.config.bounds import BATCH, TOKENS, setting


@dataclass
class GenerationConfig:
    """How responses are sampled: temperature 1 over the top_k candidates."""

    max_new_tokens: int = setting(64, ge=1, le=TOKENS)
    """Longest response in tokens, the end-of-sequence token included."""
    min_new_tokens: int = setting(8, ge=0, le=TOKENS)
    """End-of-sequence cannot be chosen before this many tokens."""
    top_k: int = setting(256, ge=1, le=TOKENS)
    """Candidates per token; they are the support of sampling and of the gradient."""
    ignore_eos: bool = False
    """End-of-sequence is an ordinary token and every response has max_new_tokens."""
    samples_per_prompt: int = setting(1, ge=1, le=BATCH)
    """Responses per prompt in training; the prompt's KV cache is computed once for all of them."""
    batch_size: int | None = setting(None, ge=1, le=BATCH, role="speed")
    """Sequences decoded together in training, at least a prompt's samples; null: all of a step's."""


@dataclass
class RolloutConfig:
    """Where training's responses come from."""

    source: str | None = None
    """File of token ids that another engine sampled from the policy, lines of {"prompt": [ids], "response": [ids]}, or
    a named pipe of them; null: sample here."""
    timeout: float = setting(600.0, gt=0, le=10**7)
    """Seconds to wait for the next response on a pipe before the run stops."""
    compile: bool = setting(False, role="speed")
    """Decode training's responses by a compiled step over a static KV cache: CUDA graphs on a GPU, fused loops
    (and the draw with them) on a CPU. Needs sdpa attention without windows; not used with rollout.source. The first
    rollout of a batch size or greater length takes half a minute or more, the first changed temperature some seconds.
    """
