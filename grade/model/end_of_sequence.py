"""Which ids end a response, and what is said when none ever does."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from grade.config import GenerationConfig
from grade.errors import GradeError


def end_ids(causal_lm: PreTrainedModel, tokenizer: Any, vocab_size: int) -> dict[int, list[str]]:
    """Every id that ends a response, in order, with who says so.

    The tokenizer and the generation config (the model's config where that names none) may disagree: a chat model's
    turns end with the one, its documents with the other. Either ends a response.

    Args:
        vocab_size: rows of the model's head.

    Raises:
        GradeError: there is no such id, or one that the model cannot draw.
    """
    generation = getattr(getattr(causal_lm, "generation_config", None), "eos_token_id", None)
    named = {
        "the tokenizer": getattr(tokenizer, "eos_token_id", None),
        **(
            {"the model's config": getattr(causal_lm.config, "eos_token_id", None)}
            if generation is None
            else {"the generation config": generation}
        ),
    }
    found: dict[int, list[str]] = {}
    for source, ids in named.items():
        for token in ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids]:
            if type(token) is not int or not 0 <= token < vocab_size:
                raise GradeError(
                    f"model.name: {source} has the eos_token_id {token!r}, but the model's ids are 0 to "
                    f"{vocab_size - 1}. Correct it in the model's files (config.json, generation_config.json, "
                    "tokenizer_config.json)."
                )
            if source not in found.setdefault(token, []):
                found[token].append(source)
    if not found:
        raise GradeError("model.name: neither the generation config nor the tokenizer names an end-of-sequence token.")
    return dict(sorted(found.items()))


def how_responses_end(generation: GenerationConfig, policy: Any) -> str:
    """For the start of a run: the tokens that end a response."""
    if generation.ignore_eos:
        return "responses have generation.max_new_tokens tokens: nothing ends them earlier (generation.ignore_eos)"
    never = set(policy.suppressed.tolist())
    ends = [
        f"{policy.tokenizer.decode([token], skip_special_tokens=False)!r} (id {token}, of {' and '.join(sources)}"
        + ("; it is never drawn, as the tokenizer does not know it)" if token in never else ")")
        for token, sources in end_ids(policy.causal_lm, policy.tokenizer, policy.vocab_size).items()
    ]
    return f"a response ends with {' or '.join(ends)}"


def warning_without_ends(generation: GenerationConfig, eos_rate: float) -> str | None:
    """For the first evaluation: what it may mean that no response ended by itself; None where some did."""
    if eos_rate > 0 or generation.ignore_eos:
        return None
    return (
        "warning: no response of the first validation ended by itself. If they should, raise "
        f"generation.max_new_tokens (now {generation.max_new_tokens}), or correct the eos_token_id in the "
        "model's files if its turns end with another token; if they need not, set generation.ignore_eos."
    )
