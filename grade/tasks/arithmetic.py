"""Reads arithmetic that a model wrote and rewards it: steps from given numbers to a target, checked exactly.

What is read, as one grammar:

    text       = statement, ... with newlines, commas, semicolons or spaces between them
    statement  = expression "=" integer          the last statement may leave out its "= integer"
    expression = + - * / (or × ÷ −) and brackets over integers, as usual in arithmetic

So `50 + 25 = 75` lines are a list of steps and `(50 + 25) + 7` is a single expression. Every number in an expression
is a given number or the result of an earlier statement, and is used up. A text is read character by character and
never again, which makes the reward of everything that comes before a character independent of it.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction

STEP_CREDIT = 0.2
"""For all the steps together that do not reach the target."""
TARGET_CREDIT = 0.8
"""For reaching the target; a response that also ends there is a solution, and gets 1."""
MAX_DIGITS = 12

_DIGITS = "0123456789"
_OPEN, _CLOSE = "<answer>", "</answer>"
_SAME = {"×": "*", "÷": "/", "−": "-"}
_OPERATIONS: dict[str, Callable[[int | Fraction, int | Fraction], int | Fraction]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": Fraction,
}
_PRECEDENCE = {"(": 0, "+": 1, "-": 1, "*": 2, "/": 2}


def response_reward(
    text: str, numbers: Sequence[int], target: int, *, max_steps: int, ended: bool, partial_credit: bool
) -> float:
    """How far a response solves a puzzle, in [0, 1].

    1 if and only if it is a solution (`is_solution`) and has ended. Otherwise, with partial credit:

    - 0.8 once a statement's result is the target, whatever comes after;
    - else 0.2 * operations in correct statements / most operations possible, which is
      min(max_steps, len(numbers) - 1). Idle steps earn little, as numbers are used up.

    An error earns nothing and ends the reading: nothing after it counts. A number that the text stops at may still
    grow, so it is neither an error nor a step until something follows or the response ends. So the reward never falls
    as a text grows, nor when it ends.

    With an `<answer>` in the text, only what stands between the first one and the `</answer>` after it can be a
    solution; what an earlier part earned by partial credit is kept.

    Args:
        text: any string. Time and memory are linear in its length.
        numbers: the given numbers, each to be used at most once.
        target: the number to reach.
        max_steps: most operations; one more is an error.
        ended: the response ended by itself, and was not cut off.
        partial_credit: false: 1 for a solution that ended, 0 for anything else.
    """
    return hindsight_rewards(text, numbers, target, max_steps=max_steps, ended=ended, partial_credit=partial_credit)[1]


def hindsight_rewards(
    text: str, numbers: Sequence[int], target: int, *, max_steps: int, ended: bool, partial_credit: bool
) -> tuple[list[float], float]:
    """What every beginning of `text` has contributed to its `response_reward`, in one reading.

    That a number is complete shows only in what follows: a character that is no digit, `</answer>`, or the end of a
    response that ended by itself. Here the credit counts from the number's last digit on (or from the last bracket
    of an expression without a result), not from where it shows.

    Returns:
        What text[:0], text[:1], ... text[:len(text)] have contributed: from 0, never falling, at most 0.8; and the
        reward of the whole. They differ for a solution that has ended, by what is due to its ending there.
    """
    start = text.find(_OPEN)
    inside = start + len(_OPEN) if start >= 0 else 0  # where the answer begins
    close = text.find(_CLOSE, inside) if start >= 0 else -1
    stop = close if close >= 0 else len(text)
    before, answer = _Reader(numbers, target, max_steps), _Reader(numbers, target, max_steps)
    # What is known after a character has been earned before it: only a character that is no digit reveals anything.
    earned = [before.read(char) for char in text[:inside]]
    earned += [max(before.credit, answer.read(char)) for char in text[inside:stop]]
    solved = (ended or close >= 0) and answer.end() and (start >= 0) == (close >= 0)
    credit = max(before.credit, answer.credit)
    last = len(text[:stop].rstrip())  # spaces earn nothing
    earned[last:] = [credit] * (len(text) + 1 - last)
    final = 1.0 if solved and ended else credit
    if not partial_credit:
        earned, final = [0.0] * len(earned), float(final == 1.0)
    return earned, final


def is_solution(text: str, numbers: Sequence[int], target: int, *, max_steps: int) -> bool:
    """Whether a whole response is a solution: every statement right, the last one's result the target, nothing else
    (within the `<answer>` tags where there are any, which must then be closed)."""
    return response_reward(text, numbers, target, max_steps=max_steps, ended=True, partial_credit=False) == 1.0


class _Wrong(Exception):
    """The text breaks a rule."""


class _Reader:
    """Reads characters one at a time; what it has read may always be the beginning of something longer.

    An operator-precedence parser with stacks of its own, so that nesting has no limit but memory.
    """

    def __init__(self, numbers: Sequence[int], target: int, max_steps: int):
        self.available: Counter[int | Fraction] = Counter(numbers)
        self.target = target
        self.max_steps = max_steps
        self.possible_steps = max(1, min(max_steps, len(numbers) - 1))
        self.failed = False
        self.credit = 0.0  # of what has been read
        self.last: int | Fraction | None = None  # result of the last statement
        self.finished_steps = 0  # operations in finished statements
        self._start_statement()

    def _start_statement(self) -> None:
        self.expects = "operand"  # then "operator", "result", and "statement" after the result
        self.digits = ""  # of a number that may still grow, with its sign
        self.values: list[int | Fraction] = []
        self.operators: list[str] = []
        self.steps = 0  # operations in this statement

    def read(self, char: str) -> float:
        """Take one more character; returns the credit so far."""
        if not self.failed:
            try:
                self._take(_SAME.get(char, char))
            except _Wrong:
                self.failed = True
        return self.credit

    def end(self) -> bool:
        """The text has ended: whether it is a solution. The credit may rise."""
        if self.failed:
            return False
        try:
            self._end_number()
            if self.expects == "operator":  # an expression without its result
                self._end_expression()
                self._end_statement(self.values.pop())
        except _Wrong:
            self.failed = True
        between = self.expects == "statement" or (self.expects == "operand" and not self.values and not self.operators)
        return not self.failed and between and self.last == self.target

    def _take(self, char: str) -> None:
        if char in _DIGITS:
            if self.expects == "statement":
                self._start_statement()
            if self.expects == "operator" or len(self.digits.lstrip("-")) == MAX_DIGITS:
                raise _Wrong
            self.digits += char
            return
        self._end_number()
        if char.isspace():
            if char == "\n" and self.expects == "statement":
                self._start_statement()
        elif char in ",;" and self.expects == "statement":
            self._start_statement()
        elif char == "(" and self.expects in ("operand", "statement"):
            if self.expects == "statement":
                self._start_statement()
            self.operators.append(char)
        elif char == "-" and self.expects in ("operand", "result"):
            self.digits = char
        elif self.expects != "operator":
            raise _Wrong
        elif char in _OPERATIONS:
            self._reduce(_PRECEDENCE[char])
            self.operators.append(char)
            self.expects = "operand"
        elif char == ")":
            self._reduce(1)
            if not self.operators:
                raise _Wrong
            self.operators.pop()
        elif char == "=":
            self._end_expression()
            self.expects = "result"
        else:
            raise _Wrong

    def _end_number(self) -> None:
        """A number that was being read, if any, is complete."""
        if not self.digits:
            return
        if self.digits == "-":
            raise _Wrong
        number, self.digits = int(self.digits), ""
        if self.expects == "result":
            if self.values.pop() != number:
                raise _Wrong
            self._end_statement(number)
        else:
            if not self.available[number]:
                raise _Wrong
            self.available[number] -= 1
            self.values.append(number)
            self.expects = "operator"

    def _end_expression(self) -> None:
        """The expression is complete: its value is the only one left."""
        self._reduce(1)
        if self.operators or not self.steps:  # an open bracket, or a lone number
            raise _Wrong

    def _end_statement(self, value: int | Fraction) -> None:
        self.expects = "statement"
        self.available[value] += 1
        self.last = value
        self.finished_steps += self.steps
        if value == self.target:
            self.credit = TARGET_CREDIT
        self.credit = max(self.credit, STEP_CREDIT * self.finished_steps / self.possible_steps)

    def _reduce(self, precedence: int) -> None:
        """Apply the operators on the stack that bind at least as strongly."""
        while self.operators and _PRECEDENCE[self.operators[-1]] >= precedence:
            symbol, right, left = self.operators.pop(), self.values.pop(), self.values.pop()
            self.steps += 1
            if self.finished_steps + self.steps > self.max_steps or (symbol == "/" and right == 0):
                raise _Wrong
            self.values.append(_OPERATIONS[symbol](left, right))
