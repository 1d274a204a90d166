"""The training run: sample, replay, update, validate, keep the best, test once.

    prepare -> [ rollout -> accumulate over micro-batches -> clip -> AdamW ] x steps -> test the best checkpoint

Randomness has no state that a resumed run would have to restore: prompts follow from (seed, step), noise rows from
(step, response, position). So a resumed run repeats the uninterrupted one, and splitting a batch over micro-batches
or processes changes nothing - except which responses share a mini-batch of PPO or GRPO.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

from accelerate import Accelerator

from grade.config import Config
from grade.errors import present
from grade.methods import make_method
from grade.methods.metrics import Phases, peak_memory_gib, reset_peak_memory
from grade.methods.services import Services
from grade.model.end_of_sequence import warning_without_ends
from grade.model.fingerprint import inputs_of
from grade.model.loading import load_prompts
from grade.model.policy import Policy
from grade.processes import main_process_first
from grade.replay.compiling import compile_layers
from grade.rewards.shared import head_lines
from grade.rollout import Rollout
from grade.sampling.choice import decoding_of
from grade.sampling.compiled import CompiledDecoding
from grade.sampling.decode import Decoding
from grade.sampling.engine_rollouts import engine_rollouts
from grade.sampling.external import rollout_source
from grade.sampling.lines import StopAsked
from grade.sampling.vllm import check_server
from grade.training.callbacks import Callbacks
from grade.training.checkpoints import Checkpoints
from grade.training.evaluation import Evaluation, samples_of
from grade.training.evaluator import Evaluator
from grade.training.gate import UpdateGate
from grade.training.guard import Guard
from grade.training.interrupt import StopRequest, stop_between_steps
from grade.training.log import RunLog, check_loggers
from grade.training.opening_lines import opening_lines
from grade.training.optimization import Optimization
from grade.training.progress import TrainingProgress, training_progress
from grade.training.record import RunRecord
from grade.training.responses import Responses
from grade.training.resuming import check_inputs, other_schedule
from grade.training.retry import Agreement, Retry
from grade.training.rollback import Rollback
from grade.training.run_folder import clear, mark, write_run_config
from grade.training.saving import Saving
from grade.training.setup import SetUp, check_same_inputs, set_up
from grade.training.soundness import Soundness, broken_measure
from grade.training.trial import Trial, memory_plan
from grade.training.validations import Validations, line_of


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
        self.agreement = Agreement(accelerator)
        self.services = Services(self.agreement.reduce, self.phases, self.agreement.failing_together)
        self.decoding: Decoding  # by `_decode_with`, from the policy and before there is a reward
        self.validations = Validations()
        self.record = RunRecord(run_dir, config, self.validations, enabled=accelerator.is_main_process)
        with main_process_first(accelerator):
            if accelerator.is_main_process:
                check_loggers(config.train)
                check_server(config)
        self.callbacks.begin(accelerator.is_main_process, self.services.any_process)
        if loaded is None:
            loaded = set_up(
                config, accelerator, run_dir=run_dir if config.train.resume else None, before_reward=self._decode_with
            )
        else:
            self._decode_with(loaded.policy)
        tokenizer, self.task, self.policy, self.reward = self.loaded = loaded
        self.agreement.possible &= self.policy.sharding is None
        self.evaluation_prompts = load_prompts(config.evaluation, self.task, tokenizer)
        self.prompts = self.evaluation_prompts.pop("policy")
        train = config.train
        self.responses_per_step = train.batch_size * train.accumulation_steps * accelerator.num_processes
        inputs = inputs_of(self.policy, self.task, self.reward.identity(), self.reward.attributes())
        self.inputs = {**inputs, "responses_per_step": self.responses_per_step}
        check_same_inputs(accelerator, self.inputs)
        if train.resume:
            check_inputs(run_dir, self.inputs)
        split = max(self.evaluation_prompts, key=lambda name: len(self.evaluation_prompts[name]))
        compiled = replace(config.rollout, compile=isinstance(self.decoding, CompiledDecoding))
        decided = replace(config, rollout=compiled)
        trial = Trial(self.policy, self.reward, decided, self.prompts, self.evaluation_prompts[split], split)
        together = self.services.failing_together
        self.memory = memory_plan(trial, accelerator.num_processes, self.services.any_process, together)
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
        groups = [{"params": self.policy.parameters()}, *self.method.parameter_groups()]
        self.optimization = Optimization(groups, train, accelerator)
        self.guard = Guard(config, run_dir, self.record, accelerator)
        self.source = rollout_source(
            config.rollout,
            self.policy,
            config.generation,
            longest_prompt=config.task.prompt_max_tokens,
            needed=train.steps * self.responses_per_step,
            processes=accelerator.num_processes,
        )
        self.engine = engine_rollouts(config, self.policy, run_dir, accelerator)
        self.responses = Responses(
            self.policy,
            self.prompts,
            self.decoding,
            self.source,
            self.engine,
            config.generation,
            config.seed,
            self.responses_per_step,
            accelerator.process_index,
            accelerator.num_processes,
        )
        self.retry = Retry(self.agreement, self.method, self.responses, self.memory, self.optimization.clear)
        self.log = RunLog(run_dir, train, enabled=False)  # until `fit` opens the run's files
        self.evaluator = Evaluator(
            self.policy,
            self.reward,
            self.evaluation_prompts,
            config.evaluation,
            config.generation,
            config.method,
            accelerator,
            self.memory,
        )
        self.checkpoints = Checkpoints(
            run_dir,
            self.policy,
            self.record,
            self.validations,
            self.callbacks,
            count=train.keep_checkpoints,
            enabled=accelerator.is_main_process,
        )
        self.soundness = Soundness(self.policy, self.optimization, self.prompts, self.checkpoints)
        self.gate = UpdateGate(
            self.method,
            self.retry.step,
            self.optimization,
            self.guard,
            self.soundness.refuse,
            copies=config.method.updates > 1,
        )
        self.rollback = Rollback(self.inputs, self.method, self.optimization, self.guard, self.checkpoints, accelerator)
        self.saving = Saving(
            train,
            self.inputs,
            self.method,
            self.optimization,
            self.guard,
            self.soundness,
            self.checkpoints,
            accelerator,
            lambda: self.log.extents(),
        )
        self.step = 0
        self.stop = StopRequest()

    def _decode_with(self, policy: Policy) -> None:
        """How responses are decoded and layers run; a policy for which that is not possible is refused before a reward
        head is trained."""
        self.decoding, decoding = decoding_of(policy, self.config)
        self._compiling_notes = [note for note in (decoding, compile_layers(policy, self.config)) if note]

    # -- one step --------------------------------------------------------------------------------------------

    def rollouts(self, step: int) -> Iterator[Rollout]:
        """This process' share of a step's responses, at most generation.batch_size at a time."""
        return self.responses.of_step(step, self.method.sampling(step))

    def train_step(self) -> dict[str, float]:
        """One optimizer step, or none where a number of it is not finite (`UpdateGate`); its metrics."""
        config, step = self.config, self.step
        reset_peak_memory(self.policy.device)
        with self.phases("rollout"):
            rollouts = self.retry.rollouts(step, self.rollouts)
            measures = self.responses.measures()
        metrics, wrong = self.gate.step(rollouts, step)
        if wrong is None:
            metrics |= self.method.steer(metrics)
            self.guard.made(metrics)
        else:
            self.soundness.check(step)  # of broken weights none ever will be made
            self.guard.left_out(rollouts, step, wrong, metrics)
        seconds = self.phases.take()
        if self.accelerator.is_main_process and step % config.train.samples_every == 0:
            self.log.samples(step, samples_of(self.policy, rollouts[0], config.train.samples_logged))
        return {
            **metrics,
            **measures,
            **self.guard.metrics(),
            "learning_rate": self.optimization.learning_rate(step),
            "tokens_per_second": metrics["tokens"] / sum(seconds.values()),
            "memory/peak_gib": peak_memory_gib(self.policy.device),
            **{f"seconds/{name}": value for name, value in seconds.items()},
        }

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
        notes = opening_lines(
            self.config.model, train, self.config.generation, self.policy, self.reward, self.accelerator.num_processes
        )
        notes += [*self.task.notes(), self.memory.line]
        written, found = None, None
        if train.resume:
            found = self.saving.restored()
            self.step, written = found.state["step"], found.state["logs"]
            notes.append(f"going on after step {self.step}, from {self.run_dir}/checkpoints/last")
            notes += other_schedule(found.state["steps"], train, self.step)
            if self.source is not None and not self.source.is_pipe:
                self.source.skip(self.step * self.responses_per_step)
            self.accelerator.wait_for_everyone()  # until all have read what the main one may rename
        main = self.accelerator.is_main_process
        with main_process_first(self.accelerator):
            if main:
                if train.overwrite:
                    clear(self.run_dir)
                mark(self.run_dir)
            self.log = RunLog(
                self.run_dir, train, enabled=main, settings=asdict(self.config), written=written, resume_step=self.step
            )
            if found is not None:
                if found.wrong or not (self.run_dir / "evaluation.json").is_file():
                    self.record.evaluations()
                self.checkpoints.go_on_from(found)  # last: until then a kill leaves what is found again
            if main:
                write_run_config(self.run_dir, self.config)
                self.record.begin(self.loaded, self.inputs, self.step, self.accelerator.num_processes)
                self.guard.note()
                notes += [f"reward head: {line}" for line in head_lines(self.record.content.get("reward_head", {}))]
        if found is not None and found.resaves_best:
            self.checkpoints.save_best(self.step)
        notes += self._compiling_notes
        with ExitStack() as stack:
            stack.callback(self.log.close)
            stack.callback(self.record.end_session)
            progress = stack.enter_context(
                training_progress(train.steps, self.step, every=train.log_every, enabled=main)
            )
            stack.enter_context(self.saving.saved_where_others_fail(lambda: self.step))
            self.stop = stop = stack.enter_context(stop_between_steps("this step is finished and saved"))
            warning = None if found is None else found.warning()
            if warning is not None:
                progress.warn(warning)
            for note in notes:
                progress.say(note)
            self._heed(progress)
            if self.engine is not None and self.step < train.steps:
                using = self.engine.running(self.step, self.prompts, lambda: stop.asked, progress.warn)
                try:
                    progress.say(stack.enter_context(using))
                except StopAsked:  # while it waited for the engine: nothing has been done
                    raise KeyboardInterrupt from None
            if self.step == 0 and not self.validations.rows:
                self._validate(progress, adapters=False)
            elif self.step % every == 0 and self.validations.rows[-1]["step"] != self.step:  # the reward failed in it
                self.saving.save(self.step, best=self._validate(progress))
            self.callbacks.check(self.checkpoints.kept())
            self.rollback.prepare(self.step, self.saving.state)
            if self.source is not None:
                self.source.should_stop = lambda: stop.asked
            while self.step < train.steps:
                try:
                    with self.memory.explained(f"step {self.step}", "train"):
                        metrics = self.train_step()
                except StopAsked:  # while it waited for responses: nothing of this step has been done
                    self.saving.save_before_an_end(self.step)
                    raise KeyboardInterrupt from None
                self.log.metrics(self.step, metrics)
                progress.advance(metrics)
                self.guard.check(progress.warn, self.checkpoints.kept())
                self.step += 1
                self.callbacks("on_step", self.step, metrics)
                if self._heed(progress):
                    continue
                better, last = False, self.callbacks.stopping() or self.step == train.steps
                if self.step % every == 0 or last:
                    better = self._validate(progress)
                stopping = self.services.any_process(stop.asked)
                if better or stopping or self.step % train.save_every == 0 or last:
                    self.saving.save(self.step, best=better)
                self.callbacks.check(self.checkpoints.kept())
                if last and self.step < train.steps and not stopping:
                    break
                if stopping and (self.step < train.steps or self.evaluation_prompts["test"]):
                    self.accelerator.wait_for_everyone()  # the main one saves: a launcher ends it with the first to end
                    raise KeyboardInterrupt
            if self.validations.rows[-1]["step"] != self.step:  # resumed with no more steps than it had had
                self.saving.save(self.step, best=self._validate(progress))
            rows = self._test(progress)
            self.callbacks("on_end")
            self.callbacks.check(self.checkpoints.kept())
            return rows

    def _heed(self, progress: TrainingProgress) -> bool:
        """Whether an alarm took the run back."""
        before = self.step
        self.step = self.rollback.heed(self.step, progress, self.log, self.saving)
        if self.step != before:
            self.soundness.forget()
            if self.engine is not None:
                self.engine.forget()
        return self.step != before

    def _validate(self, progress: TrainingProgress, *, adapters: bool = True) -> bool:
        """Whether the policy is the best so far."""
        if adapters:
            self.soundness.check(self.step)
        row = self._evaluate("validation", progress, self.step, adapters=adapters)
        self.soundness.refuse(f"validation after {self.step} steps", broken_measure(row.summary()))
        better = self.validations.add(row, trusted=not self.guard.beyond())
        self.log.metrics(self.step, {f"validation/{k}": v for k, v in row.summary().items()})
        if adapters and self.config.train.keep_adapters:
            self.checkpoints.keep_adapter(self.step)
        self.record.evaluations()
        progress.say(line_of(row))
        self.callbacks("on_validation", row)
        first = len(self.validations.rows) == 1
        warning = warning_without_ends(self.config.generation, row.eos_rate) if first else None
        if warning is not None:
            progress.warn(warning)
        return better

    def _evaluate(self, split: str, progress: TrainingProgress, step: int, *, adapters: bool) -> Evaluation:
        row = self.evaluator.evaluate(split, progress, self.stop, step, adapters=adapters)
        self.phases.take()  # none of it is the next step's time
        return row

    @property
    def policy_step(self) -> int:
        """Optimizer steps that the policy in hand has had."""
        return present(self.validations.best)["step"] if self.checkpoints.holds_best else self.step

    def load_best(self) -> None:
        """Put the best checkpoint into the policy, unless it is there."""
        if not self.checkpoints.holds_best:
            self.accelerator.wait_for_everyone()
            self.checkpoints.load_best()

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
        self.checkpoints.note_test(step, test)  # before the evaluations are written: they say that the run is finished
        self.record.evaluations(test)
        return rows

    def card(self, step: int, *, merged: bool = False) -> str:
        """The model card of the policy after `step` steps; of a run that `fit` has begun."""
        return self.record.card(step, merged=merged)
