"""Models and tokenizers of transformers, by the name of a folder or of the hub, with mistakes told in words.

Two promises. What looks like a path, or is a folder here, is never looked up at the hub: a checkpoint that lacks its
weights must not turn into a stranger's model of the same name. And no code of a model's folder runs, nor is a question
asked about it, unless `model.trust_remote_code` says so; other models have no such setting.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from grade.errors import GradeError, reason_of
from grade.hub import without_waiting
from grade.hub_names import looks_local

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_VOCABULARIES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")  # of any kind of tokenizer
_NOT_TRUSTED = {
    "model.name": "Look at that code, and set model.trust_remote_code to true if it may run; or name another model.",
    "reward.model": "No code of a reward's folder is run here. Name a classifier that transformers knows by itself.",
    "compare.fluency_model": "No code of its folder is run here. Name a model that transformers knows by itself.",
}


def context_of(config: PretrainedConfig) -> int | None:
    """Most positions of a model with this configuration; None where they have no limit."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)  # the latter is MPT's
    return limit if limit is not None and limit > 0 else None


class Pretrained:
    """A model as a setting names it.

    Args:
        setting: "model.name", "reward.model" or "compare.fluency_model", for messages.
        name: its value, which messages repeat.
        path: where the model really is, if that is elsewhere.
        revision: on the hub.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        GradeError: it is a path, and there is no folder with a model: it names the file that is missing.
    """

    def __init__(
        self,
        setting: str,
        name: str,
        *,
        path: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ):
        self.setting, self.name, self.path = setting, name, path or name
        self.is_local = looks_local(self.path)
        if self.is_local:
            self.path = str(Path(self.path).expanduser())
        self.options = {
            "trust_remote_code": trust_remote_code,
            **({"local_files_only": True} if self.is_local else {"revision": revision}),
        }
        if self.is_local:
            self._check_folder(Path(self.path))

    def _load(self, loader: Any, **options: Any) -> Any:
        with self.explained():
            return loader.from_pretrained(self.path, **self.options, **options)

    def model(self, loader: Any, **options: Any) -> Any:
        """What `loader.from_pretrained` gives, an Auto class of transformers."""
        self.check_weights()
        return self._load(loader, **options)

    def config(self) -> PretrainedConfig:
        """Its configuration.

        Raises:
            GradeError: there is none, or what the hub has is an adapter.
        """
        config = self._load(AutoConfig)
        if not self.is_local:
            self._refuse_adapters()
        return config

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer.

        Raises:
            GradeError: there is none; some architectures then get one without any words. Or what the hub has is an
                adapter.
        """
        folder = Path(self.path)
        if not self.is_local:
            self._refuse_adapters()
        if self.is_local and not any(file for pattern in _VOCABULARIES for file in folder.glob(pattern)):
            raise self.refusal(
                f"{folder} has no tokenizer (tokenizer.json or the vocabulary of another kind). Save one there, by "
                "AutoTokenizer.from_pretrained(MODEL).save_pretrained(FOLDER)."
            )
        tokenizer = self._load(AutoTokenizer)
        if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
            raise self.refusal("its tokenizer has no vocabulary, only special tokens. Save the whole of it.")
        return tokenizer

    def refusal(self, reason: str) -> GradeError:
        """The error that says why it cannot be loaded."""
        return GradeError(f"{self.setting}={self.name} cannot be loaded: {reason}")

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Whatever goes wrong in reading somebody's files is told in words: the readers raise errors of any class."""
        try:
            with nullcontext() if self.is_local else without_waiting():
                yield
        except GradeError:
            raise
        except pickle.UnpicklingError as error:
            raise self.refusal(
                "its weights are a pickle (pytorch_model.bin) that holds more than tensors, or is damaged; reading it "
                "could run code. Save it as safetensors where you trust it (save_pretrained does)."
            ) from error
        except Exception as error:
            if "trust_remote_code" in str(error):
                raise self.refusal(f"it comes with code of its own. {_NOT_TRUSTED[self.setting]}") from error
            where = (
                ""
                if self.is_local
                else (
                    " Name a folder with a model, or a hub model while the hub can be reached (`grade doctor` tells)."
                )
            )
            raise self.refusal(reason_of(error).rstrip(".") + "." + where) from error

    def _refuse_adapters(self) -> None:
        """transformers would load the adapter's base from wherever the adapter says, and the adapter onto it."""
        where = {name: value for name, value in self.options.items() if name != "trust_remote_code"}
        with self.explained():
            found = find_adapter_config_file(self.path, **where)
        if found is not None:
            try:
                base = json.loads(Path(found).read_text(encoding="utf-8")).get("base_model_name_or_path")
            except (OSError, ValueError, AttributeError):
                base = None
            raise self.refusal(
                f"it is an adapter (adapter_config.json) of the model {base or 'that it was trained on'}, not a model. "
                "Name that model, and the adapter as model.adapter to go on from it; or merge the adapter into it "
                "(peft's merge_and_unload), save that, and name its folder."
            )

    def _check_folder(self, folder: Path) -> None:
        if not folder.is_dir():
            kind = "a file, not a folder with a model" if folder.exists() else "no folder here"
            raise self.refusal(f"{folder} is {kind}. (A name of this form is not looked up at the hub.)")
        self._refuse_adapters()
        if not (folder / "config.json").is_file():
            raise self.refusal(f"{folder} has no config.json. Name a folder that save_pretrained wrote.")

    def check_weights(self) -> None:
        """Refuse a folder that lacks weights: whoever else has a model of this name is not asked.

        Raises:
            GradeError: naming the file that is missing.
        """
        folder = Path(self.path)
        if not self.is_local or any((folder / name).is_file() for name in _WEIGHTS):
            return
        for index in (folder / f"{name}.index.json" for name in _WEIGHTS):
            if not index.is_file():
                continue
            with self.explained():
                parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            missing = [part for part in parts if not (folder / part).is_file()]
            if missing:
                raise self.refusal(f"{folder} lacks {missing[0]}, which {index.name} names. Complete it.")
            return
        raise self.refusal(
            f"{folder} has no weights ({' or '.join(_WEIGHTS)}, or an index of several). Name a complete model; a "
            "folder is not looked up at the hub."
        )
