"""A hub that does not answer is given up at once, and what is cached is still found."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from huggingface_hub import constants

from grade import hub

_ASK = """
import sys, time
from grade.errors import GradeError
from grade.config import TaskConfig
from grade.model.pretrained import Pretrained
from grade.tasks.sentiment import load
import datasets, torch
start = time.monotonic()
for ask in (
    lambda: Pretrained("model.name", "some/model").tokenizer(), lambda: Pretrained("model.name", "some/model").config(),
    lambda: load(TaskConfig(dataset="some/data")),
):
    try:
        ask()
    except GradeError as error:
        print(error)
print(time.monotonic() - start)
"""


@pytest.mark.slow
def test_a_name_of_the_hub_is_refused_within_seconds(tmp_path):
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    asked = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True, timeout=200, env=environment)
    *said, seconds = asked.stdout.splitlines()
    assert float(seconds) < 5, asked.stderr
    for line in said[:2]:
        assert line.startswith("model.name=some/model cannot be loaded: We couldn't connect to 'http://127.0.0.1:9'")
        assert line.endswith("or a hub model while the hub can be reached (`grade doctor` tells).")
    assert said[2].startswith("task.dataset is some/data, a dataset on the hub, and the hub cannot be reached.")


@pytest.mark.parametrize(
    "error, offline",
    [
        (None, False),
        (hub.urllib.error.HTTPError("u", 403, "no", {}, None), False),
        (ValueError("no address"), False),
        (hub.urllib.error.URLError(hub.ssl.SSLError("unknown")), False),
        (ConnectionRefusedError(), True),
        (hub.urllib.error.URLError(OSError("no such name")), True),
        (TimeoutError(), True),
    ],
)
def test_only_silence_counts(monkeypatch, error, offline):
    def ask(endpoint, timeout):
        asked.append(endpoint)
        if error is not None:
            raise error

    asked: list[str] = []
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub, "_ask", ask)
    monkeypatch.setattr(hub, "_asked", {})
    before = constants.HF_HUB_OFFLINE
    for _ in range(2):
        with hub.without_waiting():
            assert constants.HF_HUB_OFFLINE is (offline or before)
        assert constants.HF_HUB_OFFLINE is before
    assert len(asked) == 1
