"""Training from Python: one class for a program that has a model, a reward and prompts, and for the command line.

from grade import GradeConfig, GradeTrainer
trainer = GradeTrainer(model, reward, prompts, config=GradeConfig())
result = trainer.train()
trainer.save("my-adapter")
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from grade.config import Config, validate
from grade.config.kinds import check_kinds
from grade.errors import GradeError, writing
from grade.model.checkpoint import save_checkpoint
from grade.model.policy import Policy
from grade.model.pretrained import context_of
from grade.processes import make_accelerator
from grade.rewards.base import Reward
from grade.tasks.given import GivenTask, read_prompts
from grade.training.answers import Answers
from grade.training.callbacks import Callback, Callbacks
from grade.training.determinism import deterministic
from grade.training.evaluation import Evaluation, evaluate, evaluation_of
from grade.training.export import check_target, export_merged
from grade.training.given import check_length, given_set_up
from grade.training.gradient_check import RESPONSES, SWAPS, GradientCheck, check_gradient
from grade.training.run_folder import started
from grade.training.setup import SetUp, set_up
from grade.training.trainer import Trainer

_COMPARED = 4
"""Prompts on which a merged model is compared with what was written."""


@dataclass(frozen=True)
class TrainResult:
    """What a run has come to.

    Attributes:
        run_dir: its folder.
        step: optimizer steps that were made, of this run and of those that it went on from.
        best_step: of the checkpoint with the best validation.
        base, best: the base model and the best checkpoint on the test prompts or, where there are none
            (`best.split`), on the validation prompts.
        metrics: the file of metrics, a JSON object a line.
        warning: what to say where no checkpoint is better than the base model.
    """

    run_dir: Path
    step: int
    best_step: int
    base: Evaluation
    best: Evaluation
    metrics: Path
    warning: str | None = None


class GradeTrainer:
    """Trains a language model's adapter to raise a reward.

    Args:
        model: hub name or folder of a causal language model; a model of transformers, which gets a LoRA adapter by
            `config.model.lora` and is changed by that; or a peft model, whose own LoRA adapter is trained on.
        reward: a `grade.DifferentiableReward` or `grade.RewardFunction`; a function of the one parameter `policy` that
            makes one; a plain function `f(prompts, completions, **columns) -> list[float | None]` as TRL has it; or a
            list of these, each by itself, with a weight as (reward, weight), or as a `grade.Term`. A
            `grade.RewardModel` trains a head on its own data.
        prompts: strings, lists of token ids, conversations (lists of {"role", "content"}, written by the tokenizer's
            chat template), or a `datasets.Dataset` with a column `prompt` or `messages`. They are not cut.
        config: settings; None: the defaults. Its sections `task` and `reward` are not used: prompts and reward are
            given. `config.train.run_dir` or `config.output_dir` say where the run is written.
        tokenizer: the policy's; None: the one of the model's name or folder.
        eval_prompts: for validation, as `prompts`, the first `evaluation.validation_prompts` of them; None: the
            training prompts.
        test_prompts: for one test at the end, likewise; None: no test.
        callbacks: `grade.Callback` objects.

    Raises:
        GradeError: something of that cannot be used; it says what and what to do.

    A program that is started by `accelerate launch` trains on all its processes.
    """

    config: Config
    accelerator: Accelerator
    callbacks: Callbacks
    _loaded: SetUp | None
    _trainer: Trainer | None

    def __init__(
        self,
        model: Any,
        reward: Any,
        prompts: Any,
        *,
        config: Config | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        eval_prompts: Any = None,
        test_prompts: Any = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        if config is not None and not isinstance(config, Config):
            raise GradeError(f"config is {type(config).__name__}: give a GradeConfig, or None for the defaults.")
        config = config or Config()
        check_kinds(config)
        self._begin(replace(config, task=replace(config.task, name="prompts", label_type=None)), callbacks)
        self.config, self._loaded = given_set_up(
            self.config,
            self.accelerator,
            model,
            reward,
            prompts,
            tokenizer=tokenizer,
            eval_prompts=eval_prompts,
            test_prompts=test_prompts,
        )

    @classmethod
    def from_config(cls, config: Config, *, callbacks: Sequence[Callback] = ()) -> GradeTrainer:
        """A trainer of what the settings name, as `grade train` has it; nothing is loaded before it is needed.

        Raises:
            GradeError: the settings cannot work.
        """
        trainer = cls.__new__(cls)
        trainer._begin(config, callbacks)
        return trainer

    def _begin(self, config: Config, callbacks: Sequence[Callback]) -> None:
        validate(config)
        self.config, self.accelerator = config, make_accelerator(config)
        self.callbacks = Callbacks(callbacks, self)
        self._loaded = self._trainer = None

    @property
    def loaded(self) -> SetUp:
        """Tokenizer, task, policy and reward."""
        if self._loaded is None:
            with deterministic(self.config.train.deterministic, self.accelerator.device):
                self._loaded = set_up(self.config, self.accelerator)
        return self._loaded

    @property
    def policy(self) -> Policy:
        """The policy; `policy.model` is the peft model. After `train` it is the best checkpoint."""
        return self.loaded.policy

    @property
    def reward(self) -> Reward:
        return self.loaded.reward

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.loaded.tokenizer

    def train(self) -> TrainResult:
        """Train to `config.train.steps`, or go on with a run where `config.train.resume` says so.

        The run's folder is held meanwhile: another process that would use it is refused. The policy is the best
        checkpoint afterwards.

        Raises:
            GradeError: the run cannot be made or continued, or a callback raised; what was saved stays.
            KeyboardInterrupt: a stop was asked for (Ctrl-C); the last step is saved.
        """
        if self._trainer is not None:
            raise GradeError("this trainer has trained already, and its policy with it. Make another one.")
        with ExitStack() as stack:
            self.config, run_dir = stack.enter_context(started(self.config, self.accelerator))
            stack.enter_context(deterministic(self.config.train.deterministic, self.accelerator.device))
            trainer = Trainer(self.config, self.accelerator, run_dir, self._loaded, self.callbacks)
            self._trainer, self._loaded = trainer, trainer.loaded
            rows = trainer.fit()
            trainer.load_best()  # unless the test has
        validations, best = trainer.validations, trainer.validations.best
        assert best is not None
        if not rows:
            validated = next(r for r in validations.rows if r["model"] != "base" and r["step"] == best["step"])
            rows = {"base": evaluation_of(validations.rows[0]), "best": evaluation_of(validated)}
        return TrainResult(
            run_dir,
            trainer.step,
            best["step"],
            rows["base"],
            rows["best"],
            run_dir / "metrics.jsonl",
            validations.verdict(),
        )

    def evaluate(self, prompts: Any = None, *, split: str = "validation", base: bool = False) -> Evaluation:
        """Sample a response to every prompt, with noise that does not change, and measure its reward, KL and entropy.

        Args:
            prompts: as the trainer takes them; None: those of `split`.
            split: "validation" or "test".
            base: the base model instead of the policy.

        Raises:
            GradeError: there are no prompts.
        """
        if split not in ("validation", "test"):
            raise GradeError(f"split is {split!r}: it must be validation or test.")
        task, config = self.loaded.task, self.config
        limit: int | None = config.evaluation.validation_prompts
        if split == "test":
            limit = config.evaluation.test_prompts
        with ExitStack() as stack:
            if prompts is not None:
                if not isinstance(task, GivenTask):  # a reward may read the task's own rows
                    raise GradeError("prompts: this trainer has those of its settings. Make one by GradeTrainer(...).")
                given, limit = read_prompts(prompts, self.tokenizer, chat=config.tokenizer), None
                self._check_length(given.ids, "config.generation.max_new_tokens")
                stack.enter_context(task.replaced(split, given))
            rows = task.prompts(split, self.tokenizer, limit=limit)
            if not rows:
                raise GradeError(f"split={split}: there are no such prompts. Give some to evaluate, or to the trainer.")
            return evaluate(
                self.policy,
                self.reward,
                rows,
                config.evaluation,
                config.generation,
                config.method,
                split=split,
                step=self._step(),
                adapters=not base,
                accelerator=self.accelerator,
            )

    def check_gradient(self, *, responses: int = RESPONSES, swaps: int = SWAPS, base: bool = False) -> GradientCheck:
        """Whether GRADE can follow the reward: what its gradient predicts of swapped tokens, and what they really do.

        Args:
            responses: to training prompts, at least 8.
            swaps: of tokens in every response.
            base: in responses of the base model instead of the policy's.

        Returns:
            A table with `print`, and a `verdict` in words.

        Raises:
            GradeError: the reward has no gradient.
        """
        prompts = self.loaded.task.prompts("policy", self.tokenizer, limit=None)
        return check_gradient(
            self.policy, self.reward, prompts, self.config, responses=responses, swaps=swaps, adapters=not base
        )

    def generate(
        self, prompts: Any, *, base: bool = False, samples: int = 1, max_new_tokens: int | None = None
    ) -> list[str]:
        """Responses as texts, sampled as in evaluation; the same call gives the same ones.

        Args:
            prompts: as the trainer takes them.
            base: the base model answers instead of the policy.
            samples: responses to every prompt, next to each other.
            max_new_tokens: longest response; None: as in training.
        """
        for name, value in (("samples", samples), ("max_new_tokens", max_new_tokens)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise GradeError(f"{name} is {value!r}: it must be a whole number of at least 1.")
        rows = read_prompts(prompts, self.tokenizer, chat=self.config.tokenizer).ids
        answers = Answers(self.config, self.policy, samples=samples, max_new_tokens=max_new_tokens)
        self._check_length(rows, "max_new_tokens", answers.sampling.max_new_tokens)
        return answers.texts(rows, adapters=not base)

    def save(self, folder: str | Path, *, merge: bool = False) -> Path:
        """Write the policy into a folder that is missing or empty, with its tokenizer and a model card.

        Args:
            merge: a whole model with the adapter added, which transformers and vLLM load by themselves; it is loaded
                again and compared to the bit. Else the adapter, as peft loads it.

        Raises:
            GradeError: the folder cannot be written, or the model cannot be merged; nothing of it is then left.
        """
        target = Path(folder)
        card = None if self._trainer is None else self._trainer.card(self._step(), merged=merge)
        if not self.accelerator.is_main_process:
            return target
        check_target(target, "save")
        if merge:
            rows = [row[:32] for row in self.loaded.task.prompts("policy", self.tokenizer, limit=_COMPARED)]
            # Merging uses a policy up, so it is a copy's. The card says so if there was no training.
            export_merged(
                lambda: copy.deepcopy(self.policy), target, lambda tokenizer: rows, card or "Not trained.\n", "save"
            )
            return target
        with writing(target, "save"):
            save_checkpoint(target, self.policy, self._step(), card=card)
        return target

    def _step(self) -> int:
        """Optimizer steps that the policy has had."""
        return 0 if self._trainer is None else self._trainer.policy_step

    def _check_length(self, rows: Sequence[list[int]], setting: str, response: int | None = None) -> None:
        """Refuse prompts that do not fit the model's context with their responses.

        Args:
            setting: what says how long a response may be, for the message.
        """
        response = response or self.config.generation.max_new_tokens
        check_length("prompts", rows, context_of(self.policy.config), response, setting)
