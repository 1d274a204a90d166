"""The base's linear layers on a CPU: products by the quicker library, and no gradient for the weight.

The weight is frozen, so that a layer's two products, forward and backward, are both products with it as it lies there.
Which library makes them is `grade_kernels.common.cpu_products`' affair; where that is always MKL nothing is changed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from grade_kernels.common.cpu_products import product, takes_onednn


class FrozenLinear(nn.Linear):
    """What an `nn.Linear` on a CPU becomes by `quicken`: the same function of its input, up to rounding.

    Training its weight, another dtype, a sharded or quantized weight and few rows take the product of `nn.Linear`, and
    so does torch.compile, in whose graphs `grade.model.inductor` then puts the quicker one.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if not takes_onednn(x, weight) or weight.requires_grad or type(weight.data) is not Tensor:
            return linear(x, weight, self.bias)
        out = _Product.apply(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


class _Product(torch.autograd.Function):
    """x [r, i] @ weight.T [i, o], with a gradient to x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return product(gradient, weight.T), None


def quicken(model: nn.Module) -> None:
    """Make `FrozenLinear`s of the linear layers of a model on a CPU, those that adapters wrap included."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.device.type == "cpu":  # no subclass with a forward of its own
            module.__class__ = FrozenLinear


def unquicken(model: nn.Module) -> None:
    """Undo `quicken`: what the model computes is again what it computes in other programs, to the bit."""
    layers: list[nn.Linear] = [module for module in model.modules() if type(module) is FrozenLinear]
    for layer in layers:
        layer.__class__ = nn.Linear
