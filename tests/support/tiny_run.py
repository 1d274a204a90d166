"""A real run in seconds: the demo's grammar as jsonl files, its model after a few steps of training."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grade.built_in.demo_model import demo_model
from grade.config import (
    Config,
    EvaluationConfig,
    GenerationConfig,
    LoraSettings,
    MethodConfig,
    ModelConfig,
    RewardConfig,
    TaskConfig,
    TrainConfig,
)
from grade.processes import make_accelerator
from grade.tasks.demo import write_reviews
from grade.training.run_folder import prepare_run_dir
from grade.training.trainer import Trainer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of the demo's model after 30 steps: it knows words, not grammar."""
    return demo_model(tmp_path_factory.mktemp("cache"), steps=30, progress=False)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """Folder with train.jsonl (200 reviews) and test.jsonl (40)."""
    folder = tmp_path_factory.mktemp("data")
    reviews = write_reviews(240, seed=11)
    for name, part in (("train", reviews[:200]), ("test", reviews[200:])):
        lines = [json.dumps({"text": r.text, "label": r.label}) for r in part]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def shared_output(tmp_path_factory):
    """Where the reward head lands: trained once for all tests."""
    return tmp_path_factory.mktemp("output")


@pytest.fixture
def tiny_config(tiny_model, tiny_data, shared_output, tmp_path):
    return make_tiny_config(tiny_model, tiny_data, shared_output, tmp_path / "run")


@pytest.fixture(scope="session")
def trained_run(tiny_model, tiny_data, shared_output, tmp_path_factory):
    """Folder of a finished run with adapters of every validation kept; to be read, not written."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    config = with_train(make_tiny_config(tiny_model, tiny_data, shared_output, run_dir), keep_adapters=True)
    Trainer(config, make_accelerator(config), prepare_run_dir(config)).fit()
    return run_dir


def make_tiny_config(model, data, output_dir, run_dir):
    """The settings of a run of four steps, two validations and a test."""
    return Config(
        name="tiny",
        device="cpu",
        output_dir=str(output_dir),
        task=TaskConfig(
            dataset=str(data),
            reward_examples=120,
            policy_examples=50,
            validation_examples=30,
            prompt_sentences=1,
            prompt_max_tokens=12,
        ),
        model=ModelConfig(name=str(model), dtype="float32", lora=LoraSettings(r=4, alpha=8)),
        reward=RewardConfig(hidden_size=16, epochs=10, max_tokens=32),
        generation=GenerationConfig(max_new_tokens=8, min_new_tokens=2, top_k=32),
        method=MethodConfig(tau_start=2.0, tau_end=1.0, tau_steps=10, kl_coef=0.05),
        train=TrainConfig(
            steps=4, batch_size=4, accumulation_steps=1, learning_rate=1e-3, run_dir=str(run_dir), samples_every=2
        ),
        evaluation=EvaluationConfig(every=2, validation_prompts=12, test_prompts=16, batch_size=8, samples=3),
    )


@pytest.fixture
def keyboard():
    """Ctrl-C as in a terminal: a test run in the background starts with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def trainer_of(config):
    return Trainer(config, make_accelerator(config), Path(config.run_dir))


def adapter_of(policy):
    return torch.cat([p.detach().flatten() for p in policy.parameters()]).clone()


def changed(config, **settings):
    """`config` with some settings changed, those of a section in a dictionary: changed(config, train={"steps": 1})."""
    return replace(
        config,
        **{
            name: changed(getattr(config, name), **value) if isinstance(value, dict) else value
            for name, value in settings.items()
        },
    )


def with_train(config, **changes):
    return changed(config, train=changes)


def stopped_after(config, steps=2):
    """Run a config until it is interrupted in the step after `steps` of them."""
    trainer = Trainer(config, make_accelerator(config), prepare_run_dir(config))
    step = trainer.train_step

    def no_more_steps():
        if trainer.step == steps:
            raise KeyboardInterrupt
        return step()

    trainer.train_step = no_more_steps
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()


def timeless(path):
    """The rows of a run's log without what no two runs share: times and memory."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith(("seconds", "tokens_per", "memory"))} for r in rows]


def files_of(folder: Path) -> dict[Path, bytes]:
    """The content of every file below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
