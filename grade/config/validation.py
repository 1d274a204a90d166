"""Which settings work together: the checks that need no model, made before anything is loaded."""

from __future__ import annotations

from urllib.parse import SplitResult, urlsplit

from grade.config.bounds import check_values, shown
from grade.config.guard import check_guard
from grade.config.methods import DIFFERENTIATING, check_method
from grade.config.reward import check_reward_settings, trains_proxy, without_gradient
from grade.config.schema import Config
from grade.config.studies import check_studies
from grade.config.tasks import JUDGED_BY_PROGRAM, WRITTEN, WRITTEN_EXAMPLES, TokenizerConfig
from grade.errors import GradeError

NOISE_ROWS = 2**52
"""Most tokens that one process may sample in a run: their noise is keyed by 64 bits, which many processes share."""
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


def _check_deterministic(config: Config) -> None:
    for name, value, fix in (
        ("model.attn_implementation", config.model.attn_implementation, "sdpa"),
        ("model.quantization", config.model.quantization, "null"),
    ):
        if value not in (None, "sdpa", "eager"):
            raise GradeError(
                f"train.deterministic is true, but the kernels of {name}={value} do not promise the same bits each "
                f"time. Set {name} to {fix}, or train.deterministic to false."
            )


def validate(config: Config) -> None:
    """Refuse settings that cannot work, before anything is loaded.

    Raises:
        GradeError: naming the setting, the reason and the fix.
    """
    check_values(config)
    generation, method, train, rollout = config.generation, config.method, config.train, config.rollout
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
    if config.model.fsdp:
        for name, value, needed, reason in (
            ("model.finetuning", config.model.finetuning, "lora", "the weights that are trained stay whole"),
            ("model.quantization", config.model.quantization, None, "packed weights are not sharded"),
            ("rollout.compile", config.rollout.compile is True, False, "a compiled step holds the whole base"),
            ("train.compile", train.compile is True, False, "compiled layers hold their weights"),
        ):
            if value != needed:
                raise GradeError(
                    f"model.fsdp shards the frozen base over processes, but {name} is {shown(value)}: {reason}. Set "
                    f"it to {'null' if needed is None else str(needed).lower()}, or model.fsdp to false."
                )
    if config.model.quantization == "8bit" and config.model.dtype != "bfloat16":
        raise GradeError(
            "model.quantization=8bit rounds what layers read to 8 bits, so that no two passes agree as those of "
            f"model.dtype={config.model.dtype} must. Set model.dtype to bfloat16, or use 4bit."
        )
    if config.model.quantization is not None and config.rollout.compile is True:
        raise GradeError(
            f"rollout.compile records the weights' own products, which model.quantization={config.model.quantization} "
            "replaces. Set one of them to its default."
        )
    if config.rollout.compile is True and config.model.attn_implementation not in (None, "sdpa"):
        raise GradeError(
            f"rollout.compile masks its cache as sdpa does, but model.attn_implementation is "
            f"{config.model.attn_implementation}. Set it to sdpa, or rollout.compile to false or auto."
        )
    if config.model.quantization is not None and train.compile is True:
        raise GradeError(
            f"train.compile fuses layers, and the packed products of model.quantization={config.model.quantization} "
            "are other libraries' code that cannot be seen into. Set train.compile to false or auto, or "
            "model.quantization to null."
        )
    if train.deterministic:
        _check_deterministic(config)
    if generation.max_new_tokens < generation.min_new_tokens:
        raise GradeError(
            f"generation.max_new_tokens ({generation.max_new_tokens}) is below generation.min_new_tokens "
            f"({generation.min_new_tokens}): raise the first or lower the second."
        )
    if generation.batch_size is not None and generation.batch_size < generation.samples_per_prompt:
        raise GradeError(
            f"generation.batch_size ({generation.batch_size}) is below generation.samples_per_prompt "
            f"({generation.samples_per_prompt}): a prompt's samples are decoded together. Raise the first or lower the "
            "second."
        )
    check_studies(config.compare, config.variance)
    if config.compare.kl_coefs is not None and method.target_kl is not None:
        raise GradeError(
            "compare.kl_coefs gives runs other weights of the KL, and method.target_kl moves that weight away from any "
            "of them. Set one of the two to null."
        )
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
    check_reward_settings(config.task, config.reward)
    _check_data(config)
    _check_rollout(config)
    check_method(
        method,
        samples_per_prompt=generation.samples_per_prompt,
        responses=per_step,
        ids_from=None if rollout.sampled_here else "rollout.source" if rollout.engine == "here" else "rollout.engine",
        no_gradient=without_gradient(config.task, config.reward),
        functions=bool(config.reward.terms) or trains_proxy(config.task, config.reward),
        has_program=config.task.name in JUDGED_BY_PROGRAM,
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
    check_guard(config.guard, ignore_eos=generation.ignore_eos, source=config.rollout.source)
    if train.resume and train.overwrite:
        raise GradeError(f"train.resume is {train.resume} and train.overwrite is true: choose one.")


def _check_rollout(config: Config) -> None:
    """Refuse what a vLLM server cannot do, and what only such a server's responses could need."""
    rollout = config.rollout
    if rollout.engine == "here":
        given_for_one = (rollout.url, rollout.max_lag or None, rollout.importance_cap)
        for name, given in zip(("url", "max_lag", "importance_cap"), given_for_one, strict=True):
            if given is not None:
                raise GradeError(
                    f"rollout.{name} is {shown(given)}, but rollout.engine is here, which samples with the policy that "
                    "learns. Leave it out, or set rollout.engine to vllm."
                )
        return
    if rollout.url is None:
        raise GradeError(
            "rollout.engine=vllm needs the server's address: set rollout.url, such as http://127.0.0.1:8000."
        )
    address = _address(rollout.url)
    if address is None:
        raise GradeError(f"rollout.url is {shown(rollout.url)}: it must be like http://127.0.0.1:8000 or https://HOST.")
    if address.username is not None or address.password is not None or address.query or address.fragment:
        raise GradeError(
            "rollout.url holds more than a host, a port and a path, and is written into the run's files. A key belongs "
            "into the environment variable VLLM_API_KEY."
        )
    for name, value, reason in (
        ("rollout.source", rollout.source, "responses come from one of them"),
        (
            "rollout.compile",
            True if rollout.compile is True else None,
            "the step that it compiles is the trainer's own sampling",
        ),
        (
            "model.finetuning",
            "full" if config.model.finetuning == "full" else None,
            "the server is sent an adapter at every step, never a whole model",
        ),
    ):
        if value is not None:
            raise GradeError(
                f"rollout.engine=vllm and {name}={shown(value)} exclude each other: {reason}. Set one of them to its "
                "default."
            )
    if rollout.importance_cap is not None and config.method.name in DIFFERENTIATING:
        raise GradeError(
            f"rollout.importance_cap weights the loss of policy gradients, and method.name={config.method.name} "
            "backpropagates the reward. Set it to null."
        )


def _address(url: str) -> SplitResult | None:
    """The parts of a server's address; None where it is none that can be asked."""
    if not url.isascii() or not url.isprintable() or " " in url:
        return None
    try:
        address = urlsplit(url)
        usable = address.scheme in ("http", "https") and address.hostname and address.port != 0
    except ValueError:  # a port that is no number, or half a bracket
        return None
    return address if usable and ".." not in (address.hostname or "") else None


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
