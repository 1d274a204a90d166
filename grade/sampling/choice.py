"""Which way of decoding `rollout.compile` means."""

from __future__ import annotations

from grade.config import Config
from grade.errors import GradeError
from grade.model.compiler import without_fix
from grade.model.policy import Policy
from grade.planning.recording import recording_pays
from grade.sampling.compiled import CompiledDecoding
from grade.sampling.decode import Decoding


def decoding_of(policy: Policy, config: Config) -> tuple[Decoding, str | None]:
    """(how training's responses are decoded, what is to be said of it).

    Raises:
        GradeError: rollout.compile is true, and the policy cannot be decoded so.
    """
    wanted = config.rollout.compile
    if not config.rollout.sampled_here or not wanted:
        return Decoding(policy), None
    if wanted == "auto" and not recording_pays(config, on_gpu=policy.device.type == "cuda"):
        return Decoding(policy), None
    try:
        return CompiledDecoding(policy), "rollout.compile: the first step compiles for half a minute or more"
    except GradeError as error:
        if wanted != "auto":
            raise
        reason = without_fix("rollout.compile", error)
        return Decoding(policy), f"rollout.compile=auto: decodes without compiling. {reason}"
