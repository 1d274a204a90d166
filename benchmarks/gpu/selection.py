"""The tests that a GPU runs first, and how a process of pytest is told of them.

`tests/test_gpu.py` needs no fixtures of `tests/conftest.py`, and the tests of the kernels have their own: with
`--confcutdir=tests/kernels` the libraries of the other tests need not be installed.
"""

from __future__ import annotations

import sys

FIRST = "tests/test_gpu.py"
LARGE = "tests/kernels/test_triton_full_size.py"
KERNELS = (
    LARGE,
    "tests/kernels/test_vocab_head.py::test_everything_against_dense_float64",
    "tests/kernels/test_vocab_objective.py::test_everything_against_dense_float64",
    "tests/kernels/test_triton_vjp.py::test_rules",
    "tests/kernels/test_gumbel_topk.py::test_sizes",
    "tests/kernels/test_triton_sample.py",
    "tests/kernels/test_kl.py::test_no_worse_than_plain_pytorch",
    "tests/kernels/test_kl.py::test_sizes",
    "tests/kernels/test_logprob.py::test_no_worse_than_plain_pytorch",
    "tests/kernels/test_logprob.py::test_sizes",
    "tests/kernels/test_triton_noise.py",
    "tests/kernels/test_soft_embedding.py::test_soft_embedding_and_its_gradients",
    "tests/kernels/test_scatter.py::test_scatter",
    "tests/kernels/test_triton_operators.py",
)
"""One or two tests of every operation against float64, at real sizes first: some 170 of them."""
DRY = ("tests/kernels/test_scatter.py::test_weights_vjp",)


def command(dry: bool, everything: bool) -> list[str]:
    """Of a worker.

    Args:
        everything: all tests that a GPU runs below tests/kernels, after those of the list.
    """
    chosen = [FIRST, *(DRY if dry else KERNELS), *(["tests/kernels"] if everything else [])]
    options = ["-q", "--no-header", "--no-summary", "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    return [
        sys.executable,
        *("-m", "pytest", "-p", "benchmarks.gpu.tests", "--confcutdir=tests/kernels", *options),
        *("-m", "triton or gpu" if dry else "gpu"),
        *([] if everything else ["-k", "test_gpu or triton"]),  # not the PyTorch path on a GPU
        *chosen,
    ]
