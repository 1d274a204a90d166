"""`train.deterministic` is set for a run's time, and refused where it cannot hold."""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import grade.processes
from grade.config import Config, ModelConfig, TrainConfig, validate
from grade.errors import GradeError
from grade.model.tensors import running_sum
from grade.processes import make_accelerator
from grade.training.determinism import deterministic

GPU = torch.device("cuda")
CONFIG = Config(train=TrainConfig(deterministic=True))


def state():
    attention = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    return torch.are_deterministic_algorithms_enabled(), attention


@pytest.mark.parametrize(("wanted", "device"), [(False, GPU), (True, torch.device("cpu"))])
def test_nothing_changes_unless_it_is_wanted_on_a_gpu(wanted, device):
    before = state()
    with deterministic(wanted, device):
        assert state() == before


def test_it_is_over_after_the_run():
    before = state()
    assert before == (False, (True, True))
    with pytest.raises(RuntimeError, match="on the way"), deterministic(True, GPU):
        assert state() == (True, (False, False)) and torch.backends.cuda.math_sdp_enabled()
        raise RuntimeError("on the way")
    assert state() == before


class Sums(TorchDispatchMode):
    """The devices that running sums are taken on."""

    def __init__(self):
        super().__init__()
        self.devices = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "cumsum" in str(func):
            self.devices.append(out.device.type)
        return out


def test_sums_that_a_gpu_takes_in_any_order_are_a_cpus():
    with FakeTensorMode(), Sums() as sums:  # tensors without data
        numbers, counts = torch.empty(2, 3, device="cuda"), torch.empty(2, 3, dtype=torch.int64, device="cuda")
        assert running_sum(numbers, 1).device.type == "cuda"
        with deterministic(True, GPU):
            assert running_sum(numbers, 1).device.type == running_sum(counts, 1).device.type == "cuda"
    assert sums.devices == ["cuda", "cpu", "cuda"]
    assert torch.equal(running_sum(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 0), torch.tensor([[1.0, 2.0], [4.0, 6.0]]))


@pytest.mark.parametrize(("setting", "value"), [("attn_implementation", "flash_attention_2"), ("quantization", "4bit")])
def test_kernels_that_promise_nothing_are_refused(setting, value):
    model = replace(ModelConfig(dtype="bfloat16"), **{setting: value})
    with pytest.raises(GradeError, match=rf"train\.deterministic is true.*model\.{setting}={value}"):
        validate(replace(CONFIG, model=model))
    validate(replace(CONFIG, model=ModelConfig(attn_implementation="eager")))


@pytest.mark.parametrize(
    ("used", "given", "expected"),
    [(False, None, ":4096:8"), (False, ":16:8", ":16:8"), (True, ":16:8", ":16:8"), (True, None, None)],
)
def test_cublas_is_told_before_it_starts(monkeypatch, used, given, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: used)
    stand_in = SimpleNamespace(num_processes=1, device=torch.device("cpu"))
    monkeypatch.setattr(grade.processes, "Accelerator", lambda **_: stand_in)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given or "")
    if expected is None:
        with pytest.raises(GradeError, match="CUBLAS_WORKSPACE_CONFIG=:4096:8 before it starts"):
            make_accelerator(CONFIG)
        return
    make_accelerator(CONFIG)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == expected
