"""Code that is kept for one instruction set is not taken for another, and products are left to the quicker library."""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import linear

from grade.model.inductor import take_quicker_products, vector_options
from grade_kernels.common.cpu_products import VARIABLE


@pytest.mark.parametrize(("capability", "bits"), [("AVX2", 256), ("AVX512", 512)])
def test_options_name_the_width_of_vectors(capability, bits, monkeypatch):
    """Options are part of what torch finds its code by."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert vector_options() == {"cpp.simdlen": bits}
    assert set(vector_options()) <= set(torch._inductor.list_options())


def test_others_have_no_width_to_name(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert vector_options() == {}


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@pytest.mark.parametrize(
    ("library", "dtype", "chosen"),
    [("onednn", "float32", 2), ("onednn", "float64", 0), ("onednn", "bfloat16", 0), ("mkl", "float32", 0)],
)
def test_products_by_weights_are_chosen_when_they_run(library, dtype, chosen, monkeypatch):
    """With and without a bias; a product of two things of the batch is left to the compiler."""
    monkeypatch.setenv(VARIABLE, library)
    found = []

    def compile_(graph, inputs):
        take_quicker_products(graph)
        found.extend(node.target for node in graph.graph.nodes)
        return graph

    weight, bias = (torch.randn(shape, dtype=getattr(torch, dtype)) for shape in ((6, 4), (6,)))

    def layer(x):
        return linear(x, weight).relu().T @ linear(x, weight, bias)

    torch._dynamo.reset()
    x = torch.randn(5, 4, dtype=weight.dtype)
    torch._dynamo.maybe_mark_dynamic(x, 0)
    compiled = torch.compile(layer, backend=aot_autograd(fw_compiler=compile_), fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    assert found.count(torch.ops.grade_kernels.cpu_product.default) == chosen
    assert found.count(torch.ops.aten.mm.default) + found.count(torch.ops.aten.addmm.default) == 3 - chosen


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_scaled_products_are_left_to_the_compiler(monkeypatch):
    """And a bias that is one number is added as addmm does."""
    monkeypatch.setenv(VARIABLE, "onednn")
    bias, x, weight = torch.randn(()), torch.randn(5, 4).T.contiguous().T, torch.randn(6, 8)[:, ::2]

    def products(bias, x, weight):
        return torch.addmm(bias, x, weight.T, alpha=0.5), torch.addmm(bias, x, weight.T)

    graph = make_fx(products, tracing_mode="fake")(bias, x, weight)
    take_quicker_products(graph)
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(torch.ops.aten.addmm.default) == 1
    assert targets.count(torch.ops.grade_kernels.cpu_product.default) == 1
    torch.testing.assert_close(graph(bias, x, weight), products(bias, x, weight))
