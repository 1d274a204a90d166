"""The evaluations that a run makes of itself: with progress, and broken off where a stop is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from accelerate import Accelerator

from grade.config import EvaluationConfig, GenerationConfig, MethodConfig
from grade.memory.plan import MemoryPlan
from grade.model.policy import Policy
from grade.rewards.base import Reward
from grade.training.evaluation import Evaluation, evaluate
from grade.training.interrupt import StopRequest
from grade.training.progress import TrainingProgress


@dataclass
class Evaluator:
    """Evaluates policy and base on the prompts of a run.

    Args:
        prompts: token ids by split.
        memory: says what to change where memory runs out.
    """

    policy: Policy
    reward: Reward
    prompts: Mapping[str, Sequence[list[int]]]
    settings: EvaluationConfig
    generation: GenerationConfig
    method: MethodConfig
    accelerator: Accelerator
    memory: MemoryPlan

    def evaluate(
        self, split: str, progress: TrainingProgress, stop: StopRequest, step: int, *, adapters: bool
    ) -> Evaluation:
        """An evaluation of the policy, as it was after `step` steps, or of the base model. One that a resumed run makes
        anew, the base model's or the test, is broken off where a stop is asked for; not with several processes, which
        would wait for each other.

        Raises:
            GradeError: memory ran out.
            KeyboardInterrupt: it was broken off.
        """
        prompts, first = self.prompts[split], stop.first
        breaks_off = self.accelerator.num_processes == 1 and (split == "test" or not adapters)
        if split == "test" or not adapters:
            stop.first = f"this {'batch of the ' * breaks_off}evaluation is finished"

        def done(count: int) -> None:
            tick(count)
            if breaks_off and stop.asked:
                raise KeyboardInterrupt

        with (
            progress.evaluation(split, len(prompts)) as tick,
            self.memory.explained(f"the {split} evaluation", "evaluation"),
        ):
            row = evaluate(
                self.policy,
                self.reward,
                prompts,
                self.settings,
                self.generation,
                self.method,
                split=split,
                step=step if adapters else 0,
                adapters=adapters,
                accelerator=self.accelerator,
                tick=done,
            )
        stop.first = first
        return row
