"""`grade compare` from sweep to tables on runs of seconds: nothing is done twice, and a failure stops nothing else."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from comparisons import write_log
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_run import changed, with_train

import grade.studies.compare.study
import grade.studies.compare.sweep
from grade import cli
from grade.commands.train import train
from grade.config.reading import config_from_yaml
from grade.config.sealed import sealed_yaml
from grade.errors import GradeError
from grade.studies.compare.comparison import read_run
from grade.studies.compare.jobs import Job, locked, run_jobs
from grade.studies.compare.plan import Comparison
from grade.studies.compare.study import missing_results, run_comparison
from grade.studies.compare.sweep import Sweep
from grade.studies.compare.text import document
from grade.training.run_folder import adapter_folder, decided, mark


@pytest.fixture
def comparable(tiny_config, tmp_path):
    """A config of two optimizer steps whose comparison lies in a folder of its own."""
    return changed(
        tiny_config,
        output_dir=str(tmp_path / "out"),
        reward={"path": str(tmp_path / "head")},
        task={"judge_examples": 0},
        train={"steps": 2, "run_dir": None},
        evaluation={"every": 1, "validation_prompts": 6, "test_prompts": 6},
        compare={"sweep_steps": 0, "samples_per_prompt": 2, "frontier_prompts": 0},
    )


@pytest.fixture
def in_process(monkeypatch):
    """Runs happen in this process, which has imported everything; the names of those that did."""
    ran = []

    def run(jobs, at_once, console, *, lock):
        failures = {}
        for job in jobs:
            if not job.finished:
                ran.append(job.name)
                try:
                    train(job.config)
                except GradeError as error:
                    failures[job.name] = str(error)
        return failures

    for module in (grade.studies.compare.study, grade.studies.compare.sweep):
        monkeypatch.setattr(module, "run_jobs", run)
    return ran


def test_a_comparison_from_runs_to_tables(comparable, in_process):
    payload = run_comparison(comparable, ["reinforce", "grpo"], [0])
    assert in_process == ["reinforce-seed0", "grpo-seed0"]
    folder = Path(comparable.output_dir) / f"compare-{comparable.name}"
    assert json.loads((folder / "comparison.json").read_text(encoding="utf-8")) == json.loads(json.dumps(payload))
    for budget in ("tokens", "seconds"):
        rows = payload["tables"][budget]
        assert [row["method"] for row in rows] == ["base", "reinforce", "grpo"]
        assert all(row["test/reward"]["n"] == 1 and row["test/reward"]["stderr"] is None for row in rows)
        for row in rows:
            paid = comparable.method.kl_coef * row["test/kl"]["mean"]
            assert row["test/objective"]["mean"] == pytest.approx(row["test/reward"]["mean"] - paid)
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
    scaled = next(key for key in payload["tests"] if key.startswith("grpo"))
    _scale_adapter(adapter_folder(folder / "grpo-seed0", int(scaled.split("/")[2])), 3.0)
    more = run_comparison(comparable, ["reinforce", "grpo"], [0, 1])
    assert in_process == ["reinforce-seed1", "grpo-seed1"]
    assert more["tables"]["tokens"][1]["test/reward"]["n"] == 2
    # The test of an adapter that is another one by now is not the old one's; the others are not made again.
    kept = {key: test for key, test in payload["tests"].items() if more["tests"].get(key) == test}
    assert "base/None/0" in kept and scaled not in kept and more["tests"][scaled]["kl"] > 0
    with pytest.raises(GradeError, match="method.kl_coef"):
        run_comparison(changed(comparable, method={"kl_coef": 0.5}), ["reinforce", "grpo"], [0])


def test_the_frontier_of_a_comparison(comparable, in_process, capsys):
    """A run of the tables and one of another kl_coef; nothing is tested twice, and what changed is."""
    config = changed(
        comparable,
        task={"reward_examples": 80, "judge_examples": 40},
        reward={"path": str(Path(comparable.output_dir) / "own_head")},
        train={"steps": 3, "learning_rate": 0.03},
        compare={"frontier_prompts": 4, "frontier_points": 2, "kl_coefs": [0.5, 0.05], "best_of": [1, 3]},
    )
    payload = run_comparison(config, ["rloo"], [0])
    assert in_process == ["rloo-seed0", "rloo-kl0.5-seed0"]  # 0.05 is what all have
    folder = Path(config.output_dir) / f"compare-{config.name}"
    assert (folder / "frontier" / "rloo-kl0.5-seed0").is_dir()
    assert [row["method"] for row in payload["tables"]["tokens"]] == ["base", "rloo"]
    quality = payload["tables"]["tokens"][1]
    for name in ("judge", "nats_per_byte", "repetition", "length_distance", "entropy_distance"):
        assert math.isfinite(quality[f"test/{name}"]["mean"])
    assert quality["test/nats_per_byte"]["mean"] > 0 and "nats / byte" in document(payload)
    frontier = payload["frontier"]
    assert frontier["prompts"] == 4 and frontier["base"]["entropy_distance"] == 0
    points = [(p["method"], p["seed"], p["kl_coef"], p["step"]) for p in frontier["points"]]
    assert points == [("rloo", 0, 0.05, 2), ("rloo", 0, 0.05, 3), ("rloo", 0, 0.5, 2), ("rloo", 0, 0.5, 3)]
    assert all(p["kl_sequence"] > 0 and p["entropy_distance"] > 0 for p in frontier["points"])
    one, three = frontier["best_of"]
    assert (one["n"], one["kl_sequence"], three["n"]) == (1, 0, 3) and three["reward"] > one["reward"]
    assert {"judge", "nats_per_byte", "repetition"} <= set(three)
    assert [row["method"] for row in frontier["table"]["rows"]] == ["rloo", "best of n"]
    assert "## Frontier" in document(payload) and f"reward at KL {frontier['table']['kls'][-1]:g}" in document(payload)
    # The same prompts as the first of the test, with the same noise.
    kept = json.loads((folder / "tests.json").read_text(encoding="utf-8"))
    samples = [kept["results"]["base/None/0"]["samples"], kept["frontier"]["base"]["row"]["samples"]]
    assert [row["response"] for row in samples[0]] == [row["response"] for row in samples[1]]

    capsys.readouterr()
    assert run_comparison(config, ["rloo"], [0]) == payload and "Frontier:" not in capsys.readouterr().err
    _scale_adapter(adapter_folder(folder / "frontier" / "rloo-kl0.5-seed0", 3), 3.0)
    changed_best = changed(config, compare={"best_of": [2]})
    again = run_comparison(changed_best, ["rloo"], [0])["frontier"]
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Frontier:")]
    assert told == ["Frontier: the base model's best of 2", "Frontier: 1 of 1, rloo-kl0.5-seed0, step 3"]
    assert again["points"][:3] == frontier["points"][:3] and again["points"][3] != frontier["points"][3]


def _scale_adapter(folder, factor):
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: factor * value for name, value in weights.items()}, folder / "adapter_model.safetensors")
    (folder / "manifest.json").unlink()  # which would tell that it is not the run's own


def test_jobs_alternate_between_methods_and_validate_as_often_as_asked(comparable, monkeypatch):
    """A run of 71 of 150 steps is judged at 70, not at evaluation.every's 50."""
    config = changed(comparable, train={"steps": 150})
    comparison = Comparison(config, ["ppo", "grpo"], [3])
    assert comparison.run_job("ppo", 3, 0.1, "constant").config.evaluation.every == 10
    config = changed(config, compare={"validations": 4, "sweep_steps": 50})
    comparison = Comparison(config, ["ppo", "grpo"], [3])
    assert (
        comparison.run_job("ppo", 3, 0.1, "constant").config.evaluation.every == 38
    )  # rounded up: never more than asked
    assert comparison.sweep_job("ppo", 1.0, "constant").config.evaluation.every == 25

    order = []

    def no_run(jobs, at_once, console, *, lock):
        order.extend(job.name for job in jobs)
        return {job.name: "not run" for job in jobs}

    monkeypatch.setattr(grade.studies.compare.study, "run_jobs", no_run)
    monkeypatch.setattr(grade.studies.compare.study, "prepared_inputs", lambda config: ({}, {}))
    with pytest.raises(GradeError, match="every run of the comparison failed"):
        run_comparison(comparable, ["ppo", "grpo"], [4, 5])
    assert order == ["ppo-seed4", "grpo-seed4", "ppo-seed5", "grpo-seed5"]


def test_a_method_that_fails_is_reported_and_left_out(comparable, in_process, monkeypatch):
    run = Comparison.run_job

    def broken(self, method, seed, learning_rate, schedule):
        job = run(self, method, seed, learning_rate, schedule)
        missing = {"lora": {"target_modules": ["no_such_layer"]}}
        return job if method != "grpo" else Job(job.name, changed(job.config, model=missing))

    monkeypatch.setattr(Comparison, "run_job", broken)
    payload = run_comparison(comparable, ["reinforce", "grpo"], [0])
    assert [row["method"] for row in payload["tables"]["tokens"]] == ["base", "reinforce"]
    assert "no_such_layer" in payload["failures"]["grpo-seed0"] and "Failed: grpo-seed0" in document(payload)
    assert list(missing_results(payload)) == ["grpo-seed0"]


def trial(peak):
    """Stands in for `run_jobs`: writes runs whose objective falls with the learning rate's distance from `peak`."""
    ran = []

    def run(jobs, at_once, console, *, lock):
        for job in jobs:
            ran.append(job.name)
            train = job.config.train
            distance = abs(math.log(train.learning_rate / peak)) - 0.01 * (train.schedule == "linear")
            write_log(job.run_dir, [0.5, 0.9], kls=[0.0, 0.1 + distance])  # every rate has the same reward
            (job.run_dir / "config.yaml").write_text(sealed_yaml(job.config), encoding="utf-8")
        return {}

    return run, ran


def swept(comparable, monkeypatch, peak, factors, schedules=None):
    compare = {"sweep_steps": 1, "learning_rate_factors": factors, "schedules": schedules}
    config = changed(comparable, train={"learning_rate": 1.0}, compare=compare)
    run, ran = trial(peak)
    monkeypatch.setattr(grade.studies.compare.sweep, "run_jobs", run)
    return Sweep(Comparison(config, ["ppo", "grpo"], [0]), {}, Console(quiet=True), 0).settings(), ran


def sweep(comparable, monkeypatch, peak, factors):
    found, ran = swept(comparable, monkeypatch, peak, factors)
    rates, tried = found.rates, found.tried
    assert found.failures == {} and rates["ppo"] == rates["grpo"]
    assert found.schedules == {"ppo": "constant", "grpo": "constant"}
    assert [t["learning_rate"] for t in tried if t["method"] == "grpo"] == sorted(
        t["learning_rate"] for t in tried if t["method"] == "ppo"
    )
    return rates["ppo"], tried, ran


def test_schedules_are_tried_with_the_best_rate(comparable, monkeypatch):
    found, ran = swept(comparable, monkeypatch, 1.0, [0.5, 1.0, 4.0], ["cosine", "constant", "linear"])
    assert found.rates == {"ppo": 1.0, "grpo": 1.0} and found.schedules == {"ppo": "linear", "grpo": "linear"}
    assert ran[6:] == ["ppo-lr1-cosine", "grpo-lr1-cosine", "ppo-lr1-linear", "grpo-lr1-linear"]
    assert [t["schedule"] for t in found.tried if t["method"] == "ppo"] == ["constant"] * 3 + ["cosine", "linear"]


def test_one_rate_is_tried_with_several_schedules(comparable, monkeypatch):
    found, ran = swept(comparable, monkeypatch, 1.0, [1.0], ["constant", "linear"])
    assert found.schedules["ppo"] == "linear" and ran == ["ppo-lr1", "grpo-lr1", "ppo-lr1-linear", "grpo-lr1-linear"]


def test_the_sweep_goes_factor_by_factor_and_weighs_kl(comparable, monkeypatch):
    rate, tried, ran = sweep(comparable, monkeypatch, 1.0, [4.0, 0.5, 1.0])
    assert rate == 1.0 and ran == ["ppo-lr0.5", "grpo-lr0.5", "ppo-lr1", "grpo-lr1", "ppo-lr4", "grpo-lr4"]
    kl_coef = comparable.method.kl_coef
    best = pytest.approx(0.9 - 0.1 * kl_coef)
    assert tried[1] == {"method": "ppo", "learning_rate": 1.0, "schedule": "constant", "objective": best}
    assert tried[2]["objective"] == pytest.approx(0.9 - (0.1 + math.log(4)) * kl_coef)


@pytest.mark.parametrize(
    "peak, rate, further", [(16.0, 16.0, [16.0, 64.0]), (1e6, 64.0, [16.0, 64.0]), (0.25, 0.25, [0.25, 0.125])]
)
def test_the_sweep_goes_on_beyond_its_edge(comparable, monkeypatch, peak, rate, further):
    found, tried, ran = sweep(comparable, monkeypatch, peak, [0.5, 1.0, 4.0])
    assert found == rate and ran[6:] == [f"{m}-lr{r:g}" for r in further for m in ("ppo", "grpo")]
    assert len(tried) == 10


def test_child_processes_run_and_fail_by_themselves(comparable, tmp_path):
    def job(name, **settings):
        train = {"steps": 1, "run_dir": str(tmp_path / name), "tensorboard": False, **settings}
        evaluation = {"test_prompts": 0, "validation_prompts": 2}
        return Job(name, changed(comparable, train=train, evaluation=evaluation))

    jobs = [job("good"), job("bad", learning_rate=-1.0)]
    with locked(tmp_path) as lock:
        failures = run_jobs(jobs, 2, Console(quiet=True), lock=lock)
    assert set(failures) == {"bad"} and "train.learning_rate" in failures["bad"]
    assert jobs[0].finished and not jobs[1].finished
    assert run_jobs(jobs[:1], 1, Console(quiet=True), lock=-1) == {}


_CHILD = """
import os, pathlib, signal, sys, time
os.fstat(int(sys.argv[2]))  # the lock is held here too
def stop(*_):
    time.sleep(0.3)
    pathlib.Path(sys.argv[1]).write_text("saved")
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
print("started", flush=True)
time.sleep(60)
"""


def test_sigterm_stops_the_children_and_waits_for_them(comparable, tmp_path):
    jobs = [Job(name, with_train(comparable, run_dir=str(tmp_path / name))) for name in ("a", "b", "waiting")]
    jobs[0].log.write_text("an earlier attempt", encoding="utf-8")

    def terminate():
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline and not all("started" in _text(job.log) for job in jobs[:2]):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # so that only this test fails where nobody listens
    try:
        with locked(tmp_path) as lock, pytest.raises(KeyboardInterrupt):
            thread.start()
            run_jobs(
                jobs,
                2,
                Console(quiet=True),
                lock=lock,
                command=lambda settings: [sys.executable, "-c", _CHILD, str(settings.with_suffix(".saved")), str(lock)],
            )
    finally:
        thread.join()
        signal.signal(signal.SIGTERM, before)
    assert [_text(tmp_path / f"{job.name}.saved") for job in jobs] == ["saved", "saved", ""]
    assert "earlier" not in _text(jobs[0].log)


def _text(path):
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def test_a_folder_serves_one_comparison_even_where_only_its_child_is_left(tmp_path):
    with locked(tmp_path) as lock:
        with pytest.raises(GradeError, match="in use by another `grade compare`"), locked(tmp_path):
            pass
        orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=(lock,))
    try:
        with pytest.raises(GradeError, match="one left behind"), locked(tmp_path):
            pass
    finally:
        orphan.kill()
        orphan.wait()
    with locked(tmp_path):
        pass


def test_a_run_goes_on_from_what_an_interrupted_save_left(comparable, tmp_path):
    job = Job("run", with_train(comparable, run_dir=str(tmp_path / "run")))
    for left, resumes in (("nothing", False), ("last.old", True)):
        (job.run_dir / "checkpoints" / left).mkdir(parents=True)
        mark(job.run_dir)
        with locked(tmp_path) as lock:
            run_jobs([job], 1, Console(quiet=True), lock=lock, command=lambda _: [sys.executable, "-c", "pass"])
        train = decided(config_from_yaml(tmp_path / "run.yaml")).train
        assert train.resume is resumes and train.overwrite is not resumes


@pytest.mark.parametrize(
    "failures, rates, missing",
    [
        ({}, ["ppo", "grpo"], []),
        ({"sweep/ppo-lr3": "diverged"}, ["ppo", "grpo"], []),
        ({"sweep/grpo-lr3": "diverged", "sweep/grpo-token-lr1": "diverged"}, ["ppo", "grpo-token"], ["sweep/grpo-lr3"]),
        ({"sweep/ppo-lr3": "diverged", "grpo-seed1": "killed by SIGKILL"}, ["ppo", "grpo"], ["grpo-seed1"]),
    ],
)
def test_a_comparison_without_results_of_a_run_ends_with_1(monkeypatch, capsys, failures, rates, missing):
    """The tables first, then the failed ones by name."""
    payload = {
        "methods": sorted({"ppo", "grpo", *rates}),
        "failures": failures,
        "learning_rates": dict.fromkeys(rates, 1e-3),
    }

    def run(config, methods, seeds):
        print("the tables")
        return payload

    monkeypatch.setattr(grade.studies.compare.study, "run_comparison", run)
    assert cli.main(["compare", "demo"]) == (1 if missing else 0)
    said = capsys.readouterr()
    assert said.out == "the tables\n"
    lines = said.err.splitlines()
    assert lines[:-1] == [f"grade: failed: {name}: {failures[name]}" for name in missing]
    assert lines[-1:] == (["The tables are without what failed: the same command tries it again."] if missing else [])
