"""How well a response reads to a language model that is neither the policy nor its base, in nats per byte.

Perplexity under the base is a function of the policy's own tokens and of the model that it was kept close to. Here the
text of prompt and response is read by another model in that model's own tokens, and what it costs, -log p(response |
prompt), is divided by the bytes (UTF-8) of the response: a byte means the same to every vocabulary, as a token does not
(bits per byte are the same measure in another unit; L. Gao et al., "The Pile", 2020, section 3.1). The other model is
compare.fluency_model, or trigrams (`grade.studies.compare.trigram`) of the texts that the judge learns from, which
neither the reward nor any method has seen.

Special tokens are left out of a text, so whether and how a response ends is not in it. Where a response is longer in
the reader's tokens than the reader's context, its first tokens are read, as many as fit, and their bytes counted alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from os.path import commonprefix
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from grade.config import Config
from grade.errors import GradeError
from grade.model.fingerprint import model_digest, tokenizer_digest
from grade.model.policy import Policy
from grade.model.pretrained import Pretrained, context_of
from grade.processes import make_accelerator
from grade.rollout import Rollout
from grade.studies.compare.trigram import LARGEST, Trigrams
from grade.tasks.base import Task
from grade.tasks.encoding import encode
from grade.training.evaluation import text_of
from grade_kernels import token_logprob

NATS, BYTES = "fluency_nats", "fluency_bytes"
"""Of a response: what its text costs, and how long it is; the ratio of their means is nats per byte."""
_SETTING = "compare.fluency_model"
_LOGITS_BYTES = 2**28
"""Of the logits of texts that are read together."""


class Cost(NamedTuple):
    """What reading a response costs.

    Attributes:
        nats: -log p of what was read of it.
        size: its bytes (UTF-8).
    """

    nats: float
    size: int


class Reader(Protocol):
    """A language model of texts."""

    def read(self, prompts: Sequence[str], texts: Sequence[str]) -> list[Cost]:
        """What each text adds to its prompt.

        Args:
            prompts: B texts.
            texts: B texts, each a prompt with its response.
        """


class TrigramReader:
    """Trigrams of tokens.

    Args:
        tokenizer: the policy's; it cuts texts as it likes, as a measure per byte does not depend on it.
    """

    def __init__(self, tokenizer: Any, trigrams: Trigrams):
        self.tokenizer, self.trigrams = tokenizer, trigrams

    def read(self, prompts: Sequence[str], texts: Sequence[str]) -> list[Cost]:
        given, whole = (encode(self.tokenizer, rows, None, special_tokens=False) for rows in (prompts, texts))
        found = self.trigrams.logprobs(whole)
        costs = [-float(row[shared(a, b) :].sum()) for a, b, row in zip(given, whole, found, strict=True)]
        return list(map(Cost, costs, map(_added, prompts, texts)))


class ModelReader:
    """A causal language model with a tokenizer of its own.

    Args:
        opening: id that a text begins with where the tokenizer puts none in front: nothing else would say how likely
            a first token is.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, opening: int):
        self.model, self.tokenizer = model.requires_grad_(False).eval(), tokenizer
        self.opening, self.longest = opening, context_of(model.config)

    @torch.no_grad()
    def read(self, prompts: Sequence[str], texts: Sequence[str]) -> list[Cost]:
        given, whole = (self._encoded(rows) for rows in (prompts, texts))
        starts = [max(shared(a, b), 1) for a, b in zip(given, whole, strict=True)]
        spans = [self._fitting(len(row), start) for row, start in zip(whole, starts, strict=True)]
        sizes = [
            _added(prompt, text if end == len(row) else self._beginning(text, row[:end]))
            for prompt, text, row, (_, end) in zip(prompts, texts, whole, spans, strict=True)
        ]
        rows = [(row[first:end], start - first) for row, start, (first, end) in zip(whole, starts, spans, strict=True)]
        costs = [0.0] * len(rows)
        order = sorted((i for i, (row, start) in enumerate(rows) if start < len(row)), key=lambda i: len(rows[i][0]))
        while order:
            longest = len(rows[order[-1]][0])
            size = max(_LOGITS_BYTES // (4 * longest * self.model.config.get_text_config().vocab_size), 1)
            batch, order = order[-size:], order[:-size]
            for i, cost in zip(batch, self._costs([rows[i] for i in batch], longest), strict=True):
                costs[i] = cost
        return list(map(Cost, costs, sizes))

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        rows = encode(self.tokenizer, texts, None)
        own = encode(self.tokenizer, texts, None, special_tokens=False)
        return [row if len(row) > len(alone) else [self.opening, *alone] for row, alone in zip(rows, own, strict=True)]

    def _fitting(self, length: int, start: int) -> tuple[int, int]:
        """The first and the end of what the context holds of a row whose response begins at `start`: the response's
        beginning, at least one token before it, and of the prompt as much of its end as there is room for."""
        longest = self.longest or length
        first = max(min(length - longest, start - 1), 0)
        return first, min(first + longest, length)

    def _beginning(self, text: str, ids: list[int]) -> str:
        """What the first tokens of a text spell, without a character of which they have only a part."""
        said = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        said = said.rstrip("\N{REPLACEMENT CHARACTER}")
        return said if len(said) < len(text) else text

    def _costs(self, rows: Sequence[tuple[list[int], int]], longest: int) -> list[float]:
        """-log p of the tokens of each row from its start on; padding comes after everything that counts."""
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask, counted = torch.zeros_like(ids), torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, (row, start) in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)], counted[i, start : len(row)] = torch.tensor(row), 1, True
        ids, mask, counted = (x.to(self.model.device) for x in (ids, mask, counted))
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        logprob, _ = token_logprob(logits.contiguous(), ids[:, 1:].contiguous())  # [B, T - 1]
        return (-logprob * counted[:, 1:]).double().sum(1).tolist()


def shared(prompt: Sequence[int], whole: Sequence[int]) -> int:
    """How many tokens a text begins with that its prompt has too. A token that joins the prompt's end and the
    response's beginning counts as the response's."""
    return len(commonprefix([list(prompt), list(whole)]))


def _added(prompt: str, text: str) -> int:
    """Bytes that a text adds to its prompt."""
    return max(len(text.encode()) - len(prompt.encode()), 0)


def fluency(reader: Reader, policy: Policy, rollout: Rollout) -> dict[str, Tensor]:
    """`NATS` and `BYTES` of what is read of every response, float64 [B]."""
    whole = torch.cat([rollout.prompt_ids, rollout.tokens], dim=1)
    mask = torch.cat([rollout.prompt_mask, rollout.mask], dim=1)
    prompts = [text_of(policy, *row) for row in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
    texts = [text_of(policy, *row) for row in zip(whole, mask, strict=True)]
    found = torch.tensor(reader.read(prompts, texts), dtype=torch.float64)  # [B, 2]
    return {NATS: found[:, 0], BYTES: found[:, 1]}


# -- loading -------------------------------------------------------------------------------------------------


def load_reader(config: Config, tokenizer: Any, task: Task) -> Reader | None:
    """compare.fluency_model, on the config's device, or trigrams of the judge's texts; None without either.

    Raises:
        GradeError: the model cannot be found or used.
    """
    if config.compare.fluency_model is not None:
        return _load_model(config, make_accelerator(config).device)
    rows = encode(tokenizer, [example.text for example in task.examples("judge")], None, special_tokens=False)
    size = max(tokenizer.get_vocab().values(), default=0) + 1 if rows else 0
    return TrigramReader(tokenizer, Trigrams(rows, size)) if any(rows) and size <= LARGEST else None


def _load_model(config: Config, device: torch.device) -> ModelReader:
    name = config.compare.fluency_model
    source = Pretrained(_SETTING, str(name))
    found, tokenizer = source.config(), source.tokenizer()
    needed, context = config.task.prompt_max_tokens + config.generation.max_new_tokens, context_of(found)
    if context is not None and context < needed:
        raise GradeError(
            f"{_SETTING}={name}: its context is {context} tokens, and prompt and response may have {needed} "
            "(task.prompt_max_tokens + generation.max_new_tokens). Name a model with a longer context."
        )
    opening = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if opening is None:
        raise GradeError(f"{_SETTING}={name}: its tokenizer has no token that a text begins with. Save a bos_token.")
    model, loaded = source.model(
        AutoModelForCausalLM, dtype=getattr(torch, config.model.dtype), output_loading_info=True
    )
    if loaded["missing_keys"]:
        raise GradeError(
            f"{_SETTING}={name}: its files lack {len(loaded['missing_keys'])} of the model's tensors (such as "
            f"{min(loaded['missing_keys'])}), which transformers fills with random numbers. Name a complete model."
        )
    return ModelReader(model.to(device), tokenizer, opening)


def reader_name(config: Config) -> str:
    """What reads the samples, in words."""
    name = config.compare.fluency_model
    return "trigrams (Kneser-Ney) of the judge's texts" if name is None else name


def reader_identity(config: Config, base: str) -> str:
    """What nats per byte depend on beside the judge's texts and the policy's tokenizer, by content.

    Args:
        base: digest of the base model.

    Raises:
        GradeError: compare.fluency_model cannot be used, or is the policy's base.
    """
    name = config.compare.fluency_model
    if name is None:
        return "trigrams"
    reader = _load_model(config, torch.device("cpu"))
    digest = model_digest(name, reader.model)
    if digest == base:
        raise GradeError(
            f"{_SETTING}={name} is the policy's base, whose perplexity is measured anyway: name another model, or null."
        )
    return f"{digest} {tokenizer_digest(reader.tokenizer)}"
