"""The demo's language model: a Llama of about a million parameters, trained on the demo's grammar and cached.

So `grade demo` needs no network and no files: `demo_model()` trains once, in about a minute on two CPU cores,
and returns the folder of a transformers model and tokenizer.
"""

from __future__ import annotations

from pathlib import Path

from grade.built_in.small_model import cached_model, train_model, train_tokenizer
from grade.tasks import demo

# Chosen by held-out loss and by how many sampled reviews keep to one opinion: learning rates of 2e-3 and 6e-3
# and three narrower layers do worse in the same time.
SETTINGS = {
    "vocabulary": 768,  # bytes, merges and two special tokens; the grammar has about 350 words
    "hidden_size": 192,
    "intermediate_size": 512,
    "layers": 2,
    "heads": 6,
    "context": 256,
    "steps": 1000,
    "batch_size": 16,  # reviews per step
    "learning_rate": 3e-3,
    "warmup_steps": 30,
    "weight_decay": 0.1,
    "seed": 0,
}


def demo_model(cache_dir: Path | None = None, *, steps: int | None = None, progress: bool = True) -> Path:
    """The folder of the demo model, trained now unless the cache holds it; see `cached_model`."""
    return cached_model("demo", SETTINGS, [demo.__file__, __file__], _train, cache_dir, steps, progress)


def _train(folder: Path, settings: dict, progress: bool) -> None:
    """Train tokenizer and model and save both in `folder`."""
    texts = [review.text for review in demo.pretraining_reviews()]
    tokenizer = train_tokenizer(texts, settings)
    rows = [ids + [tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]  # BOS comes from the tokenizer
    train_model(folder, tokenizer, rows, settings, title="Training the demo model, once", progress=progress)
