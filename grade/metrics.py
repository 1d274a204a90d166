"""What a run writes while it runs: metrics.jsonl, samples.jsonl, tensorboard, optionally Weights & Biases.

Names follow TRL where it has one (`reward`, `reward_std`, `kl`, `entropy`, `grad_norm`, `completions/mean_length`).
"""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Dict, Iterator, List

import torch
from torch import Tensor

from grade.config import Config, GradeError
from grade.replay import ReplayResult
from grade.rollout import Rollout


class Phases:
    """Seconds spent in named parts of a step. On an accelerator each part waits for its work, so times are real."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: Dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._wait()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._wait()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def take(self) -> Dict[str, float]:
        """The seconds so far, by phase; starts again from none."""
        seconds, self.seconds = self.seconds, {}
        return seconds


def unique_token_ratio(tokens: Tensor, mask: Tensor) -> Tensor:
    """[B]: distinct tokens over tokens, within each response."""
    ordered = torch.where(mask, tokens, -1).sort(dim=1).values
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return (first & (ordered >= 0)).sum(1) / mask.sum(1).clamp_min(1)


# Sums over responses or tokens, so that micro-batches and processes can be added before dividing.
SUMS = (
    "responses", "tokens", "reward", "reward²", "kl", "entropy", "mass", "gap", "unique", "ended", "hops", "residual",
    "kl²", "logprob",
)


def step_sums(rollout: Rollout, result: ReplayResult, eos_ids: Tensor) -> Tensor:
    """One micro-batch's contribution to `step_metrics`: float64 [len(SUMS)], on CPU."""
    mask = rollout.mask
    reward = result.reward.double()
    kl, relaxed = result.kl.double(), (1 - rollout.token_weight) * mask
    parts = [
        torch.tensor(len(rollout), device=mask.device), mask.sum(), reward.sum(), reward.square().sum(), kl.sum(),
        result.entropy.double().sum(), result.mass.double().sum(), relaxed.double().sum(),
        unique_token_ratio(rollout.tokens, mask).double().sum(), rollout.ended_by(eos_ids).sum(), result.hops.sum(),
        result.residual.double().sum(), kl.sum(1).square().sum(), result.logprob.double().sum(),
    ]
    return torch.stack([p.double() for p in parts]).cpu()


def step_metrics(sums: Tensor) -> Dict[str, float]:
    """Means of a step from summed `step_sums`.

    `kl`, `entropy` and `logprob` are nats per token; `kl_sequence` is nats per response, with `kl_sequence_std` over
    responses; `topk_mass` is the candidates' share of probability; `soft_hard_gap` is the relaxed weight that is not
    on the sampled token (0: the straight-through step is exact); `eos_rate` is the share of responses that ended by
    themselves; `hops` and `hop_residual` are means over responses.
    """
    total = dict(zip(SUMS, sums.tolist(), strict=True))
    count, tokens = total["responses"], total["tokens"]
    per_response = {name: value / count for name, value in total.items()}
    per_token = {name: value / tokens for name, value in total.items()}
    return {
        "reward": per_response["reward"],
        "reward_std": _std(count, total["reward"], total["reward²"]),
        "kl": per_token["kl"],
        "kl_sequence": per_response["kl"],
        "kl_sequence_std": _std(count, total["kl"], total["kl²"]),
        "entropy": per_token["entropy"],
        "logprob": per_token["logprob"],
        "topk_mass": per_token["mass"],
        "soft_hard_gap": per_token["gap"],
        "unique_token_ratio": per_response["unique"],
        "eos_rate": per_response["ended"],
        "completions/mean_length": tokens / count,
        "hops": per_response["hops"],
        "hop_residual": per_response["residual"],
    }


def _std(count: float, total: float, squares: float) -> float:
    """Sample standard deviation from sums; 0 for a single value."""
    if count < 2:
        return 0.0
    return max(squares - total * total / count, 0.0) ** 0.5 / (count - 1) ** 0.5


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process so far, GiB: allocated on the accelerator, or resident on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 2**30  # macOS counts bytes, Linux KiB


class RunLog:
    """Appends to the run's files; on processes other than the main one it writes nothing."""

    def __init__(self, run_dir: Path, config: Config, *, enabled: bool, resume_step: int = 0):
        self.run_dir, self.enabled = run_dir, enabled
        self._tensorboard = self._wandb = None
        if not enabled:
            return
        for name in ("metrics.jsonl", "samples.jsonl"):
            _drop_after(run_dir / name, resume_step)
        if config.train.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step or None)
        if config.train.wandb:
            self._wandb = _start_wandb(config, run_dir)

    def metrics(self, step: int, values: Dict[str, float]) -> None:
        if not self.enabled:
            return
        _append(self.run_dir / "metrics.jsonl", [{"step": step, **values}])
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def samples(self, step: int, samples: List[dict]) -> None:
        if self.enabled:
            _append(self.run_dir / "samples.jsonl", [{"step": step, **s} for s in samples])

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _append(path: Path, rows: List[dict]) -> None:
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _drop_after(path: Path, step: int) -> None:
    """Drop what a run resumed after `step` steps writes again: training rows from there on, later validations.

    Training rows carry the number of their step, from 0; a validation's is the number of steps taken before it.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            if row["step"] < step or (row["step"] == step > 0 and any(name.startswith("validation/") for name in row)):
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            continue  # a line cut short when the run was stopped
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _start_wandb(config: Config, run_dir: Path):
    try:
        import wandb
    except ImportError as error:
        raise GradeError("train.wandb is true but wandb is not installed: pip install 'grade[wandb]'.") from error
    from dataclasses import asdict

    return wandb.init(project=config.train.wandb_project, name=run_dir.name, dir=str(run_dir), config=asdict(config))
