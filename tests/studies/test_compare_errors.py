"""What a comparison refuses before any work, and what damaged files of its runs lead to: words that name the fix."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from comparisons import INPUTS, METHODS, finish, results_of
from rich.console import Console
from tiny import tiny_policy
from tiny_run import changed

from benchmarks import comparison as benchmark
from grade.errors import GradeError, read_json
from grade.model.loading import load_prompts
from grade.rewards.shared import head_report
from grade.studies.compare import plan, study
from grade.studies.compare.jobs import Job, locked, run_jobs
from grade.studies.compare.plan import Comparison
from grade.studies.compare.study import run_comparison
from grade.training import setup


def cut(path):
    """Half of a file, as a full disk leaves it."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# --- before any work ---------------------------------------------------------------------------------------


ODD = {"batch_size": 6, "accumulation_steps": 1}


@pytest.mark.parametrize(
    "changes, methods, expected",
    [
        ({"method": {"grpo": {"level": "token"}}}, ["ppo", "grpo", "grpo-token"], "grpo and grpo-token are the same"),
        ({"train": ODD}, METHODS, r"\(6\) is not a multiple of compare.samples_per_prompt \(4\)"),  # its own number
        ({"train": ODD, "generation": {"samples_per_prompt": 5}}, METHODS, r"of generation.samples_per_prompt \(5\)"),
        ({"compare": {"samples_per_prompt": 1}}, ["ppo", "grpo"], "method.name=grpo .*samples_per_prompt is 1"),
        ({"compare": {"sweep_seed": 0}}, METHODS, "sweep_seed"),
        ({"evaluation": {"test_prompts": 0}}, METHODS, "evaluation.test_prompts is 0"),
        ({"compare": {"kl_coefs": []}}, METHODS, r"compare.kl_coefs is \[\]: name one or more numbers"),
        ({"compare": {"kl_coefs": [0.2], "frontier_prompts": 0}}, METHODS, "compare.frontier_prompts is 0: set it to"),
        ({"compare": {"best_of": [2, 2]}}, METHODS, r"compare.best_of is \[2, 2\]: .*none of them twice"),
        ({"compare": {"kl_coefs": [0.2]}, "method": {"target_kl": 0.5}}, METHODS, "compare.kl_coefs gives runs other"),
        (
            {"model": {"reference": "initial", "adapter": "an/adapter"}},
            METHODS,
            "model.reference is initial.* Set compare.frontier_prompts to 0",
        ),
        ({"rollout": {"source": "pipe"}}, METHODS, "rollout.source is set"),
        (
            {"task": {"name": "countdown"}},
            ["grade-ste", "ppo"],
            "method.name=grade-ste backpropagates.*ppo, reinforce, grpo",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused_before_any_work(few, changes, methods, expected):
    with pytest.raises(GradeError, match=expected):
        run_comparison(changed(few, **changes), methods, [0])
    assert not (Path(few.output_dir) / "compare-few").exists()


def test_every_coefficient_of_the_kl_is_validated_before_any_work(few, monkeypatch):
    """A run that could not begin would otherwise be found out after the sweep and the tables' runs."""
    seen = []

    def validated(config):
        seen.append((config.method.name, config.method.kl_coef))
        if config.method.kl_coef == 0:
            raise GradeError("no KL to weigh")

    monkeypatch.setattr(plan, "validate", validated)
    with pytest.raises(GradeError, match="no KL to weigh"):
        run_comparison(changed(few, compare={"kl_coefs": [0.0, 0.5]}), METHODS, [0, 1])
    assert not (Path(few.output_dir) / "compare-few").exists()
    seen.clear()
    one = Comparison(changed(few, compare={"kl_coefs": [0.5]}), METHODS, [0, 1])
    plan.check_methods(one, [one.run_job(m, 0, few.train.learning_rate, few.train.schedule) for m in METHODS])
    assert seen == [("reinforce", 0.1), ("ppo", 0.1), ("reinforce", 0.5), ("ppo", 0.5)]


def test_coefficients_that_are_nearly_alike_have_folders_of_their_own(few):
    config = changed(few, compare={"kl_coefs": [0.1234567, 0.1234568]})
    jobs = Comparison(config, ["ppo"], [0]).frontier_jobs({"ppo": 1e-3}, {"ppo": "constant"})
    assert [job.name for job in jobs.values()] == ["ppo-kl0.1234567-seed0", "ppo-kl0.1234568-seed0"]


def test_fewer_steps_than_a_run_has_had_are_refused_and_more_are_made(few, monkeypatch):
    folder = finish(few, "ppo")
    with pytest.raises(GradeError, match="train.steps is 1, but .*ppo-seed0 has had 2 steps: set it to 2 or more"):
        run_comparison(changed(few, train={"steps": 1}), METHODS, [0])
    assert not (folder.parent / "comparison.json").exists()

    def run(jobs, at_once, console, *, lock):
        for job in jobs:
            finish(job.config, None, job=job)
        return {}

    monkeypatch.setattr(study, "run_jobs", run)
    few = changed(few, train={"steps": 3})
    payload = run_comparison(few, METHODS, [0])
    assert payload["failures"] == {} and [len(curve["tokens"]) for curve in payload["curves"]] == [3, 3]
    swept = changed(few, compare={"sweep_steps": 2, "learning_rate_factors": [1.0, 2.0]})
    finish(swept, "ppo", job=Comparison(swept, METHODS, [0]).sweep_job("ppo", 1.0, "constant"))
    with pytest.raises(GradeError, match="compare.sweep_steps is 1, but .*ppo-lr.* has had 2 steps"):
        run_comparison(changed(swept, compare={"sweep_steps": 1}), METHODS, [0])


def test_prompts_are_looked_at_before_models(few, monkeypatch):
    class NoPrompts:
        def prompts(self, split, tokenizer, limit=None):
            return [] if split == empty else [[1]][:limit]

    for empty in ("policy", "validation", "test"):
        with pytest.raises(GradeError, match=f"nothing in the {empty} split gives a prompt"):
            load_prompts(few.evaluation, NoPrompts(), None)
    untested = changed(few, evaluation={"test_prompts": 0})
    assert load_prompts(untested.evaluation, NoPrompts(), None) == {"policy": [[1]], "validation": [[1]], "test": []}

    monkeypatch.undo()  # the real `prepared_inputs`
    monkeypatch.setattr(setup, "load_tokenizer", lambda config: None)
    monkeypatch.setattr(setup, "load_task", lambda *_, **__: NoPrompts())
    monkeypatch.setattr(setup, "load_policy", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(GradeError, match="nothing in the test split"):
        run_comparison(few, METHODS, [0])


# --- damaged files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        (None, "No such file"),
        ('{"a": 1', "cannot be read"),
        ("[]", "holds no JSON object"),
        ("{}", "no entry 'a'"),
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


@pytest.mark.parametrize(
    "name, text",
    [
        ("evaluation.json", '{"validation": ['),
        ("evaluation.json", "{}"),
        ("config.yaml", "train: ["),
        ("config.yaml", None),
    ],
)
def test_a_run_that_cannot_be_judged_finished_says_what_to_delete(few, name, text):
    for method in METHODS:
        folder = finish(few, method)
    (folder / name).write_text(text) if text else (folder / name).unlink()
    fix = {
        "evaluation.json": "Delete that file: going on with the run makes it again from its checkpoint.",
        "config.yaml": f"Delete {folder}: the same command makes that run again.",
    }
    with pytest.raises(GradeError, match=f"^{folder}.* {fix[name]}$"):
        run_comparison(few, METHODS, [0])


@pytest.mark.parametrize("damage", [Path.unlink, cut, lambda path: path.write_text('{"step": 0}\n[]\n')])
def test_a_finished_run_without_its_curve_fails_alone(few, damage, capsys):
    for method in METHODS:
        folder = finish(few, method)
    damage(folder / "metrics.jsonl")
    payload = run_comparison(few, METHODS, [0])
    assert [row["method"] for row in payload["tables"]["tokens"]] == ["base", "reinforce"]
    assert list(payload["failures"]) == ["ppo-seed0"] and str(folder) in payload["failures"]["ppo-seed0"]
    assert payload["failures"]["ppo-seed0"].endswith(f"Delete {folder}: the same command makes that run again.")
    captured = capsys.readouterr()
    assert "Failed: ppo-seed0: " in captured.out and captured.err.startswith("Preparing data and reward\n")


def test_methods_without_a_checkpoint_in_the_budget_are_named(few):
    """Budget 2 s: ppo's first validation is at 3 s."""
    finish(few, "reinforce"), finish(few, "ppo", seconds=3.0)
    payload = run_comparison(few, METHODS, [0])
    assert [row["untrained"] for row in payload["tables"]["seconds"]] == [[], [], [0]]
    document = (Path(few.output_dir) / "compare-few" / "comparison.md").read_text(encoding="utf-8")
    assert document.count("had no validated checkpoint") == 1
    assert "Within 2 s of training, ppo had no validated checkpoint for seed 0: the base" in document


@pytest.mark.parametrize("settings", [None, "{", "[]", "{}"])
def test_an_adapter_that_cannot_be_read_fails_alone(few, no_models, tmp_path, monkeypatch, settings):
    adapter = tmp_path / "ppo-seed0" / "checkpoints" / "step-2"
    adapter.mkdir(parents=True)
    if settings is not None:
        (adapter / "adapter_config.json").write_text(settings)
    policy = tiny_policy()
    monkeypatch.setattr(setup, "load_policy", lambda *_, **__: policy)
    adapters = {("ppo", 0, 2): adapter}
    results, failures, _ = results_of(few, tmp_path, INPUTS, adapters)
    assert list(results) == [("base", None, 0)] and list(failures) == ["ppo-seed0"]
    assert str(adapter) in failures["ppo-seed0"] and f"Delete {adapter.parents[1]}: " in failures["ppo-seed0"]


@pytest.mark.parametrize(
    "section, settings, again",
    [
        ("generation", {"batch_size": 3}, False),
        ("task", {"judge_examples": 9}, False),
        ("train", {"steps": 99}, False),
        ("evaluation", {"every": 9, "validation_prompts": 9, "batch_size": 9}, False),
        ("generation", {"top_k": 7}, True),
        ("evaluation", {"test_prompts": 1}, True),
        ("method", {"kl_direction": "ref_policy"}, True),
    ],
)
def test_only_what_changes_a_test_is_tested_again(few, no_models, tmp_path, section, settings, again):
    found = []
    for config in (few, changed(few, **{section: settings})):
        results_of(config, tmp_path, INPUTS, {})
        found.append(read_json(tmp_path / "tests.json", "")["identity"])
    assert (found[0] != found[1]) is again


@pytest.mark.parametrize("name", ["tests.json", "judge.json"])
def test_damaged_results_are_told_in_words(few, no_models, tmp_path, name):
    results_of(few, tmp_path, INPUTS, {})
    for text in ("[]", "{"):
        (tmp_path / name).write_text(text)
        with pytest.raises(GradeError, match=f"{name} .*Delete it"):
            results_of(few, tmp_path, INPUTS, {})


def test_a_damaged_report_of_the_reward_head(tmp_path):
    (tmp_path / "reward.json").write_text('{"accuracy": {')
    with pytest.raises(GradeError, match=f"reward.json cannot be read .*Delete {tmp_path}: the head is then trained"):
        head_report(tmp_path)


@pytest.mark.parametrize(
    "name, text", [("SIGKILL", "killed by SIGKILL, perhaps for lack of memory"), ("SIGABRT", "killed by SIGABRT")]
)
def test_a_killed_child_names_its_signal(few, tmp_path, name, text):
    code = f"import os, signal; print('step 3', flush=True); os.kill(os.getpid(), signal.{name})"
    job = Job(name, changed(few, train={"run_dir": str(tmp_path / name)}))
    with locked(tmp_path) as lock:
        found = run_jobs([job], 1, Console(quiet=True), lock=lock, command=lambda _: [sys.executable, "-c", code])
    assert found == {name: text}


@pytest.mark.parametrize("text", [None, '{"tables"', "[]", '{"validation": []}'])
def test_the_benchmark_prints_one_line(tmp_path, text):
    path = tmp_path / "comparison.json"
    if text is not None:
        path.write_text(text)
    for file in (path, tmp_path):
        with pytest.raises(SystemExit, match="comparison.json that `grade compare` has written") as stopped:
            benchmark.main([str(file)])
        assert str(stopped.value).startswith(str(file)) and "\n" not in str(stopped.value)


def test_runs_made_from_something_else_are_not_counted(few, monkeypatch):
    """Finished runs under the same settings, whose base model was another one then."""
    for method in METHODS:
        finish(few, method)
    monkeypatch.setattr(study, "prepared_inputs", lambda config: ({**INPUTS, "model": "another"}, {}))
    with pytest.raises(GradeError, match="reinforce-seed0 was started with other .*the base model's weights"):
        run_comparison(few, METHODS, [0])
