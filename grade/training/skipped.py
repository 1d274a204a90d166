"""What is kept of a step that was left out: all that it takes to make it again from a checkpoint before it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from grade.errors import writing
from grade.files import replace_text
from grade.processes import everywhere
from grade.rollout import Rollout
from grade.training.log import GO_ON
from grade.training.run_folder import SKIPPED


def keep_skipped(
    run_dir: Path,
    accelerator: Accelerator,
    rollouts: Sequence[Rollout],
    *,
    step: int,
    seed: int,
    reason: str,
    metrics: Mapping[str, float],
) -> Path:
    """Write a step's seed, prompts and responses, of all processes, to skipped/step-N.json; its place in the run.

    The noise of a step follows from its seed and number. A prompt's number is that in the training split, null where
    responses come from elsewhere; metrics that are not finite are null.

    Raises:
        GradeError: it cannot be written.
    """
    place = Path(SKIPPED) / f"step-{step}.json"
    responses = [response for own in everywhere(accelerator, _responses(rollouts)) for response in own]
    if accelerator.is_main_process:
        content = {
            "step": step,
            "seed": seed,
            "reason": reason,
            "processes": accelerator.num_processes,
            "metrics": {name: value if math.isfinite(value) else None for name, value in metrics.items()},
            "responses": responses,
        }
        with writing(run_dir / place, "train.run_dir", GO_ON):
            (run_dir / SKIPPED).mkdir(exist_ok=True)
            replace_text(run_dir / place, json.dumps(content, indent=1) + "\n")
    return place


def _responses(rollouts: Sequence[Rollout]) -> list[dict[str, Any]]:
    found = []
    for rollout in rollouts:
        numbers = [None] * len(rollout) if rollout.prompt_index is None else rollout.prompt_index.tolist()
        for number, prompt, tokens in zip(numbers, rollout.real_prompts(), rollout.real_tokens(), strict=True):
            found.append({"prompt": number, "prompt_ids": prompt, "response_ids": tokens})
    return found
