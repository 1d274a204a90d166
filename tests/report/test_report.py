"""`grade report`: what its sections say about small folders, and one page written as a whole."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from report_runs import VARIANCE, add_frontier, evaluation, write_comparison, write_run

from grade.commands.report import run_report
from grade.errors import GradeError

pytest.importorskip("matplotlib")

from grade.report.data import load_study  # noqa: E402  matplotlib is an extra
from grade.report.page import write_page  # noqa: E402
from grade.report.parts import Drawing, Html, Section, Text  # noqa: E402
from grade.report.sections import all_sections  # noqa: E402
from grade.report.style import _SETTINGS  # noqa: E402
from grade.tables import Column, Estimate, Table  # noqa: E402

ANCHORS = [
    "summary",
    "learning",
    "validation",
    "gradients",
    "efficiency",
    "final",
    "temperature",
    "speed",
    "statistics",
    "samples",
]


class Report:
    """The sections of a folder, by anchor, without drawing anything."""

    def __init__(self, folder):
        self.sections = {section.anchor: section for section in all_sections(load_study(folder))}

    def said(self, anchor, kind=None):
        parts = self.sections[anchor].parts
        return " ".join(part.text for part in parts if isinstance(part, Text) and kind in (None, part.kind))

    def table(self, anchor, name):
        """Rows as {column: cell}."""
        parts = [part.table if isinstance(part, Html) else part for part in self.sections[anchor].parts]
        (table,) = [part for part in parts if isinstance(part, Table) and part.title == name]
        return [dict(zip((c.title for c in table.columns), row, strict=True)) for row in table.rows]

    def figures(self, anchor):
        return [part.name for part in self.sections[anchor].parts if isinstance(part, Drawing)]

    def caption(self, anchor, name):
        return next(part.caption for part in self.sections[anchor].parts if getattr(part, "name", "") == name)


@pytest.fixture
def comparison(tmp_path):
    """Two methods apart from each other, and a third that overlaps with the first."""
    rewards = {"grpo": [0.80, 0.81, 0.82], "ppo": [0.60, 0.61, 0.62], "reinforce": [0.78, 0.82, 0.83]}
    return write_comparison(tmp_path / "compare-x", rewards)


def test_sections_and_figures_of_a_comparison(comparison):
    report = Report(comparison)
    assert list(report.sections) == ANCHORS
    assert report.figures("learning") == ["learning_reward", "learning_loss", "learning_kl", "learning_entropy"]
    assert report.figures("validation") == ["validation_reward", "generalisation_gap"]
    assert report.figures("speed") == ["seconds_per_phase", "throughput", "peak_memory"]
    assert "n = 3 seeds per method" in report.caption("learning", "learning_reward")
    assert "Not smoothed" in report.caption("learning", "learning_reward")  # four steps
    assert report.said("summary", "warning") == ""


def test_numbers_of_a_comparison_by_hand(comparison):
    report = Report(comparison)
    base, ppo, reinforce, grpo = report.table("final", "final_test")
    assert base == {
        "method": "base model",
        "seeds": None,
        "reward": 0.5,
        "judge": 0.5,
        "KL, nats per token": 0.0,
        "entropy, nats per token": 2.0,
        "distinct tokens": 0.9,
        "length, tokens": 10.0,
        "ended by themselves": 1.0,
    }
    assert grpo["reward"] == Estimate(pytest.approx(0.81), pytest.approx(0.01 / 3**0.5), 3)
    assert ppo["judge"].mean == pytest.approx(0.51)
    gaps = report.table("final", "gap")
    assert gaps[0]["validation − test reward"].mean == pytest.approx(0.65 - 0.61)  # validation of step 2, as chosen
    speed = report.table("speed", "speed")[0]
    assert (speed["seconds per step"].mean, speed["rollout, seconds per step"]) == (2.0, 0.5)
    assert (speed["tokens per second"].mean, speed["peak memory, GiB"].mean) == (50.0, 1.5)
    assert report.table("summary", "sweep")[0]["chosen"] == "yes"


def test_the_frontier_at_equal_kl(tmp_path):
    folder = write_comparison(tmp_path / "compare-x", {"grade-ste": [0.8, 0.8], "ppo": [0.6, 0.6]})
    assert "frontier" not in Report(folder).sections  # of a version that had none
    report = Report(add_frontier(folder))
    assert list(report.sections)[5:7] == ["final", "frontier"]
    assert report.figures("frontier") == ["frontier_reward", "frontier_judge", "frontier_nats_per_byte"]
    assert "n = 2 seeds per method" in report.caption("frontier", "frontier_reward")
    grade, ppo, best = report.table("frontier", "frontier_reward")
    assert [column for column in grade if "KL" in column] == [
        f"reward at KL {kl}" for kl in ("0.2", "0.5", "1", "2", "5")
    ]
    assert grade["reward at KL 1"] == Estimate(pytest.approx(0.6), pytest.approx(0), 2)
    assert ppo["reward at KL 5"].mean == pytest.approx(0.5 + 0.05 * 5**0.5)
    assert best["reward at KL 1"] is None and best["seeds"] == "–"
    assert report.table("frontier", "frontier_nats_per_byte")[2]["nats per byte at KL 0.2"] is None
    assert [row["n"] for row in report.table("frontier", "frontier_best_of")] == [1, 4]
    figure = next(p.figure for p in report.sections["frontier"].parts if getattr(p, "name", "") == "frontier_reward")
    assert figure.axes[0].get_xscale() == "function" and figure.legends
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["grade-ste", "ppo", "best of n", "base model"]


def test_overlapping_methods_have_no_winner(comparison):
    report = Report(comparison)
    verdicts = {(row["first"], row["second"]): row for row in report.table("statistics", "welch")}
    assert len(verdicts) == 3
    apart, together = verdicts["ppo", "grpo"], verdicts["reinforce", "grpo"]
    assert apart["verdict"] == "different" and together["verdict"] == "not told apart"
    assert apart["p"] < apart["p, Holm"] == pytest.approx(3 * apart["p"])
    assert apart["first − second"] == pytest.approx(-0.2)
    assert apart["95% interval"][1] < 0 < together["95% interval"][1]
    assert "Different from ppo at 5%" in (said := report.said("statistics"))
    assert "Not told apart from grpo: no winner" in said or "Not told apart from reinforce: no winner" in said


def test_efficiency_by_hand_and_not_reached(tmp_path):
    for seed, validations in enumerate([(0.5, 0.65, 0.75), (0.5, 0.55, 0.85)]):
        write_run(tmp_path / f"run{seed}", seed=seed, validations=validations)
    steps, tokens, seconds = Report(tmp_path).table("efficiency", "efficiency")
    assert steps["0.6"] == Estimate(3.0, 1.0, 2)  # steps 2 and 4
    assert tokens["0.6"] == Estimate(300.0, 100.0, 2) and seconds["0.6"] == Estimate(6.0, 2.0, 2)
    assert steps["0.7"] == Estimate(4.0, 0.0, 2)
    assert steps["0.8"] == steps["0.85"] == "not reached (1 of 2)"
    assert steps["0.9"] == tokens["0.9"] == "not reached"


def test_stability_by_hand(tmp_path):
    """Rewards 0.5, 0.6, ...: 50 of each make 25 * 2 * 0.05² / 49; the partial window is 0.5, 0.6."""
    report = Report(write_run(tmp_path / "run", validations=(0.5, 0.6), every=52))
    (row,) = report.table("statistics", "stability")
    assert row["windows"] == 2
    assert row["variance of reward"].mean == pytest.approx((50 * 0.05**2 / 49 + 2 * 0.05**2) / 2)
    assert "stability" in report.figures("statistics")


def test_a_short_run_has_no_curve_of_one_point_and_no_error_that_is_none(tmp_path):
    sections = all_sections(load_study(write_run(tmp_path / "run", taus=[2.0, 1.5, 1.0, 0.5])))
    drawings = {part.name: part for section in sections for part in section.parts if isinstance(part, Drawing)}
    assert "stability" not in drawings
    assert "one window of 50 steps or less" in Report(tmp_path / "run").said("statistics", "note")
    tables = [part for section in sections for part in section.parts if isinstance(part, Table)]
    assert tables and not any("±" in cell for table in tables for row in table.rows for cell in table.texts(row))


def test_legends_and_labels_stand_off_the_curves(tmp_path):
    study = load_study(write_comparison(tmp_path / "compare-x", {"grade-ste": [0.8], "ppo": [0.6]}))
    drawings = [part for section in all_sections(study) for part in section.parts if isinstance(part, Drawing)]
    with_legend = [part for part in drawings if part.figure.legends]
    assert len(with_legend) > 8
    for part in with_legend:
        part.figure.draw_without_rendering()
        panel = part.figure.axes[0].get_window_extent()
        assert not part.figure.axes[0].get_legend() and not part.figure.legends[0].get_window_extent().overlaps(panel)
        for label in part.figure.axes[0].texts:
            assert not label.get_window_extent().overlaps(panel), part.name


@pytest.mark.parametrize(
    "settings, said",
    [
        ({}, [("summary", "warning", "One seed only: grpo"), ("statistics", "warning", "One seed is all there is")]),
        (
            {"test": None, "planned": 10},
            [
                ("summary", "warning", "run (4 of 10 steps)"),
                ("final", "note", "No test yet"),
                ("statistics", "warning", "No test yet"),
                ("efficiency", "note", "may yet reach more: run"),
            ],
        ),
        (
            {"validations": (0.5,), "planned": 10},
            [
                ("learning", "note", "no reward in metrics.jsonl"),
                ("validation", "note", "has only that of the base model"),
                ("statistics", "note", "No held-out reward yet"),
                ("samples", "note", "No samples"),
            ],
        ),
    ],
)
def test_what_is_said_of_one_run(tmp_path, settings, said):
    """Finished, going on, and with the base model's evaluation alone."""
    report = Report(write_run(tmp_path / "run", **settings))
    for anchor, kind, text in said:
        assert text in report.said(anchor, kind)
    names = {getattr(part, "title", "") for section in report.sections.values() for part in section.parts}
    assert "welch" not in names and ("final_test" in names) == (not settings)
    assert report.figures("final") == ["final_reward"]


def test_what_lines_are(tmp_path):
    report = Report(write_run(tmp_path / "run", validations=(0.5, 0.6), every=100))
    caption = report.caption("learning", "learning_reward")
    assert "centred mean over 5 steps" in caption and "no spread to show" in caption


def test_a_run_with_nothing_yet(tmp_path):
    folder = write_run(tmp_path / "run", planned=10)
    for name in ("metrics.jsonl", "evaluation.json", "run.json"):
        (folder / name).unlink()
    report = Report(folder)
    assert sum(map(len, map(report.figures, ANCHORS))) == 0
    for anchor in ANCHORS[1:]:
        assert report.said(anchor, "note"), anchor


def test_missing_metrics_leave_notes(tmp_path):
    folder = write_run(tmp_path / "run", method="grade-ste")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: row[key] for key in row if key in ("step", "reward") or "validation" in key} for row in rows]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    report = Report(folder)
    assert report.figures("learning") == ["learning_reward"]
    for anchor, missing in (
        ("learning", "no kl in metrics.jsonl"),
        ("gradients", "no grad_norm in metrics.jsonl"),
        ("temperature", "No tau in metrics.jsonl"),
        ("speed", "Peak memory: not in metrics.jsonl"),
    ):
        assert missing in report.said(anchor, "note")


def test_temperature_ablation(tmp_path):
    taus = [2.0, 1.5, 1.0, 0.5]
    write_run(tmp_path / "falling", method="grade-ste", taus=taus, test=0.8)
    write_run(tmp_path / "constant", method="grade-ste", taus=[2.0] * 4, test=0.6, settings={"method.tau_end": 2.0})
    report = Report(tmp_path)
    assert report.figures("temperature") == ["tau", "reward_tau_grade_ste_tau_end_0_5", "schedules_grade_ste"]
    rows = {row["schedule"]: row for row in report.table("temperature", "schedules_grade_ste")}
    assert rows["τ 2 → 0.5 in 10 steps"]["held-out reward"].mean == 0.8
    assert rows["τ 2 → 0.5 in 10 steps"]["τ at the last step"].mean == 0.5
    assert rows["τ 2"]["held-out reward"].mean == 0.6
    assert "τ is 2 at every step" in report.said("temperature", "note")


def test_runs_of_other_models_are_not_like_for_like(tmp_path):
    write_run(tmp_path / "a", method="grpo")
    write_run(tmp_path / "b", method="ppo", settings={"model.name": "another_model"})
    assert "Not like for like: model.name differ" in Report(tmp_path).said("summary", "warning")


def test_estimator_variance(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "variance.json").write_text(json.dumps(VARIANCE))
    report = Report(folder)
    assert report.figures("gradients") == ["gradient_norm", "estimator_relative_variance_8_64", "estimator_cosine_8_64"]
    assert report.said("gradients", "note") == "8 tokens, 64 candidates: no signal-to-noise ratio per second."
    first, second, third = report.table("gradients", "estimator_variance")
    assert first["estimator"] == "grade-ste gumbel, τ 1, converged" and third["estimator"] == "grpo"
    assert second["estimator"] == "grade-ste straight_through, 0 hops"
    assert (first["relative variance"], first["cosine, 95% interval"]) == (12.5, (0.8, 0.95))
    assert first["relative variance, 95% interval"] == "above 9" and "bias" not in first  # no row has it


def test_steps_of_estimators(tmp_path):
    """Of the rows that have them; a share of a best step that is not known is a bound."""
    first, *others = VARIANCE["rows"]
    known = {"prefixes": 64, "plain_step": 0.02, "plain_step_interval": [0.01, 0.03], "factor": 3.0}
    unknown = {"plain_share": None, "plain_share_interval": [0.2, None], "factor_interval": [2.0, 4.0]}
    folder = write_run(tmp_path / "run")
    (folder / "variance.json").write_text(json.dumps({**VARIANCE, "rows": [first | known | unknown, *others]}))
    report = Report(folder)
    assert report.figures("gradients")[-2:] == ["estimator_plain_step_8_64", "estimator_factor_8_64"]
    row, *rest = report.table("gradients", "estimator_variance")
    assert (row["plain step, 95% interval"], row["length factor, 95% interval"]) == ((0.01, 0.03), (2.0, 4.0))
    assert row["plain step, of the best, 95% interval"] == "above 0.2" and "natural step" not in row
    assert all(row["plain step"] is None for row in rest)


def test_measurements_beside_a_run_and_by_themselves(tmp_path):
    """`grade variance` writes variance-NAME beside the run's folder; that folder alone makes a page too."""
    folder, measured = write_run(tmp_path / "run", settings={"name": "synthetic"}), tmp_path / "variance-synthetic"
    measured.mkdir()
    (measured / "variance.json").write_text(json.dumps(VARIANCE))
    assert "estimator_cosine_8_64" in Report(folder).figures("gradients")
    assert "not recorded" in str(Report(folder).table("summary", "summary")[-1])  # the laboratory's machine is not ours
    other = {**VARIANCE, "config": {**VARIANCE["config"], "model": {"name": "another_model"}}}
    alone = Report(measured)
    assert alone.figures("variance") == ["estimator_relative_variance_8_64", "estimator_cosine_8_64"]
    assert [row["what"] for row in alone.table("variance", "summary")] == ["model", "task", "parameters", "machine"]
    (measured / "variance.json").write_text(json.dumps(other))
    assert Report(folder).figures("gradients") == ["gradient_norm"]
    assert "are of another model or task" in Report(folder).said("summary")


def test_samples_gains_and_losses(tmp_path):
    folder = write_run(tmp_path / "run")
    record = json.loads((folder / "evaluation.json").read_text())
    before, after = record["test"]["base"], record["test"]["best"]
    before["samples"] = [{"prompt": f"<b>{i}", "response": "old", "reward": 0.5} for i in range(6)]
    after["samples"] = [
        {"prompt": f"<b>{i}", "response": "<script>alert(1)</script>", "reward": reward}
        for i, reward in enumerate([0.5, 0.6, 0.9, 0.3, 0.1, 0.5])
    ]
    (folder / "evaluation.json").write_text(json.dumps(record))
    report = Report(folder)
    gains = [row["gain"] for row in report.table("samples", "samples")]
    assert gains == pytest.approx([0.4, 0.1, 0.0, 0.0, -0.2, -0.4])
    (html,) = [part.html for part in report.sections["samples"].parts if isinstance(part, Html)]
    assert "2 of 6 samples gained, 2 lost" in html
    assert "<script" not in html and "&lt;script&gt;" in html and "<b>" not in html
    assert re.findall(r"\(([+−][\d.]+)\)", html) == ["+0.400", "+0.100", "−0.400", "−0.200"]


def test_samples_of_other_prompts_are_not_paired(tmp_path):
    folder = write_run(tmp_path / "run", test=None)
    record = json.loads((folder / "evaluation.json").read_text())
    record["validation"][2] = evaluation(4, 0.75, samples=[{"prompt": "other", "response": "x", "reward": 1.0}])
    (folder / "evaluation.json").write_text(json.dumps(record))
    assert Report(folder).said("samples", "note").startswith("No samples")


# -- the page ------------------------------------------------------------------------------------------------


def test_the_page_and_its_files(tmp_path, monkeypatch):
    monkeypatch.setitem(_SETTINGS, "pdf.fonttype", 3)  # subsets of TrueType fonts are half of the time
    for seed in (0, 1):
        write_run(tmp_path / "runs" / f"r{seed}", method="grade", seed=seed, taus=[2.0, 1.5, 1.0, 0.5])
    (tmp_path / "runs" / "variance.json").write_text(json.dumps(VARIANCE))
    path = run_report(tmp_path / "runs")
    assert path == tmp_path / "runs" / "report" / "index.html"
    html = path.read_text(encoding="utf-8")
    report = Report(tmp_path / "runs")
    figures = [name for anchor in ANCHORS for name in report.figures(anchor)]
    assert len(figures) == 18
    for name in figures:
        assert (path.parent / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (path.parent / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert f'<figure id="figure-{name}">' in html
    for table in ("summary", "runs", "efficiency", "final_test", "gap", "speed", "held_out", "stability", "samples"):
        assert (path.parent / "tables" / f"{table}.csv").stat().st_size > 0
        assert r"\bottomrule" in (path.parent / "tables" / f"{table}.tex").read_text()
    assert html.count("<svg") == html.count('role="img"') == len(figures)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    # Nothing is fetched: the only addresses are anchors, files beside the page that are offered, and data.
    for address in re.findall(r'(?:src|href)="([^"]*)"', html) + re.findall(r"url\(([^)]*)\)", html):
        assert re.match(r"#|figures/|tables/|data:image/png", address), address
    assert "#010203" not in html and "currentColor" in html
    assert len(html) < 1_000_000


def test_a_page_deletes_what_an_earlier_one_had_more_and_escapes_what_it_says(tmp_path):
    table = Table("numbers", [Column("a")], [[1.0]])
    write_page("one", [Section("first", "First", [table])], tmp_path)
    (tmp_path / "tables" / "mine.csv").write_text("1\n")
    html = write_page("<i>&", [Section("first", "A & B", [Text("<u>", "note")])], tmp_path).read_text()
    assert "&lt;i&gt;&amp;" in html and "A &amp; B" in html and '<p class="note">&lt;u&gt;</p>' in html
    assert [path.name for path in (tmp_path / "tables").iterdir()] == ["mine.csv"]
    (tmp_path / "file").touch()
    with pytest.raises(GradeError, match="could not be written.*Name another folder with --output"):
        write_page("title", [], tmp_path / "file")


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(GradeError, match=r"matplotlib is not installed: pip install 'grade-align\[report\]'"):
        run_report(tmp_path)


def test_a_report_needs_no_torch():
    code = "import sys, grade.report.page, grade.report.sections as s; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0
