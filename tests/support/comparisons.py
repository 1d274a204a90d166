"""Comparisons of runs whose files are written by hand: no model, no training."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tiny_run import changed

from grade.config import Config
from grade.config.sealed import sealed_yaml
from grade.config.studies import VarianceConfig
from grade.studies.compare import final_test, study
from grade.studies.compare.plan import Comparison
from grade.training import setup
from grade.training.evaluation import Evaluation

METHODS = ["reinforce", "ppo"]
INPUTS = {"model": "m", "tokenizer": "t", "data": "d", "reward": "r"}


@pytest.fixture
def few(tmp_path, monkeypatch):
    """A comparison of two steps whose data, reward and test are never needed."""
    monkeypatch.setattr(study, "prepared_inputs", lambda config: (INPUTS, {}))
    monkeypatch.setattr(study, "evaluate_checkpoints", lambda *_: ({}, {}, None))
    monkeypatch.setattr(study, "evaluate_frontier", lambda *_: (None, {}))
    return changed(
        Config(name="few", output_dir=str(tmp_path), device="cpu"),
        train={"steps": 2},
        evaluation={"test_prompts": 6},
        compare={"sweep_steps": 0},
    )


@pytest.fixture
def no_models(monkeypatch):
    """Tests of checkpoints without any model: every one has the same numbers."""
    row = Evaluation(
        split="test",
        step=0,
        model="base",
        reward=0.5,
        reward_stderr=0.1,
        kl=0.0,
        kl_sequence=0.0,
        entropy=1.0,
        unique_token_ratio=1.0,
        mean_length=8.0,
        eos_rate=1.0,
        prompts=6,
        details={"base_nll": 8.0},
    )
    for name in ("load_tokenizer", "check_reward", "load_reward"):
        monkeypatch.setattr(setup, name, lambda *_, **__: None)
    monkeypatch.setattr(setup, "load_policy", lambda *_, **__: SimpleNamespace(sharding=None))
    for name in ("load_judge", "load_reader"):
        monkeypatch.setattr(final_test, name, lambda *_: None)
    alone = SimpleNamespace(device=torch.device("cpu"), is_main_process=True, num_processes=1)
    monkeypatch.setattr(final_test, "make_accelerator", lambda config: alone)
    monkeypatch.setattr(setup, "load_task", lambda *_, **__: SimpleNamespace(prompts=lambda *_, **__: [[1]]))
    monkeypatch.setattr(final_test, "responses", lambda *_, **__: [{"length": 8, "entropy": 8.0}])
    monkeypatch.setattr(final_test, "summary", lambda *_, **__: row)


@pytest.fixture
def lab_config(tiny_config, shared_output, tmp_path):
    """Measurements of a tiny policy, of every method."""
    head = {"path": str(shared_output / "laboratory")}
    return changed(
        tiny_config,
        output_dir=str(tmp_path / "out"),
        reward=head,
        variance=VarianceConfig(
            methods=["grade-ste", "grade", "reinforce", "rloo", "grpo", "ppo"],
            estimators=["gumbel", "rao", "straight_through"],
            taus=[2.0, 0.5],
            hops=[0, 3],
            lengths=[4],
            draws=10,
            responses=4,
            samples_per_prompt=2,
            warmup_draws=2,
            reference_responses=640,
            step_responses=320,
        ),
    )


def write_log(folder, rewards, *, tokens=100, seconds=2.0, every=1, cut="", solve_rates=None, kls=None, idle=()) -> int:
    """metrics.jsonl of a run: `rewards[i]` is the validation after `i * every` steps, `kls[i]` its KL per token of
    responses of 10 tokens; every step costs the same. The steps in `idle` make no update. Returns how many steps."""
    folder.mkdir(parents=True, exist_ok=True)
    steps, rows = (len(rewards) - 1) * every, []
    for step in range(steps + 1):
        if step % every == 0:
            kl = kls[step // every] if kls else 0.01 * step
            validation = {"reward": rewards[step // every], "kl": kl, "kl_sequence": 10 * kl, "entropy": 3.0}
            if solve_rates:
                validation["solve_rate"] = solve_rates[step // every]
            rows.append({"step": step, **{f"validation/{name}": value for name, value in validation.items()}})
        if step < steps:
            rows.append(
                {
                    "step": step,
                    "reward": 0.1 * step,
                    "kl": 0.02,
                    "entropy": 2.5,
                    "grad_norm": 0.0 if step in idle else float(step + 1),
                    "updates": int(step not in idle),
                    "tokens": tokens,
                    "seconds/rollout": seconds / 4,
                    "seconds/update": 3 * seconds / 4,
                    "memory/peak_gib": 1.0 + step,
                }
            )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + cut, encoding="utf-8")
    return steps


def finish(config, method, *, seconds=1.0, seed=0, job=None) -> Path:
    """The files of a run that has had all its steps, validated after each; its folder."""
    job = job or Comparison(config, METHODS, [seed]).run_job(
        method, seed, config.train.learning_rate, config.train.schedule
    )
    train = job.config.train
    steps = range(train.steps + 1)
    write_log(job.run_dir, [0.5 + 0.1 * step for step in steps], kls=[0.0] * len(steps), tokens=10, seconds=seconds)
    (job.run_dir.parent / "lock").touch()  # by which a comparison knows its folder
    (job.run_dir / "config.yaml").write_text(sealed_yaml(job.config), encoding="utf-8")
    inputs = {**INPUTS, "responses_per_step": train.batch_size * train.accumulation_steps}
    (job.run_dir / "run.json").write_text(json.dumps({"inputs": inputs}), encoding="utf-8")
    validated = [{"step": step} for step in steps]
    (job.run_dir / "evaluation.json").write_text(json.dumps({"validation": validated}), encoding="utf-8")
    return job.run_dir


def results_of(config, folder, inputs=INPUTS, adapters=()):
    """What `evaluate_checkpoints` gives of these adapters, by checkpoint, and of the base model."""
    bench = final_test.Bench(config, folder, inputs, Console(quiet=True))
    return final_test.evaluate_checkpoints(bench, dict(adapters))
