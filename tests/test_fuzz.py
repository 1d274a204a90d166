"""Anything at all, read as a file of ours or of somebody else: words (a GradeError) or success, within seconds.

The examples are the same in every run. What is random about Countdown answers is in tests/tasks/test_arithmetic.py,
about flipped bytes of checkpoints in tests/training/test_run_safety.py, and about whole runs in benchmarks/damage.py.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from tiny import tiny_policy

from grade import formats, tree
from grade.config import Config, GenerationConfig, TaskConfig
from grade.config.names import setting_types
from grade.config.reading import config_from_yaml
from grade.config.yaml_files import plain_yaml, read_yaml
from grade.errors import GradeError, read_json
from grade.jsonl import read_rows
from grade.sampling.external import RolloutSource
from grade.shapes import is_too_deep, misfit
from grade.tasks import load_task

fixed = settings(derandomize=True, deadline=20_000, database=None, suppress_health_check=list(HealthCheck))
NAMES = sorted(setting_types())
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.sampled_from([10**400, 2**63, -5]),
    st.floats(),
    st.text(max_size=12),
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)
TAGS = ["!!int ", "!!bool ", "!!float ", "!!timestamp ", "!!binary ", "!!python/object:os.system ", "&a ", "*a", "<<: "]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "file"


def nested(name: str, value) -> dict:
    *sections, last = name.split(".")
    found: dict = {last: value}
    for section in reversed(sections):
        found = {section: found}
    return found


@settings(fixed, max_examples=80)
@given(
    name=st.sampled_from(NAMES) | st.text(max_size=10),
    value=TREES,
    cut=st.integers(0, 40),
    piece=st.sampled_from(["", *TAGS]) | st.text(max_size=6),
)
def test_any_yaml_is_settings_or_refused(place, name, value, cut, piece):
    text = yaml.safe_dump(nested(name, value), allow_unicode=True)
    place.write_text(text[:cut] + piece + text[cut:], encoding="utf-8", errors="replace")
    for read in (read_yaml, plain_yaml):
        try:
            read(place)
        except GradeError as error:
            assert str(place) in str(error)


@settings(fixed, max_examples=12)
@given(st.dictionaries(st.sampled_from(NAMES), TREES, min_size=1, max_size=3))
def test_any_values_of_settings_are_taken_or_refused_by_name(place, values):
    merged: dict = {}
    for name, value in values.items():
        *sections, last = name.split(".")
        here = merged
        for section in sections:
            here = here.setdefault(section, {})
        here[last] = value
    place.write_text(yaml.safe_dump(merged, allow_unicode=True), encoding="utf-8", errors="replace")
    try:
        assert isinstance(config_from_yaml(place), Config)
    except GradeError as error:
        assert len(str(error)) < 20_000


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "larger than any settings"),
        ("variance: &v\n  taus: [1.0]\n  hops: *v\n", "holds itself"),
        ("train:\n  steps: " + "[" * 5000, "nested too deeply|malformed"),
        ("train:\n  overwrite: !!bool perhaps\n", "line 2: malformed YAML: a value is not what its tag says"),
        ("name: !!python/object/apply:os.system [exit]\n", "could not determine a constructor"),
    ],
)
def test_yaml_that_grows_or_runs_is_refused(place, text, said):
    place.write_text(text, encoding="utf-8")
    with pytest.raises(GradeError, match=said):
        read_yaml(place)


FORMS = [formats.RECORD, formats.EVALUATIONS, formats.MANIFEST, formats.STATE, formats.TESTS, formats.VARIANCE]


@settings(fixed, max_examples=80)
@given(TREES, st.binary(max_size=30), st.booleans())
def test_any_json_has_a_form_or_is_refused(place, value, noise, torn):
    content = json.dumps(value).encode()
    place.write_bytes(content[: len(content) // 2] + noise if torn else content)
    for form in FORMS:
        try:
            found = read_json(place, "Mend it.", shape=form)
        except GradeError as error:
            assert str(error).startswith(str(place)) and str(error).endswith("Mend it.") and len(str(error)) < 1000
        else:
            assert misfit(found, form) is None
    rows = read_rows(place)
    assert all(isinstance(row, dict) for row in rows.rows)


def test_a_form_names_the_place():
    form = {"rows": [{"step": formats.COUNT, "mean?": (float, None)}], str: str}
    assert misfit({"rows": [{"step": 1}, {"step": 2, "mean": None}], "other": "x"}, form) is None
    assert misfit({"rows": [{"step": 1}, {"step": -5}]}, form) == "rows[1].step is -5, not a whole number from 0 up"
    assert misfit({"rows": [{"step": True}]}, form) == "rows[0].step is true, not a whole number from 0 up"
    assert misfit({"rows": [{"step": 1, "mean": "x"}]}, form) == "rows[0].mean is 'x', not a number"
    assert misfit({"rows": [{"step": 1, "mean": 10**400}]}, form).endswith("a number of many digits, not a number")
    assert misfit({"rows": {}}, form) == "rows is an object, not a list"
    assert misfit({}, form) == "it has no entry 'rows'" and misfit([], form) == "it is a list, not an object"
    assert misfit({"rows": [], "other": 1}, form) == "other is 1, not a text"
    deep: list = []
    for _ in range(100):
        deep = [deep]
    assert is_too_deep(deep) and not is_too_deep([[[]]])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    stem = tmp_path_factory.mktemp("tree") / "state"
    tree.save(stem, {"a": [torch.ones(3), (1, "x")], "b": {0: torch.zeros(2, 2)}})
    return stem, {path: path.read_bytes() for path in (stem.with_suffix(".json"), stem.with_suffix(".safetensors"))}


@settings(fixed, max_examples=80)
@given(seed=st.integers(0, 2**32))
def test_any_bytes_of_a_state_are_read_or_refused(saved, seed):
    (stem, files), chance = saved, random.Random(seed)
    for path, content in files.items():
        damaged = bytearray(content)
        for _ in range(chance.choice([0, 1, 3])):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        if chance.random() < 0.2:
            del damaged[chance.randrange(len(damaged)) :]
        path.write_bytes(damaged)
    try:
        assert isinstance(tree.load(stem), dict)
    except GradeError as error:
        assert str(stem) in str(error)
        assert not isinstance(error, SafetensorError)


LINE = st.one_of(
    TREES,
    st.fixed_dictionaries(
        {
            "prompt": st.lists(st.integers(-1, 70), max_size=4) | TREES,
            "response": st.lists(st.integers(-1, 70), max_size=4) | TREES,
        }
    ),
)


@pytest.fixture(scope="module")
def policy():
    return tiny_policy()


@settings(fixed, max_examples=60)
@given(line=LINE, noise=st.binary(max_size=4))
def test_any_line_is_a_response_or_refused(place, policy, line, noise):
    place.write_bytes(json.dumps(line).encode() + noise + b"\n")
    generation = replace(GenerationConfig(), max_new_tokens=3, min_new_tokens=1)
    try:
        RolloutSource(place, policy, generation, longest_prompt=8, timeout=1.0, needed=1)
    except GradeError as error:
        assert str(error).startswith("rollout.source: ") and str(place) in str(error)


CELLS = [None, True, -5, 2**70, 1e308, float("nan"), "", "a text.", "\ud800", [], ["x"], [[1]], {"role": "user"}]


@pytest.mark.parametrize("seed", range(8))
def test_any_rows_are_data_or_refused(tmp_path, seed):
    """Rows of random kinds under the columns that tasks read; a file that is cut, or has other bytes, now and then."""
    chance = random.Random(seed)
    kinds = chance.choices(CELLS, k=3)
    rows = [
        {"prompt": chance.choice(kinds), "text": chance.choice(kinds), "label": chance.choice([0, 1, *kinds])}
        for _ in range(12)
    ]
    for part in ("train", "test"):
        content = "\n".join(json.dumps(row) for row in rows).encode()
        if chance.random() < 0.3:
            content = content[: chance.randrange(len(content))]
        if chance.random() < 0.3:
            content = content.replace(b"text", b"te\xff\xfet", 1)
        (tmp_path / f"{part}.jsonl").write_bytes(content)
    for name in ("prompts", "sentiment"):
        try:
            load_task(TaskConfig(name=name, dataset=str(tmp_path)))
        except GradeError as error:
            assert "task." in str(error)


@pytest.mark.parametrize("how", ["cut", "other bytes"])
def test_damaged_parquet_is_refused_in_words(tmp_path, how):
    import datasets

    path = tmp_path / "train.parquet"
    datasets.Dataset.from_dict({"prompt": [f"text {i}" for i in range(50)]}).to_parquet(path)
    content = bytearray(path.read_bytes())
    if how == "cut":
        del content[len(content) // 2 :]
    else:
        content[8:60] = bytes(52)
    path.write_bytes(content)
    with pytest.raises(GradeError, match="task.dataset is .* cannot be read"):
        load_task(TaskConfig(name="prompts", dataset=str(tmp_path)))
