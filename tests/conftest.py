"""Fixtures: the shared data and models, whose tests are skipped where they are absent, and packed heads."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

pytest_plugins = ["tiny_run", "comparisons"]

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_configure(config):
    """What tests measure of this machine is no user's measurement; processes that they start share it."""
    if "GRADE_KERNELS_MEASURED" not in os.environ:
        os.environ["GRADE_KERNELS_MEASURED"] = folder = tempfile.mkdtemp(prefix="grade-measured-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def _shared(*parts: str) -> Path:
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs ../shared/{'/'.join(parts)}, which is not here")
    return path


@pytest.fixture(scope="session")
def shared_imdb() -> Path:
    """Folder of the IMDB reviews, train.parquet and test.parquet."""
    return _shared("data", "imdb")


@pytest.fixture(scope="session")
def imdb_lm() -> Path:
    """Folder of a 6.8M-parameter Llama trained on reviews."""
    return _shared("models", "imdb-lm")


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """Folder of a 260K-parameter Llama trained on stories."""
    return _shared("models", "stories260K")


@pytest.fixture
def packed_heads(monkeypatch):
    """Heads of any size are packed; the numbers of rows that were multiplied with one."""
    import torch

    import grade.sampling.decode
    import grade.sampling.packed_head

    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    rows = []
    product = grade.sampling.packed_head.packed_product

    def counted(hidden, packed):
        rows.append(len(hidden))
        return product(hidden, packed)

    measured = {"packing": 1e-9, "packed": 1e-9, "plain": 1e-6}
    monkeypatch.setattr(grade.sampling.packed_head, "seconds_of", lambda what, ways: measured)
    monkeypatch.setattr(grade.sampling.decode, "packed_product", counted)
    return rows
