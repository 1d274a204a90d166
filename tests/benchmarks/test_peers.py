"""TRL's trainers beside ours: what is run, how it is timed, and what the tables say of it."""

from __future__ import annotations

import importlib.util
import json
import time
from dataclasses import asdict

import pytest
import torch

from benchmarks import peers, peers_trl
from benchmarks.peers import PACERS, ChildFailed, Study, beyond
from benchmarks.peers_run import BASE, Clock, steps_at
from benchmarks.peers_text import (
    LABELS,
    best_of_theirs,
    document,
    first_time,
    interval,
    mean_curve,
    runs_of,
    times_faster,
    value_at,
)
from benchmarks.saved import write_saved
from grade.config import Config

BASE_ROW = {"stage": "base", "method": BASE, "reward": 0.5, "judge": 0.4, "objective": 0.5, "kl": 0.0, "length": 30.0}


def as_json(settings):
    return json.loads(json.dumps(asdict(settings)))


def row_of(method, values, *, seed=0, seconds=10.0, stage="run", **others):
    """A run of as many steps as `values`, evaluated after each."""
    curve = [
        {"step": i, "seconds": seconds * i, "reward": v, "judge": v - 0.1, "objective": v, "kl": 0.1, "length": 31.0}
        for i, v in enumerate(values, start=1)
    ]
    return {
        **{"stage": stage, "method": method, "seed": seed, "learning_rate": 1e-3, "schedule": "cosine"},
        **{"steps": len(values), "points": [], "options": {}, "before_seconds": 1.0, "curve": curve},
        **{"step_seconds": [seconds] * 5, "step_cpu_seconds": [seconds] * 5, "step_tokens": [500] * 5},
        **{"loaded_gib": 0.5, "peak_gib": 1.5},
        **others,
    }


def payload_of(*rows):
    settings = {"config": as_json(Config()), "threads": 1, "clock": "wall"}
    return {"settings": settings, "machine": {"cpu": "one"}, "rows": [BASE_ROW, *rows]}


TWO_SEEDS = [
    *(row_of("trl-grpo", [0.55, 0.6], seed=seed) for seed in (0, 1)),
    *(row_of("trl-rloo", [0.6, 0.7], seed=seed) for seed in (0, 1)),
    row_of("grade-ste", [0.7, 0.9], seed=0, seconds=4.0),
    row_of("grade-ste", [0.9, 0.9], seed=1, seconds=4.0),
]


# -- statistics ------------------------------------------------------------------------------------------------------


def test_a_curve_is_read_on_the_lines_between_its_points():
    points = [(0.0, 0.5), (10.0, 0.6), (30.0, 0.8)]
    assert value_at(points, 20.0) == pytest.approx(0.7)
    assert value_at(points, 99.0) == 0.8
    assert first_time(points, 0.7) == pytest.approx(20.0)
    assert first_time(points, 0.4) == 0.0
    assert first_time(points, 0.81) is None


def test_a_value_that_was_lost_again_was_reached():
    assert first_time([(0.0, 0.5), (10.0, 0.9), (20.0, 0.6)], 0.7) == pytest.approx(5.0)


def test_trl_is_what_comes_highest_and_ours_is_timed_to_there():
    runs = runs_of(payload_of(*TWO_SEEDS))
    assert best_of_theirs(runs, BASE_ROW, "reward") == ("trl-rloo", pytest.approx(0.7), pytest.approx(20.0))
    assert mean_curve(runs["grade-ste"], BASE_ROW, "reward")[1] == (4.0, pytest.approx(0.8))
    # From 0.5 to 0.8 in 4 s: 0.7 after 8/3 s.
    assert times_faster(runs, BASE_ROW, "grade-ste", "reward") == pytest.approx(20 / (8 / 3))
    assert times_faster(runs, BASE_ROW, "trl-rloo", "reward") == pytest.approx(1.0)
    assert times_faster(runs, BASE_ROW, "trl-grpo", "reward") == 0.0  # it never comes there


def test_the_interval_is_that_of_the_seeds():
    runs = runs_of(payload_of(*TWO_SEEDS))
    # By seed 0 alone 0.7 is reached after 4 s, by seed 1 after 2.
    assert interval(runs, BASE_ROW, "grade-ste", "reward") == (pytest.approx(5.0), pytest.approx(10.0))
    assert interval(runs, BASE_ROW, "trl-rloo", "reward") == (pytest.approx(1.0), pytest.approx(1.0))
    assert interval({name: rows[:1] for name, rows in runs.items()}, BASE_ROW, "grade-ste", "reward") is None


def test_without_a_gain_of_trl_there_is_nothing_to_reach():
    runs = runs_of(payload_of(row_of("trl-grpo", [0.4]), row_of("grade-ste", [0.6])))
    assert times_faster(runs, BASE_ROW, "grade-ste", "reward") is None


def test_a_seed_counts_once_every_method_has_it():
    rows = [row_of("trl-grpo", [0.6], seed=seed) for seed in (0, 1)] + [row_of("grade-ste", [0.6], seed=1)]
    assert {name: [row["seed"] for row in found] for name, found in runs_of(payload_of(*rows)).items()} == {
        "trl-grpo": [1],
        "grade-ste": [1],
    }


def test_the_tables_say_where_trl_wins():
    slow = [row_of("trl-grpo", [0.7, 0.8], seconds=2.0), row_of("grade-ste", [0.6, 0.65], seconds=5.0)]
    text = document(payload_of(*slow, row_of("grpo", [], seconds=3.0)))
    (line,) = [line for line in text.splitlines() if "| GRADE-STE |" in line and "reward 0.800" in line]
    assert line.split("|")[3:5] == [" not reached ", " – "]
    assert "| GRPO, here | 1 | 3 (3–3) |" in text
    assert "After 4.0 s of training" in text


def test_the_clock_that_counts_is_that_of_the_settings():
    rows = [row_of(method, [0.6, 0.7], step_cpu_seconds=[2.0] * 5) for method in ("trl-grpo", "grade-ste")]
    for row in rows:
        for point in row["curve"]:
            point["cpu_seconds"] = point["seconds"] / 5
    payload = payload_of(*rows)
    payload["settings"]["clock"] = "process"
    text = document(payload)
    assert "After 4.0 s of training (seconds on the CPU" in text
    assert "| 10 (10–10) | 2 (2–2) | 250 |" in text


def test_memory_is_the_most_of_any_step_without_an_evaluation_before_it():
    rows = [row_of("trl-grpo", [0.6], peak_gib=1.2), row_of("trl-grpo", [], stage="pace", peak_gib=1.75)]
    assert "| 1.75 | 1.25 |" in document(payload_of(*rows))


def test_there_is_a_table_before_any_run_has_ended():
    assert "s / step" in document(payload_of(row_of("trl-grpo", [0.6], stage="sweep")))


# -- what is run -----------------------------------------------------------------------------------------------------


class Made:
    """In place of processes: a method's objective by its learning rate and settings, and the orders that came."""

    def __init__(self, objective):
        self.objective, self.orders, self.saved = objective, [], 0

    def __call__(self, order):
        self.orders.append(order)
        if order.method == BASE:
            return as_json(order) | BASE_ROW
        value = self.objective(order)
        seconds = 2.0 * order.options.get("num_iterations", 1)
        made = row_of(order.method, [value] if order.points else [], seconds=seconds)
        return made | as_json(order)

    def save(self, payload):
        self.saved += 1

    def study(self, payload):
        return Study(Config(), 60.0, 30.0, 1000, "wall", payload, self, self.save)


def objective(order):
    """Highest at the largest of the three rates, and with two passes."""
    return min(order.learning_rate / Config().train.learning_rate, 5.0) + order.options.get("num_iterations", 0)


def test_a_study_measures_what_it_lacks_and_nothing_twice():
    payload, made = payload_of(), Made(objective)
    payload["rows"].clear()
    made.study(payload).run([0, 1])
    assert made.saved == len(made.orders) == len(payload["rows"])
    again = Made(objective)
    again.study(payload).run([0, 1])
    assert again.orders == []
    again.study(payload).run([0, 1, 2])
    assert {order.seed for order in again.orders} == {2}


class Failing(Made):
    """Processes of a stage with a learning rate from so many times the config's on end in an error."""

    def __init__(self, stage, least):
        super().__init__(objective)
        self.stage, self.least = stage, least * Config().train.learning_rate

    def __call__(self, order):
        if order.stage == self.stage and order.learning_rate >= self.least:
            raise ChildFailed("Traceback\nRuntimeError: not a number")
        return super().__call__(order)


def test_a_trial_that_fails_is_kept_and_not_chosen():
    payload = payload_of()
    payload["rows"].clear()
    Failing("sweep", 3.0).study(payload).run([0])
    failed = [row for row in payload["rows"] if "failed" in row]
    assert {row["failed"] for row in failed} == {"RuntimeError: not a number"}
    assert {row["stage"] for row in failed} == {"sweep"}
    runs = [row for row in payload["rows"] if row["stage"] == "run" and row["points"]]
    assert runs and all(row["learning_rate"] == Config().train.learning_rate for row in runs)
    again = Made(objective)
    again.study(payload).run([0])
    assert again.orders == []


def test_a_run_that_fails_ends_the_measurement_in_words():
    payload = payload_of()
    payload["rows"].clear()
    with pytest.raises(SystemExit, match="not a number\n.* failed. What was measured before is kept"):
        Failing("run", 0.0).study(payload).run([0])
    assert payload["rows"]


def test_runs_take_turns_with_the_best_settings_for_the_same_time():
    payload, made = payload_of(), Made(objective)
    payload["rows"].clear()
    made.study(payload).run([0, 1])
    runs = [order for order in made.orders if order.stage == "run"]
    assert [(order.seed, order.method) for order in runs] == [
        (seed, method) for seed in (0, 1) for method in (*peers.LEARNERS, *PACERS)
    ]
    by_method = {order.method: order for order in runs}
    grpo, ste = by_method["trl-grpo"], by_method["grade-ste"]
    # 3 was the highest of the factors, 9 lies beyond, and then 27: no better than 9, which stays.
    assert grpo.learning_rate == ste.learning_rate == pytest.approx(9 * Config().train.learning_rate)
    assert grpo.options == {"num_iterations": 2} and ste.options == {}
    assert (grpo.steps, ste.steps) == (15, 30)  # of 4 and of 2 seconds, in 60
    assert not by_method["grpo"].points


@pytest.mark.parametrize(
    ("found", "further"),
    [
        ({0.3: 1.0, 1.0: 2.0, 3.0: 1.5}, None),
        ({0.3: 1.0, 1.0: 2.0, 3.0: 2.5}, 9.0),
        ({0.3: 3.0, 1.0: 2.0, 3.0: 2.5}, 0.09),
    ],
)
def test_the_sweep_goes_on_beyond_its_edge(found, further):
    assert beyond(found) == (None if further is None else pytest.approx(further))


def test_points_lie_at_shares_of_the_steps():
    assert steps_at(40, (1 / 16, 1 / 2, 1.0)) == {2, 20, 40}
    assert steps_at(3, (1 / 16, 1.0)) == {1, 3}
    assert steps_at(8, ()) == set()


def test_an_evaluation_takes_no_time_of_a_step():
    caught = []
    clock = Clock(lambda: time.sleep(0.2) or {"reward": 1.0}, {1}, torch.device("cpu"))
    clock.begin()
    clock.step(5, lambda: caught.append(1))
    clock.step(7, lambda: caught.append(2))
    assert sum(clock.seconds) < 0.15 and clock.tokens == [5, 7]
    assert caught == [1]
    (point,) = clock.points
    assert point == {"step": 1, "seconds": clock.seconds[0], "cpu_seconds": clock.cpu_seconds[0], "reward": 1.0}


# -- refusals --------------------------------------------------------------------------------------------------------


def test_without_trl_it_is_refused_with_the_fix(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "trl" else find(name, *rest))
    with pytest.raises(SystemExit, match=r"trl is not installed.*pip install -e '\.\[peers\]'"):
        peers.main(["--save", str(tmp_path / "out.json")])


def test_an_older_trl_is_refused_with_the_fix(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: object())
    monkeypatch.setattr(peers_trl, "version", lambda name: "0.24.0")
    with pytest.raises(SystemExit, match=r"trl 0\.24\.0 is installed.*pip install -e '\.\[peers\]'"):
        peers.main(["--save", str(tmp_path / "out.json")])


def test_a_saved_file_is_shown_without_trl(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    write_saved(tmp_path / "kept.json", payload_of(*TWO_SEEDS))
    peers.main(["--table", str(tmp_path / "kept.json")])
    assert "| RLOO, TRL |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--save", "x.json", "--sweep-seed", "1"], "is one of --seeds"),
        (["--save", "x.json", "--clock", "process", "--threads", "2"], "--threads"),
        (["--save", "x.json", "--config", "nothing"], "nothing"),
        (["--save", "x.json", "--generation.ignore_eos", "true"], "ignore_eos"),
        (["--save", "nowhere/x.json"], "cannot be written"),
        ([], "--save"),
    ],
)
def test_what_cannot_be_measured_is_refused(monkeypatch, arguments, words):
    monkeypatch.setattr(peers, "check_trl", lambda: None)
    monkeypatch.setattr(peers, "version", lambda name: "1.16.0")
    with pytest.raises(SystemExit, match=words):
        peers.main(arguments)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--seeds", "0,x", "different whole numbers"),
        ("--seeds", "1,1", "different whole numbers"),
        ("--seconds", "nan", "a number above 0"),
        ("--sweep-seconds", "-1", "a number from 0 on"),
        ("--threads", "0", "a whole number from 1 on"),
        ("--prompts", "0", "a whole number from 1 on"),
        ("--learning_rate", "1", "changes nothing"),
    ],
)
def test_a_wrong_option_is_refused_at_once(tmp_path, capsys, option, value, words):
    with pytest.raises(SystemExit):
        peers.main(["--table", str(tmp_path / "none.json"), f"{option}={value}"])
    shown = capsys.readouterr().err
    assert option in shown and words in shown


def test_a_plot_that_cannot_be_drawn_is_refused_in_words(tmp_path, capsys):
    write_saved(tmp_path / "kept.json", payload_of(*TWO_SEEDS))
    with pytest.raises(SystemExit, match="--plot .* its folder does not exist"):
        peers.main(["--table", str(tmp_path / "kept.json"), "--plot", str(tmp_path / "nowhere" / "x.png")])
    with pytest.raises(SystemExit, match="--plot .* could not be drawn"):
        peers.main(["--table", str(tmp_path / "kept.json"), "--plot", str(tmp_path / "x.xyz")])
    assert "| RLOO, TRL |" in capsys.readouterr().out


def test_a_file_of_other_settings_is_not_gone_on_with(tmp_path):
    write_saved(tmp_path / "kept.json", payload_of() | {"settings": {"seconds": 60.0}})
    with pytest.raises(SystemExit, match=r"other settings \(seconds\)"):
        peers.begun(tmp_path / "kept.json", {"seconds": 30.0})


def test_every_method_has_a_name():
    assert set(LABELS) == {*peers.LEARNERS, *PACERS} and set(peers.VARIANTS) == set(peers.LEARNERS)
