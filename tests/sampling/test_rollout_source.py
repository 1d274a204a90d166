"""Token ids from elsewhere: the same update as from sampling here, and refusals of what cannot be used."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_policy, tiny_reward
from tiny_run import shared_output, tiny_config, tiny_data, tiny_model, trainer_of  # noqa: F401

from grade.config import RolloutConfig, validate
from grade.errors import GradeError
from grade.files import latest
from grade.methods.base import kl_weight
from grade.model.checkpoint import load_state
from grade.processes import make_accelerator
from grade.replay.replay import ReplaySettings, replay
from grade.rollout import pad_prompts
from grade.sampling import lines as line_source
from grade.sampling.draw import Sampling
from grade.sampling.external import Response, recreate
from grade.sampling.sample import sample
from grade.training.run_folder import prepare_run_dir
from grade.training.trainer import Trainer

PROMPTS = [[5, 9, 11], [7, 3]]


def rollouts(policy, copies=2, **options):
    """(sampled here, the same tokens as if from elsewhere), noise rows alike."""
    sampling = Sampling(**{"max_new_tokens": 6, "min_new_tokens": 3, "top_k": 12, "tau": 0.7, **options})
    ids, mask = pad_prompts(PROMPTS, policy.pad_id)
    rows = torch.arange(len(PROMPTS) * copies) * sampling.max_new_tokens
    ours = sample(policy, ids, mask, sampling, seed=3, first_rows=rows, samples_per_prompt=copies)
    lines = [
        Response(PROMPTS[i // copies], ours.tokens[i][ours.mask[i]].tolist()) for i in range(len(PROMPTS) * copies)
    ]
    return ours, recreate(policy, lines, sampling, seed=3, first_rows=rows, copies=copies)


def gradient(policy, reward, rollout, estimator):
    weight = kl_weight(rollout.mask, "token_mean", 0.1, int(rollout.mask.sum()), len(rollout))
    share = torch.full((len(rollout),), 1 / len(rollout), dtype=torch.float64)
    settings = ReplaySettings(tau=0.7, estimator=estimator, max_hops=5, hop_tol=0.0)
    replay(policy, reward, rollout, settings, reward_weight=share, kl_weight=weight)
    taken = torch.cat([p.grad.flatten() for p in policy.parameters()])
    for p in policy.parameters():
        p.grad = None
    return taken


@pytest.mark.parametrize("unknown", [0, 50])
def test_recreates_the_rollout_that_was_sampled(unknown):
    """Same candidates, masks and rows; so the very same update by every rule that needs tokens only.

    With 50 ids that the tokenizer does not know, candidates that cannot be drawn fill the support.
    """
    policy = tiny_policy("llama", dtype=torch.float64, unknown=unknown)
    reward = tiny_reward(policy)
    ours, theirs = rollouts(policy)
    for name in ("prompt_ids", "prompt_mask", "tokens", "mask", "rows"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(ours.indices[ours.mask], theirs.indices[ours.mask])
    assert not theirs.missed.any()
    for estimator in ("rao", "straight_through", "reinmax"):
        a, b = (gradient(policy, reward, r, estimator) for r in (ours, theirs))
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        assert a.norm() > 0


def test_tokens_outside_the_candidates_are_placed_and_counted():
    policy = tiny_policy("llama", dtype=torch.float64)
    sampling = Sampling(max_new_tokens=4, top_k=3)
    logits = policy.causal_lm(torch.tensor([PROMPTS[0]])).logits[0, -1]
    worst = [i for i in logits.argsort().tolist() if i not in policy.eos_ids.tolist()][:1]
    rollout = recreate(policy, [Response(PROMPTS[0], worst)], sampling, seed=0, first_rows=torch.zeros(1).long())
    assert rollout.missed.tolist() == [[True]] and rollout.indices[0, 0, -1] == worst[0]
    assert rollout.indices[0, 0, :2].tolist() == logits.topk(2).indices.tolist()
    assert gradient(policy, tiny_reward(policy), rollout, "rao").isfinite().all()


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def sourced(tiny_config, tmp_path):  # noqa: F811
    """A config of two steps by `rao`, and the lines its own sampling would give."""
    method = replace(tiny_config.method, estimator="rao", rao_samples=4)
    config = replace(tiny_config, method=method, train=replace(tiny_config.train, steps=2))
    return config


def lines_of(trainer, steps):
    """What the trainer samples in its next steps while the policy learns from it, as a file's lines."""
    lines = []
    for _ in range(steps):
        for rollout in trainer.rollouts(trainer.step):
            for i in range(len(rollout)):
                prompt = rollout.prompt_ids[i][rollout.prompt_mask[i]].tolist()
                lines.append({"prompt": prompt, "response": rollout.tokens[i][rollout.mask[i]].tolist()})
        trainer.train_step()
        trainer.step += 1
    return lines


def with_source(config, path, **rollout):
    config = replace(config, rollout=RolloutConfig(source=str(path), **rollout))
    validate(config)
    return config


def test_training_from_a_file_repeats_training_from_sampling(sourced, tmp_path):
    here = trainer_of(sourced)
    lines = lines_of(here, 2)
    there = trainer_of(with_source(sourced, write(tmp_path / "ids.jsonl", lines)))
    for _ in range(2):
        metrics = there.train_step()
        there.step += 1
    assert metrics["off_support"] == 0
    for a, b in zip(here.policy.parameters(), there.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_reads_a_pipe_as_steps_need_it(sourced, tmp_path):
    lines = lines_of(trainer_of(sourced), 1)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    engine = threading.Thread(target=lambda: write(pipe, lines))
    engine.start()
    trainer = trainer_of(with_source(sourced, pipe))
    assert trainer.train_step()["off_support"] == 0
    trainer.step += 1
    with pytest.raises(GradeError, match="ended 4 responses early.*--train.resume auto"):
        trainer.train_step()
    engine.join()


GOOD = {"prompt": [5, 6], "response": [7, 8, 9, 10, 7, 8, 9, 10]}
BAD = {
    "binary": (b"\xff\xfe\x00", "cannot be read as text"),
    "not JSON": (b"{", "line 1 of .* is not of the form"),
    "nested without end": (b"[" * 100_000, "is not of the form"),
    "a number without end": (b'{"prompt": [' + b"1" * 5000 + b'], "response": [1]}', "is not of the form"),
    "no response": ({"prompt": [5]}, "is not of the form"),
    "a list": ([1], "is not of the form"),
    "text": ({"prompt": "five", "response": [7]}, "its prompt is not a list of one or more token ids"),
    "nothing": ({"prompt": [5], "response": []}, "its response is not a list of one or more"),
    "a float": ({"prompt": [5], "response": [7.0]}, "its response is not a list"),
    "an unknown id": ({"prompt": [5], "response": [10**6]}, "has the id 1000000, which the tokenizer of"),
    "a negative id": ({"prompt": [-1], "response": [7]}, "has the id -1"),
    "too long": ({"prompt": [5], "response": [7] * 9}, "has 9 tokens, generation.max_new_tokens is 8"),
    "no end": ({"prompt": [5], "response": [7, 8]}, "stops after 2 tokens without an end, before .*max_new_tokens=8"),
    "a long prompt": ({"prompt": [5] * 13, "response": [7]}, "has 13 tokens, task.prompt_max_tokens is 12"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_lines_are_refused_before_work(sourced, tmp_path, case):
    line, message = BAD[case]
    path = tmp_path / "ids.jsonl"
    path.write_bytes(line if isinstance(line, bytes) else json.dumps(line).encode())
    with pytest.raises(GradeError, match=message):
        trainer_of(with_source(sourced, path))


def test_bad_ends_are_refused(sourced, tmp_path):
    trainer = trainer_of(sourced)
    end = int(trainer.policy.eos_ids[0])
    for response, message in (([7, end, 8], "goes on after an end-of-sequence"), ([end], "min_new_tokens is 2")):
        path = write(tmp_path / "ids.jsonl", [{"prompt": [5], "response": response}])
        with pytest.raises(GradeError, match=message):
            trainer_of(with_source(sourced, path))


def test_too_few_responses_missing_files_and_torn_groups_are_refused(sourced, tmp_path):
    path = write(tmp_path / "ids.jsonl", [GOOD] * 7)
    with pytest.raises(GradeError, match="holds 7 responses, the run needs 8"):
        trainer_of(with_source(sourced, path))
    with pytest.raises(GradeError, match="there is no file"):
        trainer_of(with_source(sourced, tmp_path / "nothing"))
    torn = write(tmp_path / "torn.jsonl", [GOOD, {**GOOD, "prompt": [5]}] * 4)
    pairs = replace(sourced, generation=replace(sourced.generation, samples_per_prompt=2))
    with pytest.raises(GradeError, match="does not have the 2 responses of a prompt next to each other"):
        trainer_of(with_source(pairs, torn))


def engine_of(pipe, act):
    """Another engine: opens the pipe, and acts until nobody reads."""

    def run():
        with contextlib.suppress(BrokenPipeError), pipe.open("wb", buffering=0) as file:
            act(file)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def drip(file):
    while True:
        file.write(b"[")
        time.sleep(0.02)


def endless(file):
    while True:
        file.write(b"1" * 2**16)


SILENT = {
    "nobody opens it": (None, "has no writer in rollout.timeout=0.3 seconds"),
    "its writer says nothing": (lambda file: time.sleep(2), "has no writer in|gave nothing in"),
    "a line begins": (lambda file: (file.write(b"{"), time.sleep(2)), "gave the beginning of a line and no more in"),
    "a line never ends, slowly": (drip, "gave the beginning of a line and no more in rollout.timeout=0.3"),
    "a line never ends, fast": (endless, "has a line of more than .* without an end. Write one response a line"),
}


@pytest.mark.parametrize("case", SILENT)
def test_a_pipe_is_not_waited_for_without_end(sourced, tmp_path, monkeypatch, case):
    act, message = SILENT[case]
    monkeypatch.setattr(line_source, "MOST_BYTES", 2**20)
    os.mkfifo(tmp_path / "pipe")
    config = with_source(sourced, tmp_path / "pipe", timeout=0.3)
    trainer = trainer_of(config)
    if act is not None:
        engine_of(tmp_path / "pipe", act)
    began = time.monotonic()
    with pytest.raises(GradeError, match=f"rollout.source: .*pipe ({message})"):
        trainer.train_step()
    assert time.monotonic() - began < 2  # far from both 0.3 seconds and for ever


@pytest.mark.parametrize("done", [0, 1])
def test_a_stop_is_heard_while_a_pipe_is_silent(sourced, tmp_path, done):
    """The responses of `done` steps come and then nothing: those steps are kept, and the run goes on from there."""
    reference = trainer_of(sourced)
    lines = lines_of(reference, 2)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    config = with_source(replace(sourced, train=replace(sourced.train, save_every=1000)), pipe)
    stopped, asked = threading.Event(), []

    def writes(these, until):
        def act(file):
            file.write("".join(json.dumps(line) + "\n" for line in these).encode())
            until.wait(30)

        return act

    def wait_for_the_rest():
        asked.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    trainer = Trainer(config, make_accelerator(config), prepare_run_dir(config))
    step = trainer.train_step

    def stopped_while_waiting():
        if trainer.step == done:
            threading.Timer(0.3, wait_for_the_rest).start()
        return step()

    trainer.train_step = stopped_while_waiting
    engine = engine_of(pipe, writes(lines[: 4 * done], stopped))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert time.monotonic() - asked[0] < 2
    stopped.set()
    engine.join()
    assert load_state(Path(config.run_dir) / "checkpoints" / "last")["step"] == done

    resumed = replace(config, train=replace(config.train, resume=True))
    trainer = Trainer(resumed, make_accelerator(resumed), prepare_run_dir(resumed))
    engine_of(pipe, writes(lines[4 * done :], threading.Event()))
    trainer.fit()
    adapter = load_file(latest(Path(config.run_dir) / "checkpoints" / "last") / "adapter_model.safetensors")
    ours = dict(reference.policy.model.named_parameters())
    for name, weight in adapter.items():
        torch.testing.assert_close(weight, ours[name.replace(".weight", ".default.weight")], rtol=1e-5, atol=1e-7)
    rows = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().split("\n") if line]
    assert [row["step"] for row in rows if "reward" in row] == [0, 1]
    assert [row["step"] for row in rows if "validation/reward" in row] == [0, 2]


def test_only_a_newline_ends_a_line(sourced, tmp_path):
    """An engine may write the text beside the ids, with whatever separators stand in it."""
    odd = {**GOOD, "text": "one\u2028two\u2029three\u0085four\x0bfive\x1csix"}
    path = tmp_path / "ids.jsonl"
    path.write_bytes(b"\r\n".join(json.dumps(odd, ensure_ascii=False).encode() for _ in range(8)))
    trainer_of(with_source(sourced, path)).train_step()


@pytest.mark.parametrize(
    "content, lines",
    [
        (b"", []),
        (b"\n", [b""]),
        (b"a", [b"a"]),
        (b"a\nb\n", [b"a", b"b"]),
        (b"a\n\nb", [b"a", b"", b"b"]),
        (b"x" * 2**16 + b"\n" + b"y" * 70_000, [b"x" * 2**16, b"y" * 70_000]),
        (b"\n".join(b"%d" % i for i in range(40_000)), [b"%d" % i for i in range(40_000)]),
    ],
)
@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_lines_of_files_and_pipes(tmp_path, content, lines, kind):
    path = tmp_path / kind
    if kind == "file":
        path.write_bytes(content)
    else:
        os.mkfifo(path)
        engine_of(path, lambda file: file.write(content))
    read = line_source.lines_of(path, timeout=0.5 if content else 0.05, should_stop=lambda: False)
    if kind == "pipe" and not content:
        with pytest.raises(line_source.Silent, match="has no writer"):
            list(read)
    else:
        assert list(read) == lines


def test_a_timeout_is_a_number_of_seconds(sourced):
    for wrong in (0.0, -1.0, float("inf")):
        with pytest.raises(GradeError, match="rollout.timeout is"):
            with_source(sourced, "ids.jsonl", timeout=wrong)


def test_rules_that_need_the_noise_are_refused(tiny_config):  # noqa: F811
    for name in ("grade-ste", "grade"):
        with pytest.raises(GradeError, match="needs the noise they were drawn with"):
            with_source(replace(tiny_config, method=replace(tiny_config.method, name=name)), "ids.jsonl")
