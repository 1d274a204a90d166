"""Responses from a vLLM server: on policy, through its failures, and refused where they are not what was asked for."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict, load_peft_weights
from stand_in_vllm import StandIn
from tiny_run import (  # noqa: F401
    adapter_of,
    changed,
    make_tiny_config,
    shared_output,
    tiny_config,
    tiny_data,
    tiny_model,
    trainer_of,
)

from grade.config import RolloutConfig, validate
from grade.config.reading import config_to_yaml
from grade.errors import GradeError, RolloutFailed
from grade.model.checkpoint import load_state
from grade.model.loading import load_policy, load_tokenizer
from grade.processes import make_accelerator
from grade.sampling import engine
from grade.sampling.draw import Sampling
from grade.sampling.engine import Forgotten, Request, Sampled, Version
from grade.sampling.engine_rollouts import engine_rollouts
from grade.sampling.http_json import Answer
from grade.sampling.lines import StopAsked
from grade.sampling.mismatch import importance_weights
from grade.sampling.vllm import VllmServer, vllm_server
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


def test_what_is_asked_for_is_what_the_settings_say(policies):
    config, policy, _ = policies
    bodies = []
    for ignore_eos in (False, True):
        generation = replace(config.generation, ignore_eos=ignore_eos)
        server = vllm_server(RolloutConfig(engine="vllm", url="http://127.0.0.1:1/v1"), generation, policy)
        server._server.post = lambda path, body: bodies.append(body) or Answer(404, None, "does not exist")
        with pytest.raises(Forgotten):
            server.complete(Version("grade-1", 1, Path()), Request([5], 7))
    body = bodies[0]
    assert body["model"] == "grade-1" and body["prompt"] == [5] and body["seed"] == 7 and body["n"] == 1
    assert body["temperature"] == body["top_p"] == body["repetition_penalty"] == 1.0 and body["min_p"] == 0.0
    assert body["top_k"] == 32 and body["max_tokens"] == 8 and body["min_tokens"] == 1  # min_new_tokens 2, with its end
    assert body["stop_token_ids"] == policy.eos_ids.tolist() and not body["ignore_eos"]
    assert bodies[1]["ignore_eos"] and bodies[1]["stop_token_ids"] == [] and bodies[1]["min_tokens"] == 0


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


# --- what a server does, without a training step ------------------------------------------------------------


@pytest.fixture(scope="module")
def policies(tiny_model, tiny_data, shared_output, tmp_path_factory):  # noqa: F811
    """The trainer's policy and the server's, with the config of both."""
    config = make_tiny_config(tiny_model, tiny_data, shared_output, tmp_path_factory.mktemp("served"))
    return config, *(load_policy(config, load_tokenizer(config.model), torch.device("cpu")) for _ in range(2))


class Session:
    """The engine of a run, asked for steps of two responses to the same prompts."""

    def __init__(self, policies, folder):
        self.config, self.policy, served = policies
        self.server, self.folder, self.said = StandIn(served), folder, []
        self.stop = False

    def run(self, steps=1, **rollout):
        """The responses of some steps, the policy unchanged in between."""
        settings = RolloutConfig(**{"engine": "vllm", "url": self.server.url, "timeout": 20.0, **rollout})
        config = replace(self.config, rollout=settings, train=replace(self.config.train, steps=steps))
        rollouts = engine_rollouts(config, self.policy, self.folder, make_accelerator(config))
        with rollouts.running(0, PROMPTS, lambda: self.stop, self.said.append) as line:
            self.said.append(line)
            found = [rollouts.sampled(step, requests) for step in range(steps)]
            rollouts.rollout(found[0], SAMPLING, seed=0, first_rows=torch.zeros(2).long(), copies=1)
            self.metrics = rollouts.measures()
        return [[response.tokens for response in step] for step in found]


PROMPTS = [[5, 9, 11], [7, 3]]
SAMPLING = Sampling(max_new_tokens=8, min_new_tokens=2, top_k=32)


def requests(step):
    return [Request(prompt, 100 * step + number) for number, prompt in enumerate(PROMPTS)]


@pytest.fixture
def session(policies, tmp_path):
    found = Session(policies, tmp_path)
    yield found
    with contextlib.suppress(OSError):
        found.server.stop()


SURVIVED = {
    "it fails": (["500", "", "500"], "it answered HTTP 500: EngineCore encountered an issue"),
    "it drops the connection": (["", "", "drop"], "the connection broke"),
    "it breaks off an answer": (["torn"], "the connection broke in the middle of an answer|1 bytes"),
    "it has lost its adapters": (["", "", "", "forget"], "it has lost the adapter, which it is given again"),
}


@pytest.mark.parametrize("case", SURVIVED)
def test_troubles_that_pass_change_nothing(session, case):
    faults, said = SURVIVED[case]
    smooth = session.run(steps=2)
    session.server.faults.extend(faults)
    assert session.run(steps=2) == smooth
    assert not session.server.faults and re.search(f"{said}.*is waited for, up to 20 seconds", " ".join(session.said))


def test_a_server_that_is_started_again_is_waited_for(session):
    """It goes away in step 1, for longer than its retries would last, and comes back without adapters."""
    smooth = session.run(steps=2)
    gone, count = threading.Event(), []

    def away():
        session.server.stop()
        time.sleep(0.5)
        session.server.start()

    def goes(path):
        count.append(path)
        if count.count("/v1/completions") == 6 and not gone.is_set():
            gone.set()
            thread = threading.Thread(target=away, daemon=True)
            thread.start()
            time.sleep(0.2)

    session.server.before = goes
    assert session.run(steps=2, retries=3, concurrency=1) == smooth
    assert gone.is_set() and "it has lost the adapter" in " ".join(session.said)


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


@pytest.mark.parametrize("fault", REFUSED)
def test_answers_that_are_not_what_was_asked_for_are_refused(session, fault):
    session.server.faults.append(fault)
    with pytest.raises(RolloutFailed, match=f"rollout.url={session.server.url}: .*{REFUSED[fault]}"):
        session.run()
    assert not session.server.loaded and not (session.folder / "rollout").exists()


def test_retries_and_waiting_have_an_end(session):
    session.server.faults.extend(["500"] * 100)
    with pytest.raises(RolloutFailed, match="it answered HTTP 500: EngineCore encountered an issue.*failed 3 times"):
        session.run(retries=2)
    session.server.faults.clear()
    session.server.faults.extend(["slow"] * 100)
    began = time.monotonic()
    with pytest.raises(RolloutFailed, match="rollout.timeout=0.3 seconds|gave no answer in 0.3 seconds"):
        session.run(timeout=0.3, retries=0)
    session.server.stop()
    with pytest.raises(
        RolloutFailed, match="no answer in rollout.timeout=0.3 seconds, the last trouble being that it "
    ):
        session.run(timeout=0.3, retries=0)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("max_lag", [0, 1])
def test_an_adapter_that_is_too_old_is_never_trained_on(session, max_lag, monkeypatch):
    def old(self, version, request):
        return Sampled(request.prompt, [5] * 8, [-1.0] * 8, version.step - 2)

    monkeypatch.setattr(VllmServer, "complete", old)
    message = f"sampled by the adapter of step -2, and step 0 learns from adapters of {max_lag} steps before at most"
    with pytest.raises(RolloutFailed, match=message):
        session.run(max_lag=max_lag)


def test_a_server_without_adapters_or_with_other_weights_is_refused(session):
    session.server.takes_adapters = False
    with pytest.raises(RolloutFailed, match="does not take adapters while it runs .*VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        session.run()
    session.server.takes_adapters = True
    with pytest.raises(RolloutFailed, match="finds no adapter in /elsewhere/grade-.*rollout.server_adapter_dir"):
        session.run(server_adapter_dir="/elsewhere")
    session.server.mode = "logits"
    with pytest.raises(RolloutFailed, match="other weights than the policy, or reports something else than log-"):
        session.run()
    session.server.mode = "raw"
    with torch.no_grad():
        session.server.policy.causal_lm.model.norm.weight.mul_(3.0)
    try:
        with pytest.raises(RolloutFailed, match="other weights than the policy"):
            session.run()
    finally:
        with torch.no_grad():
            session.server.policy.causal_lm.model.norm.weight.div_(3.0)


@pytest.mark.parametrize("mode", ["raw", "processed"])
def test_like_is_compared_with_like(session, mode):
    """Whether the server's log-probabilities are of everything or of the candidates is found out."""
    session.server.mode = mode
    session.run()
    assert session.metrics["rollout/logprob_difference_max"] < 1e-4
    assert ("among the candidates" in session.said[-1]) == (mode == "processed")


def test_a_difference_is_warned_of(session):
    session.server.offset = -0.3
    session.run(max_logprob_difference=0.31)
    assert session.metrics["rollout/logprob_difference_mean"] == pytest.approx(0.3, abs=1e-4)
    assert "differs by" not in " ".join(session.said)
    session.server.asked.clear()
    session.server.before = lambda path: setattr(session.server, "offset", -0.5 * (len(session.server.asked) >= 2))
    session.run(max_logprob_difference=0.4)
    assert "log-probability differs by 0.5 nats from the policy's" in session.said[-1]


def test_the_key_is_sent_and_said_nowhere(session, monkeypatch):
    session.server.key = "secret-of-the-test"
    with pytest.raises(RolloutFailed, match="it refuses the key .*environment variable VLLM_API_KEY"):
        session.run()
    monkeypatch.setenv("VLLM_API_KEY", session.server.key)
    session.server.headers.clear()
    session.run()
    assert all(h["Authorization"] == f"Bearer {session.server.key}" for h in session.server.headers)
    session.server.faults.append("html")
    with pytest.raises(RolloutFailed) as refusal:
        session.run()
    assert session.server.key not in f"{refusal.value} {session.said}"


def test_what_an_earlier_session_left_is_cleared_away(session):
    """A server that was used by a killed run forgets its adapters, and nobody else's."""
    session.run()
    prefix = session.server.asked[0][0].rpartition("-")[0].rpartition("-")[0]
    session.server.loaded |= {f"{prefix}-0123-7": {}, "grade-somebody-0123-7": {}}
    (session.folder / "rollout" / f"{prefix}-0123-7").mkdir(parents=True)
    session.run()
    assert list(session.server.loaded) == ["grade-somebody-0123-7"]
    assert not (session.folder / "rollout").exists()


def test_a_stop_is_heard_while_the_server_is_slow(session):
    asked = []

    def slow(path):
        if path == "/v1/completions":
            asked.append(time.monotonic())
            session.stop = len(asked) > 4
            time.sleep(3.0 * session.stop)

    session.server.before = slow
    with pytest.raises(StopAsked):
        session.run(steps=2)
    assert time.monotonic() - asked[4] < 2.5


def test_a_policy_that_goes_back_is_sampled_from_anew(session):
    """A step that is tried again has its responses already; one that is made again after a rollback is asked for."""
    settings = RolloutConfig(engine="vllm", url=session.server.url, timeout=20.0, max_lag=1)
    config = replace(session.config, rollout=settings, train=replace(session.config.train, steps=9))
    rollouts = engine_rollouts(config, session.policy, session.folder, make_accelerator(config))
    with rollouts.running(3, PROMPTS, lambda: False, session.said.append):
        first = rollouts.sampled(3, requests)
        assert rollouts.sampled(3, requests) is first and rollouts.sampled(4, requests)[0].step == 3
        names = {name for name, _, _ in session.server.asked}
        rollouts.forget()
        again = rollouts.sampled(3, requests)
        assert again == first and again is not first
    assert {name for name, _, _ in session.server.asked[-2:]}.isdisjoint(names) and not session.server.loaded


def test_an_engine_that_does_not_forget_ends_no_run_late(session, monkeypatch):
    """What a run has done is saved behind that."""
    monkeypatch.setattr("grade.sampling.engine_rollouts.FORGETTING", 0.2)
    release = threading.Event()
    session.server.before = lambda path: release.wait(15) if path == "/v1/unload_lora_adapter" else None
    began = time.monotonic()
    session.run(steps=1)
    assert time.monotonic() - began < 10
    release.set()


def test_an_adapter_is_not_given_again_once_nobody_waits():
    """A request that is on its way when it is taken from the engine finds it gone."""
    sent, taken, given = threading.Event(), threading.Event(), []

    def request():
        sent.set()
        taken.wait(10)
        raise Forgotten

    before = threading.enumerate()
    asking = engine.Asking([request], engine.Patience(2, 10.0), "somewhere", remind=lambda: given.append(1))
    (thread,) = set(threading.enumerate()).difference(before)
    sent.wait(10)
    asking.end()
    taken.set()
    thread.join(10)
    assert not thread.is_alive() and not given


# --- a run -------------------------------------------------------------------------------------------------


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


# --- settings ----------------------------------------------------------------------------------------------

WRONG = {
    "no address": ({"rollout": {"engine": "vllm"}}, "needs the server's address: set rollout.url"),
    "no scheme": ({"rollout": {**SERVED, "url": "127.0.0.1:8000"}}, "rollout.url is 127.0.0.1:8000: it must be like"),
    "a port": (
        {"rollout": {**SERVED, "url": "http://host:99999"}},
        "rollout.url is http://host:99999: it must be like",
    ),
    "a key": ({"rollout": {**SERVED, "url": "http://me:secret@host"}}, "into the environment variable VLLM_API_KEY"),
    "two sources": ({"rollout": {**SERVED, "source": "ids"}}, "rollout.engine=vllm and rollout.source=ids exclude"),
    "compiled": ({"rollout": {**SERVED, "compile": True}}, "and rollout.compile=True exclude each other"),
    "whole models": (
        {"rollout": SERVED, "model": {"finetuning": "full"}, "method": {"estimator": "rao"}},
        "model.finetuning=full exclude each other: the server is sent an adapter",
    ),
    "soft tokens": (
        {"rollout": SERVED, "method": {"name": "grade"}},
        "rollout.engine gives token ids, but method.name=grade",
    ),
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
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    own = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    words = [*launch, "grade", "train", str(settings)]
    result = subprocess.run(words, capture_output=True, text=True, timeout=200, env=own, cwd=tmp_path)
    assert result.returncode != 0 and "another policy's responses are not trained on" in result.stderr, result.stderr
    assert {(prompt, seed) for name, prompt, seed in server.asked if version_of(name) < 2} == asked
    last = tmp_path / "two" / "checkpoints" / "last"
    assert load_state(last)["step"] == 2 and not server.loaded
    weights = load_peft_weights(str(last))
    for name, weight in get_peft_model_state_dict(one.model).items():  # AdamW magnifies rounding where gradients vanish
        assert (weights[name] - weight).norm() < 1e-3 * weight.norm()
