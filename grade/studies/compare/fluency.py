"""How well a response reads to a language model that is neither the policy nor its base, in nats per byte.

Perplexity under the base is a function of the policy's own tokens and of the model that it was kept close to. Here the
text of prompt and response is read by another model in that model's own tokens, and what it costs, -log p(response |
prompt), is divided by the bytes (UTF-8) of the response: a byte means the same to every vocabulary, as a token does not
(bits per byte are the same measure in another unit; L. Gao et al., "The Pile", 2020, section 3.1). The other model is
compare.fluency_model, or trigrams (`grade.studies.compare.trigram`) of the texts that the judge learns from, which
neither the reward nor any method has seen.

Special tokens are left out of a text, so whether and how a response ends is not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from os.path import commonprefix
from typing import Any, Protocol

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


class Reader(Protocol):
    """A language model of texts."""

    def nats(self, prompts: Sequence[str], texts: Sequence[str]) -> list[float]:
        """-log p of what each text adds to its prompt, nats.

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

    def nats(self, prompts: Sequence[str], texts: Sequence[str]) -> list[float]:
        given, whole = (encode(self.tokenizer, rows, None, special_tokens=False) for rows in (prompts, texts))
        found = self.trigrams.logprobs(whole)
        return [-float(row[shared(a, b) :].sum()) for a, b, row in zip(given, whole, found, strict=True)]


class ModelReader:
    """A causal language model with a tokenizer of its own.

    Args:
        opening: id that a text begins with where the tokenizer puts none in front: nothing else would say how likely
            a first token is.
        name: of the model, for messages.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, opening: int, name: str):
        self.model, self.tokenizer = model.requires_grad_(False).eval(), tokenizer
        self.opening, self.name, self.longest = opening, name, context_of(model.config)

    @torch.no_grad()
    def nats(self, prompts: Sequence[str], texts: Sequence[str]) -> list[float]:
        given, whole = (self._encoded(rows) for rows in (prompts, texts))
        starts = [max(shared(a, b), 1) for a, b in zip(given, whole, strict=True)]
        rows = [self._fitting(row, start) for row, start in zip(whole, starts, strict=True)]
        costs = [0.0] * len(rows)
        order = sorted((i for i, (row, start) in enumerate(rows) if start < len(row)), key=lambda i: len(rows[i][0]))
        while order:
            longest = len(rows[order[-1]][0])
            size = max(_LOGITS_BYTES // (4 * longest * self.model.config.get_text_config().vocab_size), 1)
            batch, order = order[-size:], order[:-size]
            for i, cost in zip(batch, self._costs([rows[i] for i in batch], longest), strict=True):
                costs[i] = cost
        return costs

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        rows = encode(self.tokenizer, texts, None)
        own = encode(self.tokenizer, texts, None, special_tokens=False)
        return [row if len(row) > len(alone) else [self.opening, *alone] for row, alone in zip(rows, own, strict=True)]

    def _fitting(self, row: list[int], start: int) -> tuple[list[int], int]:
        """The end of a row that the context holds, and where its response starts: of a prompt, the end counts most."""
        excess = max(len(row) - (self.longest or len(row)), 0)
        if excess > start - 1:
            raise GradeError(
                f"{_SETTING}={self.name}: a response has {len(row) - start} of its tokens, and its context is "
                f"{self.longest}. Name a model with a longer context."
            )
        return row[excess:], start - excess

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


def fluency(reader: Reader, policy: Policy, rollout: Rollout) -> dict[str, Tensor]:
    """`NATS` and `BYTES` of every response, float64 [B]."""
    whole = torch.cat([rollout.prompt_ids, rollout.tokens], dim=1)
    mask = torch.cat([rollout.prompt_mask, rollout.mask], dim=1)
    prompts = [text_of(policy, *row) for row in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
    texts = [text_of(policy, *row) for row in zip(whole, mask, strict=True)]
    sizes = [max(len(b.encode()) - len(a.encode()), 0) for a, b in zip(prompts, texts, strict=True)]
    return {
        NATS: torch.tensor(reader.nats(prompts, texts), dtype=torch.float64),
        BYTES: torch.tensor(sizes, dtype=torch.float64),
    }


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
    return ModelReader(model.to(device), tokenizer, opening, str(name))


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
