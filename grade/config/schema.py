"""The settings of a run, as typed dataclasses: names, units, defaults, and the checks that need no model.

The command line (`grade.cli`) builds its options, its help and its YAML keys from these classes, so a field's
docstring here is what `grade train --help` prints. Nothing heavy is imported: `--help` must be quick.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from grade.config.bounds import (
    BATCH,
    COUNT,
    RATE,
    ROWS,
    SEED,
    TOKENS,
    WEIGHT,
    Role,
    check_values,
    facts_of,
    setting,
)
from grade.config.methods import DIFFERENTIATING, METHODS, MethodConfig, check_method
from grade.config.studies import CompareConfig, VarianceConfig, check_studies
from grade.config.tasks import JUDGED_BY_PROGRAM, WRITTEN, WRITTEN_EXAMPLES, TaskConfig
from grade.errors import GradeError


@dataclass
class LoraSettings:
    """The trainable adapter (peft LoRA). Everything else stays frozen."""

    r: int = setting(16, ge=1, le=8192)
    """Rank."""
    alpha: float = setting(32.0, gt=0, le=WEIGHT)
    """Scale numerator: updates are multiplied by alpha / r."""
    dropout: float = setting(0.05, ge=0, lt=1)
    """Adapter dropout, a probability. Only active with method.replay_dropout."""
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    """Names of the linear layers that get an adapter. Not the head, not the embedding."""


@dataclass
class ModelConfig:
    """The policy: a causal language model, frozen, with an adapter."""

    name: str = "Qwen/Qwen3-4B"
    """Hub name or folder of a transformers causal language model."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of the frozen weights. Adapters are float32. Not float16: small gradients would vanish in it."""
    attn_implementation: str | None = None
    """Attention as transformers names it (sdpa, eager, flash_attention_2); null: transformers' choice."""
    trust_remote_code: bool = False
    """Let code that comes with the model's files (auto_map) run here. Look at it first: it may do anything."""
    lora: LoraSettings = field(default_factory=LoraSettings)


@dataclass
class RewardConfig:
    """The differentiable reward, in [0, 1]: the probability that the text is positive."""

    model: str | None = None
    """Classifier with the policy's vocabulary (hub name or folder); null: a head on the frozen base."""
    positive_label: str | None = None
    """The classifier's label to raise, by name; null: the one called positive."""
    input: Literal["prompt+response", "response"] = "prompt+response"
    """What the reward reads, the same in training and evaluation."""
    path: str | None = setting(None, text="path")
    """Folder of a trained head; null: one under output_dir named by its training, made when missing."""
    hidden_size: int = setting(256, ge=1, le=2**14)
    """Width of the head's hidden layer."""
    epochs: int = setting(20, ge=1, le=10**4)
    """Passes over the head's training features."""
    learning_rate: float = setting(1e-3, ge=0, le=RATE)
    """AdamW step size of the head."""
    weight_decay: float = setting(0.01, ge=0, le=RATE)
    """AdamW weight decay of the head."""
    batch_size: int = setting(64, ge=1, le=BATCH)
    """Reviews in a step of the head's training."""
    max_tokens: int = setting(128, ge=1, le=TOKENS)
    """Reviews are cut to this many tokens for the head's training."""
    seed: int = setting(0, ge=0, le=SEED)
    """Seed of the head's initial weights and of its batches."""


@dataclass
class GenerationConfig:
    """How responses are sampled: temperature 1 over the top_k candidates."""

    max_new_tokens: int = setting(64, ge=1, le=TOKENS)
    """Longest response in tokens, the end-of-sequence token included."""
    min_new_tokens: int = setting(8, ge=0, le=TOKENS)
    """End-of-sequence cannot be chosen before this many tokens."""
    top_k: int = setting(256, ge=1, le=TOKENS)
    """Candidates per token; they are the support of sampling and of the gradient."""
    ignore_eos: bool = False
    """End-of-sequence is an ordinary token and every response has max_new_tokens."""
    samples_per_prompt: int = setting(1, ge=1, le=BATCH)
    """Responses per prompt in training; the prompt's KV cache is computed once for all of them."""
    batch_size: int | None = setting(None, ge=1, le=BATCH, role="speed")
    """Sequences decoded together in training; null: all of a step's."""


@dataclass
class RolloutConfig:
    """Where training's responses come from."""

    source: str | None = None
    """File of token ids that another engine sampled from the policy, lines of {"prompt": [ids], "response": [ids]}, or
    a named pipe of them; null: sample here."""
    timeout: float = setting(600.0, gt=0, le=10**7)
    """Seconds to wait for the next response on a pipe before the run stops."""
    compile: bool = setting(False, role="speed")
    """Decode training's responses by a compiled step over a static KV cache: CUDA graphs on a GPU, fused loops
    (and the draw with them) on a CPU. Needs sdpa attention without windows; not used with rollout.source. The first
    rollout of a batch size or greater length takes half a minute or more, the first changed temperature some seconds.
    """


@dataclass
class TrainConfig:
    """The optimizer and the run."""

    steps: int = setting(250, ge=1, le=COUNT, role="resume")
    """Optimizer steps."""
    batch_size: int = setting(1, ge=1, le=BATCH)
    """Responses replayed together on one process (a micro-batch)."""
    accumulation_steps: int = setting(16, ge=1, le=BATCH)
    """Micro-batches per optimizer step; the gradient equals that of the one large batch."""
    learning_rate: float = setting(1e-5, ge=0, le=RATE)
    """AdamW step size."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
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
    """Continue the run in run_dir from its last checkpoint; the result equals an uninterrupted run. `auto`: where there
    is one, and start where there is none."""
    overwrite: bool = setting(False, role="resume")
    """Delete what a run wrote in run_dir, and nothing else, and start again."""
    save_every: int = setting(50, ge=1, le=COUNT, role="resume")
    """Steps between checkpoints for resuming; one is always written at the end."""
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
    validation_prompts: int = setting(500, ge=1, le=ROWS)
    """Validation prompts, the same ones each time."""
    test_prompts: int = setting(2000, ge=0, le=ROWS)
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


def default_methods(config: Config) -> list[str]:
    """What `grade compare` compares unless told: the methods that can use the task's reward."""
    if config.task.name in JUDGED_BY_PROGRAM:
        return [name for name in METHODS if name not in DIFFERENTIATING] + ["grpo-token"]
    return list(METHODS)


@dataclass
class Config:
    """Everything a run depends on."""

    name: str = setting("grade", text="name", role="place")
    """Name of the experiment: the first part of its folder names."""
    seed: int = setting(0, ge=0, le=SEED)
    """Seed of adapter initialisation, prompt order and sampling noise."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: the accelerator where there is one."""
    output_dir: str = setting("runs", text="path", role="place")
    """Folder for run directories and trained reward heads."""
    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    compare: CompareConfig = setting(default_factory=CompareConfig, role="resume")
    variance: VarianceConfig = setting(default_factory=VarianceConfig, role="resume")

    @property
    def run_dir(self) -> str:
        return self.train.run_dir or f"{self.output_dir}/{self.name}-seed{self.seed}"


NOISE_ROWS = 2**52
"""Most tokens that one process may sample in a run: their noise is keyed by 64 bits, which many processes share."""


def settings_with_role(*roles: Role) -> list[str]:
    """Dotted names of the settings that play one of these roles."""
    return [name for name, _, facts in facts_of(Config) if facts.role in roles]


def get_setting(config: Config, dotted: str) -> Any:
    """The value of `section.name` in `config`."""
    value: Any = config
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


def flatten(settings: dict, prefix: str = "") -> dict[str, object]:
    """{"train": {"steps": 1}} -> {"train.steps": 1}."""
    flat: dict[str, object] = {}
    for name, value in settings.items():
        flat.update(flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return flat


def validate(config: Config) -> None:
    """Refuse settings that cannot work, before anything is loaded.

    Raises:
        GradeError: naming the setting, the reason and the fix.
    """
    check_values(config)
    generation, method, train = config.generation, config.method, config.train
    if not config.model.lora.target_modules:
        raise GradeError("model.lora.target_modules is empty: nothing would be trained. Name a layer.")
    if generation.max_new_tokens < generation.min_new_tokens:
        raise GradeError(
            f"generation.max_new_tokens ({generation.max_new_tokens}) is below generation.min_new_tokens "
            f"({generation.min_new_tokens}): raise the first or lower the second."
        )
    check_studies(config.compare, config.variance)
    per_step = train.batch_size * train.accumulation_steps
    if train.steps * per_step * generation.max_new_tokens > NOISE_ROWS:
        raise GradeError(
            "train.steps * train.batch_size * train.accumulation_steps * generation.max_new_tokens is "
            f"{train.steps * per_step * generation.max_new_tokens}: a run has noise for 2^52 tokens. Lower one of them."
        )
    examples = sum(getattr(config.task, f"{part}_examples") for part in ("reward", "policy", "validation", "judge"))
    if config.task.name in WRITTEN and examples > WRITTEN_EXAMPLES:
        raise GradeError(
            f"task.reward_examples + task.policy_examples + task.validation_examples + task.judge_examples is "
            f"{examples}: task.name={config.task.name} writes its examples one by one, at most {WRITTEN_EXAMPLES}. "
            "Lower one of them."
        )
    if per_step % generation.samples_per_prompt:
        raise GradeError(
            f"train.batch_size * train.accumulation_steps ({per_step}) is not a multiple of "
            f"generation.samples_per_prompt ({generation.samples_per_prompt}): a prompt's samples would "
            "be split over two steps. Change one of the three."
        )
    check_method(
        method, samples_per_prompt=generation.samples_per_prompt, responses=per_step,
        reward_has_gradient=config.task.name not in JUDGED_BY_PROGRAM, own_sampling=config.rollout.source is None,
    )
    if config.task.name in JUDGED_BY_PROGRAM and config.reward.model is not None:
        raise GradeError(
            f"reward.model is {config.reward.model}, but the task {config.task.name} brings its own reward. Set it to "
            "null."
        )
    if config.task.name in JUDGED_BY_PROGRAM and generation.ignore_eos:
        raise GradeError(
            f"generation.ignore_eos is true, but an answer to task.name={config.task.name} must end to count. Set it "
            "to false."
        )
    if config.reward.positive_label is not None and config.reward.model is None:
        raise GradeError(
            f"reward.positive_label is {config.reward.positive_label}, a label of a classifier, but reward.model is "
            "null. Name the classifier; the label that the trained head raises is task.positive_label."
        )
    if method.name == "grpo" and method.grpo.level == "token" and config.reward.model is not None:
        raise GradeError(
            "method.grpo.level=token needs the reward after every token, which a classifier (reward.model) does not "
            "give. Use level sequence, or leave reward.model null for the trained head."
        )
    if train.resume and train.overwrite:
        raise GradeError(f"train.resume is {train.resume} and train.overwrite is true: choose one.")


def judged_length(config: Config) -> int:
    """Tokens of the text that the reward will judge in training."""
    prompt = config.task.prompt_max_tokens if config.reward.input == "prompt+response" else 0
    return prompt + config.generation.max_new_tokens
