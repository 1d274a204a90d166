"""The commands that take the folder of a run, as `grade.commands.verbs` has all others."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from grade.commands.arguments import Own, path_of, resolve
from grade.config.bounds import BATCH, TOKENS, check_text, shown
from grade.errors import GradeError

_OF_RUN = " RUN_DIR: the folder of a run; its config.yaml gives the settings, and options override them."
_CHECKPOINT = Own(
    str,
    "best",
    "best|last|step-N|DIR",
    "`best` by validation, `last`, `step-N` or `resume-N`, or the folder of a checkpoint.",
)
_OF_THE_RUN = _CHECKPOINT._replace(
    help="`best` by validation, `last`, `step-N` or `resume-N`, or the folder of a checkpoint in RUN_DIR, whose card "
    "it gets."
)
_MERGE = Own(
    None, False, "", "A whole model, with the adapter added to the weights; its logits are compared at the end."
)


def evaluate(argv: list[str]) -> int:
    """`grade evaluate RUN_DIR [--checkpoint best|last|step-N|DIR] [--split test|validation] [overrides]`."""
    resolved = resolve(
        "evaluate",
        argv,
        "Evaluate a checkpoint and the base model on the same prompts." + _OF_RUN,
        {
            "checkpoint": _CHECKPOINT,
            "split": Own(Literal["test", "validation"], "test", "test|validation", "Whose prompts."),
        },
        positional="RUN_DIR",
    )
    if resolved is not None:
        from grade.commands.evaluate import evaluate_run

        check_text("--checkpoint", resolved.options.checkpoint, "path")
        evaluate_run(resolved.config, Path(resolved.positional), resolved.options.checkpoint, resolved.options.split)
    return 0


def generate(argv: list[str]) -> int:
    """`grade generate RUN_DIR [PROMPT ...] [--base] [--samples N] [--max_new_tokens N] [overrides]`."""
    resolved = resolve(
        "generate",
        argv,
        "Answer prompts with a checkpoint of a run, sampled as in its evaluation with the noise of --seed. A PROMPT of "
        "- reads them from standard input, a line each; so does a pipe without PROMPT. On a terminal without PROMPT "
        "you are asked for them, and base model and policy answer side by side. A prompt that starts with a dash comes "
        "after --." + _OF_RUN,
        {
            "checkpoint": _CHECKPOINT,
            "base": Own(None, False, "", "Let the base model answer too, with the same noise."),
            "samples": Own(int, 1, "N", "Responses per prompt."),
            "max_new_tokens": Own(int | None, None, "N", "Longest response; null: generation.max_new_tokens."),
        },
        positional="RUN_DIR",
        more="[PROMPT ...]",
        most=None,
    )
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
        resolved.config,
        Path(resolved.positional),
        resolved.more,
        checkpoint=options.checkpoint,
        base="base" in resolved.switches,
        samples=options.samples,
        max_new_tokens=options.max_new_tokens,
    )
    return 0


def export(argv: list[str]) -> int:
    """`grade export RUN_DIR [--checkpoint best|last|step-N|DIR] [--merge] [--to DIR] [overrides]`."""
    resolved = resolve(
        "export",
        argv,
        "Write a checkpoint of a run for other programs: the adapter with its tokenizer and card, or with --merge a "
        "whole model that transformers and vLLM load by themselves." + _OF_RUN,
        {
            "checkpoint": _OF_THE_RUN,
            "merge": _MERGE,
            "to": Own(str | None, None, "DIR", "A folder, missing or empty; null: one in RUN_DIR/export."),
        },
        positional="RUN_DIR",
    )
    if resolved is None:
        return 0
    check_text("--checkpoint", resolved.options.checkpoint, "path")
    target = path_of(resolved, "to")
    from grade.commands.export import export_run

    export_run(
        resolved.config, Path(resolved.positional), resolved.options.checkpoint, "merge" in resolved.switches, target
    )
    return 0


def push(argv: list[str]) -> int:
    """`grade push RUN_DIR REPO [--checkpoint best|last|step-N|DIR] [--merge] [--private] [--revision NAME]`."""
    resolved = resolve(
        "push",
        argv,
        "Upload what `grade export` writes to the hub. REPO: NAME or OWNER/NAME; made if it is missing. Needs a token: "
        "`hf auth login`, or HF_TOKEN." + _OF_RUN,
        {
            "checkpoint": _OF_THE_RUN,
            "merge": _MERGE,
            "private": Own(None, False, "", "Make the repository for you alone, if it is made."),
            "revision": Own(str | None, None, "NAME", "Branch; null: the main one."),
        },
        positional="RUN_DIR",
        more="REPO",
        most=2,
    )
    if resolved is None:
        return 0
    if not resolved.more:
        raise GradeError("REPO is missing: grade push RUN_DIR REPO.")
    check_text("--checkpoint", resolved.options.checkpoint, "path")
    from grade.commands.push import push_run

    push_run(
        resolved.config,
        Path(resolved.positional),
        resolved.more[0],
        checkpoint=resolved.options.checkpoint,
        merged="merge" in resolved.switches,
        private="private" in resolved.switches,
        revision=resolved.options.revision,
    )
    return 0
