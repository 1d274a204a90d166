"""The settings of sampling: how responses are drawn, and where training's come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from grade.config.bounds import BATCH, TOKENS, WEIGHT, setting


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
    engine: Literal["here", "vllm"] = "here"
    """`here`: the trainer samples (or reads rollout.source). `vllm`: a vLLM server samples each step's responses with
    the adapter as it is then."""
    url: str | None = setting(None, role="place")
    """Address of the vLLM server, such as http://127.0.0.1:8000. If it asks for a key: the environment variable
    VLLM_API_KEY."""
    adapter_dir: str | None = setting(None, text="path", role="place")
    """Folder where the adapter is written for the server at every step, and deleted after it; null: `rollout` in the
    run's folder."""
    server_adapter_dir: str | None = setting(None, role="place")
    """The same folder by the server's name for it, such as its mount point in a container; null: by the same name."""
    max_lag: int = setting(0, ge=0, le=1)
    """Most steps by which the adapter that sampled a response may be behind the one that learns from it. 1: the server
    samples the next step's responses while this step learns; a response that is older is refused."""
    concurrency: int = setting(64, ge=1, le=1024, role="speed")
    """Responses asked of the server at a time, by each process."""
    retries: int = setting(4, ge=0, le=1000, role="resume")
    """How often a request is sent again after the server failed in it, with growing pauses."""
    timeout: float = setting(600.0, gt=0, le=10**7, role="resume")
    """Seconds to wait for the next response, on a pipe or from a server that is slow, starts again or cannot be
    reached, before the run is saved and stops."""
    max_logprob_difference: float = setting(0.5, gt=0, le=WEIGHT, role="resume")
    """Largest difference, nats, between a token's log-probabilities at server and trainer that goes without a warning.
    A run does not start where the mean difference is above it."""
    importance_cap: float | None = setting(None, gt=0, le=WEIGHT)
    """Policy gradients weight every token of a server's responses by its probability here over that at the server, at
    most this; null: no weights."""
    compile: bool | Literal["auto"] = setting(False, role="speed")
    """Decode training's responses by compiled code over a static KV cache: one CUDA graph for all of a token on a GPU,
    fused loops on a CPU. Needs sdpa attention without windows; not used with rollout.source. The first rollout of a
    batch size or greater length takes half a minute or more.
    `auto`: where the model can be compiled, and the run has 10,000 forwards of a token or more on a GPU, or 20,000 in
    float32 on a CPU."""

    @property
    def sampled_here(self) -> bool:
        """Whether the trainer samples training's responses itself."""
        return self.engine == "here" and self.source is None
