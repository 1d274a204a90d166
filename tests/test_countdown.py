"""Countdown: puzzles that can be solved, a judge that cannot be fooled, rewards per response and per token."""

from __future__ import annotations

import ast
import itertools
import operator
import re
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from grade import countdown_model as model_module
from grade.config import CountdownConfig, GradeError, TaskConfig
from grade.config_io import load_config
from grade.countdown_model import countdown_model
from grade.rollout import Rollout, pad_prompts
from grade.small_model import _pad
from grade.tasks import countdown
from grade.tasks.arithmetic import is_solution, score, scores
from grade.tasks.countdown import PARTS, SPLITS, CountdownTask, Puzzle, write_puzzles

examples = settings(max_examples=100, deadline=None, derandomize=True)

NUMBERS, TARGET = (3, 7, 25, 50), 82
CREDIT = 0.2 / 3  # of one of the three steps that four numbers allow


def rate(text, numbers=NUMBERS, target=TARGET, *, max_steps=6, ended=True, partial_credit=True):
    return score(text, numbers, target, max_steps=max_steps, ended=ended, partial_credit=partial_credit)


def difficulty(operands=3, max_number=12, max_target=60, part="policy"):
    return {"operands": operands, "max_number": max_number, "max_target": max_target, "part": part}


# --- puzzles ---


def reachable(numbers: tuple[int, ...]) -> set[Fraction]:
    """All values that some expression over some of the numbers has."""
    found = set(numbers)
    for i, j in itertools.permutations(range(len(numbers)), 2):
        a, b = numbers[i], numbers[j]
        rest = tuple(n for k, n in enumerate(numbers) if k not in (i, j))
        for value in [a + b, a - b, a * b] + ([Fraction(a, b)] if b else []):
            found |= reachable((*rest, value))
    return found


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


def test_brute_force_reaches_every_target():
    for operands, n in ((2, 40), (3, 40), (4, 5)):
        for puzzle in write_puzzles(n, seed=1, **difficulty(operands)):
            assert puzzle.target in reachable(puzzle.numbers)


def test_parts_are_disjoint_up_to_order():
    keys = {part: {(tuple(sorted(p.numbers)), p.target) for p in write_puzzles(400, seed=seed, **difficulty(part=part))}
            for seed, part in enumerate(PARTS)}
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


# --- the judge ---


@pytest.mark.parametrize("text", [
    "50 + 25 = 75\n75 + 7 = 82",
    "50+25=75, 75+7=82",
    "50 + 25 = 75; 75 + 7 = 82;\n",
    "50 + 25 = 75 75 + 7 = 82 ",
    "50 + 25 = 75\r\n\n75 + 7 = 82\n\n",
    "(50 + 25) + 7",
    "7+25+50 = 82",
    "((7)) + ((25 + (50)))",
    "50 + 7 + 25",
    "<answer>(50+25)+7</answer>",
    "Let me think: 3*7=22?\n<answer>\n50+25=75\n75+7=82\n</answer> That is it.",
    "50+25=75\n75+7",
])
def test_solutions(text):
    assert is_solution(text, NUMBERS, TARGET, max_steps=6)
    assert rate(text) == 1.0
    assert rate(text, partial_credit=False) == 1.0
    assert rate(text, ended=False) <= 0.8 and rate(text, ended=False, partial_credit=False) == 0.0


def test_signs_and_fractions():
    assert is_solution("3 − 7 = −4\n5 × 2 = 10\n−4 + 10 = 6", (3, 7, 5, 2), 6, max_steps=3)
    assert is_solution("7 ÷ 2 * 4", (7, 2, 4), 14, max_steps=2)
    assert is_solution("3 - -4", (3, -4), 7, max_steps=1)
    assert is_solution("8/(3-8/3)", (8, 3, 8, 3), 24, max_steps=3)
    assert not is_solution("7 / 2 = 3\n3 * 4 = 12", (7, 2, 4), 12, max_steps=2)


@pytest.mark.parametrize("text", [
    "",
    "82",
    "82 = 82",
    "50 + 25 = 75",  # the target is not reached
    "50 + 25 = 75\n75 + 7 = 82\n3",  # trailing number
    "50 + 25 = 75\n75 + 7 = 82.",
    "50 + 25 = 75\n75 + 7 = 82\n82 - 3 = 79",  # goes on past it
    "50 + 25 = 76\n76 + 6 = 82",  # wrong
    "50 + 32",  # foreign number
    "50 + 25 + 7 = 82 = 82",
    "50 + 25 = 75 + 7 = 82",  # 75 + 7 is not 50 + 25
    "50 + 50 - 25 + 7",  # 50 twice
    "50 + 25 = 75\n75 + 7 = 82\n75 + 7 = 82",  # 75 twice
    "(50 + 25 + 7",
    "50 + 25) + 7",
    "50 + 25 7",
    "5 0 + 25 + 7",
    "50 + (25 + 7",
    "50 ++ 25 + 7",
    "50 25 7",
    "50 + 25 + 7 + (3 - 3)",
    "50 + 25 + 7 + 0",
    "50 + 2_5 + 7",
    "٥٠ + 25 + 7",
    "50 + 25 + 7 = 8 2",
    "50 + 25 + 7.0",
    "50 + 25 + 7 #",
    "<answer>50 + 25 + 7",  # not closed
    "50 + 25 + 7 <answer></answer>",
    "50 + 25 + 7 <answer>50 + 25</answer>",
    "<answer>50 + 25</answer><answer>50 + 25 + 7</answer>",  # the first one counts
    "<answer><answer>50 + 25 + 7</answer>",
])
def test_no_solutions(text):
    assert not is_solution(text, NUMBERS, TARGET, max_steps=6)
    assert rate(text) <= 0.8 and rate(text, partial_credit=False) == 0.0


def test_division_by_zero_and_by_results():
    assert not is_solution("5 / (3 - 3)", (5, 3, 3), 0, max_steps=3)
    assert not is_solution("3 - 3 = 0\n5 / 0 = 0", (5, 3, 3), 0, max_steps=3)
    assert rate("3 - 3 = 0\n5 / 0 = 0", (5, 3, 3), 7) == pytest.approx(0.1)


def test_steps_are_counted_everywhere():
    numbers = (1, 2, 3, 4)
    for text in ("1+2+3+4", "1+2=3\n3+3=6\n6+4=10", "(1+2)+(3+4)", "1+2+3=6\n6+4"):
        assert is_solution(text, numbers, 10, max_steps=3)
        assert not is_solution(text, numbers, 10, max_steps=2)


@pytest.mark.parametrize("text, ended, expected", [
    ("", True, 0),
    ("50 + 25 = 75", False, 0),  # 75 may still become 750
    ("50 + 25 = 75", True, CREDIT),
    ("50 + 25 = 75\n", False, CREDIT),
    ("50 + 25 = 75\n7 * 3 = 21\n", False, 2 * CREDIT),
    ("50 + 25 = 75\n7 * 3 = 20\n75 + 7 = 82\n", True, CREDIT),  # nothing counts after an error
    ("50 + 25 = 75\n75 + 7 = 8", False, CREDIT),
    ("50 + 25 = 75\n75 + 7 = 8", True, CREDIT),
    ("50 + 25 = 75\n75 + 7 = 82", False, CREDIT),
    ("50 + 25 = 75\n75 + 7 = 82\n", False, 0.8),
    ("50 + 25 = 75\n75 + 7 = 82 ok", True, 0.8),
    ("50 + 25 = 75\n75 + 7 = 82\n82 - 3 = 79\n", True, 0.8),
    ("50 + 25 - 7 - 3", True, 3 * CREDIT),
    ("50 + 25 - 7 - 3", False, 0),
    ("50 + 25 = 75 <answer>", False, CREDIT),
    ("50 + 25 = 75 <answer>50 + 25 = 75\n75 + 7 = 82\n", True, 0.8),
    ("50 + 25 = 75 <answer>50 + 25 = 75\n7 * 3 = 21</answer>", True, 2 * CREDIT),
])
def test_partial_credit(text, ended, expected):
    assert rate(text, ended=ended) == pytest.approx(expected)


def test_idle_steps_earn_little():
    numbers = tuple(range(1, 10))
    text = "\n".join(f"{a}+{b}={a + b}" for a, b in ((1, 2), (3, 3), (4, 5), (6, 6), (7, 8)))
    assert 0 < rate(text, numbers, 999, max_steps=6) <= 0.2


def test_huge_inputs_are_quick():
    assert rate("(" * 200_000 + "50") == 0
    assert rate("9" * 200_000 + " + 1") == 0
    numbers = (999_999_999_999,) * 7
    assert rate("*".join(map(str, numbers)), numbers, 5) == pytest.approx(0.2)
    assert rate("1000000000000 + 1", (10**12, 1), 10**12 + 1) == 0  # 13 digits
    assert rate("(" * 50_000 + "50" + ")" * 50_000 + "+25+7") == 1.0


def oracle(text: str, numbers, target, max_steps) -> bool:
    """Whether a list of statements, one per line, is a solution: by Python's own parser."""
    pool, used, value = Counter(numbers), 0, None
    functions = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
                 ast.Div: lambda a, b: Fraction(a) / b}

    def evaluate(node):
        nonlocal used
        if isinstance(node, ast.BinOp) and type(node.op) in functions:
            left, right = evaluate(node.left), evaluate(node.right)
            used += 1
            return functions[type(node.op)](left, right)
        negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
        constant = node.operand if negative else node
        assert type(constant.value) is int
        number = -constant.value if negative else constant.value
        pool[number] -= 1
        assert pool[number] >= 0
        return number

    try:
        lines = text.split("\n")
        for position, line in enumerate(lines):
            left, *right = line.split("=")
            before = used
            value = evaluate(ast.parse(left.strip(), mode="eval").body)
            assert used > before and len(right) <= 1 and (right or position == len(lines) - 1)
            if right:
                assert value == int(right[0])
            pool[value] += 1
    except (AssertionError, AttributeError, SyntaxError, ValueError, ZeroDivisionError):
        return False
    return value == target and used <= max_steps


@st.composite
def answers(draw):
    """A puzzle and an answer to it: its solution as steps or as an expression, as it is or with mistakes."""
    operands = draw(st.integers(2, 5))
    puzzle = draw(st.sampled_from(POOL[operands]))
    text = puzzle.answer
    if draw(st.booleans()):
        parts: dict[int, list[str]] = {}
        for number in puzzle.numbers:
            parts.setdefault(number, []).append(str(number))
        for a, operation, b, result in puzzle.solution:
            expression = f"({parts[a].pop()}{operation}{parts[b].pop()})"
            parts.setdefault(result, []).append(expression)
        text = parts[puzzle.target].pop()
    for _ in range(draw(st.integers(0, 3))):
        i = draw(st.integers(0, len(text)))
        j = min(len(text), i + draw(st.integers(0, 2)))
        text = text[:i] + draw(st.text("0123456789+-*/=()\n ", max_size=2)) + text[j:]
    return puzzle, text


POOL = {n: write_puzzles(25, seed=7, **difficulty(n, max_number=10)) for n in range(2, 6)}


@settings(examples, max_examples=400)
@given(answers(), st.integers(1, 5))
def test_no_wrong_solution_is_accepted(answer, max_steps):
    puzzle, text = answer
    ours = is_solution(text, puzzle.numbers, puzzle.target, max_steps=max_steps)
    # Left out are texts that only one of the two allows: 007, two statements in a line or one in two lines; and signs,
    # which Python takes in more places.
    if ours and not re.search(r"\b0\d|=\s*-?\d+\s+[(\d]|\n\s*[-+*/=)]|[-+*/=(]\s*\n", text):
        lines = "\n".join(line for line in text.split("\n") if line.strip())
        assert oracle(lines, puzzle.numbers, puzzle.target, max_steps)
    if not ours and not re.search(r"(^|[-+*/=(\n])\s*[-+]", text):
        assert not oracle(text, puzzle.numbers, puzzle.target, max_steps)


@examples
@given(st.one_of(answers().map(lambda a: a[1]), st.text(), st.binary().map(lambda b: b.decode(errors="replace")),
                 st.text("0123456789+-*/=()<>answer,;\n ")),
       st.booleans(), st.booleans(), st.integers(1, 4))
def test_scores_grow_and_every_prefix_is_scored_alike(text, tagged, partial_credit, max_steps):
    text = f"{text[:3]}<answer>{text}</answer>{text[:4]}" if tagged else text
    numbers, target = (3, 7, 2, 5), 12
    kwargs = {"max_steps": max_steps, "partial_credit": partial_credit}
    growing, final = scores(text, numbers, target, ended=True, **kwargs)
    assert len(growing) == len(text) + 1 and growing == sorted(growing) and growing[-1] <= final <= 1
    for length in range(len(text) + 1):
        assert growing[length] == score(text[:length], numbers, target, ended=False, **kwargs)
        assert growing[length] <= score(text[:length], numbers, target, ended=True, **kwargs)


@examples
@given(answers())
def test_mutated_solutions_grow(answer):
    puzzle, text = answer
    growing, final = scores(text, puzzle.numbers, puzzle.target, max_steps=4, ended=True, partial_credit=True)
    assert growing == sorted(growing) and growing[-1] <= min(final, 0.8)
    assert (final == 1.0) == is_solution(text, puzzle.numbers, puzzle.target, max_steps=4)


# --- task and reward ---


class CharacterTokenizer:
    """Ids are code points; 0 is BOS, 1 is EOS and pad."""

    chat_template = None

    def __call__(self, text, add_special_tokens=True, **_):
        if isinstance(text, str):
            return {"input_ids": [0] * add_special_tokens + [ord(c) for c in text]}
        return {"input_ids": [self(t, add_special_tokens)["input_ids"] for t in text]}

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return "".join(chr(i) for i in ids if i > 1)

    def apply_chat_template(self, messages, add_generation_prompt, return_dict):
        assert add_generation_prompt and not return_dict
        return [0] + [ord(c) for c in f"user: {messages[0]['content']}\nassistant:"]


def make_task(operands=3, prompt_max_tokens=64, **kwargs) -> CountdownTask:
    config = TaskConfig(
        name="countdown", policy_examples=30, validation_examples=20, prompt_max_tokens=prompt_max_tokens,
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
    with pytest.raises(ValueError, match="no split 'reward'"):
        task.puzzles("reward")
    with pytest.raises(GradeError, match="task.countdown.max_steps is 3, .* may need 4 steps"):
        make_task(operands=5, max_steps=3)


def test_prompts(monkeypatch):
    monkeypatch.setattr(countdown, "TEST_PUZZLES", 5)
    task, tokenizer = make_task(), CharacterTokenizer()
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


def test_tokenizer_without_digits_is_refused():
    class NoDigits(CharacterTokenizer):
        def __call__(self, text, add_special_tokens=True, **_):
            return super().__call__(re.sub(r"\d", "?", text) if isinstance(text, str) else text, add_special_tokens)

    settings_ = TaskConfig(name="countdown", prompt_max_tokens=64)
    puzzles = [Puzzle((3, 4), 7, ((4, "+", 3, 7),)), Puzzle((3, 5), 8, ((5, "+", 3, 8),))]
    with pytest.raises(GradeError, match="model.name: its tokenizer writes .* with the same tokens"):
        CountdownTask("test", settings_, puzzles, [], []).prompts("policy", NoDigits())


def make_rollout(prompts: list[list[int]], texts: list[str], ended: list[bool]) -> Rollout:
    ids = [[ord(c) for c in text] + [1] * end for text, end in zip(texts, ended, strict=True)]
    width = max(map(len, ids)) + 1
    tokens = torch.tensor([row + [1] * (width - len(row)) for row in ids])  # pad is EOS
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in ids])
    prompt_ids, prompt_mask = pad_prompts(prompts, 1)
    return Rollout(prompt_ids, prompt_mask, tokens, mask, tokens[..., None], torch.ones(mask.shape), tokens)


@pytest.mark.parametrize("partial_credit", [True, False])
def test_reward(partial_credit):
    numbers, target = (3, 7, 25, 50), 82
    config = TaskConfig(
        name="countdown", prompt_max_tokens=64, countdown=CountdownConfig(partial_credit=partial_credit)
    )
    task = CountdownTask("test", config, [Puzzle(numbers, target, ()), Puzzle((2, 5), 10, ())], [], [])
    tokenizer = CharacterTokenizer()
    first, second = task.prompts("policy", tokenizer)
    reward = task.make_reward(SimpleNamespace(tokenizer=tokenizer, eos_ids=torch.tensor([1])))
    solution = "50+25=75\n75+7=82"
    rollout = make_rollout(
        [first, first, second, second, first],
        [solution, solution, "5*2", solution, solution + "\n!"],
        [True, False, True, True, True],
    )
    assert not reward.differentiable and not reward.shares_base_pass
    found = reward.from_tokens(rollout)
    partial = torch.tensor([1.0, CREDIT, 1.0, 0.0, 0.8])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, partial if partial_credit else (partial == 1).float())
    assert reward.solved(rollout).tolist() == [True, False, True, False, False]
    assert reward.details(rollout)["solve_rate"].tolist() == [1, 0, 1, 0, 0]

    prefixes = reward.prefix_scores(rollout)
    assert prefixes.shape == (5, 1 + rollout.tokens.shape[1]) and prefixes.dtype == torch.float32
    assert not prefixes[:, 0].any() and (prefixes.diff(dim=1) >= 0).all()
    ends = rollout.mask.sum(1)
    for row in range(5):
        assert (prefixes[row, ends[row]:] == found[row]).all()
    if partial_credit:  # a step counts with the newline after it, the last one with the end
        newline, end = solution.index("\n") + 1, len(solution) + 1
        expected = torch.tensor([0.0] * newline + [CREDIT] * (end - newline) + [1.0])
        torch.testing.assert_close(prefixes[0, : end + 1], expected)

    with pytest.raises(ValueError, match="no puzzle has the prompt"):
        reward.from_tokens(make_rollout([first[:-1]], [solution], [True]))


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
    found = {name: getattr(config.task.countdown, name) for name in ("operands", "max_number", "max_target")}
    assert found == {name: model_module.SETTINGS[name] for name in found}
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
    puzzles = write_puzzles(3, seed=0, part="pretraining", **{
        name: model_module.SETTINGS[name] for name in ("operands", "max_number", "max_target")})
    assert texts == [puzzle.answer + "<|endoftext|>" for puzzle in puzzles]
    assert torch.equal(ids[labels != -100], labels[labels != -100])
