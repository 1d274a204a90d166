"""The exact gradient of a sampled response, from parallel passes only (replay and hops).

Sampling kept no graph. One parallel forward with the fed embeddings X as a leaf gives every step's hidden state h at
once, and the gradient g at h solves

    g = g_direct + A g,      A = (head pull-back) . D . (dh/dX)^T

because the embedding of token s + 1 depends on the logits of step s through the soft token, whose local
vector-Jacobian product is D (`grade_kernels.SoftTokenRule`). A moves gradients to earlier tokens only, so
g = sum_h A^h g_direct is finite: exact after S - 1 hops, close long before. Each hop is one backward pass with
respect to X; the parameters are touched once, at the end.

g_direct holds the KL gradient at each step's logits, and through D the gradients that reach a token's embedding from
outside the policy: the reward's, and KL's through the reference.

Everything here is per sequence: micro-batches of any size give the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grade.model.passes import BasePass, base_pass, fed_embeddings, per_token, policy_pass
from grade.model.policy import Policy
from grade.rewards.base import EmbeddingTable, Reward
from grade.rollout import Rollout
from grade.sampling.sample import support_is_allowed
from grade_kernels import SoftTokenRule, VocabHead, vocab_head


@dataclass
class ReplaySettings:
    """How the gradient is computed; the fields of `MethodConfig` with the same names say what they mean.

    Args:
        tau: temperature of the relaxation at this step.
        any_process: given whether this process wants another hop, whether any does. Sharded models need all
            processes to run the same number of passes; the extra ones change nothing.
        phase: given the name of a phase, a context that times it: "policy_forward", "base_forward" (reference and
            reward), "head" (the vocabulary sweep), "base_backward", "hops", "policy_backward".
    """

    tau: float
    estimator: str = "gumbel"
    rao_samples: int = 16
    kl_direction: str = "policy_ref"
    kl_prefix_grad: str = "both"
    max_hops: int = 16
    hop_tol: float = 1e-2
    dropout: bool = False
    checkpoint: bool = False
    prompt_cache: bool = True
    chunk_bytes: int = 2**28
    any_process: Callable[[bool], bool] = bool
    phase: Callable[[str], AbstractContextManager] = lambda name: nullcontext()


@dataclass
class Scores:
    """Values at the sampled responses. Per-token tensors are [B, S] float32, 0 where the mask is.

    Args:
        reward: [B].
        kl, entropy, logprob, mass: nats, nats, nats, and the share of probability on the candidates.
    """

    reward: Tensor
    kl: Tensor
    entropy: Tensor
    logprob: Tensor
    mass: Tensor


@dataclass
class ReplayResult(Scores):
    """What a replay adds to the values.

    Args:
        hops: [B] int64, hops until the sequence converged or the cap.
        residual: [B], last relative change of its gradient.
    """

    hops: Tensor
    residual: Tensor


@dataclass
class Forward:
    """The forward half: what evaluation needs, and what the backward half starts from."""

    hidden: Tensor          # [B, S, d], policy states that predict the tokens
    base: BasePass
    reward: Tensor          # [B]
    head: VocabHead         # rows are the n real tokens, in the order of mask.nonzero()

    def values(self, mask: Tensor) -> tuple[Tensor, ...]:
        """The fields of `Scores`."""
        head = self.head
        return self.reward.detach(), *(per_token(v, mask) for v in (head.kl, head.entropy, head.logprob, head.mass))


def forward(
    policy: Policy, reward: Reward, rollout: Rollout, settings: ReplaySettings,
    x: Tensor, x_base: Tensor, x_reward: list[Tensor], *, grad: bool, adapters: bool = True,
) -> Forward:
    """Policy pass, base pass, reward and vocabulary sweep over the real tokens.

    Args:
        x, x_base: [B, S, d], the same embeddings as separate leaves of the two passes.
        x_reward: [B, S, d_r] for each model of the reward's own (`Reward.inputs`).
        grad: also pull KL's gradient back to both hidden states.
        adapters: False evaluates the base model itself as the policy.
    """
    with settings.phase("policy_forward"):
        hidden = policy_pass(
            policy, rollout, x, dropout=settings.dropout, activation_checkpointing=settings.checkpoint,
            adapters=adapters
        )
    with settings.phase("base_forward"):
        base = base_pass(
            policy, rollout, x_base, prompt_cache=settings.prompt_cache, activation_checkpointing=settings.checkpoint
        )
        score = reward.value(rollout, base, x_reward, activation_checkpointing=settings.checkpoint)
    with settings.phase("head"):
        head = vocab_head(
            hidden.detach()[rollout.mask], policy.head, ref_hidden=base.reference.detach()[rollout.mask],
            indices=rollout.indices[rollout.mask], tokens=rollout.tokens[rollout.mask],
            direction=settings.kl_direction, grad=grad, chunk_bytes=settings.chunk_bytes, **policy.head_transform,
        )
    return Forward(hidden, base, score, head)


@torch.no_grad()
def score(
    policy: Policy, reward: Reward, rollout: Rollout, settings: ReplaySettings, *, adapters: bool = True
) -> Scores:
    """Reward and per-token values of a rollout, without gradients or dropout."""
    settings = replace(settings, dropout=False, checkpoint=False)
    x = fed_embeddings(rollout, policy.embedding, policy.embedding_scale)
    x_reward = reward.inputs(rollout)
    done = forward(policy, reward, rollout, settings, x, x, x_reward, grad=False, adapters=adapters)
    return Scores(*done.values(rollout.mask))


@dataclass
class Prepared:
    """The half of a replay that neither the local rule nor the hops change: gradients under several of those can be
    taken from one forward.

    Args:
        x: [B, S, d], the policy's leaf.
        incoming: gradients at the tokens' embeddings from outside the policy.
        kl_gradient: [n, d], KL's at the hidden states of its own steps.
    """

    policy: Policy
    rollout: Rollout
    done: Forward
    x: Tensor
    incoming: list[tuple[Tensor, Tensor]]
    kl_gradient: Tensor

    def equation(self, settings: ReplaySettings) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """(g_direct [n, d], A) of  g = g_direct + A g; one call of A is one backward pass, which keeps the graph."""
        policy, mask = self.policy, self.rollout.mask
        local_rule = _local_rule(policy, self.rollout, settings, self.done.head)
        direct = local_rule(self.incoming)
        if settings.kl_prefix_grad != "none":
            direct = direct + self.kl_gradient

        def hop(gradient: Tensor) -> Tensor:
            at_embeddings = _input_vjp(policy, self.done.hidden, self.x, mask, gradient)
            return local_rule([(at_embeddings, policy.embedding)])

        return direct, hop

    def hidden_gradient(self, settings: ReplaySettings) -> tuple[Tensor, Tensor, Tensor]:
        """(gradient at the policy's hidden states [n, d], hops [B], residual [B])."""
        gradient, hops, residual = solve_hops(*self.equation(settings), self.rollout.mask, settings)
        if settings.kl_prefix_grad == "none":
            gradient = gradient + self.kl_gradient
        return gradient, hops, residual

    def backward(self, gradient: Tensor, *, retain_graph: bool = False) -> None:
        """Add the gradient [n, d] at the hidden states to the policy's parameters."""
        dense = per_token(gradient, self.rollout.mask).to(self.done.hidden.dtype)
        torch.autograd.backward(
            self.done.hidden, dense, inputs=self.policy.parameters(), retain_graph=retain_graph
        )


def prepare(
    policy: Policy, reward: Reward, rollout: Rollout, settings: ReplaySettings, *,
    reward_weight: Tensor, kl_weight: Tensor,
) -> Prepared:
    """The forward of a replay, and the gradients that reach the tokens from outside the policy; see `replay`."""
    mask = rollout.mask
    x = fed_embeddings(rollout, policy.embedding, policy.embedding_scale).requires_grad_()
    x_base = x.detach().clone().requires_grad_()
    x_reward = reward.inputs(rollout)
    for leaf in x_reward:
        leaf.requires_grad_()
    done = forward(policy, reward, rollout, settings, x, x_base, x_reward, grad=True)
    with settings.phase("base_backward"):
        kl_weight = kl_weight[mask][:, None].to(done.head.grad_hidden.dtype)  # [n, 1]
        incoming = _outside_gradients(
            policy, reward, done, mask, x_base, x_reward, reward_weight,
            kl_weight * done.head.grad_ref_hidden if settings.kl_prefix_grad == "both" else None,
        )
    return Prepared(policy, rollout, done, x, incoming, kl_weight * done.head.grad_hidden)


def replay(
    policy: Policy, reward: Reward, rollout: Rollout, settings: ReplaySettings, *,
    reward_weight: Tensor, kl_weight: Tensor,
) -> ReplayResult:
    """Add the gradient of  sum(kl_weight * kl) - sum(reward_weight * reward)  to the policy's parameters.

    Args:
        reward_weight: [B], usually 1 over the global batch.
        kl_weight: [B, S], what each token's KL counts; entries at padding are ignored.
    """
    prepared = prepare(policy, reward, rollout, settings, reward_weight=reward_weight, kl_weight=kl_weight)
    with settings.phase("hops"):
        gradient, hops, residual = prepared.hidden_gradient(settings)
    with settings.phase("policy_backward"):
        prepared.backward(gradient)
    return ReplayResult(*prepared.done.values(rollout.mask), hops=hops, residual=residual)


def solve_hops(
    direct: Tensor, hop: Callable[[Tensor], Tensor], mask: Tensor, settings: ReplaySettings
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the series of hops, sequence by sequence until each has converged.

    benchmarks/hop_solvers.py counts the backward passes that GMRES and block Gauss-Seidel would need instead.

    Args:
        direct: [n, d], g_direct at the real tokens' hidden states.
        hop: A, [n, d] -> [n, d], linear, moves gradients to earlier tokens of the same sequence only.
        mask: [B, S] bool, which tokens the rows are.

    Returns:
        (g [n, d], hops [B], residual [B]). A sequence stops, and no longer changes, once the norm of its last
        term is at most `hop_tol` times that of its sum.
    """
    sequence = mask.nonzero()[:, 0]  # [n], which sequence a row belongs to
    active = torch.ones(len(mask), dtype=torch.bool, device=mask.device)
    hops = torch.zeros(len(mask), dtype=torch.int64, device=mask.device)
    residual = torch.ones(len(mask), device=mask.device, dtype=direct.dtype)
    total, term = direct, direct
    for _ in range(settings.max_hops):
        if not settings.any_process(bool(active.any())):
            break
        term = hop(term) * active[sequence, None]
        total = total + term
        change = _norms(term, sequence, len(mask)) / _norms(total, sequence, len(mask)).clamp_min(1e-38)
        residual = torch.where(active, change, residual)
        hops += active
        active = active & (change > settings.hop_tol)
    return total, hops, residual


def _norms(rows: Tensor, sequence: Tensor, count: int) -> Tensor:
    """[n, d] rows -> [count] Euclidean norm over each sequence's rows."""
    squares = rows.square().sum(-1)
    return torch.zeros(count, dtype=rows.dtype, device=rows.device).index_add_(0, sequence, squares).sqrt()


def _outside_gradients(
    policy: Policy, reward: Reward, done: Forward, mask: Tensor, x_base: Tensor, x_reward: list[Tensor],
    reward_weight: Tensor, reference_gradient: Tensor | None,
) -> list[tuple[Tensor, Tensor]]:
    """Gradients at the tokens' embeddings from the reward and, through the reference, from KL.

    Returns:
        (gradient [n, d_m] with respect to the table's rows, table [V, d_m]) per model that was fed the tokens.
    """
    outputs, gradients = [done.reward], [-reward_weight.to(done.reward.dtype)]
    leaves = [*zip(x_reward, reward.tables, strict=True)]
    if reference_gradient is not None:
        outputs.insert(0, done.base.reference)
        gradients.insert(0, per_token(reference_gradient, mask).to(done.base.reference.dtype))
    if reference_gradient is not None or reward.shares_base_pass:
        leaves.insert(0, (x_base, EmbeddingTable(policy.embedding, policy.embedding_scale)))
    found = torch.autograd.grad(outputs, [x for x, _ in leaves], gradients)
    return [(at[mask] * table.scale, table.rows) for at, (_, table) in zip(found, leaves, strict=True)]


def _local_rule(policy: Policy, rollout: Rollout, settings: ReplaySettings, head: VocabHead) -> Callable:
    """D and the pull-back to the hidden state, for the draws of this rollout; linear in its argument."""
    mask = rollout.mask
    allowed = support_is_allowed(policy, rollout)[mask]
    rule = SoftTokenRule(
        logits=torch.where(allowed, head.logits, -torch.inf), indices=head.indices,
        tokens=rollout.tokens[mask], rows=rollout.rows[mask], seed=rollout.seed, tau=settings.tau,
        estimator=settings.estimator, samples=settings.rao_samples, weight=policy.head,
        scale=policy.logit_scale, softcap=policy.softcap,
        keep_bytes=settings.chunk_bytes,  # the sweep is over: what its chunks took is free
    )

    def hidden_rule(incoming: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        return rule([g for g, _ in incoming], [table for _, table in incoming]).dhidden

    return hidden_rule


def _input_vjp(policy: Policy, hidden: Tensor, x: Tensor, mask: Tensor, gradient: Tensor) -> Tensor:
    """[n, d] at the policy's hidden states -> [n, d] at the table rows of the tokens; keeps the graph."""
    dense = per_token(gradient, mask).to(hidden.dtype)
    (at_x,) = torch.autograd.grad(hidden, [x], dense, retain_graph=True)
    return at_x[mask] * policy.embedding_scale
