"""Whether compiling is worth the time that it takes: `auto` of `rollout.compile`, which decodes by a compiled, recorded
step, and of `train.compile`, the layers of training's passes."""

from __future__ import annotations

from grade.config import Config
from grade.config.methods import micro_batch_size

# Forwards of one token that have to come. An estimate, not measured: a token of a plain forward is hundreds of launches
# of some microseconds each, so these take the minute that compiling may.
LEAST_FORWARDS = 10_000
# The same on a CPU. Compiling and what it saves a token both grow with the layers: some two seconds and a third of a
# millisecond each, on two cores. Three times what that ratio says, as both depend on the machine.
LEAST_FORWARDS_ON_CPU = 20_000


def recording_pays(config: Config, *, on_gpu: bool) -> bool:
    """Whether a run decodes for long enough, from weights that can be recorded: neither packed nor sharded, and on a
    CPU in float32."""
    if config.model.quantization is not None or config.model.fsdp:
        return False
    if not on_gpu and config.model.dtype != "float32":
        return False
    responses = config.train.batch_size * config.train.accumulation_steps
    rollouts = -(-responses // (config.generation.batch_size or responses))  # of a step
    forwards = config.train.steps * rollouts * config.generation.max_new_tokens
    return forwards >= (LEAST_FORWARDS if on_gpu else LEAST_FORWARDS_ON_CPU)


# Micro-batches that have to pass. An estimate, not measured: of some 40 thousand launches of a replay through 36
# layers, of some microseconds each, compiled layers save most, so these take the minute that compiling may.
LEAST_MICRO_BATCHES = 400


def layers_pay(config: Config, *, on_gpu: bool) -> bool:
    """Whether a run passes micro-batches on a GPU, often enough, through weights that are neither packed nor
    sharded."""
    return against_layers(config, on_gpu=on_gpu) is None


def against_layers(config: Config, *, on_gpu: bool) -> str | None:
    """Why `auto` of `train.compile` does not compile layers; None: it does."""
    if not on_gpu:
        return "on a CPU fused operations save little of what products take"
    if config.model.quantization is not None:
        return f"the packed products of model.quantization={config.model.quantization} cannot be fused"
    if config.model.fsdp:
        return "compiled layers hold their weights, and model.fsdp shards them"
    return passed_and_least(config) if _micro_batches(config) < LEAST_MICRO_BATCHES else None


def passed_and_least(config: Config) -> str:
    """In words, the number that decides, and where."""
    passed = _micro_batches(config)
    return f"the run passes {passed:,} micro-batches, and it is taken to pay from {LEAST_MICRO_BATCHES:,} on"


def _micro_batches(config: Config) -> int:
    """That pass through the layers in a run."""
    responses = config.train.batch_size * config.train.accumulation_steps
    together = micro_batch_size(config.method, config.train.batch_size, responses)
    return config.train.steps * -(-responses // together)
