"""Whether the parts of a checkpoint tell one story: its step, its validations, its best and the log of its steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grade.errors import GradeError
from grade.formats import LOGGED_HERE
from grade.jsonl import rows_of
from grade.shapes import misfit
from grade.training.log import beginning


def check_story(folder: Path, state: Mapping[str, Any], run_dir: Path) -> None:
    """Refuse a state whose parts are of different moments: its step, its validations and its best one, and the log of
    its steps must fit each other.

    Args:
        folder: of the checkpoint, for the message.
        state: as `grade.model.checkpoint.read_state` gives it.

    Raises:
        GradeError: with what does not fit, and without what to do.
    """
    step, best = state["step"], state["best"]
    validated = [row["step"] for row in state["evaluations"]]
    wrong = None
    if validated != sorted(set(validated)) or validated[:1] not in ([], [0]):
        wrong = f"its validations are those after {', '.join(map(str, validated))} steps"
    elif validated and validated[-1] > step:
        wrong = f"a validation is of step {validated[-1]}"
    elif best is not None and best["step"] not in validated:
        wrong = f"its best is step {best['step']}, which was not validated"
    elif state["steps"] < step:
        wrong = f"it was to have {state['steps']} steps"
    else:
        kept = beginning(run_dir / "metrics.jsonl", state["logs"]["metrics.jsonl"], fix="")
        rows = rows_of(kept).rows
        wrong = next((f"of metrics.jsonl {one}" for row in rows if (one := misfit(row, LOGGED_HERE)) is not None), None)
        trained = [row.get("step") for row in rows if "validation/reward" not in row]
        if wrong is None and trained != list(range(step)):
            wrong = f"metrics.jsonl has {len(trained)} steps"
    if wrong is not None:
        raise GradeError(f"{folder} is of step {step}, and {wrong}.")
