"""The model card of a checkpoint or an export: what was trained on what, by which command, with which result.

It is made of what a run leaves (settings, run.json, evaluation.json) and holds no time and no folder of the run, so
that equal runs have equal cards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import yaml

from grade.config import Config, flatten, settings_with_role
from grade.config.methods import DIFFERENTIATING
from grade.config.tasks import WRITTEN
from grade.hub_names import looks_local
from grade.training.sessions import SESSIONS

_OF_A_CALL = ("train.resume", "train.overwrite", "compare.", "variance.")
"""Settings that say how a run was started, and those of the studies. Role `resume` also holds settings that the card
shows, so these are listed."""
_LEFT_OUT = (*(name for name in settings_with_role("place") if name != "name"), *_OF_A_CALL)
"""What the card's settings do without: it holds no folder."""
_OF_THE_HEAD = (
    "label_type",
    "trained_on",
    "held_out",
    "accuracy",
    "r2",
    "mean_absolute_error",
    "correlation",
    "loss",
    "sha256",
    "data.",
)
"""What its report says of its training, of its errors on held-out data, of its weights and of its data."""
_USE = {
    True: """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this folder or repository")
tokenizer = AutoTokenizer.from_pretrained("this folder or repository")
```""",
    False: """```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("this folder or repository")
tokenizer = AutoTokenizer.from_pretrained("this folder or repository")
```""",
}


def model_card(
    config: Config,
    record: Mapping[str, Any],
    step: int,
    validation: Sequence[Mapping[str, Any]],
    test: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    merged: bool = False,
) -> str:
    """A card as Markdown, with the metadata that the hub reads above it.

    Args:
        config: the run's settings.
        record: run.json: task, what the reward raises, sessions.
        step: optimizer steps that these weights have had.
        validation: evaluations of the base model and of the policy in the order of steps, as evaluation.json has them.
        test: `base` and `best`, if the test was of this step's weights.
        merged: the weights are those of a whole model, not of an adapter.
    """
    base, method = config.model.name, config.method.name
    kind = "The whole model: base weights with the trained adapter added" if merged else "A LoRA adapter"
    if config.model.finetuning == "full":
        kind, merged = "The whole model, every weight of its layers trained", True
    sessions = record.get(SESSIONS) or [{}]
    parts = [
        _metadata(config, merged),
        f"# {config.name}: {base} trained with {method}",
        f"{kind}, after {step} of {config.train.steps} optimizer steps with "
        "[GRADE](https://arxiv.org/abs/2601.11574)'s trainer.",
        "## What was trained on what",
        _table(("what", "value"), list(_facts(config, record))),
        "## Command",
        f"```\n{sessions[0].get('command', 'not recorded')}\n```",
        "Settings that are not the defaults, as a file for `grade train`:",
        f"```yaml\n{_settings(config)}```",
        "Versions: " + (_listed(sessions[0].get("versions", {})) or "not recorded") + ".",
        "## Result",
        *_result(config, step, validation, test),
        "## Use",
        _USE[merged],
        f"Responses were sampled at temperature 1 among the {config.generation.top_k} likeliest tokens, at most "
        f"{config.generation.max_new_tokens} long. The terms of the base model hold for these weights too. They were "
        "trained to raise one number: what else changed was not measured.",
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(config: Config, merged: bool) -> str:
    fields: dict[str, Any] = {
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["grade", config.method.name, *([] if merged else ["lora"])],
    }
    if _on_hub(config.model.name):  # the hub takes nothing else
        fields["base_model"] = config.model.name
    if config.task.name not in WRITTEN and _on_hub(config.task.dataset):
        fields["datasets"] = [config.task.dataset]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def _on_hub(name: str) -> bool:
    return not looks_local(name) and ":" not in name


def _facts(config: Config, record: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Rows of the table of what was trained on what."""
    model, method, train, task = config.model, config.method, config.train, record.get("task", {})
    yield "base model", model.name + (f", revision {model.revision}" if model.revision else "")
    if model.finetuning == "full":
        yield "trained", f"every weight but head and embedding table, in {model.dtype}"
    elif model.adapter is None:
        targets = ", ".join(model.lora.target_modules)
        yield (
            "adapter",
            (
                f"LoRA of rank {model.lora.r}, alpha {model.lora.alpha:g}, on {targets}; base in "
                f"{model.quantization or model.dtype}"
            ),
        )
    else:
        yield (
            "adapter",
            (
                f"LoRA, gone on from {model.adapter} with that adapter's settings; base in "
                f"{model.quantization or model.dtype}"
            ),
        )
    yield "task", config.task.name
    yield "data", task.get("dataset", config.task.dataset)
    of_policy = task.get("splits", {}).get("policy")
    prompts = of_policy.get("examples") if isinstance(of_policy, dict) else None  # of a task of one's own, anything
    if prompts is not None:
        yield "training prompts", prompts
    if "reward" in record:
        yield "reward", f"{record['reward']} is raised"
    if "reward_head" in record:
        found = flatten(record["reward_head"])
        yield "reward head", _listed({k: v for k, v in found.items() if k.startswith(_OF_THE_HEAD)})
    yield "method", method.name
    if method.name in DIFFERENTIATING:
        yield (
            "estimator",
            (
                f"{method.estimator}, temperature {method.tau_start:g} to {method.tau_end:g} over {method.tau_steps} "
                f"steps, at most {method.max_hops} hops, tolerance {method.hop_tol:g}"
            ),
        )
    else:
        yield f"settings of {method.name}", _listed(asdict(getattr(method, method.name)))
    steered = "" if method.target_kl is None else f", steered to a KL of {method.target_kl:g} nats"
    coefficient = f"coefficient {'from ' if steered else ''}{method.kl_coef:g}{steered}"
    yield f"KL to {_reference(config)}", f"{coefficient}, {method.kl_direction}, {method.kl_reduction}"
    yield "steps", train.steps
    responses = record.get("inputs", {}).get("responses_per_step", train.batch_size * train.accumulation_steps)
    yield "responses of a step", f"{responses}, {config.generation.samples_per_prompt} per prompt"
    yield "learning rate", f"{train.learning_rate:g}, {train.schedule}, {train.warmup_steps} steps of warm-up"
    yield "seed", config.seed


def _reference(config: Config) -> str:
    """What KL is measured to."""
    return "the policy as it started" if config.model.reference == "initial" else "the base model"


def _settings(config: Config) -> str:
    """The settings that are not the defaults, as YAML."""
    default = flatten(asdict(Config()))
    nested: dict[str, Any] = {}
    for name, value in flatten(asdict(config)).items():
        if value != default[name] and not name.startswith(_LEFT_OUT):
            *sections, last = name.split(".")
            inner = nested
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[last] = value
    return yaml.safe_dump(nested, sort_keys=False, allow_unicode=True, width=110)


def _result(
    config: Config, step: int, validation: Sequence[Mapping[str, Any]], test: Mapping[str, Mapping[str, Any]] | None
) -> Iterator[str]:
    """The table of evaluations, and what its numbers are."""
    rows = list(validation[:1])
    rows += [row for row in validation if row["model"] != "base" and row["step"] <= step][-1:]
    rows += [] if test is None else [test["base"], test["best"]]
    if not rows:
        yield "Not evaluated."
        return
    details = list(dict.fromkeys(name for row in rows for name in row.get("details", {})))
    titles = ("split", "model", "prompts", "reward", "KL", "entropy", "distinct", "length", "ended", *details)
    yield _table(titles, [_evaluated(row, details) for row in rows])
    if len(validation) > 1 and rows[1]["step"] != step:
        yield f"After step {rows[1]['step']}, the last one that was validated; the weights are those after step {step}."
    sampler = f"nucleus of {config.evaluation.top_p:g}" if config.evaluation.sampler == "top_p" else "as in training"
    yield (
        f"± one standard error over prompts; KL to {_reference(config)} ({config.method.kl_direction}) and entropy "
        "in nats per token; distinct: tokens of a response that differ, as a share; length in tokens; ended: "
        f"responses that stopped by themselves. Base model and policy had the same prompts and the same noise; "
        f"sampling: {sampler}."
    )


def _evaluated(row: Mapping[str, Any], details: Sequence[str]) -> list[str]:
    name = "base model" if row["model"] == "base" else f"trained, step {row['step']}"
    return [
        row["split"],
        name,
        str(row["prompts"]),
        f"{row['reward']:.3f} ± {row['reward_stderr']:.3f}",
        f"{row['kl']:.3f}",
        f"{row['entropy']:.2f}",
        f"{row['unique_token_ratio']:.3f}",
        f"{row['mean_length']:.1f}",
        f"{row['eos_rate']:.0%}",
        *(f"{row['details'][name]:.3f}" if name in row.get("details", {}) else "–" for name in details),
    ]


def _listed(values: Mapping[str, object]) -> str:
    shown = {name: f"{value:.3g}" if isinstance(value, float) else value for name, value in values.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def _table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
