"""Sections on what came out: the final comparison, and how sure it is."""

from __future__ import annotations

from itertools import combinations
from statistics import fmean

from grade.report.data import Run
from grade.report.figures_bars import BASE_COLOUR, bars, dots
from grade.report.figures_curves import over_steps
from grade.report.groups import Group
from grade.report.measures import base_reward, base_row, number, over_seeds, reward_variances, variance_curve
from grade.report.parts import Drawing, Section
from grade.report.statistics import LEVEL, WINDOW, bootstrap_difference, bootstrap_mean, estimate, holm, welch
from grade.report.view import View
from grade.tables import Cell, Column, Estimate, Table, rounded

_MEASURES = {
    "reward": ("reward", 3),
    "solve_rate": ("solve rate", 3),
    "judge": ("judge", 3),
    "kl": ("KL, nats per token", 3),
    "entropy": ("entropy, nats per token", 2),
    "perplexity": ("perplexity under the base model", 1),
    "nats_per_byte": ("nats per byte under another model", 3),
    "repetition": ("repeated 4-grams", 3),
    "length_distance": ("length, distance from the base's", 1),
    "entropy_distance": ("entropy, distance from the base's", 2),
    "unique_token_ratio": ("distinct tokens", 3),
    "mean_length": ("length, tokens", 1),
    "eos_rate": ("ended by themselves", 3),
}
_NOT_SHOWN = {"step", "prompts", "reward_stderr", "kl_sequence", "base_nll", "fluency_nats", "fluency_bytes"}
ALPHA = 1 - LEVEL


# -- final comparison ----------------------------------------------------------------------------------------


def final(view: View) -> Section:
    section = Section("final", "Final comparison")
    base = {split: base_reward(view.runs, split) for split in ("validation", "test")}
    series = {
        "validation": [over_seeds(group, lambda run: number(run.best_validation, "reward")) for group in view.groups],
        "test": [over_seeds(group, lambda run: number(run.test, "reward")) for group in view.groups],
    }
    known = {
        split: [None if (value := base[split]) is None else Estimate(value, None, 1), *found]
        for split, found in series.items()
        if any(found) or base[split] is not None
    }
    if not known:
        section.note("No evaluation yet: nothing to compare.")
        return section
    if "test" not in known:
        section.note("No test yet: validation only, whose best checkpoint was chosen on the same prompts.")
    labels = ["base model", *view.labels]
    section.add(
        Drawing(
            "final_reward",
            bars(labels, [BASE_COLOUR, *view.colours], known, "Reward of the best checkpoint", "reward"),
            "Best checkpoint by validation, and the base model. Bar: mean over seeds; whisker: ± one "
            "standard error over "
            f"seeds, none for one seed; the base model has no seeds. {view.seeds}, of which the tables say how many "
            "were evaluated. Validation may flatter: it is what the checkpoint was chosen by.",
            "; ".join(
                f"{split} reward: "
                + ", ".join(
                    f"{label} {found.mean:.3f}" for label, found in zip(labels, estimates, strict=True) if found
                )
                for split, estimates in known.items()
            )
            + ".",
        )
    )
    for split in known:
        section.add(_measures(view, split))
    if "test" in known:
        section.add(
            Table(
                "gap",
                [Column("method"), Column("validation − test reward"), Column("best step", 0)],
                [
                    [group.label, over_seeds(group, _gap), over_seeds(group, lambda run: run.best)]
                    for group in view.groups
                ],
                f"Validation less test reward of the same checkpoints; mean ± standard error over seeds; {view.seeds}.",
            )
        )
    return section


def _row(run: Run, split: str) -> dict | None:
    return run.test if split == "test" else run.best_validation


def _gap(run: Run) -> float | None:
    validated, tested = number(run.best_validation, "reward"), number(run.test, "reward")
    return None if validated is None or tested is None else validated - tested


def _measures(view: View, split: str) -> Table:
    """All measures of a split: the base model, then the methods."""
    base = next((row for run in view.runs if (row := base_row(run, split))), None)
    rows = [row for row in (base, *(_row(run, split) for run in view.runs)) if row]
    present = {key: None for row in rows for key in row if key not in _NOT_SHOWN and number(row, key) is not None}
    names = [*(key for key in _MEASURES if key in present), *(key for key in present if key not in _MEASURES)]
    prompts = sorted({str(row["prompts"]) for row in rows if "prompts" in row})

    def cells(group: Group) -> list[Cell]:
        return [over_seeds(group, lambda run: number(_row(run, split), name)) for name in names]  # noqa: B023

    return Table(
        f"final_{split}",
        [Column("method"), Column("seeds", 0), *(Column(*_MEASURES.get(name, (name, 3))) for name in names)],
        [
            ["base model", None, *(number(base, name) for name in names)],
            *([g.label, sum(_row(run, split) is not None for run in g.runs), *cells(g)] for g in view.groups),
        ],
        f"The best checkpoint on {f'{prompts[0]} ' if len(prompts) == 1 else ''}{split} prompts: mean ± standard error "
        "over seeds (none for one seed).",
    )


# -- statistics ----------------------------------------------------------------------------------------------


def significance(view: View) -> Section:
    section = Section("statistics", "Statistics")
    found = view.held_out
    _warnings(view, section)
    if found.values:
        labels = [label for label in view.labels if label in found.values]
        intervals = [bootstrap_mean(found.values[label]) for label in labels]
        section.add(
            Drawing(
                "held_out_reward",
                dots(
                    labels,
                    [view.styles[label].colour for label in labels],
                    [found.values[label] for label in labels],
                    intervals,
                    f"Held-out reward ({found.split})",
                    "reward",
                    level=found.base,
                    level_name="base model",
                ),
                f"Reward on {found.split} prompts. Dot: a seed; bar and mark: 95% bootstrap interval over "
                "seeds and the "
                f"mean; {view.held_out_seeds}. With few seeds such intervals are too short.",
                f"Mean {found.split} reward: "
                + ", ".join(f"{label} {fmean(found.values[label]):.3f}" for label in labels)
                + ".",
            )
        )
        section.add(
            Table(
                "held_out",
                [
                    Column("method"),
                    Column("seeds", 0),
                    Column("mean ± standard error"),
                    Column("95% bootstrap interval of the mean"),
                    Column("lowest"),
                    Column("highest"),
                ],
                [
                    [label, len(values), estimate(values), interval, min(values), max(values)]
                    for label, interval in zip(labels, intervals, strict=True)
                    if (values := found.values[label])
                ],
                f"Reward on {found.split} prompts over seeds.",
            )
        )
        _pairs(view, section, labels)
    else:
        section.note("No held-out reward yet: nothing to test.")
    _stability(view, section)
    return section


def _warnings(view: View, section: Section) -> None:
    if view.alone:
        section.warn(
            f"One seed is all there is of {view.alone}: how much a result changes from seed to seed is not "
            "known, and no difference can be tested. Run three seeds or more."
        )
    found = view.held_out
    if found.split == "validation" and found.values:
        section.warn(
            "No test yet: held-out reward is that of the best validation, whose checkpoint was chosen on the same "
            "prompts. It flatters, and runs with more validations more."
        )
    if found.values and found.missing:
        section.note(f"Without a {found.split} result, so not in here: {', '.join(found.missing)}.")


def _pairs(view: View, section: Section, labels: list[str]) -> None:
    values = view.held_out.values
    tests = {pair: test for pair in combinations(labels, 2) if (test := welch(values[pair[0]], values[pair[1]]))}
    if not tests:
        if len(labels) > 1:
            section.note("No two methods have two seeds or more with a spread: no test is possible.")
        return
    adjusted = dict(zip(tests, holm([test.p for test in tests.values()]), strict=True))
    level = 1 - ALPHA / len(tests)
    section.add(
        Table(
            "welch",
            [
                Column("first"),
                Column("second"),
                Column("first − second"),
                Column("t", 2),
                Column("degrees of freedom", 1),
                Column("p", 4),
                Column("p, Holm", 4),
                Column("95% interval"),
                Column("bootstrap interval, all together"),
                Column("verdict"),
            ],
            [
                [
                    *pair,
                    test.difference,
                    test.t,
                    test.dof,
                    test.p,
                    adjusted[pair],
                    test.interval,
                    bootstrap_difference(values[pair[0]], values[pair[1]], level),
                    "different" if adjusted[pair] < ALPHA else "not told apart",
                ]
                for pair, test in tests.items()
            ],
            f"Welch's t-test of held-out ({view.held_out.split}) reward over seeds, {len(tests)} comparison"
            f"{'s' * (len(tests) > 1)}; p corrected after Holm. The bootstrap interval is at {level:.2%}, so "
            "that all of "
            f"them hold together at {LEVEL:.0%} (Bonferroni); the other is at {LEVEL:.0%} for itself.",
        )
    )
    section.text(_leader(labels, values, adjusted))


def _leader(labels: list[str], values: dict[str, list[float]], adjusted: dict[tuple[str, str], float]) -> str:
    """What may be said of the highest mean."""
    best = max(labels, key=lambda label: fmean(values[label]))
    others = [label for label in labels if label != best]
    apart = [o for o in others if adjusted.get((best, o), adjusted.get((o, best), 1.0)) < ALPHA]
    together = [label for label in others if label not in apart]
    text = f"Highest mean: {best}, {rounded(fmean(values[best]), 3)}."
    if apart:
        text += f" Different from {', '.join(apart)} at {ALPHA:.0%} after correction."
    if together:
        text += f" Not told apart from {', '.join(together)}: no winner among these."
    return text


def _stability(view: View, section: Section) -> None:
    curves = view.curves(section, variance_curve, "no reward over two steps, so no stability")
    if not curves:
        return
    if max(len(curve.x) for curve in curves.values()) > 1:
        section.add(
            Drawing(
                "stability",
                over_steps(curves, view.styles, "Stability", f"variance of reward in {WINDOW} steps"),
                f"Sample variance of the training reward within windows of {WINDOW} steps, at the window's "
                "first step; the "
                f"last window is as long as what is left. {view.band}",
                "Variance of reward by window.",
            )
        )
    else:
        section.note(f"Stability: training has had one window of {WINDOW} steps or less, and a point is no curve.")
    section.add(
        Table(
            "stability",
            [Column("method"), Column("windows", 0), Column("variance of reward", 5)],
            [
                [group.label, max(len(reward_variances(run)) for run in group.runs), over_seeds(group, _mean_variance)]
                for group in view.groups
            ],
            f"Mean over windows of {WINDOW} steps (the last one partial) of the variance of the training "
            "reward; lower is "
            f"steadier. It holds the noise of a batch and what is learnt within a window. {view.seeds}.",
        )
    )


def _mean_variance(run: Run) -> float | None:
    found = estimate(reward_variances(run))
    return found.mean if found else None
