"""The settings of the methods: what each estimates, how, and the checks that need no model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from grade.config.bounds import BATCH, COUNT, RATE, TOKENS, WEIGHT, setting
from grade.errors import GradeError

METHODS = ("grade-ste", "grade", "ppo", "reinforce", "grpo")
DIFFERENTIATING = ("grade-ste", "grade")
"""Methods that backpropagate the reward, and so need one with a gradient."""
BY_VALUE = tuple(name for name in METHODS if name not in DIFFERENTIATING)
"""Methods that need no more of the reward than its value."""
VARIANTS = {"grpo-token": ("grpo", {"level": "token"}), "rloo": ("reinforce", {"baseline": "leave_one_out"})}
"""Names that `grade compare` knows beside METHODS: a method, and what is changed in its section."""
COMPARED = (*METHODS, *VARIANTS)


@dataclass
class PPOConfig:
    """Proximal policy optimisation with a value head on the policy's last hidden state (method.name: ppo)."""

    epochs: int = setting(4, ge=1, le=1000)
    """Passes over a step's responses."""
    minibatches: int = setting(2, ge=1, le=BATCH)
    """Optimizer steps per pass. Their order is shuffled; which responses share one stays."""
    clip: float = setting(0.2, gt=0, le=WEIGHT)
    """Largest change of the importance ratio that is rewarded."""
    value_clip: float = setting(0.2, ge=0, le=WEIGHT)
    """Largest change of a value, in units of reward, that lowers the value loss; 0 turns it off."""
    value_coef: float = setting(0.5, ge=0, le=WEIGHT)
    """Weight of the value loss."""
    value_learning_rate: float | None = setting(None, ge=0, le=RATE)
    """AdamW step size of the value head; null: train.learning_rate."""
    entropy_coef: float = setting(0.01, ge=0, le=WEIGHT)
    """Weight of the entropy bonus, exact over the vocabulary, per nat."""
    gamma: float = setting(1.0, ge=0, le=1)
    """Discount per token; GRADE's paper runs its PPO at 0.99."""
    gae_lambda: float = setting(0.95, ge=0, le=1)
    """Decay of generalised advantage estimation per token."""
    whiten_advantages: bool = True
    """Shift and scale advantages to mean 0 and variance 1 (over n - 1) of the step's real tokens."""
    kl: Literal["reward", "loss"] = "reward"
    """`reward`: every token pays kl_coef times its log-ratio to the reference; `loss`: the exact KL is a loss term.
    TRL's `kl_coef` is `reward` with kl_reduction `sequence_sum`."""
    target_kl: float | None = setting(0.1, gt=0, le=WEIGHT)
    """Stop a step's passes once the approximate KL to the policy that sampled its responses, nats per token, exceeds
    this; method.target_kl is another quantity, the KL to the reference."""


@dataclass
class ReinforceConfig:
    """REINFORCE on whole responses (method.name: reinforce)."""

    baseline: Literal["ema", "leave_one_out", "none"] = "ema"
    """`ema`: moving average of the return. `leave_one_out`: mean of the other responses, of the same prompt if
    generation.samples_per_prompt is above 1 (RLOO)."""
    ema_decay: float = setting(0.9, ge=0, lt=1)
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
    clip_low: float = setting(0.2, gt=0, le=1)
    """Smallest importance ratio that counts: 1 - clip_low."""
    clip_high: float = setting(0.2, gt=0, le=WEIGHT)
    """Largest importance ratio that counts: 1 + clip_high."""
    epochs: int = setting(1, ge=1, le=1000)
    """Passes over the responses of a step."""
    minibatches: int = setting(1, ge=1, le=BATCH)
    """Optimizer steps of a pass."""
    kl_policy_ref_coef: float = setting(0.0, ge=0, le=WEIGHT)
    """Weight of an exact kl(policy‖ref) beside normalised advantages, per nat; it comes on top of method.kl_coef."""
    kl_ref_policy_coef: float = setting(0.0, ge=0, le=WEIGHT)
    """The same for kl(ref‖policy): TRL's `beta`, whose k3 estimator has the expected gradient of this direction."""
    preference_coef: float = setting(1.0, ge=0, le=WEIGHT)
    """Weight of the reward in the shaped reward."""
    entropy_reward_coef: float = setting(0.0, ge=0, le=WEIGHT)
    """Weight of the policy's entropy, per nat, in the shaped reward: of a token, or mean of a response."""


@dataclass
class MethodConfig:
    """The gradient estimator and its objective: -mean reward + kl_coef * KL. Of the
    settings without a section, `estimator`, `rao_samples`, `path_scale`, `kl_prefix_grad`, `tau_*`, `max_hops`,
    `hop_tol` and `replay_dropout` are those of `grade` and `grade-ste`."""

    name: Literal["grade-ste", "grade", "ppo", "reinforce", "grpo"] = "grade-ste"
    """`grade-ste`: straight-through, hard tokens fed forward. `grade`: soft tokens fed forward. The others are policy
    gradients, which need no gradient of the reward."""
    estimator: Literal["gumbel", "rao", "straight_through", "reinmax"] = "gumbel"
    """Local rule from a token's embedding gradient to its logits; `grade` needs `gumbel`, and `reinmax` temperatures of
    1 or more."""
    rao_samples: int = setting(16, ge=1, le=4096)
    """Conditional Gumbel draws per token that `rao` averages."""
    path_scale: float = setting(1.0, gt=0, le=WEIGHT)
    """Multiplies what has come through a token's embedding, reward and later KL, and not the KL at a token's own
    logits, which is exact: the local rule sets the length of the one, not of the other."""
    kl_coef: float = setting(0.1, ge=0, le=WEIGHT)
    """Weight of the KL term, per nat; with a `target_kl` what it starts from."""
    target_kl: float | None = setting(None, gt=0, le=WEIGHT)
    """Move kl_coef after every step so that the step's KL to the reference comes to this many nats, per token or per
    response as kl_reduction has it; null: kl_coef stays. method.ppo.target_kl is another quantity."""
    target_kl_rate: float = setting(0.1, gt=0, le=1)
    """How fast: kl_coef changes by this times the KL's relative excess, of which at most a fifth counts; at 0.1 at most
    2 % a step."""
    kl_direction: Literal["policy_ref", "ref_policy"] = "policy_ref"
    """`policy_ref`: kl(policy‖ref). `ref_policy`: kl(ref‖policy). Exact over the vocabulary."""
    kl_reduction: Literal["token_mean", "sequence_sum"] = "token_mean"
    """`token_mean`: over the global batch's real tokens. `sequence_sum`: per response, mean over those."""
    kl_prefix_grad: Literal["both", "policy", "none"] = "both"
    """KL's gradient through earlier tokens: by both models (exact), by the policy only, or not at all."""
    tau_start: float = setting(2.0, ge=1e-4, le=WEIGHT)
    """Temperature of the relaxation at step 0. Sampling itself stays at temperature 1."""
    tau_end: float = setting(2.0, ge=1e-4, le=WEIGHT)
    """Temperature after tau_steps; linear in between, constant after. The paper goes down to 0.5."""
    tau_steps: int = setting(2000, ge=1, le=COUNT)
    """Optimizer steps of the annealing."""
    max_hops: int = setting(16, ge=0, le=TOKENS)
    """Most applications of the hop operator per step; exact at max_new_tokens - 1."""
    hop_tol: float = setting(1e-2, ge=0, le=WEIGHT)
    """A sequence stops hopping when its last change relative to its gradient (hidden space), both of the gradient
    before path_scale, is at most this."""
    replay_dropout: bool = False
    """Adapter dropout during replay. Breaks the fixed point of `grade`, which refuses it."""
    activation_checkpointing: Literal["auto"] | bool = setting("auto", role="speed")
    """Recompute activations in the backward passes: less memory, more time. `auto`: only if trials of a
    step find that the run would otherwise exceed 80 % of the free memory."""
    prompt_cache: bool = True
    """The frozen pass reads prompts from a KV cache, one per distinct prompt, and the policy's where that is quicker;
    off with checkpointing, and for models that keep recurrent states."""
    head_chunk_mib: int | None = setting(None, ge=1, le=2**20, role="speed")
    """Memory for the head's logits chunks, MiB; null: 64 on a CPU, about what its caches hold, and 256 elsewhere."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    reinforce: ReinforceConfig = field(default_factory=ReinforceConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)

    @property
    def minibatches(self) -> int:
        """Parts of a step's responses that are updates of their own: of PPO and GRPO, 1 of the others."""
        return getattr(getattr(self, self.name, None), "minibatches", 1)

    @property
    def updates(self) -> int:
        """Most optimizer updates of a step: of PPO and GRPO its passes times their parts, 1 of the others."""
        return self.minibatches * getattr(getattr(self, self.name, None), "epochs", 1)

    def head_chunk_bytes(self, device: str) -> int:
        """`head_chunk_mib` on this type of device, bytes."""
        return (self.head_chunk_mib or (64 if device == "cpu" else 256)) * 2**20


def method_named(method: MethodConfig, name: str) -> MethodConfig:
    """`method` with the name of METHODS or the changes of VARIANTS.

    What another method was given does not hold for `grade`: its estimator is `gumbel`, the only one it has, and its
    path_scale 1, as what grade-ste's gradient lacks of its length says nothing of that of mixtures.
    """
    base, changes = VARIANTS.get(name, (name, {}))
    sections: dict[str, Any] = {base: replace(getattr(method, base), **changes)} if changes else {}
    if base == "grade":
        sections["estimator"] = "gumbel"
        if method.name != "grade":
            sections["path_scale"] = 1.0
    return replace(method, **{"name": base, **sections})


def micro_batch_size(method: MethodConfig, batch_size: int, responses: int) -> int:
    """Responses that pass through the policy together: a mini-batch is made of whole micro-batches, so that what a
    response shares its pass with never changes.

    Args:
        batch_size: train.batch_size.
        responses: of a step, on one process.
    """
    return math.gcd(batch_size, responses // method.minibatches)


def check_method(
    method: MethodConfig,
    *,
    samples_per_prompt: int,
    responses: int,
    ids_from: str | None,
    no_gradient: str | None = None,
    functions: bool = False,
    has_program: bool = False,
) -> None:
    """Refuse a method that cannot work with the rest of the settings.

    Args:
        responses: of a step, on one process.
        ids_from: the setting by which only the token ids of responses come from elsewhere; None where they are sampled
            here, so that their noise is known.
        no_gradient: what the reward is, if it cannot be backpropagated.
        functions: whether functions are a part of the reward, or a program beside its proxy.
        has_program: whether the task is judged by a program, which may have a proxy.

    Raises:
        GradeError: naming the setting, the reason and the fix.
    """
    if method.name in DIFFERENTIATING and no_gradient is not None:
        raise GradeError(
            f"method.name={method.name} backpropagates the reward, and {no_gradient} without a gradient. Use a method "
            f"that only needs its value: {', '.join(BY_VALUE)}"
            + ("; or set reward.proxy to true, which trains a proxy with a gradient." if has_program else ".")
        )
    if method.name in DIFFERENTIATING and functions and method.replay_dropout:
        followed = "the task's program is" if has_program else "reward.functions are"
        raise GradeError(
            f"method.replay_dropout is true, and {followed} followed by the probabilities of the sampled tokens, which "
            "dropout would change. Set it to false."
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
    if method.name == "grade-ste" and method.estimator == "reinmax":
        for name in ("tau_start", "tau_end"):
            if getattr(method, name) < 1:
                raise GradeError(
                    f"method.{name} is {getattr(method, name)}, but method.estimator=reinmax is second-order accurate "
                    "at a temperature of 1, and its authors refuse less than that: its first term would follow the "
                    f"drawn token alone. Set method.{name} to 1 or more, or use the estimator rao."
                )
    if method.name in DIFFERENTIATING and method.estimator == "gumbel" and ids_from is not None:
        raise GradeError(
            f"{ids_from} gives token ids, but method.name={method.name} with method.estimator=gumbel needs the "
            "noise they were drawn with. Use grade-ste with the estimator rao, straight_through or reinmax."
        )
    if method.target_kl is not None and method.kl_coef == 0:
        raise GradeError(
            "method.target_kl steers method.kl_coef by multiplying it, which leaves 0 what it is. Set method.kl_coef "
            "above 0, such as 0.1, or method.target_kl to null."
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
    if responses % method.minibatches:
        raise GradeError(
            f"method.{method.name}.minibatches ({method.minibatches}) does not divide the {responses} responses of a "
            "step (train.batch_size * train.accumulation_steps). Change one of them."
        )
