"""A real vLLM server samples for a run: `make engine`, or with GRADE_VLLM_PYTHON the interpreter of any environment
that has vLLM. The server takes a minute or more to start, and the run as long."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from grade.config.reading import load_config
from grade.processes import make_accelerator
from grade.training.run_folder import prepare_run_dir
from grade.training.trainer import Trainer

PYTHON = os.environ.get("GRADE_VLLM_PYTHON")
START = 600.0  # seconds
STEPS = 10
pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="needs vLLM: `make engine`, or GRADE_VLLM_PYTHON=its interpreter"),
]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module", params=["raw_logprobs", "processed_logprobs"])
def logprobs_mode(request):
    """What a server's log-probabilities are of: the whole distribution, or the candidates."""
    return request.param


@pytest.fixture(scope="module")
def url(logprobs_mode, imdb_lm, tmp_path_factory):
    """Address of a server on a CPU in float32, for as long as the tests last."""
    address, log = f"127.0.0.1:{free_port()}", tmp_path_factory.mktemp("vllm") / "log"
    own = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    host, port = address.split(":")
    # `vllm serve` asks for the version of a distribution that is called vllm, which vllm-cpu is not.
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(imdb_lm), "--host", host]
    command += ["--port", port, "--dtype", "float32", "--enforce-eager", "--enable-lora", "--max-lora-rank", "16"]
    command += ["--max-model-len", "256", "--logprobs-mode", logprobs_mode]
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with log.open("wb") as file:
        server = subprocess.Popen(
            command, env={**inherited, **own}, cwd=log.parent, stdout=file, stderr=file, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START
        while not answers(f"http://{address}/health"):
            tail = log.read_text(errors="replace")[-2000:]
            assert server.poll() is None, f"the server has ended:\n{tail}"
            assert time.monotonic() < deadline, f"the server has not started in {START:g} seconds:\n{tail}"
            time.sleep(1.0)
        yield f"http://{address}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def test_a_run_is_sampled_by_a_real_server(
    url, logprobs_mode, imdb_lm, shared_imdb, tmp_path, tmp_path_factory, capsys
):
    """The reward rises, and the server's probabilities stay the policy's while that changes."""
    settings = {
        "model.name": imdb_lm,
        "task.dataset": shared_imdb,
        "task.reward_examples": 200,
        "task.validation_examples": 64,
        "train.steps": STEPS,
        "train.batch_size": 8,
        "train.run_dir": tmp_path / "run",
        "evaluation.every": STEPS,
        "evaluation.validation_prompts": 32,
        "evaluation.test_prompts": 0,
        "rollout.engine": "vllm",
        "rollout.url": url,
        "output_dir": tmp_path_factory.getbasetemp() / "output",  # the reward head is trained once
    }
    config = load_config("imdb_small", [text for name, value in settings.items() for text in (f"--{name}", str(value))])
    Trainer(config, make_accelerator(config), prepare_run_dir(config)).fit()
    rows = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    start, end = (row["validation/reward"] for row in rows if "validation/reward" in row)
    largest = max(row["rollout/logprob_difference_max"] for row in steps)
    mean = sum(row["rollout/logprob_difference_mean"] for row in steps) / STEPS
    rollout, whole = (sum(values) / STEPS for values in zip(*map(seconds_of, steps), strict=True))
    with capsys.disabled():
        print(
            f"\nlog-probabilities differ by {mean:.1e} nats on average, {largest:.1e} at most; validation reward "
            f"{start:.3f} -> {end:.3f}; {whole:.2f} seconds a step, {rollout:.2f} of them for its responses"
        )
    assert steps[-1]["kl"] > 0.1  # the policy has moved far from what the server was started with
    assert all(row["off_support"] == 0 and row["rollout/lag"] == 0 for row in steps)
    # Once in some thousand tokens the last of k candidates and the next one tie in float32. vLLM then draws from both,
    # so that log-probabilities among the candidates lack the next one's share, at most that of one in k.
    tie = math.log1p(1 / config.generation.top_k) if logprobs_mode == "processed_logprobs" else 0.0
    assert largest < 1e-4 + tie and mean < 1e-5
    assert end > start


def seconds_of(row):
    """(of the rollout, of everything)."""
    return row["seconds/rollout"], sum(value for name, value in row.items() if name.startswith("seconds/"))
