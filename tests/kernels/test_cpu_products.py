"""Which library multiplies on a CPU: the product is the same, and the choice is that of the first process."""

import json
import math

import pytest
import torch

from grade_kernels import Head
from grade_kernels.common import cpu_products
from grade_kernels.common.cpu_products import VARIABLE, Limits, limits, product, record, restore, takes_onednn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """As in a process that has not multiplied yet, whose user has no file; what the next measurements find."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu_products, "_restored", [])
    found = [Limits(8.0, 64.0)]
    monkeypatch.setattr(cpu_products, "measured_limits", lambda: found.pop(0))
    cpu_products.kept_limits.cache_clear()
    yield found
    cpu_products.kept_limits.cache_clear()


def another_process():
    cpu_products.kept_limits.cache_clear()


@pytest.mark.parametrize("library", ["mkl", "onednn"])
@pytest.mark.parametrize("rows", [1, 5, 33])
def test_product_is_that_of_float64(library, rows, monkeypatch):
    """Also of a transposed view (the backward product) and of a slice of columns (a block of a 16-bit head)."""
    monkeypatch.setenv(VARIABLE, library)
    weight, x = torch.randn(40, 24), torch.randn(rows, 24)
    wide = torch.randn(rows, 100)
    for a, b in ((x, weight), (product(x, weight), weight.T), (wide[:, 30:54], weight)):
        exact = a.double() @ b.double().T
        assert (product(a, b) - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_is_the_same_by_either_library(dtype, monkeypatch):
    head = Head(torch.randn(70, 16).to(dtype), torch.randn(70), 0.5, 20.0)
    hidden, gradient = torch.randn(9, 16).to(dtype), torch.randn(9, 70)
    found = []
    for library in ("mkl", "onednn"):
        monkeypatch.setenv(VARIABLE, library)
        found.append((head.logits(hidden), head.grad_hidden(gradient)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_what_onednn_cannot_take_is_left_to_torch(monkeypatch):
    monkeypatch.setenv(VARIABLE, "onednn")
    for dtype in (torch.float64, torch.bfloat16):
        assert not takes_onednn(torch.ones(3, 4, dtype=dtype), torch.ones(2, 4, dtype=dtype))
    assert product(torch.ones(0, 4), torch.ones(2, 4)).shape == (0, 2)
    assert takes_onednn(torch.ones(3, 4), torch.ones(2, 4))


def test_compiles_into_one_graph(monkeypatch):
    monkeypatch.setenv(VARIABLE, "onednn")
    weight, x = torch.randn(6, 4), torch.randn(3, 4)
    compiled = torch.compile(product, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, weight), x @ weight.T)


def test_rows_and_work_decide(measured):
    weight = torch.ones(2, 4)
    assert not takes_onednn(torch.ones(7, 4), weight)  # too few rows
    assert takes_onednn(torch.ones(8, 4), weight)  # 8 rows of 8 entries
    assert takes_onednn(torch.ones(2, 4, 4), weight)
    assert not takes_onednn(torch.ones(8, 4), torch.ones(1, 4))  # too little work


def test_next_process_chooses_alike(measured, tmp_path):
    first = limits()
    measured.append(None)
    another_process()
    assert limits() == first and measured == [None]  # read, not measured
    path = tmp_path / "grade_kernels" / "cpu_products.json"
    path.write_text("[1", encoding="utf-8")
    another_process()
    assert limits() is None  # a damaged file is measured and written again
    another_process()
    assert limits() is None and json.loads(path.read_text())


def test_other_processors_and_instructions_have_limits_of_their_own(measured, monkeypatch):
    first = limits()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    measured.append(Limits(16.0, 1.0))
    another_process()
    assert limits() == Limits(16.0, 1.0)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    another_process()
    assert limits() == first  # both are in the file


def test_a_folder_that_cannot_be_written_is_no_error(measured, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert limits() == Limits(8.0, 64.0)


def test_restored_limits_count_before_measured_ones(measured):
    restore({"rows": 4.0, "work": 2.0})
    assert limits() == Limits(4.0, 2.0) and record() == {"rows": 4.0, "work": 2.0}
    restore(None)
    assert limits() is None and record() is None
    assert measured  # nothing was measured


def test_measurement_gives_powers_of_two():
    found = cpu_products.measured_limits()
    assert found is None or all(math.frexp(value)[0] == 0.5 for value in (found.rows, found.work))


def test_another_value_is_refused(monkeypatch):
    monkeypatch.setenv(VARIABLE, "blas")
    with pytest.raises(ValueError, match=f"{VARIABLE} must be 'mkl' or 'onednn', or unset to measure, got 'blas'"):
        limits()
