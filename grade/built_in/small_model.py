"""Small Llamas that the built-in tasks start from: trained once on generated text, on CPU, and cached.

What the demo's and Countdown's models have in common: the cache, the tokenizer, the architecture and the training loop.
Their `SETTINGS` are dictionaries with the keys that are read here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from grade.errors import GradeError
from grade.machine import cache_folder
from grade.terminal import counting

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

EOS, PAD = "<|endoftext|>", "<|pad|>"
_MAX_THREADS = 4  # more of them wait for each other on matrices this small
_BATCHES_SORTED = 8  # rows of this many batches are sorted by length, so that a batch needs little padding


def cached_model(
    name: str,
    settings: dict,
    files: Sequence[str],
    train: Callable[[Path, dict, bool], None],
    cache_dir: Path | None,
    steps: int | None,
    progress: bool,
) -> Path:
    """The folder of a built-in model, trained now unless the cache holds it.

    The folder lands in its place by a rename, so an interrupted run leaves nothing half-done. Its name carries a hash
    of the settings, this file and `files`: a change of any trains a new model. The same machine and torch give the same
    weights; global random state and the number of torch's threads are left alone.

    Args:
        settings: `SETTINGS` of the model's file.
        files: with everything else that decides the model.
        train: writes a model into the folder it is given, which does not exist yet.
        cache_dir: folder for trained models; None: `grade.machine.cache_folder`.
        steps: optimizer steps, None for the default of the settings; fewer make a worse model, for tests.
        progress: show a progress bar with the loss (nats per token) and seconds on standard error.

    Returns:
        A folder for `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`, with
        `generation_config.json` and `training.json` (settings, parameters, final loss in nats per token, seconds).

    Raises:
        GradeError: the cache folder cannot be written.
    """
    settings = dict(settings, steps=settings["steps"] if steps is None else steps)
    cache = Path(cache_dir) if cache_dir is not None else cache_folder()
    folder = cache / f"{name}-{identity(settings, *files)}"
    if folder.is_dir():
        return folder
    try:  # before the training, not after
        cache.mkdir(parents=True, exist_ok=True)
        staging = tempfile.TemporaryDirectory(prefix="unfinished-", dir=cache)
    except OSError as error:
        raise GradeError(
            f"The built-in model is kept in {cache}, which cannot be written ({error.strerror}). "
            "Set the environment variable XDG_CACHE_HOME to a folder that can."
        ) from error
    with staging:
        made = Path(staging.name) / "model"
        with _few_threads():
            train(made, settings, progress)
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, with the same model
                raise
    return folder


def identity(settings: dict, *files: str) -> str:
    """12 hexadecimal digits that change with the settings, with this file, and with any of `files`."""
    sources = [Path(path).read_bytes() for path in (*files, __file__)]
    return hashlib.sha256(b"\x00".join([*sources, json.dumps(settings).encode()])).hexdigest()[:12]


@contextlib.contextmanager
def _few_threads() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(min(before, _MAX_THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_tokenizer(texts: list[str], settings: dict) -> PreTrainedTokenizerFast:
    """A byte-level BPE that any text survives, and that starts every text with BOS by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings["vocabulary"],
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{EOS} $A", pair=f"{EOS} $A {EOS} $B", special_tokens=[(EOS, bpe.token_to_id(EOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=EOS, eos_token=EOS, pad_token=PAD, model_max_length=settings["context"]
    )


def train_model(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[list[int]],
    settings: dict,
    *,
    title: str,
    progress: bool,
    prompt_end: int | None = None,
) -> None:
    """Train a model and save it in `folder` with its tokenizer and `training.json` (settings, parameters, final loss
    in nats per token, seconds).

    Args:
        rows: token ids of the training texts, with BOS and EOS.
        title: of the progress bar.
        progress: show one on standard error.
        prompt_end: the first token with this id ends a row's prompt, which has no loss; None: there is loss everywhere.
    """
    import torch
    from transformers.utils import logging

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings["seed"])
        model = _new_model(tokenizer, settings)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings["learning_rate"], betas=(0.9, 0.95), weight_decay=settings["weight_decay"]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step, settings))
    batches = _batches(rows, settings)
    losses: list[float] = []
    started = time.monotonic()
    with counting(title, settings["steps"], enabled=progress) as tick:
        for _ in range(settings["steps"]):
            ids, labels = _pad(next(batches), tokenizer.pad_token_id, prompt_end)
            # Padding is on the right of a causal model: nothing real reads it, so no attention mask is
            # needed.
            loss = model(input_ids=ids, labels=labels).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            recent = losses[-20:]
            tick(note=f"loss {sum(recent) / len(recent):.3f}")
    logging.disable_progress_bar()  # of the one file that is written now
    tokenizer.save_pretrained(folder)
    model.eval().save_pretrained(folder)
    report = {
        "settings": settings,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "loss": sum(recent) / len(recent),
        "seconds": time.monotonic() - started,
    }
    (folder / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _new_model(tokenizer: PreTrainedTokenizerFast, settings: dict) -> LlamaForCausalLM:
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings["hidden_size"],
            intermediate_size=settings["intermediate_size"],
            num_hidden_layers=settings["layers"],
            num_attention_heads=settings["heads"],
            max_position_embeddings=settings["context"],
            tie_word_embeddings=True,
            **special,
        )
    )
    model.generation_config = GenerationConfig(**special)
    return model.train()


def _learning_rate_factor(step: int, settings: dict) -> float:
    """Linear warm-up, then half a cosine down to 0."""
    warmup = min(settings["warmup_steps"], settings["steps"] // 2)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, settings["steps"] - warmup)))


def _batches(rows: list[list[int]], settings: dict) -> Iterator[list[list[int]]]:
    """Batches without end, each epoch in a new order, rows of similar length together."""
    generator, size = random.Random(settings["seed"]), settings["batch_size"]
    while True:
        order = generator.sample(range(len(rows)), len(rows))
        batches = []
        for start in range(0, len(order), size * _BATCHES_SORTED):
            stretch = sorted(order[start : start + size * _BATCHES_SORTED], key=lambda i: len(rows[i]))
            batches += [stretch[i : i + size] for i in range(0, len(stretch), size)]
        for batch in generator.sample(batches, len(batches)):
            yield [rows[i] for i in batch]


def _pad(rows: list[list[int]], pad_id: int, prompt_end: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, T] int64, padded on the right, and labels [B, T] with -100 (no loss) on prompts and padding."""
    import torch

    width = max(len(row) for row in rows)
    prompts = [0 if prompt_end is None else row.index(prompt_end) + 1 for row in rows]
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])
    labels = torch.tensor(
        [[-100] * n + row[n:] + [-100] * (width - len(row)) for n, row in zip(prompts, rows, strict=True)]
    )
    return ids, labels
