"""Sections on how training went: learning curves, validation and the generalisation gap."""

from __future__ import annotations

from grade.report.figures_curves import over_steps, validation
from grade.report.measures import Curve, gap_curve, validation_curve
from grade.report.parts import Drawing, Section
from grade.report.view import View

_LEARNING = (
    ("reward", "Reward in training", "mean reward of the step"),
    ("loss", "Loss", "−reward + kl_coef · KL"),
    ("kl", "KL to {reference}", "KL, nats per token"),
    ("entropy", "Entropy of the policy", "entropy, nats per token"),
)


def learning(view: View) -> Section:
    section = Section("learning", "Learning curves")
    for key, title, ylabel in _LEARNING:
        title, curves = title.format(reference=_reference(view)), view.training(section, key)
        if curves:
            about = (
                f" The objective of every method, each with its own kl_coef{_steered(view)}." if key == "loss" else ""
            )
            section.add(
                Drawing(
                    f"learning_{key}",
                    over_steps(curves, view.styles, title, ylabel),
                    f"{title} over optimizer steps.{about} {view.smoothing} {view.band}",
                    f"{title} over steps. At the last step: {last_values(curves)}.",
                )
            )
    return section


def _reference(view: View) -> str:
    """What KL was measured to: of runs that differ in it, each its own reference."""
    initial = {group.setting("model.reference") == "initial" for group in view.groups}
    if len(initial) > 1:
        return "each run's reference"
    return "the policy as it started" if initial == {True} else "the base model"


def _steered(view: View) -> str:
    """Which kl_coef moved, and to what end."""
    said = [
        f"{group.label} from {group.setting('method.kl_coef'):g}, steered to a KL of {target:g}"
        for group in view.groups
        if (target := group.setting("method.target_kl")) is not None
    ]
    return f" ({'; '.join(said)})" if said else ""


def last_values(curves: dict[str, Curve]) -> str:
    """Where curves end, in words."""
    return ", ".join(f"{label} {curve.last:.3g}" for label, curve in curves.items())


def validated(view: View) -> Section:
    section = Section("validation", "Validation and generalisation")
    curves = view.curves(section, validation_curve, "no validation yet")
    if curves:
        section.add(
            Drawing(
                "validation_reward",
                validation(view.groups, curves),
                "Reward on the fixed validation prompts; step 0 is the base model. Thick: mean over seeds, thin: each "
                f"seed, star: the checkpoint of a seed that counts as its best. Not smoothed. {view.seeds}.",
                f"Validation reward over steps. At the last validation: {last_values(curves)}.",
            )
        )
    gaps = view.curves(section, gap_curve, "fewer than two validations, so no gap between training and validation")
    if gaps:
        section.add(
            Drawing(
                "generalisation_gap",
                over_steps(
                    gaps, view.styles, "Generalisation gap", "training − validation reward", level=(0.0, "no gap")
                ),
                "Mean reward in training since the validation before, less the reward of the validation: above 0, the "
                f"prompts of training do better. Not smoothed. {view.band}",
                f"Training minus validation reward over steps. At the end: {last_values(gaps)}.",
            )
        )
    if any(group.setting("evaluation.sampler") == "top_p" for group in view.groups):
        section.note("Validation samples with top_p and training does not: part of the gap is that of the samplers.")
    if any(len(run.validation) == 1 for group in view.groups for run in group.runs):
        section.note("A run with one validation has only that of the base model, and no best checkpoint.")
    return section
