"""Differentiable rewards on soft tokens, read through the policy's vocabulary.

`SharedReward` is a small head on the frozen base's own hidden states: no second model, and the reference's forward
and backward serve it too. `ClassifierReward` is any decoder classifier of transformers with the policy's vocabulary
and its own embedding table. Both pool by position, so padding and whatever follows the end of a response never
counts, and both give one number per response, in [0, 1] where it is a probability.
"""

from __future__ import annotations

from typing import Dict, Optional, Protocol

import torch
from torch import Tensor, nn

from grade.errors import GradeError, reason_of
from grade.model import Policy
from grade.passes import BasePass, accumulation_dtype, fed_embeddings
from grade.rollout import Rollout


class Reward(Protocol):
    """What methods and evaluation ask of a reward that can be differentiated.

    A reward that cannot (`differentiable` False) needs `from_tokens(rollout) -> [B]` instead of the rest. Either kind
    may have `prefix_scores(rollout, base) -> [B, 1 + S]`, the reward of the prompt alone and after every token, and
    `details(rollout, scores) -> {name: [B]}`, further measures that evaluation averages.

    Attributes:
        differentiable: whether gradients reach the response's embeddings.
        shares_base_pass: its features are those of the reference's pass.
        table: [V, d_r], the embedding table its inputs come from; `embedding_scale` multiplies the rows.
    """

    differentiable: bool
    shares_base_pass: bool
    table: Tensor
    embedding_scale: float

    def from_base(self, base: BasePass, mask: Tensor) -> Tensor:
        """[B] float32 rewards from a base pass; `mask` [B, S] bool are the real tokens."""

    def from_embeddings(self, rollout: Rollout, x: Tensor, *, checkpoint: bool = False) -> Tensor:
        """[B] float32 rewards from response embeddings `x` [B, S, d_r] in this reward's own table."""


def reward_inputs(reward: Reward, rollout: Rollout) -> Optional[Tensor]:
    """[B, S, d_r] response embeddings for a reward that has a pass of its own, else None."""
    if not reward.differentiable or reward.shares_base_pass:
        return None
    return fed_embeddings(rollout, reward.table, reward.embedding_scale)


def reward_of(
    reward: Reward, rollout: Rollout, base: BasePass, x: Optional[Tensor], *, checkpoint: bool = False
) -> Tensor:
    """[B] float32 rewards of any kind; `x` as `reward_inputs` gives it, gradients flow to it or to the base's input."""
    if not reward.differentiable:
        return reward.from_tokens(rollout)
    if reward.shares_base_pass:
        return reward.from_base(base, rollout.mask)
    return reward.from_embeddings(rollout, x, checkpoint=checkpoint)


class RewardHead(nn.Module):
    """Linear-Tanh-Linear on pooled features, in float32: [B, d] -> [B, 2] logits (negative, positive)."""

    def __init__(self, feature_size: int, hidden_size: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(feature_size, hidden_size), nn.Tanh(), nn.Linear(hidden_size, 2))

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features.to(self.layers[0].weight.dtype))

    def probability(self, features: Tensor) -> Tensor:
        """[B] probability of the positive class."""
        return self(features).softmax(-1)[..., 1]


class SharedReward:
    """A trained head on the frozen base model that the policy's adapter sits on.

    Args:
        policy: owner of the base weights.
        head: trained `RewardHead`; frozen here.
        reads: "prompt+response" or "response".
    """

    differentiable = True

    def __init__(self, policy: Policy, head: RewardHead, reads: str = "prompt+response"):
        self.policy, self.reads = policy, reads
        self.head = head.to(policy.device).requires_grad_(False).eval()
        self.shares_base_pass = reads == "prompt+response"
        self.table, self.embedding_scale = policy.embedding, policy.embedding_scale

    def from_base(self, base: BasePass, mask: Tensor) -> Tensor:
        states = base.response.to(accumulation_dtype(base.response))
        total = base.prompt_sum + (states * mask[..., None]).sum(1)
        return self.head.probability(total / (base.prompt_count + mask.sum(1))[:, None])

    def from_embeddings(self, rollout: Rollout, x: Tensor, *, checkpoint: bool = False) -> Tensor:
        """The response by itself, from position 0."""
        with self.policy.state(adapters=False, checkpoint=checkpoint):
            hidden = self.policy.hidden(x, rollout.mask)
        return self.head.probability(mean_pool(hidden, rollout.mask))

    @torch.no_grad()
    def prefix_scores(self, rollout: Rollout, base: BasePass) -> Tensor:
        """[B, 1 + S] float32, the reward of the prompt alone and after every token; padding repeats the last.

        The base is causal, so the mean over the states up to a token is what the reward would read there. A reward
        that reads the response alone has nothing to read before it: it starts from an empty mean.
        """
        if self.shares_base_pass:
            states, sums, counts = base.response, base.prompt_sum, base.prompt_count
        else:
            with self.policy.state(adapters=False):
                states = self.policy.hidden(reward_inputs(self, rollout), rollout.mask)
            sums, counts = torch.zeros_like(base.prompt_sum), torch.zeros_like(base.prompt_count)
        states = states.to(accumulation_dtype(states)) * rollout.mask[..., None]
        sums = torch.cat([sums[:, None], states], dim=1).cumsum(1)
        counts = torch.cat([counts[:, None], rollout.mask.long()], dim=1).cumsum(1)
        return self.head.probability(sums / counts.clamp_min(1)[..., None])


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """[B, T, d] and [B, T] bool -> [B, d], the mean over real tokens, in float32 (float64 for float64)."""
    return (hidden.to(accumulation_dtype(hidden)) * mask[..., None]).sum(1) / mask.sum(1).clamp_min(1)[:, None]


class ClassifierReward:
    """A transformers sequence classifier over the policy's vocabulary, read at the last real token.

    Args:
        model: decoder with a `score` layer on its last hidden state.
        label: class index whose probability is the reward; None for a model with a single output, used as it is.
        reads: "prompt+response" or "response".
    """

    differentiable, shares_base_pass = True, False

    def __init__(self, model, label: Optional[int], reads: str = "prompt+response"):
        self.model, self.label, self.reads = model.requires_grad_(False).eval(), label, reads
        self.table = model.get_input_embeddings().weight.detach()
        self.embedding_scale = _module_scale(model)

    def from_base(self, base: BasePass, mask: Tensor) -> Tensor:
        raise TypeError("a classifier has features of its own: use from_embeddings")

    def from_embeddings(self, rollout: Rollout, x: Tensor, *, checkpoint: bool = False) -> Tensor:
        mask = rollout.mask
        if self.reads == "prompt+response":
            prompt = nn.functional.embedding(rollout.prompt_ids, self.table) * self.embedding_scale
            x = torch.cat([prompt, x.to(prompt.dtype)], dim=1)
            mask = torch.cat([rollout.prompt_mask, mask], dim=1)
        positions = (mask.long().cumsum(1) - 1).clamp_min(0)
        hidden = self.model.base_model(
            inputs_embeds=x, attention_mask=mask.long(), position_ids=positions, use_cache=False
        ).last_hidden_state
        last = mask.shape[1] - 1 - mask.flip(1).long().argmax(1)  # [B], position of the last real token
        logits = self.model.score(hidden[torch.arange(len(hidden), device=last.device), last])
        logits = logits.to(accumulation_dtype(logits))
        return logits[:, 0] if self.label is None else logits.softmax(-1)[:, self.label]


def _module_scale(model) -> float:
    """Factor between a classifier's embedding module and its table (Gemma scales inside the module)."""
    module = model.get_input_embeddings()
    ids = torch.arange(2, 10, device=module.weight.device)
    with torch.no_grad():
        out, rows = module(ids).float(), module.weight[ids].float()
        scale = ((out * rows).sum() / rows.square().sum()).item()
        if not torch.allclose(out, rows * scale, rtol=2e-2, atol=1e-6):
            raise GradeError(f"reward.model: {type(model).__name__} does more than scale its embedding table.")
    return 1.0 if abs(scale - 1) < 1e-3 else scale


def check_same_vocabulary(name: str, theirs: Dict[str, int], policy_vocabulary: Dict[str, int]) -> None:
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
        "id must mean the same token. Choose a classifier with the policy's tokenizer, or leave reward.model null."
    )


def check_classifier(name: str, policy_tokenizer):
    """The classifier's config, if it exists and has the policy's vocabulary. Reads no weights.

    Raises:
        GradeError: not found, or other vocabulary.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise _not_loadable(name, error) from error
    check_same_vocabulary(name, tokenizer.get_vocab(), policy_tokenizer.get_vocab())
    return config


def load_classifier(name: str, policy: Policy, *, positive_label: Optional[str], reads: str) -> ClassifierReward:
    """A hub or local classifier as a reward; its vocabulary is checked before its weights are read.

    Raises:
        GradeError: not found, other vocabulary, no trained score layer on the last hidden state, or no such label.
    """
    from transformers import AutoModelForSequenceClassification

    config = check_classifier(name, policy.tokenizer)
    label = None if config.num_labels == 1 else positive_class(name, config.id2label, positive_label)
    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=policy.dtype, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise _not_loadable(name, error) from error
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
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < policy.vocab_size:
        raise GradeError(
            f"reward.model={name}: its embedding table has {rows} rows, the policy's {policy.vocab_size}. "
            "Resize it (model.resize_token_embeddings) and save it again."
        )
    return ClassifierReward(model.to(policy.device), label, reads)


def _not_loadable(name: str, error: Exception) -> GradeError:
    return GradeError(f"reward.model={name} cannot be loaded: {reason_of(error)}")


def positive_class(name: str, id2label: Dict[int, str], wanted: Optional[str]) -> int:
    """Index of the class to raise: the named one, or one called positive, or the last of two.

    Raises:
        GradeError: there is no such class, or which one is meant is not clear.
    """
    labels = {str(label).lower(): int(index) for index, label in id2label.items()}
    if wanted is not None:
        if wanted.lower() not in labels:
            raise GradeError(f"reward.positive_label={wanted}: {name} has the labels {list(id2label.values())}.")
        return labels[wanted.lower()]
    for candidate in ("positive", "pos"):
        if candidate in labels:
            return labels[candidate]
    if len(labels) == 2:
        return max(labels.values())
    raise GradeError(f"reward.positive_label is not set and {name} has the labels {list(id2label.values())}: name one.")
