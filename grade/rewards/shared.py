"""The head on the frozen base: no second model, and the reference's forward and backward serve it too."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grade.errors import read_json, writing
from grade.files import replaced_folder
from grade.model.passes import BasePass, accumulation_dtype
from grade.model.policy import Policy
from grade.rewards.base import DifferentiableReward, EmbeddingTable
from grade.rollout import Rollout

HEAD_FILE, REPORT_FILE = "head.safetensors", "reward.json"
KEPT_FOLDER = "reward"
"""Of a run, where its head is kept."""


class RewardHead(nn.Module):
    """Linear-Tanh-Linear on pooled features, in float32: [B, d] -> [B, 2] logits (negative, positive)."""

    def __init__(self, feature_size: int, hidden_size: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(feature_size, hidden_size), nn.Tanh(), nn.Linear(hidden_size, 2))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features.to(next(self.parameters()).dtype))

    def probability(self, features: Tensor) -> Tensor:
        """[B] probability of the positive class."""
        return self(features).softmax(-1)[..., 1]


class SharedReward(DifferentiableReward):
    """A trained head on the mean state of the frozen base model that the policy's adapter sits on.

    Pooled by position, so padding and whatever follows the end of a response never counts.

    Args:
        policy: owner of the base weights.
        head: trained `RewardHead`; frozen here.
        reads: "prompt+response", from the base pass; or "response", a pass of its own from position 0.
        raises: as of every `Reward`.
        folder: that keeps the head and the report of its training.
    """

    def __init__(
        self, policy: Policy, head: RewardHead, reads: str = "prompt+response", *,
        raises: str = "the probability of a positive review", folder: Path | None = None,
    ):
        self.policy, self.reads, self.raises, self.folder = policy, reads, raises, folder
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
            return self.head.probability(total / (base.prompt_count + mask.sum(1))[:, None])
        states = self._states(rollout, fed[0], activation_checkpointing)
        return self.head.probability(mean_pool(states, mask))

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
        sums = torch.cat([sums[:, None], states], dim=1).cumsum(1)
        counts = torch.cat([counts[:, None], rollout.mask.long()], dim=1).cumsum(1)
        return self.head.probability(sums / counts.clamp_min(1)[..., None])

    def _states(self, rollout: Rollout, x: Tensor, activation_checkpointing: bool = False) -> Tensor:
        """[B, S, d], the base's of the response by itself."""
        with self.policy.state(adapters=False, activation_checkpointing=activation_checkpointing):
            return self.policy.hidden(x, rollout.mask)

    def keep(self, run_dir: Path) -> dict[str, Any]:
        """Copy the head into the run: its reward stays what it was, whatever happens to the shared folder."""
        kept = run_dir / KEPT_FOLDER
        if self.folder is not None and self.folder != kept and not (kept / HEAD_FILE).is_file():
            with writing(kept, "train.run_dir"), replaced_folder(kept) as fresh:
                for name in (HEAD_FILE, REPORT_FILE):
                    shutil.copyfile(self.folder / name, fresh / name)
        return {"reward_head": head_report(kept)}


def head_report(folder: Path) -> dict[str, Any]:
    """The accuracies and the identity stored with a head, empty before it is trained."""
    path = folder / REPORT_FILE
    return read_json(path, f"Delete {folder}: the head is then trained again.") if path.is_file() else {}


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """[B, T, d] and [B, T] bool -> [B, d], the mean over real tokens, in float32 (float64 for float64)."""
    return (hidden.to(accumulation_dtype(hidden)) * mask[..., None]).sum(1) / mask.sum(1).clamp_min(1)[:, None]
