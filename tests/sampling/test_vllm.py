"""Responses from a vLLM server: on policy, through its failures, and refused where they are not what was asked for."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stand_in_vllm import StandIn
from tiny_run import adapter_of, changed, shared_output, tiny_config, tiny_data, tiny_model, trainer_of  # noqa: F401

from grade.config import validate
from grade.errors import GradeError, RolloutFailed
from grade.model.checkpoint import load_state
from grade.model.loading import load_policy, load_tokenizer
from grade.processes import make_accelerator
from grade.sampling import engine
from grade.sampling.engine import Sampled
from grade.sampling.mismatch import importance_weights
from grade.seeds import derived_seed
from grade.training.run_folder import prepare_run_dir
from grade.training.trainer import Trainer

SERVED = {"engine": "vllm", "url": "http://127.0.0.1:1"}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(engine, "FIRST_PAUSE", 0.01)


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


def begun(config):
    return Trainer(config, make_accelerator(config), prepare_run_dir(config))


def fitted(config, **settings):
    """The trainer of a finished run, and the metrics of its steps."""
    config = changed(config, **settings)
    validate(config)
    trainer = begun(config)
    trainer.fit()
    rows = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    return trainer, [row for row in rows if "loss" in row]


def version_of(name):
    """The step in a version's name."""
    return int(name.rpartition("-")[2])


@pytest.mark.parametrize("mode", ["raw", "processed"])
def test_every_step_is_sampled_by_the_policy_as_it_is(config, server, mode):
    """The server's adapter is that of the step: its probabilities are the policy's, which move far in between."""
    server.mode = mode
    trainer, rows = fitted(config)
    steps = [version_of(name) for name, _, _ in server.asked]
    assert steps == [0] * 4 + [0] * 4 + [1] * 4 + [2] * 4  # of the first four nothing is learnt: they are compared
    for row in rows:
        assert row["rollout/logprob_difference_max"] < 1e-4 and row["rollout/lag"] == 0 and row["off_support"] == 0
    assert (adapter_of(trainer.policy) - adapter_of(begun(changed(config, train={"run_dir": "x"})).policy)).norm() > 0.1
    assert not server.loaded and not (Path(config.run_dir) / "rollout").exists()
    assert len({seed for _, _, seed in server.asked}) == 12  # the four that are compared have the seeds of step 0


def test_what_is_asked_for_is_what_the_settings_say(config, server):
    fitted(config, train={"steps": 1})
    body = server.bodies[0]
    assert body["temperature"] == body["top_p"] == body["repetition_penalty"] == 1.0 and body["min_p"] == 0.0
    assert body["top_k"] == 32 and body["max_tokens"] == 8 and body["min_tokens"] == 1  # min_new_tokens 2, with its end
    assert body["stop_token_ids"] == server.policy.eos_ids.tolist() and not body["ignore_eos"]
    server.bodies.clear()
    fitted(config, train={"steps": 1, "overwrite": True}, generation={"ignore_eos": True})
    assert server.bodies[0]["ignore_eos"] and server.bodies[0]["stop_token_ids"] == []
    assert server.bodies[0]["min_tokens"] == 0


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


SURVIVED = {
    "fails": ["500", "500"],
    "drops the connection": ["", "drop"],
    "breaks off an answer": ["torn"],
    "starts anew and has lost its adapters": ["", "forget"],
}


@pytest.fixture
def smooth(config, tmp_path):
    """The adapter after three steps without trouble."""
    return adapter_of(fitted(changed(config, train={"run_dir": str(tmp_path / "smooth")}))[0].policy)


def test_troubles_that_pass_change_nothing(config, server, smooth):
    for number, faults in enumerate(SURVIVED.values()):
        server.faults.extend(faults)
        trainer, _ = fitted(changed(config, train={"run_dir": f"{config.train.run_dir}{number}"}))
        assert not server.faults
        assert torch.equal(adapter_of(trainer.policy), smooth), faults


def test_a_server_that_is_started_again_is_waited_for(config, server, smooth, capfd):
    """It goes away in step 1, for longer than retries would last, and comes back without adapters."""
    gone = []

    def goes(path):
        if not gone and len(server.asked) == 10:
            gone.append(True)
            threading.Thread(target=away, daemon=True).start()
            time.sleep(0.2)

    def away():
        server.stop()
        time.sleep(0.6)
        server.start()

    server.before = goes
    trainer, _ = fitted(config, rollout={"retries": 3})
    assert gone and torch.equal(adapter_of(trainer.policy), smooth)
    assert "It is waited for, up to 20 seconds" in capfd.readouterr().err


@pytest.mark.parametrize("max_lag", [0, 1])
def test_a_server_that_stays_away_costs_no_step(config, server, tmp_path, max_lag):
    """The steps before are saved, and the run goes on from them once the server is back."""
    reference = changed(config, rollout={"max_lag": max_lag}, train={"run_dir": str(tmp_path / "reference")})
    whole = adapter_of(fitted(reference)[0].policy)
    config = changed(config, rollout={"timeout": 1.0, "retries": 2, "max_lag": max_lag})
    trainer = begun(config)
    step = trainer.train_step

    def without_server():
        if trainer.step == 2:
            server.stop()
            if trainer.engine._ahead is not None:  # what was asked for before has come
                trainer.engine._ahead[1].end()
                trainer.engine._ahead = None
        return step()

    trainer.train_step = without_server
    with pytest.raises(RolloutFailed, match=r"rollout.url=.*: (no answer in rollout.timeout=1|it cannot be).*Kept .*2"):
        trainer.fit()
    assert load_state(Path(config.run_dir) / "checkpoints" / "last")["step"] == 2
    server.start()
    resumed, rows = fitted(config, train={"resume": True}, rollout={"timeout": 20.0})
    assert rows[-1]["rollout/lag"] == 0  # the first step of a session samples anew
    assert torch.equal(adapter_of(resumed.policy), whole) == (max_lag == 0)


def test_one_step_of_lag(config, server):
    """Each step learns from what the step before's adapter sampled, but the first, and nothing is asked in vain."""
    _, rows = fitted(config, rollout={"max_lag": 1}, train={"steps": 4})
    versions = [version_of(name) for name, _, _ in server.asked[4:]]
    assert versions == [0] * 4 + [0] * 4 + [1] * 4 + [2] * 4
    assert [row["rollout/lag"] for row in rows] == [0, 1, 1, 1]
    assert rows[0]["rollout/logprob_difference_max"] < 1e-4 < rows[1]["rollout/logprob_difference_max"]
    assert not server.loaded


REFUSED = {
    "stale": "it answered as 'grade-another-3' and not as 'grade-.*another policy's responses are not trained on",
    "no choices": "gave 0 choices where one was asked for",
    "two choices": "gave 2 choices where one was asked for",
    "another prompt": "it continued another prompt than the",
    "no ids": "its answer has no token ids. Use vLLM 0.10.2 or newer",
    "unknown id": "has the id 1000000, which the tokenizer of model.name does not know",
    "cut": "stops after 1 tokens without an end, before generation.max_new_tokens=8",
    "no logprobs": "tokens without their log-probabilities",
    "infinite": "tokens without their log-probabilities",
    "html": "gave no JSON object but '<html>a page</html>'",
}


def test_answers_that_are_not_what_was_asked_for_are_refused(config, server):
    for number, (fault, message) in enumerate(REFUSED.items()):
        server.faults.clear()
        server.faults.append(fault)
        with pytest.raises(RolloutFailed, match=f"rollout.url={server.url}: .*{message}"):
            fitted(changed(config, train={"run_dir": f"{config.train.run_dir}{number}"}))


def test_retries_and_waiting_have_an_end(config, server):
    server.faults.extend(["500"] * 100)
    with pytest.raises(RolloutFailed, match="it answered HTTP 500: EngineCore encountered an issue.*failed 3 times"):
        fitted(config, rollout={"retries": 2})
    server.faults.clear()
    server.faults.extend(["slow"] * 100)
    began = time.monotonic()
    with pytest.raises(RolloutFailed, match="rollout.timeout=0.3 seconds|gave no answer in 0.3 seconds"):
        fitted(config, rollout={"timeout": 0.3, "retries": 0}, train={"run_dir": config.train.run_dir + "slow"})
    assert time.monotonic() - began < 10


def test_a_version_that_is_too_old_is_never_trained_on(config, server):
    trainer = begun(config)
    trainer.engine.engine.complete = lambda version, request: Sampled(request.prompt, [5] * 8, [-1.0] * 8, -1)
    with pytest.raises(RolloutFailed, match="sampled by the adapter of step -1, and step 0 learns from adapters of 0"):
        trainer.train_step()


def test_a_server_is_looked_at_before_anything_is_loaded(config, server, monkeypatch):
    def nothing_is_loaded(*arguments, **options):
        raise AssertionError

    monkeypatch.setattr("grade.training.trainer.set_up", nothing_is_loaded)
    server.context = 19
    with pytest.raises(GradeError, match=r"its context is 19 tokens, and prompt and response may have 20.*--max-model-len"):
        begun(config)
    server.context = 20
    server.key = "secret-of-the-test"
    with pytest.raises(GradeError, match="it refuses the key .*environment variable VLLM_API_KEY") as refusal:
        begun(config)
    assert server.key not in str(refusal.value)
    server.stop()
    with pytest.raises(GradeError, match=r"no vLLM server answers there \(.*vllm serve .* --enable-lora --max-lora-rank 8"):
        begun(config)
    server.start()


def test_the_key_is_sent_and_written_nowhere(config, server, monkeypatch):
    server.key = "secret-of-the-test"
    monkeypatch.setenv("VLLM_API_KEY", server.key)
    fitted(config, train={"steps": 1})
    assert server.asked and all(h["Authorization"] == f"Bearer {server.key}" for h in server.headers)
    written = [path for path in Path(config.run_dir).rglob("*") if path.is_file()]
    assert written and not any(server.key.encode() in path.read_bytes() for path in written)


def test_a_server_without_adapters_or_with_other_weights_is_refused(config, server):
    server.takes_adapters = False
    with pytest.raises(RolloutFailed, match="does not take adapters while it runs .*VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        fitted(config)
    server.takes_adapters = True
    with pytest.raises(RolloutFailed, match="finds no adapter in /elsewhere/grade-.*rollout.server_adapter_dir"):
        fitted(changed(config, rollout={"server_adapter_dir": "/elsewhere"}, train={"overwrite": True}))
    server.mode = "logits"
    with pytest.raises(RolloutFailed, match="other weights than the policy, or reports something else than log-"):
        fitted(changed(config, train={"overwrite": True}))
    server.mode = "raw"
    with torch.no_grad():
        server.policy.causal_lm.model.norm.weight.mul_(3.0)
    with pytest.raises(RolloutFailed, match="other weights than the policy"):
        fitted(changed(config, train={"overwrite": True}))


def test_a_difference_is_warned_of(config, server, capfd):
    server.offset = -0.3
    fitted(config, rollout={"max_logprob_difference": 0.31})
    assert "differs by" not in capfd.readouterr().err
    _, rows = fitted(config, rollout={"max_logprob_difference": 0.4}, train={"overwrite": True})
    assert rows[0]["rollout/logprob_difference_mean"] == pytest.approx(0.3, abs=1e-4)


def test_what_an_earlier_session_left_is_cleared_away(config, server):
    """A server that was used by a killed run forgets its adapters, and nobody else's."""
    fitted(config, train={"steps": 1})
    prefix = server.asked[0][0].rpartition("-")[0].rpartition("-")[0]
    server.loaded |= {f"{prefix}-0123-7": {}, "grade-somebody-0123-7": {}}
    (Path(config.run_dir) / "rollout" / f"{prefix}-0123-7").mkdir(parents=True)
    fitted(config, train={"resume": True, "steps": 2})
    assert list(server.loaded) == ["grade-somebody-0123-7"]
    assert not (Path(config.run_dir) / "rollout").exists()


def test_a_stop_is_heard_while_the_server_is_slow(config, server):
    asked = []

    def slow(path):
        if path == "/v1/completions" and len(server.asked) >= 8 and not asked:
            asked.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGTERM)
        if asked and path == "/v1/completions":
            time.sleep(3)

    server.before = slow
    trainer = begun(config)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert time.monotonic() - asked[0] < 3
    assert load_state(Path(config.run_dir) / "checkpoints" / "last")["step"] == 1


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
    for number, cap in enumerate((None, 1.5, 4.0)):
        run = {"train": {"steps": 1, "run_dir": f"{config.train.run_dir}{number}"}}
        settings = {"rollout": {"importance_cap": cap, "max_logprob_difference": 1.0}}
        _, rows = fitted(config, **changes, **copies, **run, **settings)
        norms.append(rows[0]["grad_norm"])
        if cap is not None:
            assert rows[0]["rollout/importance_mean"] == pytest.approx(min(cap, 2.0), rel=1e-4)
            assert rows[0]["rollout/importance_capped"] == float(cap < 2)
    assert norms[0] > 0
    assert [norm / norms[0] for norm in norms] == pytest.approx([1.0, 1.5, 2.0], rel=1e-3)


# --- settings ----------------------------------------------------------------------------------------------

WRONG = {
    "no address": ({"rollout": {"engine": "vllm"}}, "needs the server's address: set rollout.url"),
    "no scheme": ({"rollout": {**SERVED, "url": "127.0.0.1:8000"}}, "rollout.url is 127.0.0.1:8000: it must be like"),
    "a port": ({"rollout": {**SERVED, "url": "http://host:99999"}}, "rollout.url is http://host:99999: it must be like"),
    "a key": ({"rollout": {**SERVED, "url": "http://me:secret@host"}}, "into the environment variable VLLM_API_KEY"),
    "two sources": ({"rollout": {**SERVED, "source": "ids"}}, "rollout.engine=vllm and rollout.source=ids exclude"),
    "compiled": ({"rollout": {**SERVED, "compile": True}}, "and rollout.compile=True exclude each other"),
    "whole models": (
        {"rollout": SERVED, "model": {"finetuning": "full"}, "method": {"estimator": "rao"}},
        "model.finetuning=full exclude each other: the server is sent an adapter",
    ),
    "soft tokens": ({"rollout": SERVED, "method": {"name": "grade"}}, "rollout.engine gives token ids, but method.name=grade"),
    "the noise": ({"rollout": SERVED}, "rollout.engine gives token ids, but .*estimator=gumbel needs the noise"),
    "weights of nothing": (
        {"rollout": {**SERVED, "importance_cap": 2.0}, "method": {"estimator": "rao"}},
        "rollout.importance_cap weights the loss of policy gradients",
    ),
    "lag here": ({"rollout": {"max_lag": 1}}, "rollout.max_lag is 1, but rollout.engine is here"),
    "weights here": ({"rollout": {"importance_cap": 2.0}}, "rollout.importance_cap is 2.0, but rollout.engine is here"),
}


@pytest.mark.parametrize("case", WRONG)
def test_settings_that_cannot_work_are_refused(tiny_config, case):  # noqa: F811
    settings, message = WRONG[case]
    with pytest.raises(GradeError, match=message) as refusal:
        validate(changed(tiny_config, **settings))
    assert "secret" not in str(refusal.value)


def test_a_policy_gradient_and_the_other_rules_are_taken(tiny_config):  # noqa: F811
    for method in ({"estimator": "rao"}, {"estimator": "straight_through"}, {"name": "ppo"}, {"name": "reinforce"}):
        validate(changed(tiny_config, rollout=SERVED, method=method))
    validate(replace(tiny_config))
