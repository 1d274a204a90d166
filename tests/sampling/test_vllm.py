"""Responses from a vLLM server: through its failures, and refused where they are not what was asked for."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from served import PROMPTS, Session, requests, short_pauses  # noqa: F401
from stand_in_vllm import Handler, StandIn
from tiny_run import make_tiny_config, shared_output, tiny_data, tiny_model  # noqa: F401

from grade.config import RolloutConfig
from grade.errors import RolloutFailed
from grade.model.loading import load_policy, load_tokenizer
from grade.processes import make_accelerator
from grade.sampling.engine import Asking, Forgotten, Patience, Request, Sampled, Version
from grade.sampling.engine_rollouts import engine_rollouts
from grade.sampling.http_json import Answer
from grade.sampling.lines import StopAsked
from grade.sampling.vllm import VllmServer, vllm_server


@pytest.fixture(scope="module")
def policies(tiny_model, tiny_data, shared_output, tmp_path_factory):  # noqa: F811
    """The trainer's policy and the server's, with the config of both."""
    config = make_tiny_config(tiny_model, tiny_data, shared_output, tmp_path_factory.mktemp("served"))
    return config, *(load_policy(config, load_tokenizer(config.model), torch.device("cpu")) for _ in range(2))


@pytest.fixture
def session(policies, tmp_path):
    found = Session(policies, tmp_path)
    yield found
    with contextlib.suppress(OSError):
        found.server.stop()


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


SURVIVED = {
    "it fails": (["500", "", "500 in LoRA"], "it answered HTTP 500: EngineCore encountered an issue"),
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
    "words as ids": "its token ids are no list of whole numbers",
    "a huge id": f"has the id {10**30}, which the tokenizer of model.name does not know",
    "cut": "stops after 1 tokens without an end, before generation.max_new_tokens=8",
    "no logprobs": "tokens without their log-probabilities",
    "too many digits": "tokens without their log-probabilities",
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


@pytest.mark.parametrize("key", ["secret\nof-the-test", "secrét", "секрет"])
def test_a_key_that_no_header_can_hold_is_refused(session, monkeypatch, key):
    monkeypatch.setenv("VLLM_API_KEY", key)
    with pytest.raises(
        RolloutFailed, match="The environment variable VLLM_API_KEY holds a character that no key can have"
    ) as refusal:
        session.run()
    assert key not in str(refusal.value)


@pytest.mark.parametrize("models", [[{"id": 1}], [{"id": "base"}, {"id": None, "parent": "base"}], [1], "base", None])
def test_a_list_that_is_none_of_models_is_refused(session, monkeypatch, models):
    monkeypatch.setattr(Handler, "do_GET", lambda handler: handler.give(200, {"data": models}))
    with pytest.raises(RolloutFailed, match="/v1/models is no list of models as vLLM gives it"):
        session.run()


@pytest.mark.parametrize("best", [{}, {"a": "x", "b": "y"}, {"a": -(10**400)}, 5])
def test_what_are_no_log_probabilities_of_other_tokens_is_refused(session, monkeypatch, best):
    sample = StandIn.sample
    monkeypatch.setattr(StandIn, "sample", lambda stand_in, body: (*sample(stand_in, body)[:2], [best]))
    with pytest.raises(RolloutFailed, match="it gives no log-probabilities of other tokens"):
        session.run()


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


def test_an_engine_that_hangs_holds_up_no_end(session, monkeypatch):
    """Unloading is given some seconds, and nothing depends on it."""
    monkeypatch.setattr("grade.sampling.engine_rollouts._UNLOAD_SECONDS", 0.2)
    session.server.before = lambda path: time.sleep(3.0 * path.endswith("unload_lora_adapter"))
    began = time.monotonic()
    session.run()
    assert time.monotonic() - began < 2.5 and not (session.folder / "rollout").exists()


def test_a_version_that_was_given_up_is_not_loaded_again():
    """A request that is under way when a version is unloaded finds that the engine does not know it."""
    given_up, reminded = threading.Event(), []

    def forgotten():
        assert given_up.wait(10)
        raise Forgotten

    before = set(threading.enumerate())
    asking = Asking([forgotten], Patience(retries=3, timeout=10.0), "the engine", remind=lambda: reminded.append(1))
    threads = set(threading.enumerate()) - before
    asking.end()
    given_up.set()
    for thread in threads:
        thread.join(10)
    assert len(threads) == 1 and not reminded


def test_a_key_or_a_host_that_cannot_be_is_told_in_words(session, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret\nof two lines")
    with pytest.raises(RolloutFailed, match="VLLM_API_KEY holds a character that no key can have") as refusal:
        session.run()
    assert "secret" not in str(refusal.value)
    session.server.key = "secret"
    monkeypatch.setenv("VLLM_API_KEY", "secret\n")  # as a file of it ends
    session.run()
    with pytest.raises(RolloutFailed, match="rollout.url=http://a..b: no answer .*cannot be reached"):
        session.run(url="http://a..b", timeout=0.3)
