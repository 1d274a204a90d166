"""Several rewards as one: a weighted sum of differentiable rewards and functions, each logged by its name.

    total = sum_i weight_i * (scale_i * r_i + offset_i)

With `normalize` a term is first shifted and scaled to mean 0 and deviation 1 over the responses of the steps before, so
that in a step the objective is a fixed function of the responses. Evaluations take the values as they are: validations
under statistics that move could not be compared.

A term may be a proxy of what the others say: it is there to be backpropagated in training, and is a part of nothing
else, neither of an evaluation nor of what methods are given that need only the reward's value.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grade.errors import GradeError
from grade.model.passes import BasePass
from grade.rewards.base import Reward, RewardFunction, Valued, asked, of_users
from grade.rollout import Rollout


@dataclass
class Term:
    """A reward, and how it counts in the sum.

    Args:
        name: for the log, `rewards/<name>/mean` and `rewards/<name>/std`.
        weight, scale, offset, normalize, proxy: see the top of this file.
    """

    reward: Reward
    name: str
    weight: float = 1.0
    scale: float = 1.0
    offset: float = 0.0
    normalize: bool = False
    proxy: bool = False

    def __post_init__(self) -> None:
        """Refuse what would make the sum no number.

        Raises:
            GradeError: a weight, scale or offset is no finite number.
        """
        for name in ("weight", "scale", "offset"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise GradeError(f"the {name} of the reward {self.name!r} is {value!r}: it must be a finite number.")


@dataclass
class Moments:
    """Running mean and deviation of all values so far."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared distances from the mean."""

    def add(self, count: float, total: float, squares: float) -> None:
        """Add `count` values with this sum and this sum of squares (Chan et al. 1979)."""
        if not count:
            return
        mean, whole = total / count, self.count + count
        apart = mean - self.mean
        self.squares += max(squares - total * mean, 0.0) + apart**2 * self.count * count / whole
        self.mean += apart * count / whole
        self.count = whole

    def normalized(self, values: Tensor) -> Tensor:
        """The values as they are before there were two that differ."""
        if self.count < 2 or self.squares <= 0:
            return values
        return (values - self.mean) / (self.squares / (self.count - 1)) ** 0.5


class WeightedReward(Reward):
    """The sum of terms.

    Its functions have no gradient: GRADE's methods follow the differentiable terms by backpropagation and the functions
    by the score function on the same responses. A response to which a function does not apply (NaN) has 0 from that
    term.

    Raises:
        GradeError: there is no term, two have one name, or one is itself a sum; or a proxy has no gradient, or nothing
            beside it.
    """

    def __init__(self, terms: Sequence[Term]):
        self.terms = list(terms)
        names = [term.name for term in self.terms]
        twice = next((name for name in names if names.count(name) > 1), None)
        if not names:
            raise GradeError("a reward of several terms has none. Name at least one.")
        if twice is not None:
            raise GradeError(f"two terms of the reward are called {twice!r}. Give one of them another name.")
        if any(isinstance(term.reward, WeightedReward) for term in self.terms):
            raise GradeError("a term of the reward is itself a sum of terms. List its terms beside the others.")
        self._check_proxies()
        self.moments = {term.name: Moments() for term in self.terms if term.normalize}
        rewards = self.summands()
        self.functions = [term for term in self.terms if isinstance(term.reward, RewardFunction)]
        self.differentiable = any(reward.differentiable for reward in rewards)
        self.shares_base_pass = any(reward.shares_base_pass for reward in rewards)
        self.tables = [table for reward in rewards for table in reward.tables]
        self.modules = [module for reward in rewards for module in reward.modules]
        self.reads = "response" if all(reward.reads == "response" for reward in rewards) else "prompt+response"
        self.raises = " + ".join(map(_words, self.terms))

    def _check_proxies(self) -> None:
        for term in self.terms:
            if term.proxy and not term.reward.differentiable:
                raise GradeError(
                    f"the term {term.name!r} of the reward is a proxy, which is there for its gradient, and it has "
                    "none. Give a differentiable reward, or let it count by itself."
                )
        if all(term.proxy for term in self.terms):
            raise GradeError("every term of the reward is a proxy, and nothing is there to evaluate by. Add a term.")

    def by_value(self) -> Reward:
        """As of every `Reward`: without the proxies. Running means are shared with this one."""
        others = [term for term in self.terms if not term.proxy]
        if len(others) == len(self.terms):
            return self
        if others == [Term(others[0].reward, others[0].name)]:
            return others[0].reward
        rest = WeightedReward(others)
        rest.moments = self.moments
        return rest

    def in_trial(self) -> WeightedReward:
        return WeightedReward([replace(term, reward=term.reward.in_trial()) for term in self.terms])

    def summands(self) -> Sequence[Reward]:
        return [term.reward for term in self.terms]

    def inputs(self, rollout: Rollout) -> list[Tensor]:
        return [x for reward in self.summands() for x in reward.inputs(rollout)]

    def value(
        self, rollout: Rollout, base: BasePass, fed: Sequence[Tensor] = (), *, activation_checkpointing: bool = False
    ) -> Tensor:
        return self.valued(rollout, base, fed, activation_checkpointing=activation_checkpointing).total

    def valued(
        self,
        rollout: Rollout,
        base: BasePass,
        fed: Sequence[Tensor] = (),
        *,
        activation_checkpointing: bool = False,
        training: bool = False,
    ) -> Valued:
        """As of every `Reward`; the total is in float64."""
        judged = self.judge(rollout) if rollout.judged is None else rollout.judged
        said = {} if judged is None else {t.name: x for t, x in zip(self.functions, judged.unbind(1), strict=True)}
        waiting, terms = list(fed), {}
        total = torch.zeros(len(rollout), dtype=torch.float64, device=rollout.tokens.device)
        for term in self.terms:
            own = [waiting.pop(0) for _ in term.reward.tables]
            value = said.get(term.name)
            if value is None:
                value = asked(
                    term.reward,
                    partial(term.reward.value, rollout, base, own, activation_checkpointing=activation_checkpointing),
                    len(rollout),
                )
            share = self._share(term, value.double(), training)
            if term.name in said:
                share = torch.where(share.isnan(), 0.0, share)
            terms[term.name] = value
            if training or not term.proxy:
                total = total + share
        return Valued(total, terms)

    def judge(self, rollout: Rollout) -> Tensor | None:
        values = []
        for term in self.functions:
            assert isinstance(term.reward, RewardFunction)
            values.append(asked(term.reward, partial(term.reward.score, rollout), len(rollout)).double())
        return torch.stack(values, dim=1) if values else None

    def judges(self) -> list[str]:
        return [term.name for term in self.functions]

    def function_shares(self, judged: Tensor) -> Tensor:
        """[B, T] float64, what the functions add to the total in training, NaN where one does not apply.

        Args:
            judged: [B, T], as `judge` gives it.
        """
        return torch.stack(
            [self._share(term, said, True) for term, said in zip(self.functions, judged.unbind(1), strict=True)], dim=1
        )

    def proxies_shares(self, terms: Mapping[str, Tensor]) -> Tensor | None:
        """[B] float64, what the proxies add to the total in training; None where there is none.

        Args:
            terms: as `valued` gives them.
        """
        shares = [self._share(term, terms[term.name].double(), True) for term in self.terms if term.proxy]
        return torch.stack(shares).sum(0) if shares else None

    def _share(self, term: Term, value: Tensor, training: bool) -> Tensor:
        """[B], what a term with these values adds to the total."""
        if training and term.normalize:
            value = self.moments[term.name].normalized(value)
        return term.weight * (term.scale * value + term.offset)

    def prefix_values(self, rollout: Rollout, base: BasePass) -> Tensor:
        """As of every `Reward`, of terms that all have one."""
        prefixes = []
        for term in self.terms:
            with of_users(term.reward):
                prefixes.append(self._share(term, term.reward.prefix_values(rollout, base).double(), True))
        return torch.stack(prefixes).sum(0)

    def measures(self, rollout: Rollout, values: Tensor, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for term in self.terms:
            found |= term.reward.measures(rollout, terms[term.name], {})
        return found

    def observe(self, moments: Mapping[str, tuple[float, float, float]]) -> None:
        for name, running in self.moments.items():
            if name in moments:  # of a proxy there are none where a method needs only the value
                running.add(*moments[name])

    def state_dict(self) -> dict[str, Any]:
        return {name: [m.count, m.mean, m.squares] for name, m in self.moments.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.moments.update({name: Moments(*state[name]) for name in self.moments})  # in place: `by_value` shares them

    def identity(self) -> str:
        own = [
            [t.name, t.weight, t.scale, t.offset, t.normalize, t.reward.identity(), *(["proxy"] if t.proxy else [])]
            for t in self.terms
        ]
        return self._with_source(hashlib.sha256(json.dumps(own).encode()).hexdigest())

    def attributes(self) -> dict[str, str]:
        return {f"{t.name}: {name}": text for t in self.terms for name, text in t.reward.attributes().items()}

    def keep(self, run_dir: Path) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        for term in self.terms:
            for name, value in term.reward.keep(run_dir).items():
                if isinstance(value, list):
                    kept[name] = [*kept.get(name, []), *value]
                else:  # the second head of a sum goes by its term
                    kept[f"{name} of {term.name}" if name in kept else name] = value
        return kept


def _words(term: Term) -> str:
    """A term in a sentence."""
    text = term.reward.raises + (" (normalised)" if term.normalize else "")
    if term.scale != 1 or term.offset:
        text = f"({term.scale:g} × {text} {'-' if term.offset < 0 else '+'} {abs(term.offset):g})"
    text = text if term.weight == 1 else f"{term.weight:g} × {text}"
    return f"{text} (in training alone)" if term.proxy else text
