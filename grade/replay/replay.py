"""The exact gradient of a sampled response, from parallel passes only (replay and hops).

Sampling kept no graph. One parallel forward with the fed embeddings X as a leaf gives every step's hidden state h at
once (`grade.replay.score`), and the gradient g at h solves

    g = g_direct + A g,      A = (head pull-back) . D . (dh/dX)^T

because the embedding of token s + 1 depends on the logits of step s through the soft token, whose local
vector-Jacobian product is D (`grade_kernels.SoftTokenRule`). A moves gradients to earlier tokens only, so
g = sum_h A^h g_direct is finite: exact after S - 1 hops, close long before. Each hop is one backward pass with
respect to X; the parameters are touched once, at the end.

g_direct holds the KL gradient at each step's logits, and through D the gradients that reach a token's embedding from
outside the policy: the reward's, and KL's through the reference.

The KL gradient at a step's own logits is exact; all the rest of g has come through an embedding, where D and the
linearisation behind it set its length. `path_scale` multiplies that rest, so that both can be brought to one length.

A term that is followed by the score function, a weight times the log-probability of the sampled tokens, holds those
tokens fixed: its gradient at h is added to g, and neither travels through A nor is multiplied.

Everything here is per sequence: micro-batches of any size give the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grade.errors import present
from grade.model.policy import Policy
from grade.planning.prompt_pass import FEW_HOPS
from grade.replay.score import Forward, Incoming, RealTokens, Scores, ScoreSettings, forward, sampled_logits, vjp
from grade.rewards.base import Reward
from grade.rollout import Rollout
from grade_kernels import Head, SoftTokenRule, pull_back


@dataclass(kw_only=True)
class ReplaySettings(ScoreSettings):
    """How the gradient is computed; the fields of `MethodConfig` with the same names say what they mean.

    Args:
        tau: temperature of the relaxation at this step.
        path_scale: multiplies all of the gradient but the KL's at its own step's logits.
        any_process: given whether this process wants another hop, whether there is one: `Policy.going_on`, as sharded
            layers need all processes to run the same number of passes. The extra ones change nothing.
    """

    tau: float
    path_scale: float = 1.0
    estimator: str = "gumbel"
    rao_samples: int = 16
    kl_prefix_grad: str = "both"
    max_hops: int = 16
    hop_tol: float = 1e-2
    any_process: Callable[[bool], bool] = bool

    @property
    def expected_hops(self) -> int:
        return min(self.max_hops, FEW_HOPS)


@dataclass
class ReplayResult(Scores):
    """What a replay adds to the values.

    Args:
        hops: [B] int64, hops until the sequence converged or the cap.
        residual: [B], last relative change of its gradient before path_scale.
    """

    hops: Tensor
    residual: Tensor


@dataclass
class Prepared:
    """The half of a replay that neither the local rule nor the hops change: gradients under several of those can be
    taken from one forward.

    Args:
        incoming: gradients at the tokens' embeddings from outside the policy.
        kl_gradient: [n, d], KL's at the hidden states of its own steps.
        score_gradient: [n, d], of the weighted log-probabilities at the hidden states; None where there are none.
    """

    policy: Policy
    rollout: Rollout
    done: Forward
    incoming: Incoming
    kl_gradient: Tensor
    score_gradient: Tensor | None = None

    def equation(self, settings: ReplaySettings) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """(g_direct [n, d], A) of  g = g_direct + A g; one call of A is one backward pass, which keeps the graph."""
        done, local_rule = self.done, self._local_rule(settings)
        direct = local_rule(self.incoming)
        if settings.kl_prefix_grad != "none":
            direct = direct + self.kl_gradient

        def hop(gradient: Tensor) -> Tensor:
            gradient = gradient.to(done.hidden.dtype)
            with self.policy.switches.gradients_of_inputs():
                return local_rule(vjp([done.fed], [done.hidden], [gradient], retain_graph=True))

        return direct, hop

    def _local_rule(self, settings: ReplaySettings) -> Callable[[Incoming], Tensor]:
        """D and the pull-back to the hidden state, for the draws of this rollout; linear in its argument."""
        rule = self._rule_at_logits(settings, self.policy.head)

        def hidden_rule(incoming: Incoming) -> Tensor:
            return present(rule([g for g, _ in incoming], [table for _, table in incoming]).dhidden)

        return hidden_rule

    def _rule_at_logits(self, settings: ReplaySettings, head: Head | None = None) -> SoftTokenRule:
        policy, rollout, real = self.policy, self.rollout, self.done.real
        return SoftTokenRule(
            logits=sampled_logits(policy, rollout, real, present(self.done.swept.logits)),
            indices=real.indices,
            tokens=real.tokens,
            rows=real.noise,
            seed=rollout.seed,
            tau=settings.tau,
            estimator=settings.estimator,
            samples=settings.rao_samples,
            head=head,
            keep_bytes=settings.chunk_bytes,  # as much as the chunks of the sweep took, which have been freed
        )

    def hidden_gradient(self, settings: ReplaySettings) -> tuple[Tensor, Tensor, Tensor]:
        """(gradient at the policy's hidden states [n, d], hops [B], residual [B] of the gradient before path_scale)."""
        gradient, hops, residual = solve_hops(*self.equation(settings), self.done.real, settings)
        if settings.kl_prefix_grad == "none":
            gradient = settings.path_scale * gradient + self.kl_gradient
        elif settings.path_scale != 1:
            gradient = settings.path_scale * gradient + (1 - settings.path_scale) * self.kl_gradient
        if self.score_gradient is not None:
            gradient = gradient + self.score_gradient
        return gradient, hops, residual

    def logit_gradient(self, settings: ReplaySettings) -> Tensor:
        """[n, k], the gradient at the candidates' logits that reaches them through the tokens drawn from them, before
        `path_scale`: what `hidden_gradient` at a path_scale of 1 pulls back to the hidden states, without KL's at its
        own step and the score function's.

        A cap on the hops counts as there, the last hop ending at the logits; the tolerance is that of the hops before
        it. Keeps the graph.
        """
        rule, incoming = self._rule_at_logits(settings), list(self.incoming)
        if settings.max_hops > 0:  # the last hop ends at the logits
            shorter = replace(settings, max_hops=settings.max_hops - 1)
            gradient, _, _ = solve_hops(*self.equation(shorter), self.done.real, shorter)
            hidden = self.done.hidden
            with self.policy.switches.gradients_of_inputs():
                incoming += vjp([self.done.fed], [hidden], [gradient.to(hidden.dtype)], retain_graph=True)
        return rule([g for g, _ in incoming], [table for _, table in incoming]).dlogits

    def backward(self, gradient: Tensor, *, retain_graph: bool = False) -> None:
        """Add the gradient [n, d] at the hidden states to the policy's parameters."""
        hidden = self.done.hidden
        torch.autograd.backward(
            hidden, gradient.to(hidden.dtype), inputs=self.policy.parameters(), retain_graph=retain_graph
        )


def prepare(
    policy: Policy,
    reward: Reward,
    rollout: Rollout,
    settings: ReplaySettings,
    *,
    reward_weight: Tensor,
    kl_weight: Tensor,
    score_weight: Tensor | None = None,
) -> Prepared:
    """The forward of a replay, and the gradients that reach the tokens from outside the policy; see `replay`."""
    done = forward(policy, reward, rollout, settings, grad=True)
    with settings.phase("base_backward"):
        at_hidden, at_reference = present(done.swept.grad_hidden), present(done.swept.grad_ref_hidden)
        weight = done.real.rows(kl_weight)[:, None].to(at_hidden.dtype)  # [n, 1]
        at_reward = -reward_weight.to(done.frozen.reward.dtype)
        incoming = _outside_gradients(
            done, reward, at_reward, weight * at_reference if settings.kl_prefix_grad == "both" else None
        )
    by_score = None if score_weight is None else _score_gradient(policy, rollout, done, score_weight)
    return Prepared(policy, rollout, done, incoming, weight * at_hidden, by_score)


def _score_gradient(policy: Policy, rollout: Rollout, done: Forward, weight: Tensor) -> Tensor:
    """[n, d], of  - sum(weight * log-probability of the response)  at the hidden states; `weight` is [B].

    The log-probabilities are those of what the tokens were drawn from: softmax over the candidates.
    """
    real, logits = done.real, present(done.swept.logits)
    probability = sampled_logits(policy, rollout, real, logits).softmax(-1)
    drawn = (real.indices == real.tokens[:, None]).to(probability.dtype)
    of_tokens = weight.to(probability.dtype)[real.sequence][:, None]
    return pull_back(of_tokens * (probability - drawn), real.indices, policy.head, logits)


def _outside_gradients(done: Forward, reward: Reward, at_reward: Tensor, at_reference: Tensor | None) -> Incoming:
    """Gradients at the tokens' embeddings from the reward and, through the reference, from KL.

    Args:
        at_reward, at_reference: the loss's gradients [B] at the rewards and [n, d] at the reference's hidden states.
    """
    frozen, fed = done.frozen, list(done.frozen.fed_reward)
    outputs, gradients = [frozen.reward], [at_reward]
    if at_reference is not None:
        outputs.append(frozen.reference)
        gradients.append(at_reference.to(frozen.reference.dtype))
    if at_reference is not None or reward.shares_base_pass:
        fed.insert(0, frozen.fed)
    return vjp(fed, outputs, gradients)


def replay(
    policy: Policy,
    reward: Reward,
    rollout: Rollout,
    settings: ReplaySettings,
    *,
    reward_weight: Tensor,
    kl_weight: Tensor,
    score_weight: Tensor | None = None,
) -> ReplayResult:
    """Add the gradient of  sum(kl_weight * kl) - sum(reward_weight * reward) - sum(score_weight * logprob)  to the
    policy's parameters; the log-probability is that of a response as it was sampled, and its tokens stay fixed in it.

    Args:
        reward_weight: [B], usually 1 over the responses of the global batch.
        kl_weight: [B, S]; entries at padding are ignored.
        score_weight: [B]; None: there is no such term.
    """
    prepared = prepare(
        policy, reward, rollout, settings, reward_weight=reward_weight, kl_weight=kl_weight, score_weight=score_weight
    )
    with settings.phase("hops"):
        gradient, hops, residual = prepared.hidden_gradient(settings)
    with settings.phase("policy_backward"):
        prepared.backward(gradient)
    return ReplayResult(**vars(prepared.done.scores()), hops=hops, residual=residual)


def solve_hops(
    direct: Tensor, hop: Callable[[Tensor], Tensor], real: RealTokens, settings: ReplaySettings
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the series of hops, sequence by sequence until each has converged.

    benchmarks/hop_solvers.py counts the backward passes that GMRES and block Gauss-Seidel would need instead.

    Args:
        direct: [n, d], g_direct at the real tokens' hidden states.
        hop: A, [n, d] -> [n, d], linear, moves gradients to earlier tokens of the same sequence only.
        real: which tokens the rows are.

    Returns:
        (g [n, d], hops [B], residual [B]). A sequence stops, and no longer changes, once the norm of its last
        term is at most `hop_tol` times that of its sum.
    """
    active = torch.ones(real.responses, dtype=torch.bool, device=direct.device)
    hops = torch.zeros(real.responses, dtype=torch.int64, device=direct.device)
    residual = torch.ones(real.responses, device=direct.device, dtype=direct.dtype)
    total, term = direct, direct
    for _ in range(settings.max_hops):
        if not settings.any_process(bool(active.any())):
            break
        term = hop(term) * active[real.sequence, None]
        total = total + term
        change = _norms(term, real) / _norms(total, real).clamp_min(1e-38)
        residual = torch.where(active, change, residual)
        hops += active
        active = active & (change > settings.hop_tol)
    return total, hops, residual


def _norms(rows: Tensor, real: RealTokens) -> Tensor:
    """[n, d] rows -> [B] Euclidean norm over each sequence's rows."""
    return rows.new_zeros(real.responses).index_add_(0, real.sequence, rows.square().sum(-1)).sqrt()
