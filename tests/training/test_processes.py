"""Several processes of a run: what one process makes of the same responses, with whole and with sharded layers; going
on with another number of them; and how they end."""

from __future__ import annotations

import json
import queue
import threading
import time
from pathlib import Path

import pytest
import torch
from in_processes import PROMPTS, config_of, launched, small_model, trained, without_launcher
from safetensors.torch import load_file
from tiny_run import changed, timeless

import grade
from grade import peers
from grade.config import validate
from grade.config.reading import config_to_yaml
from grade.files import latest
from grade.launch import check_launch
from grade.model.checkpoint import load_state
from grade.processes import make_accelerator
from grade.training.run_folder import differing_settings

METHODS = ("grade-ste", "grpo")
KINDS = ("whole", "sharded")


def adapter(run: Path, checkpoint: str = "last") -> torch.Tensor:
    weights = load_file(latest(run / "checkpoints" / checkpoint) / "adapter_model.safetensors")
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


def assert_same_run(one: Path, other: Path, steps: int = 2) -> None:
    """Equal samples, and measures and adapters that are equal but for rounding; of the first steps."""
    torch.testing.assert_close(adapter(one, f"step-{steps}"), adapter(other, f"step-{steps}"), rtol=1e-3, atol=1e-5)
    first, second = (timeless(run / "metrics.jsonl") for run in (one, other))
    second = [row for row in second if row["step"] <= steps and not (row["step"] == steps and "loss" in row)]
    first = [row for row in first if row["step"] <= steps and not (row["step"] == steps and "loss" in row)]
    assert [row.keys() for row in first] == [row.keys() for row in second] and len(first) == steps + steps // 2 + 1
    for row, expected in zip(first, second, strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-5)
    texts = [
        [(row["prompt"], row["response"]) for row in map(json.loads, (run / "samples.jsonl").read_text().splitlines())]
        for run in (one, other)
    ]
    assert texts[0] and texts[0] == texts[1][: len(texts[0])]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    """Folder of runs of one process, by method, of four steps."""
    folder = tmp_path_factory.mktemp("alone")
    for method in METHODS:
        trained(model, config_of(method, folder / method, 1, steps=4))
    return folder


@pytest.fixture(scope="module")
def two(model, tmp_path_factory):
    """(folder of runs of two processes, of two steps; how the launch ended, whose second process was then killed)."""
    folder = tmp_path_factory.mktemp("two")
    return folder, launched("work", model, folder, ",".join(METHODS), "killed", processes=2)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_take_the_steps_of_one(alone, two, method, kind):
    folder, done = two
    run = folder / f"{method}-{kind}"
    assert (run / "evaluation.json").is_file(), done.stderr
    assert_same_run(run, alone / method)
    found = json.loads((folder / f"{method}-{kind}.json").read_text())
    layers = [name for name in found["frozen"] if ".layers." in name]
    assert len(layers) == 2 * 9 and found["sharded"] == (layers if kind == "sharded" else [])
    assert found["share"] == (0.5 if kind == "sharded" else 1.0)
    assert found["trained"] and all("lora" in name for name in found["trained"])


@pytest.mark.slow
def test_hops_send_no_gradients(two):
    """With whole layers nothing at all, with sharded ones their weights and whether there is another hop."""
    folder, done = two
    for kind in KINDS:
        sent = json.loads((folder / f"grade-ste-{kind}.json").read_text())["sent"]
        assert len(sent) > 2 and max(counts["hops"] for counts in sent) > 1, done.stderr
        for counts in sent:
            hops = counts.pop("hops")
            if kind == "whole":
                assert counts == {}
            else:
                assert set(counts) == {"_allgather_base_", "allreduce_"}
                assert counts["_allgather_base_"] >= hops and counts["allreduce_"] >= hops + 1


@pytest.mark.slow
def test_sharded_layers_pass_prompts_first_where_that_pays_in_one_process(two):
    folder, done = two
    found = json.loads((folder / "grade-ste-sharded.json").read_text())["apart"]
    assert found["lengths"] == [50, 44, 6], done.stderr
    assert found["error"] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_one_process_goes_on_with_a_run_of_two(alone, two, model, tmp_path, kind):
    run = two[0] / f"grade-ste-{kind}"
    few = config_of("grade-ste", run, 2, steps=4)
    with pytest.raises(grade.GradeError, match=r"responses of a step.* \(8 then, 4 now\).*train.accumulation_steps"):
        trained(model, changed(few, train={"resume": True}))
    trained(model, changed(config_of("grade-ste", run, 1, steps=4), train={"resume": True}))
    assert_same_run(run, alone / "grade-ste", steps=4)


@pytest.mark.slow
def test_a_killed_process_ends_the_launch(two):
    folder, done = two
    assert done.returncode == 1
    assert "process 1 of 2 has ended, and the others cannot go on without it" in done.stderr
    assert load_state(folder / "killed" / "checkpoints" / "last")["step"] == 1


@pytest.mark.slow
def test_four_processes_take_the_steps_of_one(alone, model, tmp_path):
    done = without_launcher("work", model, tmp_path, "grade-ste", processes=4)
    assert [code for code, _, _ in done] == 4 * [0], done
    for kind in KINDS:
        assert_same_run(tmp_path / f"grade-ste-{kind}", alone / "grade-ste")


@pytest.mark.slow
def test_one_process_stops_all_and_one_that_is_killed_ends_all(model, tmp_path):
    """Without a launcher, which would end one where the other does."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text * 2}) + "\n" for text in PROMPTS * 5))
    (tmp_path / "rewards.py").write_text(
        "def length(completions, **_):\n    return [float(len(c)) for c in completions]"
    )
    config = changed(
        config_of("reinforce", tmp_path / "run", 2, steps=20),
        task={"name": "prompts", "dataset": str(tmp_path / "prompts.jsonl"), "prompt_max_tokens": 40},
        model={"name": str(model)},
        reward={"function": f"{tmp_path / 'rewards.py'}:length"},
        evaluation={"every": 20},
    )
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    (first, out, said), (second, _, others) = without_launcher("commands", tmp_path / "config.yaml", tmp_path)
    assert (first, second) == (0, -9), said
    assert out.splitlines()[-2:] == ["code 130", "code 2"], said
    assert load_state(tmp_path / "stopped" / "checkpoints" / "last")["step"] == 2
    assert said.count("Go on with:") == 1 and "Go on with:" not in others
    assert "error: process 1 of 2 has ended, and the others cannot go on without it" in said


# --- without starting any ----------------------------------------------------------------------------------


def connected(processes: int, ended: list[str]) -> list[peers.Peers]:
    """`Peers` of several processes, as threads of this one."""
    boxes = [queue.Queue() for _ in range(processes)]
    barrier, seen = threading.Barrier(processes), [False] * processes

    def make(number: int) -> None:
        def exchange(value):
            if number == 0:
                for box in boxes[1:]:
                    box.put(value)
                return value
            return boxes[number].get(timeout=10)

        def any_process(wanted):
            seen[number] = wanted
            barrier.wait(10)
            return any(seen)

        made[number] = peers.Peers(number, processes, exchange, any_process, ended.append)

    made: list = [None] * processes
    threads = [threading.Thread(target=make, args=(number,)) for number in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return made


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("grace", ["_GRACE", "_GRACE_AFTER_ERROR"])
def test_peers_see_which_process_has_ended_and_end_those_that_wait(monkeypatch, victim, grace):
    """One that is gone, whose connections the system has closed, or that leaves by an error."""
    monkeypatch.setattr(peers, grace, 0.1)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    ended: list[str] = []
    made = connected(3, ended)
    assert all(each.watched for each in made)
    if grace == "_GRACE":
        tell = peers._tell
        monkeypatch.setattr(peers, "_tell", lambda to, number: None if number >= peers._LEAVES else tell(to, number))
    made[victim].leave(well=False)
    others = [each for number, each in enumerate(made) if number != victim]
    assert all(each.noticed(10) and each.lost == victim for each in others)
    deadline = time.monotonic() + 10
    while len(ended) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    who = "the main process" if victim == 0 else "process 2 of 3"
    assert len(ended) == 2 and all(words.startswith(f"{who} has ended") for words in ended)


def test_peers_that_end_well_lose_nobody(monkeypatch):
    monkeypatch.setattr(peers, "_GRACE", 0.0)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    ended: list[str] = []
    made = connected(3, ended)
    for each in made:
        each.leave(well=True)
    assert not any(each.noticed(0.2) for each in made) and not ended


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision is bf16.*model.dtype"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP plugin.*model.fsdp"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism_config"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend is inductor.*rollout.compile"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "train.accumulation_steps"),
        ({"ACCELERATE_USE_CPU": "True"}, "device=cuda"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}, "torchrun"),
    ],
)
def test_what_a_launcher_is_set_to_and_a_run_does_not_follow_is_refused(variables, words):
    check_launch("cuda", {"RANK": "0", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"})
    with pytest.raises(grade.GradeError, match=words):
        check_launch("cuda", variables)


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("GRADE_KERNELS_CPU_PRODUCTS", "blas", "GRADE_KERNELS_CPU_PRODUCTS must be 'mkl' or 'onednn', or unset"),
        ("GRADE_KERNELS_BACKEND", "cuda", "GRADE_KERNELS_BACKEND must be 'torch' or 'triton', or unset"),
        ("GRADE_KERNELS_BACKEND", "triton", "GRADE_KERNELS_BACKEND=triton, but the run .* on cpu"),
    ],
)
def test_kernels_that_cannot_run_are_refused_before_anything_is_loaded(monkeypatch, variable, value, words):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv(variable, value)
    with pytest.raises(grade.GradeError, match=words):
        make_accelerator(config_of("grade-ste", Path("runs/none"), 1))


def test_the_parts_of_a_step_may_change_but_not_who_shares_a_mini_batch():
    """On another number of processes; the checkpoint tells whether as many responses are left of a step."""
    two, one = (config_of("ppo", Path("runs/none"), processes) for processes in (2, 1))
    assert differing_settings(two, one) == "train.accumulation_steps (4 then, 8 now)"
    for name in ("reinforce", "grade-ste"):
        assert differing_settings(*(changed(config, method={"name": name}) for config in (two, one))) == ""
    whole = [changed(config, method={"ppo": {"minibatches": 1}}) for config in (two, one)]
    assert differing_settings(*whole) == ""


@pytest.mark.parametrize(
    "settings",
    [
        {"model": {"quantization": "4bit"}},
        {"model": {"finetuning": "full"}},
        {"rollout": {"compile": True}},
        {"train": {"compile": True}},
    ],
)
def test_what_does_not_work_with_sharding_is_refused(settings):
    config = config_of("grade-ste", Path("runs/none"), 2, fsdp=True)
    validate(config)
    with pytest.raises(
        grade.GradeError, match="model.fsdp shards the frozen base over processes, but [a-z._]+ is (true|full|4bit)"
    ):
        validate(changed(config, **settings))
