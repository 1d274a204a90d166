"""A setting that is a dict: from YAML and the command line, there and back, and refused where it is none."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from grade.config import flatten
from grade.config.reading import config_from_yaml, config_to_yaml, load_config
from grade.errors import GradeError


def test_template_arguments_come_from_a_file_and_from_options(tmp_path):
    path = tmp_path / "chat.yaml"
    path.write_text("task: {name: prompts}\ntokenizer:\n  chat_template_kwargs: {enable_thinking: false, tools: [a]}\n")
    config = load_config(str(path), [])
    assert config.tokenizer.chat_template_kwargs == {"enable_thinking": False, "tools": ["a"]}
    assert flatten(asdict(config))["tokenizer.chat_template_kwargs"] == config.tokenizer.chat_template_kwargs
    path.write_text(config_to_yaml(config))
    assert config_from_yaml(path) == config
    changed = load_config(str(path), ["--tokenizer.chat_template_kwargs", '{"enable_thinking": true}'])
    assert changed.tokenizer.chat_template_kwargs == {"enable_thinking": True}
    with pytest.raises(GradeError, match="chat_template_kwargs is 3: it must be names with values"):
        load_config(str(path), ["--tokenizer.chat_template_kwargs", "3"])
