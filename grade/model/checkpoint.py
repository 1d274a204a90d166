"""Checkpoints: a saved adapter, with the trainer's state where a run can be continued from it, and their checksums.

adapter_config.json, adapter_model.safetensors    as peft writes them; the base by a name that holds anywhere
config.json, model.safetensors, ...               instead, a whole model that was trained
tokenizer.json, chat_template.jinja, ...          the policy's tokenizer as transformers writes it
README.md                                         the model card, if there is one
trainer_state.json, trainer_state.safetensors     numbers and tensors of the state, if there is one (`grade.tree`)
manifest.json                                     step, the SHA-256 of every other file and, of an adapter, of its base,
                                                  with the version of transformers that had loaded that
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from peft import LoraConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from grade import tree
from grade.errors import GradeError, failure_of, read_json, reason_of, writing
from grade.files import latest, replaced_folder, sha256
from grade.formats import MANIFEST, STATE
from grade.hub_names import name_anywhere
from grade.model.adapter import TRAINED, kept_settings
from grade.model.adapter_base import Base, base_of, check_base
from grade.model.policy import Policy
from grade.shapes import misfit

MANIFEST_FILE = "manifest.json"
CARD_FILE = "README.md"
ADAPTER_FILE, MODEL_FILE = "adapter_model.safetensors", "model.safetensors"
_STATE_STEM = "trainer_state"
_LOADED = ("is_local", "local_files_only")
_FORMAT, _BASE, _BASE_LOADED_BY = 1, "base_sha256", "base_transformers"
_GO_ON = "Make room, and go on from the checkpoint before, if there is one, with --train.resume auto."


def save_checkpoint(
    directory: Path,
    policy: Policy,
    step: int,
    state: dict | None = None,
    *,
    card: str | None = None,
    place: Callable[[Path], Path | None] = lambda replaced: None,
) -> None:
    """Write the adapter as peft does (`AutoPeftModelForCausalLM.from_pretrained` loads it from any directory), or where
    every weight is trained the model as transformers does, its tokenizer and, for resuming, the trainer's state.

    An interruption leaves the earlier checkpoint or the new one, never half of either and never neither.

    Args:
        step: optimizer steps that the policy has had.
        state: dictionaries and lists of numbers, texts and tensors.
        card: the model card's text; None: there is none.
        place: given the checkpoint that stood there before, where it is kept; None: it is deleted.

    Raises:
        GradeError: it could not be written.
    """
    with writing(directory, "train.run_dir", _GO_ON), replaced_folder(directory, place) as fresh:
        if isinstance(policy.model, PeftModel):
            _save_adapter(policy.model, fresh)
        else:
            policy.causal_lm.save_pretrained(str(fresh), max_shard_size="10000GB")  # one file, whose name is known
        save_tokenizer(policy.tokenizer, fresh)
        if state is not None:
            tree.save(fresh / _STATE_STEM, state)
        base = base_of(policy.model) if isinstance(policy.model, PeftModel) else None
        _finish(fresh, step, card, base)


def write_adapter(folder: Path, policy: Policy, setting: str) -> None:
    """Write the adapter alone into a new folder, as peft does, for a program that reads it at once.

    Args:
        policy: one whose adapter is trained.
        setting: what decides the place.

    Raises:
        GradeError: it could not be written.
    """
    with writing(folder, setting):
        folder.mkdir(parents=True)
        _save_adapter(policy.model, folder)
        (folder / CARD_FILE).unlink(missing_ok=True)  # a form of peft's, to be filled in


def _save_adapter(model: PeftModel, folder: Path) -> None:
    settings = model.peft_config[TRAINED]
    if settings.base_model_name_or_path:  # a model that was made in memory has none
        settings.base_model_name_or_path = name_anywhere(settings.base_model_name_or_path)
    # The embeddings are the base's. `auto` would look for its config, at the hub where no folder has it.
    model.save_pretrained(str(folder), save_embedding_layers=False, selected_adapters=[TRAINED])


def replace_card(directory: Path, card: str) -> None:
    """Give a checkpoint another card, as a whole: the folder before or the one after stands there at every moment.

    Raises:
        GradeError: it could not be written, or the checkpoint is damaged.
    """
    step = verified_step(latest(directory))
    with writing(directory, "train.run_dir", _GO_ON), replaced_folder(directory) as fresh:
        shutil.copytree(latest(directory), fresh, dirs_exist_ok=True)
        base = recorded_base(fresh)
        (fresh / MANIFEST_FILE).unlink()
        _finish(fresh, step, card, base)


def copy_adapter(directory: Path, target: Path) -> None:
    """Copy a checkpoint without the trainer's state into an empty folder.

    Raises:
        OSError: it cannot be written.
    """
    shutil.copytree(directory, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(f"{_STATE_STEM}.*"))
    manifest = target / MANIFEST_FILE
    if manifest.is_file():  # an adapter from elsewhere has none
        step, base = read_json(manifest, "", shape=MANIFEST)["step"], recorded_base(target)
        manifest.unlink()
        card = target / CARD_FILE
        _finish(target, step, card.read_text(encoding="utf-8") if card.is_file() else None, base)


def recorded_base(directory: Path) -> Base | None:
    """The base of a checkpoint's adapter; None where nothing says so: of a whole model, of a quantized base, of an
    adapter from elsewhere."""
    path = directory / MANIFEST_FILE
    manifest = read_json(path, "", shape=MANIFEST) if path.is_file() else {}
    return Base(manifest[_BASE], manifest.get(_BASE_LOADED_BY)) if _BASE in manifest else None


def _finish(folder: Path, step: int, card: str | None, base: Base | None) -> None:
    """Write the card, instead of the form that peft leaves to be filled in, and the manifest of all files."""
    (folder / CARD_FILE).unlink(missing_ok=True)
    if card is not None:
        (folder / CARD_FILE).write_text(card, encoding="utf-8", errors="backslashreplace")
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): sha256(path) for path in paths}
    of_base = {} if base is None else {_BASE: base.sha256, _BASE_LOADED_BY: base.transformers}
    manifest = {"format": _FORMAT, "step": step, "files": files, **of_base}
    text = json.dumps({**manifest, "sha256": _digest(manifest)}, indent=2)
    (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """As transformers writes it, chat template included, without how it was loaded here, which transformers adds."""
    tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    kept = {name: value for name, value in settings.items() if name not in _LOADED}
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _digest(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def verified_step(directory: Path) -> int:
    """Optimizer steps of a checkpoint whose files are, to the bit, those that were written.

    Raises:
        GradeError: one of them is missing or differs; with its name.
    """
    path = directory / MANIFEST_FILE
    manifest = read_json(path, "", shape=MANIFEST)
    claimed = manifest.pop("sha256")
    if _digest(manifest) != claimed or manifest["format"] != _FORMAT:
        raise GradeError(f"{path} is damaged, or of another version of this program.")
    for name, digest in manifest["files"].items():
        file = directory / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise GradeError(f"{path} names {name!r}, which does not lie in {directory}.")
        try:
            found = sha256(file)
        except OSError as error:
            raise GradeError(f"{file} cannot be read ({failure_of(error)}).") from error
        if found != digest:
            raise GradeError(f"{file} is damaged: it is not what was written there (its SHA-256 differs).")
    return manifest["step"]


def recorded_step(directory: Path) -> int | None:
    """Optimizer steps of a checkpoint by its manifest alone, which may be damaged; None if nothing says so."""
    try:
        step = read_json(directory / MANIFEST_FILE, "", "step")["step"]
    except GradeError:
        return None
    return step if isinstance(step, int) else None


def load_adapter(directory: Path, policy: Policy) -> None:
    """Put a checkpoint's weights into the policy.

    Raises:
        GradeError: the folder holds no such weights, damaged ones, or of another shape.
    """
    if not isinstance(policy.model, PeftModel):
        _put_model(directory, policy.causal_lm)
        return
    put_adapter(directory, policy.model, f"checkpoint {directory}", "Use the config the run was made with.")


def _put_model(directory: Path, model: Any) -> None:
    """Put the weights of a whole model's checkpoint into a model of the same kind."""
    if not (directory / MODEL_FILE).is_file():
        raise GradeError(
            f"checkpoint {directory}: {MODEL_FILE} is missing, but model.finetuning is full. Use the config the run "
            "was made with."
        )
    if (directory / MANIFEST_FILE).is_file():
        verified_step(directory)
    try:  # by its own class, which may write other names than it has
        saved = type(model).from_pretrained(str(directory), local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise GradeError(f"checkpoint {directory}: its model cannot be read ({reason_of(error)}).") from error
    weights, ours = dict(saved.named_parameters()), dict(model.named_parameters())
    if {n: p.shape for n, p in weights.items()} != {n: p.shape for n, p in ours.items()}:
        raise GradeError(f"checkpoint {directory} holds a model of another shape than model.name.")
    wrong = next((name for name, weight in weights.items() if not weight.isfinite().all()), None)
    if wrong is not None:
        raise GradeError(f"checkpoint {directory}: its model is broken, {wrong} is not finite. Use another one.")
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(weights[name])


def put_adapter(directory: Path, model: PeftModel, what: str, fix: str) -> None:
    """Put a saved adapter's weights into the trained one.

    Args:
        what: what names the folder, such as "model.adapter=..."; for messages, as is `fix` for one that does not fit.

    Raises:
        GradeError: as `load_adapter`.
    """
    if not (directory / "adapter_config.json").is_file():
        raise GradeError(f"{what}: no adapter is saved there (adapter_config.json is missing).")
    if not any((directory / f"adapter_model.{kind}").is_file() for kind in ("safetensors", "bin")):
        raise GradeError(  # peft would look for the folder's name at the hub
            f"{what}: no adapter is saved there (adapter_model.safetensors is missing)."
        )
    if (directory / MANIFEST_FILE).is_file():  # an adapter from elsewhere has none
        verified_step(directory)
    try:
        saved, ours = LoraConfig.from_pretrained(str(directory)), model.peft_config[TRAINED]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise GradeError(f"{what}: adapter_config.json is damaged ({reason_of(error)}).") from error
    check_base(model, recorded_base(directory), saved.base_model_name_or_path, what, fix)
    for name in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"):
        if getattr(saved, name) != getattr(ours, name):
            raise GradeError(
                f"{what} was trained with {name}={getattr(saved, name)}, model.lora gives {getattr(ours, name)}: its "
                f"weights would mean something else. {fix}"
            )
    try:
        weights = load_peft_weights(str(directory), device=str(model.device))
    except pickle.UnpicklingError as error:
        raise GradeError(
            f"{what}: its adapter is a pickle (adapter_model.bin) that holds more than tensors, or is damaged; reading "
            "it could run code. Save it as safetensors where you trust it (save_pretrained does)."
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise GradeError(f"{what}: its adapter cannot be read ({reason_of(error)}).") from error
    wrong = next((name for name, weight in weights.items() if not weight.isfinite().all()), None)
    if wrong is not None:
        raise GradeError(f"{what}: its adapter is broken, {wrong} is not finite. Use another one.")
    try:
        outcome = set_peft_model_state_dict(model, weights)
    except RuntimeError as error:
        raise GradeError(f"{what} does not fit model.name and model.lora: {reason_of(error)}") from error
    expected = {name for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name in outcome.missing_keys if name in expected]
    if missing or outcome.unexpected_keys:
        raise GradeError(
            f"{what} does not fit model.name and model.lora: {len(missing)} adapter tensors are missing from it and "
            f"{len(outcome.unexpected_keys)} have no place here. {fix}"
        )


def adapter_digest(directory: Path) -> str | None:
    """SHA-256 of a checkpoint's weights, which a folder's name does not tell. None if there are none."""
    weights = [path for name in (ADAPTER_FILE, MODEL_FILE) if (path := directory / name).is_file()]
    return sha256(weights[0]) if weights else None


def holds_weights(directory: Path) -> bool:
    """Whether a folder is that of an adapter, or of a whole model as a run saves one."""
    return (directory / "adapter_config.json").is_file() or (directory / MODEL_FILE).is_file()


def started_digest(adapter: Path) -> str:
    """SHA-256 of an adapter to go on from: the files of its weights, in any of peft's formats, and the settings that
    say what they mean."""
    settings = kept_settings(LoraConfig.from_pretrained(str(adapter)))
    said = json.dumps(settings, sort_keys=True, default=sorted)  # names of layers may be sets
    return hashlib.sha256("".join([*map(sha256, sorted(adapter.glob("adapter_model.*"))), said]).encode()).hexdigest()


def load_state(directory: Path) -> dict[str, Any]:
    """The trainer's state saved with a checkpoint, and the number of steps of its manifest as `step`.

    Raises:
        GradeError: there is none, or it is damaged.
    """
    folder = latest(directory)
    if not folder.is_dir():
        raise GradeError(
            f"train.resume: {directory} is no checkpoint: there is nothing to continue. Start without train.resume, or "
            "name the folder of a run with --train.run_dir."
        )
    try:
        return read_state(folder)
    except GradeError as error:
        raise GradeError(f"train.resume: {error} Start again with --train.overwrite true.") from error


def read_state(folder: Path) -> dict[str, Any]:
    """As `load_state`, of a folder that is there.

    Raises:
        GradeError: it is damaged; with what is wrong, and without what to do.
    """
    step = verified_step(folder)
    state = tree.load(folder / _STATE_STEM)
    wrong = misfit(state, STATE)
    if wrong is not None:
        raise GradeError(f"the trainer's state in {folder} is damaged, or of something else: {wrong}.")
    if any(isinstance(leaf, torch.Tensor) and not leaf.isfinite().all() for leaf in tree.leaves(state)):
        raise GradeError(f"{folder} holds values that are not finite.")
    return {**state, "step": step}
