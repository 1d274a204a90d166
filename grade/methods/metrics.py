"""What a step is measured by: sums that micro-batches and processes add up, means, seconds and memory.

Names follow TRL where it has one (`reward`, `reward_std`, `kl`, `entropy`, `grad_norm`, `completions/mean_length`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from grade.replay.score import Scores
from grade.rollout import Rollout


def now(device: torch.device) -> float:
    """Seconds of a clock, once the device has done all that it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Phases:
    """Seconds spent in named parts of a step. On an accelerator each part waits for its work, so times are real."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = now(self.device)
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + now(self.device) - start

    def take(self) -> dict[str, float]:
        """The seconds so far, by phase; starts again from none."""
        seconds, self.seconds = self.seconds, {}
        return seconds


def unique_token_ratio(tokens: Tensor, mask: Tensor) -> Tensor:
    """[B]: distinct tokens over tokens, within each response."""
    ordered = torch.where(mask, tokens, -1).sort(dim=1).values
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return (first & (ordered >= 0)).sum(1) / mask.sum(1).clamp_min(1)


def step_sums(
    rollout: Rollout,
    scores: Scores,
    eos_ids: Tensor,
    *,
    per_response: dict[str, Tensor] | None = None,
    per_token: dict[str, Tensor] | None = None,
) -> dict[str, float]:
    """One micro-batch's contribution to `step_metrics`: sums, which micro-batches and processes can add.

    Args:
        per_response, per_token: further measures of a method by name, [B] and [B, S] with 0 at padding.
    """
    mask = rollout.mask
    reward, kl = scores.reward.double(), scores.kl.double()
    sums = {"tokens": mask.sum(), "reward²": reward.square().sum(), "kl²": kl.sum(1).square().sum()}
    of_responses = {
        "reward": reward,
        "kl_sequence": kl.sum(1),
        "unique_token_ratio": unique_token_ratio(rollout.tokens, mask),
        "eos_rate": rollout.ended_by(eos_ids),
        **(per_response or {}),
    }
    of_tokens = {
        "kl": kl,
        "entropy": scores.entropy,
        "logprob": scores.logprob,
        "topk_mass": scores.mass,
        **(per_token or {}),
    }
    if rollout.missed is not None:
        of_tokens["off_support"] = rollout.missed
    for name, values in scores.terms.items():
        applies = ~values.isnan()
        value = torch.where(applies, values.double(), 0.0)
        sums |= {
            f"{_COUNT}/{name}": applies.sum(),
            f"{_SUM}/{name}": value.sum(),
            f"{_SQUARES}/{name}": value.square().sum(),
        }
    sums |= {f"response/{name}": values.double().sum() for name, values in of_responses.items()}
    sums |= {f"token/{name}": values.double().sum() for name, values in of_tokens.items()}
    return {"responses": float(len(rollout)), **to_numbers(sums)}


_COUNT, _SUM, _SQUARES = "term-count", "term-sum", "term-squares"
"""Before the name of a term of the reward: of how many responses, the sum of its values and of their squares."""


def moments(sums: dict[str, float]) -> dict[str, tuple[float, float, float]]:
    """Of each term of the reward by name: of how many responses, the sum of its values and of their squares."""
    names = [name.removeprefix(f"{_COUNT}/") for name in sums if name.startswith(f"{_COUNT}/")]
    return {name: (sums[f"{_COUNT}/{name}"], sums[f"{_SUM}/{name}"], sums[f"{_SQUARES}/{name}"]) for name in names}


def to_numbers(sums: dict[str, Tensor]) -> dict[str, float]:
    """Scalar tensors of one device as numbers; waits for the device once."""
    return dict(zip(sums, torch.stack([value.double() for value in sums.values()]).tolist(), strict=True))


def step_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Means of a step from summed `step_sums`.

    `kl`, `entropy` and `logprob` are nats per token; `kl_sequence` is nats per response, with `kl_sequence_std` over
    responses; `topk_mass` is the candidates' share of probability; `off_support` is the share of tokens from elsewhere
    that were not among the candidates; `eos_rate` is the share of responses that ended by themselves; `tokens` is the
    number of tokens generated. `rewards/<name>/mean` and `/std` are those of a term of the reward over the responses to
    which it applies, before it is weighted; none of a term that applies to no response.
    """
    count, tokens = sums["responses"], sums["tokens"]
    means = {}
    for name, value in sums.items():
        kind, _, measure = name.partition("/")
        if kind in ("response", "token"):
            means[measure] = value / (count if kind == "response" else tokens)
    for name, (applied, total, squares) in moments(sums).items():
        if applied:
            means |= {f"rewards/{name}/mean": total / applied, f"rewards/{name}/std": _std(applied, total, squares)}
    return {
        **means,
        "reward_std": _std(count, sums["response/reward"], sums["reward²"]),
        "kl_sequence_std": _std(count, sums["response/kl_sequence"], sums["kl²"]),
        "completions/mean_length": tokens / count,
        "tokens": tokens,
    }


def update_metrics(norms: list[float]) -> dict[str, float]:
    """Of a step's optimizer steps: how many, and the mean norm of the policy's gradient before clipping (0 of none)."""
    return {"grad_norm": sum(norms) / max(len(norms), 1), "updates": len(norms)}


def add_sums(total: dict[str, float], part: dict[str, float]) -> dict[str, float]:
    """`total` with `part` added, name by name."""
    return {name: total.get(name, 0.0) + value for name, value in part.items()}


def _std(count: float, total: float, squares: float) -> float:
    """Sample standard deviation from sums; 0 for a single value."""
    if count < 2:
        return 0.0
    return max(squares - total * total / count, 0.0) ** 0.5 / (count - 1) ** 0.5


def reset_peak_memory(device: torch.device) -> None:
    """Start `peak_memory_gib` anew, where the platform can: CUDA, Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # not Linux, or /proc is read-only
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process since `reset_peak_memory`, GiB: allocated on the accelerator, or resident on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    with suppress(OSError, StopIteration):
        status = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in status if line.startswith("VmHWM:")).split()[1]) / 2**20
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 2**30  # macOS counts bytes, others KiB
