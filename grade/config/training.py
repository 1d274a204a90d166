"""The settings of a run: its optimizer, folder and logs, and its evaluations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from grade.config.bounds import BATCH, COUNT, RATE, ROWS, SEED, setting

Schedule = Literal["constant", "linear", "cosine"]


@dataclass
class TrainConfig:
    """The optimizer and the run."""

    steps: int = setting(200, ge=1, le=COUNT, role="resume")
    """Optimizer steps."""
    batch_size: int = setting(16, ge=1, le=BATCH)
    """Responses replayed together on one process (a micro-batch)."""
    accumulation_steps: int = setting(1, ge=1, le=BATCH)
    """Micro-batches per optimizer step; the gradient equals that of the one large batch."""
    learning_rate: float = setting(1e-4, ge=0, le=RATE)
    """AdamW step size."""
    schedule: Schedule = "constant"
    """Learning rate after the warm-up: constant, or falling to 0 at the last step."""
    warmup_steps: int = setting(0, ge=0, le=COUNT)
    """Optimizer steps of linear warm-up."""
    weight_decay: float = setting(0.0, ge=0, le=RATE)
    """AdamW weight decay of the adapter."""
    adam_beta1: float = setting(0.9, ge=0, lt=1)
    """AdamW first-moment decay."""
    adam_beta2: float = setting(0.999, ge=0, lt=1)
    """AdamW second-moment decay."""
    adam_epsilon: float = setting(1e-8, gt=0, le=1)
    """AdamW denominator offset."""
    max_grad_norm: float = setting(1.0, ge=0, le=1e12)
    """Gradients are scaled down to this global norm; 0 turns clipping off."""
    run_dir: str | None = setting(None, text="path", role="place")
    """Folder of the run; null: output_dir/name-seed<seed>."""
    resume: bool | Literal["auto"] = setting(False, role="resume")
    """Continue the run in run_dir from its last checkpoint; the result equals an uninterrupted run (on a GPU only with
    train.deterministic). `auto`: where there is one, and start where there is none."""
    overwrite: bool = setting(False, role="resume")
    """Delete what a run wrote in run_dir, and nothing else, and start again."""
    deterministic: bool = setting(False, role="speed")
    """On a GPU, take only operations that give the same bits each time; attention then keeps all its weights, and is
    slower. A CPU gives the same bits in any case."""
    compile: bool | Literal["auto"] = setting(False, role="speed")
    """Compile a decoder layer of each kind, and run the passes of training's steps by that code: the products and a few
    fused kernels in place of a hundred operations a layer. Takes a minute or so at the start; another batch or length
    is not compiled anew. Not with a quantized or sharded base. `auto`: on a GPU, where the run passes micro-batches
    400 times or more and the model can be compiled."""
    save_every: int = setting(50, ge=1, le=COUNT, role="resume")
    """Steps between checkpoints for resuming; one is always written at the end."""
    keep_checkpoints: int = setting(2, ge=1, le=COUNT, role="resume")
    """Newest checkpoints to go on from that are kept: checkpoints/last and earlier ones in checkpoints/resume-N. Where
    the newest is damaged, the run goes on from the one before."""
    keep_adapters: bool = setting(False, role="resume")
    """Keep the adapter of every validation in checkpoints/step-N, not only the best and the last."""
    tensorboard: bool = setting(True, role="resume")
    """Write tensorboard events to run_dir/tensorboard."""
    wandb: bool = setting(False, role="resume")
    """Log to Weights & Biases (needs the extra `wandb`)."""
    wandb_project: str = setting("grade", role="resume")
    """Project name on Weights & Biases."""
    log_every: int = setting(10, ge=1, le=COUNT, role="resume")
    """Steps between two lines where progress goes to no terminal; after a minute there is one in any case."""
    samples_logged: int = setting(4, ge=0, le=BATCH, role="resume")
    """Responses written to samples.jsonl at each logged step."""
    samples_every: int = setting(10, ge=1, le=COUNT, role="resume")
    """Steps between entries of samples.jsonl."""


@dataclass
class EvaluationConfig:
    """Fixed prompts, fixed noise: the base model and every checkpoint answer the same questions."""

    every: int = setting(25, ge=1, le=COUNT)
    """Optimizer steps between validations; the base model is validated first and the last step always."""
    validation_prompts: int = setting(200, ge=1, le=ROWS)
    """Validation prompts, the same ones each time."""
    test_prompts: int = setting(500, ge=0, le=ROWS)
    """Test prompts, used once, with the best checkpoint and the base model; 0: no test."""
    sampler: Literal["policy", "top_p"] = "policy"
    """`policy`: the sampler of training. `top_p`: the fewest candidates that hold top_p of the mass."""
    top_p: float = setting(0.9, gt=0, le=1)
    """Probability mass of the `top_p` sampler."""
    batch_size: int = setting(64, ge=1, le=BATCH, role="speed")
    """Sequences decoded together."""
    seed: int = setting(1234, ge=0, le=SEED)
    """Seed of the evaluation's noise, apart from the training's."""
    samples: int = setting(16, ge=0, le=ROWS, role="resume")
    """Responses kept in evaluation.json for reading."""
