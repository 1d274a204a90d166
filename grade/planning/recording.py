"""Whether compiling is worth the time that it takes: `auto` of `rollout.compile`, which decodes by a compiled, recorded
step, and of `train.compile`, the layers of training's passes."""

from __future__ import annotations

from grade.config import Config
from grade.config.methods import micro_batch_size

# Forwards of one token that have to come. An estimate, not measured: a token of a plain forward is hundreds of launches
# of some microseconds each, so these take the minute that compiling may.
LEAST_FORWARDS = 10_000


def recording_pays(config: Config, *, on_gpu: bool) -> bool:
    """Whether a run decodes on a GPU, for long enough, from weights that can be recorded: neither packed nor
    sharded."""
    if not on_gpu or config.model.quantization is not None or config.model.fsdp:
        return False
    responses = config.train.batch_size * config.train.accumulation_steps
    rollouts = -(-responses // (config.generation.batch_size or responses))  # of a step
    return config.train.steps * rollouts * config.generation.max_new_tokens >= LEAST_FORWARDS


# Micro-batches that have to pass. An estimate, not measured: of some 40 thousand launches of a replay through 36
# layers, of some microseconds each, compiled layers save most, so these take the minute that compiling may.
LEAST_MICRO_BATCHES = 400


def layers_pay(config: Config, *, on_gpu: bool) -> bool:
    """Whether a run passes micro-batches on a GPU, often enough, through weights that are neither packed nor
    sharded. On a CPU fused operations save less than other libraries' products do (docs/training.md)."""
    if not on_gpu or config.model.quantization is not None or config.model.fsdp:
        return False
    responses = config.train.batch_size * config.train.accumulation_steps
    together = micro_batch_size(config.method, config.train.batch_size, responses)
    return config.train.steps * -(-responses // together) >= LEAST_MICRO_BATCHES
