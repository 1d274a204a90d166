"""Which way of decoding `rollout.compile` means."""

from __future__ import annotations

from grade.config import Config
from grade.errors import GradeError
from grade.model.policy import Policy
from grade.sampling.compiled import CompiledDecoding
from grade.sampling.decode import Decoding

# Forwards of one token that have to come for `auto` to compile. An estimate, not measured: a token of a plain forward
# is hundreds of launches of some microseconds each, so these take the minute that compiling may.
LEAST_FORWARDS = 10_000


def decoding_of(policy: Policy, config: Config) -> tuple[Decoding, str | None]:
    """(how training's responses are decoded, what is to be said of it).

    Raises:
        GradeError: rollout.compile is true, and the policy cannot be decoded so.
    """
    wanted = config.rollout.compile
    if config.rollout.source is not None or not wanted:
        return Decoding(policy), None
    if wanted == "auto" and not _pays(policy, config):
        return Decoding(policy), None
    try:
        return CompiledDecoding(policy), "rollout.compile: the first step compiles for half a minute or more"
    except GradeError as error:
        if wanted != "auto":
            raise
        reason = str(error).removeprefix("rollout.compile: ").split(" Set ")[0]
        return Decoding(policy), f"rollout.compile=auto: decodes without compiling. {reason}"


def _pays(policy: Policy, config: Config) -> bool:
    """Whether the run decodes on a GPU, for long enough, from weights that can be recorded."""
    if policy.device.type != "cuda" or config.model.quantization is not None:
        return False
    responses = config.train.batch_size * config.train.accumulation_steps
    rollouts = -(-responses // (config.generation.batch_size or responses))  # of a step
    return config.train.steps * rollouts * config.generation.max_new_tokens >= LEAST_FORWARDS
