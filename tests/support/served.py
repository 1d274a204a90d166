"""A tiny policy beside a stand-in for its vLLM server: the engine alone, and whole runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stand_in_vllm import StandIn
from tiny_run import changed

from grade.config import RolloutConfig, validate
from grade.processes import make_accelerator
from grade.sampling import engine
from grade.sampling.draw import Sampling
from grade.sampling.engine import Request
from grade.sampling.engine_rollouts import engine_rollouts
from grade.training.run_folder import prepare_run_dir
from grade.training.trainer import Trainer


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(engine, "FIRST_PAUSE", 0.01)


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


# --- the engine without a training step ---------------------------------------------------------------------


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
