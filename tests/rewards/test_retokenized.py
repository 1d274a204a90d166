"""A classifier of another vocabulary scores the written text, as its own forward does."""

from __future__ import annotations

import pytest
import torch
from rollouts import draw
from tiny import tiny_policy
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoModelForSequenceClassification, BertConfig, GPT2Config, PreTrainedTokenizerFast

from grade.config import RewardConfig
from grade.errors import GradeError
from grade.rewards.loading import check_reward, load_reward

WORDS = {"[UNK]": 0, "[PAD]": 1, **{str(i): 60 - i + 2 for i in range(61)}}  # other ids than the policy's


@pytest.fixture(params=["bert", "gpt2"])
def folder(request, tmp_path):
    """A classifier with labels `bad` and `good`, of 10 positions; GPT-2's has no token to pad with."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(WORDS), id2label={0: "bad", 1: "good"}, initializer_range=0.5)
    if request.param == "bert":
        config = BertConfig(
            **sizes,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=10,
        )
    else:
        config = GPT2Config(**sizes, n_embd=16, n_layer=2, n_head=2, n_positions=10, eos_token_id=0, bos_token_id=0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    words = Tokenizer(WordLevel(WORDS, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]"} if request.param == "bert" else {}
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", **special).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("reads", ["response", "prompt+response"])
def test_it_scores_as_the_classifier_does(folder, reads):
    """Every text alone, cut at its end or, where the prompt is read, at its beginning."""
    policy = tiny_policy()
    settings = RewardConfig(model=str(folder), positive_label="good", bridge="retokenize", input=reads)
    check_reward(settings, policy.tokenizer, judged=10**6)  # whatever its length
    reward = load_reward(settings, policy, task=Task(), judged=10**6, output_dir="")
    rollout = draw(policy, min_new_tokens=2)
    found = reward.score(rollout)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    lengths = []
    for row, value in enumerate(found.tolist()):
        ids = rollout.real_tokens()[row]
        if reads == "prompt+response":
            ids = rollout.real_prompts()[row] + ids
        own = [WORDS[str(i)] for i in ids]
        lengths.append(len(own))
        cut = own[-10:] if reads == "prompt+response" else own[:10]
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([cut])).logits.softmax(-1)[0, 1].item()
        assert value == pytest.approx(expected, abs=1e-5)
    assert reward.details(rollout, found)["reward_truncated"].tolist() == [float(n > 10) for n in lengths]
    known = reward.identity()
    assert reward.in_trial() is reward and known == reward.identity()
    reward.tokenizer.add_tokens(["60 59"])  # the same weights read other ids
    assert known != reward.identity()
    silent = draw(policy, [[5], [9]], max_new_tokens=1)
    reward.policy_tokenizer = Silent()
    assert reward.score(silent).isfinite().all()
    assert max(lengths) > 10 and not reward.differentiable
    assert reward.raises.endswith(f"'good' among ['bad', 'good'] of reward.model={folder}, without a gradient")


class Silent:
    """Of responses that hold special tokens only."""

    def decode(self, ids, skip_special_tokens):
        return ""


class Task:
    name, labels = "any", None


def test_the_refusal_of_another_vocabulary_names_the_bridge(folder):
    with pytest.raises(GradeError, match="or set reward.bridge to retokenize, which scores the written text without"):
        check_reward(RewardConfig(model=str(folder)), tiny_policy().tokenizer, judged=5)


def test_a_language_model_is_no_classifier(folder):
    """transformers would draw a score layer."""
    config = AutoModelForSequenceClassification.from_pretrained(folder)
    name = "classifier" if hasattr(config, "classifier") else "score"
    state = {key: value for key, value in config.state_dict().items() if not key.startswith(name)}
    config.save_pretrained(folder, state_dict=state)
    settings = RewardConfig(model=str(folder), positive_label="good", bridge="retokenize")
    with pytest.raises(GradeError, match=f"lack . of the classifier's tensors .such as {name}.*random numbers"):
        load_reward(settings, tiny_policy(), task=Task(), judged=5, output_dir="")
