"""Train the reward head: frozen base features once, then a small classifier on them.

The base is causal, so the mean over a review's first n states is the feature of its first n tokens: one pass gives
the features of the whole (cut) review and of the shorter text that the policy's responses will really be. The head
is trained on both and its accuracy is reported on both, on reviews it has not seen.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from grade.config import Config, judged_length
from grade.errors import GradeError, read_json, writing
from grade.files import check_writable, locked, replaced_folder, sha256
from grade.model.fingerprint import differing, model_inputs
from grade.model.passes import accumulation_dtype
from grade.model.policy import Policy
from grade.rewards.reward import RewardHead
from grade.tasks.encoding import encode

_HEAD_FILE, _REPORT_FILE = "head.safetensors", "reward.json"
_FEATURE_BATCH = 32


def head_identity(config: Config, policy: Policy, task) -> dict:
    """What a trained head depends on, by content: two equal identities may share one head."""
    described = task.describe()
    del described["splits"]["judge"], described["texts_in_two_splits"], described["dataset"]
    described.pop("labels", None)  # the splits' sums cover what became of them
    return {
        "inputs": model_inputs(policy), "dtype": config.model.dtype, "reward": _head_settings(config),
        "judged_length": judged_length(config), "task": described,
    }


def _head_settings(config: Config) -> dict:
    """The settings of section `reward` that decide a trained head."""
    reward = asdict(config.reward)
    del reward["path"], reward["model"], reward["positive_label"]
    return reward


def head_folder(config: Config, policy: Policy, task) -> Path:
    """reward.path, or a folder under output_dir named by the head's identity."""
    if config.reward.path is not None:
        return Path(config.reward.path)
    text = json.dumps(head_identity(config, policy, task), sort_keys=True)
    return Path(config.output_dir) / f"reward-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def load_or_train_head(config: Config, policy: Policy, task) -> RewardHead:
    """The trained head of this config, from its folder or trained into it now.

    Raises:
        GradeError: reward.path holds something else than a head for this model.
    """
    folder = head_folder(config, policy, task)
    if (folder / _HEAD_FILE).is_file():
        return _load(folder, config, policy)
    setting = "output_dir" if config.reward.path is None else "reward.path"
    check_writable(setting, folder)
    with writing(folder.parent, setting):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.lock"), setting, f"{folder} is in use.", wait=_say_waiting):
        if (folder / _HEAD_FILE).is_file():  # another process has trained it meanwhile
            return _load(folder, config, policy)
        return _train_into(folder, setting, config, policy, task)


def _say_waiting() -> None:
    Console(stderr=True).print("Another process trains this reward head: waiting for it.")


def _train_into(folder: Path, setting: str, config: Config, policy: Policy, task) -> RewardHead:
    """Train the head and keep it in its folder, complete or not at all."""
    if config.reward.path is not None and folder.exists() and any(folder.iterdir()):
        raise GradeError(f"reward.path={folder} holds no reward head ({_HEAD_FILE} is missing). Name another folder.")
    head, report = train_head(config, policy, task)
    if not math.isfinite(report["loss"]):
        raise GradeError(
            f"reward.learning_rate={config.reward.learning_rate}: the head's loss became {report['loss']}. Lower it."
        )
    report["identity"] = head_identity(config, policy, task)
    report["model"] = config.model.name
    with writing(folder, setting), replaced_folder(folder) as fresh:
        save_file(head.state_dict(), fresh / _HEAD_FILE)
        report["sha256"] = sha256(fresh / _HEAD_FILE)
        (fresh / _REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return head


def keep_head(config: Config, policy: Policy, task, run_dir: Path) -> None:
    """Copy the head into the run: its reward stays what it was, whatever happens to the shared folder."""
    source, kept = head_folder(config, policy, task), run_dir / "reward"
    if source != kept and not (kept / _HEAD_FILE).is_file():
        with writing(kept, "train.run_dir"), replaced_folder(kept) as fresh:
            for name in (_HEAD_FILE, _REPORT_FILE):
                shutil.copyfile(source / name, fresh / name)


def with_kept_head(config: Config, run_dir: Path) -> Config:
    """The config, reading the head that the run in `run_dir` was trained with, if it kept one."""
    kept = run_dir / "reward"
    if config.reward.model is not None or not (kept / _HEAD_FILE).is_file():
        return config
    return replace(config, reward=replace(config.reward, path=str(kept)))


def head_report(config: Config, policy: Policy, task) -> dict:
    """The accuracies stored with the head, empty before it is trained."""
    return _report(head_folder(config, policy, task))


def _report(folder: Path) -> dict:
    path = folder / _REPORT_FILE
    return read_json(path, f"Delete {folder}: the head is then trained again.") if path.is_file() else {}


def _load(folder: Path, config: Config, policy: Policy) -> RewardHead:
    try:
        weights = load_file(folder / _HEAD_FILE)
        hidden, features = weights["layers.0.weight"].shape
    except (SafetensorError, KeyError, ValueError) as error:
        raise GradeError(f"reward.path={folder}: {_HEAD_FILE} is no reward head ({error}).") from error
    report = _report(folder)
    if report.get("sha256") != sha256(folder / _HEAD_FILE):
        raise GradeError(
            f"the reward head {folder}: {_HEAD_FILE} is not what was trained there ({_REPORT_FILE} tells). Put it "
            "back, or delete the folder: the head is then trained again."
        )
    try:
        inputs, settings = report["identity"]["inputs"], report["identity"]["reward"]
        changed = differing(inputs, model_inputs(policy)) or differing(settings, _head_settings(config))
    except (KeyError, TypeError, AttributeError) as error:
        raise GradeError(
            f"the reward head {folder}: {_REPORT_FILE} does not say what it was trained on. Delete the folder: the "
            "head is then trained again."
        ) from error
    if changed:
        raise GradeError(
            f"the reward head {folder} was trained with something else: {changed}. Put that back, name another head "
            "with reward.path, or leave reward.path null to train one."
        )
    if features != policy.head.weight.shape[1]:
        raise GradeError(
            f"reward.path={folder}: its head reads {features} features, {config.model.name} has "
            f"{policy.head.weight.shape[1]}. Name the head of this model, or leave reward.path null to train one."
        )
    head = RewardHead(features, hidden)
    head.load_state_dict(weights)
    return head


def train_head(config: Config, policy: Policy, task) -> tuple[RewardHead, dict]:
    """Train on task.reward, report on task.validation.

    Returns:
        (head in float32 on the policy's device, {"accuracy": {"<n> tokens": share}, "loss": nats, ...}).
    """
    lengths = sorted({judged_length(config), config.reward.max_tokens})
    marks = config.reward.input == "prompt+response"  # a response by itself has no token that opens a text
    train_x, train_y = features_of(policy, task.reward, lengths, "Reward features", special_tokens=marks)
    held_x, held_y = features_of(policy, task.validation, lengths, "Held-out features", special_tokens=marks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.reward.seed)
        head = RewardHead(policy.head.weight.shape[1], config.reward.hidden_size)
    head.to(policy.device)
    loss = _fit(head, train_x.flatten(0, 1), train_y.repeat(len(lengths)), config)
    accuracy = {
        f"{length} tokens": ((head(held_x[i])[:, 1] > head(held_x[i])[:, 0]).long() == held_y).float().mean().item()
        for i, length in enumerate(lengths)
    }
    return head, {
        "accuracy": accuracy, "loss": loss, "judged_length": judged_length(config),
        "trained_on": len(task.reward), "held_out": len(task.validation),
    }


def _fit(head: RewardHead, features: Tensor, labels: Tensor, config: Config) -> float:
    """Minimise cross-entropy with AdamW; the mean loss of the last epoch, nats."""
    settings = config.reward
    optimizer = torch.optim.AdamW(
        head.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    generator = torch.Generator().manual_seed(settings.seed)
    total = 0.0
    for _ in range(settings.epochs):
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
    policy: Policy, examples: Sequence, lengths: list[int], title: str, *, special_tokens: bool = True
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
    out = torch.empty(len(lengths), len(encoded), policy.head.weight.shape[1], device=policy.device)
    starts = range(0, len(order), _FEATURE_BATCH)
    for start in track(starts, description=title, console=Console(stderr=True), transient=True):
        rows = order[start: start + _FEATURE_BATCH]
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
