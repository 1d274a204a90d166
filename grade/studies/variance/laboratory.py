"""Repeated draws at fixed parameters, and what every estimator and method makes of them.

A draw is a few groups of responses to training prompts, all of the same length: end-of-sequence cannot be chosen
before, so what choosing it does to the length, which the straight-through gradient cannot see, is not measured here.
All methods meet the same draws (soft `grade`, whose responses depend on the temperature, the same prompts and noise),
so their differences are not those of the draws. Each takes one pass over a draw, and what is no part of the objective
(PPO's entropy bonus and value loss, GRPO's shaping) is left out; `grade` and `grade-ste` take all their estimators,
temperatures and hops from one forward.

The first draws are not counted: they warm the machine up, fill REINFORCE's moving average, and train PPO's value head
as its settings say, which then stays. The policy never moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from grade.config import Config, RolloutConfig
from grade.config.methods import DIFFERENTIATING, method_named
from grade.config.studies import COPIES, REFERENCE_DRAWS
from grade.methods import make_method
from grade.methods.base import Method
from grade.methods.grade import Grade
from grade.methods.metrics import now
from grade.methods.ppo import PPO
from grade.methods.services import Services, Totals
from grade.model.policy import Policy
from grade.replay.replay import ReplaySettings, prepare
from grade.rewards.base import Reward
from grade.rollout import Rollout, pad_prompts
from grade.sampling.sample import sample
from grade.studies.variance.branching import Rule, measured
from grade.studies.variance.statistics import Draws
from grade.studies.variance.steps import Branches
from grade.training.responses import prompt_numbers

CONVERGED = "converged"
_REFERENCE = "rloo"


class Estimator(NamedTuple):
    """What is measured: a method and, for those that backpropagate the reward, how."""

    method: str
    estimator: str | None = None
    tau: float | None = None
    hops: int | str | None = None


@dataclass
class Laboratory:
    """A policy that does not move, with responses of one length over one number of candidates.

    Args:
        prompts: token ids of the training prompts.
        length: tokens of a response.
        top_k: candidates per token.
    """

    config: Config
    policy: Policy
    reward: Reward
    prompts: list[list[int]]
    length: int
    top_k: int
    value_heads: dict[Method, torch.optim.Optimizer | None] = field(default_factory=dict)

    def measure(
        self, names: list[str], stopping: Callable[[], bool], tick: Callable[[], None]
    ) -> dict[Estimator, Draws]:
        """Every estimator of the named methods over the draws of the settings, or those until `stopping`."""
        settings = self.config.variance
        found: dict[Estimator, Draws] = {}
        others = {name: self._method(name) for name in names if name not in DIFFERENTIATING}
        for number in range(settings.warmup_draws + settings.draws):
            if number == settings.warmup_draws:
                for method in others.values():
                    self._freeze_values(method)
            counts = number >= settings.warmup_draws
            for key, gradients, seconds in self._all(names, others, number, counts):
                if counts:
                    found.setdefault(key, Draws(settings.draws, settings.responses)).add(gradients, seconds)
            tick()
            if stopping():
                break
        return found

    def _all(
        self, names: list[str], others: dict[str, Method], number: int, counts: bool
    ) -> Iterator[tuple[Estimator, list[Tensor], float]]:
        """What every estimator makes of a draw. Those that backpropagate the reward need one to warm up."""
        for name, method in others.items():
            yield Estimator(name), *self._step(method, number, self.config.variance.seed)
        if counts or number == 0:
            for name in names:
                if name in DIFFERENTIATING:
                    yield from self._differentiate(name, number)

    def reference(self, stopping: Callable[[], bool], tick: Callable[[], None]) -> Draws:
        """Leave-one-out REINFORCE, which is unbiased, on draws of its own."""
        method = self._method(_REFERENCE, draws=REFERENCE_DRAWS)
        draws = Draws(self.reference_draws, method.train.batch_size)
        for number in range(draws.count):
            draws.add(*self._step(method, number, self.config.variance.seed + 1))
            tick()
            if stopping():
                break
        return draws

    @property
    def reference_draws(self) -> int:
        settings = self.config.variance
        return -(-settings.reference_responses // (settings.responses * REFERENCE_DRAWS))

    def steps(self, stopping: Callable[[], bool], tick: Callable[[], None]) -> dict[Estimator, Branches]:
        """What steps along the converged gradients of `grade-ste` and along the score function's gain."""
        settings, found = self.config.variance, dict[Estimator, Branches]()
        method = self._method("grade-ste", tau=settings.taus[0])
        assert isinstance(method, Grade)
        keys: dict[Rule | None, Estimator] = {None: Estimator(_REFERENCE)}
        for tau, estimator in _rules(settings.taus, settings.estimators):
            keys[estimator, tau or settings.taus[0]] = Estimator("grade-ste", estimator, tau, CONVERGED)
        rules = [rule for rule in keys if rule is not None]
        for products in measured(method, self.prompts, rules, prefixes=self.prefixes, seed=settings.seed + 2):
            for rule, values in products.items():
                found.setdefault(keys[rule], Branches(self.prefixes)).add(values)
            tick()
            if stopping():
                break
        return found

    @property
    def prefixes(self) -> int:
        """Prefixes that `steps` takes."""
        return self.config.variance.step_responses // COPIES

    def _method(self, name: str, *, draws: int = 1, tau: float | None = None) -> Method:
        config = config_of(self.config, name, self.length, self.top_k, draws=draws, tau=tau)
        return make_method(
            self.policy,
            self.reward,
            config.method,
            config.generation,
            config.train,
            Services(),
            seed=config.seed,
            activation_checkpointing=config.method.activation_checkpointing is True,
        )

    def _draw(self, method: Method, number: int, seed: int) -> Rollout:
        """The next prompts of the training set, samples_per_prompt responses each."""
        size, copies = method.train.batch_size, method.generation.samples_per_prompt
        numbers = prompt_numbers(number, size // copies, len(self.prompts), seed)
        ids, mask = pad_prompts([self.prompts[n] for n in numbers], self.policy.pad_id, self.policy.device)
        responses = number * size + torch.arange(size, device=self.policy.device)
        return sample(
            self.policy,
            ids,
            mask,
            method.sampling(0),
            seed=seed,
            first_rows=responses * self.length,
            samples_per_prompt=copies,
        ).of("policy", numbers)

    def _step(self, method: Method, number: int, seed: int) -> tuple[list[Tensor], float]:
        """(the gradient of a policy-gradient method's step, seconds); the policy stays, a value head learns."""
        start, taken = now(self.policy.device), []
        if method not in self.value_heads:
            groups, rate = method.parameter_groups(), self.config.train.learning_rate
            self.value_heads[method] = torch.optim.AdamW(groups, lr=rate) if groups else None

        def update() -> float:
            taken.append(self._take_gradient())
            if (optimizer := self.value_heads.get(method)) is not None:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            return torch.stack([part.norm() for part in taken[-1]]).norm().item()

        method.step([self._draw(method, number, seed)], number, update)
        gradient = taken[0] if taken else self._take_gradient()  # GRPO makes no update of groups without differences
        return gradient, now(self.policy.device) - start

    def _differentiate(self, name: str, number: int) -> Iterator[tuple[Estimator, list[Tensor], float]]:
        """(what, gradient, seconds it would take alone) for every setting of `grade` or `grade-ste` on one draw."""
        settings = self.config.variance
        if name == "grade":  # another temperature is another response
            for tau in settings.taus:
                yield from self._replayed(name, number, [tau], ["gumbel"])
        else:
            yield from self._replayed(name, number, settings.taus, settings.estimators)

    def _replayed(
        self, name: str, number: int, taus: Sequence[float], estimators: Sequence[str]
    ) -> Iterator[tuple[Estimator, list[Tensor], float]]:
        """`_differentiate` for settings that share their responses."""
        method = self._method(name, tau=taus[0])
        assert isinstance(method, Grade)
        start = now(self.policy.device)
        (rollout,) = method.judged([self._draw(method, number, self.config.variance.seed)])
        weights = method.loss_weights(rollout, Totals(int(rollout.mask.sum()), len(rollout)))
        prepared = prepare(self.policy, self.reward, rollout, method.settings(0), **weights)
        shared = now(self.policy.device) - start
        for tau, estimator in _rules(taus, estimators):
            settings = replace(method.settings(0), tau=tau or taus[0], estimator=estimator, max_hops=self.length - 1)
            capped: dict[int | str, ReplaySettings] = {
                hops: replace(settings, max_hops=hops, hop_tol=0.0)
                for hops in self.config.variance.hops
                if hops < self.length - 1
            }
            for hops, options in {**capped, CONVERGED: settings}.items():
                start = now(self.policy.device)
                gradient, _, _ = prepared.hidden_gradient(options)
                prepared.backward(gradient, retain_graph=True)
                taken = self._take_gradient()
                yield Estimator(name, estimator, tau, hops), taken, shared + now(self.policy.device) - start

    def _freeze_values(self, method: Method) -> None:
        """Leave PPO's value loss out of the gradient: it is no part of the objective, and the value head has learnt."""
        if isinstance(method, PPO):
            method.settings = replace(method.settings, value_coef=0.0)
            self.value_heads[method] = None

    def _take_gradient(self) -> list[Tensor]:
        """The policy's gradient, cleared."""
        gradients = []
        for parameter in self.policy.parameters():
            gradients.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
            parameter.grad = None
        return gradients


def config_of(
    config: Config, name: str, length: int, top_k: int, *, draws: int = 1, tau: float | None = None
) -> Config:
    """The config under which a method meets as many responses of this length as `draws` draws have.

    Gradients are those of the published algorithm: the length that they lack, which method.path_scale is to make up
    for, could not be seen of one that has been given it.
    """
    settings, method = config.variance, method_named(config.method, name)
    method = replace(
        method,
        path_scale=1.0,
        ppo=replace(method.ppo, epochs=1, minibatches=1, entropy_coef=0.0),
        grpo=replace(
            method.grpo,
            epochs=1,
            minibatches=1,
            entropy_reward_coef=0.0,
            kl_policy_ref_coef=0.0,
            kl_ref_policy_coef=0.0,
        ),
    )
    if tau is not None:
        method = replace(method, tau_start=tau, tau_end=tau, estimator="gumbel", replay_dropout=False)
    return replace(
        config,
        method=method,
        rollout=RolloutConfig(),
        train=replace(config.train, batch_size=settings.responses * draws, accumulation_steps=1),
        generation=replace(
            config.generation,
            max_new_tokens=length,
            min_new_tokens=length,
            top_k=top_k,
            samples_per_prompt=settings.samples_per_prompt,
        ),
    )


def _rules(taus: Sequence[float], estimators: Sequence[str]) -> Iterator[tuple[float | None, str]]:
    """(temperature, local rule) to be measured; `straight_through` knows no temperature."""
    for tau in taus:
        yield from ((tau, estimator) for estimator in estimators if estimator != "straight_through")
    if "straight_through" in estimators:
        yield None, "straight_through"
