"""Settings from and to YAML, and from options: `load_config("imdb_small", ["--train.steps=10"])`.

Three sources, each over the last: the defaults in `grade.config`, a YAML file (`grade.config.yaml_files`),
`--section.field VALUE` (`grade.config.options`). Nothing heavy is imported.
"""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path

import yaml

from grade.config import Config
from grade.config.bounds import check_text
from grade.config.names import setting_types
from grade.config.options import add_settings, build_config, new_parser, parse_settings, read_settings, split_arguments
from grade.errors import GradeError

CONFIG_FOLDER = Path(__file__).parents[1] / "configs"


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
    positionals, options = split_arguments(overrides, list(setting_types()), [])
    if positionals:
        raise GradeError(f"unexpected argument {positionals[0]!r}: write --section.field VALUE.")
    if not options:
        return read_settings(path)
    parser = new_parser()
    add_settings(parser)
    return build_config(parse_settings(parser, path, options))


def config_from_yaml(path: str | Path) -> Config:
    """The settings in a YAML file, such as a run's `config.yaml`; what it leaves out has its default."""
    path = Path(path)
    if not path.is_file():
        raise GradeError(f"{path} does not exist.")
    return read_settings(path)


def config_to_yaml(config: Config) -> str:
    """Every setting as YAML text; `config_from_yaml` gives an equal `Config` back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True, width=110)


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
