"""Prompts without labels: every form of data, how it is cut, conversations through the chat template, pairs."""

from __future__ import annotations

import datasets
import pytest
from prompt_data import chat_tokenizer

from grade.config import Config, TaskConfig, TokenizerConfig, validate
from grade.errors import GradeError
from grade.tasks import load_task, prompts
from grade.tasks.conversations import Pair, read_pair

TEXTS = [f"Tell me {i} things about the sea." for i in range(20)]
ANSWERS = [f"answer {i}" for i in range(20)]


def chats(n=20, **first):
    return [[{"role": "user", "content": f"Question {i}?", **first}] for i in range(n)]


def config_for(dataset, **task):
    return TaskConfig(**{"name": "prompts", "dataset": str(dataset), "prompt_max_tokens": 64, **task})


def save(folder, kind, **parts):
    """Parts as files of a kind, each a dict of columns."""
    folder.mkdir()
    for part, columns in parts.items():
        if kind == "txt":
            (folder / f"{part}.txt").write_text("\n".join(columns["prompt"]) + "\n", encoding="utf-8")
        elif kind != "disk":
            data = datasets.Dataset.from_dict(columns)
            {"parquet": data.to_parquet, "csv": data.to_csv, "jsonl": data.to_json}[kind](folder / f"{part}.{kind}")
    if kind == "disk":
        datasets.DatasetDict({part: datasets.Dataset.from_dict(c) for part, c in parts.items()}).save_to_disk(folder)
    return folder


def task_of(columns, chat=None, **task):
    """Straight from columns of the training part, without a file."""
    data = {"train": [datasets.Dataset.from_dict(columns)]}
    return prompts.prompt_task(data, config_for("here", **task), chat, source="here")


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl", "txt", "disk"])
def test_prompts_of_every_kind_of_file_are_cut_into_disjoint_splits(tmp_path, kind):
    folder = save(tmp_path / "data", kind, train={"prompt": TEXTS})
    task = load_task(config_for(folder))
    splits = [[row.prompt for row in task.rows(split)] for split in prompts.SPLITS]
    assert [len(split) for split in splits] == [0, 12, 4, 4]
    assert sorted(text for split in splits for text in split) == sorted(TEXTS)
    (note,) = task.notes()
    assert note == "data: 12 policy, 4 validation, 4 test rows; validation and test cut from the training data"
    tokenizer = chat_tokenizer()
    assert task.prompts("policy", tokenizer) == [tokenizer(text)["input_ids"] for text in splits[1]]
    assert (
        load_task(config_for(folder)).describe()
        == task.describe()
        != load_task(config_for(folder, split_seed=1)).describe()
    )


def test_a_file_by_itself_and_a_single_saved_data_set_are_training_data(tmp_path):
    file = save(tmp_path / "data", "jsonl", train={"prompt": TEXTS}) / "train.jsonl"
    datasets.Dataset.from_dict({"prompt": TEXTS}).save_to_disk(tmp_path / "saved")
    for source in (file, tmp_path / "saved"):
        assert len(load_task(config_for(source, validation_examples=1)).rows("policy")) == 15


def test_parts_that_are_there_are_not_cut_from_the_training_data(tmp_path):
    parts = {part: {"prompt": [f"{part} {text}" for text in TEXTS]} for part in ("train", "validation", "test")}
    task = load_task(config_for(save(tmp_path / "data", "parquet", **parts), validation_examples=5))
    assert [len(task.rows(split)) for split in prompts.SPLITS] == [0, 20, 5, 20]
    assert all(row.prompt.startswith("validation ") for row in task.rows("validation"))
    assert task.notes() == ["data: 20 policy, 5 validation, 20 test rows"]


def test_token_ids_are_taken_as_they_are():
    tokenizer = chat_tokenizer()
    task = task_of({"prompt": [[3, 4, i] for i in range(20)]})
    assert {tuple(row) for row in task.prompts("policy", tokenizer)} <= {(3, 4, i) for i in range(20)}
    wrong = task_of({"prompt": [[3, 10**6]] * 9})
    with pytest.raises(GradeError, match="task.prompt_column: a prompt has the token id 1000000"):
        wrong.prompts("policy", tokenizer)


# --- columns and length ---


def test_columns_follow_the_prompts_that_were_kept():
    """The third prompts are too long: an index counts what is left."""
    texts = [f"{text} {'and more ' * 99 if i % 3 == 0 else ''}" for i, text in enumerate(TEXTS)]
    task, tokenizer = task_of({"prompt": texts, "solution": ANSWERS, "level": list(range(20))}), chat_tokenizer()
    with pytest.raises(ValueError, match="was not called"):
        task.columns("policy", [0])
    for limit in (None, 3):
        rows = task.prompts("policy", tokenizer, limit)
        found = task.columns("policy", [1, 1, 0])
        assert set(found) == {"solution", "level"} and found["level"][0] == found["level"][1] != found["level"][2]
        for row, level, answer in zip([rows[1], rows[1], rows[0]], found["level"], found["solution"], strict=True):
            assert tokenizer.decode(row).startswith(TEXTS[level]) and answer == ANSWERS[level] and level % 3
    assert task.conversations("policy", [0]) is None
    task.prompts("policy", tokenizer)
    left_out = 12 - len(task.kept["policy"])
    assert left_out and task.notes()[1] == (
        f"data: {left_out} policy prompts are left out: longer than task.prompt_max_tokens=64"
    )


def test_long_prompts_keep_their_last_tokens_after_what_opens_a_text():
    tokenizer = chat_tokenizer(bos=True)
    task = task_of({"prompt": TEXTS}, prompt_max_tokens=5, long_prompts="cut")
    for row, source in zip(task.prompts("policy", tokenizer), task.rows("policy"), strict=True):
        whole = tokenizer(source.prompt)["input_ids"]
        assert row == [tokenizer.bos_token_id, *whole[-4:]] and len(whole) > 6
    with pytest.raises(GradeError, match="is 5, and of the 12 policy .*Raise it, or set task.long_prompts"):
        task_of({"prompt": TEXTS}, prompt_max_tokens=5).prompts("policy", tokenizer)


# --- conversations ---


@pytest.mark.parametrize("column", ["prompt", "messages"])
@pytest.mark.parametrize("chat", [{}, {"system_prompt": "Be brief."}, {"chat_template_kwargs": {"thinking": False}}])
def test_conversations_are_what_the_template_writes(column, chat):
    tokenizer, settings = chat_tokenizer(), TokenizerConfig(**chat)
    task = task_of({column: chats(), "answer": ANSWERS}, settings)
    first = [{"role": "system", "content": "Be brief."}] if settings.system_prompt else []
    rows = task.prompts("validation", tokenizer)
    told = task.conversations("validation", range(len(rows)))
    expected = [
        tokenizer.apply_chat_template(
            [*first, *messages], add_generation_prompt=True, return_dict=False, **settings.chat_template_kwargs
        )
        for messages in told
    ]
    assert rows == expected and told[0][0]["role"] == "user" and len(rows) == 4
    text = tokenizer.decode(rows[0])
    assert text.endswith("<|assistant|>" if settings.chat_template_kwargs else "<|assistant|><think>")
    assert ("Be brief." in text) == bool(first)


def test_a_system_message_of_the_data_stays_and_a_last_answer_is_left_off():
    first, last = {"role": "system", "content": "Own."}, {"role": "assistant", "content": "No."}
    messages = [[first, *chat, last] for chat in chats()]
    task, tokenizer = task_of({"messages": messages}, TokenizerConfig(system_prompt="Other.")), chat_tokenizer()
    text = tokenizer.decode(task.prompts("test", tokenizer)[0])
    assert "Own." in text and "Other." not in text and "No." not in text
    assert "20 conversations end with an answer" in task.notes()[1]


def test_texts_go_through_the_template_where_the_settings_say_so():
    task, tokenizer = task_of({"prompt": TEXTS}, TokenizerConfig(chat=True)), chat_tokenizer()
    expected = [[{"role": "user", "content": row.prompt}] for row in task.rows("test")]
    assert task.prompts("test", tokenizer) == [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in expected
    ]
    assert task.conversations("test", [1]) == [expected[1]]


def test_a_tokenizer_without_template_is_refused_by_name():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(GradeError, match="model.name: its tokenizer has no chat template"):
        task_of({"prompt": chats()}).prompts("policy", tokenizer)


# --- what is refused ---


@pytest.mark.parametrize(
    ("columns", "task", "chat", "message"),
    [
        ({"question": TEXTS}, {}, None, "no column 'prompt': set task.prompt_column to one of question"),
        ({"prompt": TEXTS}, {"prompt_column": "p"}, None, "no column 'p'"),
        ({"prompt": []}, {}, None, "The train data of task.dataset=here is empty"),
        ({"prompt": ["", " ", None]}, {}, None, "has no prompt: all 3 rows are empty"),
        (
            {"prompt": ["a"] * 9, "chosen": ["b"] * 9, "rejected": ["b"] * 9},
            {"label_type": "pairs"},
            None,
            "no pair to learn from: in 9 of 9 rows the answers in the columns 'chosen' and 'rejected' are equal. Name",
        ),
        ({"prompt": ["", "", "a", "b"]}, {}, None, "2 usable rows .2 rows without a prompt are left out .train..: at"),
        ({"prompt": TEXTS[:2]}, {}, None, "has 2 usable rows: at least 3 are needed for validation, test and training"),
        ({"prompt": [1.5] * 9}, {}, None, "column 'prompt', holds float values: a prompt is a string"),
        ({"prompt": [["a"]] * 9}, {}, None, "holds a list with str values"),
        ({"prompt": chats(content=None)}, {}, None, "a message whose content is NoneType: every message needs a role"),
        ({"prompt": [[{"role": "user"}]] * 9}, {}, None, "a message whose content is NoneType"),
        ({"prompt": chats()}, {"long_prompts": "cut"}, None, "task.long_prompts is cut, but a conversation cannot be"),
        ({"prompt": TEXTS}, {}, {"system_prompt": "x"}, "dataset=here are texts. Set tokenizer.chat to true"),
        ({"prompt": [[1, 2]] * 9}, {}, {"chat": True}, "are token ids. Write the template into the ids"),
        ({"prompt": TEXTS}, {"label_type": "pairs"}, None, "no column 'chosen': task.label_type=pairs needs"),
    ],
)
def test_what_cannot_be_used_is_refused(columns, task, chat, message):
    with pytest.raises(GradeError, match=message):
        task_of(columns, None if chat is None else TokenizerConfig(**chat), **task)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "txt"])
def test_a_file_without_rows_is_told_in_our_words(tmp_path, kind):
    path = tmp_path / f"train.{kind}"
    path.write_bytes(b"")
    for name in (tmp_path, path):
        with pytest.raises(GradeError, match=rf"^task.dataset=.*: .*train.{kind} has 0 bytes. Write its rows"):
            load_task(config_for(name))
    if kind == "parquet":
        datasets.Dataset.from_dict({"prompt": []}).to_parquet(path)
    else:
        path.write_bytes({"csv": b"prompt,answer\n", "json": b"[]"}.get(kind, b" \n\n"))
    with pytest.raises(GradeError, match="task.dataset=.* (is empty: it has no rows|holds blank lines alone). .*ame "):
        load_task(config_for(path))


def test_files_that_cannot_be_used_are_refused(tmp_path):
    (tmp_path / "prompts.pdf").write_text("x")
    with pytest.raises(GradeError, match="a file that is none of parquet, csv, json, jsonl, txt"):
        load_task(config_for(tmp_path / "prompts.pdf"))
    with pytest.raises(GradeError, match=r"needs one train\.\* \(parquet, csv, json, jsonl or txt\)"):
        load_task(config_for(tmp_path))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"task": {"label_type": "pairs"}}, "label_type=pairs needs task.name=prompts"),
        (
            {"task": {"name": "prompts", "label_type": "classes"}},
            "is for labelled texts, but task.name=prompts has none",
        ),
        ({"task": {"name": "demo", "label_type": "numbers"}}, "numbers needs task.name=sentiment"),
        ({"tokenizer": {"system_prompt": "x"}}, "are for conversations, and task.name=sentiment continues texts"),
        ({"task": {"name": "prompts"}, "tokenizer": {"chat_template_kwargs": {"tokenize": False}}}, "has 'tokenize'"),
    ],
)
def test_settings_that_cannot_work_are_refused(changed, message):
    config = Config()
    for section, values in changed.items():
        for name, value in values.items():
            setattr(getattr(config, section), name, value)
    with pytest.raises(GradeError, match=message):
        validate(config)


# --- pairs ---


USER, SAID = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "expected"),
    [
        ("Q:", " yes", " no", Pair("Q:", " yes", " no")),
        (None, "The sky is blue.", "The sky is black.", Pair("The sky is", " blue.", " black.")),
        (None, "one", "two", Pair("", "one", "two")),
        ("Q:", "same", "same", None),
        ([USER], [GOOD], [BAD], Pair([USER], "good", "bad")),
        (None, [USER, SAID, USER, GOOD], [USER, SAID, USER, BAD], Pair([USER, SAID, USER], "good", "bad")),
        ("Hi?", [USER, GOOD], [USER, BAD], Pair([USER], "good", "bad")),
        ("Hi?", [GOOD], [BAD], Pair([USER], "good", "bad")),
        (None, [USER, GOOD], [USER, GOOD], None),
    ],
)
def test_pairs_are_read_as_trl_has_them(prompt, chosen, rejected, expected):
    assert read_pair(prompt, chosen, rejected, "here") == expected


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "message"),
    [
        (None, "text", [GOOD], "all must be strings, or all lists of messages"),
        ("Q:", None, "no", "holds NoneType as chosen"),
        ([USER], [GOOD, USER, GOOD], [BAD], "answers of 3 and 1 messages after the prompt"),
        (None, [GOOD], [BAD], "answers without a prompt"),
    ],
)
def test_pairs_of_other_forms_are_refused(prompt, chosen, rejected, message):
    with pytest.raises(GradeError, match=f"here.*{message}"):
        read_pair(prompt, chosen, rejected, "here")


def test_pairs_give_prompts_and_answers_of_different_rows():
    columns = {"chosen": [[*chat, GOOD] for chat in chats()], "rejected": [[*chat, BAD] for chat in chats()]}
    columns["rejected"][0] = columns["chosen"][0]
    task, tokenizer = task_of(columns, label_type="pairs"), chat_tokenizer()
    assert [len(task.rows(split)) for split in prompts.SPLITS] == [6, 7, 3, 3]
    assert "data: 1 pairs whose answers are equal are left out (train)" in task.notes()
    pair = task.pairs("reward", tokenizer)[0]
    chat = task.rows("reward")[0].prompt
    assert pair.prompt == tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert (tokenizer.decode(pair.chosen), tokenizer.decode(pair.rejected)) == ("good", "bad")
