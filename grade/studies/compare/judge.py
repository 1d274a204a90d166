"""An independent judge of sentiment, so that a policy that fools its reward shows.

A linear classifier on hashed unigrams and bigrams of token ids. It shares neither weights nor features with the
policy or the reward, and no method sees it. An n-gram counts once in a text: repeating a word gains nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from grade.errors import GradeError
from grade.tasks.base import Example
from grade.tasks.encoding import encode

BUCKETS = 2**18
_MASK = 2**31 - 1  # products of 31 and 32 bits stay below 2**63
_PAIR = 0x3C6EF372  # keeps bigrams that start with token 0, whose hash is 0, apart from unigrams
# Chosen on held-out IMDB reviews at 64 and 128 tokens, where the accuracy is flat around them.
_BATCH, _EPOCHS, _LEARNING_RATE = 64, 2, 1e-3
LEAST_STEPS = 500  # few texts are read more often: that many steps of _LEARNING_RATE make a confident weight


class Judge(torch.nn.Module):
    """The log-odds of 'positive' are a bias plus one weight for each distinct n-gram of the text."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = torch.nn.EmbeddingBag(BUCKETS, 1, mode="sum", _weight=torch.zeros(BUCKETS, 1))
        self.bias = torch.nn.Parameter(torch.zeros(()))

    def forward(self, buckets: Tensor, counts: Tensor) -> Tensor:
        """Log-odds of positive: float32 [B].

        Args:
            buckets: int64 [total], the texts' n-grams one text after another.
            counts: int64 [B], n-grams of each text.
        """
        return self.bag(buckets, counts.cumsum(0) - counts)[:, 0] + self.bias

    @torch.no_grad()
    def probability(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Probability that each text is positive: float32 [B].

        Args:
            rows: B lists of token ids, prompt and response together, without special tokens. An empty one gets what
                the bias alone says.
        """
        return torch.sigmoid(self(*ngrams(rows)))

    def save(self, path: Path) -> None:
        """Write the weights to a safetensors file."""
        save_file(self.state_dict(), path)

    @classmethod
    def load(cls, path: Path) -> Judge:
        """Read a file that `save` wrote.

        Raises:
            GradeError: there is no such file, or it holds something else.
        """
        judge = cls()
        try:
            judge.load_state_dict(load_file(path))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise GradeError(f"{path} holds no judge ({type(error).__name__}). Delete it to train one.") from error
        return judge


def train_judge(
    tokenizer: Any,
    train: Sequence[Example],
    held_out: Sequence[Example],
    *,
    lengths: Sequence[int],
    seed: int = 0,
    least_steps: int = LEAST_STEPS,
) -> tuple[Judge, dict[str, object]]:
    """Train on texts cut to several lengths, so that short texts are judged as well as can be.

    Args:
        tokenizer: the policy's; no special tokens are added.
        train: labelled texts that neither the reward nor any method has seen.
        held_out: texts to report the accuracy on.
        lengths: every text is read once for each, cut to that many tokens.
        seed: of the order of the texts.
        least_steps: of the optimizer, where the texts are few.

    Returns:
        (the judge, on CPU, {"accuracy": {"<n> tokens": share}, "trained_on": texts, "held_out": texts}).

    Raises:
        GradeError: `train` lacks a class, or `held_out` is empty.
    """
    if len({example.label for example in train}) < 2 or not held_out:
        raise GradeError(
            f"the judge has {len(train)} reviews to learn from and {len(held_out)} to be tested on: it needs both "
            "classes and a test. Leave it more of the training data: lower task.policy_examples."
        )
    lengths = sorted(set(lengths))
    rows, labels = _encode(tokenizer, train)
    judge = Judge()
    _fit(judge, [row[:n] for n in lengths for row in rows], labels.repeat(len(lengths)), seed, least_steps)
    rows, labels = _encode(tokenizer, held_out)
    accuracy = {
        f"{n} tokens": ((judge.probability([row[:n] for row in rows]) > 0.5) == (labels == 1)).float().mean().item()
        for n in lengths
    }
    return judge, {"accuracy": accuracy, "trained_on": len(train), "held_out": len(held_out)}


def _encode(tokenizer: Any, examples: Sequence[Example]) -> tuple[list[list[int]], Tensor]:
    """Token ids of whole texts and labels float32 [N]."""
    rows = encode(tokenizer, [e.text for e in examples], None, special_tokens=False)
    return rows, torch.tensor([float(e.label or 0) for e in examples])


def _fit(judge: Judge, rows: Sequence[Sequence[int]], labels: Tensor, seed: int, least_steps: int) -> None:
    """Minimise cross-entropy; the early stop is the regulariser."""
    buckets, counts = ngrams(rows)
    texts = buckets.split(counts.tolist())
    optimizer = torch.optim.AdamW(judge.parameters(), lr=_LEARNING_RATE, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(seed)
    epochs = max(_EPOCHS, -(-least_steps * _BATCH // len(rows)))
    for _ in range(epochs):
        for batch in torch.randperm(len(rows), generator=generator).split(_BATCH):
            log_odds = judge(torch.cat([texts[i] for i in batch]), counts[batch])
            loss = binary_cross_entropy_with_logits(log_odds, labels[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()


def ngrams(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """The distinct buckets of each row's unigrams and bigrams: int64 [total], and how many a row has: int64 [B]."""
    ids = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
    row = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(r) for r in rows], dtype=torch.int64))
    hashed = _mix(ids)
    pairs = _mix((hashed[:-1] + ids[1:] + _PAIR) & _MASK)
    inside = row[1:] == row[:-1]
    keys = torch.cat([row * BUCKETS + hashed % BUCKETS, (row[1:] * BUCKETS + pairs % BUCKETS)[inside]]).unique()
    return keys % BUCKETS, torch.bincount(keys // BUCKETS, minlength=len(rows))


def _mix(x: Tensor) -> Tensor:
    """A fixed hash of integers below 2**31 to integers below 2**31."""
    x = (x * 0x9E3779B1) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x85EBCA6B) & _MASK
    return x ^ (x >> 13)
