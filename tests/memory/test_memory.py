"""What trials find that a run will need of memory; what it decides by that; running out of it."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from enumeration import ConstantReward
from tiny import tiny_policy, tiny_reward
from tiny_run import trainer_of, with_train

from grade.config import Config, EvaluationConfig, GenerationConfig, MethodConfig, TrainConfig
from grade.config.reading import config_from_yaml, load_config
from grade.errors import GradeError
from grade.machine import free_bytes, is_out_of_memory
from grade.memory.peak import peak_bytes
from grade.memory.plan import SHARE, MemoryPlan, Need, Sizes, foreseen, measured, plan
from grade.methods.grpo import GRPO
from grade.model.checkpoint import load_state
from grade.training.trial import Trial, mixed

CPU = torch.device("cpu")
GIB = 2**30
PROMPTS = [[5] * 12, [6] * 16, [7] * 9]


def config_of(name="grade-ste", checkpoint="auto", batch=2, length=24, **sections) -> Config:
    """Steps of one micro-batch, few hops, every response at its longest."""
    method = MethodConfig(name=name, activation_checkpointing=checkpoint, max_hops=2)
    method.ppo = replace(method.ppo, epochs=1, minibatches=1)
    return Config(
        method=method,
        train=TrainConfig(batch_size=batch, accumulation_steps=1),
        generation=GenerationConfig(max_new_tokens=length, min_new_tokens=0, top_k=32, ignore_eos=True),
        evaluation=EvaluationConfig(batch_size=1),
        **sections,
    )


def trial_of(config: Config, model="llama") -> Trial:
    policy = tiny_policy(model)
    return Trial(policy, tiny_reward(policy), config, PROMPTS, PROMPTS)


# -- measuring -----------------------------------------------------------------------------------------------


def test_peak_counts_live_storages_once():
    x = torch.zeros(1000)

    def two_alive_at_a_time():
        a = x * 2  # 4,000 bytes
        b = a + 1  # 8,000 bytes
        del a
        return b.view(10, 100) * 3  # a view costs nothing; 8,000 bytes again

    result, peak = peak_bytes(two_alive_at_a_time, CPU)
    assert peak == 8000 and result.shape == (10, 100)
    assert peak_bytes(lambda: [x.view(10, 100), x.add_(1), torch.stack([x, x])], CPU)[1] == 8000


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_peak_counts_onednn_layouts():
    """Which have no storage, while they are held."""
    x = torch.zeros(100, 10)
    assert peak_bytes(lambda: (x.to_mkldnn().to_dense(), x.to_mkldnn()), CPU)[1] == 8000  # 4,000 bytes each


@pytest.mark.parametrize("name, recompute", [("grade-ste", False), ("grade-ste", True), ("grpo", False)])
def test_a_trial_is_what_a_step_holds(tiny_config, name, recompute):
    """With the longest prompts, and responses that all are at their longest."""
    method = replace(tiny_config.method, name=name, activation_checkpointing=recompute, kl_coef=0.0)
    config = replace(
        with_train(tiny_config, accumulation_steps=2),
        method=method,
        generation=replace(tiny_config.generation, ignore_eos=True, samples_per_prompt=2, max_new_tokens=24),
    )
    trainer = trainer_of(config)
    found = max(trainer.memory.need.peaks[phase] for phase in ("rollout", "passes"))
    assert trainer.memory.need.how == "at most"
    trial = Trial(trainer.policy, trainer.reward, config, trainer.prompts, trainer.prompts)
    full, times = trial(24, 8, recompute=recompute)
    assert times == 1
    held = peak_bytes(trainer.train_step, CPU)[1]  # the optimizer's moments among it
    assert 0.95 < held / max(full["rollout"], full["passes"]) < 1.02 and held < found


def test_a_trial_asks_no_function_and_puts_generators_back():
    class Asked(ConstantReward):
        def score(self, rollout):
            raise AssertionError("asked in a trial")

    function, differentiable = trial_of(config_of("reinforce")), trial_of(config_of())
    replace(function, reward=Asked(1.0))(4, 2, recompute=False)
    own = differentiable.reward
    value, drawn = own.value, []

    def drawing(*args, **kwargs):
        drawn.append(random.random() + np.random.rand())
        return value(*args, **kwargs)

    own.value = drawing
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    differentiable(4, 2, recompute=False)
    assert drawn and before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


@pytest.mark.parametrize(
    "name, batch, recompute",
    [("grade-ste", 1, False), ("grade", 2, False), ("ppo", 3, False), ("ppo", 2, True), ("reinforce", 2, False)],
)
def test_a_short_trial_bounds_a_long_one_and_three_foresee_it(name, batch, recompute):
    trial = trial_of(config_of(name, batch=batch, length=64))
    trial.policy.causal_lm.set_attn_implementation("eager")  # whose scores grow with the square
    found = {length: trial(length, 8, recompute=recompute)[0] for length in (16, 24, 32, 64)}
    for phase, held in found.pop(64).items():
        assert held < 16 * found[16][phase]
        assert foreseen(found, 64)[phase] == pytest.approx(held, rel=0.15)  # another part may become the largest


def test_a_trial_comes_to_an_update_though_rewards_are_equal(monkeypatch):
    """GRPO's deviation of a group is then 0."""

    def passes(scale: str) -> float:
        config = config_of("grpo", batch=4)
        config.generation.samples_per_prompt, config.method.grpo.advantage_scale = 2, scale
        trial = trial_of(config)
        for parameter in trial.reward.head.parameters():
            parameter.data.zero_()
        return trial(24, 8, recompute=False)[0]["passes"]

    assert passes("std") == passes("none")
    monkeypatch.setattr(GRPO, "step", lambda *_: {})
    with pytest.raises(RuntimeError, match="no update"):
        passes("std")


def test_a_trial_leaves_no_trace():
    trial = trial_of(config_of("ppo"), "qwen3")
    policy, model = trial.policy, trial.policy.model
    before = {name: p.clone() for name, p in model.named_parameters()}
    flags, state, random = [m.training for m in model.modules()], policy.switches.state, torch.get_rng_state()
    trial(8, 8, recompute=False)
    assert policy.switches.state == state and torch.equal(torch.get_rng_state(), random)
    assert flags == [m.training for m in model.modules()]
    for name, parameter in model.named_parameters():
        assert parameter.grad is None and torch.equal(parameter, before[name])


def test_recomputing_saves_and_a_compiled_cache_stays():
    config = config_of(batch=4, length=60)
    plain = trial_of(config)(60, 8, recompute=False)[0]
    assert trial_of(config)(60, 8, recompute=True)[0]["passes"] < 0.8 * plain["passes"]
    config.rollout.compile = True
    assert trial_of(config)(60, 8, recompute=False)[0] == {
        name: size
        + (plain["rollout"] - 8 * sum(p.numel() for p in tiny_policy("llama").parameters()) if name != "rollout" else 0)
        for name, size in plain.items()
    }


def test_padding_is_mixed_in_and_evaluation_has_no_more_prompts_than_there_are():
    assert [len(PROMPTS[number]) for number in mixed(PROMPTS, 7)] == [16, 9, 12, 12, 9, 16, 16]
    config = config_of("grpo", batch=8)
    config.evaluation.batch_size, config.generation.samples_per_prompt, config.generation.batch_size = 64, 2, 5
    config.method.grpo.minibatches = 4
    assert trial_of(config).batches == {"step": 8, "rollout": 4, "passes": 2, "evaluation": 3}


def test_a_narrow_trial_bounds_a_wide_one():
    """In parts of the run's size: of a step's responses, of those that pass together, of the evaluation's."""
    config = config_of("grpo", batch=4)
    config.generation.samples_per_prompt, config.train.accumulation_steps = 2, 8
    trial = trial_of(config)
    (few, times), (many, once) = (trial(16, width, recompute=False) for width in (8, 32))
    assert (times, once) == (4, 1) and all(many[phase] <= 4 * few[phase] for phase in many)
    assert trial(16, 2, recompute=False)[1] == 16


# -- decision ------------------------------------------------------------------------------------------------


class Fake:
    """A trial that holds `a + b S + c S^2` bytes in its passes, and fails with more than `most`."""

    def __init__(self, a=0, b=0, c=0, most=float("inf"), responses=8, **others):
        self.law, self.most, self.responses, self.others, self.tried = (a, b, c), most, responses, others, []

    def held(self, length, recompute=False):
        a, b, c = self.law
        return (a + b * length + c * length**2) * (0.5 if recompute else 1)

    def __call__(self, length, width, *, recompute=False):
        self.tried.append(length if width >= self.responses else width)
        held = self.held(length, recompute) * min(1, width / self.responses)
        if held > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return {"rollout": 0, "passes": held, "evaluation": 0, **self.others}, max(1, self.responses / width)


def test_the_length_grows_until_the_answer_is_known():
    trial = Fake(b=100)
    assert measured(trial, 512, 10**9) == Need({"rollout": 0, "passes": 64 * 6400, "evaluation": 0}, "at most")
    assert measured(trial, 512, None).how == "at most" and trial.tried == [64, 64]
    trial = Fake(a=1000, b=100, c=1)
    need = measured(trial, 512, int(trial.held(512) / 0.9))
    assert trial.tried == [64, 32, 48, 128, 256, 512] and need.total == trial.held(512) and need.how == "about"
    assert need.fits(trial.held(512) / 0.9) and not need.fits(SHARE * trial.held(512) / 0.9)


@pytest.mark.parametrize("law", [dict(b=100), dict(a=5000, b=100), dict(b=10, c=2)])
def test_nothing_is_tried_that_would_not_fit(law):
    trial = Fake(**law)
    free = trial.held(512) // 3
    need = measured(trial, 512, free)
    assert not need.fits(free) and max(map(trial.held, trial.tried)) < free
    assert need.total == pytest.approx(trial.held(512))
    assert [measured(flat := Fake(a=9000), length, 9001).fits(9001) for length in (20, 64, 512)] == [True] * 3
    assert flat.tried[-1] == 512
    wide = Fake(b=1, responses=2**20)
    need = measured(wide, 16, 15)
    assert need.how == "more than" and not need.fits(15) and wide.tried[-1] == 2**19
    assert measured(wide, 16, 20).fits(20) and wide.tried[-1] == 8


def test_a_trial_that_runs_out_of_memory_is_an_answer():
    trial = Fake(b=1, most=100)
    assert measured(trial, 512, 600) == Need({"passes": 600}, "more than") and trial.tried == [64, 32, 48, 128]
    assert not measured(Fake(a=1, most=0), 512, 7).fits(7)
    found = plan(Fake(a=10, most=9), config_of(length=64), SIZES, 10)  # recomputing helps
    assert found.recompute and found.need == Need({"rollout": 0, "passes": 5, "evaluation": 0})
    found = plan(Fake(a=2200, most=1150), config_of(), replace(SIZES, response=16), 1000)  # but not enough
    assert found.recompute and found.need == Need({"rollout": 0, "passes": 1100, "evaluation": 0})
    with pytest.raises(GradeError, match="Set train.batch_size below"):
        found.check()
    unknown = plan(Fake(a=10, most=9), config_of(length=64), SIZES, None)
    assert unknown.recompute and unknown.need.how == "at most"
    unknown = plan(Fake(a=10, most=4), config_of(length=64), SIZES, None)
    assert unknown.recompute and unknown.need.how == "more than" and not unknown.need.fits(None)
    with pytest.raises(GradeError, match="and trials ran out of memory: "):
        unknown.check()
    with pytest.raises(ValueError, match="no memory"):
        measured(lambda length, width: int("no memory"), 8, 9)


SIZES = Sizes(16, 64, {"rollout": 8, "passes": 4, "evaluation": 16}, 2**28, True)


def test_auto_follows_free_memory():
    def recomputes(free, asked="auto", any_process=bool, can=True, **others):
        sizes = replace(SIZES, response=16, can_recompute=can)
        return plan(Fake(a=1000, **others), config_of(checkpoint=asked), sizes, free, any_process).recompute

    assert not recomputes(1251) and recomputes(1249) and not recomputes(None)
    assert recomputes(10**6, any_process=lambda tight: True)  # another process has less
    assert recomputes(10**6, asked=True) and not recomputes(1, asked=False) and not recomputes(1, can=False)
    assert not recomputes(1100, rollout=1000)  # where sampling takes as much, it would only take time


@pytest.mark.parametrize(
    "largest, named, absent",
    [
        (
            "passes",
            [
                "for it: about 3.0 GiB beside what is loaded, at B = 4, P = 16, S = 64, k = 32 (",
                "Set method.activation_checkpointing to true, train.batch_size below 4 (with train.accumulation_steps "
                "above 1 ",
                "generation.batch_size below 8",
                "generation.max_new_tokens below 64",
            ],
            "evaluation.batch",
        ),
        ("rollout", ["in sampling at B = 8", "Set generation.batch_size below 8, "], "evaluation.batch"),
        (
            "evaluation",
            ["in evaluation at B = 16", "Set evaluation.batch_size below 9, method.head_chunk_mib below 256"],
            "train.batch_size",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_change(largest, named, absent):
    config = replace(config_of(batch=4, length=64), evaluation=EvaluationConfig(batch_size=9))
    peaks = {"rollout": 2**20, "passes": 2**21, "evaluation": 2**22, largest: 3 * GIB}
    found = MemoryPlan(config, SIZES, Need(peaks), 2 * GIB, False)
    with pytest.raises(GradeError, match="^the run would need about 3.0 GiB .* 2.0 GiB are free: ") as caught:
        found.check()
    said = str(caught.value).replace("would need", "for it:")
    assert all(name in said for name in named) and absent not in said
    with pytest.raises(GradeError):
        replace(found, free=None).check(any_process=lambda wanted: True)
    replace(found, free=None).check()
    assert "3.0 GiB free; activation checkpointing off (auto). That is tight. Set" in replace(found, free=3 * GIB).line
    assert replace(found, free=4 * GIB).line.endswith("4.0 GiB free; activation checkpointing off (auto)")
    with pytest.raises(GradeError) as caught, found.explained("step 7", "evaluation"):
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore.")
    text = str(caught.value)
    assert "out of memory in step 7" in text and "Set evaluation.batch_size below 9" in text and "\n" not in text
    with pytest.raises(GradeError, match="out of memory in step 8"), found.explained("step 8", "train"):
        torch.empty(2**55)  # what the allocator really says
    with pytest.raises(RuntimeError, match="shapes"), found.explained("step 7", "train"):
        raise RuntimeError("shapes differ")


@pytest.mark.parametrize("text, value", [("auto", "auto"), ("true", True), ("false", False)])
def test_the_setting_has_three_values(tmp_path, text, value):
    (tmp_path / "config.yaml").write_text(f"method:\n  activation_checkpointing: {text}\n")
    for config in (
        config_from_yaml(tmp_path / "config.yaml"),
        load_config("demo", [f"--method.activation_checkpointing={text}"]),
    ):
        found = config.method.activation_checkpointing
        assert found == value and type(found) is type(value)
    with pytest.raises(GradeError, match="^method.activation_checkpointing is maybe: .* be auto or true or false"):
        load_config("demo", ["--method.activation_checkpointing=maybe"])


def test_what_a_container_has_left(monkeypatch, tmp_path):
    for name, text in (("max", "3000"), ("current", "2500"), ("stat", "anon 9\ninactive_file 400\nactive_file 7\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr("grade.machine.CONTROL_GROUP", tmp_path)
    assert free_bytes(CPU) == 900 and free_bytes(CPU, 2) == 450
    (tmp_path / "memory.max").write_text("max\n")
    assert 2**20 < free_bytes(CPU) < 2**50


# -- running out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, expected",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("can't allocate"), False),
    ],
)
def test_what_is_out_of_memory(error, expected):
    assert is_out_of_memory(error) is expected


def test_a_run_that_is_out_of_memory_keeps_its_checkpoint(tiny_config, capfd):
    config = with_train(tiny_config, save_every=1)
    trainer = trainer_of(config)
    step = trainer.method.step

    def second_step_fails(rollouts, number, update):
        if number == 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return step(rollouts, number, update)

    trainer.method.step = second_step_fails
    with pytest.raises(GradeError, match=r"^out of memory in step 1, .* at B = 4, P = \d+, S = 8, k = 32 .*batch_size"):
        trainer.fit()
    assert load_state(Path(config.run_dir) / "checkpoints" / "last")["step"] == 1
    assert config_from_yaml(Path(config.run_dir) / "config.yaml").method.activation_checkpointing == "auto"
    said = " ".join(capfd.readouterr().err.split())
    assert said.count("memory: about") == 1 and "activation checkpointing off (auto)" in said


def test_a_trainer_with_little_memory_recomputes_or_refuses(tiny_config, monkeypatch):
    needed = trainer_of(tiny_config).memory.need.total
    monkeypatch.setattr("grade.training.trial.free_bytes", lambda *_: needed)
    trainer = trainer_of(tiny_config)
    assert trainer.method.activation_checkpointing and trainer.config.method.activation_checkpointing == "auto"
    assert trainer.train_step()["grad_norm"] > 0
    monkeypatch.setattr("grade.training.trial.free_bytes", lambda *_: 1)
    with pytest.raises(GradeError, match="^the run would need about .*generation.max_new_tokens below 8"):
        trainer_of(tiny_config).fit()
    assert not Path(tiny_config.run_dir).exists()
