"""`grade compare` from sweep to tables on runs of seconds: nothing is done twice, and a failure stops nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import grade.compare
from grade.compare import Comparison, document, run_comparison, validation_objective
from grade.comparison import read_run
from grade.config import GradeError
from grade.jobs import Job, run_jobs
from grade.run_dir import adapter_folder, is_finished
from grade.trainer import train


@pytest.fixture
def comparable(tiny_config, tmp_path):
    """A config of two optimizer steps whose comparison lies in a folder of its own."""
    return replace(
        tiny_config, output_dir=str(tmp_path / "out"), reward=replace(tiny_config.reward, path=str(tmp_path / "head")),
        task=replace(tiny_config.task, judge_examples=0),
        train=replace(tiny_config.train, steps=2, run_dir=None),
        evaluation=replace(tiny_config.evaluation, every=1, validation_prompts=6, test_prompts=6),
        compare=replace(
            tiny_config.compare, learning_rate_factors=[1.0, 10.0], sweep_steps=1, samples_per_prompt=2
        ),
    )


@pytest.fixture
def in_process(monkeypatch):
    """Runs happen in this process, which has imported everything; the names of those that did."""
    ran = []

    def run(jobs, at_once, console):
        failures = {}
        for job in jobs:
            if not is_finished(job.config):
                ran.append(job.name)
                try:
                    train(job.config)
                except GradeError as error:
                    failures[job.name] = str(error)
        return failures

    monkeypatch.setattr(grade.compare, "run_jobs", run)
    return ran


def test_a_comparison_from_sweep_to_tables(comparable, in_process):
    payload = run_comparison(comparable, ["reinforce", "grpo"], [0])
    assert len(in_process) == 2 * 2 + 2
    folder = Path(comparable.output_dir) / f"compare-{comparable.name}"
    assert json.loads((folder / "comparison.json").read_text(encoding="utf-8")) == json.loads(json.dumps(payload))
    # The rate with the higher objective on validation is the one that was run.
    for method in ("reinforce", "grpo"):
        tried = {t["learning_rate"]: t["objective"] for t in payload["sweep"] if t["method"] == method}
        assert payload["learning_rates"][method] == max(tried, key=tried.get)
        config = (folder / f"{method}-seed0" / "config.yaml").read_text(encoding="utf-8")
        assert f"learning_rate: {payload['learning_rates'][method]}" in config
    for budget in ("tokens", "seconds"):
        rows = payload["tables"][budget]
        assert [row["method"] for row in rows] == ["base", "reinforce", "grpo"]
        assert all(row["test/reward"]["n"] == 1 and row["test/reward"]["stderr"] is None for row in rows)
        assert rows[0]["test/kl"]["mean"] == pytest.approx(0, abs=1e-6) and rows[0]["test/perplexity"]["mean"] > 1
    for key in payload["tests"]:
        method, seed, step = key.split("/")
        if method != "base":
            assert (adapter_folder(folder / f"{method}-seed{seed}", int(step)) / "adapter_config.json").is_file()
    assert (folder / "comparison.md").read_text(encoding="utf-8") == document(payload)
    # The same prompts for every method: runs of one seed start from the same responses.
    starts = [read_run(folder / f"{m}-seed0", m, 0).reward[0] for m in ("reinforce", "grpo")]
    assert starts[0] == pytest.approx(starts[1], rel=1e-6)

    del in_process[:]
    again = run_comparison(comparable, ["reinforce", "grpo"], [0])
    assert in_process == [] and again == payload
    more = run_comparison(comparable, ["reinforce", "grpo"], [0, 1])
    assert in_process == ["reinforce-seed1", "grpo-seed1"]
    assert more["tables"]["tokens"][1]["test/reward"]["n"] == 2
    other = replace(comparable, method=replace(comparable.method, kl_coef=0.5))
    with pytest.raises(GradeError, match="method.kl_coef"):
        run_comparison(other, ["reinforce", "grpo"], [0])


def test_a_method_that_fails_is_reported_and_left_out(comparable, in_process, monkeypatch):
    comparable = replace(comparable, compare=replace(comparable.compare, sweep_steps=0))
    run = Comparison.run_job

    def broken(self, method, seed, learning_rate):
        job = run(self, method, seed, learning_rate)
        return job if method != "grpo" else Job(job.name, replace(job.config, model=replace(
            job.config.model, lora=replace(job.config.model.lora, target_modules=["no_such_layer"])
        )))

    monkeypatch.setattr(Comparison, "run_job", broken)
    payload = run_comparison(comparable, ["reinforce", "grpo"], [0])
    assert [row["method"] for row in payload["tables"]["tokens"]] == ["base", "reinforce"]
    assert "no_such_layer" in payload["failures"]["grpo-seed0"] and "Failed: grpo-seed0" in document(payload)


def test_what_cannot_be_compared_is_refused_before_any_run(comparable, in_process):
    with pytest.raises(GradeError, match="method.name=grpo .*samples_per_prompt is 1"):
        alone = replace(comparable, compare=replace(comparable.compare, samples_per_prompt=1))
        run_comparison(alone, ["reinforce", "grpo"], [0])
    with pytest.raises(GradeError, match="sweep_seed"):
        run_comparison(comparable, ["reinforce"], [comparable.compare.sweep_seed])
    countdown = replace(comparable, task=replace(comparable.task, name="countdown"))
    with pytest.raises(GradeError, match="method.name=grade-ste backpropagates.*ppo, reinforce, grpo"):
        run_comparison(countdown, ["grade-ste", "ppo"], [0])
    assert in_process == [] and not (Path(comparable.output_dir) / f"compare-{comparable.name}").exists()


def test_the_sweep_weighs_kl(comparable, tmp_path):
    """0.1 nats more per token at kl_coef 0.5 cost more than 0.04 of reward gain."""
    rows = [
        {"step": 0, "validation/reward": 0.9, "validation/kl": 0.0, "validation/entropy": 1.0},
        {"step": 0, "reward": 0.5, "kl": 0.0, "entropy": 1.0, "grad_norm": 1.0, "tokens": 5, "memory/peak_gib": 1.0},
        {"step": 1, "validation/reward": 0.6, "validation/kl": 0.1, "validation/entropy": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = replace(comparable, method=replace(comparable.method, kl_coef=0.5))
    assert validation_objective(read_run(tmp_path, "ppo", 0), config) == pytest.approx(0.55)


def test_child_processes_run_and_fail_by_themselves(comparable, tmp_path):
    def job(name, model):
        train = replace(comparable.train, steps=1, run_dir=str(tmp_path / name), tensorboard=False)
        evaluation = replace(comparable.evaluation, test_prompts=0, validation_prompts=2)
        return Job(name, replace(comparable, train=train, evaluation=evaluation, model=model))

    jobs = [job("good", comparable.model), job("bad", replace(comparable.model, name=str(tmp_path / "nowhere")))]
    failures = run_jobs(jobs, 2, Console(quiet=True))
    assert set(failures) == {"bad"} and "model.name" in failures["bad"]
    assert is_finished(jobs[0].config) and not is_finished(jobs[1].config)
    assert run_jobs(jobs[:1], 1, Console(quiet=True)) == {}
