"""What a comparison refuses before any work, and what damaged files of its runs lead to: words that name the fix."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import grade.studies.compare.study
import grade.training.setup
from benchmarks import comparison as benchmark
from grade import cli
from grade.config import Config
from grade.config.reading import sealed_yaml
from grade.errors import GradeError, read_json
from grade.model.loading import load_prompts
from grade.rewards.head_training import head_report
from grade.studies.compare import final_test
from grade.studies.compare import jobs as jobs_module
from grade.studies.compare.jobs import Job, locked, run_jobs
from grade.studies.compare.study import Comparison, run_comparison
from grade.training import setup
from grade.training.evaluation import Evaluation

METHODS = ["reinforce", "ppo"]
INPUTS = {"model": "m", "tokenizer": "t", "data": "d", "reward": "r"}


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A comparison of two steps whose data, reward and test are never needed."""
    monkeypatch.setattr(grade.studies.compare.study, "_prepare", lambda config: (INPUTS, {}))
    monkeypatch.setattr(grade.studies.compare.study, "test_checkpoints", lambda *_: ({}, {}, None))
    made = Config(name="few", output_dir=str(tmp_path), device="cpu")
    return replace(
        made, train=replace(made.train, steps=2), evaluation=replace(made.evaluation, test_prompts=6),
        compare=replace(made.compare, sweep_steps=0),
    )


def finish(config, method, *, seconds=1.0, seed=0, job=None):
    """The files of a run that has had all its steps, validated after each; its folder."""
    job = job or Comparison(config, METHODS, [seed]).run_job(method, seed, config.train.learning_rate)
    rows = []
    for step in range(job.config.train.steps + 1):
        validation = {"reward": 0.5 + 0.1 * step, "kl": 0.0, "kl_sequence": 0.0, "entropy": 1.0}
        rows.append({"step": step, **{f"validation/{name}": value for name, value in validation.items()}})
        rows.append({
            "step": step, "reward": 0.5, "kl": 0.0, "entropy": 1.0, "grad_norm": 1.0, "tokens": 10,
            "seconds/update": seconds, "memory/peak_gib": 1.0,
        })
    job.run_dir.mkdir(parents=True, exist_ok=True)
    (job.run_dir.parent / "lock").touch()  # by which a comparison knows its folder
    (job.run_dir / "config.yaml").write_text(sealed_yaml(job.config), encoding="utf-8")
    (job.run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]), encoding="utf-8")
    train = job.config.train
    inputs = {**INPUTS, "responses_per_step": train.batch_size * train.accumulation_steps}
    (job.run_dir / "run.json").write_text(json.dumps({"inputs": inputs}), encoding="utf-8")
    validated = [{"step": step} for step in range(job.config.train.steps + 1)]
    (job.run_dir / "evaluation.json").write_text(json.dumps({"validation": validated}), encoding="utf-8")
    return job.run_dir


def cut(path):
    """Half of a file, as a full disk leaves it."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# --- the command line --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--seeds", "0,00,1"], "--seeds names 0 twice: leave one of them out."),
        (["--seeds", ","], "--seeds is ',': write whole numbers"),
        (["--methods", "ppo,grpo,ppo"], "--methods names ppo twice: leave one of them out."),
        (["--methods", ","], "--methods is empty: name some of grade-ste"),
        (["--methods", ""], "--methods is empty: name some of grade-ste"),
        (["--compare.learning_rate_factors", "abc"], "it must be a list of numbers, written [1, 2]."),
        (["--variance.hops", "[a]"], "it must be a list of whole numbers, written [1, 2]."),
        (["--variance.estimators", "[rao, none]"], "it must be a list of gumbel or rao or straight_through or reinmax"),
        (["--model.lora.target_modules", "q_proj"], "it must be a list of texts, written [a, b]."),
    ],
)
def test_options(capsys, options, expected):
    assert cli.main(["compare", "demo", *options]) == 2
    assert expected in capsys.readouterr().err


def test_help_names_what_a_comparison_sets_itself(capsys):
    assert cli.main(["compare", "--help"]) == 0
    description = " ".join(capsys.readouterr().out.partition("options:")[0].split())
    assert all(name in description for name in ("sets seed", "train.resume", "train.overwrite", "train.run_dir"))


# --- before any work ---------------------------------------------------------------------------------------


def test_two_methods_that_are_the_same_are_refused(config):
    same = replace(config, method=replace(config.method, grpo=replace(config.method.grpo, level="token")))
    with pytest.raises(GradeError, match="grpo and grpo-token are the same method"):
        run_comparison(same, ["ppo", "grpo", "grpo-token"], [0])


def test_a_setting_that_only_the_comparison_set_is_named_as_its_own(config):
    odd = replace(config, train=replace(config.train, batch_size=6, accumulation_steps=1))
    with pytest.raises(GradeError, match=r"\(6\) is not a multiple of compare.samples_per_prompt \(4\)"):
        run_comparison(odd, METHODS, [0])
    odd = replace(odd, generation=replace(odd.generation, samples_per_prompt=5))  # this one the user did set
    with pytest.raises(GradeError, match=r"\(6\) is not a multiple of generation.samples_per_prompt \(5\)"):
        run_comparison(odd, METHODS, [0])


def test_fewer_steps_than_a_run_has_had_are_refused_and_more_are_made(config, monkeypatch):
    folder = finish(config, "ppo")
    fewer = replace(config, train=replace(config.train, steps=1))
    with pytest.raises(GradeError, match="train.steps is 1, but .*ppo-seed0 has had 2 steps: set it to 2 or more"):
        run_comparison(fewer, METHODS, [0])
    assert not (folder.parent / "comparison.json").exists()

    def run(jobs, at_once, console, *, lock):
        for job in jobs:
            finish(job.config, None, job=job)
        return {}

    monkeypatch.setattr(grade.studies.compare.study, "run_jobs", run)
    payload = run_comparison(replace(config, train=replace(config.train, steps=3)), METHODS, [0])
    assert payload["failures"] == {} and [len(curve["tokens"]) for curve in payload["curves"]] == [3, 3]
    swept = replace(config, compare=replace(config.compare, sweep_steps=2, learning_rate_factors=[1.0, 2.0]))
    finish(swept, "ppo", job=Comparison(swept, METHODS, [0]).sweep_job("ppo", 1.0))
    fewer = replace(swept, compare=replace(swept.compare, sweep_steps=1), train=replace(swept.train, steps=3))
    with pytest.raises(GradeError, match="compare.sweep_steps is 1, but .*ppo-lr.* has had 2 steps"):
        run_comparison(fewer, METHODS, [0])


def test_prompts_are_looked_at_before_models(config, monkeypatch):
    class NoPrompts:
        def prompts(self, split, tokenizer, limit=None):
            return [] if split == empty else [[1]][:limit]

    for empty in ("policy", "validation", "test"):
        with pytest.raises(GradeError, match=f"nothing in the {empty} split gives a prompt"):
            load_prompts(config, NoPrompts(), None)
    untested = replace(config, evaluation=replace(config.evaluation, test_prompts=0))
    assert load_prompts(untested, NoPrompts(), None) == {"policy": [[1]], "validation": [[1]], "test": []}

    monkeypatch.undo()  # the real `_prepare`
    monkeypatch.setattr(grade.training.setup, "load_tokenizer", lambda config: None)
    monkeypatch.setattr(grade.training.setup, "load_task", lambda config: NoPrompts())
    monkeypatch.setattr(grade.training.setup, "load_policy", lambda *_: pytest.fail("too late"))
    with pytest.raises(GradeError, match="nothing in the test split"):
        run_comparison(config, METHODS, [0])


# --- damaged files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        (None, "No such file"), ('{"a": 1', "cannot be read"), ("[]", "holds no JSON object"), ("{}", "no entry 'a'"),
        pytest.param("[" * 200_000, "cannot be read", id="deep"),
    ],
)
def test_read_json(tmp_path, text, expected):
    path = tmp_path / "a.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(GradeError, match=f"a.json .*{expected}.* Mend it."):
        read_json(path, "Mend it.", "a")
    path.write_text('{"a": 1}')
    assert read_json(path, "", "a") == {"a": 1}


def test_a_run_that_cannot_be_judged_finished_says_what_to_delete(config):
    folders = [finish(config, method) for method in METHODS]
    again = f"Delete {folders[1]}: the same command makes that run again."
    fixes = {
        "evaluation.json": "Delete that file: going on with the run makes it again from its checkpoint.",
        "config.yaml": again,
    }
    evaluations, settings = ['{"validation": [', "{}"], ["train: [", None]
    for name, text in [*(("evaluation.json", e) for e in evaluations), *(("config.yaml", s) for s in settings)]:
        fix = fixes[name]
        (folders[1] / name).write_text(text) if text else (folders[1] / name).unlink()
        with pytest.raises(GradeError) as error:
            run_comparison(config, METHODS, [0])
        assert str(error.value).startswith(str(folders[1])) and str(error.value).endswith(fix)
        finish(config, METHODS[1])


@pytest.mark.parametrize("damage", [Path.unlink, cut, lambda path: path.write_text('{"step": 0}\n[]\n')])
def test_a_finished_run_without_its_curve_fails_alone(config, damage, capsys):
    for method in METHODS:
        folder = finish(config, method)
    damage(folder / "metrics.jsonl")
    payload = run_comparison(config, METHODS, [0])
    assert [row["method"] for row in payload["tables"]["tokens"]] == ["base", "reinforce"]
    assert list(payload["failures"]) == ["ppo-seed0"] and str(folder) in payload["failures"]["ppo-seed0"]
    assert payload["failures"]["ppo-seed0"].endswith(f"Delete {folder}: the same command makes that run again.")
    captured = capsys.readouterr()
    assert "Failed: ppo-seed0: " in captured.out and captured.err.startswith("Preparing data and reward\n")


def test_methods_without_a_checkpoint_in_the_budget_are_named(config):
    """Budget 2 s: ppo's first validation is at 3 s."""
    finish(config, "reinforce"), finish(config, "ppo", seconds=3.0)
    payload = run_comparison(config, METHODS, [0])
    assert [row["untrained"] for row in payload["tables"]["seconds"]] == [[], [], [0]]
    document = (Path(config.output_dir) / "compare-few" / "comparison.md").read_text(encoding="utf-8")
    assert document.count("had no validated checkpoint") == 1
    assert "Within 2 s of training, ppo had no validated checkpoint for seed 0: the base" in document


@pytest.fixture
def no_models(monkeypatch):
    """Tests of checkpoints without any model: every one has the same numbers."""
    row = Evaluation(
        split="test", step=0, model="base", reward=0.5, reward_stderr=0.1, kl=0.0, kl_sequence=0.0, entropy=1.0,
        unique_token_ratio=1.0, mean_length=8.0, eos_rate=1.0, prompts=6, details={"base_nll": 8.0},
    )
    for name in ("load_tokenizer", "check_reward", "load_policy", "load_reward"):
        monkeypatch.setattr(setup, name, lambda *_: None)
    monkeypatch.setattr(final_test, "load_judge", lambda *_: None)
    alone = SimpleNamespace(device=torch.device("cpu"), is_main_process=True, num_processes=1)
    monkeypatch.setattr(final_test, "make_accelerator", lambda config: alone)
    monkeypatch.setattr(setup, "load_task", lambda config: SimpleNamespace(prompts=lambda *_, **__: [[1]]))
    monkeypatch.setattr(final_test, "evaluate", lambda *_, **__: row)


@pytest.mark.parametrize("settings", [None, "{", "[]", "{}"])
def test_an_adapter_that_cannot_be_read_fails_alone(config, no_models, tmp_path, monkeypatch, settings):
    adapter = tmp_path / "ppo-seed0" / "checkpoints" / "step-2"
    adapter.mkdir(parents=True)
    if settings is not None:
        (adapter / "adapter_config.json").write_text(settings)
    policy = SimpleNamespace(model=SimpleNamespace(peft_config={"default": SimpleNamespace(r=4)}))
    monkeypatch.setattr(setup, "load_policy", lambda *_: policy)
    adapters = {("ppo", 0, 2): adapter}
    results, failures, _ = final_test.test_checkpoints(config, tmp_path, INPUTS, adapters, Console(quiet=True))
    assert list(results) == [("base", None, 0)] and list(failures) == ["ppo-seed0"]
    assert str(adapter) in failures["ppo-seed0"] and f"Delete {adapter.parents[1]}: " in failures["ppo-seed0"]


@pytest.mark.parametrize("name", ["tests.json", "judge.json"])
def test_damaged_results_are_told_in_words(config, no_models, tmp_path, name):
    final_test.test_checkpoints(config, tmp_path, INPUTS, {}, Console(quiet=True))
    for text in ("[]", "{"):
        (tmp_path / name).write_text(text)
        with pytest.raises(GradeError, match=f"{name} .*Delete it"):
            final_test.test_checkpoints(config, tmp_path, INPUTS, {}, Console(quiet=True))


def test_a_damaged_report_of_the_reward_head(config, tmp_path):
    (tmp_path / "reward.json").write_text('{"accuracy": {')
    with pytest.raises(GradeError, match=f"reward.json cannot be read .*Delete {tmp_path}: the head is then trained"):
        head_report(replace(config, reward=replace(config.reward, path=str(tmp_path))), None, None)


def test_a_killed_child_names_its_signal(config, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs_module, "_POLL_SECONDS", 0.1)
    for name, text in (("SIGKILL", "killed by SIGKILL, perhaps for lack of memory"), ("SIGABRT", "killed by SIGABRT")):
        code = f"import os, signal; print('step 3', flush=True); os.kill(os.getpid(), signal.{name})"
        monkeypatch.setattr(jobs_module, "_command", lambda settings, code=code: [sys.executable, "-c", code])
        job = Job(name, replace(config, train=replace(config.train, run_dir=str(tmp_path / name))))
        with locked(tmp_path) as lock:
            assert run_jobs([job], 1, Console(quiet=True), lock=lock) == {name: text}


@pytest.mark.parametrize("text", [None, '{"tables"', "[]", '{"validation": []}'])
def test_the_benchmark_prints_one_line(tmp_path, text):
    path = tmp_path / "comparison.json"
    if text is not None:
        path.write_text(text)
    for file in (path, tmp_path):
        with pytest.raises(SystemExit, match="comparison.json that `grade compare` has written") as stopped:
            benchmark.main([str(file)])
        assert str(stopped.value).startswith(str(file)) and "\n" not in str(stopped.value)


def test_runs_made_from_something_else_are_not_counted(config, monkeypatch):
    """Finished runs under the same settings, whose base model was another one then."""
    for method in METHODS:
        finish(config, method)
    monkeypatch.setattr(grade.studies.compare.study, "_prepare", lambda config: ({**INPUTS, "model": "another"}, {}))
    with pytest.raises(GradeError, match="reinforce-seed0 was started with other .*the base model's weights"):
        grade.studies.compare.study.run_comparison(config, METHODS, [0])
