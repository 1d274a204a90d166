"""What a run keeps of itself beside its weights and logs: run.json, evaluation.json and the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from grade.config import Config
from grade.errors import writing
from grade.files import replace_text
from grade.model.fingerprint import MODEL_GIVEN
from grade.training.card import model_card
from grade.training.evaluation import write_evaluations
from grade.training.log import GO_ON
from grade.training.sessions import SESSIONS, begun, earlier, utc_now
from grade.training.setup import SetUp
from grade.training.validations import Validations


class RunRecord:
    """Writes the files; on processes other than the main one nothing.

    Args:
        validations: of the run, as far as it has come.

    Attributes:
        content: what run.json holds, once the run has begun.
    """

    def __init__(self, run_dir: Path, config: Config, validations: Validations, *, enabled: bool) -> None:
        self._run_dir, self._config, self._validations, self._enabled = run_dir, config, validations, enabled
        self._path = run_dir / "run.json"
        self.content: dict[str, Any] = {}

    def begin(self, loaded: SetUp, inputs: Mapping[str, Any], step: int, processes: int) -> None:
        """Write what the run is made of and a further session, and let the reward keep what it needs.

        Args:
            inputs: fingerprint of what the run reads (`grade.model.fingerprint`).
            step: optimizer steps that the policy has had.

        Raises:
            GradeError: a file cannot be written.
        """
        if self._enabled:
            before = earlier(self._path) if self._config.train.resume else []
            self.content = {
                "task": loaded.task.describe(),
                "inputs": inputs,
                **({MODEL_GIVEN: True} if loaded.policy.given else {}),
                "reward": loaded.reward.raises,
                **loaded.reward.keep(self._run_dir),
                SESSIONS: [*before, begun(step, processes, self._config.train.deterministic)],
            }
            with writing(self._path, "train.run_dir"):
                self._replace()

    def note(self, name: str, value: Mapping[str, Any]) -> None:
        """Add an entry to run.json, once the run has begun.

        Raises:
            GradeError: it cannot be written.
        """
        if self._enabled and self.content:
            self.content[name] = value
            with writing(self._path, "train.run_dir", GO_ON):
                self._replace()

    def end_session(self) -> None:
        """Note when this session ended."""
        if self._enabled:
            self.content[SESSIONS][-1]["ended"] = utc_now()
            with suppress(OSError):  # a full disk was told of where it mattered
                self._replace()

    def evaluations(self, test: Mapping[str, Any] | None = None) -> None:
        """Write evaluation.json.

        Args:
            test: of the base model and the best checkpoint; a file that has it says that the run is finished.

        Raises:
            GradeError: it cannot be written.
        """
        if self._enabled:
            path, tested = self._run_dir / "evaluation.json", {"test": test} if test else {}
            with writing(path, "train.run_dir", GO_ON):
                write_evaluations(
                    path, {"validation": self._validations.rows, "best": self._validations.best, **tested}
                )

    def card(self, step: int, test: Mapping[str, Any] | None = None, *, merged: bool = False) -> str:
        """The model card of the policy after `step` steps; of a run that has begun."""
        return model_card(self._config, self.content, step, self._validations.rows, test, merged=merged)

    def _replace(self) -> None:
        replace_text(self._path, json.dumps(self.content, indent=2) + "\n")
