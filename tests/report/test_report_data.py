"""Folders as they are found: finished, going on, damaged, or no runs at all."""

from __future__ import annotations

import json

import pytest
from report_runs import VARIANCE, write_comparison, write_run

from grade.errors import GradeError
from grade.report.data import load_study
from grade.report.groups import grouped
from grade.report.measures import cost_before, first_reaching, gap_curve, held_out, training_curve


def labels(study):
    return [group.label for group in grouped(study.runs)]


def test_a_run(tmp_path):
    study = load_study(write_run(tmp_path / "run"))
    (run,) = study.runs
    assert (study.kind, run.method, run.seed, run.best, run.complete) == ("run", "grpo", 0, 4, True)
    assert run.test["reward"] == 0.7 and run.base_test["reward"] == 0.5
    assert run.best_validation["reward"] == 0.75


def test_a_broken_line_is_told_unless_it_is_being_written(tmp_path):
    folder = write_run(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([lines[0], "{broken", *lines[1:], '{"step": 4, "rew']))
    study = load_study(folder)
    assert len(study.runs[0].steps) == 4 and len(study.problems) == 1 and "line 2" in study.problems[0]


def test_validations_come_from_the_log_where_evaluation_json_is_missing(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "evaluation.json").unlink()
    (run,) = load_study(folder).runs
    assert [row["reward"] for row in run.validation] == [0.5, 0.65, 0.75]
    assert run.best is None and run.test is None


def test_a_comparison_says_which_checkpoint_counts(tmp_path):
    study = load_study(write_comparison(tmp_path / "compare-x", {"grpo": [0.7, 0.8], "ppo": [0.6, 0.6]}))
    assert study.kind == "comparison" and study.machine == {"cpu": "a processor", "torch": "2"}
    assert [(run.method, run.seed, run.best, run.test["reward"]) for run in study.runs] == [
        ("grpo", 0, 2, 0.7),
        ("grpo", 1, 2, 0.8),
        ("ppo", 0, 2, 0.6),
        ("ppo", 1, 2, 0.6),
    ]
    found = held_out(grouped(study.runs))
    assert (found.split, found.base, found.missing) == ("test", 0.5, [])
    assert found.values == {"ppo": [0.6, 0.6], "grpo": [0.7, 0.8]}


def test_a_comparison_without_its_table_yet(tmp_path):
    study = load_study(write_comparison(tmp_path / "compare-x", {"grpo": [0.7]}, finished=False))
    assert study.kind == "comparison" and study.runs[0].test["reward"] == 0.7 and study.runs[0].best == 2


def test_a_comparison_still_in_its_sweep(tmp_path):
    write_run(tmp_path / "sweep" / "grpo-token-lr0.001", settings={"method.grpo.level": "token"})
    write_run(
        tmp_path / "sweep" / "grpo-token-lr9e-05", settings={"method.grpo.level": "token", "train.learning_rate": 9e-5}
    )
    study = load_study(tmp_path)
    assert labels(study) == ["grpo-token (learning_rate 0.001)", "grpo-token (learning_rate 9e-05)"]
    assert "sweep" in study.problems[0]


def test_other_settings_are_another_group_and_another_length_is_not(tmp_path):
    write_run(tmp_path / "a", method="grade-ste", seed=0)
    write_run(tmp_path / "b", method="grade-ste", seed=1, planned=100, settings={"method.ppo.clip": 0.3})
    write_run(tmp_path / "c", method="grade-ste", seed=0, settings={"method.tau_end": 2.0})
    groups = grouped(load_study(tmp_path).runs)
    assert [(g.label, [run.seed for run in g.runs]) for g in groups] == [
        ("grade-ste (tau_end 0.5)", [0, 1]),
        ("grade-ste (tau_end 2)", [0]),
    ]


def test_settings_of_the_studies_and_of_later_versions_make_no_other_group(tmp_path):
    write_run(tmp_path / "a", method="grade-ste", seed=0)
    write_run(tmp_path / "b", method="grade-ste", seed=1, settings={"rollout.engine": "new", "variance.draws": 7})
    write_run(tmp_path / "c", method="grade-ste", seed=2, settings={"variance.draws": 9})
    assert labels(load_study(tmp_path)) == ["grade-ste"]


def test_a_folder_names_the_variant_only_where_it_fits_the_settings(tmp_path):
    write_run(tmp_path / "rloo-seed0", method="ppo")
    write_run(tmp_path / "mine", method="reinforce", settings={"method.reinforce.baseline": "leave_one_out"})
    assert labels(load_study(tmp_path)) == ["ppo", "rloo"]


@pytest.mark.parametrize("content", [None, "method: 3", "- a list", "{"])
def test_what_holds_no_run_is_refused(tmp_path, content):
    folder = tmp_path / "folder"
    folder.mkdir()
    if content is not None:
        (folder / "config.yaml").write_text(content)
    with pytest.raises(GradeError, match="holds no run.*config.yaml"):
        load_study(folder)


def test_no_folder_is_refused(tmp_path):
    with pytest.raises(GradeError, match="is not a folder"):
        load_study(tmp_path / "nowhere")


def test_variance_that_cannot_be_read_is_told(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "variance.json").write_text("{")
    study = load_study(folder)
    assert study.variance == {} and "variance.json" in study.problems[0]
    (folder / "variance.json").write_text(json.dumps(VARIANCE))
    assert load_study(folder).variance["config"]["variance"]["responses"] == 16


def test_cost_by_hand(tmp_path):
    (run,) = load_study(write_run(tmp_path / "run")).runs
    assert cost_before(run, 2) == {"steps": 2, "tokens": 200, "seconds": 4.0}
    assert first_reaching(run, 0.7) == {"steps": 4, "tokens": 400, "seconds": 8.0}
    assert first_reaching(run, 0.8) is None


def test_curves_of_seeds_of_different_length(tmp_path):
    write_run(tmp_path / "a", seed=0)
    write_run(tmp_path / "b", seed=1, validations=(0.5, 0.9), planned=4)
    (group,) = grouped(load_study(tmp_path).runs)
    curve = training_curve(group, "reward")
    assert curve.seeds.tolist() == [2, 2, 1, 1] and curve.of == 2
    assert curve.mean.tolist() == pytest.approx([0.5, 0.6, 0.5, 0.6])
    gap = gap_curve(group)  # training 0.55 in every interval
    assert gap.x.tolist() == [2, 4]
    assert gap.mean.tolist() == pytest.approx([(0.55 - 0.65 + 0.55 - 0.9) / 2, 0.55 - 0.75])
    assert (gap.low[0], gap.high[0]) == pytest.approx((0.55 - 0.9, 0.55 - 0.65))
    assert training_curve(group, "tau") is None
