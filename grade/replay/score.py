"""The forward half: a rollout fed once more through the policy and the frozen models, and what they say of it.

Replay differentiates it, evaluation reads its values, and the policy gradients take its frozen part once a step, since
reference and reward stay where they are while the policy moves.

Models read whole sequences [B, S, ...]; everything between their passes has one row per real token, [n, ...].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from grade.errors import present
from grade.model.passes import BasePass, base_pass, fed_embeddings, policy_pass
from grade.model.policy import Policy
from grade.rewards.base import EmbeddingTable, Reward
from grade.rollout import Rollout
from grade.sampling.sample import support_is_allowed
from grade_kernels import VocabHead, vocab_head


@dataclass(kw_only=True)
class ScoreSettings:
    """How the passes run; the fields of `MethodConfig` with the same names say what they mean.

    Args:
        dropout: the adapter's, in the policy's pass.
        activation_checkpointing: recompute activations in the backward passes.
        training: of a step, where the reward's running means count and layers may be compiled, and not in an
            evaluation.
        phase: given the name of a phase, a context that times it: "policy_forward", "base_forward" (reference and
            reward), "head" (the vocabulary sweep), and in replay "base_backward", "hops", "policy_backward".
    """

    kl_direction: str = "policy_ref"
    prompt_cache: bool = True
    dropout: bool = False
    activation_checkpointing: bool = False
    training: bool = False
    chunk_bytes: int = 2**28
    phase: Callable[[str], AbstractContextManager] = lambda name: nullcontext()

    @property
    def expected_hops(self) -> int:
        """Backward passes to the response's embeddings that will follow a forward with a graph."""
        return 0


@dataclass
class Scores:
    """Values at the sampled responses. Per-token tensors are [B, S] float32, 0 where the mask is.

    Args:
        reward: [B].
        kl, entropy, logprob, mass: nats, nats, nats, and the share of probability on the candidates.
        terms: of a reward that is a sum, each term [B] by name, NaN where it does not apply.
    """

    reward: Tensor
    kl: Tensor
    entropy: Tensor
    logprob: Tensor
    mass: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict, kw_only=True)


class RealTokens:
    """The n real tokens of B responses as rows, in the order of mask.nonzero().

    Attributes:
        sequence: [n] int64, which response a row belongs to; there are `responses`.
        tokens, indices, noise: [n], [n, k] and [n] int64: the tokens, their candidates and their noise rows.
    """

    def __init__(self, rollout: Rollout):
        self._shape = rollout.mask.shape
        self._places = rollout.mask.flatten().nonzero().squeeze(1)  # [n], of the rows among B * S
        self.responses, self.sequence = len(rollout), self._places // self._shape[1]
        self.tokens, self.indices, self.noise = map(self.rows, (rollout.tokens, rollout.indices, rollout.rows))

    def rows(self, values: Tensor) -> Tensor:
        """[B, S, ...] -> [n, ...]."""
        return values.flatten(0, 1).index_select(0, self._places)

    def dense(self, rows: Tensor) -> Tensor:
        """[n, ...] -> [B, S, ...] with zeros at padding."""
        zeros = rows.new_zeros(self._shape.numel(), *rows.shape[1:])
        return zeros.index_copy(0, self._places, rows).unflatten(0, self._shape)


def sampled_logits(policy: Policy, rollout: Rollout, real: RealTokens, logits: Tensor) -> Tensor:
    """[n, k] logits of the candidates as the sampler had them: -inf where an id could not be drawn."""
    return torch.where(real.rows(support_is_allowed(policy, rollout)), logits, -torch.inf)


@dataclass
class Fed:
    """What a model was fed at the real tokens.

    Args:
        x: [n, d_m], rows of its embedding table times the table's scale; a leaf where gradients are wanted.
    """

    x: Tensor
    table: EmbeddingTable


Incoming = Sequence[tuple[Tensor, Tensor]]
"""(gradient [n, d_m] at the tokens' rows of a table, the table [V, d_m]) per model that was fed the tokens."""


def vjp(
    fed: Sequence[Fed], outputs: Sequence[Tensor], gradients: Sequence[Tensor], *, retain_graph: bool = False
) -> Incoming:
    """Pull gradients at `outputs` back through the models to what they were fed."""
    at_x = torch.autograd.grad(outputs, [f.x for f in fed], gradients, retain_graph=retain_graph)
    return [(gradient * f.table.scale, f.table.rows) for gradient, f in zip(at_x, fed, strict=True)]


@dataclass
class Frozen:
    """What does not move with the policy.

    Args:
        reference: [n, d], the base's hidden states that predict the tokens.
        reward: [B].
        terms: as `Scores` has them, but for their graph.
        fed, fed_reward: of the base, and of the reward's own model where it has one.
    """

    base: BasePass
    reference: Tensor
    reward: Tensor
    terms: dict[str, Tensor]
    fed: Fed
    fed_reward: list[Fed]


@dataclass
class Forward:
    """All passes over a rollout.

    Args:
        hidden: [n, d], the policy's states that predict the tokens.
        swept: what the sweep over the vocabulary leaves of the logits at those states.
    """

    real: RealTokens
    fed: Fed
    hidden: Tensor
    frozen: Frozen
    swept: VocabHead

    def scores(self) -> Scores:
        swept = self.swept
        per_token = (present(swept.kl), swept.entropy, present(swept.logprob), present(swept.mass))
        return Scores(self.frozen.reward.detach(), *map(self.real.dense, per_token), terms=self.frozen.terms)


def fed_to_policy(policy: Policy, rollout: Rollout, real: RealTokens, *, grad: bool) -> Fed:
    """The response's embeddings in the policy's own table, which is also the base's."""
    table = EmbeddingTable(policy.embedding, policy.embedding_scale)
    return Fed(real.rows(fed_embeddings(rollout, *table)).requires_grad_(grad), table)


def frozen_passes(
    policy: Policy, reward: Reward, rollout: Rollout, real: RealTokens, settings: ScoreSettings, *, grad: bool = False
) -> Frozen:
    """The base along a rollout, and the reward, which may read the base's states.

    Args:
        grad: gradients will be asked for at what was fed.
    """
    fed = fed_to_policy(policy, rollout, real, grad=grad)
    base = base_pass(
        policy,
        rollout,
        real.dense(fed.x),
        prompt_cache=settings.prompt_cache,
        activation_checkpointing=settings.activation_checkpointing,
        reads_base=reward.shares_base_pass,
        compiled=settings.training,
    )
    fed_reward = [
        Fed(real.rows(x).requires_grad_(grad), table)
        for x, table in zip(reward.inputs(rollout), reward.tables, strict=True)
    ]
    total, terms = reward.valued(
        rollout,
        base,
        [real.dense(f.x) for f in fed_reward],
        activation_checkpointing=settings.activation_checkpointing,
        training=settings.training,
    )
    terms = {name: values.detach() for name, values in terms.items()}
    return Frozen(base, real.rows(base.reference), total, terms, fed, fed_reward)


def forward(
    policy: Policy, reward: Reward, rollout: Rollout, settings: ScoreSettings, *, grad: bool, adapters: bool = True
) -> Forward:
    """The policy's pass, the frozen ones, and the sweep over the vocabulary.

    Args:
        grad: gradients will be asked for at what was fed; the head also pulls KL's back to both hidden states.
        adapters: False evaluates the base model itself as the policy.
    """
    real = RealTokens(rollout)
    with settings.phase("policy_forward"):
        fed = fed_to_policy(policy, rollout, real, grad=grad)
        hidden = real.rows(
            policy_pass(
                policy,
                rollout,
                real.dense(fed.x),
                prompt_cache=settings.prompt_cache,
                hops=settings.expected_hops if grad else 0,
                dropout=settings.dropout,
                activation_checkpointing=settings.activation_checkpointing,
                adapters=adapters,
                compiled=settings.training,
            )
        )
    with settings.phase("base_forward"):
        frozen = frozen_passes(policy, reward, rollout, real, settings, grad=grad)
    with settings.phase("head"):
        swept = vocab_head(
            hidden.detach(),
            policy.head,
            ref_hidden=frozen.reference.detach(),
            indices=real.indices,
            tokens=real.tokens,
            direction=settings.kl_direction,
            grad=grad,
            chunk_bytes=settings.chunk_bytes,
        )
    return Forward(real, fed, hidden, frozen, swept)


@torch.no_grad()
def score(
    policy: Policy, reward: Reward, rollout: Rollout, settings: ScoreSettings, *, adapters: bool = True
) -> Scores:
    """Reward and per-token values of a rollout, without gradients or dropout."""
    settings = replace(settings, dropout=False, activation_checkpointing=False)
    return forward(policy, reward, rollout, settings, grad=False, adapters=adapters).scores()
