"""Train the reward head: frozen base features once, then a small classifier on them.

The base is causal, so the mean over a review's first n states is the feature of its first n tokens: one pass gives
the features of the whole (cut) review and of the shorter text that the policy's responses will really be. The head
is trained on both and its accuracy is reported on both, on reviews it has not seen.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from grade.config import RewardConfig
from grade.errors import GradeError, writing
from grade.files import check_writable, locked, replaced_folder, sha256
from grade.model.fingerprint import differing, model_inputs
from grade.model.passes import accumulation_dtype
from grade.model.policy import Policy
from grade.rewards.shared import HEAD_FILE, KEPT_FOLDER, REPORT_FILE, RewardHead, head_report
from grade.tasks.base import Example, Task
from grade.tasks.encoding import encode
from grade.terminal import counted, say

_FEATURE_BATCH = 32


@dataclass(frozen=True)
class HeadTraining:
    """What a reward head comes from, and where it is kept.

    Args:
        settings: section `reward`.
        judged: tokens of the text that the reward will judge in training.
        output_dir: of the config, for heads without a `reward.path`.
        task: has labelled texts in "reward", to learn from, and in "validation", for the accuracy.
    """

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
        return {
            "inputs": model_inputs(self.policy), "dtype": str(self.policy.dtype).removeprefix("torch."),
            "reward": self._deciding(), "judged_length": self.judged, "task": described,
        }

    def _deciding(self) -> dict[str, Any]:
        """The settings that decide a trained head."""
        chosen = asdict(self.settings)
        del chosen["path"], chosen["model"], chosen["positive_label"]
        return chosen

    @property
    def folder(self) -> Path:
        """reward.path, or a folder under output_dir named by the head's identity."""
        if self.settings.path is not None:
            return Path(self.settings.path)
        text = json.dumps(self.identity(), sort_keys=True)
        return Path(self.output_dir) / f"reward-{hashlib.sha256(text.encode()).hexdigest()[:10]}"

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
        head = RewardHead(features, hidden)
        head.load_state_dict(weights)
        return head

    def train(self) -> tuple[RewardHead, dict[str, Any]]:
        """Learn from the texts of "reward", and report on those of "validation".

        Returns:
            (head in float32 on the policy's device, {"accuracy": {"<n> tokens": share}, "loss": nats, ...}).
        """
        settings, policy = self.settings, self.policy
        learnt, held_out = self.task.examples("reward"), self.task.examples("validation")
        lengths = sorted({self.judged, settings.max_tokens})
        marks = settings.input == "prompt+response"  # a response by itself has no token that opens a text
        train_x, train_y = features_of(policy, learnt, lengths, "Reward features, texts", special_tokens=marks)
        held_x, held_y = features_of(policy, held_out, lengths, "Held-out features, texts", special_tokens=marks)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            head = RewardHead(train_x.shape[-1], settings.hidden_size)
        head.to(policy.device)
        loss = _fit(head, train_x.flatten(0, 1), train_y.repeat(len(lengths)), settings)
        accuracy = {
            f"{n} tokens": ((head(held_x[i])[:, 1] > head(held_x[i])[:, 0]).long() == held_y).float().mean().item()
            for i, n in enumerate(lengths)
        }
        return head, {
            "accuracy": accuracy, "loss": loss, "judged_length": self.judged, "trained_on": len(learnt),
            "held_out": len(held_out),
        }


def _say_waiting() -> None:
    say("Another process trains this reward head: waiting for it.")


def with_kept_head(settings: RewardConfig, run_dir: Path) -> RewardConfig:
    """The settings, reading the head that the run in `run_dir` was trained with, if it kept one."""
    kept = run_dir / KEPT_FOLDER
    if settings.model is not None or not (kept / HEAD_FILE).is_file():
        return settings
    return replace(settings, path=str(kept))


def _fit(head: RewardHead, features: Tensor, labels: Tensor, settings: RewardConfig) -> float:
    """Minimise cross-entropy with AdamW; the mean loss of the last epoch, nats."""
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    generator = torch.Generator().manual_seed(settings.seed)
    total = 0.0
    for _ in counted("Reward head, epochs", range(settings.epochs)):
        total = 0.0
        for batch in torch.randperm(len(features), generator=generator).split(settings.batch_size):
            batch = batch.to(features.device)
            loss = torch.nn.functional.cross_entropy(head(features[batch]), labels[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
    return total / len(features)


@torch.no_grad()
def features_of(
    policy: Policy, examples: Sequence[Example], lengths: list[int], title: str, *, special_tokens: bool = True
) -> tuple[Tensor, Tensor]:
    """Mean-pooled base states of the first n tokens of each text, for each n in `lengths`.

    Args:
        special_tokens: start texts with the token the tokenizer puts there, if it does.

    Returns:
        (features [len(lengths), N, d] float32, labels [N] int64) of the N texts that have any tokens.
    """
    limit = max(lengths)
    texts = [e.text for e in examples]
    encoded = encode(policy.tokenizer, texts, limit, special_tokens=special_tokens)
    readable = [i for i, row in enumerate(encoded) if row]
    examples, encoded = [examples[i] for i in readable], [encoded[i] for i in readable]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))  # equal lengths together: little padding
    out = torch.empty(len(lengths), len(encoded), policy.embedding.shape[1], device=policy.device)
    batches = [order[start: start + _FEATURE_BATCH] for start in range(0, len(order), _FEATURE_BATCH)]
    for rows in counted(title, batches, len):
        width = len(encoded[rows[-1]])
        ids = torch.full((len(rows), width), policy.pad_id)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(encoded[row])] = torch.tensor(encoded[row])
            mask[i, : len(encoded[row])] = True
        ids, mask = ids.to(policy.device), mask.to(policy.device)
        with policy.state(adapters=False):
            hidden = policy.hidden(policy.embed(ids), mask)
        sums = (hidden.to(accumulation_dtype(hidden)) * mask[..., None]).cumsum(1)  # [b, T, d]
        for i, length in enumerate(lengths):
            counts = mask[:, :length].sum(1)
            out[i, rows] = sums[torch.arange(len(rows)), counts - 1] / counts[:, None]
    labels = torch.tensor([e.label for e in examples], device=policy.device)
    return out, labels
