"""Countdown puzzles for tests, and answers to them, right and wrong."""

from __future__ import annotations

from hypothesis import strategies as st

from grade.tasks.countdown import write_puzzles


def difficulty(operands=3, max_number=12, max_target=60, part="policy"):
    return {"operands": operands, "max_number": max_number, "max_target": max_target, "part": part}


POOL = {n: write_puzzles(25, seed=7, **difficulty(n, max_number=10)) for n in range(2, 6)}


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
