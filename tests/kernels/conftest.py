"""One set of tests for both paths of the kernels: `backend` is "torch" or "triton", `device` where the tensors are.

Triton decides when it is imported whether it interprets its kernels, so a CPU runs the tests in two processes: with
TRITON_INTERPRET=1 those of the Triton path, and without it all others.  A GPU runs everything in one.  What the
process at hand cannot run is deselected.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from grade_kernels.backend import VARIABLE, implementation, interpreting

HERE = Path(__file__).parent
ON_GPU = torch.cuda.is_available() and not interpreting()
TRITON = importlib.util.find_spec("triton") is not None  # there are platforms without it
collect_ignore_glob = [] if TRITON else ["test_triton_*.py"]


@pytest.hookimpl(tryfirst=True)  # before -m and -k look at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep what runs here; float64 has no Triton path."""
    kept, dropped = [], []
    for item in items:
        triton = item.get_closest_marker("triton") is not None
        ours = item.path.is_relative_to(HERE)
        if ours and ON_GPU and (triton or "device" in getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.gpu)
        if not ours:
            runs = True
        elif item.get_closest_marker("gpu") is not None and not ON_GPU:
            runs = False
        elif triton:
            double = getattr(item, "callspec", None) and item.callspec.params.get("dtype") == torch.float64
            runs = TRITON and (ON_GPU or interpreting()) and not double
        else:
            runs = not interpreting()
        (kept if runs else dropped).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@pytest.fixture(params=["torch", pytest.param("triton", marks=pytest.mark.triton)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The path that every operation takes, or an error."""
    monkeypatch.setenv(VARIABLE, request.param)
    return request.param


@pytest.fixture
def ops(backend: str) -> ModuleType:
    """The operations of the backend without checks and autograd: `torch_ops` or `triton_ops`."""
    return implementation(backend)


@pytest.fixture
def device() -> str:
    """ "cuda" on a GPU, else "cpu"."""
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture(autouse=True)
def fixed_conditions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, since the problems are small; a fixed seed; and what a kernel leaves unwritten is NaN."""
    triton = request.node.get_closest_marker("triton") is not None
    if triton:
        monkeypatch.setenv(VARIABLE, "triton")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(triton, warn_only=True)  # torch.empty fills with NaN, or the largest integer
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
