"""The settings of the methods: what each estimates, how, and the checks that need no model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal, Optional, Union

from grade.errors import GradeError

METHODS = ("grade-ste", "grade", "ppo", "reinforce", "grpo")
DIFFERENTIATING = ("grade-ste", "grade")
"""Methods that backpropagate the reward, and so need one with a gradient."""
VARIANTS = {"grpo-token": ("grpo", {"level": "token"}), "rloo": ("reinforce", {"baseline": "leave_one_out"})}
"""Names that `grade compare` knows beside METHODS: a method, and what is changed in its section."""
COMPARED = (*METHODS, *VARIANTS)


@dataclass
class PPOConfig:
    """Proximal policy optimisation with a value head on the policy's last hidden state (method.name: ppo)."""

    epochs: int = 4
    """Passes over a step's responses."""
    minibatches: int = 2
    """Optimizer steps per pass. Their order is shuffled; which responses share one stays."""
    clip: float = 0.2
    """Largest change of the importance ratio that is rewarded."""
    value_clip: float = 0.2
    """Largest change of a value, in units of reward, that lowers the value loss; 0 turns it off."""
    value_coef: float = 0.5
    """Weight of the value loss."""
    value_learning_rate: Optional[float] = None
    """AdamW step size of the value head; null: train.learning_rate."""
    entropy_coef: float = 0.01
    """Weight of the entropy bonus, exact over the vocabulary, per nat."""
    gamma: float = 1.0
    """Discount per token; GRADE's paper runs its PPO at 0.99."""
    gae_lambda: float = 0.95
    """Decay of generalised advantage estimation per token."""
    whiten_advantages: bool = True
    """Shift and scale advantages to mean 0 and variance 1 over the step's real tokens."""
    kl: Literal["reward", "loss"] = "reward"
    """`reward`: every token pays kl_coef times its log-ratio to the reference. `loss`: the exact KL is a loss term."""
    target_kl: Optional[float] = 0.1
    """Stop a step's passes once the approximate KL to the sampling policy, nats per token, exceeds this."""


@dataclass
class ReinforceConfig:
    """REINFORCE on whole responses (method.name: reinforce)."""

    baseline: Literal["ema", "leave_one_out", "none"] = "ema"
    """`ema`: moving average of the return. `leave_one_out`: mean of the other responses, of the same prompt if
    generation.samples_per_prompt is above 1 (RLOO)."""
    ema_decay: float = 0.9
    """Decay of the moving average per optimizer step."""


@dataclass
class GRPOConfig:
    """Group-relative policy optimisation (method.name: grpo); a group is generation.samples_per_prompt responses."""

    level: Literal["sequence", "token"] = "sequence"
    """`sequence`: one advantage per response. `token`: from the change of the reward that each token makes."""
    advantage_scale: Literal["std", "none"] = "std"
    """Divide a group's advantages by its standard deviation, or not (`sequence` only)."""
    loss_reduction: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """Mean over the step's tokens; over each response's tokens, then responses; or tokens divided by the constant
    responses * max_new_tokens."""
    clip_low: float = 0.2
    """Smallest importance ratio that counts: 1 - clip_low."""
    clip_high: float = 0.2
    """Largest importance ratio that counts: 1 + clip_high."""
    epochs: int = 1
    """Passes over the responses of a step."""
    minibatches: int = 1
    """Optimizer steps of a pass."""
    kl_policy_ref_coef: float = 0.0
    """Weight of an exact kl(policy‖ref) beside normalised advantages, as GRPO is usually written, per nat; it comes on
    top of method.kl_coef."""
    kl_ref_policy_coef: float = 0.0
    """The same for kl(ref‖policy)."""
    preference_coef: float = 1.0
    """Weight of the reward in the shaped reward."""
    entropy_reward_coef: float = 0.0
    """Weight of the policy's entropy, per nat, in the shaped reward: of a token, or mean of a response."""


@dataclass
class MethodConfig:
    """The gradient estimator and its objective: -mean reward + kl_coef * KL. Of the
    settings without a section, `estimator`, `rao_samples`, `kl_prefix_grad`, `tau_*`, `max_hops`, `hop_tol` and
    `replay_dropout` are those of `grade` and `grade-ste`."""

    name: Literal["grade-ste", "grade", "ppo", "reinforce", "grpo"] = "grade-ste"
    """`grade-ste`: straight-through, hard tokens fed forward. `grade`: soft tokens fed forward. The others are policy
    gradients, which need no gradient of the reward."""
    estimator: Literal["gumbel", "rao", "straight_through", "reinmax"] = "gumbel"
    """Local rule from a token's embedding gradient to its logits; `grade` needs `gumbel`."""
    rao_samples: int = 16
    """Conditional Gumbel draws per token that `rao` averages."""
    kl_coef: float = 0.1
    """Weight of the KL term, per nat."""
    kl_direction: Literal["policy_ref", "ref_policy"] = "policy_ref"
    """`policy_ref`: kl(policy‖ref). `ref_policy`: kl(ref‖policy). Exact over the vocabulary."""
    kl_reduction: Literal["token_mean", "sequence_sum"] = "token_mean"
    """`token_mean`: over the global batch's real tokens. `sequence_sum`: per response, mean over those."""
    kl_prefix_grad: Literal["both", "policy", "none"] = "both"
    """KL's gradient through earlier tokens: by both models (exact), by the policy only, or not at all."""
    tau_start: float = 2.0
    """Temperature of the relaxation at step 0. Sampling itself stays at temperature 1."""
    tau_end: float = 2.0
    """Temperature after tau_steps; linear in between, constant after. The paper goes down to 0.5."""
    tau_steps: int = 2000
    """Optimizer steps of the annealing."""
    max_hops: int = 16
    """Most applications of the hop operator per step; exact at max_new_tokens - 1."""
    hop_tol: float = 1e-2
    """A sequence stops hopping when its last change relative to its gradient (hidden space) is below this."""
    replay_dropout: bool = False
    """Adapter dropout during replay. Breaks the fixed point of `grade`, which refuses it."""
    activation_checkpointing: Union[Literal["auto"], bool] = "auto"
    """Recompute activations in the backward passes: less memory, more time. `auto`: only if the run's estimate would
    otherwise exceed 80 % of the free memory."""
    prompt_cache: bool = True
    """The frozen pass reads prompts from a KV cache, one per distinct prompt; off with checkpointing, and for models
    that keep recurrent states."""
    head_chunk_mib: Optional[int] = None
    """Memory for the head's logits chunks, MiB; null: 64 on a CPU, about what its caches hold, and 256 elsewhere."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    reinforce: ReinforceConfig = field(default_factory=ReinforceConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)

    @property
    def checkpoint(self) -> bool:
        """Whether activations are recomputed; `auto` is off until it is decided."""
        return self.activation_checkpointing is True

    def head_chunk_bytes(self, device: str) -> int:
        """`head_chunk_mib` on this type of device, bytes."""
        return (self.head_chunk_mib or (64 if device == "cpu" else 256)) * 2**20


# (setting, smallest allowed value, is that value itself allowed)
LOWER_BOUNDS = [
    ("method.rao_samples", 1, True),
    ("method.kl_coef", 0, True),
    ("method.tau_start", 0, False),
    ("method.tau_end", 0, False),
    ("method.tau_steps", 1, True),
    ("method.max_hops", 0, True),
    ("method.hop_tol", 0, True),
    ("method.head_chunk_mib", 1, True),
    ("method.ppo.epochs", 1, True),
    ("method.ppo.minibatches", 1, True),
    ("method.ppo.clip", 0, False),
    ("method.ppo.value_clip", 0, True),
    ("method.ppo.value_coef", 0, True),
    ("method.ppo.value_learning_rate", 0, True),
    ("method.ppo.entropy_coef", 0, True),
    ("method.ppo.gamma", 0, True),
    ("method.ppo.gae_lambda", 0, True),
    ("method.ppo.target_kl", 0, False),
    ("method.reinforce.ema_decay", 0, True),
    ("method.grpo.clip_low", 0, False),
    ("method.grpo.clip_high", 0, False),
    ("method.grpo.epochs", 1, True),
    ("method.grpo.minibatches", 1, True),
    ("method.grpo.kl_policy_ref_coef", 0, True),
    ("method.grpo.kl_ref_policy_coef", 0, True),
    ("method.grpo.preference_coef", 0, True),
    ("method.grpo.entropy_reward_coef", 0, True),
]
AT_MOST_ONE = ["method.ppo.gamma", "method.ppo.gae_lambda", "method.grpo.clip_low"]
BELOW_ONE = ["method.reinforce.ema_decay"]


def method_named(method: MethodConfig, name: str) -> MethodConfig:
    """`method` with the name of METHODS or the changes of VARIANTS."""
    base, changes = VARIANTS.get(name, (name, {}))
    sections = {base: replace(getattr(method, base), **changes)} if changes else {}
    return replace(method, name=base, **sections)


def micro_batch_size(method: MethodConfig, batch_size: int, responses: int) -> int:
    """Responses that pass through the policy together: a mini-batch is made of whole micro-batches, so that what a
    response shares its pass with never changes.

    Args:
        batch_size: train.batch_size.
        responses: of a step, on one process.
    """
    minibatches = getattr(method, method.name).minibatches if method.name in ("ppo", "grpo") else 1
    return math.gcd(batch_size, responses // minibatches)


def check_method(
    method: MethodConfig, *, samples_per_prompt: int, responses: int, reward_has_gradient: bool, own_sampling: bool
) -> None:
    """Refuse a method that cannot work with the rest of the settings.

    Args:
        responses: of a step, on one process.
        reward_has_gradient: whether the task's reward can be backpropagated.
        own_sampling: whether responses are sampled here, so that their noise is known.

    Raises:
        GradeError: naming the setting, the reason and the fix.
    """
    if method.name in DIFFERENTIATING and not reward_has_gradient:
        others = ", ".join(name for name in METHODS if name not in DIFFERENTIATING)
        raise GradeError(
            f"method.name={method.name} backpropagates the reward, and this task's reward is a program without a "
            f"gradient. Use a method that only needs its value: {others}."
        )
    if method.name not in DIFFERENTIATING and method.replay_dropout:
        raise GradeError(
            f"method.replay_dropout belongs to grade and grade-ste: method.name={method.name} needs the importance "
            "ratio of 1 that dropout would break. Set it to false."
        )
    if method.name == "grade" and method.replay_dropout:
        raise GradeError(
            "method.replay_dropout cannot be true with method.name=grade: its soft tokens are a fixed point "
            "of the model that sampled them, which dropout would change. Use grade-ste or set it to false."
        )
    if method.name == "grade" and method.estimator != "gumbel":
        raise GradeError(
            f"method.estimator={method.estimator} needs method.name=grade-ste: soft tokens are the "
            "Gumbel-Softmax weights themselves, so only `gumbel` is their gradient."
        )
    if method.name in DIFFERENTIATING and method.estimator == "gumbel" and not own_sampling:
        raise GradeError(
            f"rollout.source gives token ids, but method.name={method.name} with method.estimator=gumbel needs the "
            "noise they were drawn with. Use grade-ste with the estimator rao, straight_through or reinmax."
        )
    if method.name == "ppo" and method.ppo.kl == "reward" and method.kl_direction == "ref_policy":
        raise GradeError(
            "method.ppo.kl=reward pays for the log-ratio of sampled tokens, which estimates kl(policy‖ref), but "
            "method.kl_direction is ref_policy. Set method.ppo.kl to loss, or the direction to policy_ref."
        )
    if method.name == "grpo" and samples_per_prompt < 2:
        raise GradeError(
            "method.name=grpo compares the responses of a prompt with each other, but generation.samples_per_prompt is "
            f"{samples_per_prompt}. Set it to 2 or more, such as 8."
        )
    if method.name == "reinforce" and method.reinforce.baseline == "leave_one_out" and responses < 2:
        raise GradeError(
            "method.reinforce.baseline=leave_one_out needs other responses, but a step has one. Raise "
            "train.batch_size or train.accumulation_steps, or use the baseline ema."
        )
    if method.name in ("ppo", "grpo"):
        minibatches = getattr(method, method.name).minibatches
        if responses % minibatches:
            raise GradeError(
                f"method.{method.name}.minibatches ({minibatches}) does not divide the {responses} responses of a step "
                "(train.batch_size * train.accumulation_steps). Change one of them."
            )
