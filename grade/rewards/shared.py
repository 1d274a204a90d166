"""The head on the frozen base: no second model, and the reference's forward and backward serve it too."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from grade.errors import read_json, writing
from grade.files import replaced_folder
from grade.formats import HEAD
from grade.model.passes import BasePass, accumulation_dtype
from grade.model.policy import Policy
from grade.model.tensors import running_sum, tensors_digest
from grade.rewards.base import DifferentiableReward, EmbeddingTable
from grade.rollout import Rollout
from grade.tasks.base import LabelType

HEAD_FILE, REPORT_FILE = "head.safetensors", "reward.json"
KEPT_FOLDER = "reward"
"""Of a run, where its head is kept."""


_RAISED: dict[LabelType, str] = {
    "classes": "the probability of a positive review",
    "numbers": "the number that the reward head estimates",
    "pairs": "the sigmoid of the score by which the reward head prefers answers",
}


class RewardHead(nn.Module):
    """Linear-Tanh-Linear on pooled features, in float32: [B, d] -> [B, 2] logits (negative, positive) of classes, or
    the [B, 1] logit of pairs, or the estimate of numbers.

    Args:
        label_type: what it learns: "classes", "numbers" or "pairs".
    """

    OUTPUTS = {"classes": 2, "numbers": 1, "pairs": 1}

    def __init__(self, feature_size: int, hidden_size: int, label_type: LabelType = "classes"):
        super().__init__()
        self.label_type = label_type
        last = nn.Linear(hidden_size, self.OUTPUTS[label_type])
        self.layers = nn.Sequential(nn.Linear(feature_size, hidden_size), nn.Tanh(), last)

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features.to(next(self.parameters()).dtype))

    @property
    def last(self) -> nn.Linear:
        return cast(nn.Linear, self.layers[-1])

    def reward(self, features: Tensor) -> Tensor:
        """[B] probability of the positive class, in (0, 1); of numbers the estimate, unbounded; of pairs the sigmoid of
        the logit, in (0, 1)."""
        outputs = self(features)
        if self.label_type == "classes":
            return outputs.softmax(-1)[..., 1]
        return outputs[..., 0] if self.label_type == "numbers" else outputs[..., 0].sigmoid()


class SharedReward(DifferentiableReward):
    """A trained head on the mean state of the frozen base model that the policy's adapter sits on.

    Pooled by position, so padding and whatever follows the end of a response never counts.

    Args:
        policy: owner of the base weights.
        head: trained `RewardHead`; frozen here.
        reads: "prompt+response", from the base pass; or "response", a pass of its own from position 0.
        raises: as of every `Reward`; None: what the head has learnt, in general words.
        folder: that keeps the head and the report of its training.
        report: of the training of a head that lies in no folder.
    """

    _KNOWN_OTHERWISE = DifferentiableReward._KNOWN_OTHERWISE | {"folder", "report"}

    def __init__(
        self,
        policy: Policy,
        head: RewardHead,
        reads: str = "prompt+response",
        *,
        raises: str | None = None,
        folder: Path | None = None,
        report: Mapping[str, Any] | None = None,
    ):
        self.policy, self.reads, self.folder, self.report = policy, reads, folder, report
        self.raises = raises or _RAISED[head.label_type]
        self.head = head.to(policy.device).requires_grad_(False).eval()
        self.modules = [self.head]
        self.shares_base_pass = reads == "prompt+response"
        self.tables = () if self.shares_base_pass else (EmbeddingTable(policy.embedding, policy.embedding_scale),)

    def value(
        self, rollout: Rollout, base: BasePass, fed: Sequence[Tensor] = (), *, activation_checkpointing: bool = False
    ) -> Tensor:
        mask = rollout.mask
        if self.shares_base_pass:
            states = base.response.to(accumulation_dtype(base.response))
            total = base.prompt_sum + (states * mask[..., None]).sum(1)
            return self.head.reward(total / (base.prompt_count + mask.sum(1))[:, None])
        states = self._states(rollout, fed[0], activation_checkpointing)
        return self.head.reward(mean_pool(states, mask))

    @torch.no_grad()
    def prefix_values(self, rollout: Rollout, base: BasePass) -> Tensor:
        """As of every `Reward`.

        The base is causal, so the mean over the states up to a token is what the reward would read there. A reward
        that reads the response alone has nothing to read before it: it starts from an empty mean.
        """
        if self.shares_base_pass:
            states, sums, counts = base.response, base.prompt_sum, base.prompt_count
        else:
            states = self._states(rollout, self.inputs(rollout)[0])
            sums, counts = torch.zeros_like(base.prompt_sum), torch.zeros_like(base.prompt_count)
        states = states.to(accumulation_dtype(states)) * rollout.mask[..., None]
        sums = running_sum(torch.cat([sums[:, None], states], dim=1), 1)
        counts = torch.cat([counts[:, None], rollout.mask.long()], dim=1).cumsum(1)
        return self.head.reward(sums / counts.clamp_min(1)[..., None])

    def _states(self, rollout: Rollout, x: Tensor, activation_checkpointing: bool = False) -> Tensor:
        """[B, S, d], the base's of the response by itself."""
        with self.policy.state(adapters=False, activation_checkpointing=activation_checkpointing):
            return self.policy.hidden(x, rollout.mask, padded=False)

    def keep(self, run_dir: Path) -> dict[str, Any]:
        """Copy the head into the run: its reward stays what it was, whatever happens to the shared folder. Of one that
        lies in no folder, the SHA-256 of its weights and what its training has reported."""
        if self.folder is None:
            weights = {"label_type": self.head.label_type, "sha256": tensors_digest(self.head.state_dict())}
            return {"reward_head": {**(self.report or {}), **weights}}
        kept = run_dir / KEPT_FOLDER
        if self.folder != kept and not (kept / HEAD_FILE).is_file():
            with writing(kept, "train.run_dir"), replaced_folder(kept) as fresh:
                for name in (HEAD_FILE, REPORT_FILE):
                    shutil.copyfile(self.folder / name, fresh / name)
        return {"reward_head": head_report(kept)}


def head_lines(report: Mapping[str, Any]) -> list[str]:
    """What a head's report says of data that it has not seen, a line for each length of text."""
    unit = "pairs" if report.get("label_type") == "pairs" else report.get("unit", "texts")
    names = {
        "accuracy": "share ranked right" if unit == "pairs" else "accuracy",
        "r2": "R²",
        "mean_absolute_error": "mean absolute error",
        "correlation": "correlation",
        "correlation_within_prompts": "correlation within prompts",
    }
    measured = {name: values for name, values in report.items() if name in names}
    lines = []
    for text in next(iter(measured.values()), {}):
        found = ", ".join(
            f"{names[name]} {'undefined (all are equal)' if values[text] is None else format(values[text], '.3f')}"
            for name, values in measured.items()
            if text in values
        )
        judged = " (the length it will judge)" if text == f"{report.get('judged_length')} tokens" else ""
        lines.append(f"held-out {found} on the first {text}{judged}, {report.get('held_out', '?')} {unit}")
    return lines


def head_report(folder: Path) -> dict[str, Any]:
    """The accuracies and the identity stored with a head, empty before it is trained."""
    path = folder / REPORT_FILE
    return read_json(path, f"Delete {folder}: the head is then trained again.", shape=HEAD) if path.is_file() else {}


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """[B, T, d] and [B, T] bool -> [B, d], the mean over real tokens, in float32 (float64 for float64)."""
    return (hidden.to(accumulation_dtype(hidden)) * mask[..., None]).sum(1) / mask.sum(1).clamp_min(1)[:, None]
