"""The variance laboratory's measurements: estimators at one policy, in the section on gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from grade.report.data import Study
from grade.report.figures_variance import against_tau
from grade.report.measures import number
from grade.report.parts import Drawing, Section
from grade.studies.variance.text import measured, name_of, notes
from grade.tables import Cell, Column, Table

_COLUMNS = (
    ("length", "tokens", 0),
    ("top_k", "top_k", 0),
    ("draws", "draws", 0),
    ("mean_norm", "norm of the mean", 4),
    ("trace", "trace of the covariance", 4),
    ("relative_variance", "relative variance", 2),
    ("relative_variance_interval", "relative variance, 95% interval", 2),
    ("snr_per_sample", "SNR per sample", 4),
    ("snr_per_second", "SNR per second", 4),
    ("seconds_per_sample", "seconds per sample", 4),
    ("cosine", "cosine", 3),
    ("cosine_interval", "cosine, 95% interval", 3),
    ("bias", "relative bias", 2),
    ("bias_interval", "relative bias, 95% interval", 2),
    ("scale", "scale", 2),
    ("prefixes", "prefixes", 0),
    ("plain_step", "plain step", 3),
    ("plain_step_interval", "plain step, 95% interval", 3),
    ("plain_share", "plain step, of the best", 2),
    ("plain_share_interval", "plain step, of the best, 95% interval", 2),
    ("plain_ceiling", "plain step without noise", 3),
    ("plain_ceiling_interval", "plain step without noise, 95% interval", 3),
    ("plain_step_per_second", "square of the plain step per second", 3),
    ("natural_step", "natural step", 3),
    ("natural_step_interval", "natural step, 95% interval", 3),
    ("natural_share", "natural step, of the best", 2),
    ("natural_share_interval", "natural step, of the best, 95% interval", 2),
    ("natural_ceiling", "natural step without noise", 3),
    ("natural_ceiling_interval", "natural step without noise, 95% interval", 3),
    ("factor", "length factor", 2),
    ("factor_interval", "length factor, 95% interval", 2),
    ("fisher_factor", "Fisher length factor", 2),
    ("fisher_factor_interval", "Fisher length factor, 95% interval", 2),
    ("tensor_norm_std", "spread of tensor norms", 4),
    ("verdict", "verdict", 0),
)
# Key, title of the figure, of its axis, logarithmic.
_FIGURES = (
    ("relative_variance", "Variance of the estimators", "relative variance", True),
    ("snr_per_second", "Signal to noise", "signal-to-noise ratio per second", True),
    ("cosine", "Direction of the estimators", "cosine with the unbiased reference", False),
)
_STEP_FIGURES = (
    ("plain_step", "Gain of a plain step", "reward / √(2 KL)", False),
    ("factor", "Length of the gradient through tokens", "factor to the exact length", False),
)


def variance(study: Study, section: Section) -> None:
    """Add figures and the table of variance.json, or a note that there is none."""
    rows = [row for row in study.variance.get("rows", []) if isinstance(row, dict) and "method" in row]
    if not rows:
        section.note(
            "Estimator variance: no measurements of `grade variance` here. The norm over time does not show it: that "
            "changes with the policy."
        )
        return
    note = measured(study.variance) + " "
    for length, top_k in dict.fromkeys((row.get("length"), row.get("top_k")) for row in rows):
        here = [row for row in rows if (row.get("length"), row.get("top_k")) == (length, top_k)]
        parts = [f"{n} {what}" for n, what in ((length, "tokens"), (top_k, "candidates")) if n is not None]
        suffix = "_".join(str(n) for n in (length, top_k) if n is not None)
        _figures(section, here, ", ".join(parts), suffix, note)
        if stepping := [row for row in here if "prefixes" in row]:
            _figures(section, stepping, ", ".join(parts), suffix, note, _STEP_FIGURES)
    columns = [c for c in _COLUMNS if any(row.get(c[0]) is not None for row in rows)]
    section.add(
        Table(
            "estimator_variance",
            [Column("estimator"), *(Column(title, digits) for _, title, digits in columns)],
            [[name_of(row), *(_cell(row.get(key)) for key, _, _ in columns)] for row in rows],
            note + notes(rows),
        )
    )


def _figures(
    section: Section, rows: list[dict], where: str, suffix: str, note: str, figures: Sequence[tuple] = _FIGURES
) -> None:
    for key, title, axis, log in figures:
        known = [row for row in rows if (value := number(row, key)) is not None and (value > 0 or not log)]
        if not known:
            section.note(f"{where}: no {axis}.")
            continue
        without = [name_of(row) for row in rows if row not in known]
        section.add(
            Drawing(
                f"estimator_{key}_{suffix}",
                against_tau(known, key, f"{title}\n{where}", axis, log=log),
                f"{note}{axis[0].upper()}{axis[1:]} of a response's gradient, {where}; solid: all hops, dotted: none; "
                "level: what has no temperature; bar, of what has one: 95% interval, where there is one."
                + (f" None for {', '.join(without)}." if without else ""),
                f"{title}: " + ", ".join(f"{name_of(row)} {row[key]:.3g}" for row in known) + ".",
            )
        )


def _cell(value: Any) -> Cell:
    """JSON's list of two numbers is an interval."""
    if not isinstance(value, list):
        return value
    low, high = value
    return None if low is None else f"above {low:.3g}" if high is None else (low, high)
