"""The commands behind `grade.cli`: what each reads from its arguments, and whom it calls.

Torch and everything that needs it is imported after the settings have been checked.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from grade.config import Config, default_methods
from grade.config import reading as config_io
from grade.config.bounds import COUNT, SEED, check_text, shown
from grade.config.methods import COMPARED
from grade.errors import GradeError, printing

COMMANDS = {
    "demo": "train a tiny model on built-in reviews, from scratch to a better one: no network, no GPU",
    "reward": "train the reward head of a config",
    "train": "train a policy",
    "evaluate": "evaluate a checkpoint of a run against its base model",
    "compare": "train several methods over several seeds and compare them at equal cost",
    "variance": "measure bias and variance of the gradient estimators at fixed parameters",
    "report": "write a page with figures and tables from a run or a comparison",
    "doctor": "versions, devices, kernel backends, caches: what works here and what is missing",
}
HELP = ("-h", "--help")
_FLAGS = ["help", "h", "print_config"]


class Own(NamedTuple):
    """An option that is no setting."""

    kind: Any
    default: Any
    metavar: str
    help: str


def train(argv: list[str]) -> int:
    """`grade train CONFIG [--section.field VALUE ...]`."""
    resolved = _resolve("train", argv, "Train a policy; the run directory holds everything it makes.")
    if resolved is not None:
        from grade.commands.train import train as train_policy

        train_policy(resolved.config)
    return 0


def reward(argv: list[str]) -> int:
    """`grade reward CONFIG [--section.field VALUE ...]`."""
    resolved = _resolve("reward", argv, "Train the reward head; `grade train` does so when it is missing.")
    if resolved is not None:
        from grade.commands.reward import train_reward

        train_reward(resolved.config)
    return 0


def demo(argv: list[str]) -> int:
    """`grade demo [--cache_dir DIR] [--pretrain_steps N] [--section.field VALUE ...]`."""
    resolved = _resolve(
        "demo", argv, "Write reviews with a grammar, train a tiny model on them, then do the real job on it.", {
            "cache_dir": Own(
                str | None, None, "DIR", "Folder that keeps the tiny model; null: one under the user's cache directory."
            ),
            "pretrain_steps": Own(
                int | None, None, "N", "Optimizer steps of the tiny model's own training; null: as many as it needs."
            ),
        }, positional=None,
    )
    if resolved is None:
        return 0
    cache_dir, steps = _path(resolved, "cache_dir"), resolved.options.pretrain_steps
    if steps is not None and not 1 <= steps <= COUNT:
        raise GradeError(f"pretrain_steps is {shown(steps)}: it must be at least 1 and at most {COUNT}.")
    from grade.commands.demo import run_demo

    run_demo(resolved.config, cache_dir, steps)
    return 0


def evaluate(argv: list[str]) -> int:
    """`grade evaluate RUN_DIR [--checkpoint best|last|PATH] [--split test|validation] [overrides]`."""
    resolved = _resolve(
        "evaluate", argv, "Evaluate a checkpoint and the base model on the same prompts. RUN_DIR: the folder of a "
        "run; its config.yaml gives the settings, and options override them.", {
            "checkpoint": Own(
                str, "best", "best|last|PATH", "`best` by validation, `last`, or the folder of an adapter."
            ),
            "split": Own(Literal["test", "validation"], "test", "test|validation", "Whose prompts."),
        }, positional="RUN_DIR",
    )
    if resolved is not None:
        from grade.commands.evaluate import evaluate_run

        check_text("--checkpoint", resolved.options.checkpoint, "path")
        evaluate_run(
            resolved.config, Path(resolved.positional), resolved.options.checkpoint, resolved.options.split
        )
    return 0


def compare(argv: list[str]) -> int:
    """`grade compare CONFIG [--methods A,B] [--seeds 0,1] [--section.field VALUE ...]`; 1 where a run failed."""
    resolved = _resolve(
        "compare", argv,
        "Train methods over seeds on the same prompts; tables at equal tokens and at equal training time. "
        "The comparison itself sets seed, method.name, generation.samples_per_prompt, evaluation.every, train.run_dir, "
        "train.resume, train.overwrite, train.tensorboard and train.wandb of its runs, and scales train.learning_rate "
        "(see --compare.*).", {
            "methods": Own(
                str | None, None, "A,B,...",
                f"Of {', '.join(COMPARED)}; null: those that can use the task's reward.",
            ),
            "seeds": Own(str, "0,1,2", "0,1,...", "Seeds of the runs."),
        },
    )
    if resolved is None:
        return 0
    methods, seeds = _methods(resolved), _seeds(resolved.options.seeds)
    for option, entries in (("methods", methods), ("seeds", list(map(str, seeds)))):
        twice = [entry for entry in entries if entries.count(entry) > 1]
        if twice:
            raise GradeError(f"--{option} names {twice[0]} twice: leave one of them out.")
    from grade.studies.compare.study import missing_results, run_comparison

    missing = missing_results(run_comparison(resolved.config, methods, seeds))
    sys.stdout.flush()  # the tables come first, wherever both go
    for name, reason in missing.items():
        print(f"grade: failed: {name}: {reason}", file=sys.stderr)
    if missing:
        print("The tables are without what failed: the same command tries it again.", file=sys.stderr)
    return 1 if missing else 0


def _methods(resolved: Resolved) -> list[str]:
    wanted = resolved.options.methods
    methods = default_methods(resolved.config) if wanted is None else _listed(wanted)
    if not methods:
        raise GradeError(f"--methods is empty: name some of {', '.join(COMPARED)}, or leave the option out.")
    unknown = [name for name in methods if name not in COMPARED]
    if unknown:
        raise GradeError(f"--methods: there is no {unknown[0]!r}. There are {', '.join(COMPARED)}.")
    return methods


def _seeds(text: str) -> list[int]:
    texts = _listed(text)
    if not texts or not all(re.fullmatch("[0-9]{1,20}", seed) and int(seed) <= SEED for seed in texts):
        raise GradeError(
            f"--seeds is {shown(repr(text))}: write whole numbers up to {SEED} with commas, such as 0,1,2."
        )
    return list(map(int, texts))


def _listed(text: str) -> list[str]:
    """The entries of `a,b`."""
    return [entry.strip() for entry in text.split(",") if entry.strip()]


def variance(argv: list[str]) -> int:
    """`grade variance CONFIG [--checkpoint DIR] [--section.field VALUE ...]`."""
    resolved = _resolve(
        "variance", argv, "Measure bias and variance of the gradient estimators at fixed parameters; what is measured: "
        "--variance.*.", {
            "checkpoint": Own(
                str | None, None, "DIR",
                "Folder of an adapter, such as runs/NAME/checkpoints/best; null: the adapter's initial state.",
            ),
        },
    )
    if resolved is not None:
        from grade.studies.variance.study import run_variance

        run_variance(resolved.config, _path(resolved, "checkpoint"))
    return 0


def report(argv: list[str]) -> int:
    """`grade report FOLDER [--output DIR]`."""
    parser = config_io.new_parser(
        prog="grade report",
        usage="grade report FOLDER [--output DIR]",
        description="Write one self-contained page, with every figure as PNG and PDF and every table as CSV and LaTeX. "
        "FOLDER: a run, a comparison, measurements of `grade variance`, or a folder of runs.",
    )
    parser.add_argument("--output", type=str | None, metavar="DIR", help="Where to; null: FOLDER/report.")
    positionals, options = config_io.split_arguments(argv, ["output"], ["help", "h"], parser.prog)
    if any(option in HELP for option in options):
        emit(parser.format_help())
        return 0
    if len(positionals) != 1:
        raise GradeError(f"name one folder: {parser.usage}.")
    output = parser.parse_args(options).output
    for name, text in (("FOLDER", positionals[0]), ("--output", output)):
        if text is not None:
            check_text(name, text, "path")
    from grade.commands.report import run_report

    page = run_report(Path(positionals[0]), Path(output) if output else None)
    emit(f"Report: {page}\n")
    return 0


def doctor(argv: list[str]) -> int:
    """`grade doctor [--json]`."""
    parser = config_io.new_parser(prog="grade doctor", description=f"Show {COMMANDS['doctor']}.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of tables.")
    positionals, options = config_io.split_arguments(argv, [], ["json", "help", "h"], parser.prog)
    if positionals:
        raise GradeError(f"unexpected argument {positionals[0]!r}: see `grade doctor --help`.")
    if any(option in HELP for option in options):
        emit(parser.format_help())
        return 0
    from grade.commands.doctor import run_doctor

    with printing():
        run_doctor(as_json="--json" in options)
    return 0


# --- shared ------------------------------------------------------------------------------------------------


class Resolved(NamedTuple):
    """What a command line says."""

    config: Config
    """The validated settings."""
    options: Any
    """Namespace with the command's own options."""
    positional: str
    """CONFIG or RUN_DIR; `demo` for a command without."""


def _config_of_run(run_dir: str) -> Path:
    check_text("RUN_DIR", run_dir, "path")
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise GradeError(f"{run_dir} is not a run directory: it has no config.yaml.")
    config_io.check_sealed(path)
    return path


def _path(resolved: Resolved, name: str) -> Path | None:
    """An option's path; None where it is not set."""
    text = getattr(resolved.options, name)
    if text is not None:
        check_text(f"--{name}", text, "path")
    return Path(text) if text else None


def _resolve(
    command: str, argv: list[str], description: str, own: Mapping[str, Own] | None = None, *,
    positional: Literal["CONFIG", "RUN_DIR"] | None = "CONFIG",
) -> Resolved | None:
    """What a command line says; None when it asked for help or for the settings, which are then printed.

    Args:
        own: the command's own options by name, beside the settings.
        positional: what it is called with; None: nothing, and the config `demo` gives the settings.
    """
    own, configs = own or {}, ", ".join(config_io.shipped_configs())
    called = " ".join([
        f"grade {command}", *([positional] if positional else []),
        *(f"[--{name} {option.metavar}]" for name, option in own.items()), "[--section.field VALUE ...]",
    ])
    if positional == "CONFIG":
        description += (
            f" CONFIG: a YAML file or a shipped config ({configs}); named beside --help, its values are shown as "
            "defaults. Relative paths are relative to the current directory."
        )
    parser = config_io.new_parser(prog=f"grade {command}", usage=called, description=description)
    group = parser.add_argument_group("the command's own")
    for name, option in own.items():
        group.add_argument(
            f"--{name}", type=option.kind, default=option.default, metavar=option.metavar, help=option.help
        )
    parser.add_argument("--print_config", action="store_true", help="Print the settings as YAML and exit.")
    config_io.add_settings(parser)
    positionals, options = config_io.split_arguments(argv, [*config_io.setting_types(), *own], _FLAGS, parser.prog)
    if len(positionals) > (positional is not None):
        raise GradeError(
            f"unexpected argument {positionals[-1]!r}: settings are written --section.field VALUE "
            f"(`{parser.prog} --help`)."
        )
    wants_help = any(option in HELP for option in options)
    wants_config = "--print_config" in options
    # Help and printing come after everything else was checked, so the parser must not act on them.
    options = [option for option in options if option not in (*HELP, "--print_config")]
    if positional is not None and not positionals:
        if wants_help:
            emit(parser.format_help())
            return None
        hint = f" Shipped configs: {configs}." if positional == "CONFIG" else ""
        raise GradeError(f"{positional} is missing: {called}.{hint}")
    given = positionals[0] if positionals else "demo"
    path = _config_of_run(given) if positional == "RUN_DIR" else config_io.find_config(given)
    namespace = config_io.parse_settings(parser, path, options, {name: option.kind for name, option in own.items()})
    if wants_help:
        emit(parser.format_help())
        return None
    config = config_io.build_config(namespace)
    if wants_config:
        emit(config_io.config_to_yaml(config))
        return None
    return Resolved(config, namespace, given)


def emit(text: str) -> None:
    """Print to standard output, quietly when its reader has gone (`grade train --help | head`)."""
    with printing():
        sys.stdout.write(text)
