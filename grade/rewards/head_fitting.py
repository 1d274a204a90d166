"""Fit the reward head: frozen base features once, then a small network on them, and its errors on held-out data.

The base is causal, so the mean over a text's first n states is the feature of its first n tokens: one pass gives the
features of the whole (cut) text and of the shorter text that the policy's responses will really be. Classes and numbers
are learnt on both and reported on both, on texts the head has not seen; pairs are read whole, as most of what is short
would be their prompt, and so are responses that a program has judged, which says nothing of their beginnings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grade.config import RewardConfig
from grade.errors import GradeError, present
from grade.model.passes import accumulation_dtype
from grade.model.policy import Policy
from grade.model.tensors import running_sum
from grade.rewards.shared import RewardHead
from grade.tasks.base import Example, LabelType, PairIds
from grade.tasks.encoding import encode
from grade.terminal import counted

_FEATURE_BATCH = 32


class Judged(NamedTuple):
    """Token ids of a prompt and a response, the prompt's number, and what a program says of the response."""

    ids: list[int]
    prompt: int
    reward: float


class HeadData(NamedTuple):
    """What a head learns from and what it is tested on: texts with labels, pairs of answers, or responses that a
    program has judged."""

    label_type: LabelType
    learnt: Sequence[Example] | Sequence[PairIds] | Sequence[Judged]
    held_out: Sequence[Example] | Sequence[PairIds] | Sequence[Judged]


def fit_head(
    policy: Policy, settings: RewardConfig, data: HeadData, *, judged: int
) -> tuple[RewardHead, dict[str, Any]]:
    """A trained head, in float32 on the policy's device, and the report on what was held out.

    Args:
        settings: section `reward`.
        judged: tokens of the text that the reward will judge in training.

    Returns:
        The head, and {"label_type", "loss" (of the last epoch), "judged_length", "trained_on", "held_out"} with
        measures of the held-out data at some lengths, {"<n> tokens": value}: "accuracy" of classes, and of pairs, where
        it is the share that is ranked right; "r2" and "mean_absolute_error" of numbers ("r2" is None where all held-out
        numbers are equal); of judged responses also "correlation" (Pearson) of the head's reward with the program's,
        and "correlation_within_prompts" of what both say of a response beyond the means of its prompt's responses
        (None where either is constant).

    Raises:
        GradeError: nothing is left to learn from, or to test on.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        head = RewardHead(policy.embedding.shape[1], settings.hidden_size, data.label_type)
    head.to(policy.device)
    if data.label_type == "pairs":
        loss, measures, sizes = _fit_pairs(policy, head, settings, data, judged)
    else:
        loss, measures, sizes = _fit_texts(policy, head, settings, data, judged)
    return head, {
        **measures,
        "label_type": data.label_type,
        "loss": loss,
        "judged_length": judged,
        "trained_on": sizes[0],
        "held_out": sizes[1],
    }


def _fit_texts(
    policy: Policy, head: RewardHead, settings: RewardConfig, data: HeadData, judged: int
) -> tuple[float, dict[str, Any], tuple[int, int]]:
    """Classes by cross-entropy, numbers by the squared error in their standard deviations."""
    responses = [example for example in data.held_out if isinstance(example, Judged)]
    lengths = [judged] if responses else sorted({judged, settings.max_tokens})
    parts = []
    for examples, title in ((data.learnt, "Reward features"), (data.held_out, "Held-out features")):
        rows, values = _rows_and_labels(policy, settings, examples, max(lengths))
        parts.append((features_of(policy, rows, lengths, title), torch.tensor(values, device=policy.device)))
    (train_x, train_y), (held_x, held_y) = parts
    train_x, train_y = train_x.flatten(0, 1), train_y.repeat(len(lengths))
    sizes = (len(data.learnt), len(data.held_out))
    if data.label_type == "classes":
        held_y = held_y.long()
        loss = _minimise(
            head,
            len(train_x),
            settings,
            lambda batch: torch.nn.functional.cross_entropy(head(train_x[batch]), train_y[batch].long()),
        )
        logits = [head(x) for x in held_x]
        right = [((s[:, 1] > s[:, 0]).long() == held_y).float().mean().item() for s in logits]
        found = {"accuracy": _by_length(lengths, right)}
        return loss, found | _correlations(head, held_x, held_y, lengths, responses), sizes
    mean, deviation = train_y.mean(), train_y.std().clamp_min(1e-12)
    scaled = (train_y - mean) / deviation
    loss = _minimise(
        head,
        len(train_x),
        settings,
        lambda batch: torch.nn.functional.mse_loss(head(train_x[batch])[..., 0], scaled[batch]),
    )
    with torch.no_grad():  # the head speaks in the numbers' own units
        last = head.last
        last.weight.mul_(deviation)
        last.bias.mul_(deviation).add_(mean)
    errors = [head(x)[..., 0] - held_y for x in held_x]
    spread = (held_y - held_y.mean()).square().sum() if len(held_y) else torch.zeros(())
    return (
        loss,
        {
            "r2": _by_length(lengths, [(1 - e.square().sum() / spread).item() if spread > 0 else None for e in errors]),
            "mean_absolute_error": _by_length(lengths, [error.abs().mean().item() for error in errors]),
            **_correlations(head, held_x, held_y, lengths, responses),
        },
        sizes,
    )


def _rows_and_labels(
    policy: Policy,
    settings: RewardConfig,
    examples: Sequence[Example] | Sequence[PairIds] | Sequence[Judged],
    limit: int,
) -> tuple[list[list[int]], list[float]]:
    """The token ids of what can be read of the examples, and its labels."""
    judged = [example for example in examples if isinstance(example, Judged)]
    if judged:
        return [response.ids[:limit] for response in judged], [response.reward for response in judged]
    texts = [example for example in examples if isinstance(example, Example)]
    marks = settings.input == "prompt+response"  # a response by itself has no token that opens a text
    rows = encode(policy.tokenizer, [e.text for e in texts], limit, special_tokens=marks)
    readable = [i for i, row in enumerate(rows) if row]
    return [rows[i] for i in readable], [present(texts[i].label) for i in readable]


@torch.no_grad()
def _correlations(
    head: RewardHead, features: Tensor, labels: Tensor, lengths: list[int], responses: Sequence[Judged]
) -> dict[str, Any]:
    """How the head's reward goes with a program's, over all responses and among those of a prompt: only the latter can
    tell a policy which of its responses to make likelier. Nothing where no program has judged."""
    if not responses:
        return {}
    numbers = torch.tensor([response.prompt for response in responses], device=labels.device)
    said, right = [head.reward(x).double() for x in features], labels.double()
    within = [_pearson(_beyond_means(x, numbers), _beyond_means(right, numbers)) for x in said]
    return {
        "correlation": _by_length(lengths, [_pearson(x, right) for x in said]),
        "correlation_within_prompts": _by_length(lengths, within),
    }


def _beyond_means(values: Tensor, groups: Tensor) -> Tensor:
    """[N] values minus the mean of their group; groups are numbered from 0."""
    sums = values.new_zeros(int(groups.max()) + 1).index_add(0, groups, values)
    return values - (sums / groups.bincount().clamp_min(1))[groups]


def _pearson(x: Tensor, y: Tensor) -> float | None:
    """None where one of both is constant, to the rounding of float32, as a single value is."""
    if min(x.std(correction=0).item(), y.std(correction=0).item()) < 1e-7:
        return None
    return torch.corrcoef(torch.stack([x, y]))[0, 1].item()


def _fit_pairs(
    policy: Policy, head: RewardHead, settings: RewardConfig, data: HeadData, judged: int
) -> tuple[float, dict[str, Any], tuple[int, int]]:
    """Bradley and Terry (1952): the log-odds that an answer is preferred are the difference of the logits."""
    limit = max(judged, settings.max_tokens)
    parts = []
    for pairs, title in ((data.learnt, "Reward features"), (data.held_out, "Held-out features")):
        rows = [_pair_rows(pair, settings, limit) for pair in pairs if isinstance(pair, PairIds)]
        told = [(chosen, rejected) for chosen, rejected in rows if chosen and rejected and chosen != rejected]
        if not told:
            raise GradeError(
                f"no pair of {len(rows)} has two answers that differ in their first {limit} tokens, prompt included, "
                f"for {title.lower()}: raise reward.max_tokens, or use other data for task.label_type=pairs."
            )
        features = features_of(policy, [row for pair in told for row in pair], [limit], title)[0]
        parts.append(features.unflatten(0, (-1, 2)))  # [N, 2, d], the chosen answer first
    learnt, held_out = parts

    def loss_of(batch: Tensor) -> Tensor:
        logits = head(learnt[batch])[..., 0]
        return -torch.nn.functional.logsigmoid(logits[:, 0] - logits[:, 1]).mean()

    loss = _minimise(head, len(learnt), settings, loss_of)
    logits = head(held_out)[..., 0]
    right = (logits[:, 0] > logits[:, 1]).float().mean().item()
    return loss, {"accuracy": _by_length([limit], [right])}, (len(learnt), len(held_out))


def _pair_rows(pair: PairIds, settings: RewardConfig, limit: int) -> tuple[list[int], list[int]]:
    """What the reward reads of both answers."""
    prompt = pair.prompt if settings.input == "prompt+response" else []
    return [*prompt, *pair.chosen][:limit], [*prompt, *pair.rejected][:limit]


def _by_length(lengths: list[int], values: Sequence[float | None]) -> dict[str, float | None]:
    return {f"{n} tokens": value for n, value in zip(lengths, values, strict=True)}


def _minimise(head: RewardHead, rows: int, settings: RewardConfig, loss_of: Callable[[Tensor], Tensor]) -> float:
    """Minimise the mean of `loss_of` over batches of row numbers with AdamW; the mean loss of the last epoch."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    device = next(head.parameters()).device
    generator = torch.Generator().manual_seed(settings.seed)
    total = 0.0
    for _ in counted("Reward head, epochs", range(settings.epochs)):
        total = 0.0
        for batch in torch.randperm(rows, generator=generator).split(settings.batch_size):
            loss = loss_of(batch.to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
    return total / rows


@torch.no_grad()
def features_of(policy: Policy, rows: Sequence[list[int]], lengths: list[int], title: str) -> Tensor:
    """Mean-pooled base states of the first n tokens of each row, for each n in `lengths`.

    Args:
        rows: N lists of 1 to max(lengths) token ids.

    Returns:
        [len(lengths), N, d] float32, on the policy's device.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # equal lengths together: little padding
    out = torch.empty(len(lengths), len(rows), policy.embedding.shape[1], device=policy.device)
    batches = [order[start : start + _FEATURE_BATCH] for start in range(0, len(order), _FEATURE_BATCH)]
    for chosen in counted(title, batches, len):
        width = len(rows[chosen[-1]])
        ids = torch.full((len(chosen), width), policy.pad_id)
        mask = torch.zeros(len(chosen), width, dtype=torch.bool)
        for i, row in enumerate(chosen):
            ids[i, : len(rows[row])] = torch.tensor(rows[row])
            mask[i, : len(rows[row])] = True
        ids, mask = ids.to(policy.device), mask.to(policy.device)
        with policy.state(adapters=False):
            hidden = policy.hidden(policy.embed(ids), mask, padded=False)
        sums = running_sum(hidden.to(accumulation_dtype(hidden)) * mask[..., None], 1)  # [b, T, d]
        for i, length in enumerate(lengths):
            counts = mask[:, :length].sum(1)
            out[i, chosen] = sums[torch.arange(len(chosen)), counts - 1] / counts[:, None]
    return out
