"""Load what a config names: tokenizer, prompts, base model with its adapter. Mistakes end in words, early."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from grade.built_in.countdown_model import countdown_model
from grade.built_in.demo_model import demo_model
from grade.config import Config, EvaluationConfig, GenerationConfig, ModelConfig, TaskConfig, trains_head
from grade.errors import GradeError, reason_of
from grade.hub_names import GIVEN
from grade.machine import free_bytes
from grade.model.adapter import adapter_folder, add_reference, settings_of
from grade.model.adapter_base import check_base_name
from grade.model.checkpoint import put_adapter, recorded_base, started_digest
from grade.model.policy import Policy
from grade.model.pretrained import Pretrained, context_of
from grade.model.quantization import check_quantized, loading_options
from grade.model.sharding import ON_META, Sharding, load_sharded
from grade.tasks.base import Task


def model_path(name: str) -> str:
    """model.name, or for `built-in:NAME` the folder of that model, trained now if it is not in the cache.

    Raises:
        GradeError: there is no such built-in model.
    """
    kind, _, built_in = name.partition(":")
    if kind != "built-in":
        return name
    models = {"countdown": countdown_model, "demo": demo_model}
    if built_in not in models:
        raise GradeError(f"model.name={name}: the built-in models are {', '.join(sorted(models))}.")
    return str(models[built_in]())


def policy_source(model: ModelConfig) -> Pretrained:
    """Where model.name's files are.

    Raises:
        GradeError: model.name is a path without a model, or says that the model was an object of a program.
    """
    if model.name.startswith(GIVEN):
        raise GradeError(
            f"model.name is {model.name}: that was given as an object in Python, and no setting tells where it is. "
            "Go on in that program, or name the folder of a model that it saved."
        )
    return Pretrained(
        "model.name",
        model.name,
        path=model_path(model.name),
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
    )


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The policy's tokenizer, padding on the left.

    Raises:
        GradeError: model.name cannot be found.
    """
    source = policy_source(model)
    source.check_weights()  # a mistake that shows at once is told at once
    return padding_left(source.tokenizer())


def padding_left(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, set to pad on the left, with its end of sequence where it has no token to pad with."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(
    config: Config, tokenizer: PreTrainedTokenizerBase, device: torch.device, accelerator: Accelerator | None = None
) -> Policy:
    """The base model, frozen, with the adapter of model.adapter or a fresh one drawn from config.seed; it must fit
    what the sections task, generation and reward ask.

    Args:
        accelerator: of the processes that load it together, over which model.fsdp shards it; None: this one is alone.

    Raises:
        GradeError: the model cannot be found or used, its context is too short, it has no such target modules, or
            generation.top_k exceeds its vocabulary.
    """
    model, task, generation, reward = config.model, config.task, config.generation, config.reward
    adapter = None
    if model.adapter is not None:  # before weights are read
        folder = adapter_folder(model.adapter)
        adapter = folder, settings_of(model.adapter, folder, model.lora)
    source = policy_source(model)
    prompt_and_response = task.prompt_max_tokens + generation.max_new_tokens
    head = trains_head(task, reward)
    check_fits(model.name, source.config(), task, generation, reward.max_tokens if head else None)
    transformers_logging.disable_progress_bar()  # one line per file of weights says less than it costs to read

    def load(**options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
        base, found = source.model(
            AutoModelForCausalLM,
            dtype=getattr(torch, model.dtype),
            attn_implementation=model.attn_implementation,
            output_loading_info=True,
            **options,
        )
        if found["missing_keys"] and options.get("device_map") != ON_META:
            raise GradeError(
                f"model.name={model.name}: its files lack {len(found['missing_keys'])} of the model's tensors (such "
                f"as {min(found['missing_keys'])}), which transformers fills with random numbers. Name a complete "
                "model."
            )
        check_vocabulary(model.name, tokenizer, base)
        return base, found

    sharding = None
    if model.fsdp and accelerator is not None and accelerator.num_processes > 1:
        base, sharding = load_sharded(load, accelerator), Sharding(accelerator)
    else:
        base, _ = load(**loading_options(model, device))
    longest = max(prompt_and_response, reward.max_tokens) if head else prompt_and_response
    if model.quantization is not None:
        check_quantized(base, model)
    elif sharding is None:
        base.to(device)
    if model.finetuning == "full":
        _check_room(base, model)
        return Policy(base, tokenizer, length=longest)
    if adapter is None:
        return Policy(add_adapter(base, model, config.seed), tokenizer, length=longest, sharding=sharding)
    policy = Policy(go_on_from(base, *adapter, model), tokenizer, length=longest, sharding=sharding)
    policy.started_from = started_digest(adapter[0])
    return policy


def _check_room(base: PreTrainedModel, model: ModelConfig) -> None:
    """Refuse to train every weight where there is no room for a copy, gradients and two moments of each."""
    table = base.get_input_embeddings().weight.numel()
    needed, free = 4 * 4 * (base.num_parameters() - table), free_bytes(base.device)
    if free is not None and needed > free:
        raise GradeError(
            f"model.finetuning=full: beside its weights, {model.name} would take {needed / 2**30:.1f} GiB to train (a "
            f"frozen copy, gradients and two moments of each), and {free / 2**30:.1f} GiB are free. Train an adapter "
            "(model.finetuning lora), or a smaller model."
        )


def go_on_from(base: PreTrainedModel, folder: Path, settings: LoraConfig, model: ModelConfig) -> PeftModel:
    """The frozen base with a trained adapter and, if model.reference says so, a frozen copy of it.

    Raises:
        GradeError: it is damaged, or does not fit the base.
    """
    name = f"model.adapter={model.adapter}"
    try:
        wrapped = _wrapped(base, settings, model)
    except ValueError as error:  # no layer of these names
        raise GradeError(f"{name} does not fit model.name={model.name}: {reason_of(error)}") from error
    fix = "Name the model that it was trained on as model.name."
    put_adapter(folder, wrapped, name, fix)
    if recorded_base(folder) is None:
        check_base_name(LoraConfig.from_pretrained(str(folder)).base_model_name_or_path, base.name_or_path, name, fix)
    if model.reference == "initial":
        add_reference(wrapped)
    return wrapped


def add_adapter(base: PreTrainedModel, model: ModelConfig, seed: int) -> PeftModel:
    """The frozen base with a LoRA adapter; the same seed gives the same adapter whatever ran before."""
    lora = model.lora
    linear = {name.rsplit(".", 1)[-1] for name, m in base.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D))}
    missing = [name for name in lora.target_modules if not any(m == name for m in linear)]
    if missing:
        raise GradeError(
            f"model.lora.target_modules: {model.name} has no linear layer called {', '.join(missing)}. "
            f"It has {', '.join(sorted(linear))}."
        )
    layers = [
        m
        for name, m in base.named_modules()
        if name.rsplit(".", 1)[-1] in lora.target_modules and isinstance(m, (torch.nn.Linear, Conv1D))
    ]
    sizes = (m.weight.shape if isinstance(m, Conv1D) else (m.in_features, m.out_features) for m in layers)
    needed = 16 * lora.r * sum(map(sum, sizes))  # float32: weights, gradients and two moments
    free = free_bytes(base.device)
    if free is not None and needed > free:
        raise GradeError(
            f"model.lora.r is {lora.r}: its adapter would take {needed / 2**30:.1f} GiB to train, and "
            f"{free / 2**30:.1f} GiB are free. Lower it, or name fewer model.lora.target_modules."
        )
    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in base.modules()),
    )
    with torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
        torch.manual_seed(seed)
        return _wrapped(base, settings, model)


def _wrapped(base: PreTrainedModel, settings: LoraConfig, model: ModelConfig) -> PeftModel:
    base.requires_grad_(False)
    with warnings.catch_warnings():
        # peft asks a property that transformers has renamed; users can do nothing about it.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(base, settings, revision=model.revision)


def load_prompts(
    evaluation: EvaluationConfig, task: Task, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[list[int]]]:
    """Token ids of the prompts of training ("policy"), "validation" and "test", the last two as many as are evaluated.

    Raises:
        GradeError: the task cannot make prompts with these settings, or a split has none.
    """
    limits = {"policy": None, "validation": evaluation.validation_prompts, "test": evaluation.test_prompts}
    prompts = {split: task.prompts(split, tokenizer, limit=limit) for split, limit in limits.items()}
    empty = [split for split in limits if not prompts[split] and limits[split] != 0]
    if empty:
        raise GradeError(
            f"nothing in the {empty[0]} split gives a prompt: check the data of task.dataset and task.prompt_max_chars."
        )
    return prompts


def check_fits(
    name: str, model: PretrainedConfig, task: TaskConfig, generation: GenerationConfig, head_tokens: int | None
) -> None:
    """Refuse what exceeds the model's context or vocabulary.

    Args:
        head_tokens: reward.max_tokens where a head is trained.
    """
    context, vocabulary = context_of(model), model.get_text_config().vocab_size
    prompt, response = task.prompt_max_tokens, generation.max_new_tokens
    if context is not None and prompt + response > context:
        raise GradeError(
            f"task.prompt_max_tokens ({prompt}) + generation.max_new_tokens ({response}) is {prompt + response}, but "
            f"the context of {name} is {context} tokens. Lower one of them."
        )
    if head_tokens is not None and context is not None and head_tokens > context:
        raise GradeError(
            f"reward.max_tokens ({head_tokens}) exceeds the context of {name}, {context} tokens. Lower it."
        )
    if generation.top_k > vocabulary:
        raise GradeError(
            f"generation.top_k ({generation.top_k}) exceeds the vocabulary of {name}, {vocabulary} tokens. Lower it."
        )


def check_vocabulary(name: str, tokenizer: PreTrainedTokenizerBase, base: PreTrainedModel) -> None:
    """Refuse a tokenizer with ids that the model has no row for."""
    largest, rows = max(tokenizer.get_vocab().values()), base.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise GradeError(
            f"model.name={name}: its tokenizer knows id {largest}, its embedding has only {rows} rows. Resize it with "
            "model.resize_token_embeddings."
        )
