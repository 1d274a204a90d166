"""The training run: sample, replay, update, validate, keep the best, test once.

    prepare -> [ rollout -> accumulate over micro-batches -> clip -> AdamW ] x steps -> test the best checkpoint

Randomness has no state that a resumed run would have to restore: prompts follow from (seed, step), noise rows from
(step, response, position). So a resumed run repeats the uninterrupted one, and splitting a batch over micro-batches
or processes changes nothing.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Dict, Iterator, List, Optional

import torch
from accelerate import Accelerator
from rich.console import Console
from transformers import get_scheduler

from grade.checkpoint import check_writable, latest, load_adapter, load_state, save_checkpoint
from grade.config import Config, GradeError
from grade.config_io import config_from_yaml, config_to_yaml
from grade.evaluate import Evaluation, evaluate, text_of, write_evaluations
from grade.interrupt import stop_between_steps
from grade.loading import load_policy, load_reward, load_tokenizer
from grade.methods.grade import Grade
from grade.metrics import SUMS, Phases, RunLog, peak_memory_gib, step_metrics, step_sums
from grade.progress import training_progress
from grade.report import evaluation_table
from grade.reward_training import head_report, keep_head, with_kept_head
from grade.rollout import Rollout, pad_prompts, sample
from grade.tasks import load_task

_MAY_CHANGE_ON_RESUME = {
    "train.resume", "train.overwrite", "train.run_dir", "output_dir", "name", "train.steps", "train.save_every",
    "train.tensorboard", "train.wandb", "train.wandb_project", "train.samples_logged", "train.samples_every",
    "evaluation.samples", "evaluation.batch_size", "generation.batch_size", "method.head_chunk_mib",
}


def flatten(settings: dict, prefix: str = "") -> Dict[str, object]:
    """{"train": {"steps": 1}} -> {"train.steps": 1}."""
    flat: Dict[str, object] = {}
    for name, value in settings.items():
        flat.update(flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat


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


def prepare_run_dir(config: Config) -> Path:
    """The run's folder: free, or holding a run to resume or to overwrite (which `fit` deletes, once all is loaded).

    Raises:
        GradeError: it holds another run's files, or nothing to resume, or cannot be written.
    """
    run_dir = Path(config.run_dir)
    if config.train.resume:
        done = load_state(run_dir / "checkpoints" / "last")["step"]
        _check_same_run(config, run_dir)
        evaluation = run_dir / "evaluation.json"
        tested = evaluation.is_file() and "test" in json.loads(evaluation.read_text(encoding="utf-8"))
        if done > config.train.steps or (done == config.train.steps and tested):
            raise GradeError(
                f"train.resume: {run_dir} has had {done} steps, train.steps is {config.train.steps}: there is nothing "
                "left to do. Raise train.steps to go on, or look at it with `grade evaluate`."
            )
    elif run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        if not config.train.overwrite:
            raise GradeError(
                f"train.run_dir: {run_dir} already holds a run. Continue it with --train.resume true, replace it with "
                "--train.overwrite true, or name another folder with --train.run_dir or --name."
            )
        if not (run_dir / "config.yaml").is_file():
            raise GradeError(f"train.overwrite: {run_dir} does not look like a run (no config.yaml): not deleted.")
    check_writable("train.run_dir", run_dir)
    return run_dir


def _check_same_run(config: Config, run_dir: Path) -> None:
    """Refuse to continue a run under other settings than it was started with."""
    before, now = (flatten(asdict(c)) for c in (config_from_yaml(run_dir / "config.yaml"), config))
    differing = [name for name in now if before[name] != now[name] and name not in _MAY_CHANGE_ON_RESUME]
    if differing:
        changes = ", ".join(f"{name} ({before[name]} then, {now[name]} now)" for name in differing)
        raise GradeError(
            f"train.resume: {run_dir} was started with other settings: {changes}. Put them back, or start another run "
            "with --train.run_dir."
        )


class Trainer:
    """One run. `fit` trains it; everything it writes is under `run_dir`."""

    def __init__(self, config: Config, accelerator: Accelerator, run_dir: Path):
        self.config, self.accelerator, self.run_dir = config, accelerator, run_dir
        self.phases = Phases(accelerator.device)
        tokenizer = load_tokenizer(config)
        self.task = load_task(config)
        self.policy = load_policy(config, tokenizer, accelerator.device)
        head_config = with_kept_head(config, run_dir) if config.train.resume else config
        with accelerator.main_process_first():
            self.reward = load_reward(head_config, self.policy, self.task)
        self.method = Grade(
            self.policy, self.reward, config, any_process=self._any_process, phase=self.phases
        )
        self.prompts = self.task.prompts("policy", tokenizer)
        if not self.prompts:
            raise GradeError("task.policy_examples: no review gives a prompt; check the data and prompt_max_chars.")
        self.evaluation_prompts = {
            "validation": self.task.prompts("validation", tokenizer, limit=config.evaluation.validation_prompts),
            "test": self.task.prompts("test", tokenizer, limit=config.evaluation.test_prompts),
        }
        train = config.train
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(), lr=train.learning_rate, betas=(train.adam_beta1, train.adam_beta2),
            eps=train.adam_epsilon, weight_decay=train.weight_decay,
        )
        name = "constant_with_warmup" if train.schedule == "constant" else train.schedule
        self.scheduler = get_scheduler(name, self.optimizer, train.warmup_steps, train.steps)
        self.responses_per_step = train.batch_size * train.accumulation_steps * accelerator.num_processes
        self.step = 0
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
        for start in range(first, first + share, together):
            stop = min(start + together, first + share)
            ids, mask = pad_prompts(
                [self.prompts[n] for n in numbers[start:stop]], self.policy.pad_id, self.policy.device
            )
            responses = step * self.responses_per_step + torch.arange(
                start * copies, stop * copies, device=self.policy.device
            )
            yield sample(
                self.policy, ids, mask, self.method.sampling(step), seed=self.config.seed,
                first_rows=responses * generation.max_new_tokens, samples_per_prompt=copies,
            )

    def train_step(self) -> Dict[str, float]:
        """One optimizer step; its metrics."""
        config, step = self.config, self.step
        with self.phases("rollout"):
            rollouts = list(self.rollouts(step))
        # The KL's token mean divides by all real tokens of the step, so they are counted before the first pull-back.
        tokens = int(self._sum(torch.tensor(float(sum(int(r.mask.sum()) for r in rollouts)))))
        sums = torch.zeros(len(SUMS), dtype=torch.float64)
        for rollout in rollouts:
            for micro_batch in rollout.micro_batches(config.train.batch_size):
                result = self.method.accumulate(
                    micro_batch, step, total_tokens=tokens, total_responses=self.responses_per_step
                )
                sums += step_sums(micro_batch, result, self.policy.eos_ids)
        with self.phases("update"):
            grad_norm = self._update()
        metrics = step_metrics(self._sum(sums))
        seconds = self.phases.take()
        if self.accelerator.is_main_process and step % config.train.samples_every == 0:
            self.log.samples(step, self._samples(rollouts[0]))
        return {
            "loss": self.method.loss(metrics["reward"], metrics["kl"], metrics["kl_sequence"]), **metrics,
            "grad_norm": grad_norm, "learning_rate": self.learning_rate, "tau": self.method.tau(step),
            "tokens_per_second": tokens / sum(seconds.values()), "memory/peak_gib": peak_memory_gib(self.policy.device),
            **{f"seconds/{name}": value for name, value in seconds.items()},
        }

    def _update(self) -> float:
        """Sum gradients over processes, clip, step; the global norm before clipping.

        Raises:
            GradeError: the gradient is not finite; the last checkpoint is untouched.
        """
        parameters = self.policy.parameters()
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if self.accelerator.num_processes > 1:
                parameter.grad = self.accelerator.reduce(parameter.grad, reduction="sum")
        limit = self.config.train.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit if limit > 0 else math.inf).item()
        if not math.isfinite(norm):
            raise GradeError(
                f"the gradient's norm at step {self.step} is {norm}: the update was not made. Start "
                "another run with a lower train.learning_rate or a higher method.tau_end; the last checkpoint is kept."
            )
        self.learning_rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

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
        """Train to config.train.steps; returns the test evaluations {"base": ..., "best": ...}."""
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
                if self.step == 0 and not self.evaluations:
                    self._validate(progress, adapters=False)
                while self.step < train.steps:
                    metrics = self.train_step()
                    self.log.metrics(self.step, metrics)
                    progress.advance(metrics)
                    self.step += 1
                    if self.step % every == 0 or self.step == train.steps:
                        self._validate(progress)
                    stopping = self._any_process(stop.asked)
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
        if adapters and (self.best is None or row.reward > self.best["reward"]):
            self.best = {"step": self.step, "reward": row.reward}
            if self.accelerator.is_main_process:
                save_checkpoint(self.run_dir / "checkpoints" / "best", self.policy)
        self._write_evaluations()
        progress.say(
            f"step {row.step:>4}  validation of the {row.model}: reward {row.reward:.3f} ± {row.reward_stderr:.3f}  "
            f"KL {row.kl:.3f} nats/token  distinct tokens {row.unique_token_ratio:.2f}"
        )

    def _evaluate(self, split: str, progress, *, adapters: bool) -> Evaluation:
        prompts = self.evaluation_prompts[split]
        with progress.evaluation(split, len(prompts)) as tick:
            row = evaluate(
                self.policy, self.reward, prompts, self.config, split=split, step=self.step if adapters else 0,
                sampling=self.method.sampling(self.step), settings=self.method.settings(self.step),
                adapters=adapters, accelerator=self.accelerator, tick=tick,
            )
        self.phases.take()
        return row

    def _test(self, progress) -> Dict[str, Evaluation]:
        """The held-out test, once: base model and best checkpoint."""
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
        if self.config.reward.model is None:
            keep_head(self.config, self.task, self.run_dir)
            record["reward_head"] = head_report(with_kept_head(self.config, self.run_dir), self.task)
        (self.run_dir / "run.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            state = {
                "step": self.step, "optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict(),
                "best": self.best, "evaluations": self.evaluations,
            }
            save_checkpoint(self.run_dir / "checkpoints" / "last", self.policy, state)

    def _restore(self) -> None:
        folder = latest(self.run_dir / "checkpoints" / "last")
        state = load_state(folder)
        load_adapter(folder, self.policy)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step, self.best, self.evaluations = state["step"], state["best"], state["evaluations"]

    # -- processes -------------------------------------------------------------------------------------------

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over processes, on CPU."""
        if self.accelerator.num_processes == 1:
            return values
        return self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum").cpu()

    def _any_process(self, wanted: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return wanted
        return bool(self._sum(torch.tensor(float(wanted))) > 0)


def train(config: Config) -> Dict[str, Evaluation]:
    """`grade train`: run a config and print what came out."""
    accelerator = make_accelerator(config)
    with accelerator.main_process_first():
        run_dir = prepare_run_dir(config)
    trainer = Trainer(config, accelerator, run_dir)
    rows = trainer.fit()
    if accelerator.is_main_process:
        console = Console()
        title = f"test, {rows['best'].prompts} prompts, best checkpoint by validation"
        console.print(evaluation_table(list(rows.values()), title))
        console.print(f"Run directory: {run_dir}", soft_wrap=True)
    return rows
