"""The held-out test of a comparison: chosen checkpoints and the base model on the same prompts with the same noise.

Beside the reward that was trained on stand two measures it had no part in: an independent judge and the perplexity of
the samples under the base model. Where the reward rises and they fall, the reward was fooled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from grade.config import Config, flatten, judged_length, settings_with_role
from grade.errors import GradeError, read_json, writing
from grade.model.checkpoint import adapter_digest, load_adapter
from grade.model.passes import base_pass, fed_embeddings
from grade.model.policy import Policy
from grade.processes import make_accelerator
from grade.replay.score import RealTokens
from grade.rollout import Rollout
from grade.studies.compare.comparison import BASE, Checkpoint
from grade.studies.compare.judge import Judge, train_judge
from grade.tasks.base import Task
from grade.tasks.encoding import encode
from grade.training.evaluation import evaluate, text_of, write_evaluations
from grade.training.run_folder import make_again
from grade.training.setup import set_up
from grade_kernels import linear_token_logprob

_TESTED = ("task", "model", "reward", "generation", "evaluation")
"""Sections whose settings may change what a test finds."""
_UNTESTED = ("evaluation.every", "evaluation.validation_prompts")
"""Settings of those that choose the checkpoints, and leave the test of one what it is."""
_ROOM = "Make room on its disk: what was tested before is kept, and the same command goes on."


def evaluate_checkpoints(
    config: Config, folder: Path, inputs: Mapping[str, str], adapters: Mapping[Checkpoint, Path], console: Console
) -> tuple[dict[Checkpoint, dict], dict[str, str], dict | None]:
    """Test the base model and each adapter, but for what `folder`/tests.json already holds of the same weights.

    Args:
        config: of the comparison.
        folder: keeps tests.json, the judge and its report.
        inputs: fingerprint of model, tokenizer, data, reward and the judge's texts (`grade.model.fingerprint`).
        adapters: folder of each checkpoint's adapter.

    Returns:
        (results as `comparison.table` reads them, by name of a run why it could not be tested, the judge's report
        or None without a judge).

    Raises:
        GradeError: tests.json or judge.json is damaged.
    """
    path = folder / "tests.json"
    kept = _kept(path, {**_identity(config), "inputs": dict(inputs)})
    results, failures = kept["results"], {}
    digests = {BASE: None, **{key: adapter_digest(adapter) for key, adapter in adapters.items()}}
    missing = [
        key for key, digest in digests.items() if results.get(key_of(key), {}).get("adapter_sha256", "none") != digest
    ]
    if missing:
        tokenizer, task, policy, reward = set_up(config, make_accelerator(config))
        prompts = task.prompts("test", tokenizer, limit=config.evaluation.test_prompts)
        measure = sample_measures(policy, load_judge(folder, config, inputs, tokenizer, task))
        for number, key in enumerate(missing, start=1):
            console.print(f"Test {number} of {len(missing)}: {_named(key)}", highlight=False)
            if key != BASE:
                try:
                    load_adapter(adapters[key], policy)
                except GradeError as error:
                    run_dir = adapters[key].parents[1]
                    failures[run_dir.name] = f"{error} {make_again(run_dir)}"
                    del digests[key]
                    continue
            row = evaluate(
                policy,
                reward,
                prompts,
                config.evaluation,
                config.generation,
                config.method,
                split="test",
                step=key[2],
                adapters=key != BASE,
                measure=measure,
            )
            results[key_of(key)] = {**_numbers(asdict(row)), "adapter_sha256": digests[key]}
            _write(path, kept)
    return {key: results[key_of(key)] for key in digests}, failures, _judge_report(folder)


def _kept(path: Path, identity: dict) -> dict:
    """tests.json, begun anew where it holds results of other settings or inputs."""
    kept = read_json(path, "Delete it: the same command tests again.") if path.is_file() else {}
    if kept.get("identity") != identity:
        kept = {"identity": identity, "results": {}}
        _write(path, kept)  # before a judge of these settings takes the place of those results' own
    return kept


def _write(path: Path, content: dict) -> None:
    with writing(path, "output_dir", _ROOM):
        write_evaluations(path, content)


def _named(key: Checkpoint) -> str:
    method, seed, step = key
    return "the base model" if key == BASE else f"{method}, seed {seed}, step {step}"


def key_of(key: Checkpoint) -> str:
    """A checkpoint as a name in JSON."""
    return "/".join(str(part) for part in key)


def _identity(config: Config) -> dict:
    """What test results depend on beside the checkpoint."""
    settings = flatten(asdict(config))
    return {
        name: settings[name]
        for name in settings_with_role("identity")
        if name == "method.kl_direction" or (name.partition(".")[0] in _TESTED and name not in _UNTESTED)
    }


def _numbers(row: dict) -> dict:
    """An evaluation with its details beside the rest, and perplexity from the summed log-probabilities."""
    details = row.pop("details")
    return {**row, **details, "perplexity": math.exp(details["base_nll"] / row["mean_length"])}


def sample_measures(policy: Policy, judge: Judge | None) -> Callable[[Rollout], dict[str, torch.Tensor]]:
    """Measures of samples that are not the reward: the judge's probability, if there is one, and the base model's
    negative log-probability, nats per response."""

    @torch.no_grad()
    def measure(rollout: Rollout) -> dict[str, torch.Tensor]:
        mask = rollout.mask
        base = base_pass(policy, rollout, fed_embeddings(rollout, policy.embedding, policy.embedding_scale))
        logprob, _ = linear_token_logprob(base.reference[mask], policy.head, rollout.tokens[mask])
        measures = {"base_nll": -RealTokens(rollout).dense(logprob).sum(1)}
        if judge is not None:
            measures["judge"] = judge.probability(judge_rows(policy, rollout))
        return measures

    return measure


def judge_rows(policy: Policy, rollout: Rollout) -> list[list[int]]:
    """Ids of the text of prompt and response, special tokens left out: what the judge reads.

    The text is encoded anew, as the judge's training texts were: a policy may spell a word in tokens that the
    tokenizer never gives, which the judge has not seen.
    """
    ids = torch.cat([rollout.prompt_ids, rollout.tokens], dim=1)
    mask = torch.cat([rollout.prompt_mask, rollout.mask], dim=1)
    texts = [text_of(policy, row, kept) for row, kept in zip(ids, mask, strict=True)]
    return encode(policy.tokenizer, texts, None, special_tokens=False)


def load_judge(folder: Path, config: Config, inputs: Mapping[str, str], tokenizer: Any, task: Task) -> Judge | None:
    """The comparison's judge, trained now unless the one kept there was trained on the same; None for a task without
    texts to learn from."""
    examples, report, path = task.examples("judge"), folder / "judge.json", folder / "judge.safetensors"
    if len({example.label for example in examples}) < 2:
        report.unlink(missing_ok=True)
        return None
    judged = judged_length(config.task, config.reward, config.generation)
    lengths = sorted({judged, config.reward.max_tokens, 2 * config.reward.max_tokens})
    identity = _judge_identity(config, inputs, lengths)
    if path.is_file() and (_judge_report(folder) or {}).get("identity") == identity:
        return Judge.load(path)
    report.unlink(missing_ok=True)  # written last: it says whose weights these are
    # Reported on the test's own reviews: held-out training reviews flatter it (the same films, perhaps).
    judge, numbers = train_judge(tokenizer, examples, task.examples("test"), lengths=lengths, seed=config.reward.seed)
    with writing(path, "output_dir", _ROOM):
        judge.save(path)
    _write(report, {**numbers, "identity": identity})
    return judge


def _judge_identity(config: Config, inputs: Mapping[str, str], lengths: Sequence[int]) -> dict:
    """What a judge and its report depend on, by content."""
    read = {name: inputs[name] for name in ("tokenizer", "judge", "data")}
    return {**read, "lengths": list(lengths), "seed": config.reward.seed}


def _judge_report(folder: Path) -> dict | None:
    path = folder / "judge.json"
    fix = "Delete it and tests.json: the same command makes both again."  # the judge is trained only for a test
    return read_json(path, fix) if path.is_file() else None
