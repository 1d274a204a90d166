"""How many bytes a forward keeps for its backward, as a function of the sequence length.

That depends on the architecture, its attention and the adapter, so it is measured: three short forwards give the bytes
as a polynomial of the length, of degree 2 because attention may keep T x T. A checkpointed pass keeps what enters its
layers, and one layer's activations while that layer is recomputed; the same forwards tell these apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer

from grade.model.cache import attention_tensors, state_tensors
from grade.model.policy import Policy
from grade.rewards.base import Reward
from grade.rollout import Rollout

LONGEST = 96
"""Tokens of a measured pass; its thirds are multiples of what attention on a GPU pads its buffers to."""


@dataclass(frozen=True)
class Polynomial:
    """Bytes of a sequence of T tokens:  constant + linear T + quadratic T^2."""

    constant: float
    linear: float
    quadratic: float

    def __call__(self, length: float) -> float:
        return self.constant + self.linear * length + self.quadratic * length**2

    def between(self, queries: float, keys: float) -> float:
        """Of `queries` tokens that attend to `keys`."""
        return self.constant + self.linear * queries + self.quadratic * queries * keys

    @classmethod
    def through(cls, points: dict[int, float]) -> Polynomial:
        """The one through three points (T, bytes)."""
        (t1, y1), (t2, y2), (t3, y3) = sorted(points.items())
        slope = (y2 - y1) / (t2 - t1)
        quadratic = ((y3 - y2) / (t3 - t2) - slope) / (t3 - t1)
        linear = slope - quadratic * (t1 + t2)
        return cls(y1 - linear * t1 - quadratic * t1**2, linear, quadratic)


@dataclass(frozen=True)
class PassBytes:
    """Of one sequence: what its graph holds (`whole`), what it holds if checkpointed (`kept`), and what recomputing its
    largest layer holds (`layer`)."""

    whole: Polynomial
    kept: Polynomial
    layer: Polynomial

    def held(self, length: int, checkpoint: bool) -> float:
        """By the graph of `length` tokens until its backward."""
        return (self.kept if checkpoint else self.whole)(length)

    def at_work(self, length: int, checkpoint: bool) -> float:
        """Besides, while a layer is differentiated: if it is checkpointed its activations, and gradients, which take
        about half as much (they are freed on the way)."""
        return self.layer(length) * (1.5 if checkpoint else 0.5)


def saved_bytes(module: nn.Module, forward: Callable[[], Tensor]) -> dict[str, int]:
    """Bytes that `forward` saves for its backward, parameters and buffers of `module` left out.

    Returns:
        {"whole", "kept", "layer"}, see `PassBytes`. Storages count once. The graph is not kept.
    """
    frozen = {_storage(t) for t in (*module.parameters(), *module.buffers())}
    layers = [m for m in module.modules() if isinstance(m, GradientCheckpointingLayer)]
    outside: dict[int, int] = {}
    inside: list[dict[int, int]] = [{} for _ in layers]
    alive: list[Tensor] = []  # an address that was freed could be given to another tensor
    place = outside

    def save(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in frozen:
            alive.append(tensor)
            place[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    def enter(number: int) -> Callable:
        def hook(_, args, kwargs) -> None:
            nonlocal place
            place = outside
            for given in tree_leaves((args, kwargs)):  # what a checkpointed layer keeps
                if isinstance(given, Tensor):
                    save(given)
            place = inside[number]
        return hook

    def leave(*_) -> None:
        nonlocal place
        place = outside

    hooks = [layer.register_forward_pre_hook(enter(i), with_kwargs=True) for i, layer in enumerate(layers)]
    hooks += [layer.register_forward_hook(leave) for layer in layers]
    try:
        with torch.enable_grad(), saved_tensors_hooks(save, lambda tensor: tensor):
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    own = [{key: size for key, size in layer.items() if key not in outside} for layer in inside]
    kept = sum(outside.values())
    shared = {key: size for layer in own for key, size in layer.items()}
    return {
        "whole": kept + sum(shared.values()), "kept": kept,
        "layer": max((sum(layer.values()) for layer in own), default=kept),
    }


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def measure_pass(module: nn.Module, forward: Callable[[int], Tensor], longest: int) -> PassBytes:
    """`saved_bytes` as polynomials of T; `forward(T)` runs one sequence of T tokens.

    Args:
        longest: tokens of the longest sequence there will be; no more than these (and 96) are run.
    """
    top = min(LONGEST, max(longest, 6))
    found = {length: saved_bytes(module, lambda n=length: forward(n)) for length in (top // 3, 2 * top // 3, top)}
    return PassBytes(**{
        name: Polynomial.through({length: sizes[name] for length, sizes in found.items()})
        for name in ("whole", "kept", "layer")
    })


def policy_forward(
    policy: Policy, *, adapters: bool, dropout: bool = False, padded: bool = True
) -> Callable[[int], Tensor]:
    """One sequence of T tokens through the policy or the base, with gradients at its embeddings.

    Args:
        padded: with padding, which can cost attention its kernels without a mask.
    """

    def forward(length: int) -> Tensor:
        x = torch.zeros(
            1, length, policy.embedding.shape[1], dtype=policy.dtype, device=policy.device, requires_grad=True
        )
        mask = torch.ones(1, length, dtype=torch.bool, device=policy.device)
        mask[:, 0] = not padded
        with policy.state(adapters=adapters, dropout=dropout):
            return policy.hidden(x, mask)

    return forward


def reads_response(reward: Reward) -> bool:
    """Whether a reward with a pass of its own reads the response alone."""
    return reward.reads == "response"


def reward_forward(policy: Policy, reward: Reward) -> Callable[[int], Tensor]:
    """One text of T tokens through a reward with a pass of its own, T of them in the response if it reads no more."""

    def forward(length: int) -> Tensor:
        response = length if reads_response(reward) else length - 1
        ids = torch.zeros(1, response, dtype=torch.int64, device=policy.device)
        ones = torch.ones_like(ids, dtype=torch.bool)
        rollout = Rollout(ids[:, :1], ones[:, :1], ids, ones, ids[..., None], ones.float(), ids)
        fed = [x.requires_grad_() for x in reward.inputs(rollout)]
        return reward.value(rollout, None, fed)

    return forward


@torch.no_grad()
def cache_bytes(policy: Policy) -> tuple[float, float, float]:
    """Bytes of one position's keys and values, (all layers, the largest), and of a response's recurrent states."""
    cache, length = policy.new_cache(), 4
    x = policy.embedding.new_zeros(1, length, policy.embedding.shape[1])
    with policy.state(adapters=False):
        policy.hidden(x, torch.ones(1, length, dtype=torch.bool, device=policy.device), cache)
    sizes = [sum(t.nbytes for t in attention_tensors(layer)) / length for layer in cache.layers]
    return sum(sizes), max(sizes), sum(t.nbytes for layer in cache.layers for t in state_tensors(layer))
