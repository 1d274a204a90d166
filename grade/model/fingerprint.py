"""What a run, a trained head or a measurement depends on, told by content: a path or a name may hold something else
tomorrow. Two fingerprints are dictionaries of SHA-256 sums and numbers; `differing` says in words where they differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grade.errors import GradeError, failure_of, read_json
from grade.files import remembered_sha256
from grade.formats import RECORD
from grade.model.policy import Policy
from grade.model.quantization import quantization_of
from grade.model.tensors import tensors_digest
from grade.tasks.base import Task

_MODEL_FILES = ("*.safetensors", "*.bin", "config.json", "generation_config.json", "*.py")
MODEL_GIVEN = "model_given"
"""In run.json of a run whose model was an object."""
_KNOWN: WeakKeyDictionary[Policy, dict[str, str]] = WeakKeyDictionary()
_ATTRIBUTE = "the reward's "
"""Before the names of what a reward of one's own depends on."""
_UNDERSCORE = (
    "What a reward only keeps while it works, or what is another in every process (a device, an address), belongs "
    "under a name that begins with an underscore."
)
_THEN = "{then} then, {now} now"
"""How both values of an input stand behind its name."""
_WORDS = {
    "model": "the base model's weights or settings",
    "tokenizer": "the tokenizer",
    "data": "the data of task.dataset or, given in Python, the prompts",
    "reward": "the reward",
    "adapter": "the adapter of model.adapter",
    "quantization": "model.quantization",
    "responses_per_step": "the responses of a step, over all processes",
}


def model_digest(name: str, loaded: PreTrainedModel) -> str:
    """SHA-256 over the files of a model folder, or the commit of a hub model.

    Args:
        name: folder or hub name it was loaded from.

    Raises:
        GradeError: a file cannot be read any more.
    """
    folder = Path(name)
    commit = getattr(loaded.config, "_commit_hash", None)
    if folder.is_dir():
        files = sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern)})
        try:
            return _digest({path.name: remembered_sha256(path) for path in files})
        except OSError as error:
            raise GradeError(f"{error.filename} cannot be read ({failure_of(error)}).") from error
    return commit or tensors_digest(loaded.state_dict())


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over everything that decides which ids a text gets: vocabulary, rules, special tokens, template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    if backend is not None:  # how the last call padded and cut, which says nothing of the next
        del rules["padding"], rules["truncation"]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return _digest({"rules": rules, "special": special, "template": str(getattr(tokenizer, "chat_template", None))})


def data_digest(task: Task) -> str:
    """SHA-256 over the rows of every split that a run uses."""
    described = task.describe()
    splits = {name: split for name, split in described["splits"].items() if name != "judge"}
    return _digest({"task": described["task"], "splits": splits})


def judge_digest(task: Task) -> str:
    """SHA-256 over the rows that train the judge of a comparison, which no run reads."""
    return _digest(task.describe()["splits"].get("judge"))


def inputs_of(policy: Policy, task: Task, reward: str, attributes: Mapping[str, str] | None = None) -> dict[str, str]:
    """The fingerprint of what a run reads: model, tokenizer, data and reward, by its `Reward.identity` and its
    `Reward.attributes`."""
    told = {f"{_ATTRIBUTE}{name}": text for name, text in (attributes or {}).items()}
    return {**policy_inputs(policy), "data": data_digest(task), "reward": reward, **told}


def model_inputs(policy: Policy) -> dict[str, str]:
    """The fingerprint of the base model, as it was loaded, and its tokenizer, found once for a policy: a large
    tokenizer takes seconds."""
    if policy not in _KNOWN:
        base = policy.causal_lm
        tokenizer = tokenizer_digest(policy.tokenizer)
        bits = quantization_of(base)
        _KNOWN[policy] = {
            "model": model_digest(base.name_or_path, base),
            "tokenizer": tokenizer,
            **({} if bits is None else {"quantization": bits}),
        }
    return _KNOWN[policy]


def policy_inputs(policy: Policy) -> dict[str, str]:
    """`model_inputs`, and the adapter that the policy went on from."""
    adapter = {} if policy.started_from is None else {"adapter": policy.started_from}
    return {**model_inputs(policy), **adapter}


def remember_inputs(policy: Policy, model: str) -> None:
    """Say what a policy from no file is made of: `model` is a digest of the weights as they were given."""
    policy.given = True
    _KNOWN[policy] = {"model": model, "tokenizer": tokenizer_digest(policy.tokenizer)}


def differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two fingerprints, as words; empty if nothing does."""
    names = [name for name in now if then.get(name) != now[name]]
    return _listed(names, then, now, _THEN)


def changed_inputs(then: Mapping[str, Any], now: Mapping[str, Any], process: int | None = None) -> str:
    """What differs between the inputs of a run and those of now, or of two processes, as words that end a sentence, and
    behind them a hint where an attribute of the reward does; empty if nothing differs. An attribute that one of both
    lacks differs too.

    Args:
        then: of a run's record, or of the main process. A record without attributes is one of an earlier version, which
            kept none: they are not compared.
        process: the number of the one that has `now`; None: `then` is a record.
    """
    shown = _THEN if process is None else f"in the main process {{then}}, in process {process} {{now}}"
    told = process is not None or any(map(_is_attribute, then))
    names = [name for name in now if told or not _is_attribute(name)]
    names += [name for name in then if _is_attribute(name) and name not in now]
    names = [name for name in names if then.get(name) != now.get(name)]
    hint = f" {_UNDERSCORE}" if any(map(_is_attribute, names)) else ""
    return f"{_listed(names, then, now, shown)}.{hint}" if names else ""


def _is_attribute(name: str) -> bool:
    return name.startswith(_ATTRIBUTE)


def _listed(names: Iterable[str], then: Mapping[str, Any], now: Mapping[str, Any], shown: str) -> str:
    """Names of inputs as words, with both values where those say something."""

    def words(name: str) -> str:
        if name in _WORDS and isinstance(now[name], str):
            return _WORDS[name]
        missing = "nothing" if _is_attribute(name) else None
        values = shown.format(then=then.get(name, missing), now=now.get(name, missing))
        return f"{_WORDS.get(name, name)} ({values})"

    return ", ".join(map(words, names))


def read_record(run_dir: Path) -> dict[str, Any]:
    """run.json of a run.

    Raises:
        GradeError: it cannot be read, or holds something else.
    """
    record = run_dir / "run.json"
    return read_json(record, f"Delete {record} to go without this check.", shape=RECORD)


def refuse_given(run_dir: Path) -> None:
    """Refuse to load the base of a run that trained an object of a program: no name in its settings leads to it.

    Raises:
        GradeError: the run's record says so.
    """
    record = run_dir / "run.json"
    if record.is_file() and read_record(run_dir).get(MODEL_GIVEN):
        raise GradeError(
            f"{run_dir} trained a model that was given as an object in Python, and no setting tells where it is. Go on "
            "in that program: after GradeTrainer(model, ...).train(), trainer.save(folder, merge=True) writes a whole "
            "model that every program loads."
        )


def check_made_from(run_dir: Path, inputs: Mapping[str, Any]) -> None:
    """Refuse to judge a run's checkpoints with other inputs than it was made from.

    Args:
        run_dir: the run's folder; nothing is known of one without run.json.
        inputs: the part of the fingerprint that must be the same.

    Raises:
        GradeError: with what differs.
    """
    if not (run_dir / "run.json").is_file():
        return
    changed = differing(read_record(run_dir)["inputs"], inputs)
    if changed:
        raise GradeError(
            f"{run_dir} was made with something else: {changed}. Put it back: its checkpoints belong to that."
        )


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()
