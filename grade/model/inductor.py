"""What torch.compile's code generator has to be told on a CPU: the width of vectors, and who makes products."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from grade_kernels.common.cpu_products import may_take_onednn

# Bits of the vectors that its code for an instruction set is written for; others have one width, or none.
_VECTOR_BITS = {"AVX2": 256, "AVX512": 512}


def vector_options() -> dict[str, Any]:
    """The width of the vectors that its code is written for, as options of Inductor; empty where there is one only.

    What it keeps on disk is found by the graph and the options. Torch up to 2.13 leaves the instruction set out: code
    written for narrow vectors (`ATEN_CPU_CAPABILITY=avx2`, another machine with the same folder) is found again,
    compiled for wide ones, and writes beyond the end of its arrays.
    """
    bits = _VECTOR_BITS.get(torch.backends.cpu.get_cpu_capability())
    return {} if bits is None else {"cpp.simdlen": bits}


def take_quicker_products(graph: fx.GraphModule) -> None:
    """Let the code of a graph multiply by weights as layers' own code does: Inductor would leave all products to MKL.

    Float32 products on a CPU become `grade_kernels.common.cpu_products`' operator, which chooses when it runs: by then
    a resumed run has what an earlier one chose by. A matrix whose sizes are all fixed is taken for a weight: sizes that
    follow from the batch are left open where a graph is compiled (`grade.model.compiled_layers`), except those of 1. A
    product of two things of a batch of 1 may so be chosen when it runs, too; it is the same by either library.
    """
    if not may_take_onednn():
        return
    aten, product = torch.ops.aten, torch.ops.grade_kernels.cpu_product.default
    for node in graph.graph.find_nodes(op="call_function", target=aten.mm.default):
        if _multiplies_by_weight(*node.args):
            node.target = product
    for node in graph.graph.find_nodes(op="call_function", target=aten.addmm.default):
        bias, *factors = node.args
        if _multiplies_by_weight(*factors) and not node.kwargs:
            with graph.graph.inserting_before(node):
                multiplied = graph.graph.call_function(product, tuple(factors))
            multiplied.meta["val"] = node.meta["val"]
            node.target, node.args = aten.add.Tensor, (multiplied, bias)
    graph.recompile()


def _multiplies_by_weight(x: fx.Node, weight: fx.Node) -> bool:
    left, right = x.meta["val"], weight.meta["val"]
    able = left.device.type == "cpu" and left.dtype == right.dtype == torch.float32
    return able and all(isinstance(size, int) for size in right.shape)
