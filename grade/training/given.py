"""What a run needs, made of objects that a program hands over instead of names in settings.

Objects have no file by which they could be known again. So a model is known by its weights, prompts by their hash, a
reward by `Reward.identity` and by the source of its class or function.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from peft import LoraConfig, PeftModel
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from grade.config import Config, LoraSettings
from grade.errors import GradeError
from grade.hub_names import GIVEN
from grade.model.adapter import add_reference, more_than_lora
from grade.model.adapter_base import check_base_name
from grade.model.fingerprint import remember_inputs
from grade.model.loading import (
    add_adapter,
    check_fits,
    check_vocabulary,
    load_policy,
    load_tokenizer,
    padding_left,
    policy_source,
)
from grade.model.policy import Policy
from grade.model.pretrained import context_of
from grade.model.tensors import tensors_digest
from grade.processes import everywhere
from grade.rewards.base import Reward
from grade.rewards.function import FunctionReward
from grade.rewards.reward_model import RewardModel
from grade.rewards.weighted import Term, WeightedReward
from grade.tasks.given import GivenTask, Prompts, read_prompts
from grade.training.setup import SetUp

_DTYPES: dict[torch.dtype, Literal["float32", "bfloat16"]] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

_ARGUMENTS = {"policy": "prompts", "validation": "eval_prompts", "test": "test_prompts"}
"""By split; prompts are looked at first, of which the validation's may be the same."""
_REWARDS = (
    "give a function of prompts and completions, a grade.DifferentiableReward or grade.RewardFunction, or a list of "
    "these"
)
_OF_A_NAME = (
    ("finetuning", "lora", "train its adapter"),
    ("adapter", None, "give PeftModel.from_pretrained(model, folder)"),
    ("quantization", None, "load the model with its quantization_config"),
    ("fsdp", False, "give its name: sharded weights are never whole here"),
)
"""Settings of a model that is loaded by its name, their defaults, and what does the same for an object."""


def given_set_up(
    config: Config,
    accelerator: Accelerator,
    model: Any,
    reward: Any,
    prompts: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    eval_prompts: Any,
    test_prompts: Any,
) -> tuple[Config, SetUp]:
    """The settings with what the objects decide, and what a run needs; quick mistakes first.

    Raises:
        GradeError: one of them cannot be used, with the argument's name.
    """
    _check_kinds(model, reward)
    tokenizer = _tokenizer_of(config, model, tokenizer)
    splits = {"policy": read_prompts(prompts, tokenizer, chat=config.tokenizer)}
    # Without others, what is trained on is validated on too: the best checkpoint is then the best on these.
    splits["validation"] = splits["policy"]
    if eval_prompts is not None:
        splits["validation"] = read_prompts(eval_prompts, tokenizer, "eval_prompts", config.tokenizer)
    if test_prompts is not None:
        splits["test"] = read_prompts(test_prompts, tokenizer, "test_prompts", config.tokenizer)
    task = GivenTask(splits)
    tested = config.evaluation.test_prompts if test_prompts is not None else 0
    config = replace(
        config,
        task=replace(config.task, dataset=f"{GIVEN}prompts", prompt_max_tokens=task.longest),
        evaluation=replace(config.evaluation, test_prompts=tested),
    )
    if isinstance(model, (str, Path)):
        config = replace(config, model=replace(config.model, name=str(model)))
        check_prompts_fit(config, policy_source(config.model).config(), splits)
    config, policy = _policy_of(config, accelerator, model, tokenizer, splits)
    return config, SetUp(tokenizer, task, policy, as_reward(reward, policy, task))


def _check_kinds(model: Any, reward: Any) -> None:
    """Refuse what is no model, or no reward, before anything is loaded.

    Raises:
        GradeError: with the argument's name.
    """
    if not isinstance(model, (str, Path, PeftModel, PreTrainedModel)):
        raise GradeError(
            f"model is {_shown(model)}: give a hub name, a folder, a model of transformers or one of peft."
        )
    if not (callable(reward) or isinstance(reward, (Reward, RewardModel, list, tuple))):
        raise GradeError(f"reward is {reward!r}: {_REWARDS}.")


def _shown(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def check_prompts_fit(config: Config, model: PretrainedConfig, splits: Mapping[str, Prompts]) -> None:
    """Refuse a prompt that does not fit the model's context with its response.

    Args:
        splits: of the run, by the names of the task.

    Raises:
        GradeError: with the argument, the prompt's number and its length.
    """
    context, response = context_of(model), config.generation.max_new_tokens
    for split, argument in _ARGUMENTS.items():
        if split in splits:
            check_length(argument, splits[split].ids, context, response, "config.generation.max_new_tokens")


def check_length(argument: str, prompts: Sequence[list[int]], context: int | None, response: int, setting: str) -> None:
    """Refuse a prompt that does not fit a context with its response.

    Args:
        argument: what the prompts were given as, for the message.
        context: tokens; None: there is no limit.
        response: tokens of the longest, by `setting`.

    Raises:
        GradeError: with the argument, the prompt's number and its length.
    """
    lengths = list(map(len, prompts))
    longest = max(lengths)
    if context is not None and longest + response > context:
        raise GradeError(
            f"{argument}[{lengths.index(longest)}] has {longest} tokens, and with the response ({setting}, {response}) "
            f"that is {longest + response}, but the context of the model is {context} tokens. Shorten it or leave it "
            f"out, or lower {setting}."
        )


def _tokenizer_of(config: Config, model: Any, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """The one that was given, or the model's own."""
    if tokenizer is None and isinstance(model, (str, Path)):
        return load_tokenizer(replace(config.model, name=str(model)))
    if tokenizer is None:
        name = getattr(model, "name_or_path", "") or getattr(getattr(model, "config", None), "name_or_path", "")
        if not name:
            raise GradeError("tokenizer: this model has no name by which to find its tokenizer. Give it as tokenizer=.")
        return load_tokenizer(replace(config.model, name=name))
    if not hasattr(tokenizer, "get_vocab"):
        raise GradeError(f"tokenizer is a {type(tokenizer).__name__}: give a tokenizer of transformers.")
    return padding_left(tokenizer)


def _policy_of(
    config: Config,
    accelerator: Accelerator,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    splits: Mapping[str, Prompts],
) -> tuple[Config, Policy]:
    """The policy, and the settings that tell what it is."""
    if isinstance(model, (str, Path)):
        # No head is trained here: what a text may be long is no matter.
        reward = replace(config.reward, model=config.reward.model or f"{GIVEN}reward")
        return config, load_policy(replace(config, reward=reward), tokenizer, accelerator.device, accelerator)
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel):
        raise GradeError(f"model is a peft model around {_shown(inner)}: give one around a model of transformers.")
    for field, default, instead in _OF_A_NAME:
        value = getattr(config.model, field)
        if value != default:
            raise GradeError(
                f"model.{field} is {value}, but the model was given as an object, to which that setting does nothing. "
                f"Leave it out, and {instead}; or give the model's name or folder."
            )
    dtype = _DTYPES.get(inner.dtype)
    if dtype is None:
        raise GradeError(f"model is in {inner.dtype}: load it in float32 or bfloat16. Small gradients would vanish.")
    name = inner.name_or_path or f"{GIVEN}{type(inner).__name__}"
    settings = replace(config.model, name=name, dtype=dtype)
    check_prompts_fit(config, inner.config, splits)
    check_fits(name, inner.config, config.task, config.generation, None)
    check_vocabulary(name, tokenizer, inner)
    model.to(accelerator.device)
    if isinstance(model, PeftModel):
        _synchronise(model, accelerator)
    digest = _digest_of(model)
    if isinstance(model, PeftModel):
        settings = replace(settings, lora=_own_adapter(model))
        adapted = model
        if settings.reference == "initial":
            add_reference(adapted)
    else:
        adapted = add_adapter(model, settings, config.seed)
    length = config.task.prompt_max_tokens + config.generation.max_new_tokens
    policy = Policy(adapted, tokenizer, length=length)
    remember_inputs(policy, digest)
    return replace(config, model=settings), policy


def _digest_of(model: PreTrainedModel | PeftModel) -> str:
    """SHA-256 of a model's weights and of what its configuration says."""
    config = {name: value for name, value in model.config.to_dict().items() if not name.startswith("_")}
    text = json.dumps([tensors_digest(model.state_dict()), config], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _synchronise(model: PeftModel, accelerator: Accelerator) -> None:
    """Give every process the main one's adapter: each has made its own, from random numbers as a rule.

    Raises:
        GradeError: in every process, the adapters have not the same tensors.
    """
    trained = {name: p.data for name, p in model.named_parameters() if ".lora_" in name}
    shapes = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in trained.items()]
    if any(other != shapes for other in everywhere(accelerator, shapes)):
        raise GradeError("model: its adapter is another one in every process. Make it with the same LoraConfig in all.")
    for tensor in trained.values():
        tensor.copy_(broadcast(tensor.contiguous()))


def _own_adapter(model: PeftModel) -> LoraSettings:
    """Make a peft model's own adapter the trainable part, and nothing else; its settings.

    Raises:
        GradeError: it is no single LoRA adapter of linear layers.
    """
    settings = model.peft_config.get("default")
    if list(model.peft_config) != ["default"] or not isinstance(settings, LoraConfig):
        kinds = ", ".join(f"{name} ({type(value).__name__})" for name, value in model.peft_config.items())
        raise GradeError(
            f"model has the adapters {kinds}: one LoRA adapter called default is trained. Load it by itself with "
            "PeftModel.from_pretrained(base, folder)."
        )
    more = more_than_lora(settings)
    if more:
        raise GradeError(
            f"model: its adapter is more than a LoRA adapter of linear layers ({', '.join(more)}), which cannot be "
            "switched off beside a frozen base. Merge it (merge_and_unload), and give the merged model."
        )
    check_base_name(
        settings.base_model_name_or_path,
        model.get_base_model().name_or_path,
        "model: its adapter",
        "Give PeftModel.from_pretrained(base, folder) with the base that it was trained on.",
    )
    targets = set()
    for name, parameter in model.named_parameters():
        trained = ".lora_" in name
        parameter.requires_grad_(trained)
        if trained:
            parameter.data = parameter.data.float()
            targets.add(name.split(".lora_")[0].rpartition(".")[2])
    return LoraSettings(
        r=settings.r, alpha=settings.lora_alpha, dropout=settings.lora_dropout, target_modules=sorted(targets)
    )


def as_reward(reward: Any, policy: Policy, task: GivenTask) -> Reward:
    """A reward of what a program calls one.

    Args:
        reward: a `Reward`; a `RewardModel`; a plain function `f(prompts, completions, **columns)`; a factory, which is
            a class of rewards or a function of the one parameter `policy` that returns one; or a list of these, each by
            itself, as (reward, weight), or as a `Term`.

    Raises:
        GradeError: it is something else, or does not fit the policy.
    """
    if not isinstance(reward, (list, tuple)):
        return _one(reward, policy, task)
    terms: list[Term] = []
    for entry in reward:
        if not isinstance(entry, Term):
            given, weight = entry if isinstance(entry, (list, tuple)) and len(entry) == 2 else (entry, 1.0)
            if isinstance(weight, bool) or not isinstance(weight, (int, float)):
                raise GradeError(f"reward: {entry!r} is no pair of a reward and a weight.")
            entry = Term(given, "", float(weight))
        made = _one(entry.reward, policy, task)
        name = entry.name or (made.name if isinstance(made, FunctionReward) else type(made).__name__)
        same = sum(term.name == name or term.name.startswith(f"{name}-") for term in terms)
        terms.append(replace(entry, reward=made, name=f"{name}-{same + 1}" if same and not entry.name else name))
    return WeightedReward(terms)


def _one(reward: Any, policy: Policy, task: GivenTask) -> Reward:
    """A reward that is no list."""
    made = _made(reward, policy)
    if callable(made) and not isinstance(made, (Reward, type)):
        return FunctionReward(made, policy.tokenizer, task)
    if not isinstance(made, Reward):
        raise GradeError(f"reward is {reward!r}: {_REWARDS}.")
    for table in made.tables:
        if table.rows.shape[0] < policy.vocab_size:
            raise GradeError(
                f"reward: {type(made).__name__} has a table of {table.rows.shape[0]} rows, and the policy "
                f"{policy.vocab_size} ids: both must have the same vocabulary. Score the text with a RewardFunction "
                "instead."
            )
    if any(parameter.requires_grad for module in made.modules for parameter in module.parameters()):
        raise GradeError(
            f"reward: the weights of {type(made).__name__} are not frozen. Call requires_grad_(False) on its modules."
        )
    return made


def _made(reward: Any, policy: Policy) -> Any:
    """What a factory makes, or the head that data trains; anything else as it is."""
    if isinstance(reward, RewardModel):
        return reward.fit(policy)
    is_class = inspect.isclass(reward) and issubclass(reward, Reward)
    if not (is_class or inspect.isroutine(reward)):
        return reward
    needed = [name for name, p in inspect.signature(reward).parameters.items() if p.default is p.empty]
    if needed != ["policy"] and (needed or not is_class):
        return reward
    try:
        return reward(policy) if needed else reward()
    except SystemExit as error:
        raise GradeError(f"reward: {reward.__qualname__} ended the program (SystemExit: {error}). Mend it.") from error
