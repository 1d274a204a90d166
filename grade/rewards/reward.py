"""Differentiable rewards on soft tokens, read through the policy's vocabulary.

`SharedReward` is a small head on the frozen base's own hidden states: no second model, and the reference's forward
and backward serve it too. `ClassifierReward` is any decoder classifier of transformers with the policy's vocabulary
and its own embedding table. Both pool by position, so padding and whatever follows the end of a response never
counts, and both give one number per response, in [0, 1] where it is a probability.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from grade.errors import GradeError
from grade.model.passes import BasePass, accumulation_dtype, fed_embeddings
from grade.model.policy import Policy
from grade.model.pretrained import Pretrained, context_of
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


def reward_inputs(reward: Reward, rollout: Rollout) -> Tensor | None:
    """[B, S, d_r] response embeddings for a reward that has a pass of its own, else None."""
    if not reward.differentiable or reward.shares_base_pass:
        return None
    return fed_embeddings(rollout, reward.table, reward.embedding_scale)


def reward_of(
    reward: Reward, rollout: Rollout, base: BasePass, x: Tensor | None, *, checkpoint: bool = False
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

    What an output means is the model's `problem_type`: classes that exclude each other (a softmax; the default), each a
    question of its own (multi_label_classification, a sigmoid), or numbers (regression, used as they are).

    Args:
        model: decoder with a `score` layer on its last hidden state.
        label: class index that is the reward; None for a model with a single output.
        reads: "prompt+response" or "response".

    Attributes:
        raises: what a higher reward means, in words.
    """

    differentiable, shares_base_pass = True, False

    def __init__(self, model, label: int | None, reads: str = "prompt+response"):
        self.model, self.label, self.reads = model.requires_grad_(False).eval(), label, reads
        self.table = model.get_input_embeddings().weight.detach()
        self.embedding_scale = _module_scale(model)
        kind, labels = model.config.problem_type, list(model.config.id2label.values())
        if kind == "multi_label_classification":
            self._value, what = lambda logits: logits[:, label or 0].sigmoid(), "the probability (by sigmoid)"
        elif label is None or kind == "regression":
            self._value, what = lambda logits: logits[:, label or 0], "the output"
        else:
            self._value, what = lambda logits: logits.softmax(-1)[:, label], "the probability (by softmax)"
        chosen = "" if label is None else f" of the class {model.config.id2label[label]!r} among {labels}"
        self.raises = f"{what}{chosen}"

    def from_base(self, base: BasePass, mask: Tensor) -> Tensor:
        raise TypeError("a classifier has features of its own: use from_embeddings")

    def from_embeddings(self, rollout: Rollout, x: Tensor, *, checkpoint: bool = False) -> Tensor:
        mask = rollout.mask
        if self.reads == "prompt+response":
            prompt = nn.functional.embedding(rollout.prompt_ids, self.table) * self.embedding_scale
            x = torch.cat([prompt, x.to(prompt.dtype)], dim=1)
            mask = torch.cat([rollout.prompt_mask, mask], dim=1)
        logits = self._logits(x, mask)
        return self._value(logits.to(accumulation_dtype(logits)))

    def _logits(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, T, d_r] embeddings and [B, T] bool -> [B, labels], read at the last real token."""
        positions = (mask.long().cumsum(1) - 1).clamp_min(0)
        hidden = self.model.base_model(
            inputs_embeds=x, attention_mask=mask.long(), position_ids=positions, use_cache=False
        ).last_hidden_state
        last = mask.shape[1] - 1 - mask.flip(1).long().argmax(1)  # [B], position of the last real token
        return self.model.score(hidden[torch.arange(len(hidden), device=last.device), last])


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
        "id must mean the same token. Choose a classifier with the policy's tokenizer, or leave reward.model null."
    )


def check_classifier(name: str, policy_tokenizer, *, judged: int, positive_label: str | None):
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
    from transformers import AutoModelForSequenceClassification

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
    reward = ClassifierReward(model.to(policy.device), label, reads)
    reward.raises = f"{reward.raises} of reward.model={name}"
    return reward


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
