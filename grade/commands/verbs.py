"""The commands behind `grade.cli`: what each reads from its arguments, and whom it calls.

Those that take the folder of a run are in `grade.commands.run_verbs`.

Torch and everything that needs it is imported after the settings have been checked.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from grade.commands.arguments import HELP, Own, Resolved, emit, path_of, resolve
from grade.commands.run_verbs import evaluate as evaluate
from grade.commands.run_verbs import export as export
from grade.commands.run_verbs import generate as generate
from grade.commands.run_verbs import push as push
from grade.config import default_methods
from grade.config.bounds import COUNT, SEED, check_text, shown
from grade.config.methods import COMPARED
from grade.config.options import new_parser, split_arguments
from grade.errors import GradeError, printing
from grade.planning.devices import DEVICES

COMMANDS = {
    "demo": "train a tiny model on built-in reviews, from scratch to a better one: no network, no GPU",
    "reward": "train the reward head of a config, or look whether GRADE can follow a reward",
    "train": "train a policy",
    "plan": "what a step of a config costs in time and memory, on devices that need not be here",
    "evaluate": "evaluate a checkpoint of a run against its base model",
    "generate": "answer prompts with a run's policy, beside its base model if you like",
    "export": "write a run's adapter, or a whole model, as a folder for other programs",
    "push": "upload a run's adapter, or a whole model, to the hub",
    "compare": "train several methods over several seeds and compare them at equal cost",
    "variance": "measure bias and variance of the gradient estimators at fixed parameters",
    "report": "write a page with figures and tables from a run or a comparison",
    "doctor": "versions, devices, kernel backends, caches: what works here and what is missing",
}


def train(argv: list[str]) -> int:
    """`grade train CONFIG [--section.field VALUE ...]`."""
    resolved = resolve("train", argv, "Train a policy; the run directory holds everything it makes.")
    if resolved is not None:
        from grade.commands.train import train as train_policy

        train_policy(resolved.config)
    return 0


def reward(argv: list[str]) -> int:
    """`grade reward CONFIG [--check_gradient] [--section.field VALUE ...]`."""
    resolved = resolve(
        "reward",
        argv,
        "Train the reward head; `grade train` does so when it is missing.",
        {
            "check_gradient": Own(
                None,
                False,
                "",
                "Look whether GRADE can follow the reward, head or reward.model: compare what its gradient predicts of "
                "swapped tokens with what they do.",
            )
        },
    )
    if resolved is None:
        return 0
    if "check_gradient" in resolved.switches:
        from grade.commands.reward import check_reward_gradient

        check_reward_gradient(resolved.config)
    else:
        from grade.commands.reward import train_reward

        train_reward(resolved.config)
    return 0


def plan(argv: list[str]) -> int:
    """`grade plan CONFIG [--gpu NAME] [--gpus N] [--shards N] [--hops X] [--json] [--section.field VALUE ...]`."""
    resolved = resolve(
        "plan",
        argv,
        "Time and memory of a training step by formulas of the model's sizes, on devices that need not be here: per "
        "phase what is computed, moved and received, what bounds it, and what to change. Needs no weights, only a "
        "config.json. docs/scaling.md has the formulas.",
        {
            "gpu": Own(
                str | None, None, "NAME", f"One of {', '.join(DEVICES)}; null: cpu where device is cpu, otherwise h100."
            ),
            "gpus": Own(int, 1, "N", "Devices, each a process with its own train.batch_size and accumulation_steps."),
            "shards": Own(
                int | None,
                None,
                "N",
                "Devices that hold the frozen base's layers between them (a sharded base); null: the fewest that must.",
            ),
            "hops": Own(
                float | None, None, "X", "Hops of a step of grade and grade-ste; null: 6, as trained models need some."
            ),
            "flops": Own(float | None, None, "X", "Share of the device's rate of matrix products that is reached."),
            "bandwidth": Own(float | None, None, "X", "Share of its memory bandwidth that is reached."),
            "link": Own(float | None, None, "X", "Share of the interconnect's rate that is reached."),
            "layer_seconds": Own(float | None, None, "X", "Seconds that the host needs to launch a layer of a pass."),
            "json": Own(None, False, "", "Print JSON instead of tables."),
        },
    )
    if resolved is None:
        return 0
    from grade.commands.plan import run_plan

    names = ("gpu", "gpus", "shards", "hops", "flops", "bandwidth", "link", "layer_seconds")
    options = {name: getattr(resolved.options, name) for name in names}
    with printing():
        run_plan(resolved.config, as_text="json" not in resolved.switches, **options)
    return 0


def demo(argv: list[str]) -> int:
    """`grade demo [--cache_dir DIR] [--pretrain_steps N] [--section.field VALUE ...]`."""
    resolved = resolve(
        "demo",
        argv,
        "Write reviews with a grammar, train a tiny model on them, then do the real job on it.",
        {
            "cache_dir": Own(
                str | None, None, "DIR", "Folder that keeps the tiny model; null: one under the user's cache directory."
            ),
            "pretrain_steps": Own(
                int | None, None, "N", "Optimizer steps of the tiny model's own training; null: as many as it needs."
            ),
        },
        positional=None,
    )
    if resolved is None:
        return 0
    cache_dir, steps = path_of(resolved, "cache_dir"), resolved.options.pretrain_steps
    if steps is not None and not 1 <= steps <= COUNT:
        raise GradeError(f"pretrain_steps is {shown(steps)}: it must be at least 1 and at most {COUNT}.")
    from grade.commands.demo import run_demo

    run_demo(resolved.config, cache_dir, steps)
    return 0


def compare(argv: list[str]) -> int:
    """`grade compare CONFIG [--methods A,B] [--seeds 0,1] [--section.field VALUE ...]`; 1 where a run failed."""
    resolved = resolve(
        "compare",
        argv,
        "Train methods over seeds on the same prompts; tables at equal tokens and at equal training time. "
        "The comparison itself sets seed, method.name, generation.samples_per_prompt, evaluation.every, train.run_dir, "
        "train.resume, train.overwrite, train.tensorboard and train.wandb of its runs, and scales train.learning_rate "
        "(see --compare.*).",
        {
            "methods": Own(
                str | None, None, "A,B,...", f"Of {', '.join(COMPARED)}; null: those that can use the task's reward."
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
    resolved = resolve(
        "variance",
        argv,
        "Measure bias and variance of the gradient estimators at fixed parameters; what is measured: --variance.*.",
        {
            "checkpoint": Own(
                str | None,
                None,
                "DIR",
                "Folder of an adapter, such as runs/NAME/checkpoints/best; null: the adapter's initial state.",
            )
        },
    )
    if resolved is not None:
        from grade.studies.variance.study import run_variance

        run_variance(resolved.config, path_of(resolved, "checkpoint"))
    return 0


def report(argv: list[str]) -> int:
    """`grade report FOLDER [--output DIR]`."""
    parser = new_parser(
        prog="grade report",
        usage="grade report FOLDER [--output DIR]",
        description="Write one self-contained page, with every figure as PNG and PDF and every table as CSV and LaTeX. "
        "FOLDER: a run, a comparison, measurements of `grade variance`, or a folder of runs.",
    )
    parser.add_argument("--output", type=str | None, metavar="DIR", help="Where to; null: FOLDER/report.")
    positionals, options = split_arguments(argv, ["output"], ["help", "h"], parser.prog)
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
    parser = new_parser(prog="grade doctor", description=f"Show {COMMANDS['doctor']}.")
    parser.add_argument("--json", action="store_true", help="Print JSON instead of tables.")
    positionals, options = split_arguments(argv, [], ["json", "help", "h"], parser.prog)
    if positionals:
        raise GradeError(f"unexpected argument {positionals[0]!r}: see `grade doctor --help`.")
    if any(option in HELP for option in options):
        emit(parser.format_help())
        return 0
    from grade.commands.doctor import run_doctor

    with printing():
        run_doctor(as_json="--json" in options)
    return 0
