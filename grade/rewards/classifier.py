"""Classifiers of transformers as rewards: finding and checking them, and reading them on soft tokens.

Any decoder classifier with the policy's vocabulary will do; its embeddings are rows of its own table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from grade.errors import GradeError
from grade.model.fingerprint import model_digest
from grade.model.passes import BasePass, accumulation_dtype
from grade.model.policy import Policy
from grade.model.pretrained import Pretrained, context_of
from grade.rewards.base import DifferentiableReward, EmbeddingTable
from grade.rollout import Rollout


class ClassifierReward(DifferentiableReward):
    """A transformers sequence classifier over the policy's vocabulary, read at the last real token.

    What an output means is the model's `problem_type`: classes that exclude each other (a softmax; the default), each a
    question of its own (multi_label_classification, a sigmoid), or numbers (regression, used as they are).

    Args:
        model: decoder with a `score` layer on its last hidden state; frozen here.
        label: class index that is the reward; None for a model with a single output.
        reads: "prompt+response" or "response".
        name: reward.model, the folder or hub name it was loaded from.
    """

    _KNOWN_OTHERWISE = DifferentiableReward._KNOWN_OTHERWISE | {"name", "table"}

    def __init__(
        self, model: PreTrainedModel, label: int | None, reads: str = "prompt+response", name: str | None = None
    ):
        self.model, self.label, self.reads, self.name = model.requires_grad_(False).eval(), label, reads, name
        self.modules = [model]
        self.table = EmbeddingTable(model.get_input_embeddings().weight.detach(), _module_scale(model))
        self.tables = (self.table,)
        self._read, what = reading(model.config, label)
        self.raises = what + ("" if name is None else f" of reward.model={name}")

    def value(
        self,
        rollout: Rollout,
        base: BasePass | None,
        fed: Sequence[Tensor] = (),
        *,
        activation_checkpointing: bool = False,
    ) -> Tensor:
        (x,), mask = fed, rollout.mask
        if self.reads == "prompt+response":
            prompt = nn.functional.embedding(rollout.prompt_ids, self.table.rows) * self.table.scale
            x = torch.cat([prompt, x.to(prompt.dtype)], dim=1)
            mask = torch.cat([rollout.prompt_mask, mask], dim=1)
        logits = self._logits(x, mask)
        return self._read(logits.to(accumulation_dtype(logits)))

    def identity(self) -> str:
        return self._with_source(model_digest(self.name or self.model.name_or_path, self.model))

    def _logits(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, T, d_r] embeddings and [B, T] bool -> [B, labels], read at the last real token."""
        positions = (mask.long().cumsum(1) - 1).clamp_min(0)
        hidden = self.model.base_model(
            inputs_embeds=x, attention_mask=mask.long(), position_ids=positions, use_cache=False
        ).last_hidden_state
        last = mask.shape[1] - 1 - mask.flip(1).long().argmax(1)  # [B], position of the last real token
        return self.model.score(hidden[torch.arange(len(hidden), device=last.device), last])


def reading(config: PretrainedConfig, label: int | None) -> tuple[Callable[[Tensor], Tensor], str]:
    """How a classifier's outputs [B, labels] become a reward [B], and what that is, in words.

    Args:
        label: class index; None for a model with a single output.
    """
    kind = config.problem_type
    chosen = "" if label is None else f" of the class {config.id2label[label]!r} among {list(config.id2label.values())}"
    if kind == "multi_label_classification":
        return lambda logits: logits[:, label or 0].sigmoid(), f"the probability (by sigmoid){chosen}"
    if label is None or kind == "regression":
        return lambda logits: logits[:, label or 0], f"the output{chosen}"
    return lambda logits: logits.softmax(-1)[:, label], f"the probability (by softmax){chosen}"


def _module_scale(model: PreTrainedModel) -> float:
    """Factor between a classifier's embedding module and its table (Gemma scales inside the module)."""
    module = model.get_input_embeddings()
    ids = torch.arange(2, 10, device=module.weight.device)
    with torch.no_grad():
        out, rows = module(ids).float(), module.weight[ids].float()
        scale = ((out * rows).sum() / rows.square().sum()).item()
        if not torch.allclose(out, rows * scale, rtol=2e-2, atol=1e-6):
            raise GradeError(f"reward.model: {type(model).__name__} does more than scale its embedding table.")
    return 1.0 if abs(scale - 1) < 1e-3 else scale


def check_same_vocabulary(name: str, theirs: dict[str, int], policy_vocabulary: dict[str, int]) -> None:
    """Refuse a reward model whose token ids mean other tokens than the policy's.

    Raises:
        GradeError: with the first difference.
    """
    if theirs == policy_vocabulary:
        return
    differing = sorted(t for t in policy_vocabulary.keys() | theirs.keys() if theirs.get(t) != policy_vocabulary.get(t))
    example = differing[0]
    raise GradeError(
        f"reward.model={name}: its vocabulary ({len(theirs)} tokens) is not the policy's ({len(policy_vocabulary)} "
        f"tokens): {len(differing)} tokens differ, for example {example!r} has id {theirs.get(example)} there and "
        f"{policy_vocabulary.get(example)} here. Soft tokens mix rows of the reward's own embedding table, so every "
        "id must mean the same token. Choose a classifier with the policy's tokenizer; or set reward.bridge to "
        "retokenize, which scores the written text without a gradient, for methods that only need the reward's value; "
        "or leave reward.model null."
    )


def check_classifier(
    name: str, policy_tokenizer: PreTrainedTokenizerBase, *, judged: int, positive_label: str | None
) -> tuple[Pretrained, PretrainedConfig]:
    """The classifier's source and config, if it exists, has the policy's vocabulary, can read `judged` tokens and says
    which class to raise. Reads no weights.

    Raises:
        GradeError: not found, other vocabulary, too short a context, or no such label.
    """
    source = Pretrained("reward.model", name)
    config = source.config()
    check_same_vocabulary(name, source.tokenizer().get_vocab(), policy_tokenizer.get_vocab())
    context = context_of(config)
    if context is not None and judged > context:
        raise GradeError(
            f"reward.model={name}: its context is {context} tokens, and it would judge texts of up to {judged} "
            "(generation.max_new_tokens, and task.prompt_max_tokens where reward.input is prompt+response). Lower one "
            "of them, or choose another classifier."
        )
    if any("SequenceClassification" in architecture for architecture in config.architectures or []):
        positive_class(name, config.id2label, positive_label)  # what is no classifier is told by its weights
    return source, config


def load_classifier(
    name: str, policy: Policy, *, positive_label: str | None, reads: str, judged: int
) -> ClassifierReward:
    """A hub or local classifier as a reward; its vocabulary is checked before its weights are read.

    Args:
        judged: most tokens that it will read at once.

    Raises:
        GradeError: not found, other vocabulary, too short a context, no trained score layer on the last hidden state,
            or no such label.
    """
    source, config = check_classifier(name, policy.tokenizer, judged=judged, positive_label=positive_label)
    model, found = source.model(AutoModelForSequenceClassification, dtype=policy.dtype, output_loading_info=True)
    if not isinstance(getattr(model, "score", None), nn.Linear) or config.is_encoder_decoder:
        raise GradeError(
            f"reward.model={name}: {type(model).__name__} has no `score` layer on its last hidden state. Rewards are "
            "read at the last real token, which needs a decoder classifier such as LlamaForSequenceClassification."
        )
    if any(key.startswith("score.") for key in found["missing_keys"]):
        raise GradeError(
            f"reward.model={name}: its files hold no `score` layer, so transformers drew a random one. It is a "
            "language model, not a trained classifier: choose one that is, or leave reward.model null."
        )
    if found["missing_keys"]:
        raise GradeError(
            f"reward.model={name}: its files lack {len(found['missing_keys'])} of the model's tensors (such as "
            f"{min(found['missing_keys'])}), which transformers fills with random numbers. Name a complete model."
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < policy.vocab_size:
        raise GradeError(
            f"reward.model={name}: its embedding table has {rows} rows, the policy's {policy.vocab_size}. "
            "Resize it (model.resize_token_embeddings) and save it again."
        )
    label = positive_class(name, config.id2label, positive_label)
    return ClassifierReward(model.to(policy.device), label, reads, name)


def positive_class(name: str, id2label: dict[int, str], wanted: str | None) -> int | None:
    """Index of the class to raise: the named one, or else the one called positive. None: there is one output only.

    Raises:
        GradeError: there is no such class, or which one is meant is not clear.
    """
    labels = list(id2label.values())
    if wanted is None and len(labels) == 1:
        return None
    for candidate in ("positive", "pos") if wanted is None else (wanted,):
        exact = [int(index) for index, label in id2label.items() if str(label) == candidate]
        found = exact or [int(index) for index, label in id2label.items() if str(label).lower() == candidate.lower()]
        if len(found) == 1:
            return None if len(labels) == 1 else found[0]
    if wanted is None:
        raise GradeError(
            f"reward.positive_label is not set and {name} has the labels {labels}, none of which is called positive: "
            "name the one to raise."
        )
    raise GradeError(f"reward.positive_label={wanted}: {name} has the labels {labels}. Name one of them.")
