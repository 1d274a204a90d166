"""The Triton path: interpreted on the CPU if TRITON_INTERPRET=1, and otherwise on a GPU (`pytest -m gpu`)."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from grade_kernels.backend import VARIABLE, interpreting

if importlib.util.find_spec("triton") is None:  # a platform without Triton
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(params=["cpu"] if interpreting() else [pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """"cpu", where Triton's interpreter runs the kernels, or "cuda"."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA or ROCm device; TRITON_INTERPRET=1 interprets the kernels on the CPU")
    return request.param


@pytest.fixture(autouse=True)
def triton_path(monkeypatch):
    """The Triton path or an error; one thread; a fixed seed; whatever a kernel leaves unwritten is NaN."""
    monkeypatch.setenv(VARIABLE, "triton")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty fills with NaN, or the largest integer
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
