"""Settings from and to YAML, and from options: `load_config("imdb_small", ["--train.steps=10"])`.

Three sources, each over the last: the defaults in `grade.config`, a YAML file, `--section.field VALUE`.
The options and their types come from the dataclasses through jsonargparse. Keys are checked here first: a
mistyped one deserves its line in the file and the name that was meant. Nothing heavy is imported.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from grade.config import Config, get_setting, validate
from grade.config.bounds import check_text, facts_of, is_section, shown
from grade.config.number_texts import check_node, check_options, describe_type, entry_section
from grade.errors import GradeError, reason_of

_NULL = ("null", "Null", "NULL", "~")
"""Written out, unlike the nothing of an empty section."""
CONFIG_FOLDER = Path(__file__).parents[1] / "configs"

# A field's help is the string under it. A setting of the whole process, made before the first parser.
set_parsing_settings(docstring_parse_attribute_docstrings=True)


def load_config(name_or_path: str | Path, overrides: list[str] | None = None) -> Config:
    """The settings of a shipped config or a YAML file, with command-line options over them, validated.

    Args:
        name_or_path: name of a shipped config (`imdb_small`) or path of a YAML file.
        overrides: options as on the command line: `["--train.steps", "10"]` or `["--train.steps=10"]`.

    Raises:
        GradeError: an unknown name or key, malformed YAML, a wrong type, or settings that cannot work.
    """
    path = find_config(str(name_or_path))
    overrides = list(overrides or [])
    parser = new_parser()
    add_settings(parser)
    positionals, options = split_arguments(overrides, list(setting_types()), [])
    if positionals:
        raise GradeError(f"unexpected argument {positionals[0]!r}: write --section.field VALUE.")
    return build_config(parse_settings(parser, path, options))


def config_from_yaml(path: str | Path) -> Config:
    """The settings in a YAML file, such as a run's `config.yaml`; what it leaves out has its default."""
    path = Path(path)
    if not path.is_file():
        raise GradeError(f"{path} does not exist.")
    parser = new_parser()
    add_settings(parser)
    return build_config(parse_settings(parser, path, []))


def config_to_yaml(config: Config) -> str:
    """Every setting as YAML text; `config_from_yaml` gives an equal `Config` back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True, width=110)


_SEAL = "# SHA-256 of the lines above: "


def sealed_yaml(config: Config) -> str:
    """`config_to_yaml` with a last line that tells whether a file still holds it: half of one would be a config too."""
    text = config_to_yaml(config)
    return f"{text}{_SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n"


def check_sealed(path: Path) -> None:
    """Refuse a run's config.yaml that is not what was written.

    Raises:
        GradeError: it is missing, damaged or edited.
    """
    try:
        text, seal, claimed = path.read_text(encoding="utf-8").rpartition(_SEAL)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise GradeError(f"{path} cannot be read ({reason}). Name the folder of a run.") from error
    if not seal or hashlib.sha256(text.encode()).hexdigest() != claimed.strip():
        raise GradeError(
            f"{path} is damaged, or was changed by hand (its last line tells). Put it back; other settings are given "
            "as options."
        )


def config_from_sealed(path: Path) -> Config:
    """The settings that a run was made with.

    Raises:
        GradeError: as `check_sealed`.
    """
    check_sealed(path)
    return config_from_yaml(path)


# --- names -------------------------------------------------------------------------------------------------


def shipped_configs() -> list[str]:
    """Names of the configs inside the package."""
    return sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml"))


def find_config(name_or_path: str) -> Path:
    """Path of a shipped config or of a YAML file; a shipped name wins over a file of that name."""
    check_text("CONFIG", name_or_path, "path")
    if name_or_path in shipped_configs():
        return CONFIG_FOLDER / f"{name_or_path}.yaml"
    path = Path(name_or_path)
    if path.is_file():
        return path
    if path.is_dir():
        raise GradeError(f"{path} is a folder: name a YAML file, such as {path / 'config.yaml'}.")
    names = ", ".join(shipped_configs())
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise GradeError(f"config file {path} does not exist. Shipped configs, named without .yaml: {names}.")
    near = difflib.get_close_matches(name_or_path, shipped_configs(), 1, 0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise GradeError(f"unknown config {name_or_path!r}: {hint}Shipped configs: {names}; or give a YAML file.")


@functools.cache
def setting_types() -> dict[str, Any]:
    """Dotted name of every setting, with its type; sections themselves are not in it. Read only."""
    return {name: kind for name, kind, _ in facts_of(Config)}


def suggest(name: str, known: list[str]) -> list[str]:
    """The names in `known` that a mistyped `name` probably meant; empty when none is near.

    A name without its section (`steps`, `lora.r`) means every setting that ends so, if any does. Otherwise its section
    counts as much as its last part: of the settings there the nearest is meant, or those that go on where it stops
    (`method.tau`). A setting elsewhere is meant only if it alone has just this last part: `method.steps` finds
    `train.steps`, and `train.epochs` finds nothing, though the reward's training and two methods have epochs.
    """
    ends = [key for key in known if key.endswith(f".{name}")]
    if ends:
        return ends
    *parents, last = name.split(".")
    sections = {part for key in known for part in key.split(".")[:-1]}
    section = difflib.get_close_matches(parents[-1], sections, 1) if parents else []
    inside = [key for key in known if not parents or set(section) & set(key.split(".")[:-1])]
    words: dict[str, list[str]] = {}  # a setting's last part, or all after its section (`lora.r`): the settings
    for key in inside:
        for word in {key.split(".")[-1], key.partition(".")[2] or key}:
            words.setdefault(word, []).append(key)

    def nearest(cutoff: float) -> list[str]:
        near = difflib.get_close_matches(last, words, 1, cutoff)
        return [near[0]] if near and near[0] in known else words[near[0]] if near else []

    elsewhere = [key for key in known if key.split(".")[-1] == last]
    alone = [last] if last in known else elsewhere if len(elsewhere) == 1 and elsewhere[0].count(".") == 1 else []
    longer = [key for word, keys in words.items() if word.startswith(f"{last}_") for key in keys]
    return longer or nearest(0.75) or alone or nearest(0.7)


def did_you_mean(name: str, known: list[str], dashes: str = "", command: str = "grade train") -> str:
    """`; did you mean --train.steps?` to end a message with, or where to find all names."""
    near = suggest(name, known)
    if near:
        return f"; did you mean {' or '.join(dashes + key for key in near)}?"
    return f"; `{command} --help` lists them all."


# --- YAML --------------------------------------------------------------------------------------------------


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a file as {dotted name: value}, in its order.

    Raises:
        GradeError: with the line, for malformed YAML, an unknown or a repeated key.
    """
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise GradeError(f"cannot read {path}: {_one_line(error)}") from None
    values: dict[str, Any] = {}
    try:
        root = loader.get_single_node()
        if root is None:
            return values
        if not isinstance(root, yaml.MappingNode):
            raise GradeError(f"{path} is not a settings file: write `section:` and `field: value` lines.")
        for name, line, value in _flatten(root, loader, setting_types()):
            if name in values:
                raise GradeError(f"{path}, line {line}: {name} is set a second time.")
            values[name] = value
    except GradeError as error:
        message = str(error)
        raise GradeError(message if message.startswith(str(path)) else f"{path}, {message}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise GradeError(f"{path}{where}: malformed YAML: {error.problem}.") from None
    except yaml.YAMLError as error:
        raise GradeError(f"{path}: malformed YAML: {_one_line(error)}") from None
    except RecursionError:
        raise GradeError(f"{path}: malformed YAML: it is nested too deeply.") from None
    finally:
        loader.dispose()
    return values


def _flatten(
    node: yaml.MappingNode, loader: yaml.SafeLoader, known: dict[str, Any], prefix: str = ""
) -> Iterator[tuple[str, int, Any]]:
    """(dotted name, line, value) of every setting below `node`; a GradeError at the first unknown key."""
    for key_node, value_node in node.value:
        name = f"{prefix}{key_node.value}"
        line = key_node.start_mark.line + 1
        is_section = any(key.startswith(f"{name}.") for key in known)
        if name in known:
            try:
                check_node(name, value_node, known[name])
            except GradeError as error:
                raise GradeError(f"line {line}: {error}") from None
            value = loader.construct_object(value_node, deep=True)
            # jsonargparse takes null for 'not set', whatever the type.
            if value is None and type(None) not in get_args(known[name]):
                raise GradeError(f"line {line}: {name} is null: it must be {describe_type(known[name])}.")
            yield name, line, value
        elif is_section and isinstance(value_node, yaml.MappingNode):
            yield from _flatten(value_node, loader, known, f"{name}.")
        elif is_section:
            if name == "model.lora" and isinstance(value_node, yaml.ScalarNode) and value_node.value in _NULL:
                yield "model.finetuning", line, "full"
                continue
            # `train:` with every line under it commented out is an empty section.
            if loader.construct_object(value_node) is not None:
                raise GradeError(f"line {line}: {name} is a section: write its settings below it, indented.")
        else:
            # Below a mistyped section, its first setting says best what was meant.
            if isinstance(value_node, yaml.MappingNode) and value_node.value:
                name = f"{name}.{value_node.value[0][0].value}"
            raise GradeError(f"line {line}: unknown setting {name}{did_you_mean(name, list(known))}")


# --- command-line options ----------------------------------------------------------------------------------


def new_parser(**kwargs: Any) -> ArgumentParser:
    """A parser without options that raises its errors; `kwargs` as for `ArgumentParser`."""
    return ArgumentParser(exit_on_error=False, allow_abbrev=False, **kwargs)


def add_settings(parser: ArgumentParser) -> None:
    """Give `parser` an option for every setting, grouped by section."""
    _add_section(parser, Config, "")


def _add_section(parser: ArgumentParser, section: type, prefix: str) -> None:
    """Options for one dataclass, then for those inside it.

    Section by section, in groups of our own: a nested dataclass added as a whole would also get an option
    `--section FILE`, a second way to read files that skips the checks of `read_yaml`.
    """
    nested = {name: kind for name, kind in get_type_hints(section).items() if is_section(kind)}
    text = " ".join((section.__doc__ or section.__name__).split())
    group = parser.add_argument_group(prefix.rstrip(".") or "everything", text)
    key = prefix.rstrip(".") or None
    group.add_class_arguments(section, key, as_group=False, skip=set(nested), instantiate=False)
    for name, kind in nested.items():
        _add_section(parser, kind, f"{prefix}{name}.")


def split_arguments(
    argv: list[str], known: list[str], flags: list[str], command: str = "grade train"
) -> tuple[list[str], list[str]]:
    """Positional arguments and options of a command line, options checked by name.

    Every option but the flags takes exactly one value, so the two can be told apart without parsing. A lone `-` is no
    option, and after `--` there are none.

    Args:
        argv: what follows the command.
        known: names that take a value, without dashes. Lists also take `--name+ ITEM`.
        flags: names that take none.
        command: whose help an error points to.

    Raises:
        GradeError: an unknown option, with the name that was probably meant; an option without its value; a switch
            with one.
    """
    positionals: list[str] = []
    options: list[str] = []
    waiting = list(argv)
    while waiting:
        argument = waiting.pop(0)
        if argument == "--":
            return positionals + waiting, options
        if not argument.startswith("-") or argument == "-":
            positionals.append(argument)
            continue
        name, equals, _ = argument.lstrip("-").partition("=")
        if name in flags:
            value = argument.partition("=")[2] if equals else next(iter(waiting), "")
            if equals or value.lower() in ("true", "false"):
                raise GradeError(
                    f"{argument.partition('=')[0]} is a switch and takes no value: leave {value!r} out. An argument "
                    "that reads so comes before the switch, or after --."
                )
            options.append(argument)
            continue
        if not argument.startswith("--") or name.removesuffix("+") not in known:
            if any(key.startswith(f"{name}.") for key in known):
                raise GradeError(f"--{name} is a section: set one of its fields, --{name}.FIELD VALUE.")
            shown = argument.partition("=")[0]
            raise GradeError(f"unknown option {shown}{did_you_mean(name, known + flags, '--', command)}")
        options.append(argument)
        if not equals:
            if not waiting or waiting[0].startswith("--"):
                kind = setting_types().get(name.removesuffix("+"))
                raise GradeError(f"--{name} needs a value{f': {describe_type(kind)}' if kind else ''}.")
            options.append(waiting.pop(0))
    return positionals, options


def parse_settings(parser: ArgumentParser, path: Path, options: list[str], own: Mapping[str, Any] | None = None) -> Any:
    """Namespace of `parser`'s values: defaults, then the file at `path`, then `options`.

    The file's values become the parser's defaults, so that its help shows them.

    Args:
        own: types of the options that are no settings, by name.
    """
    values = read_yaml(path)
    try:
        checked = parser.parse_object(_nest(values))
    except ArgumentError as error:
        raise GradeError(f"{path}: {explain(error)}") from None
    parser.set_defaults({name: get_setting(checked, name) for name in values})
    check_options(options, {**setting_types(), **(own or {})})
    try:
        return parser.parse_args(options)
    except ArgumentError as error:
        raise GradeError(explain(error)) from None


def build_config(namespace: Any) -> Config:
    """The dataclasses, filled from a parser's namespace and validated."""

    def build(section: type, values: Any) -> Any:
        filled = {}
        for name, kind in get_type_hints(section).items():
            value = getattr(values, name)
            if is_section(kind):
                filled[name] = build(kind, value)
            elif (entry := entry_section(kind)) is not None:
                filled[name] = [one if isinstance(one, entry) else entry(**vars(one)) for one in value]
            else:
                # A copy, so that no two configs share one of the parser's default lists.
                filled[name] = copy.deepcopy(value) if isinstance(value, (list, dict)) else value
        return section(**filled)

    config = build(Config, namespace)
    validate(config)
    return config


def explain(error: ArgumentError) -> str:
    """jsonargparse's message in one line: the setting, its value and what it must be."""
    text = str(error)
    key = re.search(r'[Kk]ey "([\w.]+)"', text)
    value = re.search(r"(?:Got|Given) value: (.*)", text)
    kind = setting_types().get(key.group(1)) if key else None
    if not key or not value or kind is None:
        return _one_line(error)
    found = "null" if value.group(1) == "None" else shown(value.group(1))
    message = f"{key.group(1)} is {found}: it must be {describe_type(kind)}."
    return message + (" In YAML, put it in quotes." if kind in (str, str | None) else "")


def _nest(values: dict[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} as {"a": {"b": 1}}."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        *sections, last = name.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return nested


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
