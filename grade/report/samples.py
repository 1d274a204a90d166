"""Section with samples: the same prompts answered by the base model and by the best checkpoint, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from grade.report.data import Run
from grade.report.measures import base_row, number
from grade.report.parts import Html, Section
from grade.report.view import View
from grade.tables import Column, Table, rounded

SHOWN = 4
"""Largest gains, and largest losses, of a method that the page shows."""
_LONGEST = 1200  # characters of a text in the page; the table has all


@dataclass(frozen=True)
class Pair:
    """One prompt before and after training; rewards of the two responses."""

    method: str
    seed: int
    prompt: str
    before: str
    after: str
    reward_before: float
    reward_after: float

    @property
    def gain(self) -> float:
        return self.reward_after - self.reward_before


def samples(view: View) -> Section:
    section = Section("samples", "Samples")
    pairs, splits = [], set()
    for group in view.groups:
        for run in group.runs:
            split, found = pairs_of(run, group.label)
            pairs += found
            if found:
                splits.add(split)
    if not pairs:
        section.note("No samples of the base model and of a best checkpoint on the same prompts.")
        return section
    section.text(
        f"The same {' and '.join(sorted(splits))} prompts with the same noise, answered by the base model and by the "
        f"best checkpoint; of the samples that are kept, the {SHOWN} largest gains in reward and the {SHOWN} largest "
        "losses of each method, over its seeds. The table has all of them."
    )
    for group in view.groups:
        own = [pair for pair in pairs if pair.method == group.label]
        if not own:
            section.note(f"{group.label}: no samples before and after.")
    section.add(Html("".join(_method_html(label, pairs) for label in view.labels), _table(pairs)))
    return section


def pairs_of(run: Run, label: str) -> tuple[str, list[Pair]]:
    """(split, pairs) of a run: on test prompts where both sides kept samples, else on validation prompts; the base
    model standing for itself, where nothing trained was chosen, is no pair."""
    for split, after in (("test", run.test), ("validation", run.best_validation)):
        found = _paired(base_row(run, split), after, run, label) if run.best else []
        if found:
            return split, found
    return "", []


def _paired(before: dict | None, after: dict | None, run: Run, label: str) -> list[Pair]:
    olds, news = (row.get("samples") or [] if row else [] for row in (before, after))
    pairs = []
    for old, new in zip(olds, news):  # noqa: B905  a checkpoint may have kept fewer
        rewards = [reward for row in (old, new) if (reward := number(row, "reward")) is not None]
        if len(rewards) == 2 and old.get("prompt") == new.get("prompt"):
            texts = (str(old.get("prompt")), str(old.get("response", "")), str(new.get("response", "")))
            pairs.append(Pair(label, run.seed, *texts, *rewards))
    return pairs


def extremes(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """(largest gains, largest losses), largest first; what did not change is neither."""
    ordered = sorted(pairs, key=lambda pair: -pair.gain)
    gains = [pair for pair in ordered if pair.gain > 0]
    losses = [pair for pair in reversed(ordered) if pair.gain < 0]
    return gains[:SHOWN], losses[:SHOWN]


def _method_html(label: str, pairs: Sequence[Pair]) -> str:
    own = [pair for pair in pairs if pair.method == label]
    if not own:
        return ""
    gains, losses = extremes(own)
    better, worse = sum(pair.gain > 0 for pair in own), sum(pair.gain < 0 for pair in own)
    title = f"{label}: {better} of {len(own)} samples gained, {worse} lost"
    parts = [f"<details open><summary>{escape(title)}</summary>"]
    for name, chosen in (("Largest gains", gains), ("Largest losses", losses)):
        parts.append(f"<h3>{name}</h3>")
        parts += [_pair_html(pair) for pair in chosen] or ['<p class="note">None.</p>']
    return "".join([*parts, "</details>"])


def _pair_html(pair: Pair) -> str:
    return (
        f'<article class="pair"><p class="prompt"><span>prompt</span>{_shown(pair.prompt)}</p>'
        f'<div class="side"><p><span>base model, reward {rounded(pair.reward_before, 3)}</span>{_shown(pair.before)}'
        f'</p></div><div class="side"><p><span>trained, seed {pair.seed}, reward {rounded(pair.reward_after, 3)} '
        f"({'+' if pair.gain > 0 else ''}{rounded(pair.gain, 3)})</span>{_shown(pair.after)}</p></div></article>"
    )


def _shown(text: str) -> str:
    text = text.strip().replace("\0", "�")
    return escape(text if len(text) <= _LONGEST else text[:_LONGEST] + " …")


def _table(pairs: Sequence[Pair]) -> Table:
    return Table(
        "samples",
        [
            Column("method"),
            Column("seed"),
            Column("prompt"),
            Column("base model"),
            Column("trained"),
            Column("reward, base model"),
            Column("reward, trained"),
            Column("gain"),
        ],
        [
            [p.method, str(p.seed), p.prompt, p.before, p.after, p.reward_before, p.reward_after, p.gain]
            for label in dict.fromkeys(p.method for p in pairs)
            for p in sorted((p for p in pairs if p.method == label), key=lambda p: -p.gain)
        ],
        "Samples before and after training, largest gain of a method first.",
    )
