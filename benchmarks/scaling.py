"""The formulas of `grade plan` against what a step really does: operations, bytes held, and seconds.

    python -m benchmarks.scaling                                              # counted here, in a minute
    python -m benchmarks.scaling --save benchmarks/results/scaling.json       # kept
    python -m benchmarks.scaling --table benchmarks/results/scaling.json      # the tables of what was kept
    python -m benchmarks.scaling --seconds benchmarks/results/training-cpu.json   # a measurement of benchmarks.training

A small Llama with random weights takes a step by each method at several lengths and numbers of responses. Operations
are those of matrix products, as `torch.utils.flop_counter` counts them, with attention written out in products (its
fused form on a CPU is not counted). Bytes are the peak of what living tensors hold beside the model, in a step of its
own. Seconds are compared phase by phase with those that `benchmarks.training` measured: at shares of the machine's
rates that are fitted to them, two numbers and a launch for all phases and lengths.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.saved import SAVED, command, new_parser, read_saved
from benchmarks.training_setup import SHAPES, Bench, Setting
from grade.config import Config
from grade.memory.peak import peak_bytes
from grade.methods import make_method
from grade.methods.services import Services
from grade.model.policy import Policy
from grade.planning.devices import DEVICES, Efficiency
from grade.planning.memory import memory_of
from grade.planning.phases import phases_of
from grade.planning.run import Run
from grade.planning.shape import shape_of
from grade.rewards.base import Reward
from grade.sampling.sample import sample
from grade.tables import Column, Table, numbers

WRITTEN_OUT = Efficiency(attention_backward=2.0)
"""Attention in products of its own, whose backward pass reads the scores that were kept."""
_SIZES = ((1, 16, 32), (2, 16, 64), (4, 16, 64), (4, 64, 64), (2, 16, 256))
"""B, P and S."""
METHODS = ("grade-ste", "ppo", "reinforce", "grpo")


class Counting(TorchDispatchMode):
    """Operations of the phases of a step, while it is active, by the formulas of `torch.utils.flop_counter`, whose own
    counter follows modules by hooks that recomputed layers do not bear."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: dict[str, float] = {}
        self._total = 0.0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        operator: Any = func
        kwargs, packet = kwargs or {}, operator._overloadpacket
        if packet not in flop_registry:
            with self:  # such as a linear layer in inference mode
                out = operator.decompose(*args, **kwargs)
            return func(*args, **kwargs) if out is NotImplemented else out
        out = func(*args, **kwargs)
        self._total += flop_registry[packet](*args, **kwargs, out_val=out)
        return out

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is counted inside is the phase's."""
        before = self._total
        yield
        self.flops[name] = self.flops.get(name, 0.0) + self._total - before


def step(policy: Policy, reward: Reward, config: Config, prompts: Tensor, services: Services) -> float:
    """A step of config's method without its update: sampled, and differentiated. Returns the hops of a sequence, 0
    where the method has none.

    Args:
        prompts: [U, P], without padding.
    """
    method = make_method(
        policy,
        reward,
        config.method,
        config.generation,
        config.train,
        services,
        seed=config.seed,
        activation_checkpointing=config.method.activation_checkpointing is True,
    )
    copies, length = config.generation.samples_per_prompt, config.generation.max_new_tokens
    rows = torch.arange(len(prompts) * copies) * length
    with services.phase("rollout"):
        rollout = sample(
            policy,
            prompts,
            torch.ones_like(prompts, dtype=torch.bool),
            method.sampling(0),
            seed=config.seed,
            first_rows=rows,
            samples_per_prompt=copies,
        )
    metrics = method.step([rollout], 0, lambda: 0.0)
    for parameter in policy.parameters():
        parameter.grad = None
    return metrics.get("hops", 0.0)


def counted(policy: Policy, reward: Reward, config: Config, prompts: Tensor) -> tuple[dict[str, float], float]:
    """({phase: operations}, hops) of a step."""
    with Counting() as counting:
        hops = step(policy, reward, config, prompts, Services(phase=counting.phase))
    return counting.flops, hops


def held(policy: Policy, reward: Reward, config: Config, prompts: Tensor) -> int:
    """Peak of the bytes that a step's tensors hold beside what is loaded."""
    return peak_bytes(lambda: step(policy, reward, config, prompts, Services()), torch.device("cpu"))[1]


def planned_run(policy: Policy, config: Config, hops: float, efficiency: Efficiency = WRITTEN_OUT) -> Run:
    """The run whose formulas are compared."""
    recompute = config.method.activation_checkpointing is True
    shape = shape_of(policy.causal_lm.config.to_dict(), type(policy.causal_lm).__name__)
    return Run(config, shape, DEVICES["cpu"], hops=hops, recompute=recompute, efficiency=efficiency)


def planned_flops(run: Run) -> dict[str, float]:
    """{phase: operations} by the formulas."""
    return {phase.name: phase.work.flops for phase in phases_of(run)}


def planned_bytes(run: Run) -> float:
    """What a step holds beside what is loaded and the optimizer's moments, by the formulas."""
    memory = memory_of(run)
    return memory.peak - sum(memory.parts["always"].values())
