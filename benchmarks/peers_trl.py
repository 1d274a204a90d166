"""A run of TRL's GRPO or RLOO trainer on what a run of ours reads: the same model, prompts, adapter and reward.

TRL trains a model of its own. Its first adapter is a copy of the policy's, and what it has learned is copied into the
policy for every evaluation, which is ours. The reward reads the policy's frozen base, as it does in our runs; there one
pass serves reward and reference, here the trainer does not know that they are of the same model.

What of TRL's settings is not its default, and why:

    gradient_checkpointing  off: it makes a step slower, and memory is no limit here
    bf16                    off: the policy's own dtype, as in our runs
    top_k, min_new_tokens   those of the config
    beta                    kl_coef / max_new_tokens, without scaled rewards the weight of the same objective: TRL's KL
                            is a sum over the response (RLOO), or each token's beside its log-probability (GRPO), and
                            kl_coef is that of the mean over tokens
    shuffle_dataset         off: the prompts come in the order of our runs
    logging, saving         none

`mask_truncated_completions` stays off: a response of the length limit is the rule here, not the exception.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback

from grade.config import Config
from grade.model.loading import policy_source
from grade.model.passes import base_pass, fed_embeddings
from grade.model.policy import Policy
from grade.rewards.base import Reward
from grade.rollout import Rollout, pad_prompts
from grade.training.responses import prompt_numbers

TRAINERS = {"trl-grpo": ("GRPOTrainer", "GRPOConfig"), "trl-rloo": ("RLOOTrainer", "RLOOConfig")}
"""The names of TRL's classes of trainer and settings, by the name of the method here."""

OLDEST = "1.16"
"""The first version whose settings are those that are given here."""


def check_trl() -> None:
    """Refuse to begin without TRL.

    Raises:
        SystemExit: it is not installed, or older than what was measured; with the fix.
    """
    if importlib.util.find_spec("trl") is None:
        sys.exit("trl is not installed, and its trainers are what is measured. Run pip install -e '.[peers]'.")
    found = version("trl")
    if Version(found) < Version(OLDEST):
        sys.exit(f"trl {found} is installed, and {OLDEST} or later is needed. Run pip install -e '.[peers]'.")


def trl_classes(method: str) -> tuple[Any, Any]:
    """TRL's class of trainer and its class of settings."""
    trl = importlib.import_module("trl")
    trainer, settings = TRAINERS[method]
    return getattr(trl, trainer), getattr(trl, settings)


def of_tokens(trainer_class: Any, prompts: Sequence[list[int]]) -> Any:
    """The class of trainer with the token ids of prompts in place of their texts, which might be read as others.

    Args:
        prompts: token ids, by the number that stands as the text of a prompt.
    """

    def tokenize(self: Any, numbers: list[str]) -> tuple[list[list[int]], None, dict]:
        return [prompts[int(number)] for number in numbers], None, {}

    return type("OfTokens", (trainer_class,), {"_tokenize_prompts": tokenize})


def train_by_trl(
    method: str,
    config: Config,
    policy: Policy,
    reward: Reward,
    prompts: Sequence[list[int]],
    folder: Path,
    options: Mapping[str, Any],
    *,
    begin: Callable[[], None],
    step: Callable[[int, Callable[[], None]], None],
) -> None:
    """Train a model of TRL's own.

    Args:
        method: of `TRAINERS`.
        config: its seed, generation, method.kl_coef and train are used.
        policy: has the first adapter, and gets what is learned when `step` asks for it.
        prompts: token ids of the training split.
        options: of TRL's settings, beside those that follow from `config`.
        begin: called before the first step.
        step: called after every batch of responses that was learned from, with its tokens and a function that copies
            what was learned into the policy.
    """
    trainer_class, settings_class = trl_classes(method)
    responses = config.train.batch_size * config.train.accumulation_steps
    asked = responses // config.generation.samples_per_prompt
    numbers = [n for at in range(config.train.steps) for n in prompt_numbers(at, asked, len(prompts), config.seed)]
    datasets = importlib.import_module("datasets")
    source = policy_source(config.model)
    judged = Judged(policy, reward, prompts)
    settings = settings_class(**{**settings_of(config, policy, folder), **options})
    settings.max_steps = config.train.steps * settings.num_iterations

    class Heard(TrainerCallback):
        """Tells of every batch of responses, which several optimizer steps may learn from."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            begin()

        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if state.global_step % settings.num_iterations == 0:
                step(judged.take_tokens(), lambda: copy_adapter(trainer.model, policy.model))

    model = source.model(AutoModelForCausalLM, dtype=getattr(torch, config.model.dtype))
    lora = config.model.lora
    trainer = of_tokens(trainer_class, prompts)(
        model,
        reward_funcs=judged.rewards,
        args=settings,
        train_dataset=datasets.Dataset.from_dict({"prompt": [str(number) for number in numbers]}),
        processing_class=policy.tokenizer,
        callbacks=[Heard()],
        peft_config=LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=list(lora.target_modules),
            task_type="CAUSAL_LM",
        ),
    )
    copy_adapter(policy.model, trainer.model)
    trainer.train()


def settings_of(config: Config, policy: Policy, folder: Path) -> dict[str, Any]:
    """TRL's settings that say what `config` says, and those that only cost time switched off."""
    train, generation = config.train, config.generation
    return {
        "output_dir": str(folder),
        "seed": config.seed,
        "per_device_train_batch_size": train.batch_size * train.accumulation_steps,
        "gradient_accumulation_steps": 1,
        "num_generations": generation.samples_per_prompt,
        "max_completion_length": generation.max_new_tokens,
        "temperature": 1.0,
        "top_k": generation.top_k,
        "generation_kwargs": generation_options(config, policy),
        "beta": config.method.kl_coef / generation.max_new_tokens,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.schedule,
        "warmup_steps": train.warmup_steps,
        "weight_decay": train.weight_decay,
        "adam_beta1": train.adam_beta1,
        "adam_beta2": train.adam_beta2,
        "adam_epsilon": train.adam_epsilon,
        "max_grad_norm": train.max_grad_norm,
        "use_cpu": policy.device.type == "cpu",
        "bf16": False,
        "gradient_checkpointing": False,
        "shuffle_dataset": False,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def generation_options(config: Config, policy: Policy) -> dict[str, Any]:
    """What transformers' `generate` is told beside TRL's own settings: which tokens cannot be drawn, and when."""
    # Ours counts the end-of-sequence token among the tokens that must be there, transformers does not.
    options: dict[str, Any] = {"min_new_tokens": max(config.generation.min_new_tokens - 1, 0)}
    if len(policy.suppressed):
        options["suppress_tokens"] = policy.suppressed.tolist()
    return options


def copy_adapter(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Write the trainable tensors of one model into those of the same names of another.

    Raises:
        ValueError: they do not have the same.
    """
    given = {name: p for name, p in source.named_parameters() if p.requires_grad}
    taken = {name: p for name, p in target.named_parameters() if p.requires_grad}
    if given.keys() != taken.keys():
        raise ValueError(f"the adapters differ: {sorted(given.keys() ^ taken.keys())[:2]} are in one of them only")
    with torch.no_grad():
        for name, parameter in taken.items():
            parameter.copy_(given[name])


class Judged:
    """The reward as a function for TRL, and a count of the tokens that it has read.

    Args:
        prompts: token ids, by the number that stands in the data's column of prompts.
    """

    def __init__(self, policy: Policy, reward: Reward, prompts: Sequence[list[int]]):
        self.policy, self.reward, self.prompts = policy, reward, prompts
        self._tokens = 0

    def take_tokens(self) -> int:
        """Tokens of the responses since the last call."""
        tokens, self._tokens = self._tokens, 0
        return tokens

    @torch.no_grad()
    def rewards(self, prompts: list[str], completion_ids: list[list[int]], **others: Any) -> list[float]:
        """The reward of each response, from the base's states of its prompt and of its tokens."""
        self._tokens += sum(map(len, completion_ids))
        rollout = rollout_of([self.prompts[int(number)] for number in prompts], completion_ids, self.policy)
        base = base_pass(
            self.policy, rollout, fed_embeddings(rollout, self.policy.embedding, self.policy.embedding_scale)
        )
        return self.reward.value(rollout, base, self.reward.inputs(rollout)).tolist()


def rollout_of(prompts: Sequence[list[int]], responses: Sequence[list[int]], policy: Policy) -> Rollout:
    """Responses from elsewhere as a rollout that a reward reads; it has no candidates."""
    device, width = policy.device, max(map(len, responses))
    ids, mask = pad_prompts(prompts, policy.pad_id, device)
    tokens = torch.full((len(responses), width), policy.pad_id, dtype=torch.int64)
    real = torch.zeros(len(responses), width, dtype=torch.bool)
    for row, response in enumerate(responses):
        tokens[row, : len(response)] = torch.tensor(response, dtype=torch.int64)
        real[row, : len(response)] = True
    tokens, real = tokens.to(device), real.to(device)
    return Rollout(
        ids,
        mask,
        tokens,
        real,
        indices=tokens[:, :, None],
        token_weight=real.float(),
        rows=torch.zeros_like(tokens),
        padded=not bool(mask.all()),
    )
