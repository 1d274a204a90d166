"""The settings of a run, as typed dataclasses: names, units, defaults, and the checks that need no model.

The command line (`grade.cli`) builds its options, its help and its YAML keys from these classes, so a field's
docstring here is what `grade train --help` prints. Nothing heavy is imported: `--help` must be quick.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_origin

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
    shown,
)
from grade.config.methods import BY_VALUE, METHODS, MethodConfig, check_method
from grade.config.studies import CompareConfig, VarianceConfig, check_studies
from grade.config.tasks import JUDGED_BY_PROGRAM, WRITTEN, WRITTEN_EXAMPLES, TaskConfig, TokenizerConfig
from grade.errors import GradeError

MODEL_TERM = "model"
"""What the log calls the head, the classifier or the task's program beside functions."""


@dataclass
class LoraSettings:
    """The trainable adapter (peft LoRA). Everything else stays frozen. With model.adapter, r, alpha and target_modules
    at their defaults mean the adapter's own."""

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

    name: str = "Qwen/Qwen3-0.6B"
    """Hub name or folder of a transformers causal language model."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the frozen weights. Adapters are float32. Not float16: small gradients would vanish in it."""
    attn_implementation: str | None = None
    """Attention as transformers names it (sdpa, eager, flash_attention_2); null: transformers' choice."""
    trust_remote_code: bool = False
    """Let code that comes with the model's files (auto_map) run here. Look at it first: it may do anything."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Linear layers of the frozen base in so many bits (bitsandbytes); head and embedding table keep model.dtype. 8bit
    needs bfloat16."""
    adapter: str | None = None
    """Folder or hub name of a LoRA adapter to go on from, whose rank, alpha and target modules hold; null: a new one,
    which begins as the base."""
    reference: Literal["base", "initial"] = "base"
    """What KL is measured to: the frozen base, or the policy as it started, which model.adapter makes another."""
    finetuning: Literal["lora", "full"] = "lora"
    """`lora`: an adapter is trained. `full` (in YAML also `lora: null`): every weight is, but head and embedding table,
    beside a frozen copy."""
    lora: LoraSettings = field(default_factory=LoraSettings)


@dataclass
class FunctionTerm:
    """A Python function as a term of the reward: weight * (scale * f + offset)."""

    function: str
    """FILE.py:NAME."""
    name: str | None = None
    """In the log, rewards/<name>/mean; null: that of the function."""
    weight: float = setting(1.0, ge=-WEIGHT, le=WEIGHT)
    """Weight of the term in the reward."""
    scale: float = setting(1.0, ge=-WEIGHT, le=WEIGHT)
    """What the function's values are multiplied with."""
    offset: float = setting(0.0, ge=-WEIGHT, le=WEIGHT)
    """What is added to them then."""
    normalize: bool = False
    """First shift and scale the values to mean 0 and deviation 1 over the steps before."""

    @property
    def called(self) -> str:
        return self.name or self.function.rpartition(":")[2]


@dataclass
class RewardConfig:
    """What is maximised: a differentiable model of the text, by default the probability that it is positive, or Python
    functions, or both as a weighted sum."""

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
    function: str | None = None
    """FILE.py:NAME, a function f(prompts, completions, **columns) -> list of numbers or None; the file is run. A
    function has no gradient: alone it is for ppo, reinforce and grpo, and no head is trained; beside a head or a
    classifier grade and grade-ste follow it by the score function."""
    functions: list[FunctionTerm] = field(default_factory=list)
    """Several of them: [{function: FILE.py:NAME, name: null, weight: 1, scale: 1, offset: 0, normalize: false}]."""
    weight: float | None = setting(None, ge=-WEIGHT, le=WEIGHT)
    """Weight of the head, of the classifier or of the task's program beside functions; null: 1, but without a head
    where there are functions."""
    scale: float = setting(1.0, ge=-WEIGHT, le=WEIGHT)
    """What the values of the head, classifier or program are multiplied with."""
    offset: float = setting(0.0, ge=-WEIGHT, le=WEIGHT)
    """What is added to them then."""
    normalize: bool = False
    """First shift and scale them to mean 0 and deviation 1 over the steps before; evaluations take them as they are."""
    bridge: Literal["retokenize"] | None = None
    """`retokenize`: reward.model may have any vocabulary and reads the written text, without a gradient."""

    @property
    def terms(self) -> list[FunctionTerm]:
        """All functions."""
        return [*([FunctionTerm(self.function)] if self.function is not None else []), *self.functions]


def trains_head(task: TaskConfig, reward: RewardConfig) -> bool:
    """Whether the reward has a head on the frozen base, which is trained on labelled texts."""
    if task.name in JUDGED_BY_PROGRAM or reward.model is not None:
        return False
    return not reward.terms or reward.weight is not None


def without_gradient(task: TaskConfig, reward: RewardConfig) -> str | None:
    """What the reward is if no part of it can be backpropagated, in words; None if one can."""
    if task.name in JUDGED_BY_PROGRAM:
        return "this task's reward is a program"
    if trains_head(task, reward) or reward.model is not None and reward.bridge is None:
        return None
    if reward.model is not None:
        return f"reward.bridge={reward.bridge} scores the text"
    return f"the reward is a function alone ({reward.terms[0].function}; reward.weight sets a head beside it)"


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

    steps: int = setting(200, ge=1, le=COUNT, role="resume")
    """Optimizer steps."""
    batch_size: int = setting(16, ge=1, le=BATCH)
    """Responses replayed together on one process (a micro-batch)."""
    accumulation_steps: int = setting(1, ge=1, le=BATCH)
    """Micro-batches per optimizer step; the gradient equals that of the one large batch."""
    learning_rate: float = setting(1e-4, ge=0, le=RATE)
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


def default_methods(config: Config) -> list[str]:
    """What `grade compare` compares unless told: the methods that can use the task's reward."""
    if without_gradient(config.task, config.reward) is None:
        return list(METHODS)
    by_program = config.task.name in JUDGED_BY_PROGRAM and not config.reward.terms
    return [*BY_VALUE, *(["grpo-token"] if by_program else [])]


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
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
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


_DICTS = frozenset(name for name, kind, _ in facts_of(Config) if get_origin(kind) is dict)
"""Settings whose values are dicts."""


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
    """{"train": {"steps": 1}} -> {"train.steps": 1}; a setting that is itself a dict stays one."""
    flat: dict[str, object] = {}
    for name, value in settings.items():
        inner = isinstance(value, dict) and prefix + name not in _DICTS
        flat.update(flatten(value, f"{prefix}{name}.") if inner else {prefix + name: value})
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
    if config.model.finetuning == "full":
        for name, value, needed in (
            ("model.dtype", config.model.dtype, "float32"),
            ("model.quantization", config.model.quantization, None),
            ("model.adapter", config.model.adapter, None),
            ("method.replay_dropout", method.replay_dropout, False),
        ):
            if value != needed:
                reason = "16 bits would lose most of a step" if name == "model.dtype" else "there is no adapter"
                raise GradeError(
                    f"model.finetuning=full trains the model's own weights, but {name} is {shown(value)}: {reason}. "
                    f"Set it to {'null' if needed is None else str(needed).lower()}, or model.finetuning to lora."
                )
    if config.model.quantization == "8bit" and config.model.dtype != "bfloat16":
        raise GradeError(
            "model.quantization=8bit rounds what layers read to 8 bits, so that no two passes agree as those of "
            f"model.dtype={config.model.dtype} must. Set model.dtype to bfloat16, or use 4bit."
        )
    if config.model.quantization is not None and config.rollout.compile:
        raise GradeError(
            f"rollout.compile records the weights' own products, which model.quantization={config.model.quantization} "
            "replaces. Set one of them to its default."
        )
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
    _check_reward(config.reward)
    _check_data(config)
    check_method(
        method,
        samples_per_prompt=generation.samples_per_prompt,
        responses=per_step,
        own_sampling=config.rollout.source is None,
        no_gradient=without_gradient(config.task, config.reward),
        functions=bool(config.reward.terms),
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
    if method.name == "grpo" and method.grpo.level == "token" and config.reward.terms:
        raise GradeError(
            "method.grpo.level=token needs the reward after every token, which a function (reward.function) does not "
            "give. Use level sequence."
        )
    if train.resume and train.overwrite:
        raise GradeError(f"train.resume is {train.resume} and train.overwrite is true: choose one.")


def _check_reward(reward: RewardConfig) -> None:
    """Functions that are named as such, each by a name of its own; a bridge to something."""
    for term in reward.terms:
        file, _, name = term.function.rpartition(":")
        if not file or not name.isidentifier():
            raise GradeError(
                f"reward.function is {shown(term.function)}: write FILE.py:NAME, such as rewards.py:is_correct."
            )
        if not term.called or any(c in term.called for c in "/\\") or not term.called.isprintable():
            raise GradeError(f"reward.functions: the name {shown(term.called)} stands in the log: use a plain word.")
    names = [MODEL_TERM, *(term.called for term in reward.terms)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise GradeError(
            f"reward.functions: two terms of the reward are called {twice} ({MODEL_TERM} is the head or classifier). "
            "Give one of them another name."
        )
    if reward.bridge is not None and reward.model is None:
        raise GradeError(f"reward.bridge is {reward.bridge}, but reward.model is null. Name a classifier.")


def _check_data(config: Config) -> None:
    """Refuse what the task cannot use of labels and of a chat template."""
    task, chat = config.task, config.tokenizer
    if task.label_type == "pairs" and task.name != "prompts":
        raise GradeError(f"task.label_type=pairs needs task.name=prompts, and it is {task.name}. Change one of them.")
    if task.label_type not in (None, "pairs") and task.name == "prompts":
        raise GradeError(
            f"task.label_type={task.label_type} is for labelled texts, but task.name=prompts has none: set the first "
            "to pairs or null, or task.name to sentiment."
        )
    if task.label_type == "numbers" and task.name != "sentiment":
        raise GradeError(f"task.label_type=numbers needs task.name=sentiment, and it is {task.name}. Set it to null.")
    taken = sorted(_TEMPLATE_ARGUMENTS & chat.chat_template_kwargs.keys())
    if taken:
        raise GradeError(f"tokenizer.chat_template_kwargs has {taken[0]!r}, which is set by GRADE. Leave it out.")
    if chat != TokenizerConfig() and task.name not in ("prompts", "countdown"):
        raise GradeError(
            f"tokenizer.chat, tokenizer.system_prompt and tokenizer.chat_template_kwargs are for conversations, and "
            f"task.name={task.name} continues texts. Leave them out, or use task.name=prompts."
        )


_TEMPLATE_ARGUMENTS = frozenset(
    (
        "conversation",
        "messages",
        "tokenize",
        "add_generation_prompt",
        "continue_final_message",
        "return_dict",
        "return_tensors",
        "return_assistant_tokens_mask",
        "padding",
        "truncation",
        "max_length",
        "tokenizer_kwargs",
    )
)


def judged_length(config: Config) -> int:
    """Tokens of the text that the reward will judge in training."""
    prompt = config.task.prompt_max_tokens if config.reward.input == "prompt+response" else 0
    return prompt + config.generation.max_new_tokens
