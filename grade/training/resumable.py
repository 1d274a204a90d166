"""The checkpoints that a run can go on from: how many it keeps, which of them is whole, and going back to that one.

checkpoints/last        the newest
checkpoints/resume-N    earlier ones, after N optimizer steps: `train.keep_checkpoints` counts them and the newest
checkpoints/best-N      a best checkpoint that another one has replaced, as long as one of these names it as its best

Which bests are named follows from steps alone: a checkpoint after N steps names the latest best of at most N steps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grade.errors import GradeError, writing
from grade.files import delete_folder, latest, old_copy, sync
from grade.model.checkpoint import load_state, read_state, recorded_step, verified_step
from grade.training.log import beginning
from grade.training.story import check_story

EARLIER, EARLIER_BEST = "resume", "best"
"""What the names of earlier checkpoints begin with, before their steps."""


@dataclass(frozen=True)
class Resumable:
    """The newest checkpoint that a run can go on from.

    Args:
        state: the trainer's (`grade.training.saving`), with `step`.
        best: the folder of the best checkpoint that the state names; None: it names none, or the one at hand, which
            was not saved as such.
        wrong: why each newer one cannot be used, in words.
    """

    folder: Path
    state: dict[str, Any]
    best: Path | None
    wrong: tuple[str, ...] = ()

    @property
    def resaves_best(self) -> bool:
        """Whether the run was stopped after it had noted that the policy at hand is its best, and before that was
        saved as such."""
        return self.best is None and self.state.get("best") is not None

    def warning(self) -> str | None:
        """What to say where a newer one cannot be used."""
        if not self.wrong:
            return None
        return (
            f"warning: {' '.join(self.wrong)} The run goes on from the checkpoint before, of step "
            f"{self.state['step']}, and repeats the steps after it."
        )


def has_resumable(run_dir: Path) -> bool:
    """Whether a run's folder holds any checkpoint to go on from, whole or not."""
    return bool(_newest_first(run_dir))


def resumable(run_dir: Path) -> Resumable:
    """The newest checkpoint whose files are those that were written, whose logs begin as they did then, and whose best
    is there.

    Raises:
        GradeError: there is none; with what is wrong with each.
    """
    paths, wrong = _newest_first(run_dir), dict[str, None]()
    last = run_dir / "checkpoints" / "last"
    if not paths:
        load_state(last)  # says so
    elif latest(last) not in paths:
        wrong[f"{last} is missing."] = None
    for path in paths:
        try:
            state = read_state(path)
            for name, extent in state.get("logs", {}).items():
                beginning(run_dir / name, extent, fix="")
            check_story(path, state, run_dir)
            return Resumable(path, state, _best_of(run_dir, state), tuple(wrong))
        except GradeError as error:
            wrong[str(error)] = None
    newest, *others = wrong
    further = f" No earlier checkpoint can be used either: {' '.join(others)}" if others else ""
    raise GradeError(f"train.resume: {newest}{further} Put it back, or start again with --train.overwrite true.")


def _newest_first(run_dir: Path) -> list[Path]:
    last, earlier = run_dir / "checkpoints" / "last", _numbered(run_dir, EARLIER)
    paths = [last, old_copy(last), *(earlier[step] for step in sorted(earlier, reverse=True))]
    return [path for path in paths if path.is_dir()]


def _numbered(run_dir: Path, kind: str) -> dict[int, Path]:
    """The earlier checkpoints of a kind, by their steps."""
    found = ((re.fullmatch(rf"{kind}-(\d+)", path.name), path) for path in run_dir.glob(f"checkpoints/{kind}-*"))
    return {int(match[1]): path for match, path in found if match}


def _best_of(run_dir: Path, state: Mapping[str, Any]) -> Path | None:
    """`Resumable.best`.

    Raises:
        GradeError: the best checkpoint is damaged, missing or another one, and is no longer at hand.
    """
    best = state.get("best")
    if best is None:
        return None
    folder, wrong = run_dir / "checkpoints" / "best", None
    others = (old_copy(folder), _numbered(run_dir, EARLIER_BEST).get(best["step"]))
    for place in (latest(folder), *(path for path in others if path is not None and path.is_dir())):
        try:
            step = recorded_step(place)
            if step in (None, best["step"]):  # to be read as a whole only where it may be the one
                step = verified_step(place)
            if step == best["step"]:
                return place
            wrong = wrong or f"{place} holds step {step}, but the best is step {best['step']}."
        except GradeError as error:
            wrong = wrong or str(error)
    if best["step"] != state["step"]:
        raise GradeError(wrong or "")
    return None


# -- which are kept ------------------------------------------------------------------------------------------


def place_of(run_dir: Path, kind: str, step: int, count: int, replaced: Path) -> Path | None:
    """Where a checkpoint goes that a newer one replaces; None: nowhere.

    Args:
        kind: EARLIER or EARLIER_BEST.
        step: of the newer one.
        count: `train.keep_checkpoints`.
        replaced: its folder.
    """
    before = recorded_step(replaced)
    if count == 1 or before is None or before >= step:
        return None
    return run_dir / "checkpoints" / f"{kind}-{before}"


def keep(run_dir: Path, step: int, count: int) -> None:
    """Delete the checkpoints that are too many beside checkpoints/last, which is that of `step`; what an earlier
    deletion left, too.

    Raises:
        GradeError: one of them cannot be deleted.
    """
    earlier, bests = _numbered(run_dir, EARLIER), _numbered(run_dir, EARLIER_BEST)
    kept = sorted(number for number in earlier if number < step)[1 - count :] if count > 1 else []
    current = recorded_step(run_dir / "checkpoints" / "best")
    known = {*bests, *([] if current is None else [current])}
    named = {max((best for best in known if best <= number), default=None) for number in kept} - {current}
    gone = [path for number, path in earlier.items() if number not in kept]
    gone += [path for number, path in bests.items() if number not in named]
    left = run_dir.glob("checkpoints/*.new")
    gone += [path for path in left if re.fullmatch(rf"(last|best|({EARLIER}|{EARLIER_BEST})-\d+)\.new", path.name)]
    for path in gone:
        with writing(path, "train.run_dir"):
            delete_folder(path)


def go_on_from(run_dir: Path, found: Resumable, count: int) -> None:
    """Make what was found checkpoints/last and checkpoints/best; the newer ones, whose steps are repeated, are deleted.

    A kill at any moment leaves what can be found again.

    Raises:
        GradeError: a folder cannot be renamed or deleted.
    """
    last, best = (run_dir / "checkpoints" / name for name in ("last", "best"))
    step = found.state["step"]
    with writing(last, "train.run_dir"):
        if found.folder != last:
            delete_folder(last)
            found.folder.rename(last)
        if found.best is not None and found.best != best:
            delete_folder(best)
            found.best.rename(best)
        elif (recorded_step(best) or 0) > step:
            delete_folder(best)
        for folder, kind in ((last, EARLIER), (best, EARLIER_BEST)):  # what a kill left in the place of an old copy
            old = old_copy(folder)
            if old.is_dir() and folder.is_dir():
                newer = step if folder == last else recorded_step(best) or 0
                place = None if old.is_symlink() else place_of(run_dir, kind, newer, count, old)
                if place is None or place.exists():
                    delete_folder(old)
                else:
                    old.rename(place)
        sync(last.parent)
    keep(run_dir, step, count)
