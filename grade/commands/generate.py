"""`grade generate`: a run's policy answers prompts, its base model beside it if that is asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from grade.config import Config
from grade.errors import GradeError, printing, read_json
from grade.formats import RECORD
from grade.processes import make_accelerator
from grade.training.answers import Answer, Answers
from grade.training.trained import checkpoint_folder, load_trained

SIDE_BY_SIDE = 80
"""Columns of a terminal that two responses beside each other need."""


def generate_from(
    config: Config,
    run_dir: Path,
    prompts: Sequence[str],
    *,
    checkpoint: str = "best",
    base: bool = False,
    samples: int = 1,
    max_new_tokens: int | None = None,
) -> None:
    """`grade generate`: print responses to prompts, to lines of standard input, or to what a person types.

    Args:
        config: the run's, with overrides.
        prompts: on the command line; none, or `-`, for standard input.
        checkpoint: "best", "last", "step-N", or a folder with an adapter.
        base: the base model answers too; always where a person types.
        samples: responses per prompt.
        max_new_tokens: longest response; None: as in training.
    """
    asked = not prompts and sys.stdin.isatty()
    folder = checkpoint_folder(run_dir, checkpoint)
    if not all(prompt.strip() for prompt in prompts):
        raise GradeError("a prompt is empty: write some text.")
    policy = load_trained(config, run_dir, folder, make_accelerator(config).device)
    record = read_json(run_dir / "run.json", "Name the folder of a whole run.", shape=RECORD)
    answers = Answers(
        config,
        policy,
        base=base or asked,
        samples=samples,
        max_new_tokens=max_new_tokens,
        chat=record.get("task", {}).get("prompts") == "conversations",
    )
    console = Console(highlight=False)
    if asked:
        _converse(answers, console)
        return
    lines = _lines(sys.stdin) if not prompts or list(prompts) == ["-"] else iter(prompts)
    plain = len(prompts) == 1 and prompts[0] != "-" and samples == 1 and not base
    with printing():
        while some := list(islice(lines, config.evaluation.batch_size)):
            for answer in answers.to(some):
                if plain:  # what a script wants to have
                    sys.stdout.write(f"{answer.policy}\n")
                else:
                    show(answer, console)


def _lines(stream: Iterable[str]) -> Iterator[str]:
    """The lines that say something."""
    return (line.rstrip("\r\n") for line in stream if line.strip())


def _converse(answers: Answers, console: Console) -> None:
    """Ask for prompts until the end of the input (Ctrl-D) or Ctrl-C."""
    console.print("A prompt and Enter; Ctrl-D ends.", style="dim")
    while True:
        try:
            prompt = console.input("[bold]>[/bold] ")
            if prompt.strip():
                for answer in answers.to([prompt]):
                    show(answer, console, with_prompt=False)
        except GradeError as error:  # another prompt may do
            console.print(str(error), markup=False)
        except (EOFError, KeyboardInterrupt):
            console.print()
            return


def show(answer: Answer, console: Console, *, with_prompt: bool = True) -> None:
    """Print a response, and beside it, or above where that is too narrow, the base model's."""
    if with_prompt:
        console.print(f"[bold]> {escape(answer.prompt)}[/bold]", soft_wrap=True)
    if answer.base is None:
        console.print(answer.policy, markup=False, soft_wrap=True)
    elif console.width >= SIDE_BY_SIDE:
        table = Table(expand=True, show_lines=False)
        for title in ("base model", "policy"):
            table.add_column(title, ratio=1, overflow="fold")
        table.add_row(escape(answer.base), escape(answer.policy))
        console.print(table)
    else:
        for title, text in (("base model", answer.base), ("policy", answer.policy)):
            console.print(f"[dim]{title}:[/dim] {escape(text)}", soft_wrap=True)
    console.print()
