"""Group-relative policy optimisation (Shao et al. 2024), on whole responses or token by token.

    L     = sum over tokens of  w max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high))  +  KL terms
    ratio = pi(token) / pi(token) of the policy that sampled
    A     = (r - mean of the group's r) / (standard deviation of the group's r + 1e-4)

The responses r of a prompt, a group, are compared with each other, so nothing has to learn a value. Variants differ in
two choices, which are settings. A may be divided by the deviation (GRPO) or not (Dr. GRPO, Liu et al. 2025). The
weights w are 1 over all tokens (DAPO, Yu et al. 2025), over the response's tokens and the responses (GRPO), or over a
constant and the responses (Dr. GRPO).

At the token level a token has a reward of its own, what it adds to the response's score. Its advantage is the
difference from the mean of the group's tokens, within [-1, 1].

KL is exact over the vocabulary and a term of the loss; a token's effect on the KL of later ones is left out. There are
two ways to set its weight. method.kl_coef means what it means for every method, reward - kl_coef * KL: it is multiplied
with whatever GRPO multiplies a response's reward with (by its length, by its group's deviation).
grpo.kl_ref_policy_coef and grpo.kl_policy_ref_coef stand beside normalised advantages, as GRPO is usually written; both
may be set.

TRL's `beta` is grpo.kl_ref_policy_coef. Its estimator of the KL, k3 = q/p - log(q/p) - 1 of policy p and reference q at
a token drawn from p, has the mean kl(policy‖ref), but is differentiated as a function of log p at the token that was
drawn: 1 - q/p, whose mean over tokens is the gradient of kl(ref‖policy). Here that gradient is exact, not sampled.

A group whose rewards are all equal has advantages of 0. As in TRL it stays in every denominator and its KL is in the
loss, and the deviation is the one over n - 1. There are two differences from TRL. Where advantages are divided by the
group's deviation, such a group has none, so it is left out of the KL of method.kl_coef. And a mini-batch with a
gradient of exactly 0 takes no optimizer step, which would move by its momentum alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grade.errors import present
from grade.methods.base import Update
from grade.methods.metrics import add_sums
from grade.methods.policy_gradient import (
    PolicyGradient,
    Scored,
    Terms,
    TokenMeans,
    Weights,
    clipped_surrogate,
    weighted,
)
from grade.methods.services import Totals
from grade.rollout import Rollout

_STD_OFFSET = 1e-4  # of TRL: a group that hardly differs is not blown up


def group_scale(rewards: Tensor, scale: str) -> Tensor:
    """[U, G] rewards of U groups -> [U, 1]: what multiplies a group's advantages; 1 over its deviation for "std"."""
    return 1 / (rewards.std(1, keepdim=True) + _STD_OFFSET) if scale == "std" else torch.ones_like(rewards[:, :1])


def differ(rewards: Tensor) -> Tensor:
    """[U, G] -> [U, 1] bool: whether a group's rewards differ."""
    return (rewards != rewards[:, :1]).any(1, keepdim=True)


def sequence_advantages(rewards: Tensor, scale: str) -> Tensor:
    """[U, G] rewards of U groups -> [U, G]: minus the group's mean, times `group_scale`; 0 for equal rewards."""
    advantage = (rewards - rewards.mean(1, keepdim=True)) * group_scale(rewards, scale)
    return torch.where(differ(rewards), advantage, 0.0)


def token_advantages(rewards: Tensor, mask: Tensor) -> Tensor:
    """Rewards [U, G, S] of tokens -> [U, G, S]: minus the mean over the group's real tokens, within [-1, 1].

    Args:
        mask: [U, G, S] bool, real tokens; the others get 0.
    """
    mean = (rewards * mask).sum((1, 2), keepdim=True) / mask.sum((1, 2), keepdim=True)
    return (rewards - mean).clamp(-1, 1) * mask


def token_weights(mask: Tensor, reduction: str, tokens: int, responses: int, max_new_tokens: int) -> Tensor:
    """[B, S] float64: the weight w of each token in the loss.

    Args:
        mask: [B, S] bool, real tokens.
        reduction: "token_mean", "sequence_mean" or "constant".
        tokens, responses: of the mini-batch, over micro-batches and processes.
    """
    counted = mask.double()
    if reduction == "token_mean":
        return counted / tokens
    if reduction == "sequence_mean":
        return counted / counted.sum(1, keepdim=True) / responses
    return counted / (responses * max_new_tokens)


@dataclass
class Experience:
    """A micro-batch as all passes see it.

    Args:
        advantage: [B, S].
        differs: [B] bool, whether the rewards of the response's group differ.
        scale: [B], what the reward's gradient is multiplied with, in the mean: `group_scale` and (G - 1) / G, since a
            response is part of the mean it is compared with. 0 where there is no deviation to divide by.
        moves: [B] bool, whether the response adds anything to the gradient.
    """

    scored: Scored
    advantage: Tensor
    differs: Tensor
    scale: Tensor
    moves: Tensor

    @property
    def mask(self) -> Tensor:
        """[B, S] bool, real tokens."""
        return self.scored.rollout.mask


class GRPO(PolicyGradient):
    """The method as the trainer sees it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.settings = self.config.grpo
        self.minibatches = self.settings.minibatches
        # On the only update the policy is still the one that sampled, and its ratio to itself is 1.
        self.needs_old = self.settings.epochs * self.minibatches > 1 or self.settings.entropy_reward_coef > 0

    def step(self, rollouts: list[Rollout], step: int, update: Update) -> dict[str, float]:
        settings = self.settings
        batch = self._experiences(self.score(rollouts, sampled=self.needs_old, gains=settings.level == "token"))
        means, norms = TokenMeans(self.services.sum), []
        sums: dict[str, float] = {}
        for epoch in range(settings.epochs):
            for minibatch in self.shuffled_minibatches(batch, step, epoch):
                totals = self.services.totals(e.mask for e in minibatch)
                with self.services.phase("backward"):
                    for experience in minibatch:
                        terms = self._accumulate(experience, totals, means)
                        if epoch == 0:
                            sums = add_sums(sums, self._sums(experience, terms))
                # AdamW would move by its momentum even without a gradient.
                if self.services.any_process(any(bool(e.moves.any()) for e in minibatch)):
                    self.services.before_update(sums)
                    norms.append(update())
        average = means.take()  # empty in a step of which nothing moves
        own = {name: average[ours] for name, ours in _TRL_NAMES.items() if ours in average}
        return self.metrics(sums, norms, own)

    def _experiences(self, scored: list[Scored]) -> list[Experience]:
        """Advantages within each prompt's group, whose responses may lie in several micro-batches."""
        settings, copies = self.settings, self.generation.samples_per_prompt
        sizes, masks = [len(s.reward) for s in scored], [s.rollout.mask for s in scored]
        if settings.level == "sequence":
            rewards = torch.cat([self._shaped(s) for s in scored]).view(-1, copies)  # [U, G]
            advantage = sequence_advantages(rewards, settings.advantage_scale)
            differs = differ(rewards)[:, 0]  # [U]
            advantage = advantage.flatten()[:, None]  # [N, 1]
            scale = group_scale(rewards, settings.advantage_scale)[:, 0] * (copies - 1) / copies  # [U]
            if settings.advantage_scale == "std":
                scale = torch.where(differs, scale, 0.0)
        else:
            mask = _stack(masks).unflatten(0, (-1, copies))  # [U, G, S]
            rewards = _stack([self._shaped(s) for s in scored]).unflatten(0, (-1, copies))
            advantage = token_advantages(rewards, mask)
            differs = (advantage != 0).any(2).any(1)
            advantage, scale = advantage.flatten(0, 1), torch.ones_like(advantage[:, 0, 0])  # [N, S], [U]
        moves = differs | (self.kl_coef * scale > 0)
        if settings.kl_policy_ref_coef > 0 or settings.kl_ref_policy_coef > 0:
            moves = torch.ones_like(moves)
        of_responses = (x.repeat_interleave(copies).split(sizes) for x in (differs, scale, moves))
        return [
            Experience(s, a[:, : m.shape[1]] * m, *own)
            for s, m, a, *own in zip(scored, masks, advantage.split(sizes), *of_responses, strict=True)
        ]

    def _shaped(self, scored: Scored) -> Tensor:
        """[B, S] of tokens, or [B] of responses: the reward and, weighted, the entropy of the policy that sampled; of a
        response its mean."""
        settings, by_token = self.settings, self.settings.level == "token"
        reward = settings.preference_coef * (present(scored.gains) if by_token else scored.reward)
        if settings.entropy_reward_coef > 0:
            entropy = scored.old.entropy
            entropy = entropy if by_token else entropy.sum(1) / scored.rollout.mask.sum(1)
            reward = reward + settings.entropy_reward_coef * entropy
        return reward

    def _accumulate(self, experience: Experience, totals: Totals, means: TokenMeans) -> Terms:
        """Add a micro-batch's share of its mini-batch's gradient; the policy's terms."""
        settings, scored, mask = self.settings, experience.scored, experience.mask
        moves = bool(experience.moves.any())
        passes = self.policy.going_on(moves)
        if not moves:
            terms = self._unmoved(scored, passes)
            means.add(mask & False, **dict.fromkeys(_TRL_NAMES.values(), torch.zeros_like(terms.logprob)))
            return terms
        counted = token_weights(
            mask, settings.loss_reduction, totals.tokens, totals.responses, self.generation.max_new_tokens
        )
        terms = self.terms(scored, self._penalties(experience, counted, totals))
        old_logprob = (scored.sampled or terms).logprob.detach()
        loss = clipped_surrogate(
            terms.logprob, old_logprob, experience.advantage, settings.clip_low, settings.clip_high
        )
        loss = weighted(loss, scored.rollout)
        ((loss * counted).sum() + terms.penalty).backward()
        ratio = torch.exp(terms.logprob.detach() - old_logprob)
        low = (ratio < 1 - settings.clip_low) & (experience.advantage < 0)
        high = (ratio > 1 + settings.clip_high) & (experience.advantage > 0)
        means.add(mask, low=low, high=high, either=low | high, ratio=ratio, policy_loss=loss)
        return terms

    def _unmoved(self, scored: Scored, passes: bool) -> Terms:
        """The policy's terms along a micro-batch without a gradient.

        Args:
            passes: another process needs this one's part in its forward and backward pass (`Policy.going_on`).
        """
        if not passes:
            with torch.no_grad():
                return scored.sampled or self.terms(scored)
        terms = self.terms(scored)
        (0.0 * terms.logprob.sum()).backward()
        return terms

    def _penalties(self, experience: Experience, counted: Tensor, totals: Totals) -> Weights:
        """Of either KL; `counted` [B, S] are the tokens' weights in the policy loss."""
        shared = self.weight_of_kl(experience.mask, totals)
        # Elsewhere a response has the weight 1 / responses; here its tokens have `counted`, times the group's scale.
        weights = self.in_direction(shared * counted * totals.responses * experience.scale[:, None])
        own = {"kl": self.settings.kl_policy_ref_coef, "ref_kl": self.settings.kl_ref_policy_coef}
        for name, coefficient in own.items():
            if coefficient > 0:
                before = getattr(weights, name)
                setattr(weights, name, coefficient * counted + (0.0 if before is None else before))
        return weights

    def _sums(self, experience: Experience, terms: Terms) -> dict[str, float]:
        scored = experience.scored
        return self.sums(scored, scored.sampled or terms, frac_reward_zero_std=~experience.differs)


_TRL_NAMES = {
    "clip_ratio/low_mean": "low",
    "clip_ratio/high_mean": "high",
    "clip_ratio/region_mean": "either",
    "val/ratio": "ratio",
    "loss/policy_avg": "policy_loss",
}


def _stack(parts: list[Tensor]) -> Tensor:
    """[B_i, S_i] tensors -> [sum B_i, max S_i] with zeros on the right."""
    width = max(p.shape[1] for p in parts)
    return torch.cat([torch.nn.functional.pad(p, (0, width - p.shape[1])) for p in parts])
