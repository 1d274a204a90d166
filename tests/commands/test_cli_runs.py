"""The commands end to end, in a process of their own and in two, and mistakes that only show once files are read."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from in_processes import without_launcher
from tiny_run import changed

from grade import cli
from grade.config.reading import config_to_yaml
from grade.config.sealed import sealed_yaml
from grade.training.run_folder import mark

SHRUNK_DEMO = [
    "--pretrain_steps",
    "20",
    "--task.reward_examples",
    "60",
    "--task.policy_examples",
    "40",
    "--task.validation_examples",
    "20",
    "--generation.max_new_tokens",
    "6",
    "--generation.min_new_tokens",
    "2",
    "--train.steps",
    "2",
    "--train.batch_size",
    "4",
    "--evaluation.every",
    "2",
    "--evaluation.validation_prompts",
    "8",
    "--evaluation.test_prompts",
    "8",
    "--reward.epochs",
    "2",
]


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def started(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "160", **environment},
    )


@pytest.mark.slow
def test_demo_from_nothing(tmp_path):
    done = started("-m", "grade", "demo", "--cache_dir", tmp_path / "cache", *SHRUNK_DEMO, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "base" in done.stdout and "policy, step 2" in done.stdout
    assert "the same prompts, before and after" in done.stdout
    ours = (
        "1/2 ",
        "2/2 ",
        "Training the demo model",
        "Reward ",
        "Held-out features",
        "reward",
        "a response ",
        "a step: ",
        "memory: ",
        "step ",
        "training ",
        "warning: no response",
    )
    assert [line for line in done.stderr.splitlines() if not line.startswith(ours)] == []
    assert "Training the demo model, once: 20\n" in done.stderr and "training 2/2  " in done.stderr
    (run_dir,) = (tmp_path / "runs").glob("demo-seed0-*")
    assert run_dir.name in done.stdout.replace("\n", "")
    rows = json.loads((run_dir / "evaluation.json").read_text())["test"]
    assert len(rows["base"]["samples"]) >= 3
    assert [s["prompt"] for s in rows["base"]["samples"]] == [s["prompt"] for s in rows["best"]["samples"]]


def test_train_evaluate_and_reload(tiny_config, tmp_path, capfd):
    """Train, then evaluate the best checkpoint on test: the same numbers as the run's own test."""
    config = tmp_path / "config.yaml"
    config.write_text(config_to_yaml(tiny_config))
    assert cli.main(["train", str(config)]) == 0
    assert "the same prompts, before and after" in capfd.readouterr().out
    run_dir = tmp_path / "run"
    assert cli.main(["evaluate", str(run_dir), "--checkpoint", "best", "--quiet"]) == 0
    out, error = capfd.readouterr()
    assert "policy" in out and error == ""
    test = json.loads((run_dir / "evaluation.json").read_text())["test"]
    again = json.loads((run_dir / "evaluation-test-best.json").read_text())["rows"]
    for before, after in zip((test["base"], test["best"]), again, strict=True):
        assert {**before, "step": None} == {**after, "step": None}
    assert cli.main(["train", str(config)]) == 2
    assert "--train.resume" in capfd.readouterr().err


@pytest.mark.slow
def test_two_processes_equal_one_large_batch(tiny_config, tmp_path):
    """Two processes of 4 responses take the step of one process with 8. PPO needs the other process the most often:
    for totals, mean KL, whitening, early stopping."""
    methods, configs = ("grade-ste", "ppo"), {}
    for method in methods:
        for processes in (1, 2):
            run = tmp_path / f"{method}-{processes}"
            configs[method, processes] = str(run.with_suffix(".yaml"))
            config = changed(
                tiny_config,
                method={"name": method, "ppo": {"minibatches": 1, "epochs": 2}},
                train={"batch_size": 8 // processes, "steps": 2, "run_dir": str(run)},
            )
            run.with_suffix(".yaml").write_text(config_to_yaml(config))
        assert cli.main(["train", configs[method, 1]]) == 0
    program = tmp_path / "program.py"  # one start of two processes for both
    program.write_text(
        "import sys\nfrom grade import cli\nsys.exit(max(cli.main(['train', path]) for path in sys.argv[1:]))\n"
    )
    done = without_launcher(*(configs[method, 2] for method in methods), program=program, cwd=tmp_path, timeout=200)
    assert [code for code, _, _ in done] == [0, 0], done

    def results(method, processes):
        run = tmp_path / f"{method}-{processes}"
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return rows, json.loads((run / "evaluation.json").read_text())["test"]

    for method in methods:
        (one, test_one), (two, test_two) = results(method, 1), results(method, 2)
        assert len(one) == len(two)
        for first, second in zip(one, two, strict=True):
            assert first.keys() == second.keys()
            for name in first:
                if not name.startswith(("seconds", "tokens_per", "memory")):
                    assert second[name] == pytest.approx(first[name], rel=1e-3, abs=1e-6), (method, name)
        assert test_two["best"]["reward"] == pytest.approx(test_one["best"]["reward"], rel=1e-5)


@pytest.mark.slow
def test_several_processes_say_once_what_is_wrong(tiny_config, tmp_path):
    """The folder holds a run: one line, from one process, and no traceback of ours."""
    mark(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    config = tmp_path / "config.yaml"
    config.write_text(config_to_yaml(tiny_config))
    done = started(*TORCHRUN, "-m", "grade", "train", config, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode != 0 and done.stderr.count("grade: error:") == 1, done.stderr
    assert 'grade/commands/train.py", line' not in done.stderr


BAD = {
    "missing data": (["--task.dataset", "./nowhere"], "task.dataset"),
    "empty data": (["--task.dataset", "EMPTY"], "task.dataset"),
    "a classifier of another vocabulary": ([], "vocabulary"),
    "wrong column": (["--task.text_column", "review"], "task.text_column"),
    "no such label": (["--task.positive_label", "great"], "task.positive_label"),
    "too few rows": (["--task.reward_examples", "5000"], "task.reward_examples"),
    "no such model": (["--model.name", "./nowhere"], "model.name"),
    "no such layer": (["--model.lora.target_modules", "[q_prj]"], "model.lora.target_modules"),
    "the head as a target": (["--model.lora.target_modules", "[lm_head]"], "model.lora.target_modules"),
    "k > V": (["--generation.top_k", "100000"], "generation.top_k"),
    "prompt longer than the context": (["--task.prompt_max_tokens", "5000"], "context"),
    "reviews longer than the context": (["--reward.max_tokens", "5000"], "reward.max_tokens"),
    "max below min": (["--generation.max_new_tokens", "1"], "generation.min_new_tokens"),
    "no CUDA": (["--device", "cuda"], "device=cuda"),
    "nothing to resume": (["--train.resume", "true"], "train.resume"),
    "no such classifier": (["--reward.model", "./nowhere"], "reward.model"),
    "a label without its classifier": (["--reward.positive_label", "good"], "reward.positive_label"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_told_in_one_line(case, tiny_config, tmp_path, capsys, request):
    if case == "no CUDA" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    options, expected = BAD[case]
    if case == "a classifier of another vocabulary":
        options = ["--reward.model", str(request.getfixturevalue("stories260k"))]
    for name in ("train", "test"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        (tmp_path / "empty" / f"{name}.csv").write_text("text,label\n")
    config = tmp_path / "config.yaml"
    config.write_text(config_to_yaml(tiny_config))
    options = [option.replace("EMPTY", str(tmp_path / "empty")) for option in options]
    assert cli.main(["train", str(config), *options]) == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("grade: error:")]
    assert expected in line and "Traceback" not in captured.err and not (tmp_path / "run").exists()


def test_checkpoint_that_is_not_there(tiny_config, tmp_path, capsys):
    run_dir = tmp_path / "finished"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(sealed_yaml(tiny_config))
    assert cli.main(["evaluate", str(run_dir), "--checkpoint", "best"]) == 2
    assert "adapter_config.json" in capsys.readouterr().err
