"""A classifier's reward of a text is its own, whatever stands beside the text; or the classifier is refused by name."""

from __future__ import annotations

import pytest
from classifiers import LONGROPE, classifier
from transformers import GemmaConfig, GPT2Config, LlamaConfig

from grade.errors import GradeError
from grade.rewards.classifier import ClassifierReward
from grade.rewards.probe import probe_classifier

READS = ["prompt+response", "response"]


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("kind", [LlamaConfig, GPT2Config, GemmaConfig])
def test_a_classifier_that_fits_is_accepted(kind, reads):
    probe_classifier(ClassifierReward(classifier(kind), 1, reads), "folder", 40)


@pytest.mark.parametrize("reads", READS)
def test_positions_that_depend_on_the_length_are_refused(reads):
    rope = dict(LONGROPE, rope_theta=1e4, factor=4.0, original_max_position_embeddings=24)
    size = classifier().config.hidden_size // classifier().config.num_attention_heads // 2
    rope |= dict(short_factor=[1.0] * size, long_factor=[8.0] * size)
    reward = ClassifierReward(classifier(rope_parameters=rope), 1, reads)
    probe_classifier(reward, "folder", 24)
    with pytest.raises(GradeError, match=r"reward\.model=folder: LlamaForS.* beside one of 25 tokens"):
        probe_classifier(reward, "folder", 25)


def test_a_classifier_that_reads_ids_otherwise_is_refused():
    model = classifier()

    def hook(module, args, kwargs, out):
        if kwargs.get("inputs_embeds") is None:
            out.last_hidden_state = -out.last_hidden_state

    model.base_model.register_forward_hook(hook, with_kwargs=True)
    with pytest.raises(GradeError, match="reads other features from embeddings than from the same ids"):
        probe_classifier(ClassifierReward(model, 1), "folder", 20)


def test_a_classifier_that_does_more_with_its_scores_is_refused():
    model = classifier()

    def hook(module, args, kwargs, out):
        out.logits = 2 * out.logits

    model.register_forward_hook(hook, with_kwargs=True)
    with pytest.raises(GradeError, match="does more than read its last hidden state"):
        probe_classifier(ClassifierReward(model, 1), "folder", 20)


def test_a_context_that_is_too_short_is_told_in_words():
    reward = ClassifierReward(classifier(GPT2Config), 1)
    context = reward.model.config.n_positions
    probe_classifier(reward, "folder", context)
    with pytest.raises(GradeError, match=r"GPT2ForSequenceClassification cannot be run on embeddings \(index out of"):
        probe_classifier(reward, "folder", context + 1)
