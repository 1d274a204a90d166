"""The section on reward, judge and fluency against KL."""

from __future__ import annotations

from grade.report.figures_frontier import against_kl
from grade.report.parts import Drawing, Section
from grade.report.style import method_style
from grade.report.view import View, seeds_in_words
from grade.studies.compare.frontier import MEASURES, by_seed
from grade.studies.compare.frontier_text import SHOWN, best_of_table, frontier_tables


def frontier(view: View) -> Section | None:
    """What a comparison has measured of its frontier; None where there is nothing of it, as in files of versions that
    had none."""
    found = view.study.comparison.get("frontier")
    if not isinstance(found, dict):
        return None
    section = Section("frontier", "Frontier: at equal KL")
    frontiers = by_seed(found["points"], found["base"])
    if not frontiers or not found["table"]["kls"]:
        section.note("No method has moved from the base model: no frontier.")
        return section
    styles = {method: method_style(method) for method in frontiers}
    seeds = seeds_in_words({method: len(runs) for method, runs in frontiers.items()})
    for measure in (name for name in SHOWN if any(point.get(name) is not None for point in found["points"])):
        title, _ = MEASURES[measure]
        chosen = "" if measure == "reward" else "The checkpoints are those that the reward chose. "
        section.add(
            Drawing(
                f"frontier_{measure}",
                against_kl(frontiers, found, styles, measure, title),
                f"On {found['prompts']} test prompts. Small marker: a tested checkpoint; thin line: a seed's frontier, "
                "through the checkpoints whose reward is above all with less KL; thick line: mean over seeds, as far "
                f"as all of them reach; {seeds}. {chosen}Best of n: of the base model's own responses by the reward, "
                "at the upper bound of its KL.",
                f"{title} against KL: "
                + "; ".join(
                    f"{row['method']} {said}"
                    for row in found["table"]["rows"]
                    if (said := _said(found["table"]["kls"], row.get(measure, [])))
                )
                + ".",
            )
        )
    for table in frontier_tables(found):
        section.add(table)
    best = best_of_table(found)
    if best is not None:
        section.add(best)
    return section


def _said(kls: list[float], values: list[dict | None]) -> str:
    pairs = zip(kls, values, strict=False)  # a measure that a method lacks has no values
    return ", ".join(f"{value['mean']:.3f} at KL {kl:g}" for kl, value in pairs if value is not None)
