"""Which architectures work, by tiny random models of every causal language model that transformers has.

    python -m benchmarks.architectures                                          # minutes on one core
    python -m benchmarks.architectures --save benchmarks/results/architectures.json
    python -m benchmarks.architectures --only Llama,Qwen3                       # names that begin so
    python -m benchmarks.architectures --table benchmarks/results/architectures.json

A model works where `grade.model.policy.Policy` accepts it, whose probe holds against a parallel pass: decoding from a
cache (with padding, samples of one prompt, rows that leave the batch), at the length of a run too, and the gradient
under padding. Then one step's gradient by replay is compared with that of the published algorithm
(`benchmarks.published`): token by token with autograd, without a cache. What a run can do without is a column of its
own.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import logging
import sys
import warnings
from collections import Counter
from contextlib import nullcontext
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from benchmarks.published import published_step
from benchmarks.saved import command, new_parser
from benchmarks.small_models import EOS, architectures, small_model
from grade.errors import GradeError, reason_of
from grade.machine import machine, machine_line
from grade.model.policy import Policy
from grade.replay.replay import ReplaySettings, replay
from grade.rewards.shared import RewardHead, SharedReward
from grade.sampling.compiled import CompiledDecoding
from grade.sampling.draw import Sampling
from grade.sampling.sample import sample
from grade.tables import Column, Table, numbers

# Positions of the longest sequence that the probe tries, beyond the windows of the tiny models.
_LENGTH = 40
_TOKENS, _CANDIDATES, _KL_COEF = 5, 8, 0.1
# Of a gradient in float32, that rounding explains when layers amplify it.
_LARGEST_ERROR = 1e-3
# Layers of attention as the architectures call them; where a model has none of these, every linear layer is adapted.
_TARGETS = (
    "q_proj",
    "v_proj",
    "q_b_proj",
    "kv_b_proj",
    "qkv_proj",
    "query_key_value",
    "c_attn",
    "Wqkv",
    "query",
    "value",
    "in_proj",
    "in_proj_qkv",
    "in_proj_qkvz",
    "q_lin",
    "v_lin",
)
_LONGEST_REASON = 200
_COLUMNS = (
    Column("architecture"),
    *numbers(["gradient, relative error"]),
    Column("checkpointing"),
    Column("adapter merged"),
    Column("prompt's cache in replay"),
    Column("rollout.compile"),
)


class _Tokenizer:
    """The part of a tokenizer that `Policy` reads."""

    pad_token_id = eos_token_id = EOS

    def __init__(self, size: int):
        self._size = size

    def get_vocab(self) -> dict:
        return {str(number): number for number in range(self._size)}


def measure(kind: type, model: type) -> dict:
    """One row: {"architecture", "config", "status": "works", "refused", "not tried" or "fails", "reason"}, and where it
    works the checks."""
    row = {"architecture": model.__name__, "config": kind.__name__}
    try:
        base = small_model(kind, model)
    except Exception as error:  # whatever a class raises for sizes that it was not made for
        return row | {"status": "not tried", "reason": str(error).strip() or type(error).__name__}
    try:
        policy = Policy(_adapted(base), _Tokenizer(base.get_input_embeddings().weight.shape[0]), length=_LENGTH)
        checks = _checks(policy)
        if not checks["gradient_error"] < _LARGEST_ERROR:
            return row | {"status": "fails", "reason": f"its gradient is off by {checks['gradient_error']:.0e}"}
        return row | {"status": "works", "reason": "", **checks}
    except GradeError as error:
        reason = str(error).removeprefix("model.name: ")
        return row | {"status": "refused", "reason": reason.split(", so replay would")[0]}
    except Exception as error:  # what should have been a refusal
        return row | {"status": "fails", "reason": f"{type(error).__name__}: {reason_of(error)}"}


def _adapted(base: Any) -> Any:
    """With an adapter that is not zero, so that the policy is not the base."""
    linear = {name.rsplit(".", 1)[-1] for name, m in base.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D))}
    head = next((name for name, m in base.named_modules() if m is base.get_output_embeddings()), "")
    others = sorted(name for name in linear if not name.isdigit() and name != head.rsplit(".", 1)[-1])
    targets = [name for name in _TARGETS if name in linear] or others
    base.requires_grad_(False)
    model = get_peft_model(
        base,
        LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=targets,
            task_type="CAUSAL_LM",
            fan_in_fan_out=any(isinstance(m, Conv1D) for m in base.modules()),
        ),
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def _checks(policy: Policy) -> dict:
    checkpointed, compiled = True, True
    try:
        policy.enable_activation_checkpointing()
    except GradeError:
        checkpointed = False
    try:
        CompiledDecoding(policy)
    except GradeError:
        compiled = False
    return {
        "gradient_error": _gradient_error(policy),
        "checkpointing": checkpointed,
        "merged": bool(policy.merged_weights()),
        "prompt_cache": policy.reads_prompt_cache,
        "compile": compiled,
    }


def _gradient_error(policy: Policy) -> float:
    """Of one step's gradient by replay against the published algorithm's, relative."""
    torch.manual_seed(2)
    reward = SharedReward(policy, RewardHead(policy.head.weight.shape[1], 16), "prompt+response")
    prompts = torch.arange(10, 18).view(2, 4)
    rows = torch.arange(2)[:, None] * _TOKENS + torch.arange(_TOKENS)
    published_step(
        policy,
        reward,
        prompts,
        length=_TOKENS,
        k=_CANDIDATES,
        tau=1.0,
        seed=0,
        rows=rows,
        kl_coef=_KL_COEF,
        cached=False,
        phase=lambda name: nullcontext(),
    )
    expected = _take_gradient(policy)
    sampling = Sampling(max_new_tokens=_TOKENS, top_k=_CANDIDATES, ignore_eos=True)
    real = torch.ones_like(prompts, dtype=torch.bool)
    rollout = sample(policy, prompts, real, sampling, seed=0, first_rows=rows[:, 0])
    settings = ReplaySettings(tau=1.0, max_hops=_TOKENS, hop_tol=0.0)
    replay(
        policy,
        reward,
        rollout,
        settings,
        reward_weight=torch.full((2,), 0.5),
        kl_weight=torch.full(rollout.mask.shape, _KL_COEF / rollout.mask.numel()),
    )
    found = _take_gradient(policy)
    return ((found - expected).norm() / expected.norm()).item()


def _take_gradient(policy: Policy) -> torch.Tensor:
    """[p] float64, zeros for parameters that nothing reached (experts that no token was sent to)."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.parameters()]
    for parameter in policy.parameters():
        parameter.grad = None
    return torch.cat([part.flatten().double() for part in parts])


def document(saved: dict) -> str:
    """What was found, as Markdown."""
    rows = saved["rows"]
    counts = Counter(row["status"] for row in rows)
    works = [row for row in rows if row["status"] == "works"]
    parts = [
        ", ".join(f"{counts[status]} {status}" for status in ("works", "refused", "fails", "not tried"))
        .replace("works", "work", 1)
        .replace("fails", "fail", 1)
        + "."
    ]
    checks = ("checkpointing", "merged", "prompt_cache", "compile")
    parts.append(
        Table(
            "",
            _COLUMNS,
            [
                [_name(row, rows), f"{row['gradient_error']:.0e}", *("yes" if row[name] else "no" for name in checks)]
                for row in works
            ],
        ).markdown()
    )
    for status, title in (("refused", "Refused"), ("fails", "Fails"), ("not tried", "Not tried")):
        part = [row for row in rows if row["status"] == status]
        if part:
            columns = [Column(title.lower()), Column("because")]
            parts.append(Table("", columns, [[_name(row, rows), _reason(row)] for row in part]).markdown())
    return "\n\n".join([*parts, f"Measured on {saved['date']}. {machine_line(saved['machine'])}"]) + "\n"


def _name(row: dict, rows: list[dict]) -> str:
    """The model's class, with its config's where several have that model."""
    several = sum(other["architecture"] == row["architecture"] for other in rows) > 1
    return f"{row['architecture']} ({row['config']})" if several else row["architecture"]


def _reason(row: dict) -> str:
    words = " ".join(row["reason"].removeprefix(row["architecture"]).split())
    return words if len(words) <= _LONGEST_REASON else words[:_LONGEST_REASON] + " …"


def _measured(options: argparse.Namespace) -> dict:
    only = tuple(name for name in options.only.split(",") if name)
    found = [(kind, model) for kind, model in architectures() if not only or model.__name__.startswith(only)]
    rows = []
    transformers_logging.set_verbosity_error()
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    for at, (kind, model) in enumerate(found, 1):
        print(f"{at}/{len(found)} {model.__name__}", file=sys.stderr, flush=True)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            rows.append(measure(kind, model))
    return {"date": datetime.date.today().isoformat(), "machine": machine(), "rows": rows}


def main(arguments: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--only", default="", help="beginnings of names, separated by commas; empty: all")
    command(parser, arguments, _measured, document, "date", "machine", "rows", of_rows=("architecture", "reason"))


if __name__ == "__main__":
    main()
