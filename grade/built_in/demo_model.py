"""The demo's language model: a Llama of about a million parameters, trained on the demo's grammar and cached.

So `grade demo` needs no network and no files: `demo_model()` trains once, in about a minute on two CPU cores,
and returns the folder of a transformers model and tokenizer.
"""

from __future__ import annotations

from pathlib import Path

from grade.built_in.small_model import cached_model, identity, train_model, train_tokenizer
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
    """The folder of the demo model, trained now unless the cache holds it.

    The model lands in its place by a rename, so an interrupted run leaves nothing half-done. The folder's
    name carries a hash of the grammar, the code of the training and the settings: a change of any trains a new
    model. The same machine and torch give the same weights; global random state is left alone.

    Args:
        cache_dir: folder for trained models; null: `$XDG_CACHE_HOME/grade` or `~/.cache/grade`.
        steps: optimizer steps, null for the default of `SETTINGS`; fewer make a worse model, for tests.
        progress: show a progress bar with the loss (nats per token) and seconds on standard error.

    Returns:
        A folder for `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`, with
        `generation_config.json` and `training.json` (settings, parameters, final loss in nats per token,
        seconds).

    Raises:
        GradeError: the cache folder cannot be written.
    """
    settings = dict(SETTINGS, steps=SETTINGS["steps"] if steps is None else steps)
    return cached_model(
        f"demo-{_identity(settings)}", lambda folder: _train(folder, settings, progress), cache_dir
    )


def _identity(settings: dict) -> str:
    return identity(settings, demo.__file__, __file__)


def _train(folder: Path, settings: dict, progress: bool) -> None:
    """Train tokenizer and model and save both in `folder`."""
    texts = [review.text for review in demo.pretraining_reviews()]
    tokenizer = train_tokenizer(texts, settings)
    rows = [
        ids + [tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]
    ]  # BOS comes from the tokenizer
    train_model(
        folder, tokenizer, rows, settings, title="Training the demo model, once", progress=progress
    )
