"""The training run: sample, replay, update, validate, keep the best, test once.

    prepare -> [ rollout -> accumulate over micro-batches -> clip -> AdamW ] x steps -> test the best checkpoint

Randomness has no state that a resumed run would have to restore: prompts follow from (seed, step), noise rows from
(step, response, position). So a resumed run repeats the uninterrupted one, and splitting a batch over micro-batches
or processes changes nothing - except which responses share a mini-batch of PPO or GRPO.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import get_scheduler

from grade.config import Config
from grade.errors import GradeError, RewardFailed, present, writing
from grade.files import latest, replace_text
from grade.methods import make_method
from grade.methods.metrics import Phases, peak_memory_gib, reset_peak_memory
from grade.methods.services import Services
from grade.model.checkpoint import load_adapter, replace_card, save_checkpoint
from grade.model.end_of_sequence import warning_without_ends
from grade.model.fingerprint import MODEL_GIVEN, differing, inputs_of
from grade.model.loading import load_prompts
from grade.model.policy import Policy
from grade.processes import everywhere, main_process_first, summed
from grade.rewards.shared import head_lines
from grade.rollout import Rollout
from grade.sampling.compiled import CompiledDecoding
from grade.sampling.decode import Decoding
from grade.sampling.external import RolloutSource
from grade.sampling.lines import StopAsked
from grade.training.callbacks import Callbacks
from grade.training.card import model_card
from grade.training.evaluation import Evaluation, evaluate, samples_of, write_evaluations
from grade.training.interrupt import StopRequest, stop_between_steps
from grade.training.log import GO_ON, RunLog, check_loggers
from grade.training.opening_lines import opening_lines
from grade.training.progress import TrainingProgress, training_progress
from grade.training.responses import Responses
from grade.training.resuming import best_is_missing, other_schedule, restored
from grade.training.run_folder import adapter_folder, clear, mark, write_run_config
from grade.training.sessions import SESSIONS, begun, earlier, utc_now
from grade.training.setup import SetUp, set_up
from grade.training.soundness import broken_measure, broken_policy
from grade.training.trial import Trial, memory_plan
from grade.training.validations import Validations, line_of

_LOWER = "Start another run with a lower train.learning_rate."


class Trainer:
    """One run. `fit` trains it; everything it writes is under `run_dir`.

    Args:
        loaded: tokenizer, task, policy and reward; None: what the config names is loaded now.
        callbacks: hear of the run's steps.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        run_dir: Path,
        loaded: SetUp | None = None,
        callbacks: Callbacks | None = None,
    ) -> None:
        self.config, self.accelerator, self.run_dir = config, accelerator, run_dir
        self.callbacks = callbacks or Callbacks()
        self.phases = Phases(accelerator.device)
        self.services = Services(partial(summed, accelerator), self.phases)
        self.decoding: Decoding  # by `_decode_with`, from the policy and before there is a reward
        self.record: dict[str, Any] = {}  # what run.json holds, once `fit` has begun
        with main_process_first(accelerator):
            if accelerator.is_main_process:
                check_loggers(config.train)
        self.callbacks.begin(accelerator.is_main_process, self.services.any_process)
        if loaded is None:
            loaded = set_up(
                config, accelerator, run_dir=run_dir if config.train.resume else None, before_reward=self._decode_with
            )
        else:
            self._decode_with(loaded.policy)
        tokenizer, self.task, self.policy, self.reward = self.loaded = loaded
        self.evaluation_prompts = load_prompts(config.evaluation, self.task, tokenizer)
        self.prompts = self.evaluation_prompts.pop("policy")
        split = max(self.evaluation_prompts, key=lambda name: len(self.evaluation_prompts[name]))
        trial = Trial(self.policy, self.reward, config, self.prompts, self.evaluation_prompts[split], split)
        self.memory = memory_plan(trial, accelerator.num_processes, self.services.any_process)
        train = config.train
        self.method = make_method(
            self.policy,
            self.reward,
            config.method,
            config.generation,
            train,
            self.services,
            seed=config.seed,
            activation_checkpointing=self.memory.recompute,
        )
        self.optimizer = torch.optim.AdamW(
            [{"params": self.policy.parameters()}, *self.method.parameter_groups()],
            lr=train.learning_rate,
            betas=(train.adam_beta1, train.adam_beta2),
            eps=train.adam_epsilon,
            weight_decay=train.weight_decay,
        )
        name = "constant_with_warmup" if train.schedule == "constant" else train.schedule
        # The learning rate is a function of the step and of the settings in force: nothing of it is saved or restored.
        self.schedule = get_scheduler(name, self.optimizer, train.warmup_steps, train.steps).lr_lambdas[0]
        self.responses_per_step = train.batch_size * train.accumulation_steps * accelerator.num_processes
        inputs = inputs_of(self.policy, self.task, self.reward.identity())
        self.inputs = {**inputs, "responses_per_step": self.responses_per_step}
        main, *others = everywhere(accelerator, self.inputs)
        changed = next(filter(None, (differing(main, other) for other in others)), "")
        if changed:
            raise GradeError(
                f"the processes do not have the same inputs, but different ones: {changed}. Give all of them the same, "
                "with random numbers seeded alike."
            )
        self.source = None
        if config.rollout.source is not None:
            needed = train.steps * self.responses_per_step
            self.source = RolloutSource(
                Path(config.rollout.source),
                self.policy,
                config.generation,
                timeout=config.rollout.timeout,
                longest_prompt=config.task.prompt_max_tokens,
                needed=needed,
                processes=accelerator.num_processes,
            )
        self.responses = Responses(
            self.policy,
            self.prompts,
            self.decoding,
            self.source,
            config.generation,
            config.seed,
            self.responses_per_step,
            accelerator.process_index,
            accelerator.num_processes,
        )
        self.log = RunLog(run_dir, config, enabled=False)  # until `fit` opens the run's files
        self.step = 0
        self.validations = Validations()
        self.stop = StopRequest()
        self.saved: int | None = None  # steps of the checkpoint in checkpoints/last
        self._holds_best = False  # whether the policy is the best checkpoint, and no longer the last step's
        self._sound_at: int | None = None  # the step after which the policy was last found to be sound

    def _decode_with(self, policy: Policy) -> None:
        """How responses are decoded; a policy that cannot be decoded so is refused before a reward head is trained."""
        compiled = self.config.rollout.compile and self.config.rollout.source is None
        self.decoding = (CompiledDecoding if compiled else Decoding)(policy)

    # -- one step --------------------------------------------------------------------------------------------

    def rollouts(self, step: int) -> Iterator[Rollout]:
        """This process' share of a step's responses, at most generation.batch_size at a time."""
        return self.responses.of_step(step, self.method.sampling(step))

    def train_step(self) -> dict[str, float]:
        """One optimizer step; its metrics."""
        config, step = self.config, self.step
        reset_peak_memory(self.policy.device)
        with self.phases("rollout"):
            rollouts = list(self.rollouts(step))
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.schedule(step)
        metrics = self.method.step(rollouts, step, self._update)
        metrics |= self.method.steer(metrics)
        seconds = self.phases.take()
        if self.accelerator.is_main_process and step % config.train.samples_every == 0:
            self.log.samples(step, samples_of(self.policy, rollouts[0], config.train.samples_logged))
        return {
            **metrics,
            "learning_rate": config.train.learning_rate * self.schedule(step),
            "tokens_per_second": metrics["tokens"] / sum(seconds.values()),
            "memory/peak_gib": peak_memory_gib(self.policy.device),
            **{f"seconds/{name}": value for name, value in seconds.items()},
        }

    def _update(self) -> float:
        """Sum gradients over processes, clip, step, clear; the norm of the policy's gradient before it was clipped.

        The policy's gradient is clipped by its own norm, and that of a value head by its: an error of the values,
        large at first, would otherwise shrink the policy's steps.

        Raises:
            GradeError: the gradient is not finite; the last checkpoint is untouched.
        """
        with self.phases("update"):
            limit = self.config.train.max_grad_norm or math.inf
            groups = [group["params"] for group in self.optimizer.param_groups]
            for parameter in (p for group in groups for p in group):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                if self.accelerator.num_processes > 1:
                    parameter.grad = self.accelerator.reduce(parameter.grad, reduction="sum")
            norms = [torch.nn.utils.clip_grad_norm_(group, limit).item() for group in groups]
            wrong = [norm for norm in norms if not math.isfinite(norm)]
            if wrong:
                raise GradeError(
                    f"the gradient's norm at step {self.step} is {wrong[0]}: the update was not made. {self._kept()} "
                    f"{_LOWER} For grade and grade-ste a higher method.tau_end helps too."
                )
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return norms[0]  # the policy's

    # -- the run ---------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Evaluation]:
        """Train to config.train.steps; the test evaluations {"base": ..., "best": ...}, or {} without test prompts.

        Raises:
            GradeError: the run cannot be continued, its files cannot be written, or the policy is broken; the earlier
                checkpoints are untouched.
            KeyboardInterrupt: a stop was asked for; the last step is saved.
        """
        train, every = self.config.train, self.config.evaluation.every
        self.memory.check(self.services.any_process)
        notes = opening_lines(self.config, self.policy, self.reward, self.accelerator.num_processes)
        notes += [*self.task.notes(), self.memory.line]
        written, resaves_best = None, False
        if train.resume:
            state = restored(self.run_dir, self.inputs, self.policy, self.optimizer, self.method)
            self.step = self.saved = state["step"]
            self.validations, written = Validations(state["evaluations"], state["best"]), state["logs"]
            notes.append(f"going on after step {self.step}, from {self.run_dir}/checkpoints/last")
            notes += other_schedule(state["steps"], train, self.step)
            resaves_best = best_is_missing(self.run_dir, self.validations.best, self.step)
            if self.source is not None and not self.source.is_pipe:
                self.source.skip(self.step * self.responses_per_step)
        main = self.accelerator.is_main_process
        with main_process_first(self.accelerator):
            if main:
                if train.overwrite:
                    clear(self.run_dir)
                mark(self.run_dir)
            self.log = RunLog(self.run_dir, self.config, enabled=main, written=written, resume_step=self.step)
            if main:
                write_run_config(self.run_dir, self.config)
                self._write_record()
                notes += [f"reward head: {line}" for line in head_lines(self.record.get("reward_head", {}))]
                if train.resume and not (self.run_dir / "evaluation.json").is_file():
                    self._write_evaluations()
        if resaves_best:
            self._save_best()
        if isinstance(self.decoding, CompiledDecoding):
            notes.append("rollout.compile: the first step compiles for half a minute or more")
        with ExitStack() as stack:
            stack.callback(self.log.close)
            stack.callback(self._end_session)
            progress = stack.enter_context(
                training_progress(train.steps, self.step, every=train.log_every, enabled=main)
            )
            self.stop = stop = stack.enter_context(stop_between_steps("this step is finished and saved"))
            for note in notes:
                progress.say(note)
            if self.step == 0 and not self.validations.rows:
                self._validate(progress, adapters=False)
            self.callbacks.check(self._kept())
            if self.source is not None:
                self.source.should_stop = lambda: stop.asked
            while self.step < train.steps:
                try:
                    with self.memory.explained(f"step {self.step}", "train"):
                        metrics = self.train_step()
                except StopAsked:  # while it waited for responses: nothing of this step has been done
                    self._save()
                    raise KeyboardInterrupt from None
                except RewardFailed as error:  # likewise
                    if self.step in (0, self.saved) or self.accelerator.num_processes > 1:
                        raise
                    self._save()
                    raise RewardFailed(f"{error} {self._kept()}") from error
                self._refuse_broken(f"step {self.step}", broken_measure(metrics))
                self.log.metrics(self.step, metrics)
                progress.advance(metrics)
                self.step += 1
                self.callbacks("on_step", self.step, metrics)
                better, last = False, self.callbacks.stopping() or self.step == train.steps
                if self.step % every == 0 or last:
                    better = self._validate(progress)
                stopping = self.services.any_process(stop.asked)
                if better or stopping or self.step % train.save_every == 0 or last:
                    self._save(best=better)
                self.callbacks.check(self._kept())
                if last and self.step < train.steps and not stopping:
                    break
                if stopping and (self.step < train.steps or self.evaluation_prompts["test"]):
                    raise KeyboardInterrupt
            if self.validations.rows[-1]["step"] != self.step:  # resumed with no more steps than it had had
                self._save(best=self._validate(progress))
            rows = self._test(progress)
            self.callbacks("on_end")
            self.callbacks.check(self._kept())
            return rows

    def _validate(self, progress: TrainingProgress, *, adapters: bool = True) -> bool:
        """Whether the policy is the best so far."""
        if adapters:
            self._check_policy()
        row = self._evaluate("validation", progress, self.step, adapters=adapters)
        self._refuse_broken(f"validation after {self.step} steps", broken_measure(row.summary()))
        better = self.validations.add(row)
        self.log.metrics(self.step, {f"validation/{k}": v for k, v in row.summary().items()})
        if self.accelerator.is_main_process and adapters and self.config.train.keep_adapters:
            save_checkpoint(adapter_folder(self.run_dir, self.step), self.policy, self.step, card=self.card(self.step))
        self._write_evaluations()
        progress.say(line_of(row))
        self.callbacks("on_validation", row)
        first = len(self.validations.rows) == 1
        warning = warning_without_ends(self.config.generation, row.eos_rate) if first else None
        if warning is not None:
            progress.warn(warning)
        return better

    def _check_policy(self) -> None:
        if self._sound_at != self.step:
            trained = (p for group in self.optimizer.param_groups for p in group["params"])
            self._refuse_broken(f"after {self.step} steps", broken_policy(self.policy, trained, self.prompts[0]))
            self._sound_at = self.step

    def _refuse_broken(self, when: str, broken: str | None) -> None:
        """End the run before a broken policy is saved or chosen.

        Args:
            broken: what is wrong with it, from `grade.training.soundness`; None: nothing is.
        """
        if broken is not None:
            raise GradeError(
                f"{when}: the policy is broken ({broken}), and nothing of it is saved. {self._kept()} {_LOWER}"
            )

    def _kept(self) -> str:
        """Which checkpoints there are to go back to, as a sentence."""
        best = self.validations.best
        kept = [] if self.saved is None else [f"checkpoints/last (step {self.saved})"]
        kept += [] if best is None else [f"checkpoints/best (step {best['step']})"]
        if not kept:
            return "No checkpoint had been written before."
        return f"Kept {'is' if len(kept) == 1 else 'are'} {' and '.join(kept)}."

    def _evaluate(self, split: str, progress: TrainingProgress, step: int, *, adapters: bool) -> Evaluation:
        """An evaluation of the policy, as it was after `step` steps, or of the base model. One that a resumed run makes
        anew, the base model's or the test, is broken off where a stop is asked for; not with several processes, which
        would wait for each other."""
        prompts, first = self.evaluation_prompts[split], self.stop.first
        breaks_off = self.accelerator.num_processes == 1 and (split == "test" or not adapters)
        if split == "test" or not adapters:
            self.stop.first = f"this {'batch of the ' * breaks_off}evaluation is finished"

        def done(count: int) -> None:
            tick(count)
            if breaks_off and self.stop.asked:
                raise KeyboardInterrupt

        with (
            progress.evaluation(split, len(prompts)) as tick,
            self.memory.explained(f"the {split} evaluation", "evaluation"),
        ):
            row = evaluate(
                self.policy,
                self.reward,
                prompts,
                self.config,
                split=split,
                step=step if adapters else 0,
                adapters=adapters,
                accelerator=self.accelerator,
                tick=done,
            )
        self.stop.first = first
        self.phases.take()
        return row

    @property
    def policy_step(self) -> int:
        """Optimizer steps that the policy in hand has had."""
        return present(self.validations.best)["step"] if self._holds_best else self.step

    def load_best(self) -> None:
        """Put the best checkpoint into the policy, unless it is there."""
        if not self._holds_best:
            self.accelerator.wait_for_everyone()
            load_adapter(latest(self.run_dir / "checkpoints" / "best"), self.policy)
            self._holds_best = True

    def _test(self, progress: TrainingProgress) -> dict[str, Evaluation]:
        """The held-out test, once: base model and best checkpoint."""
        if not self.evaluation_prompts["test"]:
            return {}
        self.load_best()
        step = self.policy_step
        rows = {
            "base": self._evaluate("test", progress, step, adapters=False),
            "best": self._evaluate("test", progress, step, adapters=True),
        }
        test = {name: asdict(row) for name, row in rows.items()}
        if self.accelerator.is_main_process:  # before the evaluations are written, which say that the run is finished
            replace_card(self.run_dir / "checkpoints" / "best", self.card(step, test))
        self._write_evaluations(test)
        return rows

    def _write_evaluations(self, test: dict | None = None) -> None:
        if self.accelerator.is_main_process:
            path, tested = self.run_dir / "evaluation.json", {"test": test} if test else {}
            with writing(path, "train.run_dir", GO_ON):
                validations = {"validation": self.validations.rows, "best": self.validations.best}
                write_evaluations(path, {**validations, **tested})

    def _write_record(self) -> None:
        """What the run was made of: splits, fingerprints, sessions, and what the reward tells and keeps of itself."""
        before = earlier(self.run_dir / "run.json") if self.config.train.resume else []
        self.record = {
            "task": self.task.describe(),
            "inputs": self.inputs,
            **({MODEL_GIVEN: True} if self.policy.given else {}),
            "reward": self.reward.raises,
            **self.reward.keep(self.run_dir),
            SESSIONS: [*before, begun(self.step, self.accelerator.num_processes)],
        }
        with writing(self.run_dir / "run.json", "train.run_dir"):
            self._replace_record()

    def _replace_record(self) -> None:
        replace_text(self.run_dir / "run.json", json.dumps(self.record, indent=2) + "\n")

    def _end_session(self) -> None:
        if self.accelerator.is_main_process:
            self.record[SESSIONS][-1]["ended"] = utc_now()
            with suppress(OSError):  # a full disk was told of where it mattered
                self._replace_record()

    def card(self, step: int, test: dict | None = None, *, merged: bool = False) -> str:
        """The model card of the policy after `step` steps; of a run that `fit` has begun."""
        return model_card(self.config, self.record, step, self.validations.rows, test, merged=merged)

    def _save(self, *, best: bool = False) -> None:
        """The checkpoint to go on from, and then, if the policy is the best so far, the best one. One that no state
        names would be lost by the next kill, and so would the one whose place it took."""
        self._check_policy()
        last = self.run_dir / "checkpoints" / "last"
        if self.accelerator.is_main_process:
            state = {
                "optimizer": self.optimizer.state_dict(),
                "method": self.method.state_dict(),
                "kl_coef": self.method.kl_coef,
                "inputs": self.inputs,
                "reward": self.reward.state_dict(),
                "best": self.validations.best,
                "evaluations": self.validations.rows,
                "steps": self.config.train.steps,
                "logs": self.log.extents(),
            }
            save_checkpoint(last, self.policy, self.step, state, card=self.card(self.step))
        self.saved = self.step
        self.callbacks("on_save", last)
        if best:
            self._save_best()

    def _save_best(self) -> None:
        """The policy as the best so far, which the checkpoint to go on from says already."""
        if self.accelerator.is_main_process:
            folder = self.run_dir / "checkpoints" / "best"
            save_checkpoint(folder, self.policy, self.step, card=self.card(self.step))
            self.callbacks("on_save", folder)
