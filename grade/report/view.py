"""What all sections share: the study, its groups, their styles, the smoothing, and sentences about seeds."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from grade.report.data import Run, Study
from grade.report.groups import Group, grouped
from grade.report.measures import Curve, HeldOut, held_out, smoothing_window, training_curve
from grade.report.parts import Section
from grade.report.style import Style, legend_order


class View:
    """A study as the sections see it."""

    def __init__(self, study: Study):
        self.study = study
        self.groups: list[Group] = grouped(study.runs)
        self.styles: dict[str, Style] = legend_order(self.groups)
        self.window = smoothing_window(self.groups)

    @property
    def runs(self) -> list[Run]:
        """By group."""
        return [run for group in self.groups for run in group.runs]

    @property
    def alone(self) -> str:
        """Groups that have one seed."""
        return ", ".join(group.label for group in self.groups if len(group.runs) == 1)

    @property
    def labels(self) -> list[str]:
        return [group.label for group in self.groups]

    @property
    def colours(self) -> list[str]:
        return [self.styles[label].colour for label in self.labels]

    @cached_property
    def held_out(self) -> HeldOut:
        return held_out(self.groups)

    @property
    def seeds(self) -> str:
        """How many seeds there are, in words."""
        return seeds_in_words({group.label: len(group.runs) for group in self.groups})

    @property
    def held_out_seeds(self) -> str:
        """How many seeds have a held-out reward, in words."""
        return seeds_in_words({label: len(values) for label, values in self.held_out.values.items()})

    @property
    def band(self) -> str:
        """What lines and bands over steps are."""
        if all(len(group.runs) == 1 for group in self.groups):
            return f"{self.seeds}, so there is no spread to show."
        return (
            f"Line: mean over seeds; band: lowest to highest seed; dotted where not all seeds have come so far; "
            f"{self.seeds}."
        )

    @property
    def smoothing(self) -> str:
        return "Not smoothed." if self.window == 1 else f"Smoothed: centred mean over {self.window} steps of each seed."

    def curves(self, section: Section, of: Callable[[Group], Curve | None], missing: str) -> dict[str, Curve]:
        """Label -> curve, with a note in `section` on the groups that have none.

        Args:
            missing: says what they lack, as in "no `kl` in metrics.jsonl".
        """
        found = {group.label: of(group) for group in self.groups}
        without = [label for label, curve in found.items() if curve is None]
        if without:
            section.note(f"{', '.join(without)}: {missing}.")
        return {label: curve for label, curve in found.items() if curve is not None}

    def training(self, section: Section, key: str, smoothed: bool = True) -> dict[str, Curve]:
        """Label -> curve of a measure of training steps."""
        window = self.window if smoothed else 1
        return self.curves(section, lambda group: training_curve(group, key, window), f"no {key} in metrics.jsonl")

    def unfinished(self) -> list[Run]:
        return [run for run in self.runs if not run.complete]


def seeds_in_words(counts: dict[str, int]) -> str:
    """As in "n = 3 seeds per method", or the number of each where they differ."""
    if len(set(counts.values())) == 1:
        count = next(iter(counts.values()))
        return f"n = {count} seed{'s' * (count > 1)}" + " per method" * (len(counts) > 1)
    return "n: " + ", ".join(f"{label} {count}" for label, count in counts.items()) + " seeds"
