"""What 16-bit decoding loses of an adapter, by the way in which it is added: to the weights, or beside them.

    python -m benchmarks.adapter_rounding imdb_small --save benchmarks/results/adapter_rounding.json
    python -m benchmarks.adapter_rounding --table benchmarks/results/adapter_rounding.json

The adapter learns the task's texts for some AdamW steps. Each way of a pass over responses that the policy has sampled
is compared with the policy in float32 arithmetic, the same 16-bit weights widened and the adapter beside them: the KL
of the next token between them, the mean difference of the sampled tokens' log-probabilities, and the share of what the
adapter does to the logits that is left, which is 1 where rounding is only noise.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.saved import command, new_parser
from grade.config.reading import load_config
from grade.machine import machine
from grade.model.decoding import decoding
from grade.model.loading import load_policy, load_tokenizer
from grade.model.passes import fed_embeddings, policy_pass
from grade.model.policy import Policy
from grade.rollout import Rollout, pad_prompts
from grade.sampling.draw import sampling_of
from grade.sampling.sample import sample
from grade.tables import Column, Table
from grade.tasks import load_task

# Of AdamW: steps and learning rate.
TRAINING = ((1, 1e-5), (50, 1e-5), (10, 1e-3), (50, 3e-3))
WAYS = {
    "base": "none: the base alone",
    "beside": "beside each weight",
    "joined": "beside joined weights",
    "merged": "added, and rounded with the weight",
    "rounded": "the same in float32 arithmetic",
}
_PROMPTS, _TEXTS, _TOKENS = 16, 8, 64


def measure(options: argparse.Namespace) -> dict:
    config = load_config(options.config, [])
    device = torch.device("cpu")
    models = {name: replace(config, model=replace(config.model, dtype=name)) for name in ("float32", "bfloat16")}
    tokenizer = load_tokenizer(config.model)
    rows = []
    task = load_task(config.task)
    texts = [tokenizer(example.text)["input_ids"][:_TOKENS] for example in task.examples("policy")[: 50 * _TEXTS]]
    prompts = task.prompts("policy", tokenizer, limit=_PROMPTS)
    for steps, rate in options.training:
        exact, policy = (load_policy(models[name], tokenizer, device) for name in models)
        with torch.no_grad():
            for parameter in exact.model.parameters():
                if not parameter.requires_grad:
                    parameter.copy_(parameter.bfloat16())
        _learn(exact, texts, steps, rate)
        with torch.no_grad():
            for ours, theirs in zip(policy.parameters(), exact.parameters(), strict=True):
                ours.copy_(theirs)
        sampling = sampling_of(config.generation)
        ids, mask = pad_prompts(prompts, policy.pad_id)
        first = torch.arange(len(ids)) * sampling.max_new_tokens
        rollout = sample(exact, ids, mask, sampling, seed=0, first_rows=first)
        for way, found in _compared(exact, policy, rollout).items():
            rows.append({"steps": steps, "rate": rate, "size": _size(exact), "way": way, **found})
    return {"machine": machine(), "model": str(config.model.name), "rows": rows}


def _learn(policy: Policy, texts: list[list[int]], steps: int, rate: float) -> None:
    """The texts' log-likelihood by the adapter."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=rate)
    for step in range(steps):
        ids, mask = pad_prompts(texts[step * _TEXTS : (step + 1) * _TEXTS], policy.pad_id)
        hidden = policy.hidden(policy.embed(ids), mask)[:, :-1]
        predicted = (mask[:, 1:] & mask[:, :-1]).flatten()
        logits = policy.head.logits(hidden.flatten(0, 1)[predicted])
        torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()[predicted]).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def _size(policy: Policy) -> float:
    """Norm of what the adapter adds to the weights, over the weights' own."""
    layers = policy.adapter_layers
    added, own = (
        torch.stack([x.norm() for x in matrices]).norm()
        for matrices in (
            [layer.get_delta_weight("default") for layer in layers],
            [layer.get_base_layer().weight for layer in layers],
        )
    )
    return (added / own).item()


@torch.no_grad()
def _compared(exact: Policy, policy: Policy, rollout: Rollout) -> dict[str, dict[str, float]]:
    """By way, its differences from the policy in float32 arithmetic."""
    expected, base = (_logits(exact, rollout, adapters=adapters) for adapters in (True, False))
    effect = _centred(expected - base)
    found = {way: _way(exact if way == "rounded" else policy, rollout, way) for way in WAYS}
    tokens = rollout.tokens[rollout.mask][:, None]
    target = expected.log_softmax(-1)
    out = {}
    for way, logits in found.items():
        logp = logits.log_softmax(-1)
        apart = (logp - target).gather(-1, tokens)
        left = _centred(logits - (base if way == "rounded" else found["base"]))
        out[way] = {
            "kl": (target.exp() * (target - logp)).sum(-1).mean().item(),
            "difference": apart.abs().mean().item(),
            "share": ((left * effect).sum() / effect.square().sum()).item(),
        }
    return out


def _centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(-1, keepdim=True)


def _way(policy: Policy, rollout: Rollout, way: str) -> Tensor:
    if way == "joined":
        with decoding(policy):
            return _logits(policy, rollout)
    if way in ("merged", "rounded"):
        with _rounded(policy):
            return _logits(policy, rollout, adapters=False)
    return _logits(policy, rollout, adapters=way != "base")


@contextlib.contextmanager
def _rounded(policy: Policy) -> Iterator[None]:
    """Inside, the adapter is added to the weights, and the sums are rounded to what weights are."""
    weights = [layer.get_base_layer().weight for layer in policy.adapter_layers]
    before = [weight.data for weight in weights]
    for layer, weight in zip(policy.adapter_layers, weights, strict=True):
        weight.data = (weight + layer.get_delta_weight("default").float()).bfloat16().to(weight.dtype)
    try:
        yield
    finally:
        for weight, data in zip(weights, before, strict=True):
            weight.data = data


def _logits(policy: Policy, rollout: Rollout, *, adapters: bool = True) -> Tensor:
    """[n, V] float64 at the real tokens."""
    hidden = policy_pass(
        policy, rollout, fed_embeddings(rollout, policy.embedding, policy.embedding_scale), adapters=adapters
    )
    return policy.head.logits(hidden[rollout.mask]).double()


def document(saved: dict) -> str:
    columns = [
        Column("AdamW steps"),
        Column("learning rate", right=True),
        Column("added / weight", 4),
        Column("adapter"),
        Column("KL, nats a token", 6),
        Column("difference of log p, nats", 4),
        Column("share of its effect", 3),
    ]
    rows = [
        [
            row["steps"],
            f"{row['rate']:g}",
            row["size"],
            WAYS[row["way"]],
            row["kl"],
            row["difference"],
            None if row["way"] == "base" else row["share"],
        ]
        for row in saved["rows"]
    ]
    return Table("rounding of adapters", columns, rows).markdown() + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("config", nargs="?", default="imdb_small", help="a shipped config or a YAML file")
    parser.set_defaults(training=TRAINING)
    command(parser, arguments, measure, document, "rows", of_rows=("way", "share"))


if __name__ == "__main__":
    main()
