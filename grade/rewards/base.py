"""What a run maximises: one number a response. Whoever adds a reward subclasses one of the two kinds here.

A `DifferentiableReward` reads embeddings of the response, and gradients flow back to them: GRADE's methods follow it.
A `RewardFunction` is any program that reads texts or token ids; it has no gradient, and is followed by the score
function.
`grade.rewards.weighted` makes one reward of several of either kind, `grade.rewards.function` a `RewardFunction` of a
plain Python function, and `grade.rewards.loading` the reward that the settings ask for.
"""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from grade.errors import GradeError, NotFinite, RewardFailed, reason_of
from grade.machine import is_out_of_memory
from grade.model.passes import BasePass, fed_embeddings
from grade.model.tensors import tensors_digest
from grade.rewards.attributes import told
from grade.rewards.dependencies import held_by
from grade.rollout import Rollout

MEND = "Mend it, and start another run: a run goes on with the same reward only."
"""What to do where a reward of one's own fails."""


class EmbeddingTable(NamedTuple):
    """What a model feeds for a token id: its row times the scale.

    Args:
        rows: [V, d_r], one row for each id of the policy's vocabulary.
    """

    rows: Tensor
    scale: float = 1.0


class Valued(NamedTuple):
    """What a reward says of B responses.

    Args:
        total: [B], what is maximised.
        terms: of a reward that is a sum, each term by name: [B], before it is weighted, NaN where it does not apply.
    """

    total: Tensor
    terms: dict[str, Tensor]


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

    _KNOWN_OTHERWISE: ClassVar[frozenset[str]] = frozenset({"modules", "tables", "raises"})
    """Attributes that are no part of `attributes` by these names: `identity` tells of them, or they are words."""

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

    def valued(
        self,
        rollout: Rollout,
        base: BasePass,
        fed: Sequence[Tensor] = (),
        *,
        activation_checkpointing: bool = False,
        training: bool = False,
    ) -> Valued:
        """`value`, with the terms of a sum; arguments as there.

        Args:
            training: of a step, where running means count, and not in an evaluation.

        Raises:
            RewardFailed: `value` of a reward of one's own fails, or gives something else than a number a response.
        """
        value = asked(
            self,
            lambda: self.value(rollout, base, fed, activation_checkpointing=activation_checkpointing),
            len(rollout),
        )
        return Valued(value, {})

    def judge(self, rollout: Rollout) -> Tensor | None:
        """[B, T], what T functions say, NaN where one does not apply; float64 of a sum. Methods ask once a step and
        keep it in `Rollout.judged`. None: nothing is asked beforehand."""
        return None

    def judges(self) -> list[str]:
        """The names of the T functions of `judge`."""
        return []

    def observe(self, moments: Mapping[str, tuple[float, float, float]]) -> None:
        """Hear what a step's responses were given, over all processes.

        Args:
            moments: of each term by name: of how many responses, the sum of its values and of their squares.
        """
        return

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs of it."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        return

    def in_trial(self) -> Reward:
        """What stands in for it where a step is only tried for its memory: itself, or for a `RewardFunction` that may
        count its calls, or pay for them, one that asks nobody."""
        return self

    def summands(self) -> Sequence[Reward]:
        """The rewards that it is a sum of; itself where it is none."""
        return (self,)

    def by_value(self) -> Reward:
        """What stands in for it in the training of methods that need only its value: itself, or, of a sum, its terms
        but for proxies, which are there to be backpropagated."""
        return self

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

    def measures(self, rollout: Rollout, values: Tensor, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`details` of a reward that may be a sum, whose `Valued.terms` are given.

        Raises:
            RewardFailed: `details` of a reward of one's own fails.
        """
        with of_users(self):
            return self.details(rollout, values)

    def identity(self) -> str:
        """Tells by content which reward this is: runs continue, and checkpoints are judged, with an equal one only. The
        content is the weights of `modules` and, of a class that is not this package's, its source and that of the
        rewards that it derives from. `attributes` are compared beside it, here too: one that depends on more (an
        object, a file) adds that to `super().identity()`."""
        if not self.modules:
            return self._with_source() or type(self).__qualname__
        whole = self.modules[0] if len(self.modules) == 1 else nn.ModuleList(self.modules)
        return self._with_source(tensors_digest(whole.state_dict()))

    def _with_source(self, *content: str) -> str:
        """The content of an identity, after the sources of those of its classes that are not this package's."""
        own = [found for found in type(self).__mro__ if issubclass(found, Reward) and not is_ours(found)]
        return " ".join([*map(source_of, own), *content])

    def attributes(self) -> dict[str, str]:
        """What a reward of one's own holds beside its code and `modules`, as texts by name, each a part of its identity
        that is told by its name: see `grade.rewards.attributes`. `tables` are among them."""
        if is_ours(type(self)):
            return {}
        held = {name: value for name, value in held_by(self).items() if name not in self._KNOWN_OTHERWISE}
        held |= {"tables": list(self.tables)} if self.tables else {}
        return {f"{type(self).__name__}.{name}": text for name, text in told(held).items()}

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
        """[B] float32, the reward of every response; NaN where it does not apply, which counts as 0."""

    def value(
        self, rollout: Rollout, base: BasePass, fed: Sequence[Tensor] = (), *, activation_checkpointing: bool = False
    ) -> Tensor:
        if rollout.judged is None:
            score = asked(self, lambda: self.score(rollout), len(rollout))
        else:
            score = rollout.judged[:, 0]
        return torch.where(score.isnan(), 0.0, score)

    def judge(self, rollout: Rollout) -> Tensor | None:
        if is_ours(type(self)):  # those apply to every response
            return None
        return asked(self, lambda: self.score(rollout), len(rollout))[:, None]

    def judges(self) -> list[str]:
        return [type(self).__name__]

    def in_trial(self) -> RewardFunction:
        return _Unasked(self)


class _Unasked(RewardFunction):
    """In place of a function that is not to be called: 0 for every response, and after every token where the function
    has a reward there."""

    def __init__(self, function: RewardFunction):
        self.function, self.shares_base_pass, self.tables = function, function.shares_base_pass, function.tables
        self.modules, self.reads, self.raises = function.modules, function.reads, function.raises

    def score(self, rollout: Rollout) -> Tensor:
        return torch.zeros(len(rollout), device=rollout.tokens.device)

    def prefix_values(self, rollout: Rollout, base: BasePass) -> Tensor:
        if type(self.function).prefix_values is Reward.prefix_values:
            return self.function.prefix_values(rollout, base)  # the refusal, with its name
        return torch.zeros(len(rollout), 1 + rollout.tokens.shape[1], device=rollout.tokens.device)


@contextmanager
def of_users(reward: Reward) -> Iterator[None]:
    """Tell an error inside the block as one of the reward's own code; an interruption (Ctrl-C) stays one.

    Raises:
        RewardFailed: a reward of somebody's own raised an error, or ended the program.
    """
    try:
        yield
    except GradeError:
        raise
    except (Exception, SystemExit) as error:
        if is_ours(type(reward)) or is_out_of_memory(error):  # of which the trainer says more
            raise
        raise RewardFailed(
            f"the reward {type(reward).__name__} failed ({type(error).__name__}: {reason_of(error)}). {MEND}"
        ) from error


def asked(reward: Reward, answer: Callable[[], Any], responses: int) -> Tensor:
    """What a reward gives by `answer`, if it is a number a response; of a function NaN, where it does not apply.

    Raises:
        RewardFailed: a reward of somebody's own raised an error, or gave something else; with the reward's name.
    """
    with of_users(reward):
        value = answer()
    if not isinstance(value, Tensor) or value.shape != (responses,) or not value.is_floating_point():
        found = f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise RewardFailed(
            f"the reward {type(reward).__name__} gave {found} for {responses} responses: it must be a float tensor of "
            f"shape [{responses}], one number a response. {MEND}"
        )
    if is_ours(type(reward)):  # ours are finite, and looking would wait for the device
        return value
    wrong = value.isinf() if isinstance(reward, RewardFunction) else ~value.isfinite()
    if wrong.any():
        raise NotFinite(
            f"the reward {type(reward).__name__} gave {value[wrong][0].item()} for a response. It must be finite. "
            f"{MEND}"
        )
    return value


def is_ours(code: type | Callable[..., Any]) -> bool:
    """Whether it is of this package."""
    return code.__module__.split(".")[0] == __name__.split(".")[0]


def source_of(code: type | Callable[..., Any]) -> str:
    """What tells a class or function again: its name in this package, elsewhere its qualified name and its source's
    SHA-256, or no hash where there is no source (a prompt of Python)."""
    module, name = code.__module__, code.__qualname__
    if is_ours(code):
        return name
    try:
        source = inspect.getsource(code)
    except (OSError, TypeError):
        return f"{module}.{name}"
    return f"{module}.{name} {hashlib.sha256(source.encode()).hexdigest()}"
