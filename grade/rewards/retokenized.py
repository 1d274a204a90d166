"""A classifier of any vocabulary as a function of the text (reward.bridge: retokenize), without a gradient.

Encoders such as BERT serve as well as decoders: the text is written out by the policy's tokenizer, read by the
classifier's own, and scored as its model card says.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from grade.errors import GradeError
from grade.model.fingerprint import model_digest, tokenizer_digest
from grade.model.passes import accumulation_dtype
from grade.model.policy import Policy
from grade.model.pretrained import Pretrained, context_of
from grade.rewards.base import RewardFunction
from grade.rewards.classifier import positive_class, reading
from grade.rollout import Rollout

_BATCH = 32
"""Texts that it reads together."""


class RetokenizedReward(RewardFunction):
    """A transformers sequence classifier that reads texts.

    A text longer than its context is cut: where it reads prompt and response at its beginning, so that the response
    stays, and where it reads the response alone at its end.

    Args:
        tokenizer: the classifier's own.
        policy_tokenizer: that the responses are written out with, without special tokens.
        label: class index that is the reward; None for a model with a single output.
        reads: "prompt+response" or "response".
        name: reward.model, the folder or hub name it was loaded from.
    """

    _KNOWN_OTHERWISE = RewardFunction._KNOWN_OTHERWISE | {"name"}

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        policy_tokenizer: PreTrainedTokenizerBase,
        label: int | None,
        reads: str = "prompt+response",
        name: str | None = None,
    ):
        self.model, self.tokenizer = model.requires_grad_(False).eval(), tokenizer
        self.policy_tokenizer, self.reads, self.name, self.modules = policy_tokenizer, reads, name, [model]
        tokenizer.truncation_side = "left" if reads == "prompt+response" else "right"
        tokenizer.padding_side = "right"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        # A tokenizer that knows no limit has a very large one; another leaves out positions that are not for texts.
        self.longest = min(tokenizer.model_max_length, context_of(model.config) or tokenizer.model_max_length)
        # Many tokenizers number a text's parts, and few models have embeddings for that.
        parts = ["token_type_ids"] if hasattr(model.config, "type_vocab_size") else []
        self.names = ["input_ids", "attention_mask", *parts]
        self._read, what = reading(model.config, label)
        self.raises = f"{what}" + ("" if name is None else f" of reward.model={name}") + ", without a gradient"

    @torch.no_grad()
    def score(self, rollout: Rollout) -> Tensor:
        texts = self._texts(rollout)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # equal lengths together: little padding
        out = torch.empty(len(texts), dtype=torch.float32, device=rollout.tokens.device)
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            inputs = self.tokenizer([texts[i] for i in rows], return_tensors="pt", padding=True, **self._cut())
            read = {name: inputs[name].to(self.model.device) for name in self.names if name in inputs}
            logits = self.model(**read).logits
            out[rows] = self._read(logits.to(accumulation_dtype(logits))).to(out)
        return out

    def details(self, rollout: Rollout, values: Tensor) -> dict[str, Tensor]:
        """Whether a text was cut to the classifier's context, as float32."""
        whole = self.tokenizer(self._texts(rollout), truncation=False, verbose=False)["input_ids"]
        return {"reward_truncated": torch.tensor([float(len(ids) > self.longest) for ids in whole])}

    def in_trial(self) -> RetokenizedReward:
        """Itself: what its model needs of memory counts."""
        return self

    def identity(self) -> str:
        model = model_digest(self.name or self.model.name_or_path, self.model)
        return self._with_source(f"{model} {self.reads} retokenized {tokenizer_digest(self.tokenizer)}")

    def _texts(self, rollout: Rollout) -> list[str]:
        ids = rollout.real_tokens()
        if self.reads == "prompt+response":
            ids = [prompt + row for prompt, row in zip(rollout.real_prompts(), ids, strict=True)]
        # A batch of nothing but empty texts would have no token to read.
        return [self.policy_tokenizer.decode(row, skip_special_tokens=True) or self.tokenizer.pad_token for row in ids]

    def _cut(self) -> dict[str, object]:
        return {"truncation": True, "max_length": self.longest} if self.longest < 10**9 else {}


def check_retokenized(name: str, *, positive_label: str | None) -> Pretrained:
    """The classifier's source, if it exists, has a tokenizer and says which class to raise. Reads no weights.

    Raises:
        GradeError: not found, or no such label.
    """
    source = Pretrained("reward.model", name)
    config = source.config()
    source.tokenizer()
    if any("SequenceClassification" in architecture for architecture in config.architectures or []):
        positive_class(name, config.id2label, positive_label)  # what is no classifier is told by its weights
    return source


def load_retokenized(name: str, policy: Policy, *, positive_label: str | None, reads: str) -> RetokenizedReward:
    """A hub or local classifier that scores texts.

    Raises:
        GradeError: not found, no trained classifier, no token to pad with, or no such label.
    """
    source = check_retokenized(name, positive_label=positive_label)
    tokenizer = source.tokenizer()
    model, found = source.model(AutoModelForSequenceClassification, dtype=policy.dtype, output_loading_info=True)
    if found["missing_keys"]:
        raise GradeError(
            f"reward.model={name}: its files lack {len(found['missing_keys'])} of the classifier's tensors (such as "
            f"{min(found['missing_keys'])}), which transformers fills with random numbers. Name a trained classifier."
        )
    if tokenizer.pad_token_id is None and tokenizer.eos_token is None and tokenizer.unk_token is None:
        raise GradeError(f"reward.model={name}: its tokenizer has no token to pad with. Save it with a pad_token.")
    label = positive_class(name, model.config.id2label, positive_label)
    return RetokenizedReward(model.to(policy.device), tokenizer, policy.tokenizer, label, reads, name)
