"""Runs whose responses a vLLM server samples: on policy, with lag, weighted, and resumed after it was away."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from in_processes import without_launcher
from peft import get_peft_model_state_dict, load_peft_weights
from served import begun, fitted, short_pauses, version_of  # noqa: F401
from stand_in_vllm import StandIn
from tiny_run import adapter_of, changed, shared_output, tiny_config, tiny_data, tiny_model, trainer_of  # noqa: F401

from grade.config.reading import config_to_yaml
from grade.errors import GradeError, RolloutFailed
from grade.model.checkpoint import load_state
from grade.model.loading import load_policy, load_tokenizer
from grade.sampling.mismatch import importance_weights
from grade.seeds import derived_seed


@pytest.fixture
def server(tiny_config):  # noqa: F811
    found = StandIn(load_policy(tiny_config, load_tokenizer(tiny_config.model), torch.device("cpu")))
    yield found
    found.stop()


@pytest.fixture
def config(tiny_config, server):  # noqa: F811
    """Three steps without evaluations, at a rate at which a step shows in the probabilities."""
    return changed(
        tiny_config,
        method={"estimator": "rao", "rao_samples": 4},
        train={"steps": 3, "learning_rate": 0.02, "save_every": 1000},
        evaluation={"every": 3, "validation_prompts": 4, "test_prompts": 0},
        rollout={"engine": "vllm", "url": server.url, "timeout": 20.0},
    )


def test_every_step_is_sampled_by_the_policy_as_it_is(config, server):
    """The server's adapter is that of the step: its probabilities are the policy's, which move far in between."""
    trainer, rows = fitted(config)
    steps = [version_of(name) for name, _, _ in server.asked]
    assert steps == [0] * 4 + [0] * 4 + [1] * 4 + [2] * 4  # of the first four nothing is learnt: they are compared
    for row in rows:
        assert row["rollout/logprob_difference_max"] < 1e-4 and row["rollout/lag"] == 0 and row["off_support"] == 0
    assert rows[2]["kl"] > 0.05
    assert not server.loaded and not (Path(config.run_dir) / "rollout").exists()
    assert len({seed for _, _, seed in server.asked}) == 12  # the four that are compared have the seeds of step 0


def test_the_update_is_that_of_the_same_responses_from_a_file(config, server, tmp_path):
    trainer, _ = fitted(config, train={"steps": 1})
    seeds = [derived_seed(config.seed, 0, response) for response in range(4)]
    lines = [{"prompt": server.answers[seed][0], "response": server.answers[seed][1]} for seed in seeds]
    path = tmp_path / "ids.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    from_file = {"engine": "here", "source": str(path)}
    other = trainer_of(changed(config, rollout=from_file, train={"steps": 1, "run_dir": str(tmp_path / "other")}))
    other.train_step()
    assert torch.equal(adapter_of(trainer.policy), adapter_of(other.policy))


@pytest.mark.parametrize("max_lag", [0, 1])
def test_a_server_that_stays_away_costs_no_step(config, server, tmp_path, max_lag):
    """The steps before are saved, and the run goes on from them once the server is back; on policy as if nothing had
    been, and with lag from responses of another adapter than it would have had."""
    reference = changed(config, rollout={"max_lag": max_lag}, train={"run_dir": str(tmp_path / "reference")})
    trainer, rows = fitted(reference)
    steps = [version_of(name) for name, _, _ in server.asked[4:]]
    assert steps == [0] * 4 + [max(1 - max_lag, 0)] * 4 + [2 - max_lag] * 4
    assert [row["rollout/lag"] for row in rows] == [0, max_lag, max_lag]
    if max_lag:  # the policy has moved since
        assert rows[0]["rollout/logprob_difference_max"] < 1e-4 < rows[1]["rollout/logprob_difference_max"]
    whole = adapter_of(trainer.policy)
    config = changed(config, rollout={"timeout": 1.0, "retries": 2, "max_lag": max_lag})
    trainer = begun(config)
    sampled = trainer.engine.sampled

    def without_server(step, requests):
        if step == 2 - max_lag:  # which, with lag, has its responses, and cannot ask for the next one's
            server.stop()
        return sampled(step, requests)

    trainer.engine.sampled = without_server
    kept = 2 - max_lag
    with pytest.raises(RolloutFailed, match=f"rollout.url=.*no answer in rollout.timeout=1 .*Kept .*step {kept}"):
        trainer.fit()
    assert load_state(Path(config.run_dir) / "checkpoints" / "last")["step"] == kept
    server.start()
    resumed, rows = fitted(config, train={"resume": True}, rollout={"timeout": 20.0})
    assert rows[kept]["rollout/lag"] == 0  # the first step of a session samples anew
    assert torch.equal(adapter_of(resumed.policy), whole) == (max_lag == 0)
    assert not server.loaded


def test_a_server_is_looked_at_before_anything_is_loaded(config, server, monkeypatch):
    def nothing_is_loaded(*arguments, **options):
        raise AssertionError

    monkeypatch.setattr("grade.training.trainer.set_up", nothing_is_loaded)
    server.context = 19
    with pytest.raises(GradeError, match=r"its context is 19 tokens, .* may have 20.*--max-model-len 20"):
        begun(config)
    server.stop()
    with pytest.raises(GradeError, match=r"no vLLM server answers there \(.*vllm serve .* --max-lora-rank 8"):
        begun(config)
    server.start()


# --- importance weights ------------------------------------------------------------------------------------


def test_importance_weights_are_truncated_ratios():
    ratio = torch.tensor([[0.25, 1.0, 2.0, 8.0]], dtype=torch.float64)
    weights = importance_weights(ratio.log(), 2.0)
    torch.testing.assert_close(weights, torch.tensor([[0.25, 1.0, 2.0, 2.0]]))


@pytest.mark.parametrize("name", ["reinforce", "ppo", "grpo"])
def test_policy_gradients_are_weighted(config, server, name):
    """A server that reports half of every probability: the ratio is 2, which the cap makes 1.5; without the other
    terms of the objective so is the gradient of the first update."""
    server.offset = -0.6931471805599453
    sections = {
        "ppo": {"epochs": 1, "minibatches": 1, "value_coef": 0.0, "entropy_coef": 0.0},
        "reinforce": {"baseline": "none"},
    }
    changes = {"method": {"name": name, "kl_coef": 0.0, **({name: sections[name]} if name in sections else {})}}
    copies = {"generation": {"samples_per_prompt": 2}}
    norms = []
    for cap in (None, 1.5, 4.0):
        metrics = trainer_of(changed(config, **changes, **copies, rollout={"importance_cap": cap})).train_step()
        norms.append(metrics["grad_norm"])
        if cap is not None:
            assert metrics["rollout/importance_mean"] == pytest.approx(min(cap, 2.0), rel=1e-4)
            assert metrics["rollout/importance_capped"] == float(cap < 2)
    assert norms[0] > 0
    assert [norm / norms[0] for norm in norms] == pytest.approx([1.0, 1.5, 2.0], rel=1e-3)


@pytest.mark.slow
def test_two_processes_ask_for_a_share_each(config, server, tmp_path):
    """They take the steps of one process with twice the batch, from the same requests. In the third one of them is
    given what it did not ask for: both end, and what was done is saved."""
    one = fitted(changed(config, train={"run_dir": str(tmp_path / "one"), "steps": 2}))[0].policy
    asked = {(prompt, seed) for _, prompt, seed in server.asked}
    server.asked.clear()
    server.faults.extend([""] * 16 + ["stale"])  # each process compares four, and has two a step
    settings = tmp_path / "two.yaml"
    settings.write_text(config_to_yaml(changed(config, train={"batch_size": 2, "run_dir": str(tmp_path / "two")})))
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, grade.cli\ngrade.cli._PATIENCE = 0.1\nsys.exit(grade.cli.main(['train', sys.argv[1]]))\n"
    )
    done = without_launcher(settings, program=program, cwd=tmp_path, timeout=200)
    assert all(code != 0 for code, _, _ in done), done
    assert any("another policy's responses are not trained on" in errors for _, _, errors in done), done
    assert {(prompt, seed) for name, prompt, seed in server.asked if version_of(name) < 2} == asked
    last = tmp_path / "two" / "checkpoints" / "last"
    assert load_state(last)["step"] == 2 and not server.loaded
    weights = load_peft_weights(str(last))
    for name, weight in get_peft_model_state_dict(one.model).items():  # AdamW magnifies rounding where gradients vanish
        assert (weights[name] - weight).norm() < 1e-3 * weight.norm()
