"""A step that runs out of memory is tried again in smaller parts, and ends as one that had them from the start."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from in_processes import without_launcher
from tiny_run import adapter_of, changed, trainer_of

import grade.methods.grade
import grade.training.responses
from grade.config import RewardConfig
from grade.config.reading import config_to_yaml
from grade.errors import GradeError
from grade.methods.policy_gradient import PolicyGradient

ONE_PASS = {"ppo": {"epochs": 1, "minibatches": 1}, "grpo": {"epochs": 1, "minibatches": 1}}


def settings(tiny_config, method, together, parts, **own):
    """A step of eight responses, two of each prompt."""
    return changed(
        tiny_config,
        generation={"samples_per_prompt": 2},
        method={"name": method, **{name: own or given for name, given in ONE_PASS.items()}},
        train={"batch_size": together, "accumulation_steps": parts},
    )


def two_steps(trainer):
    """The metrics of two steps without times and memory, and the weights behind them."""
    rows = []
    for _ in range(2):
        rows.append(trainer.train_step())
        trainer.step += 1
    timeless = [{k: v for k, v in r.items() if not k.startswith(("seconds", "tokens_per", "memory"))} for r in rows]
    return timeless, adapter_of(trainer.policy)


@pytest.fixture
def running_out(monkeypatch):
    """running_out(largest): training passes of more than `largest` responses fail, but for the first one, which adds to
    the gradients. Returns the sizes of all."""

    def apply(largest, seen=None):
        seen = [] if seen is None else seen
        replay, terms = grade.methods.grade.replay, PolicyGradient.terms

        def failing(rollout):
            seen.append(len(rollout))
            if len(rollout) > largest and len(seen) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

        def failing_replay(policy, reward, rollout, *rest, **named):
            failing(rollout)
            return replay(policy, reward, rollout, *rest, **named)

        def failing_terms(self, scored, *rest, **named):
            if torch.is_grad_enabled():
                failing(scored.rollout)
            return terms(self, scored, *rest, **named)

        monkeypatch.setattr(grade.methods.grade, "replay", failing_replay)
        monkeypatch.setattr(PolicyGradient, "terms", failing_terms)
        return seen

    return apply


@pytest.mark.parametrize("method", ["grade-ste", "reinforce"])
def test_the_result_is_that_of_smaller_micro_batches(tiny_config, running_out, method, capsys):
    expected, weights = two_steps(trainer_of(settings(tiny_config, method, 2, 4)))
    trainer = trainer_of(settings(tiny_config, method, 4, 2))
    seen = running_out(2)
    capsys.readouterr()
    found, ours = two_steps(trainer)
    assert found == expected and torch.equal(ours, weights)
    assert seen == [4, 4, *8 * [2]]  # the second step begins where the first has ended
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("out of memory in step 0") == 1
    assert "micro-batches of 2 instead of 4 (train.batch_size). The result is the same but for rounding." in said


def test_the_same_responses_share_a_mini_batch(tiny_config, running_out):
    """Two passes of PPO over mini-batches of two micro-batches each, of which the parts stay together. AdamW divides by
    a gradient's own size, so that weights of small gradients move by their rounding."""
    own = dict(epochs=2, minibatches=2)
    expected, weights = two_steps(trainer_of(settings(tiny_config, "ppo", 2, 4, **own)))
    trainer = trainer_of(settings(tiny_config, "ppo", 2, 4, **own))
    seen = running_out(1)
    found, ours = two_steps(trainer)
    assert seen == [2, 2, *32 * [1]]
    assert (ours - weights).abs().max() < 1e-4  # of eight updates, which move a weight by 1e-3 each
    for row, other in zip(found, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_sampling_that_runs_out_goes_on_with_fewer_together(tiny_config, monkeypatch, capsys):
    expected, weights = two_steps(
        trainer_of(changed(settings(tiny_config, "grpo", 4, 2), generation={"batch_size": 4}))
    )
    trainer, sample, seen = trainer_of(settings(tiny_config, "grpo", 4, 2)), grade.training.responses.sample, []

    def failing(policy, ids, *rest, samples_per_prompt, **named):
        seen.append(len(ids) * samples_per_prompt)
        if seen[-1] > 4:
            raise MemoryError
        return sample(policy, ids, *rest, samples_per_prompt=samples_per_prompt, **named)

    monkeypatch.setattr(grade.training.responses, "sample", failing)
    found, ours = two_steps(trainer)
    assert found == expected and torch.equal(ours, weights) and seen == [8, 4, 4, 4, 4]
    said = " ".join(capsys.readouterr().err.split())
    assert "in sampling in step 0" in said and "4 responses at a time instead of 8 (generation.batch_size)" in said


def test_after_an_update_a_step_is_not_repeated(tiny_config, running_out):
    """The second pass of PPO runs out: its first update has been taken."""
    trainer = trainer_of(settings(tiny_config, "ppo", 4, 2, epochs=2, minibatches=1))
    update, seen = trainer.optimization.update, []

    def update_and_run_out():
        update()
        running_out(0, seen)

    trainer.optimization.update = update_and_run_out
    with pytest.raises(GradeError, match="out of memory in step 0.*CUDA out of memory"):
        trainer.train_step()
    assert seen == [4, 4]


def test_one_response_that_does_not_fit_ends_the_run_in_words(tiny_config, running_out):
    trainer = trainer_of(settings(tiny_config, "grade-ste", 4, 2))
    seen = running_out(0)
    with pytest.raises(GradeError, match="^out of memory in step 0, where trials had needed") as caught:
        trainer.train_step()
    assert seen == [4, 4, 2, 1] and "train.batch_size" not in str(caught.value)


def test_dropout_that_follows_from_micro_batches_is_not_repeated(tiny_config, running_out):
    config = settings(tiny_config, "grade-ste", 4, 2)
    trainer = trainer_of(changed(config, method={"replay_dropout": True}))
    seen = running_out(2)
    with pytest.raises(GradeError, match="out of memory in step 0.*train.batch_size below 4"):
        trainer.train_step()
    assert seen == [4, 4]


def test_functions_of_the_reward_are_asked_once(tiny_config, running_out, tmp_path):
    (tmp_path / "length.py").write_text(
        f"def length(completions):\n    open({str(tmp_path / 'calls')!r}, 'a').write('x')\n"
        "    return [float(len(c)) for c in completions]\n"
    )
    config = settings(tiny_config, "reinforce", 4, 2)
    trainer = trainer_of(replace(config, reward=RewardConfig(function=f"{tmp_path}/length.py:length")))
    before = len((tmp_path / "calls").read_text()) if (tmp_path / "calls").exists() else 0
    running_out(1)
    trainer.train_step()
    assert len((tmp_path / "calls").read_text()) == before + 1


PROGRAM = """
import os, sys, torch
import grade.replay.replay
from dataclasses import replace
from pathlib import Path
from grade.config.reading import config_from_yaml
from grade.processes import make_accelerator
from grade.training.trainer import Trainer

config, solve_hops, weights = config_from_yaml(sys.argv[1]), grade.replay.replay.solve_hops, []
for together, parts in ((2, 1), (1, 2)):
    trainer = Trainer(
        replace(config, train=replace(config.train, batch_size=together, accumulation_steps=parts)),
        make_accelerator(config),
        Path(config.run_dir),
    )
    calls = []

    def failing(*arguments):
        calls.append(1)
        if together == 2 and os.environ["RANK"] == "1" and len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")  # while the other one asks for a further hop
        return solve_hops(*arguments)

    grade.replay.replay.solve_hops = failing
    trainer.train_step()
    trainer.step = 1
    trainer.train_step()
    weights.append(torch.cat([p.detach().flatten() for p in trainer.policy.parameters()]))
    print(len(calls), flush=True)
    grade.replay.replay.solve_hops = solve_hops
sys.exit(0 if torch.equal(*weights) and weights[0].abs().sum() > 0 else 1)
"""


@pytest.mark.slow
def test_processes_try_again_together(tiny_config, tmp_path):
    """One runs out between two hops, at which the other waits for it; both end as with smaller micro-batches."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "config.yaml").write_text(config_to_yaml(tiny_config))
    said = without_launcher(tmp_path / "config.yaml", program=tmp_path / "program.py", timeout=300)
    assert [code for code, _, _ in said] == [0, 0], said
    # The first try, twice two micro-batches of one response; and those alone.
    assert [out.split() for _, out, _ in said] == [["5", "4"], ["5", "4"]]
    assert said[0][2].count("micro-batches of 1 instead of 2") == 1 and "out of memory" not in said[1][2]
