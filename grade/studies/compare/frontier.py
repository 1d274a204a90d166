"""The frontier of reward against KL: what a method gets for a distance from the base model, at equal distance.

A higher reward at a higher KL says nothing of a method: it may have gone further along the same road. So every run has
several points, one a tested checkpoint, and a seed of a method (its runs with all their kl_coef) has a frontier:

    from the base, at KL 0, through those checkpoints whose reward is higher than that of all with less KL, by straight
    lines over sqrt(KL), and from the last of them level to the largest KL that was reached, since a checkpoint that is
    there already can be kept

Checkpoints are chosen by the reward alone, as a user would choose them; judge, nats per byte and the other measures
are those of the same checkpoints, and may fall where the reward was fooled. Over the square root, in which distance
grows about linearly with a small change of the parameters, as in L. Gao et al., "Scaling laws for reward
overoptimization" (2023). KL is KL(policy | base), nats a response.

Every frontier has at most as many points as validations were tested, and its choice of the best by their own rewards
flatters all methods alike, and not the best of n. Needs no model: the report reads this too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from grade.studies.compare.over_seeds import over_seeds

KL, REWARD = "kl_sequence", "reward"
MEASURES = {
    REWARD: ("reward", 3),
    "judge": ("judge", 3),
    "nats_per_byte": ("nats per byte", 3),
    "solve_rate": ("solve rate", 3),
    "repetition": ("repetition", 3),
    "perplexity": ("perplexity", 1),
    "length_distance": ("length, distance", 1),
    "entropy_distance": ("entropy, distance", 2),
}
"""What a point has, where it was measured: title and digits."""
_KLS = 5
Point = Mapping[str, Any]
"""Of a checkpoint: "kl_sequence", "reward" and further `MEASURES`; of a run also "method", "seed", "kl_coef" and
"step"."""


def frontier_of(points: Sequence[Point], base: Point) -> list[Point]:
    """The knots of one seed's frontier, by rising KL: the base, the checkpoints that are above all before them, and the
    last of these again at the largest KL of all. No KL of theirs is below 0, as rounding may leave the base's."""
    knots: list[Point] = [{**base, KL: 0.0}]
    known = [{**point, KL: max(float(point[KL]), 0.0)} for point in points]
    for point in sorted(known, key=lambda p: (p[KL], -p[REWARD])):
        if point[REWARD] > knots[-1][REWARD]:
            knots.append(point)
    furthest = max((point[KL] for point in known), default=0.0)
    return [*knots, {**knots[-1], KL: furthest}] if furthest > knots[-1][KL] else knots


def value_at(knots: Sequence[Point], measure: str, kl: float) -> float | None:
    """A measure of a frontier at this KL, between its knots by a straight line over sqrt(KL).

    Returns:
        None where the frontier does not reach so far, or a knot beside it lacks the measure.
    """
    if kl > knots[-1][KL]:
        return None
    for left, right in pairwise(knots):
        a, b = math.sqrt(left[KL]), math.sqrt(right[KL])
        if kl <= right[KL] and b > a:
            known = left.get(measure), right.get(measure)
            if known[0] is None or known[1] is None:
                return None
            return known[0] + (known[1] - known[0]) * (math.sqrt(kl) - a) / (b - a)
    return knots[-1].get(measure)


def by_seed(points: Sequence[Point], base: Point) -> dict[str, dict[int, list[Point]]]:
    """The frontier of every seed of every method, in the order of `points`."""
    found: dict[str, dict[int, list[Point]]] = {}
    for point in points:
        found.setdefault(point["method"], {}).setdefault(point["seed"], []).append(point)
    return {method: {seed: frontier_of(own, base) for seed, own in seeds.items()} for method, seeds in found.items()}


def common_kls(frontiers: Mapping[str, Mapping[int, Sequence[Point]]]) -> list[float]:
    """The KLs at which methods are compared: of 1, 2, 5, 10, 20, ... (and 0.5, 0.2, ...) the largest five that all
    seeds of two methods reach, or of the one method that there is."""
    reached = sorted((min(knots[-1][KL] for knots in seeds.values()) for seeds in frontiers.values()), reverse=True)
    most = reached[min(1, len(reached) - 1)] if reached else 0.0
    if not 0 < most < math.inf:
        return []
    top = math.floor(math.log10(most))
    steps = [digit * 10.0**power for power in range(top - _KLS, top + 1) for digit in (1, 2, 5)]
    return [float(f"{step:g}") for step in steps if step <= most][-_KLS:]


def frontier_table(points: Sequence[Point], base: Point, best_of: Sequence[Point]) -> dict:
    """The frontiers at common KLs.

    Args:
        points: of all runs.
        base: the base model's, on the same prompts.
        best_of: the best of n of the base model, at the bounds of their KLs.

    Returns:
        "kls" and "rows", one a method and one for best-of-n: "method", "seeds", and for each of `MEASURES` that is
        known a list with an entry for each KL: {"mean", "stderr", "n"} over seeds, "stderr" None for one seed; None
        where a seed does not reach that KL.
    """
    frontiers = by_seed(points, base)
    kls = common_kls(frontiers)
    measures = [name for name in MEASURES if any(point.get(name) is not None for point in points)]
    rows = [
        {
            "method": method,
            "seeds": list(seeds),
            **{
                name: [_of_all_seeds([value_at(k, name, kl) for k in seeds.values()]) for kl in kls]
                for name in measures
            },
        }
        for method, seeds in frontiers.items()
    ]
    if best_of:
        knots = frontier_of(best_of, base)
        found = {name: [_of_all_seeds([value_at(knots, name, kl)]) for kl in kls] for name in measures}
        rows.append({"method": "best of n", "seeds": [], **found})
    return {"kls": kls, "rows": rows}


def _of_all_seeds(values: Sequence[float | None]) -> dict | None:
    return None if None in values else over_seeds(values)


def evenly_spaced(steps: Sequence[int], count: int) -> list[int]:
    """`count` of the steps, or all where there are no more, at even distances, the last one included."""
    return [steps[-(-len(steps) * i // count) - 1] for i in range(1, count + 1)] if len(steps) > count else list(steps)
