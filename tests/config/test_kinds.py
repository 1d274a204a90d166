"""Settings that were made in Python are refused where their type is another than declared."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import changed

from grade.config import Config
from grade.config.kinds import check_kinds
from grade.config.reading import load_config
from grade.errors import GradeError


@pytest.mark.parametrize("name", ["demo", "countdown_small", "imdb_qwen3_4b"])
def test_settings_of_files_pass(name):
    check_kinds(load_config(name))


@pytest.mark.parametrize(
    "section, values, expected",
    [
        ("train", {"steps": 2.5}, "train.steps is 2.5: it must be a whole number"),
        ("train", {"steps": "4"}, "train.steps is '4': it must be a whole number"),
        ("train", {"batch_size": True}, "train.batch_size is True: it must be a whole number"),
        ("train", {"learning_rate": "fast"}, "train.learning_rate is .*: it must be a number"),
        ("train", {"run_dir": Path("x")}, "train.run_dir is .*: it must be text or null"),
        ("method", {"name": "dpo"}, "method.name is .*dpo.*: it must be one of grade-ste"),
        ("variance", {"hops": [1, 2.5]}, "variance.hops is .*: it must be a list of whole numbers"),
    ],
)
def test_another_type_is_refused(section, values, expected):
    with pytest.raises(GradeError, match=expected):
        check_kinds(changed(Config(), **{section: values}))


def test_what_is_no_setting_or_no_section_is_refused():
    config = Config()
    config.train.stepz = 3
    with pytest.raises(GradeError, match="train.stepz is no setting"):
        check_kinds(config)
    config = Config()
    config.train = {"steps": 3}
    with pytest.raises(GradeError, match="train is .*: it must be a TrainConfig"):
        check_kinds(config)
