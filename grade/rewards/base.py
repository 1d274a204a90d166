"""What a run maximises: one number a response. Whoever adds a reward subclasses one of the two kinds here.

A `DifferentiableReward` reads embeddings of the response, and gradients flow back to them: GRADE's methods follow it. A
`RewardFunction` is any program that reads texts or token ids; it has no gradient, and is for the policy gradients.
`grade.rewards.loading` makes the one that the settings ask for.
"""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from grade.errors import GradeError
from grade.model.fingerprint import tensors_digest
from grade.model.passes import BasePass, fed_embeddings
from grade.rollout import Rollout


class EmbeddingTable(NamedTuple):
    """What a model feeds for a token id: its row times the scale.

    Args:
        rows: [V, d_r], one row for each id of the policy's vocabulary.
    """

    rows: Tensor
    scale: float = 1.0


class Reward(ABC):
    """What training and evaluation ask of any reward; the defaults are those of one that needs no model.

    Attributes:
        differentiable: whether gradients reach the response's embeddings.
        shares_base_pass: whether `value` reads the states of the base pass. A gradient then flows through the base.
        tables: one for each model of its own that is fed the response. A gradient then flows through that model.
        modules: what it holds of weights; they are part of its identity, and of the memory that a run needs.
        reads: "prompt+response", or "response" where the prompt does not count.
        raises: what a higher reward means, for the sentence "... is raised".
    """

    differentiable: bool = False
    shares_base_pass: bool = False
    tables: Sequence[EmbeddingTable] = ()
    modules: Sequence[nn.Module] = ()
    reads: str = "prompt+response"
    raises: str = "the reward"

    @abstractmethod
    def value(
        self, rollout: Rollout, base: BasePass, fed: Sequence[Tensor] = (), *, activation_checkpointing: bool = False
    ) -> Tensor:
        """[B] float32, the reward of every response.

        Args:
            base: the frozen base's states of prompt and response.
            fed: the response's embeddings as `inputs` gives them, one [B, S, d_r] for each of `tables`.
            activation_checkpointing: of its own models, where they can: recompute their layers in backward.
        """

    def inputs(self, rollout: Rollout) -> list[Tensor]:
        """The response's embeddings [B, S, d_r] in each of `tables`; padding is zero."""
        return [fed_embeddings(rollout, *table) for table in self.tables]

    def prefix_values(self, rollout: Rollout, base: BasePass) -> Tensor:
        """[B, 1 + S] float32, the reward of the prompt alone and after every token; padding repeats the last.

        Raises:
            GradeError: it is no reward of an unfinished response.
        """
        raise GradeError(
            f"method.grpo.level=token needs the reward after every token, which {type(self).__name__} does not give. "
            "Use level sequence."
        )

    def details(self, rollout: Rollout, values: Tensor) -> dict[str, Tensor]:
        """Further measures [B] of responses with these rewards [B], by name, for evaluation to average."""
        return {}

    def identity(self) -> str:
        """Tells by content which reward this is: runs continue, and checkpoints are judged, with an equal one only. The
        content is the weights of `modules` and, of a class that is not this package's, its source; a reward that
        depends on more (a threshold, a word list) adds that."""
        code = source_of(type(self))
        if not self.modules:
            return code
        whole = self.modules[0] if len(self.modules) == 1 else nn.ModuleList(self.modules)
        digest = tensors_digest(whole.state_dict())
        return digest if code == type(self).__name__ else f"{code} {digest}"

    def keep(self, run_dir: Path) -> dict[str, Any]:
        """Copy into the run's folder what could change outside it; what run.json records of the reward."""
        return {}


class DifferentiableReward(Reward):
    """A reward with a gradient at the response's embeddings.

    A subclass sets `shares_base_pass`, or `tables` with a model's own embedding table, or both, and `value` computes
    with what they give it: states of the base pass, embeddings in `fed`. Its weights must be frozen.
    """

    differentiable = True


class RewardFunction(Reward):
    """A reward that a program gives to the finished response."""

    @abstractmethod
    def score(self, rollout: Rollout) -> Tensor:
        """[B] float32, the reward of every response."""

    def value(
        self, rollout: Rollout, base: BasePass, fed: Sequence[Tensor] = (), *, activation_checkpointing: bool = False
    ) -> Tensor:
        return self.score(rollout)


def source_of(code: type | Callable[..., Any]) -> str:
    """What tells a class or function again: its name in this package, elsewhere its qualified name and its source's
    SHA-256, or no hash where there is no source (a prompt of Python)."""
    module, name = code.__module__, code.__qualname__
    if module.split(".")[0] == __name__.split(".")[0]:
        return name
    try:
        source = inspect.getsource(code)
    except (OSError, TypeError):
        return f"{module}.{name}"
    return f"{module}.{name} {hashlib.sha256(source.encode()).hexdigest()}"
