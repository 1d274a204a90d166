"""The commands behind `grade.cli`: what each reads from its arguments, and whom it calls.

Torch and everything that needs it is imported after the settings have been checked.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jsonargparse import ArgumentParser

from grade.config import Config, default_methods
from grade.config import reading as config_io
from grade.config.bounds import BATCH, COUNT, SEED, TOKENS, check_text, shown
from grade.config.methods import COMPARED
from grade.errors import GradeError, printing

COMMANDS = {
    "demo": "train a tiny model on built-in reviews, from scratch to a better one: no network, no GPU",
    "reward": "train the reward head of a config",
    "train": "train a policy",
    "evaluate": "evaluate a checkpoint of a run against its base model",
    "generate": "answer prompts with a run's policy, beside its base model if you like",
    "export": "write a run's adapter, or a whole model, as a folder for other programs",
    "push": "upload a run's adapter, or a whole model, to the hub",
    "compare": "train several methods over several seeds and compare them at equal cost",
    "variance": "measure bias and variance of the gradient estimators at fixed parameters",
    "report": "write a page with figures and tables from a run or a comparison",
    "doctor": "versions, devices, kernel backends, caches: what works here and what is missing",
}
HELP = ("-h", "--help")
_FLAGS = ["help", "h", "print_config"]


def train(argv: list[str]) -> int:
    """`grade train CONFIG [--section.field VALUE ...]`."""
    parser = _config_parser("train", "Train a policy; the run directory holds everything it makes.")
    resolved = _resolve(parser, argv, {}, "CONFIG", config_io.find_config)
    if resolved is not None:
        from grade.commands.train import train as train_policy

        train_policy(resolved.config)
    return 0


def reward(argv: list[str]) -> int:
    """`grade reward CONFIG [--section.field VALUE ...]`."""
    parser = _config_parser("reward", "Train the reward head; `grade train` does so when it is missing.")
    resolved = _resolve(parser, argv, {}, "CONFIG", config_io.find_config)
    if resolved is not None:
        from grade.commands.reward import train_reward

        train_reward(resolved.config)
    return 0


def demo(argv: list[str]) -> int:
    """`grade demo [--cache_dir DIR] [--pretrain_steps N] [--section.field VALUE ...]`."""
    parser = config_io.new_parser(
        prog="grade demo",
        usage="grade demo [--cache_dir DIR] [--pretrain_steps N] [--section.field VALUE ...]",
        description="Write reviews with a grammar, train a tiny model on them, then do the real job on it.",
    )
    group = parser.add_argument_group("the demo's own")
    group.add_argument(
        "--cache_dir",
        type=str | None,
        metavar="DIR",
        help="Folder that keeps the tiny model; null: one under the user's cache directory.",
    )
    group.add_argument(
        "--pretrain_steps",
        type=int | None,
        metavar="N",
        help="Optimizer steps of the tiny model's own training; null: as many as it needs.",
    )
    resolved = _resolve(parser, argv, {"cache_dir": str, "pretrain_steps": int | None}, None, config_io.find_config)
    if resolved is None:
        return 0
    cache_dir, steps = resolved.options.cache_dir, resolved.options.pretrain_steps
    if cache_dir is not None:
        check_text("--cache_dir", cache_dir, "path")
    if steps is not None and not 1 <= steps <= COUNT:
        raise GradeError(f"pretrain_steps is {shown(steps)}: it must be at least 1 and at most {COUNT}.")
    from grade.commands.demo import run_demo

    run_demo(resolved.config, Path(cache_dir) if cache_dir else None, steps)
    return 0


def evaluate(argv: list[str]) -> int:
    """`grade evaluate RUN_DIR [--checkpoint best|last|PATH] [--split test|validation] [overrides]`."""
    parser = config_io.new_parser(
        prog="grade evaluate",
        usage="grade evaluate RUN_DIR [--checkpoint best|last|PATH] [--split test|validation] "
        "[--section.field VALUE ...]",
        description="Evaluate a checkpoint and the base model on the same prompts. RUN_DIR: the folder of a "
        "run; its config.yaml gives the settings, and options override them.",
    )
    group = parser.add_argument_group("the evaluation's own")
    checkpoint_help = "`best` by validation, `last`, or the folder of an adapter."
    group.add_argument("--checkpoint", type=str, default="best", help=checkpoint_help)
    group.add_argument("--split", type=Literal["test", "validation"], default="test", help="Whose prompts.")
    resolved = _resolve(parser, argv, {"checkpoint": str, "split": str}, "RUN_DIR", _config_of_run)
    if resolved is not None:
        from grade.commands.evaluate import evaluate_run

        checkpoint, split = resolved.options.checkpoint, resolved.options.split
        check_text("--checkpoint", checkpoint, "path")
        evaluate_run(resolved.config, Path(resolved.positional), checkpoint, split)
    return 0


def generate(argv: list[str]) -> int:
    """`grade generate RUN_DIR [PROMPT ...] [--base] [--samples N] [--max_new_tokens N] [overrides]`."""
    parser = _parser_of_run(
        "generate", "RUN_DIR [PROMPT ...] [--base]",
        "Answer prompts with a checkpoint of a run, sampled as in its evaluation with the noise of --seed. A PROMPT of "
        "- reads them from standard input, a line each; so does a pipe without PROMPT. On a terminal without PROMPT "
        "you are asked for them, and base model and policy answer side by side. A prompt that starts with a dash comes "
        "after --.",
        "the answers' own",
    )
    group = parser.add_argument_group("how many, and whose")
    group.add_argument("--base", action="store_true", help="Let the base model answer too, with the same noise.")
    group.add_argument("--samples", type=int, default=1, metavar="N", help="Responses per prompt.")
    group.add_argument(
        "--max_new_tokens", type=int | None, metavar="N", help="Longest response; null: generation.max_new_tokens."
    )
    own = {"checkpoint": str, "samples": int, "max_new_tokens": int | None}
    resolved = _resolve(parser, argv, own, "RUN_DIR", _config_of_run, flags=("base",), most=None)
    if resolved is None:
        return 0
    options = resolved.options
    check_text("--checkpoint", options.checkpoint, "path")
    for name, greatest in (("samples", BATCH), ("max_new_tokens", TOKENS)):
        value = getattr(options, name)
        if value is not None and not 1 <= value <= greatest:
            raise GradeError(f"--{name} is {shown(value)}: it must be at least 1 and at most {greatest}.")
    from grade.commands.generate import generate_from

    generate_from(
        resolved.config, Path(resolved.positional), resolved.more, checkpoint=options.checkpoint,
        base="base" in resolved.flags, samples=options.samples, max_new_tokens=options.max_new_tokens,
    )
    return 0


def export(argv: list[str]) -> int:
    """`grade export RUN_DIR [--checkpoint best|last|step-N] [--merge] [--to DIR] [overrides]`."""
    parser = _parser_of_run(
        "export", "RUN_DIR [--merge] [--to DIR]",
        "Write a checkpoint of a run for other programs: the adapter with its tokenizer and card, or with --merge a "
        "whole model that transformers and vLLM load by themselves.", "the export's own",
    )
    group = parser.add_argument_group("what and where to")
    group.add_argument("--merge", action="store_true", help=_MERGE)
    group.add_argument(
        "--to", type=str | None, metavar="DIR", help="A folder, missing or empty; null: one in RUN_DIR/export."
    )
    own = {"checkpoint": str, "to": str | None}
    resolved = _resolve(parser, argv, own, "RUN_DIR", _config_of_run, flags=("merge",))
    if resolved is None:
        return 0
    for name in own:
        if (text := getattr(resolved.options, name)) is not None:
            check_text(f"--{name}", text, "path")
    from grade.commands.export import export_run

    target = resolved.options.to
    export_run(
        resolved.config, Path(resolved.positional), resolved.options.checkpoint, "merge" in resolved.flags,
        Path(target) if target else None,
    )
    return 0


def push(argv: list[str]) -> int:
    """`grade push RUN_DIR REPO [--checkpoint best|last|step-N] [--merge] [--private] [--revision NAME] [overrides]`."""
    parser = _parser_of_run(
        "push", "RUN_DIR REPO [--merge] [--private]",
        "Upload what `grade export` writes to the hub. REPO: NAME or OWNER/NAME; made if it is missing. Needs a token: "
        "`hf auth login`, or HF_TOKEN.", "the upload's own",
    )
    group = parser.add_argument_group("what and where to")
    group.add_argument("--merge", action="store_true", help=_MERGE)
    group.add_argument("--private", action="store_true", help="Make the repository for you alone, if it is made.")
    group.add_argument("--revision", type=str | None, metavar="NAME", help="Branch; null: the main one.")
    own = {"checkpoint": str, "revision": str | None}
    resolved = _resolve(parser, argv, own, "RUN_DIR", _config_of_run, flags=("merge", "private"), most=2)
    if resolved is None:
        return 0
    if not resolved.more:
        raise GradeError(f"REPO is missing: {parser.usage}.")
    check_text("--checkpoint", resolved.options.checkpoint, "path")
    from grade.commands.push import push_run

    push_run(
        resolved.config, Path(resolved.positional), resolved.more[0], checkpoint=resolved.options.checkpoint,
        merged="merge" in resolved.flags, private="private" in resolved.flags, revision=resolved.options.revision,
    )
    return 0


_MERGE = "A whole model, with the adapter added to the weights; its logits are compared at the end."


def compare(argv: list[str]) -> int:
    """`grade compare CONFIG [--methods A,B] [--seeds 0,1] [--section.field VALUE ...]`; 1 where a run failed."""
    parser = _config_parser(
        "compare", "Train methods over seeds on the same prompts; tables at equal tokens and at equal training time. "
        "The comparison itself sets seed, method.name, generation.samples_per_prompt, evaluation.every, train.run_dir, "
        "train.resume, train.overwrite, train.tensorboard and train.wandb of its runs, and scales train.learning_rate "
        "(see --compare.*)."
    )
    parser.usage = "grade compare CONFIG [--methods A,B,...] [--seeds 0,1,...] [--section.field VALUE ...]"
    group = parser.add_argument_group("the comparison's own")
    group.add_argument(
        "--methods", type=str | None, metavar="A,B",
        help=f"Of {', '.join(COMPARED)}; null: those that can use the task's reward.",
    )
    group.add_argument("--seeds", type=str, default="0,1,2", metavar="0,1", help="Seeds of the runs.")
    resolved = _resolve(parser, argv, {"methods": str, "seeds": str}, "CONFIG", config_io.find_config)
    if resolved is None:
        return 0
    wanted = resolved.options.methods
    methods = default_methods(resolved.config) if wanted is None else _listed(wanted)
    if not methods:
        raise GradeError(f"--methods is empty: name some of {', '.join(COMPARED)}, or leave the option out.")
    unknown = [name for name in methods if name not in COMPARED]
    if unknown:
        raise GradeError(f"--methods: there is no {unknown[0]!r}. There are {', '.join(COMPARED)}.")
    texts = _listed(resolved.options.seeds)
    if not texts or not all(re.fullmatch("[0-9]{1,20}", text) and int(text) <= SEED for text in texts):
        raise GradeError(
            f"--seeds is {shown(repr(resolved.options.seeds))}: write whole numbers up to {SEED} with commas, such as "
            "0,1,2."
        )
    seeds = [int(text) for text in texts]
    for option, entries in (("methods", methods), ("seeds", seeds)):
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


def _listed(text: str) -> list[str]:
    """The entries of `a,b`."""
    return [entry.strip() for entry in text.split(",") if entry.strip()]


def variance(argv: list[str]) -> int:
    """`grade variance CONFIG [--checkpoint DIR] [--section.field VALUE ...]`."""
    parser = _config_parser(
        "variance", "Measure bias and variance of the gradient estimators at fixed parameters; what is measured: "
        "--variance.*."
    )
    parser.usage = "grade variance CONFIG [--checkpoint DIR] [--section.field VALUE ...]"
    group = parser.add_argument_group("the laboratory's own")
    group.add_argument(
        "--checkpoint", type=str | None, metavar="DIR",
        help="Folder of an adapter, such as runs/NAME/checkpoints/best; null: the adapter's initial state.",
    )
    resolved = _resolve(parser, argv, {"checkpoint": str}, "CONFIG", config_io.find_config)
    if resolved is not None:
        from grade.studies.variance.study import run_variance

        checkpoint = resolved.options.checkpoint
        if checkpoint is not None:
            check_text("--checkpoint", checkpoint, "path")
        run_variance(resolved.config, Path(checkpoint) if checkpoint else None)
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
    """CONFIG or RUN_DIR; empty for a command without."""
    more: list[str]
    """What was named after it."""
    flags: set[str]
    """The command's own options without a value that were given."""


def _config_parser(command: str, description: str) -> ArgumentParser:
    """The parser of a command whose argument is CONFIG."""
    return config_io.new_parser(
        prog=f"grade {command}",
        usage=f"grade {command} CONFIG [--section.field VALUE ...]",
        description=f"{description} CONFIG: a YAML file or a shipped config "
        f"({', '.join(config_io.shipped_configs())}); named beside --help, its values are shown as defaults. "
        "Relative paths are relative to the current directory.",
    )


def _parser_of_run(command: str, arguments: str, description: str, title: str) -> ArgumentParser:
    """The parser of a command whose argument is RUN_DIR, with its --checkpoint."""
    parser = config_io.new_parser(
        prog=f"grade {command}",
        usage=f"grade {command} {arguments} [--checkpoint best|last|step-N|DIR] [--section.field VALUE ...]",
        description=f"{description} RUN_DIR: the folder of a run; its config.yaml gives the settings, and options "
        "override them.",
    )
    group = parser.add_argument_group(title)
    checkpoint_help = "`best` by validation, `last`, `step-N`, or the folder of a checkpoint."
    group.add_argument("--checkpoint", type=str, default="best", help=checkpoint_help)
    return parser


def _config_of_run(run_dir: str) -> Path:
    check_text("RUN_DIR", run_dir, "path")
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise GradeError(f"{run_dir} is not a run directory: it has no config.yaml.")
    config_io.check_sealed(path)
    return path


def _resolve(
    parser: ArgumentParser,
    argv: list[str],
    own: Mapping[str, Any],
    metavar: str | None,
    find: Callable[[str], Path],
    *,
    flags: Sequence[str] = (),
    most: int | None = 1,
) -> Resolved | None:
    """What a command line says; None when it asked for help or for the settings, which are then printed.

    Args:
        own: types of the command's own options by name, beside the settings.
        metavar: name of the positional argument; None: the command has none and reads the config `demo`.
        find: the YAML file that the positional argument means.
        flags: names of the command's own options without a value.
        most: positional arguments there may be, the first one included; None: any number.
    """
    parser.add_argument("--print_config", action="store_true", help="Print the settings as YAML and exit.")
    config_io.add_settings(parser)
    positionals, options = config_io.split_arguments(
        argv, [*config_io.setting_types(), *own], [*_FLAGS, *flags], parser.prog
    )
    if most is not None and len(positionals) > most * (metavar is not None):
        raise GradeError(
            f"unexpected argument {positionals[-1]!r}: settings are written --section.field VALUE "
            f"(`{parser.prog} --help`)."
        )
    wants_help = any(option in HELP for option in options)
    wants_config = "--print_config" in options
    # Help and printing come after everything else was checked, so the parser must not act on them.
    given = {name for name in flags if f"--{name}" in options}
    options = [option for option in options if option not in (*HELP, "--print_config", *(f"--{n}" for n in flags))]
    if metavar is not None and not positionals:
        if wants_help:
            emit(parser.format_help())
            return None
        names = ", ".join(config_io.shipped_configs())
        hint = f" Shipped configs: {names}." if metavar == "CONFIG" else ""
        raise GradeError(f"{metavar} is missing: {parser.usage}.{hint}")
    namespace = config_io.parse_settings(parser, find("demo" if metavar is None else positionals[0]), options, own)
    if wants_help:
        emit(parser.format_help())
        return None
    config = config_io.build_config(namespace)
    if wants_config:
        emit(config_io.config_to_yaml(config))
        return None
    return Resolved(config, namespace, positionals[0] if positionals else "", positionals[1:], given)


def emit(text: str) -> None:
    """Print to standard output, quietly when its reader has gone (`grade train --help | head`)."""
    with printing():
        sys.stdout.write(text)
