"""What is trained: a LoRA adapter on some of the layers, or every weight of the backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grade.errors import GradeError
from grade.planning.shape import Linear, ModelShape


@dataclass(frozen=True)
class Trained:
    """The float32 parameters that the optimizer moves.

    Attributes:
        adapted: the linear layers of a layer of the model that have an adapter; empty where every weight is trained.
        rank: of the adapter; 0 where every weight is trained.
        parameters: trained ones.
    """

    shape: ModelShape
    adapted: tuple[Linear, ...]
    rank: int
    parameters: int

    @property
    def everything(self) -> bool:
        return not self.adapted

    @property
    def beside(self) -> int:
        """Multiplications for a token by the adapter, in all layers."""
        return 0 if self.everything else self.parameters

    @property
    def copied(self) -> int:
        """Numbers in the weights that have an adapter: what a float32 rollout copies to add it to them."""
        return self.shape.layers * sum(linear.products for linear in self.adapted)

    @property
    def tensors(self) -> int:
        """Whose gradients are summed over devices one after the other."""
        per_layer = len(self.shape.linears) + 2 if self.everything else 2 * len(self.adapted)
        return self.shape.layers * per_layer

    @property
    def upstream(self) -> int:
        """Multiplications for a token that the gradient of the parameters does not need: through the layers of the
        first layer that no trained parameter lies in front of, back to what they read."""
        if self.everything:
            return sum(linear.products for linear in self.shape.linears if linear.stage == 0)
        branches = ((0, 1), (2, 3)) if self.shape.parallel else ((0, 1, 2, 3),)
        spared = 0
        for stages in branches:
            adapted = [linear for linear in self.adapted if linear.stage in stages]
            first = min((linear.stage for linear in adapted), default=max(stages))
            spared += sum(x.products for x in self.shape.linears if x.stage in stages and x.stage <= first)
            spared += self.rank * sum(linear.inputs for linear in adapted if linear.stage == first)
        return spared


def adapter(shape: ModelShape, rank: int, targets: Sequence[str]) -> Trained:
    """A LoRA adapter on the layers that peft finds by these names: a layer's whole name or its end.

    Raises:
        GradeError: the model has no layer of one of the names.
    """
    for target in targets:
        if not any(_is_meant(linear, target) for linear in shape.linears):
            names = ", ".join(dict.fromkeys(linear.short_name for linear in shape.linears))
            raise GradeError(
                f"model.lora.target_modules has {target!r}, and {shape.name} has no linear layer of this name. It has "
                f"{names}."
            )
    adapted = tuple(linear for linear in shape.linears if any(_is_meant(linear, target) for target in targets))
    of_layer = sum(rank * (linear.inputs + linear.outputs) for linear in adapted)
    return Trained(shape, adapted, rank, shape.layers * of_layer)


def whole_backbone(shape: ModelShape) -> Trained:
    """All but embedding table and head."""
    return Trained(shape, (), 0, shape.backbone_parameters)


def _is_meant(linear: Linear, target: str) -> bool:
    return linear.name == target or linear.name.endswith(f".{target}")
