"""Load what a config names: tokenizer, base model with its adapter, reward. Mistakes end in words, early."""

from __future__ import annotations

import warnings
from typing import Dict, List

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from grade.config import Config, GradeError
from grade.machine import free_bytes
from grade.model import Policy
from grade.pretrained import Pretrained, context_of
from grade.probe_classifier import probe_classifier
from grade.reward import SharedReward, check_classifier, load_classifier
from grade.reward_training import judged_length
from grade.task_config import JUDGED_BY_PROGRAM


def model_path(config: Config) -> str:
    """model.name, or for `built-in:NAME` the folder of that model, trained now if it is not in the cache.

    Raises:
        GradeError: there is no such built-in model.
    """
    kind, _, name = config.model.name.partition(":")
    if kind != "built-in":
        return config.model.name
    from grade.countdown_model import countdown_model
    from grade.demo_model import demo_model

    models = {"countdown": countdown_model, "demo": demo_model}
    if name not in models:
        raise GradeError(f"model.name={config.model.name}: the built-in models are {', '.join(sorted(models))}.")
    return str(models[name]())


def policy_source(config: Config) -> Pretrained:
    """Where model.name's files are.

    Raises:
        GradeError: model.name is a path without a model.
    """
    model = config.model
    return Pretrained(
        "model.name", model.name, path=model_path(config), revision=model.revision,
        trust_remote_code=model.trust_remote_code,
    )


def load_tokenizer(config: Config):
    """The policy's tokenizer, padding on the left.

    Raises:
        GradeError: model.name cannot be found, or reward.model has another vocabulary.
    """
    source = policy_source(config)
    source.check_weights()  # a mistake that shows at once is told at once
    tokenizer = source.tokenizer()
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if config.reward.model is not None:  # before any weights are read: the policy may be large
        check_classifier(
            config.reward.model, tokenizer, judged=judged_length(config), positive_label=config.reward.positive_label
        )
    return tokenizer


def load_policy(config: Config, tokenizer, device: torch.device) -> Policy:
    """The base model, frozen, with a fresh adapter initialised from config.seed.

    Raises:
        GradeError: the model cannot be found or used, its context is too short, it has no such target modules, or
            generation.top_k exceeds its vocabulary.
    """
    source = policy_source(config)
    _check_fits(config, source.config())
    transformers_logging.disable_progress_bar()  # one line per file of weights says less than it costs to read
    base, found = source.model(
        AutoModelForCausalLM, dtype=getattr(torch, config.model.dtype),
        attn_implementation=config.model.attn_implementation, output_loading_info=True,
    )
    if found["missing_keys"]:
        raise GradeError(
            f"model.name={config.model.name}: its files lack {len(found['missing_keys'])} of the model's tensors (such "
            f"as {min(found['missing_keys'])}), which transformers fills with random numbers. Name a complete model."
        )
    largest = max(tokenizer.get_vocab().values())
    if largest >= base.get_input_embeddings().weight.shape[0]:
        raise GradeError(
            f"model.name={config.model.name}: its tokenizer knows id {largest}, its embedding has only "
            f"{base.get_input_embeddings().weight.shape[0]} rows. Resize it with model.resize_token_embeddings."
        )
    return Policy(add_adapter(base.to(device), config), tokenizer, length=_longest(config))


def add_adapter(base, config: Config):
    """The frozen base with a LoRA adapter; the same seed gives the same adapter whatever ran before."""
    lora = config.model.lora
    linear = {name.rsplit(".", 1)[-1] for name, m in base.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D))}
    missing = [name for name in lora.target_modules if not any(m == name for m in linear)]
    if missing:
        raise GradeError(
            f"model.lora.target_modules: {config.model.name} has no linear layer called {', '.join(missing)}. "
            f"It has {', '.join(sorted(linear))}."
        )
    layers = [
        m for name, m in base.named_modules()
        if name.rsplit(".", 1)[-1] in lora.target_modules and isinstance(m, (torch.nn.Linear, Conv1D))
    ]
    needed = 16 * lora.r * sum(sum(m.weight.shape) for m in layers)  # float32: weights, gradients and two moments
    free = free_bytes(base.device)
    if free is not None and needed > free:
        raise GradeError(
            f"model.lora.r is {lora.r}: its adapter would take {needed / 2**30:.1f} GiB to train, and "
            f"{free / 2**30:.1f} GiB are free. Lower it, or name fewer model.lora.target_modules."
        )
    settings = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.target_modules),
        task_type="CAUSAL_LM", fan_in_fan_out=any(isinstance(m, Conv1D) for m in base.modules()),
    )
    base.requires_grad_(False)
    with torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        with warnings.catch_warnings():
            # peft asks a property that transformers has renamed; users can do nothing about it.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            return get_peft_model(base, settings)


def load_prompts(config: Config, task, tokenizer) -> Dict[str, List[List[int]]]:
    """Token ids of the prompts of training ("policy"), "validation" and "test", the last two as many as are evaluated.

    Raises:
        GradeError: the task cannot make prompts with these settings, or a split has none.
    """
    evaluation = config.evaluation
    limits = {"policy": None, "validation": evaluation.validation_prompts, "test": evaluation.test_prompts}
    prompts = {split: task.prompts(split, tokenizer, limit=limit) for split, limit in limits.items()}
    empty = [split for split in limits if not prompts[split] and limits[split] != 0]
    if empty:
        raise GradeError(
            f"nothing in the {empty[0]} split gives a prompt: check the data of task.dataset and task.prompt_max_chars."
        )
    return prompts


def load_reward(config: Config, policy: Policy, task):
    """The reward a config asks for: the task's own program, a classifier, or the trained head (trained now if there is
    none yet)."""
    from grade.reward_training import load_or_train_head

    if hasattr(task, "make_reward"):
        return task.make_reward(policy)
    if config.reward.model is not None:
        reward = load_classifier(
            config.reward.model, policy, positive_label=config.reward.positive_label, reads=config.reward.input,
            judged=judged_length(config),
        )
        probe_classifier(reward, config.reward.model, judged_length(config))
        return reward
    return SharedReward(policy, load_or_train_head(config, policy, task), config.reward.input)


def _trains_head(config: Config) -> bool:
    return config.reward.model is None and config.task.name not in JUDGED_BY_PROGRAM


def _longest(config: Config) -> int:
    """Positions of the longest sequence that the policy or its base will see."""
    whole = config.task.prompt_max_tokens + config.generation.max_new_tokens
    return max(whole, config.reward.max_tokens) if _trains_head(config) else whole


def _check_fits(config: Config, settings) -> None:
    text = settings.get_text_config()
    context = context_of(settings)
    prompt, response = config.task.prompt_max_tokens, config.generation.max_new_tokens
    if context is not None and prompt + response > context:
        raise GradeError(
            f"task.prompt_max_tokens ({prompt}) + generation.max_new_tokens ({response}) is {prompt + response}, but "
            f"the context of {config.model.name} is {context} tokens. Lower one of them."
        )
    if _trains_head(config) and context is not None and config.reward.max_tokens > context:
        raise GradeError(
            f"reward.max_tokens ({config.reward.max_tokens}) exceeds the context of {config.model.name}, {context} "
            "tokens. Lower it."
        )
    if config.generation.top_k > text.vocab_size:
        raise GradeError(
            f"generation.top_k ({config.generation.top_k}) exceeds the vocabulary of {config.model.name}, "
            f"{text.vocab_size} tokens. Lower it."
        )
