"""The settings of the reward: a head, a classifier or functions; what they make of it, and what they rule out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from grade.config.bounds import BATCH, RATE, SEED, TOKENS, WEIGHT, setting, shown
from grade.config.tasks import JUDGED_BY_PROGRAM, TaskConfig
from grade.errors import GradeError

MODEL_TERM = "model"
"""What the log calls the head, the classifier or the task's program beside functions."""
VERIFIER_TERM, PROXY_TERM = "verifier", "proxy"
"""What the log calls the task's program and its differentiable proxy (reward.proxy)."""


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
    """Weight of the head, of the classifier or of the task's program beside functions or a proxy; null: 1, but without
    a head where there are functions."""
    scale: float = setting(1.0, ge=-WEIGHT, le=WEIGHT)
    """What the values of the head, classifier or program are multiplied with."""
    offset: float = setting(0.0, ge=-WEIGHT, le=WEIGHT)
    """What is added to them then."""
    normalize: bool = False
    """First shift and scale them to mean 0 and deviation 1 over the steps before; evaluations take them as they are."""
    bridge: Literal["retokenize"] | None = None
    """`retokenize`: reward.model may have any vocabulary and reads the written text, without a gradient."""
    proxy: bool = False
    """Of a task that is judged by a program: train a head on the frozen base to estimate the program's reward of the
    base's own responses, for grade and grade-ste to backpropagate beside it. It counts in their training alone."""
    proxy_weight: float = setting(1.0, ge=0, le=WEIGHT)
    """Weight of the proxy beside the program, whose own is reward.weight."""
    proxy_samples: int = setting(4, ge=1, le=BATCH)
    """Responses of the base model that the proxy learns from, for each of the task's reward examples."""

    @property
    def terms(self) -> list[FunctionTerm]:
        """All functions."""
        return [*([FunctionTerm(self.function)] if self.function is not None else []), *self.functions]


def trains_head(task: TaskConfig, reward: RewardConfig) -> bool:
    """Whether the reward has a head on the frozen base, which is trained on labelled texts."""
    if task.name in JUDGED_BY_PROGRAM or reward.model is not None:
        return False
    return not reward.terms or reward.weight is not None


def trains_proxy(task: TaskConfig, reward: RewardConfig) -> bool:
    """Whether a head on the frozen base is trained to estimate what the task's program says."""
    return task.name in JUDGED_BY_PROGRAM and reward.proxy


def without_gradient(task: TaskConfig, reward: RewardConfig) -> str | None:
    """What the reward is if no part of it can be backpropagated, in words; None if one can."""
    if task.name in JUDGED_BY_PROGRAM:
        return None if reward.proxy else "this task's reward is a program"
    if trains_head(task, reward) or reward.model is not None and reward.bridge is None:
        return None
    if reward.model is not None:
        return f"reward.bridge={reward.bridge} scores the text"
    return f"the reward is a function alone ({reward.terms[0].function}; reward.weight sets a head beside it)"


def check_reward_settings(task: TaskConfig, reward: RewardConfig) -> None:
    """Refuse functions that are not named as such or not each by a name of its own, a bridge to nothing, and a proxy
    of what is no program, or of what it could not see.

    Raises:
        GradeError: naming the setting, the reason and the fix.
    """
    for term in reward.terms:
        file, _, name = term.function.rpartition(":")
        if not file or not name.isidentifier():
            raise GradeError(
                f"reward.function is {shown(term.function)}: write FILE.py:NAME, such as rewards.py:is_correct."
            )
        if not term.called or any(c in term.called for c in "/\\") or not term.called.isprintable():
            raise GradeError(f"reward.functions: the name {shown(term.called)} stands in the log: use a plain word.")
    taken = [VERIFIER_TERM, PROXY_TERM] if reward.proxy else [MODEL_TERM]
    names = [*taken, *(term.called for term in reward.terms)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        meant = "they are the program and its proxy" if reward.proxy else f"{MODEL_TERM} is the head or classifier"
        raise GradeError(
            f"reward.functions: two terms of the reward are called {twice} ({meant}). Give one of them another name."
        )
    if reward.bridge is not None and reward.model is None:
        raise GradeError(f"reward.bridge is {reward.bridge}, but reward.model is null. Name a classifier.")
    if reward.proxy and not trains_proxy(task, reward):
        raise GradeError(
            f"reward.proxy is true, but task.name={task.name} is not judged by a program, and its own reward can have "
            "a gradient. Set it to false."
        )
    if reward.proxy and reward.input == "response":
        raise GradeError(
            "reward.proxy is true, but reward.input is response: what the program says of a response depends on its "
            "prompt. Set it to prompt+response."
        )
