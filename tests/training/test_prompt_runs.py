"""Runs on prompts: conversations with a head that has learnt from pairs, from the data to the answers."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
from prompt_data import TEMPLATE
from tiny_run import changed
from transformers import AutoTokenizer

from grade.config import TokenizerConfig
from grade.processes import make_accelerator
from grade.training.answers import Answers
from grade.training.run_folder import prepare_run_dir
from grade.training.trainer import Trainer


def test_a_run_on_conversations_with_a_head_from_pairs(tiny_config, tiny_model, tmp_path, capsys):
    """No label anywhere; what the policy reads is the tokenizer's own template."""
    model = tmp_path / "model"
    model.mkdir()
    for file in Path(tiny_model).iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    chats = [[{"role": "user", "content": f"The film number {i}"}] for i in range(40)]
    columns = {
        name: [[*chat, {"role": "assistant", "content": text}] for chat in chats]
        for name, text in (("chosen", "It was a good film."), ("rejected", "It was a dull film."))
    }
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "train.parquet")
    config = changed(
        tiny_config,
        output_dir=str(tmp_path / "out"),
        model={"name": str(model)},
        task={"name": "prompts", "dataset": str(tmp_path), "label_type": "pairs", "prompt_max_tokens": 64},
        tokenizer=TokenizerConfig(chat_template_kwargs={"thinking": False}),
        reward={"max_tokens": 64},
        train={"steps": 2},
    )
    trainer = Trainer(config, make_accelerator(config), prepare_run_dir(config))
    (first, *_), (told, *_) = trainer.evaluation_prompts["test"], trainer.task.conversations("test", [0])
    assert first == tokenizer.apply_chat_template(told, add_generation_prompt=True, return_dict=False, thinking=False)
    trainer.fit()
    record = json.loads((Path(config.run_dir) / "run.json").read_text())
    assert record["task"]["prompts"] == "conversations" and record["reward_head"]["accuracy"]["72 tokens"] > 0.9
    shown = " ".join("".join(capsys.readouterr()).split())
    assert "prefers answers is raised" in shown
    assert "test cut from the training data" in shown
    answers = Answers(config, trainer.policy, chat=True)
    assert answers._ids(told[0]["content"]) == first
