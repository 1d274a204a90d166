"""The Triton path, interpreted on a CPU or on a GPU.

Every test that takes `device` runs twice: on "cpu" through Triton's interpreter, if TRITON_INTERPRET=1, and on
"cuda" (`pytest -m gpu`) where there is such a device.
"""

from __future__ import annotations

import pytest
import torch

from grade_kernels.backend import VARIABLE, interpreting


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    if request.param == "cpu" and not interpreting():
        pytest.skip("needs TRITON_INTERPRET=1, set before Python starts")
    if request.param == "cuda" and interpreting():
        pytest.skip("TRITON_INTERPRET=1 interprets the kernels on the CPU; unset it to run them on a GPU")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA or ROCm device")
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
