"""The validations of a run, and which checkpoint they say is the best."""

from __future__ import annotations

from dataclasses import asdict

from grade.errors import present
from grade.training.evaluation import Evaluation, metric_of


class Validations:
    """Of the base model first, then of the policy, in the order of steps.

    Attributes:
        rows: of each what `grade.training.evaluation.Evaluation` holds.
        best: step, metric and reward of the policy's best, and whether it beats the base model; None before the first.
    """

    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.best: dict | None = None

    def restore(self, rows: list[dict], best: dict | None) -> None:
        """Put back those of a run that goes on."""
        self.rows, self.best = rows, best

    def add(self, row: Evaluation, *, trusted: bool = True) -> bool:
        """Whether a further validation is one of the policy, and its best so far.

        Args:
            trusted: False: it is the best only where there was none.
        """
        self.rows.append(asdict(row))
        if row.model == "base":
            return False
        if self.best is not None and (not trusted or row.metric <= self.best["metric"]):
            return False
        beats = row.metric > metric_of(self.rows[0])
        self.best = {"step": row.step, "metric": row.metric, "reward": row.reward, "beats_base": beats}
        return True

    def best_stays(self, step: int) -> bool:
        """Whether a run that goes back to `step` has the same best as now, or none yet: a checkpoint of a best that
        a later one has replaced may be gone."""
        validated = any(row["model"] != "base" and row["step"] <= step for row in self.rows)
        return not validated or present(self.best)["step"] <= step

    def verdict(self) -> str | None:
        """What to say of a run of which no checkpoint was better than the base model; None of any other."""
        best = present(self.best)
        if best["beats_base"]:
            return None
        return (
            f"No checkpoint is better than the base model: its validation is {metric_of(self.rows[0]):.3f}, "
            f"the best of the run's {best['metric']:.3f} (step {best['step']}). A lower train.learning_rate "
            "or more train.steps may help."
        )


def line_of(row: Evaluation) -> str:
    """A validation in a line."""
    return (
        f"step {row.step}  validation of the {row.model}: reward {row.reward:.3f} ± {row.reward_stderr:.3f}  "
        + "".join(f"{name} {value:.3f}  " for name, value in row.details.items())
        + f"KL {row.kl:.3f} nats/token  distinct tokens {row.unique_token_ratio:.2f}"
    )
