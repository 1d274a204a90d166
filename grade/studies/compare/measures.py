"""Measures of the samples of a test beside the reward: one row of them shows a reward that was fooled.

    judge                   probability of `positive` by n-grams that no method and no reward has seen (`judge.py`)
    perplexity              of the samples under the policy's base
    nats_per_byte           of their text under another model (`fluency.py`)
    repetition              share of a response's 4-grams of tokens that stood in it before; 0 below 4 tokens
    length_distance         Wasserstein distance between the lengths of responses and of the base's, tokens
    entropy_distance        the same of the mean entropies of responses, nats

Perplexity and nats per byte fall where a text repeats itself, and repetition rises. Both distances are of the same
prompts with the same noise, and 0 for the base. Repetition is 1 - distinct / all: seq-rep-4 of S. Welleck et al.,
"Neural text generation with unlikelihood training", ICLR 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from scipy.stats import wasserstein_distance
from torch import Tensor

from grade.model.passes import base_pass, fed_embeddings
from grade.model.policy import Policy
from grade.replay.score import RealTokens
from grade.rollout import Rollout
from grade.studies.compare.fluency import BYTES, NATS, Reader, fluency
from grade.studies.compare.judge import Judge
from grade.tasks.encoding import encode
from grade.training.evaluation import text_of
from grade_kernels import linear_token_logprob

_GRAM = 4
Spread = dict[str, list[float]]
"""A value of every response, by measure: "length" (tokens) and "entropy" (mean over its tokens, nats)."""


def sample_measures(
    policy: Policy, judge: Judge | None, reader: Reader | None
) -> Callable[[Rollout], dict[str, Tensor]]:
    """Given a rollout, its measures [B]: "judge", the base model's negative log-probability (nats per response) as
    "base_nll", "repetition", `NATS` and `BYTES`; those of a judge or reader that is None are left out."""

    @torch.no_grad()
    def measure(rollout: Rollout) -> dict[str, Tensor]:
        mask = rollout.mask
        base = base_pass(policy, rollout, fed_embeddings(rollout, policy.embedding, policy.embedding_scale))
        logprob, _ = linear_token_logprob(base.reference[mask], policy.head, rollout.tokens[mask])
        measures = {"base_nll": -RealTokens(rollout).dense(logprob).sum(1), "repetition": repetition(rollout)}
        if judge is not None:
            measures["judge"] = judge.probability(judge_rows(policy, rollout))
        if reader is not None:
            measures |= fluency(reader, policy, rollout)
        return measures

    return measure


def judge_rows(policy: Policy, rollout: Rollout) -> list[list[int]]:
    """Ids of the text of prompt and response, special tokens left out: what the judge reads.

    The text is encoded anew, as the judge's training texts were: a policy may spell a word in tokens that the
    tokenizer never gives, which the judge has not seen.
    """
    ids = torch.cat([rollout.prompt_ids, rollout.tokens], dim=1)
    mask = torch.cat([rollout.prompt_mask, rollout.mask], dim=1)
    texts = [text_of(policy, row, kept) for row, kept in zip(ids, mask, strict=True)]
    return encode(policy.tokenizer, texts, None, special_tokens=False)


def repetition(rollout: Rollout) -> Tensor:
    """Share of each response's 4-grams that stood in it before, float64 [B]; 0 of a response without any."""
    tokens, lengths = rollout.tokens.cpu(), rollout.mask.sum(1).cpu()
    count = (lengths - _GRAM + 1).clamp(min=0)  # [B]
    if not int(count.sum()):
        return torch.zeros(len(rollout), dtype=torch.float64)
    grams = tokens.unfold(1, _GRAM, 1)  # [B, S - 3, 4]
    row, place = (torch.arange(grams.shape[1]) < count[:, None]).nonzero(as_tuple=True)
    distinct = torch.cat([row[:, None], grams[row, place]], dim=1).unique(dim=0)
    before = count - torch.bincount(distinct[:, 0], minlength=len(rollout))
    return before.double() / count.clamp(min=1)


def spread_of(records: Sequence[Mapping[str, Any]]) -> Spread:
    """Lengths and mean entropies of the responses that `grade.training.evaluation.responses` has scored."""
    return {
        "length": [float(record["length"]) for record in records],
        "entropy": [record["entropy"] / record["length"] for record in records],
    }


def distances(spread: Spread, base: Spread) -> dict[str, float]:
    """The Wasserstein distance of each measure from the base model's."""
    return {f"{name}_distance": float(wasserstein_distance(values, base[name])) for name, values in spread.items()}


def numbers(row: dict[str, Any]) -> dict[str, Any]:
    """An evaluation with its details beside the rest, and what follows from sums over all its responses: perplexity
    and nats per byte (None of responses without text)."""
    details = row.pop("details")
    found = {**row, **details, "perplexity": math.exp(details["base_nll"] / row["mean_length"])}
    if NATS in details:
        found["nats_per_byte"] = ratio(details[NATS], details[BYTES])
    return found


def ratio(nats: float, size: float) -> float | None:
    """Nats per byte; None without a byte."""
    return nats / size if size else None
