"""Tables and texts for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table


def evaluation_table(rows: Sequence, title: str) -> Table:
    """Evaluations side by side, one model a row."""
    table = Table(title=title)
    table.add_column("model")
    for column in ("reward", "KL", "entropy", "distinct", "length", "ended"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        name = row.model if row.step is None or row.model == "base" else f"{row.model}, step {row.step}"
        table.add_row(
            name, f"{row.reward:.3f} ± {row.reward_stderr:.3f}", f"{row.kl:.3f}", f"{row.entropy:.2f}",
            f"{row.unique_token_ratio:.3f}", f"{row.mean_length:.1f}", f"{row.eos_rate:.0%}",
        )
    table.caption = (
        "± one standard error over prompts; KL and entropy in nats per token; distinct: tokens of a response that "
        "differ, as a share; ended: responses that stopped by themselves"
    )
    return table


def samples_table(before: Sequence[dict], after: Sequence[dict], count: int = 3) -> Table:
    """The first responses of two evaluations on the same prompts, with their rewards."""
    table = Table(title="the same prompts, before and after", show_lines=True)
    table.add_column("prompt")
    table.add_column("base model")
    table.add_column("trained")
    for old, new in list(zip(before, after, strict=True))[:count]:
        table.add_row(
            escape(old["prompt"]), f"{escape(old['response'].strip())} [dim]({old['reward']:.2f})[/dim]",
            f"{escape(new['response'].strip())} [dim]({new['reward']:.2f})[/dim]",
        )
    return table
