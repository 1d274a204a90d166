"""Comparing runs: what is read from their files, equal budgets, and tables worked out by hand."""

from __future__ import annotations

import io
import json

import pytest
from comparisons import write_log
from rich.console import Console

from grade.errors import GradeError
from grade.machine import machine
from grade.studies.compare.comparison import Budgets, best_within, common_budgets, read_run, table, write_comparison
from grade.studies.compare.text import markdown, notes, rich_table

BASE = 0.5


def write_run(folder, rewards, *, planned=None, kl_coef=0.0, kl_reduction="token_mean", **costs):
    """A run's folder: its log and what a comparison reads of its settings."""
    steps = write_log(folder, rewards, **costs)
    (folder / "config.yaml").write_text(
        f"method:\n  kl_coef: {kl_coef}\n  kl_reduction: {kl_reduction}\n"
        f"train:\n  steps: {steps if planned is None else planned}\n"
    )
    return folder


@pytest.fixture
def runs(tmp_path):
    """Makes curves: run("ppo", 0, [0.5, 0.6]) writes a run directory and reads it."""

    def run(method, seed, rewards, **costs):
        return read_run(write_run(tmp_path / f"{method}-{seed}", rewards, **costs), method, seed)

    return run


def test_read_run(runs):
    curve = runs("ppo", 7, [0.5, 0.6, 0.55], every=2)
    assert (curve.method, curve.seed, curve.metric, curve.complete) == ("ppo", 7, "reward", True)
    assert curve.tokens == [100, 200, 300, 400] and curve.seconds == [2.0, 4.0, 6.0, 8.0]
    assert curve.grad_norm == [1.0, 2.0, 3.0, 4.0] and curve.kl == [0.02] * 4 and curve.entropy == [2.5] * 4
    assert curve.reward == pytest.approx([0.0, 0.1, 0.2, 0.3]) and curve.peak_gib == 4.0
    # A validation has the cost of the steps before it.
    assert [(v.step, v.tokens, v.seconds, v.metric) for v in curve.validations] == [
        (0, 0, 0.0, 0.5),
        (2, 200, 4.0, 0.6),
        (4, 400, 8.0, 0.55),
    ]
    assert curve.validations[1].kl == 0.02 and curve.validations[1].entropy == 3.0


def test_read_a_run_in_progress(runs):
    going = runs("ppo", 0, [0.5, 0.6], planned=4, cut='{"step": 1, "reward": 0.')
    assert len(going.tokens) == 1 and not going.complete
    unvalidated = {
        "step": 1,
        "reward": 0,
        "kl": 0,
        "entropy": 0,
        "grad_norm": 0,
        "tokens": 9,
        "seconds/update": 1,
        "memory/peak_gib": 1,
    }
    ahead = runs("ppo", 1, [0.5, 0.6], planned=2, cut=json.dumps(unvalidated))
    assert ahead.tokens == [100, 109] and not ahead.complete  # all steps, but its last validation is missing
    only_base = runs("ppo", 2, [0.5], planned=4)
    assert only_base.tokens == [] and only_base.peak_gib is None and not only_base.complete


@pytest.mark.parametrize(
    "damage, expected",
    [
        (lambda lines: [lines[0], lines[1][:9] + "\n", *lines[2:]], "line 2"),
        (lambda lines: [lines[0], *lines[2:]], "lacks steps"),  # without its first training step
        (lambda lines: [], "no validation of the base model"),
        (None, "no config.yaml"),
    ],
)
def test_refuses_runs_that_cannot_be_read(tmp_path, damage, expected):
    folder = write_run(tmp_path / "run", [0.5, 0.6, 0.7])
    if damage is None:
        (folder / "config.yaml").unlink()
    else:
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        (folder / "metrics.jsonl").write_text("".join(damage(lines)))
    with pytest.raises(GradeError, match=expected):
        read_run(folder, "ppo", 0)


def test_common_budgets_are_what_every_run_has_had(runs):
    curves = [runs("ppo", 0, [0.5, 0.6, 0.7]), runs("grade", 0, [0.5, 0.6, 0.7, 0.8], tokens=60, seconds=5.0)]
    assert common_budgets(curves) == Budgets(tokens=180, seconds=4.0)
    assert common_budgets([*curves, runs("ppo", 1, [0.5], planned=3)]) == Budgets(0, 0.0)


def test_best_within(runs):
    curve = runs("ppo", 0, [0.9, 0.6, 0.7, 0.7, 0.8])
    assert best_within(curve).step == 4  # not the base model, though it is better
    assert best_within(curve, tokens=300).step == 2  # the earliest of equals
    assert best_within(curve, seconds=2.0).step == 1
    assert best_within(curve, tokens=400, seconds=2.0).step == 1  # both hold
    assert best_within(curve, tokens=99).step == 1 and best_within(curve, tokens=98).step == 0  # 2 % of slack
    assert best_within(runs("ppo", 1, [0.9]), tokens=10).step == 0  # nothing else is there


def test_the_objective_is_the_metric_less_what_kl_costs(runs):
    kls = [0.0, 0.1, 0.4, 0.02]  # per token; a response has 10 times that
    by_token = runs("a", 0, [0.5, 0.7, 0.9, 0.6], kls=kls, kl_coef=0.5)
    assert [v.objective for v in by_token.validations] == pytest.approx([0.5, 0.65, 0.7, 0.59])
    by_response = runs("a", 1, [0.5, 0.7, 0.9, 0.6], kls=kls, kl_coef=0.05, kl_reduction="sequence_sum")
    assert [v.objective for v in by_response.validations] == pytest.approx([0.5, 0.65, 0.7, 0.59])


def test_checkpoints_are_chosen_by_the_objective(runs):
    """Step 2 has the higher metric and the lower objective; the test's objective follows the same formula."""
    curves = [runs("a", 0, [BASE, 0.7, 0.9], kls=[0.0, 0.0, 0.4], kl_coef=1.0)]
    tests = {("a", 0, 1): {"reward": 0.68, "kl": 0.1, "kl_sequence": 1.2}, ("base", None, 0): {"reward": 0.5}}
    base, row = table(curves, tests, budget="tokens")
    assert row["best_steps"] == [1] and row["best"] == one(0.7) and row["threshold"] == pytest.approx(0.66)
    assert row["test/objective"] == one(0.58) and base["test/objective"] is None  # its KL is not there
    curves = [runs("b", 0, [BASE, 0.7], kls=[0.0, 0.01], kl_coef=0.1, kl_reduction="sequence_sum")]
    assert table(curves, {("b", 0, 1): tests["a", 0, 1]}, budget="tokens")[1]["test/objective"] == one(0.56)


def test_a_seed_with_nothing_trained_in_the_budget_is_the_base_model(runs):
    """Budget 2 s: the second seed's first validation is at 4 s."""
    curves = [runs("a", 0, [BASE, 0.7]), runs("a", 1, [BASE, 0.8], every=2)]
    tests = {("base", None, 0): {"reward": 0.4, "judge": 0.3}, ("a", 0, 1): {"reward": 0.6, "judge": 0.5}}
    _, row = table(curves, tests, budget="seconds")
    assert row["best_steps"] == [1, 0] and row["untrained"] == [1]
    assert row["test/reward"] == near(0.5, 0.1, 2) and row["test/judge"] == near(0.4, 0.1, 2)
    assert row["gap"] == near(0.1, 0.0, 2)  # 0.7 - 0.6 and 0.5 - 0.4
    assert row["used_seconds"] == near(1.0, 1.0, 2) and row["used_tokens"] == near(50.0, 50.0, 2)


def test_steps_without_an_update_have_no_gradient_norm(runs):
    curve = runs("ppo", 0, [BASE, 0.6, 0.7, 0.8, 0.9], idle=(0, 2))
    assert curve.grad_norm == [None, 2.0, None, 4.0]
    _, row = table([curve], {}, budget="tokens")
    assert (row["grad_norm/median"], row["grad_norm/p90"], row["grad_norm/max"]) == (one(3.0), one(4.0), one(4.0))
    _, row = table([runs("ppo", 1, [BASE, 0.6], idle=(0,))], {}, budget="tokens")
    assert row["grad_norm/median"] is None and row["step_seconds"] == one(2.0)


@pytest.fixture
def compared(runs):
    """Three methods: ppo with three seeds, one longer and one in progress; grade with one seed of which another
    failed; reinforce, twice as dear, that never gets far."""
    curves = [
        runs("ppo", 0, [BASE, 0.6, 0.7]),
        runs("ppo", 1, [BASE, 0.66, 0.68, 0.99]),  # its third step is beyond the budget
        runs("ppo", 2, [BASE, 0.7, 0.6], planned=5),
        runs("grade", 1, [BASE, 0.75, 0.7], seconds=4.0),
        runs("reinforce", 0, [BASE, 0.52], tokens=200),
        runs("reinforce", 1, [BASE, 0.7], tokens=200),
    ]
    tests = {
        ("base", None, 0): {"reward": 0.51, "kl": 0.0, "entropy": 3.0, "judge": 0.48, "perplexity": 20.0},
        ("ppo", 0, 2): {"reward": 0.68, "kl": 0.10, "entropy": 2.0, "judge": 0.60, "perplexity": 30.0},
        ("ppo", 1, 2): {"reward": 0.66, "kl": 0.30, "entropy": 2.0, "judge": None},
        ("ppo", 2, 1): {"reward": 0.70, "kl": 0.20, "entropy": 2.0, "judge": 0.70},
        ("ppo", 1, 3): {"reward": 99.0},  # not the checkpoint within the budget
        ("grade", 1, 1): {"reward": 0.74, "kl": 0.05, "entropy": 2.8},
        ("reinforce", 0, 1): {"reward": 0.53, "kl": 0.01, "entropy": 2.9},
    }
    return curves, tests


def near(mean, stderr, n):
    return pytest.approx({"mean": mean, "stderr": stderr, "n": n})


def one(mean):
    return {"mean": pytest.approx(mean), "stderr": None, "n": 1}


def test_table_by_tokens(compared):
    """Budget 200 tokens. Best validations: ppo 0.7, 0.68, 0.7; grade 0.75; so the threshold is 0.5 + 0.8 * 0.25."""
    base, ppo, grade, reinforce = table(*compared, budget="tokens")
    assert [row["method"] for row in (base, ppo, grade, reinforce)] == ["base", "ppo", "grade", "reinforce"]
    assert base["best"] == one(0.5) and base["gap"] == one(-0.01) and base["test/perplexity"] == one(20.0)
    assert base["threshold"] == pytest.approx(0.7) and "peak_gib" not in base

    assert ppo["seeds"] == [0, 1, 2] and ppo["best_steps"] == [2, 2, 1] and ppo["unfinished"] == 1
    assert ppo["test/reward"] == near(0.68, 0.02 / 3**0.5, 3)  # the deviation of 0.66, 0.68, 0.70 is 0.02
    assert ppo["best"] == near(2.08 / 3, (4 / 3e4 / 3) ** 0.5, 3)
    assert ppo["gap"] == near(0.04 / 3, (4 / 3e4 / 3) ** 0.5, 3)  # 0.02, 0.02 and 0
    assert ppo["test/kl"] == near(0.2, 0.1 / 3**0.5, 3)
    assert ppo["test/judge"] == near(0.65, 0.05, 2)  # without the one that has no judge
    assert ppo["test/perplexity"] == one(30.0) and ppo["test/solve_rate"] is None
    assert ppo["reached"] == 2 and ppo["steps_to"] is None and ppo["tokens_to"] is None  # 0.68 is below
    # Steps of 1..2, 1..3 and 1..2: medians 1.5, 2, 1.5.
    assert ppo["grad_norm/median"] == near(5 / 3, 1 / 6, 3) and ppo["grad_norm/max"] == near(7 / 3, 1 / 3, 3)
    assert ppo["used_tokens"] == near(500 / 3, 100 / 3, 3) and grade["used_seconds"] == one(4.0)
    assert ppo["step_seconds"] == near(2.0, 0.0, 3) and ppo["peak_gib"] == near(7 / 3, 1 / 3, 3)

    assert grade["seeds"] == [1] and grade["reached"] == 1 and grade["test/judge"] is None
    assert (grade["steps_to"], grade["tokens_to"], grade["seconds_to"]) == (one(1), one(100), one(4.0))
    assert reinforce["reached"] == 1 and reinforce["seconds_to"] is None
    assert reinforce["test/reward"] == one(0.53) and reinforce["best"]["n"] == 2  # one test is missing


def test_table_by_seconds(compared):
    """Budget 2 s: one step of ppo and of reinforce, none of grade."""
    rows = {row["method"]: row for row in table(*compared, budget="seconds")}
    assert rows["ppo"]["best_steps"] == [1, 1, 1] and rows["grade"]["best_steps"] == [0]
    assert rows["base"]["threshold"] == pytest.approx(0.5 + 0.8 * 0.2)
    assert rows["ppo"]["reached"] == 2 and rows["grade"]["reached"] == 0


def test_every_seed_reaches_and_none_does(runs):
    """Threshold 0.5 + 0.8 * 0.1, first met after 2 and 4 steps; one step takes 100 tokens and 2 s."""
    curves = [
        runs("a", 0, [BASE, 0.58, 0.6], every=2),
        runs("a", 1, [BASE, 0.5, 0.59], every=2),
        runs("b", 0, [BASE, 0.57, 0.579], every=2),
    ]
    _, a, b = table(curves, {}, budget="tokens")
    assert a["steps_to"] == near(3.0, 1.0, 2)
    assert a["tokens_to"] == near(300.0, 100.0, 2) and a["seconds_to"] == near(6.0, 2.0, 2)
    assert b["reached"] == 0 and b["steps_to"] is None and b["test/reward"] is None


def test_no_run_improves(runs):
    curves = [runs("a", 0, [BASE, 0.4]), runs("b", 0, [BASE, 0.5])]
    rows = table(curves, {}, budget="tokens")
    assert [row["threshold"] for row in rows] == [None] * 3 and rows[2]["reached"] == 0
    assert "No run improved" in markdown(rows, "tokens", common_budgets(curves))


def test_solve_rate_table(runs):
    curves = [runs("grpo", 0, [0.5, 0.9], solve_rates=[0.0, 0.25])]
    assert curves[0].metric == "solve_rate" and [v.metric for v in curves[0].validations] == [0.0, 0.25]
    tests = {("grpo", 0, 1): {"reward": 0.9, "solve_rate": 0.2}, ("base", None, 0): {"reward": 0.5, "solve_rate": 0.0}}
    _, row = table(curves, tests, budget="tokens")
    assert row["metric"] == "solve_rate" and row["test/solve_rate"] == one(0.2) and row["gap"] == one(0.05)
    assert "| test solve rate |" in markdown(table(curves, tests, budget="tokens"), "tokens", common_budgets(curves))


def test_markdown(compared):
    text = markdown(table(*compared, budget="tokens"), "tokens", common_budgets(compared[0]))
    note, quality, cost = text.strip().split("\n\n")
    assert "200 generated tokens" in note and "0.700" in note
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in quality.splitlines()]
    assert lines[0][:4] == ["method", "seeds", "test reward", "best validation"]
    assert "test solve rate" not in lines[0]
    assert lines[2][:4] == ["base", "–", "0.510", "0.500"]
    assert lines[3][:4] == ["ppo", "3 (1 not done)", "0.680 ± 0.012", "0.693 ± 0.007"]
    assert lines[4][:3] == ["grade", "1", "0.740 ± –"] and lines[4][lines[0].index("judge")] == "–"
    assert len({len(line) for line in lines}) == 1
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in cost.splitlines()]
    assert [line[0] for line in lines[2:]] == ["ppo", "grade", "reinforce"]
    assert lines[0][2:5] == ["tokens used", "seconds used", "steps to 80%"]
    assert lines[2][2] == "167 ± 33" and lines[3][3] == "4 ± –"
    assert lines[2][4] == "not reached (2 of 3)" and lines[3][4:7] == ["1 ± –", "100 ± –", "4 ± –"]
    rows = table(*compared, budget="seconds")
    for seconds, shown in ((2.0, "2 s"), (0.8249, "0.825 s"), (1234.5, "1,234 s")):
        assert f"within {shown} of training" in markdown(rows, "seconds", Budgets(100, seconds))


@pytest.mark.parametrize("width", [80, 60])
def test_rich_table_fits_a_terminal(compared, width):
    curves, tests = compared
    tests = {key: {**values, "kl_sequence": 1.0} for key, values in tests.items()}
    wide, narrow = (Console(file=io.StringIO(), width=width) for width in (200, width))
    for console in (wide, narrow):
        console.print(rich_table(table(curves, tests, budget="tokens"), "equal tokens"))
    text = wide.file.getvalue()
    assert "equal tokens" in text and "0.680 ± 0.012" in text and "not reached (2 of 3)" in text
    words = [set(console.file.getvalue().replace("─", "").split()) for console in (wide, narrow)]
    assert words[0] == words[1] and "± –" not in text
    assert max(len(line) for line in narrow.file.getvalue().splitlines()) <= width


def test_notes_say_where_the_sweep_ended_at_its_edge():
    def trials(method, *objectives):
        return [{"method": method, "learning_rate": 10.0**i, "objective": o} for i, o in enumerate(objectives)]

    payload = {
        "config": {"method": {"kl_coef": 0.1, "kl_reduction": "sequence_sum"}, "compare": {"jobs": 1}},
        "tables": {"tokens": [{"metric": "solve_rate"}]},
        "learning_rates": {"ppo": 10.0, "grpo": 100.0, "grade": 1.0},
        "sweep": [*trials("ppo", 0.1, 0.2, None), *trials("grpo", 0.1, 0.2, 0.3), *trials("grade", 0.3, 0.2, 0.1)],
        "judge": None,
        "failures": {},
        "machine": machine(),
    }
    text = notes(payload)
    assert "solve rate − 0.1 · KL (nats per response)" in text and "rate of ppo" not in text
    assert "best rate of grpo is the highest" in text and "best rate of grade is the lowest" in text
    assert "steered" not in text
    payload["config"]["method"]["target_kl"] = 0.5
    assert "In training the KL's weight goes from 0.1, steered to a KL of 0.5." in notes(payload)


def test_write_comparison(compared, tmp_path):
    path = tmp_path / "comparison.json"
    rows = table(*compared, budget="tokens")
    write_comparison(path, {"rows": rows, "bad": [float("nan"), (float("inf"), 1.5)]})
    saved = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert saved["bad"] == [None, [None, 1.5]]
    assert saved["rows"] == json.loads(json.dumps(rows))
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["comparison.json"]
