"""The demo: its grammar; its model, trained once, cached, complete. Shrunk: few steps, few reviews."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grade.built_in import demo_model as module
from grade.built_in import small_model
from grade.built_in.demo_model import demo_model
from grade.errors import GradeError
from grade.tasks import demo
from grade.tasks.encoding import encode
from grade.tasks.texts import clean, opening

STEPS = 12


def folder_name(**settings):
    settings = {**module.SETTINGS, **settings}
    return f"demo-{small_model.identity(settings, demo.__file__, module.__file__)}"


@pytest.fixture(scope="module", autouse=True)
def few_reviews():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "PRETRAINING_REVIEWS", 300)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory, few_reviews):
    return demo_model(tmp_path_factory.mktemp("cache") / "new", steps=STEPS, progress=False)


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(module, "_train", lambda *_: pytest.fail("trained again"))


def test_second_call_trains_nothing(folder, no_training):
    assert demo_model(folder.parent, steps=STEPS) == folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "something was left in the cache"


def test_another_setting_or_grammar_is_another_model(folder, monkeypatch):
    assert folder.name == folder_name(steps=STEPS) != folder_name()
    monkeypatch.setattr(demo, "__file__", __file__)
    assert folder.name != folder_name(steps=STEPS)


def test_training_is_repeatable_and_leaves_global_state_alone(folder, tmp_path):
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    again = demo_model(tmp_path, steps=STEPS, progress=False)
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads
    assert (again / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    first, second = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder, again))
    for name, tensor in first.items():
        # Bit-identical on most machines; threads may sum in another order on some.
        torch.testing.assert_close(second[name], tensor, rtol=1e-4, atol=1e-5)


def test_interrupted_training_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(made, *_):
        made.mkdir()
        (made / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo_model(tmp_path, steps=STEPS, progress=False)
    assert not list(tmp_path.iterdir())


def test_the_faster_of_two_processes_wins(tmp_path, monkeypatch):
    target = tmp_path / folder_name(steps=STEPS)

    def both(made, *_):
        for path in (made, target):
            path.mkdir()
            (path / "winner").write_text(path.name)

    monkeypatch.setattr(module, "_train", both)
    assert demo_model(tmp_path, steps=STEPS) == target
    assert (target / "winner").read_text() == target.name and list(tmp_path.iterdir()) == [target]


def test_cache_folder(monkeypatch, tmp_path, no_training):
    for base, variable in ((tmp_path / "x", str(tmp_path / "x")), (tmp_path / ".cache", "relative")):
        monkeypatch.setenv("XDG_CACHE_HOME", variable)
        monkeypatch.setattr(Path, "home", lambda: tmp_path)
        (base / "grade" / folder_name()).mkdir(parents=True)
        assert demo_model() == base / "grade" / folder_name()


def test_cache_that_cannot_be_written(tmp_path, no_training):
    (tmp_path / "file").write_text("")
    with pytest.raises(GradeError, match="cannot be written .*XDG_CACHE_HOME"):
        demo_model(tmp_path / "file")


def test_tokenizer_round_trips_and_starts_with_bos(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in ["I liked it.", "Ünïcode – 良い 😀\n\ttabs  and spaces ", demo.write_reviews(1)[0].text]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in ids[1:]
        assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text
        assert encode(tokenizer, [text], 1000) == [ids]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_saved_model_is_complete(folder):
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer), "ids that the tokenizer does not know"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == torch.float32
    report = json.loads((folder / "training.json").read_text())
    assert report["parameters"] == sum(p.numel() for p in model.parameters()) and report["settings"]["steps"] == STEPS
    assert 0.9e6 < report["parameters"] < 1.2e6
    assert report["loss"] < 6.6  # nats; an untrained model has ln 768 = 6.64 or more


def test_batches_cover_an_epoch_and_mask_padding():
    rows = [[1] * n for n in range(1, 41)]
    batches = small_model._batches(rows, {**module.SETTINGS, "batch_size": 8})
    epoch = [row for _ in range(5) for row in next(batches)]
    assert sorted(map(len, epoch)) == list(range(1, 41))
    ids, labels = small_model._pad([[7, 8, 9], [7]], 1)
    assert ids.tolist() == [[7, 8, 9], [7, 1, 1]] and labels.tolist() == [[7, 8, 9], [7, -100, -100]]


def test_learning_rate_schedule():
    factors = [small_model._learning_rate_factor(step, {"steps": 100, "warmup_steps": 10}) for step in range(100)]
    assert factors[0] == 0.1 and factors[9] == factors[10] == 1
    assert factors[10:] == sorted(factors[10:], reverse=True) and 0 < factors[-1] < 0.001


# --- the demo's grammar ---


@pytest.fixture(scope="module")
def reviews():
    return {part: demo.write_reviews(400, part=part) for part in demo.PARTS}


def test_grammar_writes_distinct_balanced_reviews(reviews):
    texts = [review.text for part in reviews.values() for review in part]
    assert len(set(texts)) == len(texts) == 1200
    for part in reviews.values():
        assert sum(review.label for review in part) == 200
        for review in part:
            assert 15 <= len(review.text.split()) <= 45
            assert 2 <= review.text.count(".") <= 5 and "{" not in review.text
            assert (demo.lexicon_score(review.text) > 0) == (review.label == 1)
            assert clean(review.text) == review.text and review.text[0].isupper()


def test_grammar_is_seeded_and_extends(reviews):
    assert demo.write_reviews(50) == reviews["train"][:50]
    assert demo.write_reviews(50, seed=1) != reviews["train"][:50]
    with pytest.raises(ValueError, match="no part 'dev'"):
        demo.write_reviews(1, part="dev")


def test_most_openings_leave_the_label_open(reviews):
    for label in (0, 1):
        openings = [opening(r.text, 1, 200) for r in reviews["train"] if r.label == label]
        neutral = sum(demo.lexicon_score(text) == 0 for text in openings)
        assert 0.6 < neutral / len(openings) < 0.85


def test_lexicons_do_not_share_words():
    assert demo.POSITIVE_WORDS.isdisjoint(demo.NEGATIVE_WORDS)
    assert min(len(demo.POSITIVE_WORDS), len(demo.NEGATIVE_WORDS)) > 30


def test_exhausted_grammar_says_so(monkeypatch):
    monkeypatch.setattr(demo, "MAX_WORDS", 15)
    monkeypatch.setattr(demo, "_part", lambda text: "none")
    with pytest.raises(GradeError, match="cannot write 5 distinct reviews: lower task.policy_examples"):
        demo.write_reviews(5)
