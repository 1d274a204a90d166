"""The reward that the settings ask for. A new kind is named in `PROGRAMS`, or gets a line in `_model`."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from grade.config import GenerationConfig, RewardConfig
from grade.config.reward import MODEL_TERM, PROXY_TERM, VERIFIER_TERM
from grade.errors import present
from grade.model.policy import Policy
from grade.rewards.base import Reward, RewardFunction
from grade.rewards.classifier import check_classifier, load_classifier
from grade.rewards.countdown import CountdownReward
from grade.rewards.function import FunctionReward, load_function
from grade.rewards.head_training import HeadTraining
from grade.rewards.probe import probe_classifier
from grade.rewards.proxy import ProxyTraining
from grade.rewards.retokenized import check_retokenized, load_retokenized
from grade.rewards.shared import SharedReward
from grade.rewards.weighted import Term, WeightedReward
from grade.tasks.base import Task

PROGRAMS: dict[str, Callable[..., RewardFunction]] = {"countdown": CountdownReward}
"""Of tasks that are judged by a program, by task.name; made from the policy and the task."""


def check_reward(settings: RewardConfig, tokenizer: PreTrainedTokenizerBase, *, judged: int) -> None:
    """Find mistakes in `reward.model` and in functions before any weights are read: the policy may be large.

    Raises:
        GradeError: the model cannot be found, has another vocabulary, a context that is too short, or no such class; a
            function is not there or is none.
    """
    for term in settings.terms:
        load_function(term.function)
    if settings.model is not None and settings.bridge is not None:
        check_retokenized(settings.model, positive_label=settings.positive_label)
    elif settings.model is not None:
        check_classifier(settings.model, tokenizer, judged=judged, positive_label=settings.positive_label)


def load_reward(
    settings: RewardConfig,
    policy: Policy,
    task: Task,
    *,
    judged: int,
    output_dir: str,
    generation: GenerationConfig | None = None,
) -> Reward:
    """The task's own program, a classifier, or the trained head (trained now if there is none yet), alone or in a sum
    with functions; or functions alone. A program may have a proxy beside it, trained now if there is none yet.

    Args:
        judged: tokens of the text that it will judge in training.
        output_dir: of the config, for heads without a `reward.path`.
        generation: section `generation`; only a proxy needs it.
    """
    terms = []
    if task.name in PROGRAMS and settings.proxy:
        return WeightedReward(
            [
                *_program_and_proxy(settings, policy, task, judged, output_dir, present(generation)),
                *_function_terms(settings, policy, task),
            ]
        )
    if task.name in PROGRAMS or settings.model is not None or not settings.terms or settings.weight is not None:
        weight = 1.0 if settings.weight is None else settings.weight
        model = _model(settings, policy, task, judged=judged, output_dir=output_dir)
        terms.append(Term(model, MODEL_TERM, weight, settings.scale, settings.offset, settings.normalize))
        if not settings.terms and terms == [Term(model, MODEL_TERM)]:
            return model
    return WeightedReward([*terms, *_function_terms(settings, policy, task)])


def _function_terms(settings: RewardConfig, policy: Policy, task: Task) -> list[Term]:
    terms = []
    for term in settings.terms:
        loaded = load_function(term.function)
        function = FunctionReward(loaded.function, policy.tokenizer, task, loaded=loaded)
        terms.append(Term(function, term.called, term.weight, term.scale, term.offset, term.normalize))
    return terms


def proxy_training(
    settings: RewardConfig, policy: Policy, task: Task, judged: int, output_dir: str, generation: GenerationConfig
) -> ProxyTraining:
    """What the proxy of a task's program comes from; arguments as of `load_reward`."""
    program = PROGRAMS[task.name](policy, task)
    return ProxyTraining(settings, judged, output_dir, policy, task, program, generation)


def _program_and_proxy(
    settings: RewardConfig, policy: Policy, task: Task, judged: int, output_dir: str, generation: GenerationConfig
) -> list[Term]:
    training = proxy_training(settings, policy, task, judged, output_dir, generation)
    weight = 1.0 if settings.weight is None else settings.weight
    raised = f"what a proxy estimates of {training.program.raises}"
    proxy = SharedReward(policy, training.head(), settings.input, raises=raised, folder=training.folder)
    return [
        Term(training.program, VERIFIER_TERM, weight, settings.scale, settings.offset, settings.normalize),
        Term(proxy, PROXY_TERM, settings.proxy_weight, proxy=True),
    ]


def _model(settings: RewardConfig, policy: Policy, task: Task, *, judged: int, output_dir: str) -> Reward:
    """What stands beside functions."""
    if task.name in PROGRAMS:
        return PROGRAMS[task.name](policy, task)
    if settings.model is not None and settings.bridge is not None:
        return load_retokenized(settings.model, policy, positive_label=settings.positive_label, reads=settings.input)
    if settings.model is not None:
        classifier = load_classifier(
            settings.model, policy, positive_label=settings.positive_label, reads=settings.input, judged=judged
        )
        probe_classifier(classifier, settings.model, judged)
        return classifier
    training = HeadTraining(settings, judged, output_dir, policy, task)
    head = training.head()
    raised = f"the probability of the label {task.labels}" if head.label_type == "classes" and task.labels else None
    return SharedReward(policy, head, settings.input, raises=raised, folder=training.folder)
