"""The optimizer of a run: AdamW over groups of parameters, its learning rate, and the gradients that it takes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import get_scheduler

from grade.config import TrainConfig

Weights = list[tuple[torch.nn.Parameter, Tensor, dict[str, Any] | None]]
"""Every trained parameter, its value, and its moments, which it has from its first update on."""


class Optimization:
    """AdamW with the schedule of the settings.

    Args:
        groups: the policy's parameters first, then those of a method (`torch.optim.Optimizer`'s parameter groups).
        settings: train; its optimizer, schedule and clipping are used.
        accelerator: sums gradients over its processes.

    Attributes:
        adamw: the optimizer itself, whose state a checkpoint keeps.
        rate_factor: what learning rates are multiplied with beside the schedule.
    """

    def __init__(self, groups: Iterable[Mapping[str, Any]], settings: TrainConfig, accelerator: Accelerator) -> None:
        self._settings, self._accelerator = settings, accelerator
        self.rate_factor = 1.0
        self.adamw = torch.optim.AdamW(
            [dict(group) for group in groups],
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_epsilon,
            weight_decay=settings.weight_decay,
        )
        name = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
        # The learning rate is a function of the step and of the settings in force: nothing of it is saved or restored.
        self._schedule = get_scheduler(name, self.adamw, settings.warmup_steps, settings.steps).lr_lambdas[0]

    def parameters(self) -> Iterable[torch.nn.Parameter]:
        """All that is trained."""
        return (parameter for group in self.adamw.param_groups for parameter in group["params"])

    def learning_rate(self, step: int) -> float:
        """That of the policy in a step."""
        return self._settings.learning_rate * self._schedule(step) * self.rate_factor

    def begin(self, step: int) -> None:
        """Set every group's learning rate to that of a step."""
        for group in self.adamw.param_groups:
            group["lr"] = group["initial_lr"] * self._schedule(step) * self.rate_factor

    def clip(self) -> list[float]:
        """Sum the gradients over processes and clip those of each group; the groups' norms before that.

        The policy's gradient is clipped by its own norm, and that of a value head by its: an error of the values,
        large at first, would otherwise shrink the policy's steps.
        """
        limit = self._settings.max_grad_norm or math.inf
        for parameter in self.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if self._accelerator.num_processes > 1:
                parameter.grad = self._accelerator.reduce(parameter.grad, reduction="sum")
        groups = [group["params"] for group in self.adamw.param_groups]
        return [torch.nn.utils.clip_grad_norm_(group, limit).item() for group in groups]

    def update(self) -> None:
        """Take a step along the gradients, and clear them."""
        self.adamw.step()
        self.clear()

    def clear(self) -> None:
        """Drop the gradients."""
        self.adamw.zero_grad(set_to_none=True)

    def copied(self) -> Weights:
        """All that an update changes, as it is now: three times the memory of what is trained."""
        return [
            (parameter, parameter.detach().clone(), copy.deepcopy(self.adamw.state.get(parameter)))
            for parameter in self.parameters()
        ]

    @torch.no_grad()
    def put_back(self, weights: Weights) -> None:
        """What `copied` gave, bit for bit; its tensors become the optimizer's own."""
        for parameter, value, moments in weights:
            parameter.copy_(value)
            if moments is None:
                self.adamw.state.pop(parameter, None)
            else:
                self.adamw.state[parameter] = moments
