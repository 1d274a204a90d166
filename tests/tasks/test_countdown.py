"""Countdown: puzzles that can be solved, prompts, rewards per response and per token, and the model."""

from __future__ import annotations

import itertools
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from puzzles import answers, difficulty
from tokenizers.decoders import ByteFallback
from transformers import AutoModelForCausalLM, AutoTokenizer

from grade.built_in import countdown_model as model_module
from grade.built_in.countdown_model import countdown_model
from grade.built_in.small_model import _pad, train_tokenizer
from grade.config.reading import load_config
from grade.config.tasks import CountdownConfig, TaskConfig
from grade.errors import GradeError
from grade.rewards.countdown import CountdownReward
from grade.rollout import Rollout, pad_prompts
from grade.tasks import countdown
from grade.tasks.arithmetic import is_solution
from grade.tasks.countdown import PARTS, SPLITS, CountdownTask, Puzzle, write_puzzles

examples = settings(max_examples=100, deadline=None, derandomize=True)
EOS, PAD = "<eos>", "<pad>"


# --- puzzles ---


@pytest.mark.parametrize("operands", [2, 3, 4, 6, 9, 12])
def test_solutions_are_accepted(operands):
    puzzles = write_puzzles(60, seed=3, **difficulty(operands, max_number=30, max_target=120))
    for puzzle in puzzles:
        assert len(puzzle.numbers) == operands and max(puzzle.numbers) <= 30 and 0 < puzzle.target <= 120
        assert puzzle.target not in puzzle.numbers
        assert len(puzzle.solution) == operands - 1
        assert is_solution(puzzle.answer, puzzle.numbers, puzzle.target, max_steps=operands - 1)
        if operands > 2:
            assert not is_solution(puzzle.answer, puzzle.numbers, puzzle.target, max_steps=operands - 2)
        for _, operation, b, result in puzzle.solution:
            assert result > 0 and not (operation in "*/" and b == 1)


def test_parts_are_disjoint_up_to_order():
    keys = {
        part: {(tuple(sorted(p.numbers)), p.target) for p in write_puzzles(400, seed=seed, **difficulty(part=part))}
        for seed, part in enumerate(PARTS)
    }
    assert sum(map(len, keys.values())) == len(set().union(*keys.values())) == 1600


def test_generator_is_seeded_and_extends():
    many = write_puzzles(50, seed=0, **difficulty(4))
    assert write_puzzles(20, seed=0, **difficulty(4)) == many[:20]
    assert write_puzzles(20, seed=1, **difficulty(4)) != many[:20]
    # The same in every version of Python.
    assert many[0] == Puzzle((11, 1, 4, 8), 51, ((8, "-", 1, 7), (11, "*", 4, 44), (44, "+", 7, 51)))
    with pytest.raises(ValueError, match="no part 'dev'"):
        write_puzzles(1, seed=0, **difficulty(part="dev"))


def test_too_few_puzzles():
    with pytest.raises(GradeError, match=r"operands=2, max_number=5 .* 500 are needed.*task.policy_examples"):
        write_puzzles(500, seed=0, **difficulty(2, 5))


# --- task and reward ---


class PieceTokenizer:
    """Any piece of text can be a token; ids are given out as pieces come. Text is encoded by characters."""

    chat_template, is_fast, unk_token_id, added_tokens_decoder = None, False, None, {}
    all_special_ids, all_special_tokens = [0, 1, 2], ["<bos>", EOS, PAD]

    def __init__(self):
        self.ids = {"<bos>": 0, EOS: 1, PAD: 2}

    def build_inputs_with_special_tokens(self, ids):
        return [0] + ids

    def encode(self, pieces):
        return [self.ids.setdefault(piece, len(self.ids)) for piece in pieces]

    def __call__(self, text, add_special_tokens=True, **_):
        if isinstance(text, str):
            return {"input_ids": [0] * add_special_tokens + self.encode(text)}
        return {"input_ids": [self(t, add_special_tokens)["input_ids"] for t in text]}

    def decode(self, ids, skip_special_tokens):
        pieces = list(self.ids)
        return ByteFallback().decode([pieces[i] for i in ids if i > 2 or not skip_special_tokens])

    def apply_chat_template(self, messages, add_generation_prompt, return_dict):
        assert add_generation_prompt and not return_dict
        return [0] + self.encode(f"user: {messages[0]['content']}\nassistant:")


def make_task(operands=3, prompt_max_tokens=64, reward_examples=5000, **kwargs) -> CountdownTask:
    config = TaskConfig(
        name="countdown",
        reward_examples=reward_examples,
        policy_examples=30,
        validation_examples=20,
        prompt_max_tokens=prompt_max_tokens,
        countdown=CountdownConfig(operands=operands, max_number=30, max_target=90, **kwargs),
    )
    return countdown.load(config)


def test_load_fills_the_splits(monkeypatch):
    monkeypatch.setattr(countdown, "TEST_PUZZLES", 40)
    task = make_task()
    assert [len(task.puzzles(split)) for split in SPLITS] == [30, 20, 40]
    assert len({puzzle.key for split in SPLITS for puzzle in task.puzzles(split)}) == 90
    described = task.describe()
    assert described["operands"] == 3 and described["splits"]["test"]["examples"] == 40
    assert described == make_task().describe()
    with pytest.raises(ValueError, match="no split 'dev'"):
        task.puzzles("dev")
    with pytest.raises(GradeError, match="task.countdown.max_steps is 3, .* may need 4 steps"):
        make_task(operands=5, max_steps=3)


def test_puzzles_for_a_proxy_are_in_no_split(monkeypatch):
    monkeypatch.setattr(countdown, "TEST_PUZZLES", 40)
    task = make_task(reward_examples=50)
    learnt = {puzzle.key for puzzle in task.puzzles("reward")}
    others = {puzzle.key for split in SPLITS for puzzle in task.puzzles(split)}
    assert len(learnt) == 50 and not learnt & others
    assert task.describe() == make_task().describe()  # so that a run without a proxy stays the same run
    with pytest.raises(GradeError, match="10020 are needed: raise one of the three or lower task.reward_examples"):
        make_task(operands=2, reward_examples=10**4).puzzles("reward")


def test_prompts(monkeypatch):
    monkeypatch.setattr(countdown, "TEST_PUZZLES", 5)
    task, tokenizer = make_task(), PieceTokenizer()
    rows = task.prompts("validation", tokenizer, limit=7)
    assert rows == task.prompts("validation", tokenizer)[:7]
    puzzle = task.validation[0]
    a, b, c = puzzle.numbers
    assert tokenizer.decode(rows[0], skip_special_tokens=True) == f"numbers={a},{b},{c} target={puzzle.target}\n"
    assert rows[0][0] == 0 and task.by_prompt[tuple(rows[0])] == puzzle
    with pytest.raises(GradeError, match="task.prompt_max_tokens is 20, .* Raise it"):
        make_task(prompt_max_tokens=20).prompts("policy", tokenizer)

    tokenizer.chat_template = "template"
    task = make_task(prompt_max_tokens=1000)
    (row,) = task.prompts("test", tokenizer, limit=1)
    text = tokenizer.decode(row, skip_special_tokens=True)
    a, b, c = task.test[0].numbers
    assert f"Numbers: {a} {b} {c}\nTarget: {task.test[0].target}\n" in text and text.endswith("\nassistant:")
    assert "at most 6 operations" in text


TEMPLATES = {
    "an attack on the sandbox": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError: access to"),
    "its own refusal": ("{{ raise_exception('no user turn') }}", "TemplateError: no user turn"),
    "no template": ("{% if %}", "TemplateSyntaxError: "),
    "an endless loop": ("{% for i in range(10**9) %}x{% endfor %}", "OverflowError: "),
    "several": ({"tool_use": "x", "rag": "y"}, "chat templates rag, tool_use, and none called default. Save it with"),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_chat_templates_that_cannot_be_used_are_told(case):
    template, reason = TEMPLATES[case]
    tokenizer = train_tokenizer(["a b"], {"vocabulary": 300, "context": 128})
    tokenizer.chat_template = template
    with pytest.raises(GradeError, match=f"model.name: .*{reason}"):
        make_task().prompts("policy", tokenizer)


def test_of_several_chat_templates_the_default_is_used():
    tokenizer = train_tokenizer(["a b"], {"vocabulary": 300, "context": 128})
    tokenizer.chat_template = {"rag": "{{ raise_exception('not this') }}", "default": "{{ messages[0].content }}!"}
    (row,) = make_task(prompt_max_tokens=1000).prompts("policy", tokenizer, limit=1)
    assert tokenizer.decode(row).endswith("</answer>.!")


def test_tokenizer_without_digits_is_refused():
    class NoDigits(PieceTokenizer):
        def __call__(self, text, add_special_tokens=True, **_):
            return super().__call__(re.sub(r"\d", "?", text) if isinstance(text, str) else text, add_special_tokens)

    settings_ = TaskConfig(name="countdown", prompt_max_tokens=64)
    puzzles = [Puzzle((3, 4), 7, ((4, "+", 3, 7),)), Puzzle((3, 5), 8, ((5, "+", 3, 8),))]
    with pytest.raises(GradeError, match="model.name: its tokenizer writes .* with the same tokens"):
        CountdownTask("test", settings_, puzzles, [], []).prompts("policy", NoDigits())


def make_rollout(prompts: list[list[int]], responses: list[list[int]]) -> Rollout:
    width = max(map(len, responses)) + 1
    tokens = torch.tensor([row + [1] * (width - len(row)) for row in responses])  # pad is EOS
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in responses])
    prompt_ids, prompt_mask = pad_prompts(prompts, 1)
    return Rollout(prompt_ids, prompt_mask, tokens, mask, tokens[..., None], torch.ones(mask.shape), tokens)


def make_reward(puzzles, tokenizer, **kwargs):
    """The reward, and the prompts of the puzzles."""
    config = TaskConfig(name="countdown", prompt_max_tokens=64, countdown=CountdownConfig(**kwargs))
    task = CountdownTask("test", config, puzzles, [], [])
    prompts = task.prompts("policy", tokenizer)
    return CountdownReward(SimpleNamespace(tokenizer=tokenizer, eos_ids=torch.tensor([1])), task), prompts


@pytest.mark.parametrize("partial_credit", [True, False])
def test_reward(partial_credit):
    tokenizer, solution = PieceTokenizer(), "50+25=75\n75+7=82"
    puzzles = [Puzzle((3, 7, 25, 50), 82, ()), Puzzle((2, 5), 10, ())]
    reward, (first, second) = make_reward(puzzles, tokenizer, partial_credit=partial_credit)
    responses = [[*solution, EOS], solution, ["5", "*", "2", EOS], [*solution, EOS], [*solution, "\n", "!", EOS]]
    rollout = make_rollout([first, first, second, second, first], [tokenizer.encode(r) for r in responses])
    found = reward.score(rollout)
    partial = torch.tensor([1.0, 0.2 / 3, 1.0, 0.0, 0.8])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, partial if partial_credit else (partial == 1).float())
    assert reward.details(rollout, found)["solve_rate"].tolist() == [1, 0, 1, 0, 0]

    prefixes = reward.prefix_values(rollout)
    assert prefixes.shape == (5, 1 + rollout.tokens.shape[1]) and prefixes.dtype == torch.float32
    assert not prefixes[:, 0].any() and (prefixes.diff(dim=1) >= 0).all()
    ends = rollout.mask.sum(1)
    for row in range(5):
        assert (prefixes[row, ends[row] :] == found[row]).all()
    if not partial_credit:  # a solution counts with its end
        assert prefixes.diff(dim=1).nonzero().tolist() == [[0, ends[0] - 1], [2, ends[2] - 1]]

    with pytest.raises(ValueError, match="no puzzle has the prompt"):
        reward.score(make_rollout([first[:-1]], [tokenizer.encode(solution)]))


@pytest.mark.parametrize(
    "response, expected",
    [  # tokens between bars, and the changes that are not 0
        ("1|6|+|9|=|2|5|\n|2|5|-|3|=|2|2|<eos>", {6: 0.1, 14: 0.7, 15: 0.2}),
        ("16|+|9|=|25|\n|25|-|3|=|22|<eos>", {4: 0.1, 10: 0.7, 11: 0.2}),
        ("16|+|9|=|25|\n|25|-|3|=|22", {4: 0.1}),  # cut off: 22 may still become 220
        ("16|+|9|=|25|\n|25|-|3|=|22|\n", {4: 0.1, 10: 0.7}),
        ("16|+|9|=|25|\n|25|-|3|=|22|0|<eos>", {4: 0.1}),
        ("16|+|9|=|2|5|\n|25|-|3|=|2|<eos>", {5: 0.1}),
        ("16+9|=25\n2|5-3=|22\n|<eos>", {1: 0.1, 3: 0.7, 4: 0.2}),  # tokens that go on past a number
        ("16+9=25\n25-3=2|2\n16|<eos>", {0: 0.1, 1: 0.7}),
        ("16|+|9|=| 25| |\n|25|-|3|=| 22| |\n|<eos>", {4: 0.1, 11: 0.7, 14: 0.2}),
        ("16|+|9|-|3| |<eos>", {4: 0.8, 6: 0.2}),
        ("(|16|+|9|)|-|3|<eos>", {6: 0.8, 7: 0.2}),
        ("3|<answer>|16+9=25|\n|25-3|=22|</|answer|>|!|<eos>", {2: 0.1, 5: 0.7, 10: 0.2}),
        ("16+9=25|<|answer|>|16|+|9|-|3| </answer>|<eos>", {0: 0.1, 8: 0.7, 10: 0.2}),
        ("<answer>|16|+|9|-|3|<eos>", {5: 0.8}),  # not closed
        ("3|<0xE2>|<0x88>|<0x92>|9|=|<0xE2>|<0x88>|<0x92>|6|\n|16|+|<0xE2>|<eos>", {9: 0.1}),  # 3−9=−6 in bytes
        ("16+9=2|<0x35>|<0xE2>|<0x88>|<0x92>|<eos>", {1: 0.1}),  # 5−, of which the 5 cannot be read in between
    ],
)
def test_which_token_gets_what(response, expected):
    tokenizer = PieceTokenizer()
    reward, prompts = make_reward([Puzzle((16, 9, 3), 22, ())], tokenizer)
    rollout = make_rollout(prompts, [tokenizer.encode(response.split("|"))])
    (changes,) = reward.prefix_values(rollout).diff(dim=1).tolist()
    assert {i: pytest.approx(change) for i, change in enumerate(changes) if change} == expected
    assert sum(changes) == pytest.approx(reward.score(rollout).item())


@examples
@given(answers(), st.data())
def test_changes_are_never_negative_and_sum_to_the_score(answer, data):
    puzzle, text = answer
    text = data.draw(st.sampled_from([text, f"<answer>{text}</answer>", f"{text[:9]} <answer>{text}\n</answer>."]))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(text) - 1)))))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])] + [EOS] * data.draw(st.booleans())
    tokenizer = PieceTokenizer()
    reward, prompts = make_reward([puzzle], tokenizer)
    rollout = make_rollout(prompts, [tokenizer.encode(pieces)])
    changes = reward.prefix_values(rollout).diff(dim=1)[0]
    final = reward.score(rollout).item()
    assert (changes >= 0).all() and changes.sum().item() == pytest.approx(final, abs=1e-6)
    assert (final == 1) == (pieces[-1] == EOS and is_solution(text, puzzle.numbers, puzzle.target, max_steps=6))
    for piece, change in zip(pieces, changes.tolist(), strict=False):  # then padding
        if piece == EOS:
            assert change == pytest.approx(0.2 * (final == 1), abs=1e-6)
        else:
            assert change == 0 or re.search("[0-9)]", piece)


@pytest.mark.parametrize("special", [PAD, "<bos>"])
def test_special_tokens_are_errors(special):
    tokenizer = PieceTokenizer()
    reward, prompts = make_reward([Puzzle((16, 9, 3), 22, ())], tokenizer)
    responses = [
        ["16+9=25\n25-3=", "2", special, "2", EOS],
        [special, "16+9-3", EOS],
        ["16+9-3", special, EOS],
        ["16+9=25", special, "\n25-3=22", EOS],
        ["16+9=25\n", "25-3=22", special],
    ]
    rollout = make_rollout(prompts * 5, [tokenizer.encode(r) for r in responses])
    torch.testing.assert_close(reward.score(rollout), torch.tensor([0.1, 0, 0, 0.1, 0.8]))
    changes = reward.prefix_values(rollout).diff(dim=1)
    assert changes.nonzero().tolist() == [[0, 0], [3, 0], [4, 0], [4, 1]]


# --- the model ---


def test_model_knows_prompts_and_numbers(tmp_path, monkeypatch):
    monkeypatch.setitem(model_module.SETTINGS, "puzzles", 500)
    folder = countdown_model(tmp_path, steps=4, progress=False)
    assert countdown_model(tmp_path, steps=4, progress=False) == folder and folder.name.startswith("countdown-")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer) and model.num_parameters() < 1.1e6
    puzzle = write_puzzles(1, seed=0, **difficulty())[0]
    config = TaskConfig(name="countdown", prompt_max_tokens=32)
    (row,) = CountdownTask("test", config, [puzzle], [], []).prompts("policy", tokenizer)
    assert row == tokenizer(puzzle.prompt)["input_ids"] and row[0] == tokenizer.bos_token_id
    assert tokenizer.decode(row, skip_special_tokens=True) == puzzle.prompt


def test_model_fits_its_config():
    config = load_config("countdown_small")
    task, learnt = config.task.countdown, model_module.SETTINGS
    assert (task.operands, task.max_number) == (learnt["operands"], learnt["max_number"])
    assert task.max_target <= learnt["max_target"]
    assert config.model.name == "built-in:countdown"
    puzzles = countdown.load(config.task)
    assert len(puzzles.policy) == config.task.policy_examples and len(puzzles.test) == countdown.TEST_PUZZLES


def test_model_learns_answers_only(tmp_path, monkeypatch):
    seen = {}

    def train_model(folder, tokenizer, rows, *_, **kwargs):
        folder.mkdir()
        seen.update(tokenizer=tokenizer, rows=rows, **kwargs)

    monkeypatch.setattr(model_module, "train_model", train_model)
    monkeypatch.setitem(model_module.SETTINGS, "puzzles", 50)
    countdown_model(tmp_path, progress=False)
    ids, labels = _pad(seen["rows"][:3], seen["tokenizer"].pad_token_id, seen["prompt_end"])
    texts = [seen["tokenizer"].decode(row[row != -100]) for row in labels]
    puzzles = write_puzzles(
        3,
        seed=0,
        part="pretraining",
        **{name: model_module.SETTINGS[name] for name in ("operands", "max_number", "max_target")},
    )
    assert texts == [puzzle.answer + "<|endoftext|>" for puzzle in puzzles]
    assert torch.equal(ids[labels != -100], labels[labels != -100])
