"""Linear layers of the frozen base by the quicker library: the same values and gradients, and none for the weight."""

import pytest
import torch
from torch import nn

from grade.model.frozen_linear import FrozenLinear, quicken
from grade_kernels.common.cpu_products import VARIABLE


@pytest.fixture(autouse=True)
def onednn(monkeypatch):
    monkeypatch.setenv(VARIABLE, "onednn")


def frozen(**options) -> nn.Linear:
    layer = nn.Linear(6, 5, **options).requires_grad_(False)
    quicken(layer)
    return layer


@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_a_linear_layer(bias):
    layer = frozen(bias=bias)
    assert type(layer) is FrozenLinear
    x = torch.randn(2, 3, 6, requires_grad=True)
    exact = nn.functional.linear(x, layer.weight, layer.bias)
    weights = torch.randn_like(exact)
    torch.testing.assert_close(layer(x), exact)
    gradients = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (layer(x), exact)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("shape", [(6,), (2, 1, 3, 6)], ids=str)
def test_any_number_of_dimensions(shape):
    layer, x = frozen(), torch.randn(shape)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_graph_is_kept_for_another_backward_pass():
    layer, x = frozen(), torch.randn(4, 6, requires_grad=True)
    y = layer(x).square()
    one, two = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(one, two)


def test_only_plain_layers_are_changed():
    class Mine(nn.Linear):
        pass

    model = nn.ModuleList([nn.Linear(6, 5), Mine(6, 5), nn.Conv1d(1, 1, 1)])
    quicken(model)
    assert [type(module) for module in model] == [FrozenLinear, Mine, nn.Conv1d]


def test_other_dtypes_are_multiplied_as_ever():
    layer = nn.Linear(6, 5, dtype=torch.float64).requires_grad_(False)
    quicken(layer)
    x = torch.randn(4, 6, dtype=torch.float64)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_weight_that_is_trained_later_has_its_gradient():
    layer = frozen().requires_grad_(True)
    layer(torch.randn(4, 6)).sum().backward()
    assert layer.weight.grad is not None and layer.bias.grad is not None


def test_weight_changed_in_place_or_replaced_counts():
    """Sampling adds the adapter to it, and takes that back."""
    layer, x = frozen(bias=False), torch.randn(4, 6)
    before = layer(x)
    layer.weight.data = layer.weight.data + 1
    torch.testing.assert_close(layer(x), before + x.sum(-1, keepdim=True))
