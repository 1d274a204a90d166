"""`model.quantization`: a frozen base in few bits, through which replay's gradients come back."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from tiny import loaded_policy
from tiny_run import adapter_of, changed

from grade.config import validate
from grade.errors import GradeError
from grade.model import quantization
from grade.model.fingerprint import model_inputs
from grade.processes import make_accelerator
from grade.training.export import merge
from grade.training.run_folder import prepare_run_dir
from grade.training.trainer import Trainer

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@needs_bitsandbytes
@pytest.mark.parametrize(
    "bits, dtype, packed",
    [("4bit", "float32", torch.uint8), ("4bit", "bfloat16", torch.uint8), ("8bit", "bfloat16", torch.int8)],
)
def test_the_base_is_in_few_bits_and_the_head_in_whole_ones(tiny_config, bits, dtype, packed):
    policy = loaded_policy(changed(tiny_config, model={"quantization": bits, "dtype": dtype}))
    assert {layer.get_base_layer().weight.dtype for layer in policy.adapter_layers} == {packed}
    assert policy.head.weight.dtype == policy.embedding.dtype == getattr(torch, dtype)
    assert {p.dtype for p in policy.parameters()} == {torch.float32} and not policy.merged_weights()
    whole = loaded_policy(changed(tiny_config, model={"dtype": dtype}))
    assert model_inputs(policy) == {**model_inputs(whole), "quantization": bits}
    with pytest.raises(GradeError, match="--merge: the base is quantized .*--model.quantization null"):
        merge(policy, [[1, 2]])


@needs_bitsandbytes
def test_a_run_on_a_quantized_base_learns(tiny_config):
    config = changed(tiny_config, model={"quantization": "4bit"}, train={"steps": 2}, evaluation={"test_prompts": 0})
    trainer = Trainer(config, make_accelerator(config), prepare_run_dir(config))
    base = [layer.get_base_layer().weight.clone() for layer in trainer.policy.adapter_layers]
    before = adapter_of(trainer.policy)
    trainer.fit()
    assert not torch.equal(adapter_of(trainer.policy), before)
    assert all(map(torch.equal, base, (layer.get_base_layer().weight for layer in trainer.policy.adapter_layers)))


def test_without_bitsandbytes_it_is_refused(tiny_config, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GradeError, match="model.quantization=4bit needs bitsandbytes, which is not installed. Install"):
        quantization.loading_options(changed(tiny_config, model={"quantization": "4bit"}).model, torch.device("cpu"))


def test_a_base_without_a_gradient_or_without_quantized_layers_is_refused(tiny_config):
    base, model = loaded_policy(tiny_config).causal_lm, changed(tiny_config, model={"quantization": "4bit"}).model
    with pytest.raises(GradeError, match="no layer of this LlamaForCausalLM is quantized"):
        quantization.check_quantized(base, model)
    base.register_parameter("packed", torch.nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False))
    quantization.check_quantized(base, model)
    base.model.register_forward_hook(
        lambda module, args, out: setattr(out, "last_hidden_state", out.last_hidden_state.detach())
    )
    with pytest.raises(GradeError, match="4bit: no gradient comes back .* on cpu .*does not require"):
        quantization.check_quantized(base, model)


def test_settings_that_cannot_go_with_it(tiny_config):
    for model, rollout, message in (
        ({"quantization": "8bit"}, {}, "8bit rounds .*Set model.dtype to bfloat16"),
        ({"quantization": "4bit"}, {"compile": True}, "rollout.compile records"),
    ):
        with pytest.raises(GradeError, match=message):
            validate(changed(tiny_config, model=model, rollout=rollout))
