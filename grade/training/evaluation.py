"""Evaluation on fixed prompts with fixed noise, the same for the base model and for every checkpoint.

The noise rows depend on the prompt's number alone, so batch size and number of processes change nothing, and
differences between two models are paired: same prompts, same noise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from grade.config import EvaluationConfig, GenerationConfig, MethodConfig
from grade.files import replace_text
from grade.methods.metrics import unique_token_ratio
from grade.model.policy import Policy
from grade.processes import failing_together
from grade.replay.score import Scores, ScoreSettings, score
from grade.rewards.base import Reward
from grade.rewards.silence import silent_line
from grade.rollout import Rollout, pad_prompts
from grade.sampling.draw import Sampling, sampling_of
from grade.sampling.sample import sample
from grade.terminal import warn_once

Measures = dict[str, torch.Tensor]

SPLIT_ROWS = {"validation": 0, "test": 2**40}  # far apart: no noise row is shared between splits


@dataclass
class Evaluation:
    """One model on one split.

    Args:
        reward, reward_stderr: mean over prompts and its standard error.
        kl: nats per token, of the config's direction, along the model's own responses.
        kl_sequence: nats per response.
        entropy: nats per token.
        unique_token_ratio: distinct over all tokens of a response, mean over responses.
        mean_length: tokens per response.
        eos_rate: share of responses that ended by themselves.
        prompts: how many.
        details: further measures of the reward or the caller, means over prompts; `solve_rate` where there is one, and
            `rewards/<name>/mean` and `/std` of the terms of a sum, before they are weighted.
        samples: the first few, as text.
    """

    split: str
    step: int | None
    model: str
    reward: float
    reward_stderr: float
    kl: float
    kl_sequence: float
    entropy: float
    unique_token_ratio: float
    mean_length: float
    eos_rate: float
    prompts: int
    details: dict[str, float] = field(default_factory=dict)
    samples: list[dict] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """The numbers, for the log."""
        numbers = {
            k: v for k, v in asdict(self).items() if isinstance(v, (int, float)) and k not in ("step", "prompts")
        }
        return {**numbers, **self.details}

    @property
    def metric(self) -> float:
        """What the best checkpoint is chosen by: the solve rate where the task has one, else the reward."""
        return metric_of(asdict(self))


def evaluation_of(row: Mapping[str, Any]) -> Evaluation:
    """An entry of evaluation.json as an object; what else a later version has written there is left out."""
    return Evaluation(**{field.name: row[field.name] for field in fields(Evaluation) if field.name in row})


def metric_of(row: Mapping[str, Any]) -> float:
    """The `Evaluation.metric` of an entry of evaluation.json."""
    return row.get("details", {}).get("solve_rate", row["reward"])


def evaluation_sampling(settings: EvaluationConfig, generation: GenerationConfig) -> Sampling:
    """Training's sampler, or the nucleus sampler of the paper's evaluation. Tokens are fed back, not mixtures: what
    a user of the trained model would do, and the same for every method."""
    return replace(sampling_of(generation), top_p=settings.top_p if settings.sampler == "top_p" else None)


def score_settings(method: MethodConfig, device: torch.device) -> ScoreSettings:
    """How the passes over a response are made; nothing here depends on the method."""
    return ScoreSettings(
        kl_direction=method.kl_direction,
        prompt_cache=method.prompt_cache,
        chunk_bytes=method.head_chunk_bytes(device.type),
    )


def evaluate(
    policy: Policy,
    reward: Reward,
    prompts: Sequence[list[int]],
    settings: EvaluationConfig,
    generation: GenerationConfig,
    method: MethodConfig,
    *,
    split: str,
    step: int | None,
    adapters: bool = True,
    accelerator: Accelerator | None = None,
    tick: Callable[[int], object] | None = None,
    measure: Callable[[Rollout], Measures] | None = None,
) -> Evaluation:
    """Sample a response to every prompt, and measure its reward, KL and entropy.

    Args:
        step: optimizer steps the policy has had, for the record.
        policy, reward, prompts, settings, generation, method, split, adapters, accelerator, tick, measure: as
            `responses` takes them; the means of what `measure` gives are the `details`.
    """
    records = responses(
        policy,
        reward,
        prompts,
        settings,
        generation,
        method,
        split=split,
        adapters=adapters,
        accelerator=accelerator,
        tick=tick,
        measure=measure,
    )
    return summary(records, settings.samples, split=split, step=step, model="policy" if adapters else "base")


def responses(
    policy: Policy,
    reward: Reward,
    prompts: Sequence[list[int]],
    settings: EvaluationConfig,
    generation: GenerationConfig,
    method: MethodConfig,
    *,
    split: str,
    adapters: bool = True,
    accelerator: Accelerator | None = None,
    tick: Callable[[int], object] | None = None,
    measure: Callable[[Rollout], Measures] | None = None,
) -> list[dict]:
    """A response to every prompt and what is said of it, for `summary`, in the order of the prompts.

    Args:
        prompts: token ids, without padding; prompt i always gets the same noise.
        method: its KL's direction, its prompt cache and its chunks of logits are used.
        split: "validation" or "test".
        adapters: False evaluates the base model.
        accelerator: shares the prompts among its processes; every process returns the whole result.
        tick: called with the number of prompts done after each batch.
        measure: given a rollout, further [B] measures of it by name.

    Returns:
        Dictionaries: "number" of the prompt, "prompt" and "response" as texts, "reward", "kl" and "entropy" (sums over
        the response, nats), "unique", "length" (tokens), "ended", and by name "details", "terms" and "silent" (whether
        a function of the reward does not apply to the response).
    """
    processes, process = (accelerator.num_processes, accelerator.process_index) if accelerator else (1, 0)
    sampling = evaluation_sampling(settings, generation)
    passes = score_settings(method, policy.device)
    size, numbers = settings.batch_size, list(range(process, len(prompts), processes))
    records: list[dict] = []
    with failing_together(accelerator):
        for start in range(0, len(numbers), size):
            chosen = numbers[start : start + size]
            ids, mask = pad_prompts([prompts[i] for i in chosen], policy.pad_id, policy.device)
            rows = SPLIT_ROWS[split] + torch.tensor(chosen, device=policy.device) * sampling.max_new_tokens
            rollout = sample(policy, ids, mask, sampling, seed=settings.seed, first_rows=rows, adapters=adapters).of(
                split, chosen
            )
            records += score_records(policy, reward, rollout, passes, chosen, adapters=adapters, measure=measure)
            if tick is not None:
                tick(len(chosen) * processes)
    if processes > 1:
        records = gather_object(records)
    for name in _silent(records):
        warn_once(silent_line(name, f"the {split} prompts"))
    return sorted(records, key=lambda r: r["number"])


def score_records(
    policy: Policy,
    reward: Reward,
    rollout: Rollout,
    settings: ScoreSettings,
    numbers: Sequence[int],
    *,
    adapters: bool,
    measure: Callable[[Rollout], Measures] | None = None,
) -> list[dict]:
    """What `responses` returns, of the B responses of a rollout, whose prompts have these B numbers."""
    rollout = replace(rollout, judged=reward.judge(rollout))
    scores = score(policy, reward, rollout, settings, adapters=adapters)
    details = reward.measures(rollout, scores.reward, scores.terms)
    details |= measure(rollout) if measure is not None else {}
    return _records(policy, rollout, scores, details, numbers, reward.judges())


def _records(
    policy: Policy, rollout: Rollout, result: Scores, details: Measures, numbers: Sequence[int], judges: Sequence[str]
) -> list[dict]:
    """Per-response values, small enough to send between processes."""
    mask, unique = rollout.mask, unique_token_ratio(rollout.tokens, rollout.mask)
    columns = {
        "reward": result.reward,
        "kl": result.kl.sum(1),
        "entropy": result.entropy.sum(1),
        "unique": unique,
        "length": mask.sum(1),
        "ended": rollout.ended_by(policy.eos_ids),
    }
    numbers_of = {name: values.tolist() for name, values in columns.items()}
    further = {name: values.double().tolist() for name, values in details.items()}
    terms = {name: values.double().tolist() for name, values in result.terms.items()}
    judged = [] if rollout.judged is None else rollout.judged.isnan().tolist()
    return [
        {
            "number": number,
            **{name: values[i] for name, values in numbers_of.items()},
            "details": {name: values[i] for name, values in further.items()},
            "silent": dict(zip(judges, judged[i], strict=True)) if judged else {},
            "terms": {name: values[i] for name, values in terms.items()},
            "prompt": text_of(policy, rollout.prompt_ids[i], rollout.prompt_mask[i]),
            "response": text_of(policy, rollout.tokens[i], mask[i]),
        }
        for i, number in enumerate(numbers)
    ]


def text_of(policy: Policy, ids: torch.Tensor, mask: torch.Tensor) -> str:
    """The text of the real tokens, special tokens left out."""
    return policy.tokenizer.decode(ids[mask].tolist(), skip_special_tokens=True)


def samples_of(policy: Policy, rollout: Rollout, count: int) -> list[dict[str, str]]:
    """The first `count` responses of a rollout and their prompts, as text."""
    return [
        {
            "prompt": text_of(policy, rollout.prompt_ids[i], rollout.prompt_mask[i]),
            "response": text_of(policy, rollout.tokens[i], rollout.mask[i]),
        }
        for i in range(min(count, len(rollout)))
    ]


def summary(records: list[dict], kept: int, *, split: str, step: int | None, model: str) -> Evaluation:
    """What `responses` has given, as one evaluation that keeps the first `kept` of them as samples."""
    rewards = torch.tensor([r["reward"] for r in records], dtype=torch.float64)
    count, tokens = len(records), sum(r["length"] for r in records)
    kl = sum(r["kl"] for r in records)
    return Evaluation(
        split=split,
        step=step,
        model=model,
        reward=rewards.mean().item(),
        reward_stderr=(rewards.std().item() / count**0.5) if count > 1 else 0.0,
        kl=kl / tokens,
        kl_sequence=kl / count,
        entropy=sum(r["entropy"] for r in records) / tokens,
        unique_token_ratio=sum(r["unique"] for r in records) / count,
        mean_length=tokens / count,
        eos_rate=sum(r["ended"] for r in records) / count,
        prompts=count,
        details={
            **{name: sum(r["details"][name] for r in records) / count for name in records[0]["details"]},
            **_of_terms([r["terms"] for r in records]),
        },
        samples=[{k: r[k] for k in ("prompt", "response", "reward")} for r in records[:kept]],
    )


def _silent(records: list[dict]) -> list[str]:
    """The functions of the reward that applied to no response."""
    return [name for name in records[0]["silent"] if all(record["silent"][name] for record in records)]


def _of_terms(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean and deviation of every term of the reward over the responses to which it applies, if there are any."""
    found = {}
    for name in rows[0]:
        values = torch.tensor([row[name] for row in rows if not math.isnan(row[name])], dtype=torch.float64)
        if len(values):
            found[f"rewards/{name}/mean"] = values.mean().item()
            found[f"rewards/{name}/std"] = values.std().item() if len(values) > 1 else 0.0
    return found


def write_evaluations(path: Path, evaluations: dict[str, object]) -> None:
    """A file of evaluations as JSON, replaced as a whole.

    Raises:
        OSError: it cannot be written.
    """
    replace_text(path, json.dumps(evaluations, indent=2, ensure_ascii=False) + "\n")
