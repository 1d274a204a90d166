"""The state in which a policy decodes: as the policy, without a graph, by the fewest products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from grade.model.joined import JoinedLayers
from grade.model.policy import Policy
from grade.model.probe import probe_ids, relative_error, tolerance_of
from grade.model.probe_decoding import noticed_adapter


@contextmanager
def decoding(policy: Policy, *, recorded: bool = False) -> Iterator[None]:
    """Run forwards as the policy: with its adapter added to the weights (`Policy.merged`) where those are not 16-bit,
    else with layers that read one tensor joined (`grade.model.joined`).

    Args:
        recorded: where weights lie may be recorded, so that none are put in others' place.
    """
    if policy.merged_weights() and not recorded:
        with policy.merged():
            yield
    else:
        with policy.state(adapters=True), _joined_layers(policy):
            yield


def _joined_layers(policy: Policy) -> AbstractContextManager:
    """The context in which a policy's layers are joined, where it has an adapter on a whole base."""
    if policy.trains_all or policy.sharding is not None:
        return nullcontext()
    if policy.joined is None:
        ids = torch.arange(1, 3, device=policy.device)[None] % len(policy.embedding)
        with torch.no_grad():
            policy.joined = JoinedLayers(policy.backbone, lambda: policy.hidden(policy.embed(ids), None))
        if policy.probed and not _probe(policy, policy.joined):
            policy.joined.give_up()
    return policy.joined()


@torch.no_grad()
def _probe(policy: Policy, joined: JoinedLayers) -> bool:
    """Whether joined layers compute what they compute one by one, in a parallel pass and behind its cache. The adapter
    comes back as it was."""
    embeddings = policy.embed(probe_ids(policy)).repeat(2, 1, 1)
    found: list[torch.Tensor] = []
    with noticed_adapter(policy):
        for context in (nullcontext(), joined()):
            cache = policy.new_cache(embeddings.shape[1] + 1)
            try:
                with context:
                    states = [policy.hidden(embeddings, None, cache), policy.hidden(embeddings[:, :1], None, cache)]
            except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
                if not found:
                    raise
                return False
            found.append(torch.cat(states, dim=1))
    return relative_error(found[1], found[0]) <= tolerance_of(policy.dtype)
