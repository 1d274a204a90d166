"""Section on the norm of the gradient as training goes on."""

from __future__ import annotations

from grade.report.figures_curves import over_steps
from grade.report.groups import plain
from grade.report.parts import Drawing, Section
from grade.report.sections_training import last_values
from grade.report.sections_variance import variance
from grade.report.view import View


def gradients(view: View) -> Section:
    section = Section("gradients", "Gradients")
    curves = view.training(section, "grad_norm", smoothed=False)
    if curves:
        limits = {group.setting("train.max_grad_norm") for group in view.groups}
        limit = limits.pop() if len(limits) == 1 else None
        section.add(
            Drawing(
                "gradient_norm",
                over_steps(
                    curves,
                    view.styles,
                    "Gradient norm",
                    "global norm, before clipping",
                    log=True,
                    level=(limit, f"clipped at {plain(limit)}") if limit else None,
                ),
                "Global norm of the policy's gradient before clipping, mean over the updates of a step; "
                "logarithmic. Not "
                f"smoothed. {view.band}",
                f"Gradient norm over steps. At the last step: {last_values(curves)}.",
            )
        )
    variance(view.study, section)
    return section
