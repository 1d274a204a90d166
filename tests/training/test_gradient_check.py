"""The gradient check: swaps predicted by a reward's gradient against swaps that were made, and what is said of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from tiny import tiny_policy, tiny_reward

from grade import DifferentiableReward, EmbeddingTable, GradeTrainer, RewardFunction
from grade.cli import main
from grade.commands.reward import check_reward_gradient
from grade.config import Config, EvaluationConfig, GenerationConfig, TrainConfig
from grade.errors import GradeError
from grade.replay.score import ScoreSettings, score
from grade.rewards.function import FunctionReward
from grade.rewards.weighted import Term, WeightedReward
from grade.training import gradient_check
from grade.training.gradient_check import check_gradient, drawn_places
from grade.training.swap_statistics import Agreement, Swaps, agreements, verdict

PROMPTS = [[5, 9, 2], [7, 11, 13, 17, 19], [23]]
CONFIG = Config(
    generation=GenerationConfig(max_new_tokens=9, min_new_tokens=3, top_k=16),
    train=TrainConfig(batch_size=4, accumulation_steps=1),
    evaluation=EvaluationConfig(batch_size=16),
)


class OfEmbeddings(DifferentiableReward):
    """A function of the component of every embedding along a direction, summed over the response."""

    raises = "a component"

    def __init__(self, policy, of=lambda x: x, scale=1.0):
        self.tables, self.of = [EmbeddingTable(policy.embedding, scale)], of
        self.direction = torch.randn(policy.embedding.shape[1], generator=torch.Generator().manual_seed(3))

    def value(self, rollout, base, fed=(), *, activation_checkpointing=False):
        return (self.of(fed[0] @ self.direction) * rollout.mask).sum(1)


def rows_of(found) -> dict[tuple[str, str], Agreement]:
    return {(row.drawn, row.part): row for row in found.rows}


def check(reward, policy, config=CONFIG):
    return check_gradient(policy, reward, PROMPTS, config, responses=10, swaps=4)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_gradient_of_a_linear_reward_predicts_every_swap(scale):
    policy = tiny_policy()
    found = check(OfEmbeddings(policy, scale=scale), policy)
    assert set(rows_of(found)) == {
        (drawn, part)
        for drawn in ("policy", "top_k", "half-way")
        for part in ("whole", "first third", "middle third", "last third")
    }
    for row in found.rows:
        assert row.pearson.value == pytest.approx(1, abs=1e-6) and row.slope.value == pytest.approx(1, abs=1e-4)
        # Swaps of one effect are a tie in what is predicted and differ by rounding in what happens: a place of ranks.
        place = 12 / (row.swaps * (row.swaps**2 - 1))
        assert row.spearman.value > 1 - place and row.right_sign.value == 1
        assert row.slope.interval == pytest.approx((1, 1), abs=1e-4)
    assert rows_of(found)["policy", "whole"].swaps == 40 and "can follow" in found.verdict


def test_half_of_a_swap_of_a_square_is_predicted_as_a_parabola_has_it():
    """x², from a to b: the gradient says 2a(b - a); really b² - a², and half-way ((a + b) / 2)² - a²."""
    policy = tiny_policy()
    reward = OfEmbeddings(policy, torch.square)
    found = rows_of(check(reward, policy))
    # The same pairs in both: so the slopes follow from one another.
    swaps, half = found["policy", "whole"].slope.value, found["half-way", "whole"].slope.value
    assert half - 1 == pytest.approx((swaps - 1) / 2, abs=1e-4)


def states_of(policy):
    """A reward that reads the frozen base's states through the passes that the reference shares."""
    return tiny_reward(policy, "prompt+response")


def own_states(policy):
    """One that reads the response alone, by a pass of its own."""
    return tiny_reward(policy, "response")


@pytest.mark.parametrize("reward_of, shares", [(states_of, True), (own_states, False), (OfEmbeddings, False)])
def test_a_head_is_checked_by_the_passes_of_replay(reward_of, shares, monkeypatch):
    """The true effect of a swap is what scoring the swapped response gives minus the original's, whichever states the
    reward reads."""
    policy = tiny_policy()
    reward, calls = reward_of(policy), []
    assert reward.shares_base_pass is shares
    swapped = gradient_check._Slopes.swapped

    def seen(slopes, pairs, first, share, size):
        calls.append((slopes.rollout, pairs, share, swapped(slopes, pairs, first, share, size)))
        return calls[-1][-1]

    monkeypatch.setattr(gradient_check._Slopes, "swapped", seen)
    check(reward, policy)
    assert {share for _, _, share, _ in calls} == {0.5, 1.0}
    for rollout, pairs, share, swaps in calls:
        before = score(policy, reward, rollout, ScoreSettings()).reward
        for i, (row, position, candidate) in enumerate(zip(*pairs[:3], strict=True)):
            one = rollout.cut(int(row), int(row) + 1)
            tokens = one.tokens.clone()
            tokens[0, position] = candidate
            other = replace(one, tokens=tokens)
            if share == 0.5:  # the mean of both embeddings, as a mixture of two candidates
                weights = torch.zeros(*tokens.shape, 2)
                weights[..., 0] = 1.0
                weights[0, position] = 0.5
                other = replace(one, indices=torch.stack([one.tokens, tokens], dim=-1), weights=weights)
            after = score(policy, reward, other, ScoreSettings()).reward
            assert swaps.true[i] == pytest.approx(float(after[0] - before[row]), abs=2e-5)
        assert np.abs(swaps.true).max() > 2e-4


def test_places_are_drawn_by_their_weights():
    """Also where there are more of them than torch draws among at once."""
    weight = torch.zeros(3, 4, 5)
    weight[0, 1, 2], weight[0, 3, 0], weight[0, 3, 4] = 1.0, 2.0, 1.0
    weight[2, 0, 1] = 0.25
    generator = torch.Generator().manual_seed(0)
    response, position, place = drawn_places(weight, 4000, generator)
    assert response.tolist() == [0] * 4000 + [2] * 4000
    counts = torch.zeros_like(weight).index_put((response, position, place), torch.ones(8000), accumulate=True)
    assert set(map(tuple, counts.nonzero().tolist())) == set(map(tuple, weight.nonzero().tolist()))
    assert counts[0, 3, 0] == pytest.approx(2000, abs=160) and counts[0, 1, 2] == pytest.approx(1000, abs=140)
    many = torch.ones(1, 1, 1).expand(1, 2**9, 2**15 + 1)
    response, position, place = drawn_places(many, 8, generator)
    assert response.tolist() == [0] * 8 and len(set(position.tolist())) > 1 and len(set(place.tolist())) > 1
    assert not len(drawn_places(weight[1:2], 4, generator)[0])


def test_batches_change_nothing(monkeypatch):
    """Nor do passes of fewer sequences than a response has swaps, of which none has more than was asked for."""
    policy = tiny_policy()
    reward, sizes = tiny_reward(policy), []
    one = check(reward, policy)
    passes = gradient_check.frozen_passes
    monkeypatch.setattr(gradient_check, "frozen_passes", lambda *args: (sizes.append(len(args[2])), passes(*args))[1])
    config = replace(CONFIG, evaluation=EvaluationConfig(batch_size=3))
    other = check(reward, policy, config)
    assert max(sizes) == 3
    for a, b in zip(one.rows, other.rows, strict=True):
        assert a.pearson.value == pytest.approx(b.pearson.value, abs=1e-3) and a.swaps == b.swaps


def test_functions_beside_a_reward_are_left_out_and_not_called():
    def never(completions):
        raise AssertionError

    policy = tiny_policy()
    reward = OfEmbeddings(policy)
    function = FunctionReward(never, policy.tokenizer)
    summed = WeightedReward([Term(reward, "head", weight=2.0), Term(function, "never")])
    assert rows_of(check(summed, policy))["policy", "whole"].slope.value == pytest.approx(1, abs=1e-4)
    assert check(summed, policy).verdict.endswith("Left out, as without a gradient: never.")
    with pytest.raises(GradeError, match="has the weight 0"):
        check(WeightedReward([Term(reward, "head", weight=0.0), Term(function, "never")]), policy)


class Length(RewardFunction):
    raises = "the length"

    def score(self, rollout):
        return rollout.mask.sum(1).float()


class Deaf(OfEmbeddings):
    def value(self, rollout, base, fed=(), *, activation_checkpointing=False):
        return rollout.mask.sum(1).float()


def test_what_cannot_be_checked_is_refused():
    policy = tiny_policy()
    with pytest.raises(GradeError, match="the length has no gradient.*ppo, reinforce, grpo"):
        check(Length(), policy)
    with pytest.raises(GradeError, match="Deaf depends on no embedding"):
        check(Deaf(policy), policy)
    with pytest.raises(GradeError, match="responses is 3: .* at least 8"):
        check_gradient(policy, OfEmbeddings(policy), PROMPTS, CONFIG, responses=3)
    with pytest.raises(GradeError, match="swaps is 0"):
        check_gradient(policy, OfEmbeddings(policy), PROMPTS, CONFIG, swaps=0)
    single = replace(CONFIG, generation=replace(CONFIG.generation, top_k=1))
    with pytest.raises(GradeError, match=r"nothing to swap\. Raise generation\.top_k"):
        check(OfEmbeddings(policy), policy, single)


def test_a_reward_that_no_swap_changes():
    policy = tiny_policy()
    found = check(OfEmbeddings(policy, lambda x: 0 * x), policy)
    assert found.verdict.startswith("No swap of a token changed the reward")
    assert rows_of(found)["policy", "whole"].pearson.value is None


def some_swaps(true_of, responses=40, each=6, seed=0):
    random = np.random.default_rng(seed)
    predicted = random.normal(size=responses * each)
    response = np.repeat(np.arange(responses), each)
    return Swaps(response, np.tile(np.arange(3), responses * each // 3), predicted, true_of(predicted, random))


def said_of(true_of, **options):
    return verdict(agreements("policy", some_swaps(true_of, **options)))


def test_verdicts_follow_the_interval_of_the_correlation():
    noise = 0.1
    assert said_of(lambda p, r: p + noise * r.normal(size=p.shape)).startswith("GRADE can follow this reward")
    assert said_of(lambda p, r: r.normal(size=p.shape)).startswith("Nothing shows that GRADE can follow this reward")
    assert said_of(lambda p, r: -p).startswith("GRADE would work against this reward")
    assert said_of(lambda p, r: 0.3 * p + r.normal(size=p.shape)).startswith("GRADE follows this reward poorly")
    assert said_of(lambda p, r: 0.6 * p + r.normal(size=p.shape)).startswith("GRADE follows this reward in part")
    half = said_of(lambda p, r: 0.5 * p + 0.01 * r.normal(size=p.shape))
    assert half.endswith(" On average a swap does 0.50 (0.50 to 0.50) of what is predicted.")
    assert said_of(lambda p, r: p, responses=2).startswith("2 responses with swaps are too few")
    assert "the same for every swap" in verdict(
        agreements("policy", replace(some_swaps(lambda p, r: p), predicted=np.zeros(240)))
    )


def test_statistics_are_scipys_and_intervals_know_that_swaps_of_a_response_go_together():
    def shared(p, r):  # what is not predicted is the same in all swaps of a response
        return 0.5 * p + np.repeat(r.normal(size=40), 6)

    swaps = some_swaps(shared)
    row = agreements("policy", swaps)[0]
    assert row.pearson.value == pytest.approx(stats.pearsonr(swaps.predicted, swaps.true).statistic)
    assert row.spearman.value == pytest.approx(stats.spearmanr(swaps.predicted, swaps.true).statistic)
    assert row.slope.value == pytest.approx(np.linalg.lstsq(swaps.predicted[:, None], swaps.true, rcond=None)[0][0])
    low, high = row.pearson.interval
    assert -1 < low < row.pearson.value < high < 1
    # Ten copies of every swap are no further responses, and make nothing surer.
    copied = Swaps(*(np.tile(x, 10) for x in (swaps.response, swaps.third, swaps.predicted, swaps.true)))
    again = agreements("policy", copied)[0]
    assert again.slope.stderr == pytest.approx(row.slope.stderr) and again.pearson.interval == pytest.approx(
        (low, high)
    )


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Over 100 samples, a slope of 0.5 and its correlation."""
    true_correlation, held = 0.5 / (0.25 + 1.0) ** 0.5, np.zeros(2)
    for seed in range(100):
        row = agreements("policy", some_swaps(lambda p, r: 0.5 * p + r.normal(size=p.shape), 20, 3, seed))[0]
        for i, (measured, truth) in enumerate(((row.slope, 0.5), (row.pearson, true_correlation))):
            held[i] += measured.interval[0] < truth < measured.interval[1]
    assert (held > 84).all()  # four standard deviations below 94


def test_from_python(tiny_model):
    trainer = GradeTrainer(
        str(tiny_model), OfEmbeddings, ["I saw this film", "It is"], config=replace(CONFIG, device="cpu")
    )
    found = trainer.check_gradient(responses=8, swaps=2)
    assert "can follow" in found.verdict and "| by the policy's probability | whole | 16 |" in str(found)


def test_the_command_prints_and_writes(tiny_config, capsys):
    found = check_reward_gradient(tiny_config)
    out = " ".join(capsys.readouterr().out.split())
    assert "Predicted and true effects" in out and found.verdict in out
    written = json.loads((Path(tiny_config.output_dir) / "gradient-check-tiny.json").read_text())
    assert written["verdict"] == found.verdict and written["rows"][0]["pearson"]["value"] == found.rows[0].pearson.value


def test_the_command_refuses_a_reward_without_a_gradient(capsys):
    assert main(["reward", "countdown_small", "--check_gradient"]) == 2
    assert "this task's reward is a program, without a gradient" in " ".join(capsys.readouterr().err.split())
