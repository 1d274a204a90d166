"""`grade evaluate`: a checkpoint of a run and its base model on the same prompts."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from grade.config import Config
from grade.config.sealed import config_from_sealed
from grade.errors import GradeError, writing
from grade.hub_names import GIVEN
from grade.model.checkpoint import load_adapter
from grade.model.fingerprint import check_made_from, inputs_of, refuse_given
from grade.processes import make_accelerator
from grade.training.evaluation import Evaluation, evaluate, write_evaluations
from grade.training.evaluation_tables import evaluation_table
from grade.training.setup import set_up
from grade.training.trained import checkpoint_folder


def evaluate_run(config: Config, run_dir: Path, checkpoint: str, split: str) -> list[Evaluation]:
    """`grade evaluate`: base model and a checkpoint of a run on one split; prints a table, keeps the result.

    Args:
        config: the run's, with overrides.
        checkpoint: "best", "last", "step-N", or a folder with an adapter.
        split: "validation" or "test".
    """
    refuse_given(run_dir)
    if config.task.dataset.startswith(GIVEN):
        argument = {"validation": "eval_prompts", "test": "test_prompts"}[split]
        raise GradeError(
            f"{run_dir} was trained on prompts that were given in Python, and no setting tells where they are. "
            f"Evaluate in that program, with trainer.evaluate(prompts) or, of a GradeTrainer(..., {argument}=...), "
            f"trainer.evaluate(split={split!r}); or name data with --task.dataset."
        )
    limit = config.evaluation.test_prompts if split == "test" else config.evaluation.validation_prompts
    if limit == 0:
        raise GradeError(f"evaluation.{split}_prompts is 0: there is nothing to evaluate. Set it to 1 or more.")
    folder = checkpoint_folder(run_dir, checkpoint)
    accelerator = make_accelerator(config)
    before = config_from_sealed(run_dir / "config.yaml")
    own_reward = config.reward == before.reward
    tokenizer, task, policy, reward = set_up(config, accelerator, run_dir=run_dir if own_reward else None)
    inputs = inputs_of(policy, task, reward.identity())
    if config.task != before.task:  # other data, by the user's own word
        del inputs["data"]
    if not own_reward:
        del inputs["reward"]
    check_made_from(run_dir, inputs)
    load_adapter(folder, policy)
    prompts = task.prompts(split, tokenizer, limit=limit)
    rows = [
        evaluate(
            policy,
            reward,
            prompts,
            config.evaluation,
            config.generation,
            config.method,
            split=split,
            step=None,
            adapters=adapters,
            accelerator=accelerator,
        )
        for adapters in (False, True)
    ]
    if accelerator.is_main_process:
        own = folder.resolve().is_relative_to(run_dir.resolve())
        name = folder.resolve().name if own else "-".join(folder.resolve().parts[-3:])
        name = re.sub(r"[^\w.-]", "_", name)
        path = run_dir / f"evaluation-{split}-{name}.json"
        with writing(path, "RUN_DIR", "Make room on its disk, and evaluate again."):
            write_evaluations(path, {"checkpoint": str(folder), "rows": [asdict(r) for r in rows]})
        Console().print(evaluation_table(rows, title=f"{split}, {rows[0].prompts} prompts, checkpoint {name}"))
    return rows
