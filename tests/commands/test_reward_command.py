"""`grade reward` in several processes."""

from __future__ import annotations

from types import SimpleNamespace

from grade.commands.reward import check_reward_gradient
from grade.config.reading import load_config
from grade.training.api import GradeTrainer


def test_the_main_process_alone_prints_and_writes(monkeypatch, capsys, tmp_path):
    found = SimpleNamespace(verdict="a verdict")
    other = SimpleNamespace(accelerator=SimpleNamespace(is_main_process=False), check_gradient=lambda: found)
    monkeypatch.setattr(GradeTrainer, "from_config", lambda config: other)
    config = load_config("demo", ["--output_dir", str(tmp_path)])
    assert check_reward_gradient(config) is found
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())
