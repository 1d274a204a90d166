"""Frontiers of reward against KL from points written by hand, and the best of n against all subsets."""

from __future__ import annotations

import json
import math
from itertools import combinations

import numpy as np
import pytest
from report_runs import add_frontier, write_comparison
from tiny import tiny_policy, tiny_reward

from benchmarks import comparison as benchmark
from grade.config import Config, EvaluationConfig, GenerationConfig
from grade.config.studies import CompareConfig
from grade.sampling.sample import sample
from grade.studies.compare import best_of as sampling_of_n
from grade.studies.compare.best_of import best_of, best_of_weights, kl_bound, sampled_best_of
from grade.studies.compare.frontier import by_seed, common_kls, evenly_spaced, frontier_of, frontier_table, value_at
from grade.studies.compare.frontier_text import frontier_markdown
from grade.studies.compare.measures import repetition

BASE = {"kl_sequence": -1e-9, "reward": 0.5, "judge": 0.5}


def point(kl, reward, method="ppo", seed=0, **further):
    return {"method": method, "seed": seed, "kl_coef": 0.1, "step": 1, "kl_sequence": kl, "reward": reward, **further}


def test_a_frontier_is_of_the_best_so_far_and_stays_level():
    points = [point(16.0, 0.7), point(1.0, 0.6), point(4.0, 0.8), point(2.0, 0.55)]
    knots = frontier_of(points, BASE)
    assert [(knot["kl_sequence"], knot["reward"]) for knot in knots] == [(0.0, 0.5), (1.0, 0.6), (4.0, 0.8), (16, 0.8)]
    assert value_at(knots, "reward", 0.0) == 0.5
    assert value_at(knots, "reward", 0.25) == pytest.approx(0.55)  # half way over the square root
    assert value_at(knots, "reward", 2.25) == pytest.approx(0.7)
    assert value_at(knots, "reward", 9.0) == value_at(knots, "reward", 16.0) == pytest.approx(0.8)
    assert value_at(knots, "reward", 16.1) is None
    assert value_at(knots, "judge", 2.25) is None and value_at(knots, "judge", 0.0) is None  # the points have none


def test_other_measures_are_those_of_the_checkpoints_that_the_reward_chose():
    points = [point(1.0, 0.7, judge=0.6), point(0.5, 0.45, judge=0.99), point(4.0, 0.9, judge=0.3)]
    knots = frontier_of(points, BASE)
    assert value_at(knots, "judge", 1.0) == 0.6 and value_at(knots, "judge", 2.25) == pytest.approx(0.45)


def test_where_nothing_is_better_than_the_base_and_where_nothing_moved():
    worse = frontier_of([point(4.0, 0.4)], BASE)
    assert value_at(worse, "reward", 4.0) == 0.5 and value_at(worse, "reward", 5.0) is None
    still = frontier_of([point(0.0, 0.5)], BASE)
    assert value_at(still, "reward", 0.0) == 0.5 and value_at(still, "reward", 0.1) is None
    assert common_kls({"ppo": {0: still}}) == [] and common_kls({}) == []


def test_a_kl_that_rounding_left_below_0_is_0():
    knots = frontier_of([point(-1e-7, 0.6), point(4.0, 0.8)], BASE)
    assert [knot["kl_sequence"] for knot in knots] == [0.0, 0.0, 4.0]
    assert value_at(knots, "reward", 1.0) == pytest.approx(0.7)
    assert frontier_of([point(-1e-7, 0.4)], BASE)[-1]["kl_sequence"] == 0.0


def test_the_table_is_over_seeds_and_says_where_one_does_not_reach():
    points = [
        point(4.0, 0.7, judge=0.6),
        point(4.0, 0.9, seed=1, judge=0.6),
        point(1.0, 0.6, "grpo", judge=0.55),
        point(9.0, 0.8, "grpo", seed=1, judge=0.5),
    ]
    best = [{"n": 2, "kl_sequence": 0.25, "reward": 0.6, "judge": 0.5}]
    table = frontier_table(points, BASE, best)
    assert table["kls"] == [0.05, 0.1, 0.2, 0.5, 1.0]  # the second method reaches no more
    ppo, grpo, of_n = table["rows"]
    assert ppo["method"] == "ppo" and ppo["seeds"] == [0, 1] and of_n["method"] == "best of n"
    assert ppo["reward"][4] == pytest.approx({"mean": 0.65, "stderr": 0.05, "n": 2})
    assert grpo["reward"][4] == pytest.approx({"mean": 0.6, "stderr": 0.0, "n": 2})
    assert of_n["reward"][3:] == [None, None] and of_n["reward"][2]["stderr"] is None
    assert "perplexity" not in ppo
    alone = frontier_table(points[2:], BASE, [])
    assert alone["kls"][-1] == 1.0 and [row["method"] for row in alone["rows"]] == ["grpo"]
    wide = frontier_table([point(4.0, 0.7), point(1.0, 0.6, "a"), point(30.0, 0.8, "b")], BASE, [])
    assert wide["kls"] == [0.1, 0.2, 0.5, 1.0, 2.0]
    assert wide["rows"][1]["reward"][-1] is None and wide["rows"][2]["reward"][-1]["n"] == 1


def test_runs_with_other_kl_coefs_share_their_seeds_frontier():
    points = [point(1.0, 0.6), {**point(4.0, 0.7), "kl_coef": 0.01}]
    assert [knot["reward"] for knot in by_seed(points, BASE)["ppo"][0]] == [0.5, 0.6, 0.7]


@pytest.mark.parametrize(
    "steps, count, expected",
    [
        ([10, 20, 30, 40, 50, 60], 5, [20, 30, 40, 50, 60]),
        (list(range(1, 16)), 5, [3, 6, 9, 12, 15]),
        ([10, 20, 30], 1, [30]),
        ([10, 20], 5, [10, 20]),
        ([], 5, []),
    ],
)
def test_points_of_a_run_are_evenly_spaced(steps, count, expected):
    assert evenly_spaced(steps, count) == expected


def test_the_benchmark_prints_it_and_says_where_there_is_none(tmp_path, capsys):
    path = add_frontier(write_comparison(tmp_path / "compare-x", {"ppo": [0.6]})) / "comparison.json"
    payload = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**payload, "budgets": {}}), encoding="utf-8")
    benchmark.main([str(path), "--frontier"])
    said = capsys.readouterr().out
    assert said == frontier_markdown(payload["frontier"])
    assert "On 16 test prompts, the highest reward within" in said and "| reward at KL 1 |" in said
    assert "| ppo | 2 | " in said and "| best of n | – | " in said and "| 4 | 0.600 | 1.100 | 0.500 |" in said
    old = {name: value for name, value in payload.items() if name != "frontier"}
    path.write_text(json.dumps({**old, "budgets": {}}), encoding="utf-8")
    with pytest.raises(SystemExit, match="has no frontier: it is of an earlier version"):
        benchmark.main([str(path), "--frontier"])
    still = {**payload["frontier"], "table": {"kls": [], "rows": []}}
    assert "No method has moved" in frontier_markdown(still)


# -- best of n -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_the_best_of_n_is_the_mean_over_all_subsets(n):
    """Of 6 responses to 4 prompts, with ties in the last two: each of equals is as likely chosen."""
    rng = np.random.default_rng(0)
    rewards, judge = rng.normal(size=(4, 6)), rng.normal(size=(4, 6))
    rewards[2] = [0, 1, 1, 0, 1, 0]
    rewards[3] = 0.5
    found = best_of(rewards, {"judge": judge}, n)
    best, judged = [], []
    for row, values in zip(rewards, judge, strict=True):
        for subset in combinations(range(6), n):
            top = row[list(subset)].max()
            best.append(top)
            judged.append(np.mean([values[i] for i in subset if row[i] == top]))
    assert found["reward"] == pytest.approx(np.mean(best))
    assert found["judge"] == pytest.approx(np.mean(judged))


def test_weights_sum_to_one_and_of_all_is_the_maximum():
    for n in (1, 3, 16):
        assert best_of_weights(n, 16).sum() == pytest.approx(1)
    assert best_of_weights(16, 16).tolist() == [0.0] * 15 + [1.0]
    for n in (0, 17):
        with pytest.raises(ValueError):
            best_of_weights(n, 16)


def test_no_pass_has_more_responses_than_an_evaluations(monkeypatch):
    """With a prompt's responses in several passes, and several prompts' in one, they are the same."""
    policy = tiny_policy()
    reward, sizes = tiny_reward(policy), []
    monkeypatch.setattr(sampling_of_n, "sample", lambda *args, **named: counted(sample(*args, **named)))

    def counted(rollout):
        sizes.append(len(rollout))
        return rollout

    def found(batch_size):
        sizes.clear()
        config = Config(
            generation=GenerationConfig(max_new_tokens=5, min_new_tokens=2, top_k=16),
            evaluation=EvaluationConfig(batch_size=batch_size),
            compare=CompareConfig(best_of=[1, 2, 7]),
        )
        prompts = [[5, 9, 2], [7, 11, 13], [23]]
        return sampled_best_of(policy, reward, prompts, config, lambda rollout: {"repetition": repetition(rollout)})

    whole = found(100)
    assert sizes == [21] and whole[2]["reward"] > whole[0]["reward"]
    for size, expected in ((14, [14, 7]), (8, [7, 7, 7]), (3, [3, 3, 1] * 3)):
        for row, other in zip(whole, found(size), strict=True):
            assert other == pytest.approx(row, rel=1e-5)
        assert sizes == expected


def test_the_bound_of_its_kl():
    assert kl_bound(1) == 0 and kl_bound(4) == pytest.approx(math.log(4) - 0.75)
