"""`grade plan`: every shipped config, more devices, what fits, and what is refused by name."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from grade import cli
from grade.commands.plan import planned
from grade.config import Config, LoraSettings, ModelConfig, RewardConfig, reading
from grade.errors import GradeError
from grade.memory import plan as trials
from grade.planning.devices import DEVICES, Efficiency
from grade.planning.memory import SHARE, memory_of
from grade.planning.phases import phases_of
from grade.planning.text import as_json, quantity, sentences

LARGE = "meta-llama/Llama-3.1-70B"


load_config = functools.cache(reading.load_config)


def one_by_one() -> Config:
    """A step of 16 responses that pass one after the other."""
    config = load_config("imdb_qwen3_4b")
    return replace(config, train=replace(config.train, batch_size=1, accumulation_steps=16))


def large(**sections) -> Config:
    """70 billion parameters, long responses."""
    config = one_by_one()
    config = replace(config, model=replace(config.model, name=LARGE))
    return replace(
        config,
        generation=replace(config.generation, max_new_tokens=1024),
        task=replace(config.task, prompt_max_tokens=512),
        **sections,
    )


@pytest.mark.parametrize("name", reading.shipped_configs())
def test_every_shipped_config_has_a_plan(name, capsys, request):
    arguments, config = ["plan", name], load_config(name)
    if name == "imdb_small":
        folder = str(request.getfixturevalue("imdb_lm"))
        arguments += ["--model.name", folder]
        config = replace(config, model=replace(config.model, name=folder))
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    phases = {"policy_forward", "hops"} if config.method.name == "grade-ste" else {"score", "backward"}
    for word in (*phases, "rollout", "update", "bound by", "50% reached" if config.device != "cpu" else "45% reached"):
        assert word in shown
    found = json.loads(json.dumps(as_json(planned(config))))
    assert phases < {phase["name"] for phase in found["phases"]}
    assert found["seconds"] == pytest.approx(sum(phase["seconds"] for phase in found["phases"]))
    assert found["fits"] is (None if config.device == "cpu" else True)


def test_json_is_what_a_program_reads(capsys):
    assert cli.main(["plan", "imdb_qwen3_4b", "--json", "--gpu", "mi300x", "--flops", "0.3", "--hops", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"]["name"] == "mi300x" and found["assumptions"]["flops"] == 0.3 and found["sizes"]["hops"] == 2


def test_it_needs_no_torch():
    """And no weights: only names of a table."""
    code = "import sys; from grade.cli import main; main(['plan', 'imdb_qwen3_4b']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_large_model_is_sharded_and_sampling_then_bound_by_the_interconnect():
    found = planned(large(), gpu="h100", gpus=16)
    assert found.run.shards == 4 and found.fits
    rollout = found.phases[0]
    assert rollout.name == "rollout" and rollout.time.bound == "interconnect"
    gathered = 1023 * 0.75 * 2 * found.run.shape.products  # at every token but the first, of which the prompt's pass
    assert rollout.work.received == pytest.approx(gathered, rel=2e-3)
    ways = {way.name: way.time for way in found.ways}
    engine = ways["an engine, tensor parallel (of 4)"]
    assert engine.seconds < rollout.time.seconds / 5
    text = " ".join(found.suggestions)
    assert "every token gathers the sharded layers anew" in text and "times as fast" in text
    assert "(--rollout.engine vllm --method.estimator rao)" in text and not found.run.records


def test_an_engine_is_named_only_where_one_can_sample():
    """GRADE feeds mixtures, which no engine does; policy gradients take any token ids."""
    method = load_config("imdb_qwen3_4b").method
    soft, plain = (planned(large(method=replace(method, name=name)), gpu="h100", gpus=16) for name in ("grade", "ppo"))
    assert not any("engine" in text for text in [*soft.suggestions, *(way.name for way in soft.ways)])
    assert "(--rollout.engine vllm)" in " ".join(plain.suggestions)


def test_one_device_is_not_enough_for_it():
    found = planned(large(), gpu="h100")
    assert not found.fits and found.run.shards == 1 and found.shards == 4
    assert found.suggestions[0].startswith("Does not fit with a whole base on each device: a sharded base over 4")
    assert planned(large(), gpu="h100", gpus=4).fits


def test_shards_between_nodes_are_slower():
    within, between = (planned(large(), gpu="h100", gpus=32, shards=shards) for shards in (8, 32))
    assert between.phases[0].time.seconds > 5 * within.phases[0].time.seconds
    assert between.memory.peak < within.memory.peak


@pytest.mark.parametrize("name", ["grade-ste", "grpo"])
def test_more_devices_take_more_tokens_a_second_and_hold_less(name):
    method = replace(load_config("imdb_qwen3_4b").method, name=name, activation_checkpointing=True)
    config = large(method=method)
    if name == "grpo":
        config = replace(config, generation=replace(config.generation, samples_per_prompt=8))
    plans = [planned(config, gpu="h200", gpus=n, shards=min(n, 8)) for n in (2, 4, 8, 16, 64)]
    rates = [plan.tokens_per_second for plan in plans]
    peaks = [plan.memory.peak for plan in plans]
    assert rates == sorted(rates) and rates[-1] > 1.9 * rates[-2] / 2
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > 1.5 * peaks[2]


def test_longer_responses_and_larger_batches_cost_more():
    def of(length, batch):
        config = large(method=replace(load_config("imdb_qwen3_4b").method, activation_checkpointing=True))
        config = replace(config, generation=replace(config.generation, max_new_tokens=length))
        return planned(replace(config, train=replace(config.train, batch_size=batch)), gpu="b200", gpus=8, shards=8)

    for more, less in ((of(1024, 2), of(512, 2)), (of(512, 4), of(512, 2))):
        assert more.seconds > less.seconds and more.memory.peak > less.memory.peak


def test_the_largest_micro_batch_fits_and_the_next_does_not():
    found = planned(one_by_one(), gpu="h100")
    limit = SHARE * DEVICES["h100"].memory
    for recompute, size in found.micro_batches.items():
        held = [memory_of(replace(found.run, passed=n, recompute=recompute)).total("passes") for n in (size, size + 1)]
        assert held[0] <= limit < held[1]
    assert found.micro_batches[True] > 3 * found.micro_batches[False]
    assert "activations kept: --train.batch_size 16 --train.accumulation_steps 1." in " ".join(found.suggestions)


def test_recomputation_is_what_would_not_fit_otherwise():
    config = load_config("imdb_qwen3_4b")
    much = replace(config, train=replace(config.train, batch_size=256, accumulation_steps=1))
    assert not planned(config, gpu="h100").run.recompute
    found = planned(much, gpu="h100")
    assert found.run.recompute and found.fits
    kept = planned(replace(much, method=replace(much.method, activation_checkpointing=False)), gpu="h100")
    assert not kept.run.recompute and not kept.fits


def compiling(wanted, **train) -> Config:
    config = one_by_one()
    return replace(config, train=replace(config.train, compile=wanted, **train))


def test_compiled_layers_launch_less_and_nothing_else():
    """Those of training's passes; sampling is another setting's."""
    plain, compiled = (planned(compiling(wanted), gpu="h200") for wanted in (False, True))
    share = compiled.run.efficiency.fused
    phases = {phase.name: phase for phase in plain.phases}
    for phase in compiled.phases:
        before = phases[phase.name]
        assert phase.work.flops == before.work.flops and phase.work.moved == before.work.moved
        assert phase.work.layers + phase.work.fused == before.work.layers
        if phase.name in ("rollout", "head", "update"):
            assert phase.time == before.time and not phase.work.fused
    hops, before = (next(p for p in found.phases if p.name == "hops") for found in (compiled, plain))
    launched = (hops.work.layers + share * hops.work.fused) * compiled.run.efficiency.layer_seconds
    assert hops.work.fused == 36 * hops.work.layers  # a rule for each pass of 36 layers
    assert before.time.bound == "launching" and launched <= hops.time.seconds < 0.3 * before.time.seconds
    assert compiled.memory == plain.memory
    assert as_json(compiled)["compiles_layers"] and not as_json(plain)["compiles_layers"]
    (line,) = (line for line in plain.suggestions if "--train.compile true" in line)
    assert f"{1 - compiled.seconds / plain.seconds:.0%} off a step" in line and "hops" in line
    assert not any("--train.compile true" in line for line in compiled.suggestions)


@pytest.mark.parametrize(
    ("config", "options", "compiles", "said"),
    [
        (
            compiling("auto", steps=25),
            {"gpu": "h200"},
            True,
            "the run passes 400 micro-batches, and it is taken to pay",
        ),
        (compiling("auto", steps=24), {"gpu": "h200"}, False, "not compiled, since the run passes 384 micro-batches"),
        (compiling(True, steps=1), {"gpu": "h200"}, True, "train.compile=true: layers are compiled. 23% of a layer's"),
        (compiling("auto"), {"gpu": "h100", "gpus": 2, "shards": 2}, False, "compiled layers hold their weights"),
        (compiling("auto"), {"gpu": "cpu"}, False, "on a CPU fused operations save little"),
        (compiling(True), {"gpu": "cpu"}, True, "What they save on a CPU is not in these numbers."),
        (compiling(False), {"gpu": "h200"}, False, None),
    ],
)
def test_the_plan_says_whether_layers_are_compiled_and_why(config, options, compiles, said):
    if options["gpu"] == "cpu":
        config = replace(config, model=replace(config.model, dtype="float32"))
    found = planned(config, **options)
    lines = [line for line in sentences(found) if line.startswith("train.compile=")]
    assert found.run.compiles_layers is compiles
    assert lines == [] if said is None else said in lines[0]


@pytest.mark.parametrize(
    ("changed", "records"),
    [
        ({}, "--rollout.compile true records the launches"),
        ({"train": {"steps": 100}}, None),  # 6,400 tokens: compiling takes longer than it saves
        ({"model": {"quantization": "4bit"}}, None),
        ({"model": {"attn_implementation": "eager"}}, None),
    ],
)
def test_a_recorded_rollout_is_proposed_only_where_it_can_be_and_pays(changed, records):
    config = load_config("imdb_qwen3_4b")
    config = replace(config, rollout=replace(config.rollout, compile=False))
    for section, settings in changed.items():
        config = replace(config, **{section: replace(getattr(config, section), **settings)})
    found = planned(config, gpu="h200")
    (line,) = (line for line in found.suggestions if line.startswith("Sampling is bound by launching"))
    assert ("--rollout.compile true" in line) is (records is not None) and (records or "") in line


def test_attention_that_is_not_recorded_is_planned_as_such():
    config = load_config("imdb_qwen3_4b")
    other = replace(config, model=replace(config.model, attn_implementation="eager"))
    assert planned(config, gpu="h200").run.records and not planned(other, gpu="h200").run.records


def test_on_a_cpu_compiled_layers_are_not_counted():
    config = replace(compiling(True), model=replace(one_by_one().model, dtype="float32"))
    plain = replace(config, train=replace(config.train, compile=False))
    assert planned(config, gpu="cpu").seconds == planned(plain, gpu="cpu").seconds


def test_launches_of_compiled_layers_are_those_that_were_counted():
    """Of a replay of 6 hops, without what is launched beside the layers."""
    saved = json.loads((Path(__file__).parents[2] / "benchmarks/results/launches.json").read_text(encoding="utf-8"))
    for shape in {row["shape"] for row in saved["rows"]}:
        of_layer = {row["part"]: row["kernels_of_layer"] for row in saved["rows"] if row["shape"] == shape}
        own, compiled = (
            of_layer[f"forward{end}"] + saved["hops"] * of_layer[f"hop{end}"] + of_layer[f"backward{end}"]
            for end in ("", "_compiled")
        )
        assert Efficiency().fused == pytest.approx(compiled / own, abs=0.01)


def test_a_rollout_of_another_engine_is_no_phase():
    plain = load_config("imdb_qwen3_4b")
    config = replace(plain, rollout=replace(plain.rollout, source="file.jsonl"))
    found = planned(config, gpu="h100")
    assert [phase.name for phase in found.phases][0] == "policy_forward" and not found.memory.parts["rollout"]


def test_a_classifier_has_passes_and_memory_of_its_own():
    config = load_config("imdb_qwen3_4b")
    other = replace(config, reward=RewardConfig(model="Qwen/Qwen3-0.6B"))
    head, classifier = planned(config, gpu="h100"), planned(other, gpu="h100")
    size = classifier.memory.parts["always"]["reward's model"]
    assert size == 2 * 596_049_920 and "reward's model" not in head.memory.parts["always"]
    for name in ("base_forward", "base_backward"):
        one, two = (next(p.work.flops for p in plan.phases if p.name == name) for plan in (head, classifier))
        assert 1.05 < two / one < 1.3


def test_the_share_of_memory_is_that_of_the_trials():
    assert trials.SHARE == SHARE


def test_every_number_has_a_source():
    for device in DEVICES.values():
        assert device.source and device.bandwidth > 0 and all(rate > 0 for rate in device.flops.values())
        assert (device.memory is None) == (device.name == "cpu")


@pytest.mark.parametrize(
    "value, text",
    [(0, "–"), (999, "999 B"), (1234, "1.23 kB"), (99_960, "100 kB"), (5.6e12, "5.60 TB"), (0.5, "0.50 B")],
)
def test_quantities_have_three_figures(value, text):
    assert quantity(value, "B") == text


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gpu": "v100"}, "--gpu is 'v100': there are numbers of a100-80, h100, h200, b200, mi300x, cpu"),
        ({"gpu": ""}, "--gpu is '': there are numbers of a100-80"),
        ({"gpus": 0}, "--gpus is 0: it must be at least 1"),
        ({"gpus": 6, "shards": 4}, "--shards is 4, which does not divide the 6 devices"),
        ({"gpus": 2, "shards": 0}, "--shards is 0"),
        ({"hops": 17}, "--hops is 17: it must be at least 0 and at most method.max_hops, 16"),
        ({"flops": 1.5}, "--flops is 1.5: it must be at least 1e-06 and at most 1"),
        ({"link": 1e-300}, "--link is 1e-300: it must be at least 1e-06 and at most 1"),
        ({"layer_seconds": -1.0}, "--layer_seconds, in seconds, is -1: it must be 0 or more"),
        ({"gpu": "cpu"}, "--gpu cpu has only been measured in float32, and model.dtype is bfloat16"),
    ],
)
def test_devices_and_assumptions_that_cannot_be_are_refused(options, message):
    with pytest.raises(GradeError, match=re.escape(message)):
        planned(load_config("imdb_qwen3_4b"), **options)


@pytest.mark.parametrize(
    "section, changes, options, message",
    [
        ("model", {"dtype": "float32"}, {"gpu": "cpu", "gpus": 2}, "processes on a cpu share its cores"),
        ("model", {"name": "nobody/nothing"}, {}, "Give --model.name FOLDER with its config.json"),
        ("model", {"adapter": "folder"}, {}, "model.adapter is folder, whose cost `grade plan` does not know"),
        ("model", {"quantization": "4bit"}, {"gpus": 2, "shards": 2}, "a base in 4bit is held whole"),
        ("model", {"lora": LoraSettings(target_modules=["wq"])}, {}, "model.lora.target_modules has 'wq'"),
        ("method", {"replay_dropout": True}, {}, "method.replay_dropout is True, whose cost"),
        ("reward", {"model": "nobody/judge"}, {}, "Give --reward.model FOLDER with its config.json"),
    ],
)
def test_settings_whose_cost_is_not_known_are_refused(section, changes, options, message):
    config = load_config("imdb_qwen3_4b")
    config = replace(config, **{section: replace(getattr(config, section), **changes)})
    with pytest.raises(GradeError, match=re.escape(message)):
        planned(config, **options)


def test_a_mistake_is_told_in_a_line(capsys):
    assert cli.main(["plan", "imdb_qwen3_4b", "--gpu", "v100"]) == 2
    assert capsys.readouterr().err.startswith("grade: error: --gpu is 'v100'")


@pytest.mark.parametrize(
    "option, value, kind",
    [
        ("gpus", "null", "a whole number"),
        ("gpus", "", "a whole number"),
        ("gpus", "1e9", "a whole number"),
        ("hops", "nan", "a number or null"),
        ("flops", "inf", "a number or null"),
    ],
)
def test_what_is_no_number_is_told_as_for_settings(option, value, kind, capsys):
    assert cli.main(["plan", "imdb_qwen3_4b", f"--{option}", value]) == 2
    assert capsys.readouterr().err == f"grade: error: {option} is {value}: it must be {kind}.\n"


def test_a_whole_model_cannot_be_sharded():
    model = ModelConfig(name="Qwen/Qwen3-4B", finetuning="full")
    config = replace(load_config("imdb_qwen3_4b"), model=model)
    with pytest.raises(GradeError, match="model.finetuning=full trains the layers"):
        planned(config, gpu="h200", gpus=2, shards=2)
    found = planned(config, gpu="h200")
    always = found.memory.parts["always"]
    assert always["trained copy of the layers"] == 4 * found.run.trained.parameters
    flops = {phase.name: phase.work.flops for phase in phases_of(found.run)}
    assert flops["policy_backward"] > 1.8 * flops["policy_forward"]
