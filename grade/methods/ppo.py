"""Proximal policy optimisation (Schulman et al. 2017) over tokens, with generalised advantage estimation over time.

A step: score the responses under the policy that sampled them, estimate advantages with a value head, then several
passes of clipped updates in mini-batches. The reward arrives with the last real token. The value head is one float32
layer on the policy's own last hidden state; its gradient reaches the adapter, as is usual for a shared trunk. Where
this departs from common implementations: entropy and, with `kl: loss`, the KL are exact over the vocabulary, and
everything after the end of a response is left out of every mean.

With `kl: reward` and a token mean, a token pays for its log-ratio to the reference above the mean KL per token of the
step's other responses: the mean of all would contain the token's own later cost, 1/G of which it would not pay for.

Beside TRL's PPO: advantages are whitened as there, with n - 1 in the variance and 1e-8 added to it. The state past the
end of a response has the value 0, since the episode is over; TRL lets the value head speak for it, one token past the
end, and pays the reward there. KL with `kl: reward` is the log-ratio of the drawn token in both (TRL's k1); TRL's
`kl_coef` is a cost per token, here the coefficient of `kl_reduction: sequence_sum`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from grade.errors import present
from grade.methods.base import Update
from grade.methods.metrics import add_sums
from grade.methods.policy_gradient import PolicyGradient, Scored, TokenMeans, Weights, clipped_surrogate, weighted
from grade.methods.services import Services, Totals
from grade.rollout import Rollout


def token_rewards(reward: Tensor, penalty: Tensor, mask: Tensor) -> Tensor:
    """[B, S]: minus `penalty` [B, S] at every real token, plus the response's reward [B] at the last one."""
    last = mask.sum(1, keepdim=True) - 1
    return (-penalty * mask).scatter_add(1, last, reward[:, None].to(penalty.dtype))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """[B, S] advantages: sum over later tokens of (gamma lambda)^l delta, delta = r + gamma V' - V.

    Args:
        rewards, values: [B, S]; `values` are of the state before each token.
        mask: [B, S] bool; V' past the last real token is 0, the value of a state that has ended, and padding gets 0.
    """
    advantage = torch.zeros_like(rewards)
    ahead = value_ahead = torch.zeros_like(rewards[:, 0])
    for s in reversed(range(rewards.shape[1])):
        delta = rewards[:, s] + gamma * value_ahead - values[:, s]
        ahead = torch.where(mask[:, s], delta + gamma * gae_lambda * ahead, 0.0)
        value_ahead = torch.where(mask[:, s], values[:, s], 0.0)
        advantage[:, s] = ahead
    return advantage


def whitened(
    advantages: list[Tensor], masks: list[Tensor], tokens: int, services: Services
) -> tuple[list[Tensor], float]:
    """(advantages with mean 0 and variance 1 over a step's real tokens, what they were divided by).

    The variance is the unbiased one, over n - 1; a single token keeps the divisor of variance 0.

    Args:
        advantages, masks: [B, S] per micro-batch of this process.
        tokens: real ones of the step, on all processes.
    """
    moments = TokenMeans(services.sum)
    for advantage, mask in zip(advantages, masks, strict=True):
        moments.add(mask, mean=advantage.double(), square=advantage.double().square())
    total = moments.take()
    variance = max(total["square"] - total["mean"] ** 2, 0.0) * tokens / max(tokens - 1, 1)
    spread = (variance + 1e-8) ** 0.5  # of equal advantages, rounding is not blown up
    return [(a - total["mean"]) / spread * mask for a, mask in zip(advantages, masks, strict=True)], spread


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """[B, S]: half the squared error, of the value or of the value moved by at most `clip`, whichever is larger.

    A `clip` of 0 leaves values free.
    """
    error = (values - returns).square()
    if clip > 0:
        moved = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (moved - returns).square())
    return 0.5 * error


_TRL_NAMES = {
    "loss/policy_avg": "policy_loss",
    "loss/value_avg": "value_loss",
    "policy/approxkl_avg": "approxkl",
    "policy/clipfrac_avg": "clipped",
    "val/clipfrac_avg": "value_clipped",
    "val/ratio": "ratio",
}


class ValueHead(nn.Module):
    """[..., d] hidden states -> [...] values, float32; starts at 0 everywhere."""

    def __init__(self, width: int):
        super().__init__()
        self.layer = nn.Linear(width, 1)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layer(hidden.to(self.layer.weight.dtype)).squeeze(-1)


@dataclass
class Experience:
    """A micro-batch as all passes see it; [B, S]."""

    scored: Scored
    values: Tensor
    returns: Tensor
    advantage: Tensor


class PPO(PolicyGradient):
    """The method as the trainer sees it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.settings = self.config.ppo
        self.minibatches = self.settings.minibatches
        self.value_head = ValueHead(self.policy.head.weight.shape[1]).to(self.policy.device)

    def step(self, rollouts: list[Rollout], step: int, update: Update) -> dict[str, float]:
        settings, totals = self.settings, self.services.totals(r.mask for r in rollouts)
        scored = self.score(rollouts, sampled=True)
        others_kl = self.others_kl(scored)
        batch = [self._experience(s, totals, mean) for s, mean in zip(scored, others_kl, strict=True)]
        spread = 1.0
        if settings.whiten_advantages:
            masks = [s.rollout.mask for s in scored]
            advantages, spread = whitened([e.advantage for e in batch], masks, totals.tokens, self.services)
            batch = [replace(e, advantage=advantage) for e, advantage in zip(batch, advantages, strict=True)]
        sums: dict[str, float] = {}
        for experience in batch:
            sums = add_sums(sums, self.sums(experience.scored, experience.scored.old))
        self.services.before_update(sums)
        means, norms = TokenMeans(self.services.sum), []
        for epoch in range(settings.epochs):
            drift = TokenMeans(self.services.sum)
            for minibatch in self.shuffled_minibatches(batch, step, epoch):
                of_minibatch = self.services.totals(e.scored.rollout.mask for e in minibatch)
                with self.services.phase("backward"):
                    for experience in minibatch:
                        self._accumulate(experience, of_minibatch, spread, means, drift)
                norms.append(update())
            # The same number on every process, so all of them stop together.
            if settings.target_kl is not None and drift.take()["approxkl"] > settings.target_kl:
                break
        average = means.take()
        own = {name: average[ours] for name, ours in _TRL_NAMES.items()}
        return self.metrics(sums, norms, {**own, "ppo/updates": len(norms)})

    def _experience(self, scored: Scored, totals: Totals, others_kl: Tensor) -> Experience:
        """Values, returns and advantages under the policy that sampled; `others_kl` [B, 1] is of the base class."""
        settings, old, mask = self.settings, scored.old, scored.rollout.mask
        with torch.no_grad():
            values = self.value_head(old.hidden) * mask
        penalty = torch.zeros_like(values)
        if settings.kl == "reward":  # on the scale of one reward: the loss divides rewards by the responses
            cost = old.full_logprob - present(old.ref_logprob) - others_kl
            penalty = totals.responses * self.weight_of_kl(mask, totals) * cost
        rewards = token_rewards(scored.reward, penalty.to(values.dtype), mask)
        advantage = gae(rewards, values, mask, settings.gamma, settings.gae_lambda)
        old.hidden = values.new_empty(0)  # [B, S, d], read above for the last time
        return Experience(scored, values, advantage + values, advantage)

    def _accumulate(
        self, experience: Experience, totals: Totals, spread: float, means: TokenMeans, drift: TokenMeans
    ) -> None:
        """Add a micro-batch's share of its mini-batch's gradient."""
        settings, scored = self.settings, experience.scored
        mask, old = scored.rollout.mask, scored.old
        weights = Weights()
        if settings.kl == "loss":  # beside rewards that are divided by the tokens and by the advantages' spread
            weights = self.in_direction(self.weight_of_kl(mask, totals) * (totals.responses / totals.tokens / spread))
        weights.entropy = mask.double() * (-settings.entropy_coef / totals.tokens)
        terms = self.terms(scored, weights, reference=settings.kl == "loss")
        values = self.value_head(terms.hidden) * mask
        policy_loss = clipped_surrogate(terms.logprob, old.logprob, experience.advantage, settings.clip, settings.clip)
        policy_loss = weighted(policy_loss, scored.rollout)
        error = value_loss(values, experience.values, experience.returns, settings.value_clip)
        per_token = (policy_loss + settings.value_coef * error) * mask
        (per_token.sum() / totals.tokens + terms.penalty).backward()
        with torch.no_grad():
            log_ratio = terms.logprob - old.logprob
            approxkl = 0.5 * log_ratio.square()
            drift.add(mask, approxkl=approxkl)
            means.add(
                mask,
                policy_loss=policy_loss,
                value_loss=error,
                approxkl=approxkl,
                ratio=log_ratio.exp(),
                clipped=((log_ratio.exp() - 1).abs() > settings.clip).double(),
                value_clipped=((values - experience.values).abs() > settings.value_clip).double(),
            )

    def parameter_groups(self) -> list[dict]:
        rate = self.settings.value_learning_rate
        return [{"params": list(self.value_head.parameters()), **({} if rate is None else {"lr": rate})}]

    def state_dict(self) -> dict:
        return self.value_head.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.value_head.load_state_dict(state)
