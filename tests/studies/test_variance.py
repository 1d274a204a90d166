"""The variance laboratory: its statistics on constructed draws, and a measurement of a real tiny policy."""

from __future__ import annotations

import io
import json
import math
from contextlib import nullcontext

import pytest
import torch
from rich.console import Console
from tiny_run import changed

from grade.config import Config
from grade.config.methods import COMPARED
from grade.errors import GradeError
from grade.studies.variance import study
from grade.studies.variance.laboratory import CONVERGED, config_of
from grade.studies.variance.statistics import Draws, agreement
from grade.studies.variance.study import run_variance
from grade.studies.variance.text import document, name_of, rich_table
from grade.training.interrupt import StopRequest


def drawn(mean: torch.Tensor, deviation: float, count: int, *, seed: int, batch: int = 1) -> Draws:
    """Draws N(mean, deviation² / batch), cut into two parameter tensors."""
    generator, draws = torch.Generator().manual_seed(seed), Draws(count, batch)
    for _ in range(count):
        noise = torch.randn(len(mean), generator=generator, dtype=torch.float64)
        vector = mean + noise * deviation / batch**0.5
        draws.add([vector[:2], vector[2:]], seconds=0.5)
    return draws


MEAN = torch.tensor([3.0, 0.0, 4.0, 0.0, 0.0], dtype=torch.float64)  # of norm 5


def test_spread_of_hand_computed_draws():
    draws = Draws(3, batch=4)
    for first, seconds in ((1.0, 1.0), (2.0, 2.0), (3.0, 3.0)):
        draws.add([torch.tensor([first, 0.0]), torch.tensor([2.0])], seconds)
    spread = draws.spread()
    assert spread.mean_norm == pytest.approx(8**0.5)  # of (2, 0, 2)
    assert spread.trace == pytest.approx(4 * 1.0)  # the entry 1, 2, 3 has variance 1; four responses a draw
    signal = ((1 * 2 + 1 * 3 + 2 * 3) + 3 * 2.0**2) / 3  # products of different draws
    assert spread.snr_per_sample == pytest.approx(signal / 4)
    assert spread.seconds_per_sample == pytest.approx(6.0 / 12)
    left_out = [((2 * 3 + 4) / (4 * 0.5)), ((1 * 3 + 4) / (4 * 2.0)), ((1 * 2 + 4) / (4 * 0.5))]  # pairs that stay
    mean = sum(left_out) / 3
    error = (2 / 3 * sum((value - mean) ** 2 for value in left_out)) ** 0.5
    assert spread.snr_per_sample_interval[1] == pytest.approx(signal / 4 + 4.302652729911275 * error)
    assert spread.snr_per_sample_interval[0] == 0 and spread.relative_variance is None  # three draws say little
    assert spread.relative_variance_interval == (pytest.approx(1 / (signal / 4 + 4.302652729911275 * error)), None)
    norms = [(1.0, 2.0), (2.0, 2.0), (3.0, 2.0)]  # of the two tensors, draw by draw
    assert spread.tensor_norm_std == pytest.approx(sum(abs(a - b) / 2**0.5 for a, b in norms) / 3)


def test_spread_finds_variance_and_signal_whatever_the_batch():
    for batch in (1, 8):
        spread = drawn(MEAN, 2.0, 4000, seed=1, batch=batch).spread()
        assert spread.trace == pytest.approx(5 * 2.0**2, rel=0.05)
        assert spread.snr_per_sample == pytest.approx(25 / 20, rel=0.07)
        assert spread.relative_variance_interval[0] < 20 / 25 < spread.relative_variance_interval[1]
        assert spread.snr_per_second == pytest.approx(spread.snr_per_sample / (0.5 / batch))


def test_no_signal_has_no_relative_variance():
    """Of pure noise hardly any is called a signal, and the bound below its variance is what the draws allow."""
    spreads = [drawn(MEAN * 0, 1.0, 50, seed=seed).spread() for seed in range(20)]
    assert sum(s.relative_variance is None for s in spreads) >= 18
    bounds = [s.relative_variance_interval[0] for s in spreads if s.relative_variance_interval[0] is not None]
    assert all(bound > 5 for bound in bounds)  # 50 draws of noise: a signal above 1/5 of it would have been seen


def test_a_dead_estimator_has_neither_signal_nor_variance():
    draws = Draws(10, 4)
    for _ in range(10):
        draws.add([torch.zeros(2), torch.zeros(3)], 1.0)
    spread = draws.spread()
    assert spread.trace == spread.snr_per_sample == 0 and spread.relative_variance is None


def test_a_weak_signal_is_not_made_strong():
    """A relative variance of 5e4 cannot be found with 64 draws of 4: no figure, and a bound that the truth respects."""
    mean = torch.ones(40, dtype=torch.float64)
    right = 0
    for seed in range(10):
        low, high = drawn(mean, (5e4) ** 0.5, 64, seed=seed, batch=4).spread().relative_variance_interval
        right += low is None or low < 5e4
        assert high is None or high > 5e3
    assert right >= 9  # 95 % intervals


def test_agreement_of_an_unbiased_estimator_is_not_spoilt_by_noise():
    """Each block mean of ours is noise of norm ~ 5 on a signal of 5: naive cosines would be 0.7."""
    ours, reference = drawn(MEAN, 10.0, 200, seed=2), drawn(MEAN, 1.0, 2000, seed=3)
    found = agreement(ours.means(), reference.means())
    assert found.bias_interval[0] == 0 and found.verdict.startswith("no bias found")
    assert found.cosine == pytest.approx(1.0, abs=0.25)


def test_agreement_finds_a_bias():
    ours = drawn(MEAN * 1.5, 1.0, 1000, seed=4)
    found = agreement(ours.means(), drawn(MEAN, 1.0, 2000, seed=5).means())
    assert found.bias == pytest.approx(0.5, abs=0.05)
    assert found.bias_interval[0] < 0.5 < found.bias_interval[1]
    assert found.scale == pytest.approx(1.5, abs=0.05)
    assert found.verdict.startswith("biased, by 4")
    assert found.cosine == pytest.approx(1.0, abs=0.02)
    rescaled = agreement(ours.means(), drawn(MEAN, 1.0, 2000, seed=5).means(), same_scale=False)
    assert rescaled.bias is None and rescaled.cosine == found.cosine and rescaled.verdict == "direction only"


def test_a_bias_across_the_gradient_lowers_the_cosine():
    aside = torch.tensor([0.0, 5.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    found = agreement(drawn(MEAN + aside, 1.0, 1000, seed=6).means(), drawn(MEAN, 1.0, 1000, seed=7).means())
    assert found.cosine == pytest.approx(0.5**0.5, abs=0.02)
    assert found.cosine_interval[0] < 0.5**0.5 < found.cosine_interval[1]
    assert found.bias == pytest.approx(1.0, abs=0.05)


def test_a_noisy_reference_judges_nothing():
    found = agreement(drawn(MEAN, 1.0, 100, seed=8).means(), drawn(MEAN, 200.0, 100, seed=9).means())
    assert found.verdict == "reference too noisy to judge" and found.bias is None and found.cosine is None


def test_too_few_blocks_are_refused():
    with pytest.raises(ValueError, match="three blocks"):
        agreement(torch.ones(2, 5), torch.ones(10, 5))
    assert drawn(MEAN, 1.0, 2, seed=1).spread() is None


def test_intervals_cover():
    """The true relative bias 0.4 lies inside 95 % intervals in at least 17 of 20 repetitions."""
    inside = 0
    for seed in range(20):
        ours, reference = drawn(MEAN * 1.4, 4.0, 200, seed=100 + seed), drawn(MEAN, 4.0, 400, seed=200 + seed)
        found = agreement(ours.means(), reference.means())
        inside += found.bias_interval[0] <= 0.4 <= found.bias_interval[1]
    assert inside >= 17


def test_measures_every_method(lab_config, capsys):
    payload = run_variance(lab_config)
    rows = {name_of(row): row for row in payload["rows"]}
    # Three hops are all there are: converged. straight_through knows no temperature.
    assert len(rows) == 2 * 2 * 2 + 2 + 2 * 2 + 4 + 1 and "grade-ste straight_through, converged" in rows
    for row in rows.values():
        assert math.isfinite(row["trace"]) and row["trace"] > 0 and row["seconds_per_sample"] > 0
        assert row["draws"] == 10 or row["method"] == "reference"
    for method in ("grade-ste", "grade"):
        for tau in ("2", "0.5"):
            none, converged = (rows[f"{method} gumbel, τ {tau}, {hops}"]["trace"] for hops in ("0 hops", CONVERGED))
            assert none != pytest.approx(converged, rel=1e-4)
    assert rows["grade-ste rao, τ 0.5, converged"]["trace"] < rows["grade-ste gumbel, τ 0.5, converged"]["trace"]
    with_steps = {name for name, row in rows.items() if "prefixes" in row}
    rules = ("gumbel, τ 2", "gumbel, τ 0.5", "rao, τ 2", "rao, τ 0.5", "straight_through")
    assert with_steps == {"rloo", *(f"grade-ste {rule}, {CONVERGED}" for rule in rules)}
    for row in map(rows.get, with_steps):
        assert row["prefixes"] == 10 and row["plain_step_interval"][0] <= row["plain_step"]
    one, many = (rows[f"grade-ste {rule}, τ 0.5, {CONVERGED}"] for rule in ("gumbel", "rao"))
    assert one["best_interval"] == many["best_interval"] == rows["rloo"]["best_interval"]
    assert rows["grpo"]["bias"] is None and rows["grpo"]["verdict"] != "not judged"
    folder = lab_config.output_dir + "/variance-tiny"
    written = json.loads(json.dumps(payload["rows"]))
    assert json.load(open(f"{folder}/variance.json"))["rows"] == written
    assert "reference" in document(payload) and "std of tensor norms" in open(f"{folder}/variance.md").read()
    assert "relative variance" in " ".join(capsys.readouterr().out.split())
    for width in (60, 80):  # as many tables as it takes, each with the estimators' names, and no number is broken
        console = Console(file=io.StringIO(), width=width)
        console.print(rich_table(payload))
        shown = console.file.getvalue()
        assert "…" not in shown and max(map(len, shown.splitlines())) <= width
        assert shown.count("reinforce") == shown.count("estimator ") > 1
        assert "plain step" in shown and "length factor" in shown
        assert all(f"{row['scale']:.2f} [" in shown for row in payload["rows"] if row.get("scale_interval"))

    again = run_variance(changed(lab_config, method={"path_scale": 3.0}))  # nothing is missing: nothing is measured
    assert again["rows"] == written and again["config"]["method"]["path_scale"] == 1.0
    with pytest.raises(GradeError, match="other settings, another checkpoint"):
        run_variance(changed(lab_config, variance={"seed": 7}))


def test_gradients_are_measured_as_long_as_they_come():
    """A length factor is what path_scale should be, not what it should still be multiplied by."""
    config = changed(Config(), method={"path_scale": 3.0})
    for name in COMPARED:
        assert config_of(config, name, 4, 16).method.path_scale == 1.0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"variance": {"taus": []}}, "variance.taus is .*name one or more numbers, none"),
        ({"variance": {"taus": [2.0, 2.0]}}, "none of them twice"),
        ({"variance": {"hops": [-1]}}, "variance.hops"),
        ({"variance": {"lengths": [0]}}, "variance.lengths"),
        ({"variance": {"draws": 2}}, "variance.draws is 2: it must be at least 10"),
        ({"variance": {"responses": 5}}, "variance.responses .5. is not a multiple of variance.samples_per_prompt"),
        ({"variance": {"reference_responses": 100}}, "variance.reference_responses is 100: too few to judge by"),
        ({"variance": {"step_responses": 100}}, "variance.step_responses is 100: too few for intervals"),
        ({"variance": {"methods": ["dpo"]}}, "variance.methods is .*names of grade-ste"),
        ({"task": {"name": "countdown"}, "method": {"name": "reinforce"}}, "an answer to it must end by itself"),
    ],
)
def test_bad_settings_are_refused(lab_config, changes, message):
    with pytest.raises(GradeError, match=message):
        run_variance(changed(lab_config, **changes))


def test_a_folder_without_an_adapter_is_refused(lab_config, tmp_path):
    with pytest.raises(GradeError, match="holds no adapter"):
        run_variance(lab_config, tmp_path)


def test_stopping_keeps_the_draws_so_far(lab_config, monkeypatch):
    """Stopped after six draws, the rows say six; a stop that comes earlier does not take their place."""
    few = dict(methods=["grade-ste", "grpo"], estimators=["gumbel"], taus=[2.0], hops=[0])
    config = changed(lab_config, name="stopped", variance=few)

    def stopped_after(draws):
        request = StopRequest()
        made = []

        def tick():
            made.append(1)
            request.asked = len(made) >= draws + config.variance.warmup_draws

        monkeypatch.setattr(study, "stop_between_steps", lambda first: nullcontext(request))
        monkeypatch.setattr(study, "counting", lambda title, total: nullcontext(tick))
        with pytest.raises(KeyboardInterrupt):
            run_variance(config)
        return json.load(open(lab_config.output_dir + "/variance-stopped/variance.json"))["rows"]

    rows = stopped_after(6)
    assert {row["draws"] for row in rows} == {6} and {row["verdict"] for row in rows} == {"not judged"}
    assert stopped_after(4) == rows
