"""Which library multiplies on a CPU: the product is the same, and from where on is measured."""

import math

import pytest
import torch

from grade_kernels import Head
from grade_kernels.common import cpu_products, quickest
from grade_kernels.common.cpu_products import VARIABLE, Limits, limits, product, restore, takes_onednn

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture
def seconds(monkeypatch):
    """What is measured, in place of a measurement: a large gain of oneDNN."""
    entries, large = (math.prod(shape) for shape in (cpu_products._WEIGHT, cpu_products._LARGE))
    work = cpu_products._ROWS * entries
    found = [2e-9 * work, 1e-9 * work, 1e-9 * work + 8 * 60e-9, 7e-9 * large]
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(quickest, "seconds_of", lambda what, ways, rounds: dict(zip(ways, found, strict=True)))
    cpu_products.measured_limits.cache_clear()
    yield found
    cpu_products.measured_limits.cache_clear()


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


@pytest.mark.parametrize("library", ["mkl", "onednn"])
def test_operator_of_generated_code(library, monkeypatch):
    monkeypatch.setenv(VARIABLE, library)
    operator, weight, x = torch.ops.grade_kernels.cpu_product.default, torch.randn(6, 4), torch.randn(3, 4)
    for factors in ((x, weight.T), (torch.randn(3, 6), weight)):
        torch.testing.assert_close(operator(*factors), factors[0] @ factors[1])
        torch.library.opcheck(operator, factors, test_utils=("test_schema", "test_faketensor"))


def test_rows_and_work_decide(seconds):
    """A row saves 1 ns an entry, the weight costs 7 ns an entry, and a new size 60 ns a use."""
    assert limits() == Limits(8.0, 64.0)
    weight = torch.ones(2, 4)
    assert not takes_onednn(torch.ones(7, 4), weight)  # too few rows
    assert takes_onednn(torch.ones(8, 4), weight)  # 8 rows of 8 entries
    assert takes_onednn(torch.ones(2, 4, 4), weight)
    assert not takes_onednn(torch.ones(8, 4), torch.ones(1, 4))  # too little work


def test_what_a_clock_does_not_see_is_no_gain(seconds):
    seconds[:] = [0.0] * 4
    assert limits() is None


def test_a_small_gain_is_none(seconds):
    seconds[1] = 0.81 * seconds[0]
    assert limits() is None and not takes_onednn(torch.ones(1000, 1000), torch.ones(1000, 1000))


def test_a_clock_that_is_too_coarse_says_no_gain(seconds):
    seconds[:] = [0.0, 0.0, 0.0, 0.0]
    assert limits() is None


def test_times_are_told_by_name(seconds, monkeypatch):
    """Whoever kept them may have sorted them."""
    told = quickest.seconds_of
    monkeypatch.setattr(quickest, "seconds_of", lambda *given: dict(reversed(told(*given).items())))
    assert limits() == Limits(8.0, 64.0)


def test_restored_times_count(seconds):
    """A resumed run rounds its sums as before; the times themselves are tested in test_quickest.py."""
    assert limits() is not None
    seconds[1] = seconds[0]
    assert limits() is not None  # nobody measures again
    restore({})
    assert limits() is None


def test_a_measurement_gives_powers_of_two_and_leaves_the_threads():
    threads = torch.get_num_threads()
    cpu_products.measured_limits.cache_clear()
    found = cpu_products.measured_limits()
    assert found is None or all(math.frexp(value)[0] == 0.5 for value in (found.rows, found.work))
    assert torch.get_num_threads() == threads


def test_another_value_is_refused(monkeypatch):
    monkeypatch.setenv(VARIABLE, "blas")
    with pytest.raises(ValueError, match=f"{VARIABLE} must be 'mkl' or 'onednn', or unset to measure, got 'blas'"):
        limits()
