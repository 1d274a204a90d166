"""The reward head of a config: kept in a folder named by what it was trained on, and trained where there is none."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from grade.config import RewardConfig, TaskConfig, trains_head
from grade.errors import GradeError, writing
from grade.files import check_writable, locked, replaced_folder, sha256
from grade.model.fingerprint import differing, model_inputs
from grade.model.policy import Policy
from grade.rewards.head_fitting import HeadData, fit_head
from grade.rewards.shared import HEAD_FILE, KEPT_FOLDER, REPORT_FILE, RewardHead, head_report
from grade.tasks.base import PairIds, Task, sha256_of
from grade.terminal import say


@dataclass(frozen=True)
class HeadTraining:
    """What a reward head comes from, and where it is kept.

    Args:
        settings: section `reward`.
        judged: tokens of the text that the reward will judge in training.
        output_dir: of the config, for heads without a `reward.path`.
        task: has labelled texts or pairs in "reward", to learn from, and in "validation", for the accuracy.
    """

    KIND: ClassVar[str] = "reward"
    """What the names of its folders begin with."""

    settings: RewardConfig
    judged: int
    output_dir: str
    policy: Policy
    task: Task

    def identity(self) -> dict[str, Any]:
        """What the head depends on, by content: two equal identities may share one head."""
        described = self.task.describe()
        for name in ("texts_in_two_splits", "dataset", "labels"):  # the splits' sums cover what became of labels
            described.pop(name, None)
        described["splits"].pop("judge", None)
        if self.task.label_type == "pairs":  # which columns hold the answers, and what the template makes of them
            described["pairs_sha256"] = {
                split: sha256_of(json.dumps(pair) for pair in pairs) for split, pairs in self._pairs.items()
            }
        return {**self._fitting(), "task": described}

    def _fitting(self) -> dict[str, Any]:
        """The part of the identity that is known without the data."""
        return {
            "inputs": model_inputs(self.policy),
            "dtype": str(self.policy.dtype).removeprefix("torch."),
            "reward": self._deciding(),
            "judged_length": self.judged,
        }

    @cached_property
    def _pairs(self) -> dict[str, Sequence[PairIds]]:
        """The token ids that a head learns pairs from, and those that it is measured on."""
        return {split: self.task.pairs(split, self.policy.tokenizer) for split in ("reward", "validation")}

    def _deciding(self) -> dict[str, Any]:
        """The settings that decide a trained head."""
        chosen = asdict(self.settings)
        for name in ("path", "model", "positive_label", "bridge"):  # which head, and which other model instead
            del chosen[name]
        for name in ("function", "functions", "weight", "scale", "offset", "normalize"):  # how it counts in a sum
            del chosen[name]
        for name in ("proxy", "proxy_weight", "proxy_samples"):  # of another kind of head
            del chosen[name]
        return chosen

    @property
    def folder(self) -> Path:
        """reward.path, or a folder under output_dir named by the head's identity."""
        if self.settings.path is not None:
            return Path(self.settings.path)
        text = json.dumps(self.identity(), sort_keys=True)
        return Path(self.output_dir) / f"{self.KIND}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"

    def head(self) -> RewardHead:
        """The trained head, from its folder or trained into it now.

        Raises:
            GradeError: reward.path holds something else than a head for this model.
        """
        folder = self.folder
        if (folder / HEAD_FILE).is_file():
            return self._load(folder)
        setting = "output_dir" if self.settings.path is None else "reward.path"
        check_writable(setting, folder)
        with writing(folder.parent, setting):
            folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f".{folder.name}.lock"), setting, f"{folder} is in use.", wait=_say_waiting):
            if (folder / HEAD_FILE).is_file():  # another process has trained it meanwhile
                return self._load(folder)
            return self._train_into(folder, setting)

    def _train_into(self, folder: Path, setting: str) -> RewardHead:
        """Train the head and keep it in its folder, complete or not at all."""
        if self.settings.path is not None and folder.exists() and any(folder.iterdir()):
            raise GradeError(
                f"reward.path={folder} holds no reward head ({HEAD_FILE} is missing). Name another folder."
            )
        head, report = self.train()
        if not math.isfinite(report["loss"]):
            raise GradeError(
                f"reward.learning_rate={self.settings.learning_rate}: the head's loss became {report['loss']}. Lower "
                "it."
            )
        report |= {"identity": self.identity(), "model": self.policy.causal_lm.name_or_path}
        with writing(folder, setting), replaced_folder(folder) as fresh:
            save_file(head.state_dict(), fresh / HEAD_FILE)
            report["sha256"] = sha256(fresh / HEAD_FILE)
            (fresh / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        return head

    def _load(self, folder: Path) -> RewardHead:
        try:
            weights = load_file(folder / HEAD_FILE)
            hidden, features = weights["layers.0.weight"].shape
            outputs = len(weights["layers.2.weight"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise GradeError(f"reward.path={folder}: {HEAD_FILE} is no reward head ({error}).") from error
        report = head_report(folder)
        if report.get("sha256") != sha256(folder / HEAD_FILE):
            raise GradeError(
                f"the reward head {folder}: {HEAD_FILE} is not what was trained there ({REPORT_FILE} tells). Put it "
                "back, or delete the folder: the head is then trained again."
            )
        try:
            inputs, chosen = report["identity"]["inputs"], report["identity"]["reward"]
            changed = differing(inputs, model_inputs(self.policy)) or differing(chosen, self._deciding())
        except (KeyError, TypeError, AttributeError) as error:
            raise GradeError(
                f"the reward head {folder}: {REPORT_FILE} does not say what it was trained on. Delete the folder: the "
                "head is then trained again."
            ) from error
        if changed:
            raise GradeError(
                f"the reward head {folder} was trained with something else: {changed}. Put that back, name another "
                "head with reward.path, or leave reward.path null to train one."
            )
        width = self.policy.embedding.shape[1]
        if features != width:
            raise GradeError(
                f"reward.path={folder}: its head reads {features} features, the model has {width}. Name the head of "
                "this model, or leave reward.path null to train one."
            )
        label_type = report.get("label_type", "classes")  # heads of earlier versions know no other
        if label_type not in RewardHead.OUTPUTS or outputs != RewardHead.OUTPUTS[label_type]:
            raise GradeError(
                f"the reward head {folder}: {HEAD_FILE} has {outputs} outputs, and {REPORT_FILE} says that it learnt "
                f"{label_type!r}. Delete the folder: the head is then trained again."
            )
        head = RewardHead(features, hidden, label_type)
        head.load_state_dict(weights)
        return head

    def train(self) -> tuple[RewardHead, dict[str, Any]]:
        """Learn from what is labelled in "reward", and report on "validation"; as `fit_head`.

        Raises:
            GradeError: the task has nothing labelled.
        """
        task = self.task
        if task.label_type is None:
            raise GradeError(
                f"task.name={task.name} has no labels here that a reward head could learn. Name a trained head with "
                "reward.path or a classifier with reward.model, set task.label_type to pairs for data with chosen and "
                "rejected answers, or use another reward."
            )
        if task.label_type == "pairs":
            data = HeadData("pairs", self._pairs["reward"], self._pairs["validation"])
        else:
            data = HeadData(task.label_type, task.examples("reward"), task.examples("validation"))
        return fit_head(self.policy, self.settings, data, judged=self.judged)


def _say_waiting() -> None:
    say("Another process trains this reward head: waiting for it.")


def needs_labels(task: TaskConfig, reward: RewardConfig) -> bool:
    """Whether a head must be trained for these settings: none is named that was trained already."""
    path = reward.path
    return trains_head(task, reward) and not (path is not None and (Path(path) / HEAD_FILE).is_file())


def with_kept_head(settings: RewardConfig, run_dir: Path) -> RewardConfig:
    """The settings, reading the head that the run in `run_dir` was trained with, if it kept one."""
    kept = run_dir / KEPT_FOLDER
    if settings.model is not None or not (kept / HEAD_FILE).is_file():
        return settings
    return replace(settings, path=str(kept))
