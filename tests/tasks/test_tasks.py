"""Tasks: how data is found, refused, split and cut into prompts."""

from __future__ import annotations

import json
import socket
from typing import get_args, get_type_hints

import datasets
import pytest
from transformers import AutoTokenizer

from grade.config import TaskConfig
from grade.config.tasks import JUDGED_BY_PROGRAM, WRITTEN
from grade.errors import GradeError
from grade.rewards.loading import PROGRAMS
from grade.tasks import TASKS, demo, load_task
from grade.tasks.base import Example
from grade.tasks.texts import SPLITS, TextTask, cut_splits, shuffled

ROWS = 60


def test_a_task_is_declared_everywhere():
    """As docs/development.md lists the places."""
    assert get_args(get_type_hints(TaskConfig)["name"]) == tuple(TASKS)
    assert set(PROGRAMS) == set(JUDGED_BY_PROGRAM) and set(JUDGED_BY_PROGRAM) | set(WRITTEN) <= set(TASKS)


def rows(n=ROWS, part="train"):
    """Reviews sorted by label, as the IMDB files are."""
    return {
        "text": [f"The {part} review {i} says<br />this.  And then\nit ends. Never seen." for i in range(n)],
        "label": [int(i >= n // 2) for i in range(n)],
    }


def config_for(dataset, **task):
    sizes = {"reward_examples": 20, "policy_examples": 20, "validation_examples": 10}
    return TaskConfig(dataset=str(dataset), **{**sizes, **task})


def save(folder, kind, parts=("train", "test"), **columns):
    folder.mkdir(exist_ok=True)
    for part in parts:
        data = datasets.Dataset.from_dict({**rows(part=part), **columns})
        writer = {"parquet": data.to_parquet, "csv": data.to_csv, "jsonl": data.to_json}.get(kind)
        if writer:
            writer(folder / f"{part}.{kind}")
        else:
            table = [dict(row) for row in data]
            (folder / f"{part}.json").write_text(json.dumps(table), encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "reviews", "parquet")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test that reached for the hub would pass here and fail, slowly, elsewhere."""

    def refuse(*_, **__):
        raise OSError("tests do not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


# --- splits ---


def examples(n):
    return [Example(f"train/{i}", f"text {i}", int(i >= n // 2)) for i in range(n)]


def split_ids(task):
    return [[example.id for example in task.examples(split)] for split in SPLITS]


def test_splits_are_disjoint_complete_and_of_the_asked_sizes(folder):
    task = load_task(config_for(folder))
    ids = split_ids(task)
    assert [len(split) for split in ids] == [20, 20, 10, ROWS, ROWS - 50]
    assert len({i for split in ids for i in split}) == 2 * ROWS
    assert sorted(ids[3]) == sorted(f"test/{i}" for i in range(ROWS))


def test_sorted_file_is_balanced_after_the_shuffle():
    task = cut_splits(examples(25000), examples(0), TaskConfig(), "here")
    for split in ("reward", "policy", "validation"):
        labels = [example.label for example in task.examples(split)]
        # 4 standard deviations of a share over at least 2000 rows
        assert abs(sum(labels) / len(labels) - 0.5) < 0.045


def test_same_seed_same_splits_and_another_seed_others(folder):
    first, again = load_task(config_for(folder)), load_task(config_for(folder))
    other = load_task(config_for(folder, split_seed=1))
    assert first == again and first.describe() == again.describe()
    assert all(a != b for a, b in zip(split_ids(first), split_ids(other), strict=True))


def test_shuffle_is_pinned():
    """Recorded runs name rows by this order: it may not change with Python or with us."""
    assert [example.id for example in shuffled(examples(8), 0)] == [
        f"train/{i}" for i in (3, 7, 5, 2, 4, 1, 6, 0)
    ]  # fmt: skip


def test_description_is_json_and_tells_rows_from_contents(folder, tmp_path):
    first = load_task(config_for(folder)).describe()
    assert json.loads(json.dumps(first)) == first
    assert (first["dataset"], first["split_seed"]) == (str(folder), 0) and first["splits"]["reward"]["examples"] == 20
    texts = [text.replace("review", "story") for text in rows()["text"]]
    second = load_task(config_for(save(tmp_path / "other", "parquet", text=texts))).describe()
    for split in SPLITS:
        ours, theirs = first["splits"][split], second["splits"][split]
        assert ours["ids_sha256"] == theirs["ids_sha256"] and ours["texts_sha256"] != theirs["texts_sha256"]


def test_recorded_hash_is_stable():
    description = cut_splits(examples(50), [], config_for("x"), "here").describe()
    assert description["splits"]["reward"]["ids_sha256"][:16] == "86683fce5a451e7e"


def test_reward_examples_of_one_class_are_refused():
    with pytest.raises(GradeError, match=r"same label: raise task\.reward_examples"):
        cut_splits([Example(str(i), "x", int(i == 49)) for i in range(50)], [], config_for("x"), "here")


def test_the_same_row_twice_is_a_bug():
    row = [Example("train/0", "x", 1)]
    with pytest.raises(AssertionError, match="occur twice"):
        TextTask("here", TaskConfig(), row, row, [], [])
    with pytest.raises(ValueError, match="no split 'dev'"):
        TextTask("here", TaskConfig(), row, [], [], []).examples("dev")


# --- sources ---


@pytest.mark.parametrize("kind", ["parquet", "csv", "json", "jsonl"])
def test_local_files(tmp_path, kind):
    task = load_task(config_for(save(tmp_path / "reviews", kind)))
    reference = load_task(config_for(save(tmp_path / "reference", "parquet")))
    assert split_ids(task) == split_ids(reference)
    assert task.reward == reference.reward and task.test == reference.test
    assert task.reward[0].text.endswith("says this. And then it ends. Never seen.")


def test_saved_to_disk(tmp_path, folder):
    parts = {part: datasets.Dataset.from_dict(rows(part=part)) for part in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    assert load_task(config_for(tmp_path / "saved")).policy == load_task(config_for(folder)).policy


def test_shards_are_read_in_order(tmp_path, folder):
    whole = datasets.Dataset.from_dict(rows())
    sharded = save(tmp_path / "sharded", "parquet", parts=("test",))
    for i in range(2):
        whole.select(range(i * 30, i * 30 + 30)).to_parquet(sharded / f"train-0000{i}-of-00002.parquet")
    assert load_task(config_for(sharded)).reward == load_task(config_for(folder)).reward


def test_read_only_folder_stays_untouched(folder):
    before = sorted(folder.iterdir())
    folder.chmod(0o555)
    try:
        load_task(config_for(folder))
    finally:
        folder.chmod(0o755)
    assert sorted(folder.iterdir()) == before


def test_hub_dataset(monkeypatch, folder):
    parts = {part: datasets.Dataset.from_dict(rows(part=part)) for part in ("train", "test", "unsupervised")}
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name: asked.append(name) or datasets.DatasetDict(parts))
    assert load_task(config_for("someone/reviews")).reward == load_task(config_for("reviews")).reward
    assert asked == ["someone/reviews", "reviews"]


def test_other_columns_and_labels(tmp_path):
    named = {"body": rows()["text"], "stars": ["bad" if label == 0 else "good" for label in rows()["label"]]}
    folder = save(tmp_path / "named", "csv", **named)
    task = load_task(config_for(folder, text_column="body", label_column="stars", positive_label="good"))
    assert {(e.label, int(e.id.split("/")[1]) >= ROWS // 2) for e in task.test} == {(0, False), (1, True)}


def test_shared_reviews(shared_imdb, imdb_lm):
    task = load_task(TaskConfig(dataset=str(shared_imdb)))
    assert [len(task.examples(split)) for split in SPLITS] == [5000, 10000, 2000, 25000, 8000]
    assert abs(sum(example.label for example in task.test[:2000]) - 1000) < 90  # 4 standard deviations
    prompts = task.prompts("test", AutoTokenizer.from_pretrained(imdb_lm), 200)
    assert len(prompts) == 200 and max(map(len, prompts)) <= 32 and 0 not in {row[0] for row in prompts}


# --- data that cannot be used ---


def saved(data):
    """Data as `datasets` saves it."""
    return lambda folder: data.save_to_disk(str(folder)) or folder


def with_file(name, content):
    """Data whose file of this name holds something else."""

    def make(folder):
        save(folder, name.split(".")[1])
        (folder / name).write_bytes(content)
        return folder

    return make


def hidden_labels(folder):
    save(folder, "csv", parts=("train",))
    return save(folder, "csv", parts=("test",), label=[-1] * ROWS)


def parquet(folder, **columns):
    return save(folder, "parquet", **columns)


WHOLE = datasets.Dataset.from_dict(rows())
UNUSABLE = {  # what is named, settings, and what is said; functions make it in a folder
    "nowhere": ("./nowhere", {}, "no such folder.*save_to_disk"),
    "nowhere at all": ("/nowhere/at/all", {}, "no such folder.*save_to_disk"),
    "nowhere at home": ("~/nowhere-at-all", {}, "no such folder.*save_to_disk"),
    "no name of the hub": ("a/b/c", {}, "no such folder.*save_to_disk"),
    "a file": (lambda folder: parquet(folder) / "train.parquet", {}, "a file: name the folder"),
    "an empty folder": (lambda folder: folder.mkdir() or folder, {}, "which holds nothing: it needs one train"),
    "one part": (lambda folder: save(folder, "csv", parts=("train",)), {}, r"which holds train\.csv: it needs"),
    "two kinds": (lambda folder: parquet(save(folder, "csv")), {}, "has both parts as csv and as parquet"),
    "saved without test": (saved(datasets.DatasetDict(train=WHOLE)), {}, r"no part called test \(it has train\)"),
    "a single part": (saved(WHOLE), {}, "a single saved dataset: save a DatasetDict"),
    "saved without rows": (
        saved(datasets.DatasetDict(train=WHOLE.select([]), test=WHOLE.select([]))),
        {},
        "The train data of .* is empty: it has no rows",
    ),
    "no rows": (lambda folder: save(folder, "csv", text=[], label=[]), {}, "data of .* is empty: it has no rows"),
    "no text": (lambda folder: parquet(folder, text=[" <br />"] * ROWS), {}, "empty: no row has text in column 'text'"),
    "broken parquet": (with_file("train.parquet", b"no such {"), {}, r"data, and its files cannot be read: \w+"),
    "broken jsonl": (with_file("train.jsonl", b"no such {"), {}, r"data, and its files cannot be read: \w+"),
    "a part without labels": (
        with_file("test.csv", b"text\nGood.\n"),
        {},
        "test data .* no column 'label': set task.label_column to .* text",
    ),
    "no text column": (parquet, dict(text_column="body"), r"no column 'body': set task\.text_column to one of text, l"),
    "no label column": (parquet, dict(label_column="body"), r"'body': set task\.label_column to one of text, label"),
    "numbers as text": (parquet, dict(text_column="label"), r"int values in column 'label': task\.text_column must"),
    "no positive row": (parquet, dict(positive_label="2"), r"no positive row by task\.positive_label='2'.* holds 0, 1"),
    "no negative row": (lambda folder: parquet(folder, label=[1] * ROWS), {}, "only positive rows by task.positive_l"),
    "hidden test labels": (hidden_labels, {}, "The test data .* no positive row .* holds -1"),
    "a missing label": (
        lambda folder: parquet(folder, label=[None] + [1] * (ROWS - 1)),
        {},
        "no label in row 0, column 'label'",
    ),
    "too few rows": (
        parquet,
        dict(policy_examples=40),
        r"task\.reward_examples \+ task\.policy_examples .* = 20 \+ 40 \+ 10 = 70, "
        "but the training data of .* has 60 rows",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_data_that_cannot_be_used_is_told_in_words(tmp_path, case):
    source, options, message = UNUSABLE[case]
    name = source if isinstance(source, str) else source(tmp_path / "data")
    with pytest.raises(GradeError, match=message):
        load_task(config_for(name, **options))


@pytest.mark.parametrize(
    "error, message",
    [
        (ConnectionError("Couldn't reach 'a/b' on the Hub"), "task.dataset is a/b.*hub cannot be reached.*folder with"),
        (datasets.exceptions.DatasetNotFoundError("not there"), "the hub shows no such dataset .*Correct the name"),
        (ValueError("Config name is missing.\nPick one"), r"\(ValueError: Config name is missing\. Pick one\)\. Save"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Exception) else "",
)
def test_hub_datasets_that_cannot_be_had(monkeypatch, error, message):
    def fail(name):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(GradeError, match=message):
        load_task(config_for("a/b"))


def test_a_folder_that_is_here_is_not_looked_up_at_the_hub(monkeypatch, tmp_path):
    """Though its name could be one of the hub, and whatever it lacks."""
    (tmp_path / "somebody" / "reviews").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GradeError, match="somebody/reviews, which holds nothing"):
        load_task(config_for("somebody/reviews"))


def labelled(folder, *values):
    """Reviews whose labels are these values in turn."""
    return save(folder, "csv", label=[values[i % len(values)] for i in range(ROWS)])


def test_unlabelled_rows_are_left_out_and_counted(tmp_path):
    """-1 was a negative review: the head learned from rows that nobody had labelled."""
    task = load_task(config_for(labelled(tmp_path / "some", 1, -1, 0), reward_examples=10, policy_examples=10))
    for example in (e for split in SPLITS for e in task.examples(split)):
        assert example.label == {0: 1, 2: 0}[int(example.id.split("/")[1]) % 3]
    assert len(task.test) == 40 and task.labels.left_out == {"-1": 40}
    assert task.describe()["labels"] == {"column": "label", "positive": "1", "negative": "0", "left_out": {"-1": 40}}
    assert str(task.labels) == "'1' of column 'label' (negative: '0'; rows left out: 40 with '-1')"


def test_rows_without_text_are_left_out_and_counted(tmp_path):
    folder = save(tmp_path / "some", "jsonl", text=["" if i % 4 == 0 else f"Film {i} is fine." for i in range(ROWS)])
    task = load_task(config_for(folder, reward_examples=10, policy_examples=10))
    assert task.labels.left_out == {"": 2 * sum(i % 4 == 0 for i in range(ROWS))}
    assert f"{task.labels.left_out['']} without text" in str(task.labels)


def test_labels_of_minus_one_and_one(tmp_path):
    task = load_task(config_for(labelled(tmp_path / "signs", 1, -1)))
    assert task.labels.negative == "-1" and not task.labels.left_out


def test_more_than_two_labels_need_a_negative_one(tmp_path):
    stars = labelled(tmp_path / "stars", 1, 2, 3, 4, 5)
    few = dict(positive_label="5", reward_examples=6, policy_examples=6, validation_examples=6)
    with pytest.raises(GradeError, match=r"holds 1, 2, 3, 4, 5: besides task\.positive_label='5' .*negative_label"):
        load_task(config_for(stars, **few))
    task = load_task(config_for(stars, negative_label="2", **few))
    assert {int(e.id.split("/")[1]) % 5 for e in task.test} == {1, 4}
    assert task.labels.left_out == {"1": 24, "3": 24, "4": 24}
    for wrong in ("7", "5"):
        with pytest.raises(GradeError, match=f"task.negative_label is '{wrong}': .* holds 1, 2, 3, 4, 5"):
            load_task(config_for(stars, negative_label=wrong, **few))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_files_may_differ_in_columns_that_are_not_read(tmp_path, kind):
    folder = save(tmp_path / "more", kind, parts=("train",), stars=[5] * ROWS)
    save(folder, kind, parts=("test",), source=["web"] * ROWS)
    assert load_task(config_for(folder)).reward == load_task(config_for(save(tmp_path / "same", kind))).reward
    shards = save(tmp_path / "shards", kind, parts=("test",))
    save(shards, kind, parts=("train",))
    (shards / f"train.{kind}").rename(shards / f"train-00000-of-00002.{kind}")
    save(shards, kind, parts=("train",), author=["me"] * ROWS)
    (shards / f"train.{kind}").rename(shards / f"train-00001-of-00002.{kind}")
    assert sum(map(len, split_ids(load_task(config_for(shards))))) == 3 * ROWS


def test_line_separators_of_unicode_end_no_row(tmp_path):
    """U+2028, U+0085 and their like stand in scraped reviews; JSON lines end at a newline only."""
    odd = [f"One\u2028 {i} two\u2029three\u0085four\x0bfive\x1csix\ufeff." for i in range(ROWS)]
    folder = tmp_path / "odd"
    folder.mkdir()
    for part in ("train", "test"):
        lines = [json.dumps({"text": t, "label": i % 2}, ensure_ascii=False) for i, t in enumerate(odd)]
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    task = load_task(config_for(folder))
    assert len(task.test) == ROWS and {e.text for e in task.test} == {" ".join(t.split()) for t in odd}


def test_rows_without_text_are_in_no_split(tmp_path):
    some = save(tmp_path / "some", "csv", text=[None, " "] + rows()["text"][2:])
    assert {"test/0", "test/1"}.isdisjoint(example.id for example in load_task(config_for(some)).test)


# --- other tasks ---


def test_demo_task():
    sizes = dict(reward_examples=100, policy_examples=80, validation_examples=40, judge_examples=30)
    task = load_task(TaskConfig(name="demo", **sizes, prompt_sentences=1))
    assert [len(task.examples(split)) for split in SPLITS] == [100, 80, 40, demo.TEST_REVIEWS, 30]
    assert len({e.text for split in SPLITS for e in task.examples(split)}) == 250 + demo.TEST_REVIEWS
    assert all(text.count(".") == 1 for text in task.openings("policy"))
    assert task.describe()["dataset"] == "built-in grammar"


def test_unknown_task():
    with pytest.raises(GradeError, match="task.name is 'chess'"):
        load_task(TaskConfig(name="chess"))


def test_texts_that_stand_in_two_splits_are_counted():
    """Data may repeat a review under another row number: disjoint as rows, counted as texts."""
    train = [Example(f"train/{i}", f"text {i % 9}", i % 2) for i in range(10)]  # rows 0 and 9 say the same
    test = [Example("test/0", "text 3", 1), Example("test/1", "unseen", 0)]
    settings = TaskConfig(reward_examples=4, policy_examples=4, validation_examples=2)
    task = cut_splits(train, test, settings, "here")
    counts = task.describe()["texts_in_two_splits"]
    assert counts == task.repeated_texts() and len(counts) == 10
    texts = {name: {e.text for e in task.examples(name)} for name in SPLITS}
    assert all(
        counts[f"{a} and {b}"] == len(texts[a] & texts[b]) for a in SPLITS for b in SPLITS if f"{a} and {b}" in counts
    )
    assert sum(v for pair, v in counts.items() if "test" in pair) == 1
