"""Whether decoding by a compiled, recorded step is worth the time that compiling takes: `rollout.compile: auto`."""

from __future__ import annotations

from grade.config import Config

# Forwards of one token that have to come. An estimate, not measured: a token of a plain forward is hundreds of launches
# of some microseconds each, so these take the minute that compiling may.
LEAST_FORWARDS = 10_000


def recording_pays(config: Config, *, on_gpu: bool) -> bool:
    """Whether a run decodes on a GPU, for long enough, from weights that can be recorded."""
    if not on_gpu or config.model.quantization is not None:
        return False
    responses = config.train.batch_size * config.train.accumulation_steps
    rollouts = -(-responses // (config.generation.batch_size or responses))  # of a step
    return config.train.steps * rollouts * config.generation.max_new_tokens >= LEAST_FORWARDS
