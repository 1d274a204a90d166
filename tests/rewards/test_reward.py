"""Rewards: pooled by position, the same from shared passes and from separate ones, and another model's classifier."""

from __future__ import annotations

import json
import re

import pytest
import torch
from classifiers import PAD, SAME, classifier, save_tokenizer
from published import gradients, published_loss, relative_error
from tiny import CONFIGS, EOS, VOCAB, KeepDouble, tiny_policy, tiny_reward
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
)

from grade.errors import GradeError
from grade.methods.base import kl_weight
from grade.model.passes import base_pass, fed_embeddings
from grade.replay.replay import ReplaySettings, replay
from grade.rewards.classifier import ClassifierReward, check_same_vocabulary, load_classifier, positive_class
from grade.rewards.shared import RewardHead, mean_pool
from grade.rollout import Rollout, pad_prompts
from grade.sampling.draw import Sampling
from grade.sampling.sample import sample

READS = ["prompt+response", "response"]
PROMPTS = [[5, 9, 2], [7, 11, 13, 17, 19], [23]]
# Lengths 4, 2 and 1 of 4; the first has an end token in its middle, as ignore_eos allows.
RESPONSES = [[12, EOS, 30, 41], [22, EOS], [33]]


def rollout_of(responses=RESPONSES, prompts=PROMPTS, *, pad=EOS, wider_prompt=0, wider_response=0, copies=1):
    """A rollout written by hand, with columns of padding beyond what it needs on request."""
    ids, prompt_mask = pad_prompts([p for p in prompts for _ in range(copies)], pad)
    if wider_prompt:
        ids = torch.nn.functional.pad(ids, (wider_prompt, 0), value=pad)
        prompt_mask = torch.nn.functional.pad(prompt_mask, (wider_prompt, 0), value=False)
    width = max(len(r) for r in responses) + wider_response
    tokens = torch.tensor([r + [pad] * (width - len(r)) for r in responses])
    mask = torch.arange(width) < torch.tensor([len(r) for r in responses])[:, None]
    support = torch.stack([tokens, (tokens + 1) % VOCAB], -1)
    rows = torch.arange(len(responses))[:, None] * 100 + torch.arange(width)
    return Rollout(ids, prompt_mask, tokens, mask, support, torch.ones(tokens.shape), rows, samples_per_prompt=copies)


@torch.no_grad()
def value(policy, reward, rollout, prompt_cache=True):
    """[B] rewards, the way replay gets them."""
    x = fed_embeddings(rollout, policy.embedding, policy.embedding_scale)
    return reward.value(rollout, base_pass(policy, rollout, x, prompt_cache=prompt_cache), reward.inputs(rollout))


@torch.no_grad()
def pooled_by_hand(policy, head, prompt, response):
    """Reward of one response by itself: the base's states, without padding, averaged."""
    with policy.state(adapters=False):
        hidden = policy.backbone(input_ids=torch.tensor([prompt + response]), use_cache=False).last_hidden_state[0]
    return head(hidden.mean(0)).softmax(-1)[1]


# -- the shared reward ---------------------------------------------------------------------------------------------


def test_pooling_half_precision_in_float32():
    """A bfloat16 running sum of 1 stops at 256."""
    ones = torch.ones(1, 1000, 2, dtype=torch.bfloat16)
    pooled = mean_pool(ones, torch.ones(1, 1000, dtype=torch.bool))
    assert pooled.dtype == torch.float32 and pooled.tolist() == [[1.0, 1.0]]


def test_head_is_a_two_class_softmax():
    head = RewardHead(4, 8)
    features = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    hidden = torch.tanh(features @ head.layers[0].weight.T + head.layers[0].bias)
    logits = hidden @ head.layers[2].weight.T + head.layers[2].bias
    assert torch.allclose(head.reward(features), torch.sigmoid(logits[:, 1] - logits[:, 0]))
    assert head(features.to(torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("name", CONFIGS)
def test_shared_reward_equals_the_unpadded_average(name, reads):
    with KeepDouble():
        policy = tiny_policy(name, dtype=torch.float64)
        reward = tiny_reward(policy, reads)
        ours = value(policy, reward, rollout_of())
        expected = [
            pooled_by_hand(policy, reward.head, prompt if reads == "prompt+response" else [], response)
            for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
        ]
    assert (ours - torch.stack(expected)).abs().max() < 1e-12
    assert ours.std() > 1e-3


@pytest.mark.parametrize("prompt_cache", [True, False])
@pytest.mark.parametrize("reads", READS)
def test_padding_width_and_what_stands_there_do_not_count(reads, prompt_cache):
    """Also pad equal to EOS: an end token before the end counts, the ones after it do not."""
    with KeepDouble():
        policy = tiny_policy(dtype=torch.float64)
        reward = tiny_reward(policy, reads)
        expected = value(policy, reward, rollout_of(pad=EOS), prompt_cache)
        for rollout in (
            rollout_of(pad=PAD),
            rollout_of(pad=17),
            rollout_of(wider_prompt=3),
            rollout_of(wider_response=4),
            rollout_of(pad=17, wider_prompt=2, wider_response=1),
        ):
            assert (value(policy, reward, rollout, prompt_cache) - expected).abs().max() < 1e-12
        without_eos = value(policy, reward, rollout_of([RESPONSES[0], [22], [33]]), prompt_cache)
    assert (without_eos - expected)[1].abs() > 1e-3  # the end token is part of the response
    assert (without_eos - expected)[[0, 2]].abs().max() < 1e-12


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_prompt_cache_changes_nothing(name):
    """Reward, reference and both gradients, with prompts longer than Gemma-2's window."""
    with KeepDouble():
        policy = tiny_policy(name, dtype=torch.float64)
        reward = tiny_reward(policy)
        prompts = [list(range(4, 13)), *PROMPTS[1:]]
        results = []
        for prompt_cache in (True, False):
            rollout = rollout_of(prompts=prompts)
            x = fed_embeddings(rollout, policy.embedding, policy.embedding_scale).requires_grad_()
            base = base_pass(policy, rollout, x, prompt_cache=prompt_cache)
            rewards, real = reward.value(rollout, base), rollout.mask[..., None]
            outputs = [rewards.sum(), (base.reference * real).square().sum()]
            results.append([rewards, base.reference * real, base.response * real, base.prompt_sum])
            results[-1] += [torch.autograd.grad(y, [x], retain_graph=True)[0] * real for y in outputs]
    # Gemma-2's reward saturates: of terms of 1 a gradient of 1e-4 is left, and of their rounding more.
    for cached, whole in zip(*results, strict=True):
        assert (cached - whole).abs().max() < 1e-8 * whole.abs().max()
        assert whole.abs().max() > 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_samples_of_one_prompt_equal_separate_responses(name):
    responses = [[12, 30], [22, 8, 9, EOS], [33], [40, 41, 42], [50, 51], [4]]
    with KeepDouble(), torch.no_grad():
        policy = tiny_policy(name, dtype=torch.float64)
        together = rollout_of(responses, copies=2)
        base = base_pass(policy, together, fed_embeddings(together, policy.embedding, policy.embedding_scale))
        for i, response in enumerate(responses):
            alone = rollout_of([response], [PROMPTS[i // 2]])
            one = base_pass(policy, alone, fed_embeddings(alone, policy.embedding, policy.embedding_scale))
            n = len(response)
            for field in ("reference", "response"):
                assert (getattr(base, field)[i, :n] - getattr(one, field)[0]).abs().max() < 1e-11, (i, field)
            assert (base.prompt_sum[i] - one.prompt_sum[0]).abs().max() < 1e-11
            assert base.prompt_count[i] == one.prompt_count[0] == len(PROMPTS[i // 2])


# -- a classifier as reward ----------------------------------------------------------------------------------------

CLASSIFIERS = [LlamaConfig, GPT2Config, Gemma2Config]


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("config_class", CLASSIFIERS)
def test_classifier_equals_its_own_forward(config_class, reads):
    """Read at the last real token, positions counted from the first: the same as transformers without padding."""
    with KeepDouble(), torch.no_grad():
        policy = tiny_policy(dtype=torch.float64)
        model = classifier(config_class, dtype=torch.float64)
        reward = ClassifierReward(model, 1, reads)
        ours = value(policy, reward, rollout_of(pad=EOS, wider_prompt=2, wider_response=3))
        expected = []
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
            ids = torch.tensor([prompt + response if reads == "prompt+response" else response])
            expected.append(model(input_ids=ids).logits.softmax(-1)[0, 1])
    assert (ours - torch.stack(expected)).abs().max() < 1e-12
    assert ours.std() > 1e-3


@pytest.mark.parametrize("kind, activation", [(None, lambda x: x), ("multi_label_classification", torch.sigmoid)])
def test_a_single_output_is_a_number_or_by_its_kind_a_probability(kind, activation):
    policy, model = tiny_policy(), classifier(labels=1, problem_type=kind)
    ours = value(policy, ClassifierReward(model, None), rollout_of())
    with torch.no_grad():
        pairs = zip(PROMPTS, RESPONSES, strict=True)
        expected = torch.stack([model(input_ids=torch.tensor([p + r])).logits[0, 0] for p, r in pairs])
    assert torch.allclose(ours, activation(expected), atol=1e-5)
    assert expected.abs().max() > 1  # no probability


def test_embedding_modules_that_do_more_than_scale_are_refused():
    model = classifier()
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: out + 0.5)
    with pytest.raises(GradeError, match="LlamaForSequenceClassification"):
        ClassifierReward(model, 0)


def sampled(policy, *, soft, k, steps=6):
    """A ragged rollout of three prompts."""
    ids, mask = pad_prompts(PROMPTS, policy.pad_id)
    rows, options = torch.arange(3) * 50, dict(max_new_tokens=steps, top_k=k, tau=1.3, soft=soft)
    policy.eos_ids = torch.tensor([], dtype=torch.int64)
    free = sample(policy, ids, mask, Sampling(**options), seed=0, first_rows=rows)
    policy.eos_ids = free.tokens[1, 2:3]
    rollout = sample(policy, ids, mask, Sampling(**options), seed=0, first_rows=rows)
    assert rollout.mask.sum(1).min() < rollout.mask.shape[1]
    return rollout


@pytest.mark.parametrize(
    "config_class, soft, reads",
    [
        (LlamaConfig, False, "prompt+response"),
        (GPT2Config, True, "response"),
        (Gemma2Config, False, "response"),
        (Gemma2Config, True, "prompt+response"),
    ],
    ids=lambda x: x.model_type if isinstance(x, type) else str(x),
)
def test_replay_with_a_classifier_equals_step_by_step_autograd(config_class, soft, reads):
    """Two models are fed the tokens, each from its own table; the gradient is that of the published algorithm."""
    k, kl_coef = 7, 0.2
    with KeepDouble():
        policy = tiny_policy("gpt2" if config_class is GPT2Config else "llama", dtype=torch.float64, unknown=2)
        model = classifier(config_class, dtype=torch.float64)
        reward = ClassifierReward(model, 2, reads)
        rollout = sampled(policy, soft=soft, k=k)
        weight = kl_weight(rollout.mask, "token_mean", kl_coef, int(rollout.mask.sum()), 3)
        settings = ReplaySettings(tau=1.3, max_hops=rollout.tokens.shape[1], hop_tol=0.0)
        result = replay(policy, reward, rollout, settings, reward_weight=weight.new_full((3,), 1 / 3), kl_weight=weight)
        ours = gradients(policy)

        embed = model.get_input_embeddings()

        def reward_fn(prompt, soft_tokens):
            x = soft_tokens @ embed(torch.arange(VOCAB))
            x = torch.cat([embed(prompt), x]) if reads == "prompt+response" else x
            return model(inputs_embeds=x[None]).logits.softmax(-1)[0, 2]

        loss = published_loss(
            policy,
            None,
            rollout,
            tau=1.3,
            k=k,
            soft=soft,
            kl_coef=kl_coef,
            kl_reduction="token_mean",
            reward_fn=reward_fn,
        )
        expected = gradients(policy, loss)
    assert relative_error(ours, expected) < 1e-9
    total = -result.reward.mean() + kl_coef * result.kl.sum() / rollout.mask.sum()
    assert abs(total - loss.item()) < 1e-10


def test_replay_freezes_the_rewards():
    """No parameter of a reward or of the base learns, or even holds a gradient."""
    policy = tiny_policy()
    rollout = sampled(policy, soft=False, k=7)
    shared, own = tiny_reward(policy), ClassifierReward(classifier(), 1)
    ones, base = torch.ones(3), [p for n, p in policy.model.named_parameters() if "lora_" not in n]
    frozen = [*shared.head.parameters(), *own.model.parameters(), *base]
    before = [p.clone() for p in frozen]
    for reward in (shared, own):
        replay(
            policy,
            reward,
            rollout,
            ReplaySettings(tau=1.0, max_hops=2),
            reward_weight=ones,
            kl_weight=torch.zeros(rollout.mask.shape),
        )
    assert not any(p.requires_grad for p in frozen) and all(p.grad is None for p in frozen)
    assert all(torch.equal(p, q) for p, q in zip(frozen, before, strict=True))
    assert not own.table.rows.requires_grad and not own.model.training and not shared.head.training
    assert all(p.grad.abs().sum() > 0 for p in policy.parameters())


# -- loading -------------------------------------------------------------------------------------------------------


OWN_LABELS = dict(id2label={0: "toxic", 1: "POSITIVE", 2: "rude"})


@pytest.mark.parametrize(
    "kind, activation, words",
    [
        (None, lambda logits: logits.softmax(-1)[:, 1], "the probability .by softmax. of the class 'POSITIVE' among"),
        ("single_label_classification", lambda logits: logits.softmax(-1)[:, 1], "by softmax"),
        ("multi_label_classification", lambda logits: logits[:, 1].sigmoid(), "by sigmoid"),
        ("regression", lambda logits: logits[:, 1], "the output of the class 'POSITIVE' among .*'toxic', .*'rude'"),
    ],
    ids=str,
)
def test_what_an_output_means_is_the_models_problem_type(tmp_path, kind, activation, words):
    """The classes of a multi-label classifier are questions of their own: no softmax over them."""
    model = classifier(labels=3, problem_type=kind, **OWN_LABELS)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, SAME)
    policy = tiny_policy()
    reward = load_classifier(str(tmp_path), policy, positive_label=None, reads="response", judged=16)
    with torch.no_grad():
        logits = torch.cat([model(input_ids=torch.tensor([r])).logits for r in RESPONSES])
    assert torch.allclose(value(policy, reward, rollout_of()), activation(logits), atol=1e-5)
    assert re.search(words, reward.raises) and reward.raises.endswith(f"of reward.model={tmp_path}")


def good_or_bad():
    """{0: good, 1: bad} raised "bad" without a word."""
    config = classifier(labels=2, id2label={0: "good", 1: "bad"}).config
    config.architectures = ["LlamaForSequenceClassification"]
    return config


SMALL = dict(vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2)
REFUSED = {  # what is saved in the folder, and why it is no reward; a config alone has no weights to be read
    "another vocabulary": (lambda: classifier().config, "2 tokens differ, .* '<4>' has id 5 there and 4 here"),
    "no weights": (lambda: classifier(labels=1).config, "reward.model=.*cannot be loaded"),
    "no folder": (None, "reward.model=.*cannot be loaded"),
    "which class": (good_or_bad, r"reward.positive_label is not set and .* \['good', 'bad'\].* name the one"),
    "a short context": (lambda: classifier(GPT2Config, labels=1, n_positions=15), "context is 15 tokens.* up to 16"),
    # transformers would draw a random `score` layer and go on
    "a language model": (
        lambda: AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, num_labels=1)),
        "no `score` layer.*random",
    ),
    "an encoder": (
        lambda: AutoModelForSequenceClassification.from_config(BertConfig(**SMALL, num_labels=1)),
        "BertForSequenceClassification has no `score` layer",
    ),
    "a short table": (lambda: classifier(labels=1, vocab_size=60, pad_token_id=0), "60 rows, the policy's 61"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_reward_is_refused_in_words(tmp_path, case):
    make, message = REFUSED[case]
    if make is not None:
        make().save_pretrained(tmp_path)
        save_tokenizer(tmp_path, {**SAME, "<4>": 5, "<5>": 4} if case == "another vocabulary" else SAME)
    name = str(tmp_path if make is not None else tmp_path / "nothing")
    with pytest.raises(GradeError, match=message):
        load_classifier(name, tiny_policy(), positive_label=None, reads="response", judged=16)


def test_a_context_as_long_as_what_is_judged_is_enough(tmp_path):
    classifier(GPT2Config, labels=1, n_positions=16).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, SAME)
    assert load_classifier(str(tmp_path), tiny_policy(), positive_label=None, reads="response", judged=16).label is None


def test_architectures_without_a_classifier_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "cohere", "num_labels": 2}))
    (tmp_path / "model.safetensors").touch()
    save_tokenizer(tmp_path, SAME)
    with pytest.raises(GradeError, match="reward.model=.*cannot be loaded: .*CohereConfig") as refusal:
        load_classifier(str(tmp_path), tiny_policy(), positive_label=None, reads="response", judged=16)
    assert "\n" not in str(refusal.value)


def test_vocabulary_check_counts_and_names_the_first_difference():
    check_same_vocabulary("m", dict(SAME), dict(SAME))
    shorter = {token: i for token, i in SAME.items() if i < 58}
    with pytest.raises(GradeError, match=r"3 tokens differ, for example '<58>' has id None there and 58 here"):
        check_same_vocabulary("m", shorter, SAME)
    with pytest.raises(GradeError, match=r"1 tokens differ, for example 'x' has id 61 there and None here"):
        check_same_vocabulary("m", {**SAME, "x": 61}, SAME)


@pytest.mark.parametrize(
    "labels, wanted, expected",
    [
        (["NEGATIVE", "POSITIVE"], None, 1),
        (["Positive", "Negative"], None, 0),
        (["pos", "neg"], None, 0),
        (["neg", "neutral", "pos"], None, 2),
        (["good", "bad"], "Good", 0),
        (["good", "bad"], "bad", 1),
        (["positive", "negative"], "negative", 1),
        (["a", "b", "c"], "b", 1),
        (["Good", "good"], "good", 1),
        (["LABEL_0"], None, None),
        (["LABEL_0", "LABEL_1"], "LABEL_1", 1),
        (["toxicity"], "toxicity", None),
    ],
)
def test_positive_class(labels, wanted, expected):
    assert positive_class("m", dict(enumerate(labels)), wanted) == expected


@pytest.mark.parametrize(
    "labels, wanted, message",
    [
        (["a", "b", "c"], None, r"positive_label is not set and m has the labels \['a', 'b', 'c'\]"),
        (["a", "b"], "c", r"positive_label=c: m has the labels \['a', 'b'\]"),
        (["good", "bad"], None, r"has the labels \['good', 'bad'\], none of which is called positive"),
        (["LABEL_0", "LABEL_1"], None, r"has the labels \['LABEL_0', 'LABEL_1'\]"),
        (["score"], "positive", r"positive_label=positive: m has the labels \['score'\]"),
        (["Good", "GOOD"], "good", r"positive_label=good: m has the labels \['Good', 'GOOD'\]"),
    ],
)
def test_positive_class_that_is_not_there(labels, wanted, message):
    with pytest.raises(GradeError, match=message):
        positive_class("m", dict(enumerate(labels)), wanted)
