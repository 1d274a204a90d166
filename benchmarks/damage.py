"""Damage the files of a finished run, one at a time, and look what the commands that read them say.

    python -m benchmarks.damage --count 1000              a thousand damages, of places chosen by --seed
    python -m benchmarks.damage --count 50 --seed 3       fewer, elsewhere

A damage is a value of a JSON or YAML file that is gone or something else (null, a text, -5, NaN, a list, a number of
401 digits, lists in lists), a line of a log that is no object or no UTF-8, a file that is cut, empty, missing, a
folder, or has another bit. Half of them are sealed again: checksums fit, as if another program had written the file.
Every command must end well, or refuse it in words and leave all files as they are. Exits with 1 if one does not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks.kills import ended, in_child, small_run
from grade import cli
from grade.commands.train import train
from grade.config.reading import config_to_yaml, load_config
from grade.files import sha256
from grade.model.checkpoint import MANIFEST_FILE

SIGNS_OF_A_FAULT = "Traceback (most recent call last)"
_SEAL = "# SHA-256 of the lines above: "
_DEEP = "@deep@"
_VALUES: tuple[Any, ...] = (
    None,
    "text",
    -5,
    float("nan"),
    [],
    [1],
    {},
    10**400,
    1e308,
    0.5,
    True,
    _DEEP,
    "../../elsewhere",
    10**12,
)
_GONE = object()
_WHOLE = ("missing", "empty", "a folder", "cut", "another bit", "no UTF-8", "null", "a list")
READ_BY = {  # the commands that read a file of a run, by its name
    "config.yaml": ("resume", "evaluate", "generate", "export", "report"),
    "run.json": ("resume", "evaluate", "generate", "export", "report"),
    "evaluation.json": ("resume", "export", "merge", "report"),
    "metrics.jsonl": ("resume", "report"),
    "samples.jsonl": ("resume",),
    "reward.json": ("resume", "evaluate"),
    "head.safetensors": ("resume", "evaluate"),
    "manifest.json": ("resume", "evaluate", "generate", "export"),
    "trainer_state.json": ("resume",),
    "trainer_state.safetensors": ("resume",),
    "adapter_config.json": ("resume", "evaluate", "generate", "export"),
    "adapter_model.safetensors": ("resume", "evaluate", "generate"),
    "tokenizer.json": ("export",),
    "tokenizer_config.json": ("export",),
}


READERS = tuple(dict.fromkeys(name for names in READ_BY.values() for name in names))


def command(name: str, run: Path, further: Path) -> list[str]:
    """The arguments of `grade` for a run.

    Args:
        name: as in `READ_BY`.
        further: a folder for what it writes elsewhere.
    """
    checkpoint = ["--checkpoint", "last"]
    return {
        "resume": ["train", str(run / "config.yaml"), "--train.resume", "true", "--train.steps", "7"],
        "evaluate": ["evaluate", str(run), *checkpoint],
        "generate": ["generate", str(run), "a film", *checkpoint, "--max_new_tokens", "2"],
        "export": ["export", str(run), *checkpoint, "--to", str(further / "export")],
        "merge": ["export", str(run), *checkpoint, "--merge", "--to", str(further / "merged")],
        "report": ["report", str(run), "--output", str(further / "report")],
    }[name]


# -- damages -------------------------------------------------------------------------------------------------


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value in objects and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def changed_at(value: Any, path: tuple, new: Any) -> Any:
    """A copy in which one place is something else, or gone."""
    if not path:
        return new
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1 and new is _GONE:
        del copy[path[0]]
    else:
        copy[path[0]] = changed_at(value[path[0]], path[1:], new)
    return copy


def _text(value: Any) -> str:
    return json.dumps(value, indent=2).replace(f'"{_DEEP}"', "[" * 3000 + "]" * 3000)


def damage(path: Path, chance: random.Random) -> str:
    """Damage a file at a place and in a way that `chance` chooses; says which."""
    structured = path.suffix in (".json", ".jsonl", ".yaml") and chance.random() < 0.75
    return _damage_value(path, chance) if structured else _damage_whole(path, chance)


def _damage_value(path: Path, chance: random.Random) -> str:
    content = path.read_text(encoding="utf-8")
    lines = content.splitlines()
    number = chance.randrange(len(lines)) if path.suffix == ".jsonl" else 0
    found = yaml.safe_load(content) if path.suffix == ".yaml" else json.loads(
        lines[number] if path.suffix == ".jsonl" else content
    )  # fmt: skip
    where = chance.choice([(), *places(found)])
    new = chance.choice([_GONE, *_VALUES] if where else _VALUES)
    changed = changed_at(found, where, new)
    if path.suffix == ".jsonl":
        lines[number] = _text(changed).replace("\n", " ")
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif path.suffix == ".yaml":
        path.write_text(yaml.safe_dump(changed, sort_keys=False).replace(_DEEP, "[" * 3000 + "]" * 3000), "utf-8")
    else:
        path.write_text(_text(changed), encoding="utf-8")
    said = "gone" if new is _GONE else "a number of 401 digits" if new == 10**400 else repr(new)
    line = f", line {number + 1}" if path.suffix == ".jsonl" else ""
    return f"{path.name}{line}: {'.'.join(map(str, where)) or 'all of it'} is {said}"


def _damage_whole(path: Path, chance: random.Random) -> str:
    how, content = chance.choice(_WHOLE), bytearray(path.read_bytes())
    if how == "another bit":
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    elif how == "cut":
        del content[chance.randrange(len(content)) :]
    elif how == "no UTF-8":
        content[chance.randrange(len(content)) :] = b"\xff\xfe\xff"
    else:
        content[:] = {"null": b"null\n", "a list": b"[1, 2]\n"}.get(how, b"")
    path.unlink()
    if how == "a folder":
        path.mkdir()
    elif how != "missing":
        path.write_bytes(content)
    return f"{path.name}: {how}"


def seal(path: Path) -> None:
    """Make the checksum fit again that tells a damage of this file, where it has one that can be made."""
    manifest = path.parent / MANIFEST_FILE
    if path.name == "config.yaml" and path.is_file():
        text = path.read_bytes().rpartition(_SEAL.encode())[0] or path.read_bytes()
        path.write_bytes(text + _SEAL.encode() + hashlib.sha256(text).hexdigest().encode() + b"\n")
    elif path.name == "head.safetensors" and path.is_file():
        report = json.loads((path.parent / "reward.json").read_text(encoding="utf-8"))
        (path.parent / "reward.json").write_text(json.dumps({**report, "sha256": sha256(path)}), encoding="utf-8")
    elif manifest.is_file():
        try:
            found = json.loads(manifest.read_text(encoding="utf-8"))
            if path != manifest and path.is_file():
                found["files"][path.name] = sha256(path)
            found.pop("sha256", None)
            digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
            manifest.write_text(json.dumps({**found, "sha256": digest}), encoding="utf-8")
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
            return  # what is no manifest any more has no seal


# -- what comes of them --------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def verdict(code: int, said: str, before: dict[str, str], after: dict[str, str]) -> str | None:
    """What is wrong with how a command took a damage; None if nothing is.

    Args:
        code, said: its exit code and its output.
        before, after: `contents` of the run.
    """
    if SIGNS_OF_A_FAULT in said or code not in (0, 2):
        return f"ended with {code} and a traceback"
    if code == 2 and "grade: error: " not in said:
        return "refused it without a word"
    if code == 2 and before != after:
        lost = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
        return f"refused it and changed {', '.join(lost)}"
    return None


def files_of(run: Path) -> list[Path]:
    """The files of a run that its commands read, those of the last checkpoint among them."""
    folders = (run, run / "reward", run / "checkpoints" / "last")
    return [path for folder in folders for path in sorted(folder.iterdir()) if path.name in READ_BY]


def one(
    run: Path,
    place: Path,
    chance: random.Random,
    call: Callable[[list[str]], tuple[int, str]],
    readers: Collection[str] = READERS,
) -> tuple[str, str | None]:
    """Damage a copy of a run and let a command read it: (what was done, what is wrong with the outcome or None).

    Args:
        place: an empty folder.
        call: runs `grade` with these arguments; its exit code and output.
        readers: the commands that may be asked.
    """
    copy = place / "run"
    shutil.copytree(run, copy)
    config = load_config(str(copy / "config.yaml"))
    text = config_to_yaml(replace(config, train=replace(config.train, run_dir=str(copy))))
    (copy / "config.yaml").write_text(text, encoding="utf-8")
    seal(copy / "config.yaml")
    path = chance.choice([path for path in files_of(copy) if set(READ_BY[path.name]) & set(readers)])
    reader = chance.choice([name for name in READ_BY[path.name] if name in readers])
    arguments = command(reader, copy, place)
    if reader == "resume":  # its settings come from elsewhere: a damaged config.yaml is not what it is told to do
        shutil.copy(copy / "config.yaml", place / "settings.yaml")
        arguments[1] = str(place / "settings.yaml")
    said = damage(path, chance)
    if chance.random() < 0.5:
        seal(path)
        said += ", sealed"
    before = contents(copy)
    code, output = call(arguments)
    wrong = verdict(code, output, before, contents(copy))
    return f"{reader}: {said}: {'done' if code == 0 else 'refused'}", wrong and f"{wrong}\n{output[-2000:]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=100, help="damages")
    parser.add_argument("--seed", type=int, default=0, help="of the places")
    options = parser.parse_args()
    if options.count < 1:  # of none, all would end well
        parser.error(f"--count is {options.count}: it must be at least 1")
    failed = 0
    with tempfile.TemporaryDirectory(prefix="grade-damage-") as temporary:
        folder = Path(temporary)
        log = folder / "log"

        def prepare() -> None:
            config = small_run(folder)
            train(replace(config, train=replace(config.train, run_dir=str(folder / "run"))))

        if ended(in_child(prepare, log)):
            print(log.read_text())
            return 1

        def call(arguments: list[str]) -> tuple[int, str]:
            log.write_text("")

            def work() -> None:
                code = cli.main(arguments)
                sys.stdout.flush()
                if code:
                    raise SystemExit(code)

            code = ended(in_child(work, log))
            said = log.read_text(errors="replace")
            left = said.rpartition(SIGNS_OF_A_FAULT)
            if code and left[2].rstrip().endswith("SystemExit: 2"):  # how a child tells the exit code of a refusal
                return 2, left[0]
            return code, said

        begin = time.monotonic()
        for number in range(1, options.count + 1):
            place = folder / "damaged"
            place.mkdir()
            done, wrong = one(folder / "run", place, random.Random(f"{options.seed}/{number}"), call)
            shutil.rmtree(place)
            failed += wrong is not None
            if number % 25 == 0:
                print(f"{number:>4}  in {time.monotonic() - begin:.0f} s", flush=True)
            if wrong is not None:
                print(f"{number:>4}  {done}\n      {wrong}", flush=True)
        seconds = time.monotonic() - begin
    print(f"{options.count - failed} of {options.count} damages were taken in good order, in {seconds:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
