"""Measure that a classifier as a reward reads what its own forward reads, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grade.errors import GradeError, reason_of
from grade.model.probe import PROBE_TOKENS, relative_error, tolerance_of
from grade.rewards.classifier import ClassifierReward
from grade.rollout import Rollout

_PADDING = 2  # positions before a prompt that nothing may read


@torch.no_grad()
def probe_classifier(reward: ClassifierReward, name: str, length: int) -> None:
    """A text's features are those of the classifier on the same ids: alone, and beside a text as long as the run's.

    Args:
        name: reward.model.
        length: positions of the longest text of the run.

    Raises:
        GradeError: they are others, or the classifier cannot run on embeddings.
    """
    model, table = reward.model, reward.table.rows
    start = 1 if reward.reads == "response" else 0  # a prompt of one token, read or not
    response = max(length - 1 + start, PROBE_TOKENS)
    ids = (torch.arange(1, response + 2, device=table.device) * 7919 % table.shape[0])[None]

    def ours(lengths: tuple[int, ...]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            tokens = ids[:, 1 : 1 + max(lengths)].expand(len(lengths), -1)
            mask = torch.arange(max(lengths), device=table.device) < torch.tensor(lengths, device=table.device)[:, None]
            prompt = ids[:, [0] * (1 + _PADDING)].expand(len(lengths), -1)  # its last token is real, as in a batch
            real = torch.arange(1 + _PADDING, device=table.device) >= _PADDING
            rollout = Rollout(prompt, real.expand_as(prompt), tokens, mask, tokens[..., None], mask.float(), tokens)
            return reward.value(rollout, None, reward.inputs(rollout))

        return run

    tolerance = tolerance_of(table.dtype)
    try:
        said = []
        read = ids[:, start : PROBE_TOKENS + 1]
        own = _read_by_score(model, lambda: said.append(model(input_ids=read, use_cache=False).logits))[-1]
        alone = _read_by_score(model, ours((PROBE_TOKENS,)))[0]
        beside = _read_by_score(model, ours((PROBE_TOKENS, response)))[0]
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise _refusal(name, model, f"cannot be run on embeddings ({reason_of(error)})") from error
    if relative_error(model.score(own), said[0][0]) > tolerance:
        raise _refusal(name, model, "does more than read its last hidden state at the last token")
    if relative_error(alone, own) > tolerance:
        raise _refusal(name, model, "reads other features from embeddings than from the same ids")
    if relative_error(beside, own) > tolerance:
        raise _refusal(
            name,
            model,
            f"reads other features of a text beside one of {length} tokens than of the text alone (what "
            "its positions mean depends on the length, or padding reaches its texts)",
        )


def _refusal(name: str, model: PreTrainedModel, reason: str) -> GradeError:
    return GradeError(
        f"reward.model={name}: {type(model).__name__} {reason}, so a response's reward would be another. Choose "
        "another classifier, or lower task.prompt_max_tokens + generation.max_new_tokens."
    )


def _read_by_score(model: PreTrainedModel, run: Callable[[], object]) -> Tensor:
    """[n, d], what `score` is given when the classifier runs."""
    seen = []
    hook = model.score.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        run()
    finally:
        hook.remove()
    if not seen:
        raise ValueError("its score layer is never called")
    return seen[0].flatten(0, -2)
