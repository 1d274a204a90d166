"""Evaluations as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import RenderableType

from grade.tables import Column, Table, numbers
from grade.training.evaluation import Evaluation


def evaluation_table(rows: Sequence[Evaluation], title: str) -> RenderableType:
    """Evaluations side by side, one model a row."""
    titles = ("reward", "KL", "entropy", "distinct", "length", "ended")
    return Table(
        title,
        [Column("model"), *numbers(titles)],
        [
            [
                row.model if row.step is None or row.model == "base" else f"{row.model}, step {row.step}",
                f"{row.reward:.3f} ± {row.reward_stderr:.3f}",
                f"{row.kl:.3f}",
                f"{row.entropy:.2f}",
                f"{row.unique_token_ratio:.3f}",
                f"{row.mean_length:.1f}",
                f"{row.eos_rate:.0%}",
            ]
            for row in rows
        ],
        "± one standard error over prompts; KL and entropy in nats per token; distinct: tokens of a response that "
        "differ, as a share; ended: responses that stopped by themselves",
    ).rich()


def result_tables(rows: Mapping[str, Evaluation], samples: int = 3) -> list[RenderableType]:
    """What a run came to: its test of base model and best checkpoint, and their first responses with rewards.

    Args:
        rows: {"base": ..., "best": ...}.
        samples: prompts shown, as far as evaluation.samples has kept any.
    """
    base, best = rows["base"], rows["best"]
    tables = [evaluation_table([base, best], f"test, {best.prompts} prompts, best checkpoint by validation")]
    pairs = list(zip(base.samples, best.samples, strict=True))[:samples]
    if pairs:
        tables.append(
            Table(
                "the same prompts, before and after",
                [Column("prompt"), Column("base model"), Column("trained")],
                [
                    [pair[0]["prompt"], *(f"{sample['response'].strip()} ({sample['reward']:.2f})" for sample in pair)]
                    for pair in pairs
                ],
            ).rich(show_lines=True)
        )
    return tables
