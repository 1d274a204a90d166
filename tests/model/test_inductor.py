"""Code that is kept for one instruction set is not taken for another."""

import pytest
import torch

from grade.model.inductor import vector_options


@pytest.mark.parametrize(("capability", "bits"), [("AVX2", 256), ("AVX512", 512)])
def test_options_name_the_width_of_vectors(capability, bits, monkeypatch):
    """Options are part of what torch finds its code by."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert vector_options() == {"cpp.simdlen": bits}
    assert set(vector_options()) <= set(torch._inductor.list_options())


def test_others_have_no_width_to_name(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert vector_options() == {}
