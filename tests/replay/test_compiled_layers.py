"""`train.compile` computes what layers compute, compiled once for all layers and lengths."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
import torch._inductor.compile_fx
from rollouts import PROMPTS, gradient, rollout_of
from tiny import CONFIGS, TinyTokenizer, base_model, tiny_policy, tiny_reward, two_references
from tiny_run import changed

import grade.replay.compiling
from grade.config import Config, GenerationConfig, MethodConfig, TaskConfig, TrainConfig, validate
from grade.errors import GradeError
from grade.model.policy import Policy
from grade.planning.recording import LEAST_MICRO_BATCHES, layers_pay
from grade.processes import make_accelerator
from grade.replay.compiling import compile_layers
from grade.replay.replay import ReplaySettings
from grade.replay.score import score
from grade.training.run_folder import prepare_run_dir
from grade.training.trainer import Trainer
from grade_kernels.common.cpu_products import VARIABLE

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "c++", "clang++")), reason="needs a C++ compiler"
)
SETTINGS = ReplaySettings(tau=1.3, max_hops=5, hop_tol=0.0)
SHORT = Config(
    train=TrainConfig(compile=True, batch_size=4),
    generation=GenerationConfig(max_new_tokens=8, min_new_tokens=1),
    task=TaskConfig(prompt_max_tokens=6),
)


def relative(ours, plain):
    return ((ours - plain).norm() / plain.norm()).item()


def compared(policy, reward, rollout, settings=SETTINGS):
    """The relative difference of a gradient by compiled layers and by their own code."""
    plain = gradient(policy, reward, rollout, settings)
    return relative(gradient(policy, reward, rollout, replace(settings, training=True)), plain)


@pytest.fixture
def traced(monkeypatch):
    """Graphs are made as for the compiler, but run as they are: (whether it is a backward, operations, calls so far,
    products that are chosen when they run) of each half that would have been compiled."""
    # What other tests saw change, a size or a number of another model, would be left open in more graphs.
    torch._dynamo.reset()
    halves = []

    def run(graph, inputs, **how):
        chosen = [node.target for node in graph.graph.nodes].count(torch.ops.grade_kernels.cpu_product.default)
        half = [bool(how.get("is_backward")), len(graph.graph.nodes), 0, chosen]
        halves.append(half)

        def call(arguments):
            half[2] += 1
            return graph(*arguments)

        call._boxed_call = True
        return call

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx_inner", run)
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        yield halves


@needs_compiler
def test_compiled_layers_give_the_gradient_of_their_own_code():
    """By real code, in float32; batches of two sizes and lengths. Three graphs, each for both layers: the policy, the
    base over prompts, and behind their cache."""
    policy = tiny_policy("llama")
    reward = tiny_reward(policy)
    note = compile_layers(policy, SHORT)
    assert note is not None and "3 graphs" in note
    for size, length in ((4, 8), (3, 11)):
        rollout = rollout_of(policy, max_new=length, prompts=PROMPTS[:size])
        assert 0 < compared(policy, reward, rollout) < 1e-5  # 0: nothing was fused
        assert policy.switches.compilations == 3
        score(policy, reward, rollout, SETTINGS)  # evaluations, in batches of other sizes, run the layers' own code
    assert policy.switches.compilations == 3 and not any("forward" in vars(m) for m in policy.modules.modules())


def test_hops_leave_out_the_gradients_of_weights(traced, monkeypatch):
    """Of the policy's backward there are two: the hops take the smaller, once a layer each, and the end the other.

    Products by weights are chosen when they run, those of 7 linear layers and of two factors of 4 adapters; gradients
    of weights are products of two things of the batch."""
    monkeypatch.setenv(VARIABLE, "onednn")
    policy = tiny_policy("llama")
    compile_layers(policy, SHORT)
    policy_forward, whole, part, base_prompts, base_forward, base_backward = traced
    assert [half[0] for half in traced] == [False, True, True, False, False, True]
    if torch.backends.mkldnn.is_available():
        assert [half[3] for half in traced] == [7 + 8, 7 + 8, 7 + 8, 7, 7, 7]
    assert part[1] < whole[1] - 14  # two products for each of the four adapters, and what is around them
    before = [half[2] for half in traced]
    rollout = rollout_of(policy, max_new=8)
    gradient(policy, tiny_reward(policy), rollout, replace(SETTINGS, training=True))
    calls = [half[2] - earlier for half, earlier in zip(traced, before, strict=True)]
    layers = 2
    assert calls == [layers, layers, layers * SETTINGS.max_hops, layers, layers, layers]


def test_hops_leave_out_prompts_of_a_pass_of_their_own(traced):
    """The prompts' backward runs once, and a hop leaves out the gradients at their keys and values, too. The prompts'
    first layer, whose input has no gradient, has a graph of its own."""
    policy = tiny_policy("llama")
    compile_layers(policy, changed(SHORT, task={"prompt_max_tokens": 44}, generation={"max_new_tokens": 6}))
    first, first_backward, prompts, prompts_backward, policy_forward, whole, part, *base = traced
    assert [half[0] for half in traced] == [False, True, False, True, False, True, True, False, False, True]
    assert part[1] < whole[1] - 14 - 6, (part, whole)
    before = [half[2] for half in traced]
    rollout = rollout_of(policy, max_new=6, prompts=[list(range(4, 48)), list(range(8, 48))], copies=2)
    assert compared(policy, tiny_reward(policy), rollout) < 1e-5
    calls = [half[2] - earlier for half, earlier in zip(traced, before, strict=True)]
    layers = 2
    assert calls[:4] == [1, 1, 1, 1] and calls[4:7] == [layers, layers, layers * SETTINGS.max_hops]


def test_recomputed_layers_are_compiled_once(traced):
    """The same code in the forward, its recomputation and with none of it; without a cache for the base."""
    policy = tiny_policy("llama", dropout=0.1)
    reward = tiny_reward(policy)
    policy.switches.compile_layers()
    rollout = rollout_of(policy)
    assert compared(policy, reward, rollout, replace(SETTINGS, prompt_cache=False)) < 1e-5
    policy.enable_activation_checkpointing()
    settings = replace(SETTINGS, prompt_cache=False, activation_checkpointing=True)
    assert compared(policy, reward, rollout, settings) < 1e-5
    assert policy.switches.compilations == 2
    # Dropout is drawn again as it was, or the hops would follow another mask than the forward.
    settings, found = replace(settings, dropout=True, training=True), []
    for recompute in (True, False):
        torch.manual_seed(0)
        settings = replace(settings, activation_checkpointing=recompute)
        found.append(gradient(policy, reward, rollout, settings))
    assert relative(*found) < 1e-5


@pytest.mark.parametrize("name", ["gemma2", "gpt2"])
def test_layers_of_other_kinds(traced, name):
    """Windows beside full attention; a cache that is given by place and not by name."""
    policy = tiny_policy(name)
    compile_layers(policy, SHORT)
    found = policy.switches.compilations
    assert found <= 4
    assert compared(policy, tiny_reward(policy), rollout_of(policy, max_new=8)) < 1e-5
    assert policy.switches.compilations == found


def test_policy_gradients_compile_their_passes(traced):
    """A graph of the first layer, whose input has no gradient, one of the others, and of what needs no backward: the
    base over prompts and behind their cache, and in PPO the policy as it was."""
    note = compile_layers(tiny_policy("llama"), replace(SHORT, method=MethodConfig(name="ppo")))
    assert note is not None and "5 graphs" in note
    assert [half[0] for half in traced] == [False, True, True, False, True, True, False, False, False]


class Larger(torch.autograd.Function):
    """What it is given, and a gradient a hundredth larger."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 1.01


def test_other_numbers_are_refused(monkeypatch):
    torch._dynamo.reset()

    def wrong(graph, inputs, **how):
        return lambda *given: tuple(Larger.apply(one) for one in graph(*given))

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", wrong)
    with pytest.raises(GradeError, match="train.compile: .*other states or gradients than their own code. Set"):
        compile_layers(tiny_policy("llama"), SHORT)


def test_what_cannot_be_compiled_is_told(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", fail)
    policy = tiny_policy("llama")
    with pytest.raises(GradeError, match="train.compile: torch.compile failed .*no working C.. compiler.*Mend what"):
        compile_layers(policy, SHORT)
    monkeypatch.setattr(grade.replay.compiling, "layers_pay", lambda config, on_gpu: True)
    note = compile_layers(policy, changed(SHORT, train={"compile": "auto"}))
    assert "train.compile=auto: layers are not compiled" in note and "no working C++ compiler" in note
    assert compared(policy, tiny_reward(policy), rollout_of(policy)) == 0  # by their own code
    policy.backbone.layers[0].forward = lambda *args, **kwargs: None
    with pytest.raises(GradeError, match="train.compile: the forward of its layers has been replaced. Set"):
        compile_layers(policy, SHORT)


def test_auto_is_for_long_runs_on_a_gpu():
    long = changed(SHORT, train={"compile": "auto", "steps": LEAST_MICRO_BATCHES // 2, "accumulation_steps": 2})
    assert layers_pay(long, on_gpu=True) and not layers_pay(long, on_gpu=False)
    assert not layers_pay(changed(long, train={"steps": long.train.steps - 1}), on_gpu=True)
    for model in ({"quantization": "4bit"}, {"fsdp": True}):
        validate(changed(long, model=model))
        assert not layers_pay(changed(long, model=model), on_gpu=True)
    assert compile_layers(tiny_policy("llama"), long) is None
    assert compile_layers(tiny_policy("llama"), changed(long, train={"compile": False})) is None


@pytest.mark.parametrize(
    "model, message",
    [
        ({"quantization": "4bit"}, "train.compile fuses layers, and the packed products of model.quantization=4bit"),
        ({"fsdp": True}, "(?i)model.fsdp shards .*train.compile is true.*Set it to false"),
    ],
)
def test_settings_that_cannot_go_with_it(model, message):
    with pytest.raises(GradeError, match=message):
        validate(changed(SHORT, model=model))


def test_a_run_with_it(traced, tiny_config):
    """From the trial of its memory, which runs the layers' own code, to its test; in as many graphs as at its start."""
    config = changed(tiny_config, train={"compile": True})
    trainer = Trainer(config, make_accelerator(config), prepare_run_dir(config))
    before = trainer.policy.switches.compilations
    trainer.fit()
    ran = [half[2] for half in traced]
    assert trainer.step == config.train.steps and before == 3 and all(ran)


@pytest.mark.parametrize(
    "policy_of, graphs",
    [(lambda: Policy(base_model(CONFIGS["llama"]()), TinyTokenizer()), 3), (two_references, 5)],
    ids=["whole model", "second adapter"],
)
def test_whole_models_and_other_references(traced, policy_of, graphs):
    """Of a whole model the trained layers and the frozen ones; the base and a reference that is not the base."""
    policy = policy_of()
    compile_layers(policy, SHORT)
    found = policy.switches.compilations
    assert graphs <= found <= graphs + 1  # torch tries first whether a number that other tests' layers had differs
    assert compared(policy, tiny_reward(policy), rollout_of(policy, max_new=8)) < 1e-5
    assert policy.switches.compilations == found and any(half[2] for half in traced)
