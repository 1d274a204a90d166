"""Plain Python functions as rewards, with the interface of TRL:

    def f(prompts, completions, **columns) -> list[float | None]

Texts without special tokens, or lists of messages where the task has conversations; `columns` are the other columns of
the data set at each prompt. A function is called by the names of its parameters, and gets `completion_ids` (lists of
token ids) too if it asks for them. `None` says that the reward does not apply to a response.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from numbers import Real
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grade.errors import GradeError, NotFinite, RewardFailed, failure_of, reason_of
from grade.machine import is_out_of_memory
from grade.rewards.attributes import of_function, stable_repr
from grade.rewards.base import MEND, RewardFunction
from grade.rollout import Rollout
from grade.tasks.base import Task


@dataclass(frozen=True)
class Loaded:
    """A function from a file.

    Args:
        called: as it was named, `FILE.py:NAME`, for messages.
        sha256: of the file that was run.
    """

    function: Callable[..., Any]
    called: str
    file: str
    name: str
    sha256: str


def load_function(called: str, setting: str = "reward.function") -> Loaded:
    """Run a Python file, and nothing else, for a function in it; a file with the same content is run once.

    Args:
        called: `FILE.py:NAME`, the path relative to the current directory.
        setting: that names it, for messages.

    Raises:
        GradeError: there is no such file or name, the file cannot be run, or what is called so is no plain function.
    """
    file, colon, name = called.rpartition(":")
    where, path = f"{setting}={called}", Path(file).expanduser()
    if not colon or not file or not name.isidentifier():
        raise GradeError(f"{where}: write FILE.py:NAME, such as rewards.py:is_correct.")
    try:
        source = path.read_bytes()
    except OSError as error:
        reason = "there is no such file" if not path.exists() else failure_of(error)
        raise GradeError(f"{where}: {path} cannot be read ({reason}). Name a Python file.") from error
    digest = hashlib.sha256(source).hexdigest()
    try:
        module = _run(str(path.absolute()), digest, source)
    except (Exception, SystemExit) as error:
        raise GradeError(f"{where}: {path} cannot be run ({_shown(error, str(path.absolute()))}). Mend it.") from error
    found = getattr(module, name, None)
    if found is None:
        names = [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
        listed = f"It has {', '.join(names)}." if names else "It has no function."
        raise GradeError(f"{where}: {path} has nothing called {name}. {listed}")
    check_function(found, where)
    return Loaded(found, called, str(path.absolute()), name, digest)


@cache
def _run(path: str, digest: str, source: bytes) -> ModuleType:
    """A file's module, made of these bytes."""
    module = ModuleType(f"grade_reward_{digest[:16]}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses and pickle look a class' module up there
    try:
        exec(compile(source, path, "exec"), module.__dict__)
    except BaseException:
        del sys.modules[module.__name__]
        raise
    return module


def check_function(function: Any, where: str) -> None:
    """Refuse what cannot be called for a list of numbers.

    Raises:
        GradeError: with `where` in front.
    """
    if inspect.isclass(function):
        raise GradeError(f"{where}: it is a class. Name a function, or an object of the class.")
    if not callable(function):
        raise GradeError(f"{where}: it is {type(function).__name__}, which cannot be called. Name a function.")
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        raise GradeError(f"{where}: it is async, and rewards are waited for. Write `def` instead of `async def`.")


class FunctionReward(RewardFunction):
    """A plain function as a reward.

    Args:
        function: see the top of this file.
        tokenizer: the policy's.
        task: that the prompts come from, which has the columns; None: there are none.
        loaded: where it comes from, if from a file.

    Raises:
        GradeError: the function is async, or no function.
    """

    _KNOWN_OTHERWISE = RewardFunction._KNOWN_OTHERWISE | {
        "function", "tokenizer", "task", "loaded", "name", "where", "parameters",
    }  # fmt: skip

    def __init__(
        self,
        function: Callable[..., Any],
        tokenizer: PreTrainedTokenizerBase,
        task: Task | None = None,
        *,
        loaded: Loaded | None = None,
    ):
        self.function, self.tokenizer, self.task, self.loaded = function, tokenizer, task, loaded
        self.name = getattr(function, "__name__", type(function).__name__) if loaded is None else loaded.name
        self.where = f"the reward function {self.name if loaded is None else loaded.called}"
        self.raises = f"what {self.name if loaded is None else loaded.called} returns"
        check_function(function, self.where)
        try:
            self.parameters = dict(inspect.signature(function).parameters)
        except (TypeError, ValueError) as error:
            raise GradeError(f"{self.where} does not say what it is called with. Wrap it in a `def`.") from error

    def score(self, rollout: Rollout) -> Tensor:
        """[B] float32, NaN where the function returns None.

        Raises:
            RewardFailed: the function fails, asks for a column that is not there, or returns something else than a
                list of B finite numbers or None.
        """
        arguments = self._arguments(rollout)
        try:
            returned = self.function(**arguments)
        except (Exception, SystemExit) as error:
            if is_out_of_memory(error):  # of a model that it runs; the trainer says more
                raise
            file = None if self.loaded is None else self.loaded.file
            raise RewardFailed(f"{self.where} failed ({_shown(error, file)}). {MEND}") from error
        return torch.tensor(self._numbers(returned, len(rollout)), dtype=torch.float32, device=rollout.tokens.device)

    def judge(self, rollout: Rollout) -> Tensor:
        return self.score(rollout)[:, None]

    def judges(self) -> list[str]:
        return [self.name if self.loaded is None else self.loaded.called]

    def identity(self) -> str:
        """By the content of its file, or of its source where it comes from no file: of an object the source of its
        class, of a `functools.partial` its arguments too, and of what has no source its compiled code.

        Raises:
            GradeError: it has neither source nor code, as functions written in C.
        """
        if self.loaded is not None:
            return self._with_source(f"{self.loaded.sha256} {self.loaded.name}")
        return self._with_source(f"{hashlib.sha256(self._content(self.function).encode()).hexdigest()} {self.name}")

    def _content(self, function: Callable[..., Any]) -> str:
        if isinstance(function, partial):
            given = f"{stable_repr(function.args)} {stable_repr(sorted(function.keywords.items()))}"
            return f"{self._content(function.func)} {given}"
        function = inspect.unwrap(function)
        try:
            return inspect.getsource(function if hasattr(function, "__code__") else type(function))
        except (OSError, TypeError) as error:
            called = function if hasattr(function, "__code__") else type(function).__call__
            if not hasattr(called, "__code__"):
                raise GradeError(
                    f"{self.where} has neither source nor code by which a run could know it again. Wrap it in a `def`."
                ) from error
            defaults = f"{stable_repr(called.__defaults__)} {stable_repr(called.__kwdefaults__)}"
            return f"{_compiled(called.__code__)} {defaults}"

    def attributes(self) -> dict[str, str]:
        """Of a function from no file: what it depends on, as `grade.rewards.attributes.of_function` tells; and what a
        subclass of one's own holds."""
        own = super().attributes()
        if self.loaded is not None:
            return own
        return {**own, **{f"{self.name}.{name}": text for name, text in of_function(self.function).items()}}

    def keep(self, run_dir: Path) -> dict[str, Any]:
        """Its file, name and SHA-256."""
        file, sha256 = (None, None) if self.loaded is None else (self.loaded.file, self.loaded.sha256)
        return {"reward_functions": [{"file": file, "function": self.name, "sha256": sha256}]}

    def _arguments(self, rollout: Rollout) -> dict[str, Any]:
        """What the function is called with, by name."""
        ids = rollout.real_tokens()
        texts, columns, conversations = self._texts(ids), self._columns(rollout), None
        if self.task is not None and rollout.prompt_index is not None and rollout.split is not None:
            conversations = self.task.conversations(rollout.split, rollout.prompt_index.tolist())
        given: dict[str, Any] = {**columns, "completion_ids": ids}
        if conversations is None:
            given |= {"prompts": self._texts(rollout.real_prompts()), "completions": texts}
        else:
            answers = [[{"role": "assistant", "content": text}] for text in texts]
            given |= {"prompts": conversations, "completions": answers}
        kinds = inspect.Parameter
        if not any(p.kind is kinds.VAR_KEYWORD for p in self.parameters.values()):
            given = {name: value for name, value in given.items() if name in self.parameters}
        missing = [
            name
            for name, p in self.parameters.items()
            if p.default is kinds.empty
            and p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
            and name not in given
        ]
        if missing:
            there = ", ".join(["prompts", "completions", "completion_ids", *columns])
            foreign = " Prompts of rollout.source have no columns." if rollout.prompt_index is None else ""
            raise RewardFailed(
                f"{self.where} asks for {', '.join(missing)}, and there is {there}.{foreign} Name a column of the data "
                "set, or give the parameter a default."
            )
        return given

    def _columns(self, rollout: Rollout) -> dict[str, list]:
        if self.task is None or rollout.prompt_index is None or rollout.split is None:
            return {}
        return self.task.columns(rollout.split, rollout.prompt_index.tolist())

    def _texts(self, rows: Sequence[list[int]]) -> list[str]:
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]

    def _numbers(self, returned: Any, count: int) -> list[float]:
        """What the function has returned, NaN for None."""
        if inspect.iscoroutine(returned):
            returned.close()
            raise RewardFailed(f"{self.where} returned a coroutine. Return a list of numbers. {MEND}")
        values = returned.tolist() if hasattr(returned, "tolist") else returned
        if not isinstance(values, (list, tuple)):
            raise RewardFailed(
                f"{self.where} returned {type(returned).__name__}. Return a list of {count} numbers. {MEND}"
            )
        if len(values) != count:
            raise RewardFailed(
                f"{self.where} returned {len(values)} values for {count} responses. Return one for each, None where it "
                f"does not apply. {MEND}"
            )
        numbers = []
        for place, value in enumerate(values):
            value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
            if value is not None and (not isinstance(value, Real) or not math.isfinite(value)):
                raise (NotFinite if isinstance(value, Real) else RewardFailed)(
                    f"{self.where} returned {str(value)[:60]!r} for response {place} of {count}. Return a finite "
                    f"number, or None where it does not apply. {MEND}"
                )
            numbers.append(math.nan if value is None else float(value))
        return numbers


def _compiled(part: Any) -> str:
    """A code object or one of its constants as words that are the same in every process."""
    if isinstance(part, CodeType):
        return f"{part.co_code.hex()} {part.co_names} {_compiled(part.co_consts)}"
    if isinstance(part, (tuple, frozenset)):
        words = map(_compiled, part)
        return f"({', '.join(words if isinstance(part, tuple) else sorted(words))})"
    return repr(part)


def _shown(error: BaseException, file: str | None) -> str:
    """An error of somebody's code: its class, its reason and, where it is known, the line."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if isinstance(error, SyntaxError):
        lines = [error.lineno]
    at = f" in line {lines[-1]}" if lines else ""
    reason = reason_of(error)
    name = type(error).__name__
    return f"{name}{at}" + ("" if reason == name else f": {reason.removeprefix(f'{name}: ')}")
