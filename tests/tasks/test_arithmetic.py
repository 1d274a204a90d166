"""The judge of Countdown: it accepts solutions and nothing else, and its scores never fall as a text grows."""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from puzzles import answers

from grade.tasks.arithmetic import hindsight_rewards, is_solution, response_reward

examples = settings(max_examples=100, deadline=None, derandomize=True)

NUMBERS, TARGET = (3, 7, 25, 50), 82
CREDIT = 0.2 / 3  # of one of the three steps that four numbers allow


def rate(text, numbers=NUMBERS, target=TARGET, *, max_steps=6, ended=True, partial_credit=True):
    return response_reward(text, numbers, target, max_steps=max_steps, ended=ended, partial_credit=partial_credit)


@pytest.mark.parametrize(
    "text",
    [
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
    ],
)
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


@pytest.mark.parametrize(
    "text",
    [
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
    ],
)
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


@pytest.mark.parametrize(
    "text, ended, expected",
    [
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
        ("<answer>50 + 25 = 75", False, 0),
        ("<answer>50 + 25 = 75", True, CREDIT),
        ("<answer>50 + 25 + 7", True, 0.8),
        ("50 + 25 = 75 <answer>50 + 25 = 75\n75 + 7 = 82\n", True, 0.8),
        ("50 + 25 = 75 <answer>50 + 25 = 75\n7 * 3 = 21</answer>", True, 2 * CREDIT),
    ],
)
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
    functions = {
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.Div: lambda a, b: Fraction(a) / b,
    }

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
@given(
    st.one_of(
        answers().map(lambda a: a[1]),
        st.text(),
        st.binary().map(lambda b: b.decode(errors="replace")),
        st.text("0123456789+-*/=()<>answer,;\n "),
    ),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(1, 4),
)
def test_scores_never_fall_and_count_from_the_last_digit(text, tagged, ended, partial_credit, max_steps):
    text = f"{text[:3]}<answer>{text}</answer>{text[:4]}" if tagged else text
    numbers, target = (3, 7, 2, 5), 12
    kwargs = {"max_steps": max_steps, "partial_credit": partial_credit}
    earned, final = hindsight_rewards(text, numbers, target, ended=ended, **kwargs)
    assert len(earned) == len(text) + 1 and earned[0] == 0 and earned == sorted(earned)
    assert final == earned[-1] or (final == 1.0 and ended)
    growing = [response_reward(text[:n], numbers, target, ended=False, **kwargs) for n in range(len(text) + 1)]
    assert growing == sorted(growing) and growing[-1] <= final <= 1
    for n in range(len(text) + 1):
        # Not before it could have been had by ending there (or by closing the tag that is open there) ...
        closed = response_reward(text[:n] + "</answer>", numbers, target, ended=True, **kwargs)
        at_once = response_reward(text[:n], numbers, target, ended=True, **kwargs)
        assert growing[n] <= at_once
        assert growing[n] <= earned[n] <= max(at_once, closed, earned[n - 1] if n else 0)
        if n and earned[n] > earned[n - 1]:
            assert text[n - 1] in "0123456789)"


@pytest.mark.parametrize(
    "text, ended, expected",
    [  # the lengths of the beginnings with which the credit rises
        ("50 + 25 = 75 \n75 + 7 = 82", True, {12: CREDIT, 25: 0.8}),
        ("50 + 25 = 75\n75 + 7 = 82", False, {12: CREDIT}),  # 82 may still become 820
        ("50 + 25 = 75\n75 + 7 = 82 ", False, {12: CREDIT, 24: 0.8}),
        ("50 + 25 = 75\n75 + 7 = 8", True, {12: CREDIT}),
        ("(50 + 25) + 7 \n", True, {13: 0.8}),
        ("((50 + 25) + 7)", True, {15: 0.8}),
        ("50 + 25 - 7 - 3 \n", False, {}),
        ("50+25=75 <answer>50+25+7 </answer> ok", True, {8: CREDIT, 24: 0.8}),
        ("50+25=75<answer>50+25=75\n75+7=82</answer>", False, {8: CREDIT, 32: 0.8}),
        ("<answer>50+25=75", True, {16: CREDIT}),  # not closed
    ],
)
def test_credit_counts_from_the_last_digit(text, ended, expected):
    earned, _ = hindsight_rewards(text, NUMBERS, TARGET, max_steps=6, ended=ended, partial_credit=True)
    assert {n: pytest.approx(b) for n, (a, b) in enumerate(pairwise(earned), start=1) if b > a} == expected
    assert not any(hindsight_rewards(text, NUMBERS, TARGET, max_steps=6, ended=ended, partial_credit=False)[0])
