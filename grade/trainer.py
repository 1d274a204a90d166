"""The training run: sample, replay, update, validate, keep the best, test once.

    prepare -> [ rollout -> accumulate over micro-batches -> clip -> AdamW ] x steps -> test the best checkpoint

Randomness has no state that a resumed run would have to restore: prompts follow from (seed, step), noise rows from
(step, response, position). So a resumed run repeats the uninterrupted one, and splitting a batch over micro-batches
or processes changes nothing - except which responses share a mini-batch of PPO or GRPO.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Dict, Iterator, List, Optional

import torch
from accelerate import Accelerator
from rich.console import Console
from transformers import get_scheduler

from grade.checkpoint import latest, load_adapter, load_state, save_checkpoint
from grade.compiled_decoding import CompiledDecoding
from grade.config import Config, GradeError
from grade.config_io import config_to_yaml
from grade.decoding import Decoding
from grade.end_of_sequence import warning_without_ends
from grade.evaluate import Evaluation, evaluate, text_of, write_evaluations
from grade.evaluation_tables import evaluation_table
from grade.interrupt import stop_between_steps
from grade.line_source import StopAsked
from grade.loading import load_policy, load_prompts, load_reward, load_tokenizer
from grade.machine import free_bytes
from grade.memory_plan import plan as plan_memory
from grade.methods import make_method
from grade.metrics import Phases, RunLog, peak_memory_gib, reset_peak_memory
from grade.opening_lines import opening_lines
from grade.progress import training_progress
from grade.reward_training import head_report, keep_head, with_kept_head
from grade.rollout import Rollout, pad_prompts, sample
from grade.rollout_source import RolloutSource
from grade.run_dir import adapter_folder, prepare_run_dir
from grade.services import Services
from grade.tasks import load_task


def make_accelerator(config: Config) -> Accelerator:
    """Accelerate's view of the machine: device, processes, reductions.

    Raises:
        GradeError: device=cuda without one.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise GradeError("device=cuda, but torch sees no CUDA or ROCm device. Use device=auto or cpu.")
    # Not what accelerate would choose on Apple silicon: its GPU has no float64, which sums here use.
    return Accelerator(cpu=config.device == "cpu" or not torch.cuda.is_available())


def prompt_numbers(step: int, per_step: int, count: int, seed: int) -> List[int]:
    """Numbers of the prompts of a step: a fresh permutation of all `count` in every epoch, from (seed, epoch)."""
    numbers: List[int] = []
    position = step * per_step
    while len(numbers) < per_step:
        epoch, offset = divmod(position + len(numbers), count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        numbers += order[offset: offset + per_step - len(numbers)].tolist()
    return numbers


class Trainer:
    """One run. `fit` trains it; everything it writes is under `run_dir`."""

    def __init__(self, config: Config, accelerator: Accelerator, run_dir: Path):
        self.config, self.accelerator, self.run_dir = config, accelerator, run_dir
        self.phases = Phases(accelerator.device)
        self.services = Services(self._sum, self.phases)
        tokenizer = load_tokenizer(config)
        self.task = load_task(config)
        self.policy = load_policy(config, tokenizer, accelerator.device)
        compiled = config.rollout.compile and config.rollout.source is None
        self.decoding = (CompiledDecoding if compiled else Decoding)(self.policy)  # refuses before a head is trained
        head_config = with_kept_head(config, run_dir) if config.train.resume else config
        with accelerator.main_process_first():
            self.reward = load_reward(head_config, self.policy, self.task)
        self.evaluation_prompts = load_prompts(config, self.task, tokenizer)
        longest = max(len(prompt) for prompts in self.evaluation_prompts.values() for prompt in prompts)
        self.prompts = self.evaluation_prompts.pop("policy")
        self.memory = plan_memory(
            self.policy, self.reward, config, longest, free_bytes(accelerator.device, accelerator.num_processes),
            self.services.any_process, evaluated=max(map(len, self.evaluation_prompts.values()), default=0),
        )
        decided = replace(config.method, activation_checkpointing=self.memory.checkpoint)
        self.method = make_method(self.policy, self.reward, replace(config, method=decided), self.services)
        train = config.train
        self.optimizer = torch.optim.AdamW(
            [{"params": self.policy.parameters()}, *self.method.parameter_groups()],
            lr=train.learning_rate, betas=(train.adam_beta1, train.adam_beta2), eps=train.adam_epsilon,
            weight_decay=train.weight_decay,
        )
        name = "constant_with_warmup" if train.schedule == "constant" else train.schedule
        self.scheduler = get_scheduler(name, self.optimizer, train.warmup_steps, train.steps)
        self.responses_per_step = train.batch_size * train.accumulation_steps * accelerator.num_processes
        self.source = None
        if config.rollout.source is not None:
            needed = train.steps * self.responses_per_step
            self.source = RolloutSource(config, self.policy, needed=needed, processes=accelerator.num_processes)
        self.step = 0
        self.norms: List[float] = []  # of the policy's gradient, per update of the current step
        self.best: Optional[dict] = None
        self.evaluations: List[dict] = []

    # -- one step --------------------------------------------------------------------------------------------

    def rollouts(self, step: int) -> Iterator[Rollout]:
        """This process' share of a step's responses, at most generation.batch_size at a time."""
        generation, accelerator = self.config.generation, self.accelerator
        copies = generation.samples_per_prompt
        numbers = prompt_numbers(step, self.responses_per_step // copies, len(self.prompts), self.config.seed)
        share = len(numbers) // accelerator.num_processes
        first = accelerator.process_index * share
        together = max((generation.batch_size or share * copies) // copies, 1)
        if self.source is not None:
            self.source.skip(first * copies)
        for start in range(first, first + share, together):
            stop = min(start + together, first + share)
            responses = step * self.responses_per_step + torch.arange(
                start * copies, stop * copies, device=self.policy.device
            )
            draw = dict(seed=self.config.seed, first_rows=responses * generation.max_new_tokens)
            if self.source is not None:
                yield self.source.rollout(len(responses), self.method.sampling(step), copies=copies, **draw)
                continue
            ids, mask = pad_prompts(
                [self.prompts[n] for n in numbers[start:stop]], self.policy.pad_id, self.policy.device
            )
            yield sample(
                self.policy, ids, mask, self.method.sampling(step), samples_per_prompt=copies, decoding=self.decoding,
                **draw,
            )
        if self.source is not None:
            self.source.skip((len(numbers) - first - share) * copies)

    def train_step(self) -> Dict[str, float]:
        """One optimizer step; its metrics."""
        config, step = self.config, self.step
        reset_peak_memory(self.policy.device)
        with self.phases("rollout"):
            rollouts = list(self.rollouts(step))
        self.norms = []
        learning_rate = self.scheduler.get_last_lr()[0]
        metrics = self.method.step(rollouts, step, self._update)
        self.scheduler.step()
        seconds = self.phases.take()
        if self.accelerator.is_main_process and step % config.train.samples_every == 0:
            self.log.samples(step, self._samples(rollouts[0]))
        norms = self.norms or [0.0]
        return {
            **metrics, "grad_norm": sum(norms) / len(norms), "learning_rate": learning_rate, "updates": len(self.norms),
            "tokens_per_second": metrics["tokens"] / sum(seconds.values()),
            "memory/peak_gib": peak_memory_gib(self.policy.device),
            **{f"seconds/{name}": value for name, value in seconds.items()},
        }

    def _update(self) -> None:
        """Sum gradients over processes, clip, step, clear.

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
                    f"the gradient's norm at step {self.step} is {wrong[0]}: the update was not made. Start another "
                    "run with a lower train.learning_rate (for grade and grade-ste a higher method.tau_end helps too); "
                    "the last checkpoint is kept."
                )
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.norms.append(norms[0])  # the policy's

    def _samples(self, rollout: Rollout) -> List[dict]:
        return [
            {
                "prompt": text_of(self.policy, rollout.prompt_ids[i], rollout.prompt_mask[i]),
                "response": text_of(self.policy, rollout.tokens[i], rollout.mask[i]),
            }
            for i in range(min(self.config.train.samples_logged, len(rollout)))
        ]

    # -- the run ---------------------------------------------------------------------------------------------

    def fit(self) -> Dict[str, Evaluation]:
        """Train to config.train.steps; the test evaluations {"base": ..., "best": ...}, or {} without test prompts."""
        train, every = self.config.train, self.config.evaluation.every
        if train.resume:
            self._restore()
        main = self.accelerator.is_main_process
        if main:
            if train.overwrite and self.run_dir.exists():
                shutil.rmtree(self.run_dir)
            self.run_dir.mkdir(parents=True, exist_ok=True)
            (self.run_dir / "config.yaml").write_text(config_to_yaml(self.config), encoding="utf-8")
            self._write_record()
        self.log = RunLog(self.run_dir, self.config, enabled=main, resume_step=self.step)
        try:
            with training_progress(train.steps, self.step, enabled=main) as progress, stop_between_steps() as stop:
                for line in (*opening_lines(self.config, self.task, self.policy, self.reward), self.memory.line):
                    progress.say(line)
                if isinstance(self.decoding, CompiledDecoding):
                    progress.say("rollout.compile: the first step compiles for half a minute or more")
                if self.step == 0 and not self.evaluations:
                    self._validate(progress, adapters=False)
                if self.source is not None:
                    self.source.should_stop = lambda: stop.asked
                while self.step < train.steps:
                    try:
                        with self.memory.explained(f"step {self.step}", "train"):
                            metrics = self.train_step()
                    except StopAsked:  # while it waited for responses: nothing of this step has been done
                        self._save()
                        raise KeyboardInterrupt from None
                    self.log.metrics(self.step, metrics)
                    progress.advance(metrics)
                    self.step += 1
                    if self.step % every == 0 or self.step == train.steps:
                        self._validate(progress)
                    stopping = self.services.any_process(stop.asked)
                    if self.step % train.save_every == 0 or self.step == train.steps or stopping:
                        self._save()
                    if stopping and self.step < train.steps:
                        raise KeyboardInterrupt
                return self._test(progress)
        finally:
            self.log.close()

    def _validate(self, progress, *, adapters: bool = True) -> None:
        row = self._evaluate("validation", progress, adapters=adapters)
        self.evaluations.append(asdict(row))
        self.log.metrics(self.step, {f"validation/{k}": v for k, v in row.summary().items()})
        better = adapters and (self.best is None or row.metric > self.best["metric"])
        if better:
            self.best = {"step": self.step, "metric": row.metric, "reward": row.reward}
        if self.accelerator.is_main_process:
            if better:
                save_checkpoint(self.run_dir / "checkpoints" / "best", self.policy)
            if adapters and self.config.train.keep_adapters:
                save_checkpoint(adapter_folder(self.run_dir, self.step), self.policy)
        self._write_evaluations()
        progress.say(
            f"step {row.step:>4}  validation of the {row.model}: reward {row.reward:.3f} ± {row.reward_stderr:.3f}  "
            + "".join(f"{name} {value:.3f}  " for name, value in row.details.items()) +
            f"KL {row.kl:.3f} nats/token  distinct tokens {row.unique_token_ratio:.2f}"
        )
        warning = warning_without_ends(self.config, row.eos_rate) if len(self.evaluations) == 1 else None
        if warning is not None:
            progress.say(warning)

    def _evaluate(self, split: str, progress, *, adapters: bool) -> Evaluation:
        prompts = self.evaluation_prompts[split]
        with progress.evaluation(split, len(prompts)) as tick, self.memory.explained(
            f"the {split} evaluation", "evaluation"
        ):
            row = evaluate(
                self.policy, self.reward, prompts, self.config, split=split, step=self.step if adapters else 0,
                adapters=adapters, accelerator=self.accelerator, tick=tick,
            )
        self.phases.take()
        return row

    def _test(self, progress) -> Dict[str, Evaluation]:
        """The held-out test, once: base model and best checkpoint."""
        if not self.evaluation_prompts["test"]:
            return {}
        self.accelerator.wait_for_everyone()
        load_adapter(latest(self.run_dir / "checkpoints" / "best"), self.policy)
        self.step = self.best["step"]
        rows = {
            "base": self._evaluate("test", progress, adapters=False),
            "best": self._evaluate("test", progress, adapters=True),
        }
        self._write_evaluations({name: asdict(row) for name, row in rows.items()})
        return rows

    def _write_evaluations(self, test: Optional[dict] = None) -> None:
        if self.accelerator.is_main_process:
            write_evaluations(
                self.run_dir / "evaluation.json",
                {"validation": self.evaluations, "best": self.best, **({"test": test} if test else {})},
            )

    def _write_record(self) -> None:
        """What the run was made of: splits and the reward head's accuracy; and the head itself."""
        record = {"task": self.task.describe()}
        if self.reward.differentiable and self.config.reward.model is None:
            keep_head(self.config, self.task, self.run_dir)
            record["reward_head"] = head_report(with_kept_head(self.config, self.run_dir), self.task)
        (self.run_dir / "run.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            state = {
                "step": self.step, "optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict(),
                "best": self.best, "evaluations": self.evaluations, "method": self.method.state_dict(),
            }
            save_checkpoint(self.run_dir / "checkpoints" / "last", self.policy, state)

    def _restore(self) -> None:
        folder = latest(self.run_dir / "checkpoints" / "last")
        state = load_state(folder)
        load_adapter(folder, self.policy)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if "method" not in state:
            raise GradeError(
                f"train.resume: {folder} was written by an earlier version, without the method's own state. Start "
                "again with --train.overwrite true."
            )
        self.method.load_state_dict(state["method"])
        self.step, self.best, self.evaluations = state["step"], state["best"], state["evaluations"]
        if self.source is not None and not self.source.is_pipe:
            self.source.skip(self.step * self.responses_per_step)

    # -- processes -------------------------------------------------------------------------------------------

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over processes, on CPU."""
        if self.accelerator.num_processes == 1:
            return values
        return self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum").cpu()


def train(config: Config) -> Dict[str, Evaluation]:
    """`grade train`: run a config and print what came out."""
    accelerator = make_accelerator(config)
    with accelerator.main_process_first():
        run_dir = prepare_run_dir(config)
    trainer = Trainer(config, accelerator, run_dir)
    rows = trainer.fit()
    if accelerator.is_main_process:
        console = Console()
        if rows:
            title = f"test, {rows['best'].prompts} prompts, best checkpoint by validation"
            console.print(evaluation_table(list(rows.values()), title))
        console.print(f"Run directory: {run_dir}", soft_wrap=True)
    return rows
