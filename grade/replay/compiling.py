"""`train.compile`: whether the layers of training's passes are compiled, and that their code is what they compute."""

from __future__ import annotations

import torch
from torch import Tensor

from grade.config import Config
from grade.config.methods import DIFFERENTIATING, micro_batch_size
from grade.errors import GradeError, reason_of
from grade.model.compiled_layers import failed
from grade.model.compiler import without_fix
from grade.model.passes import base_pass, fed_embeddings, policy_pass
from grade.model.policy import Policy
from grade.model.probe import combination, relative_error, tolerance_of
from grade.planning.prompt_pass import pays_in_run
from grade.planning.recording import layers_pay
from grade.rollout import Rollout

# Code is made for sizes like those that it is compiled for, and runs with any. These are large enough to be typical of
# a run's, and fit beside any model that can be trained.
_LONGEST_PROMPT, _LONGEST_RESPONSE = 64, 256


def compile_layers(policy: Policy, config: Config) -> str | None:
    """Compile the policy's layers where the settings want it; what is to be said of it.

    Raises:
        GradeError: train.compile is true, and the layers cannot be compiled.
    """
    wanted = config.train.compile
    if not wanted or wanted == "auto" and not layers_pay(config, on_gpu=policy.device.type == "cuda"):
        return None
    try:
        policy.switches.compile_layers()
        count = probe_compiled(policy, config)
    except GradeError as error:
        policy.switches.compile_layers(False)
        if wanted != "auto":
            raise
        return f"train.compile=auto: layers are not compiled. {without_fix('train.compile', error)}"
    return (
        f"train.compile: layers compiled as {count} graphs; another kind of batch, such as without padding, adds some"
    )


def probe_compiled(policy: Policy, config: Config) -> int:
    """Compile what a step of the run needs, and compare it with the layers' own code; the number of graphs compiled.

    Raises:
        GradeError: the layers cannot be compiled, or compute something else so.
    """
    name = type(policy.causal_lm).__name__
    rollout = _rollout(policy, config)
    passes = _gradients if config.method.name in DIFFERENTIATING else _values
    try:
        with policy.switches.uncompiled():
            expected = passes(policy, rollout, config)
        found = passes(policy, rollout, config)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
        raise failed(f"the passes of {name} cannot run with compiled layers ({reason_of(error)})") from error
    errors = [relative_error(ours, plain) for ours, plain in zip(found, expected, strict=True)]
    if max(errors) > tolerance_of(policy.dtype):
        raise failed(f"compiled layers of {name} give other states or gradients than their own code")
    return policy.switches.compilations


def _rollout(policy: Policy, config: Config) -> Rollout:
    """Two responses to prompts of different lengths, or one where the run passes one at a time."""
    responses = config.train.batch_size * config.train.accumulation_steps
    rows = min(2, micro_batch_size(config.method, config.train.batch_size, responses))
    prompt = max(min(config.task.prompt_max_tokens, _LONGEST_PROMPT), 3)
    length = max(min(config.generation.max_new_tokens, _LONGEST_RESPONSE), 4)
    length += length == prompt  # equal sizes are taken for one that changes with the other
    ids = torch.arange(1, 1 + rows * (prompt + length), device=policy.device) * 7919 % len(policy.embedding)
    ids = ids.view(rows, prompt + length)
    prompt_mask = torch.ones_like(ids[:, :prompt], dtype=torch.bool)
    prompt_mask[1:, : prompt // 2] = False
    tokens = ids[:, prompt:]
    return Rollout(
        prompt_ids=ids[:, :prompt],
        prompt_mask=prompt_mask,
        tokens=tokens,
        mask=torch.ones_like(tokens, dtype=torch.bool),
        indices=tokens[..., None],
        token_weight=torch.ones_like(tokens, dtype=torch.float32),
        rows=tokens,
        padded=rows > 1,
    )


def _prompts_apart(policy: Policy, config: Config) -> bool:
    """Whether the policy's pass over a micro-batch of the run would be two, the prompts' first."""
    train = config.train
    responses = micro_batch_size(config.method, train.batch_size, train.batch_size * train.accumulation_steps)
    width, on_gpu = policy.embedding.shape[1], policy.device.type != "cpu"
    return pays_in_run(config, responses, width=width, item=policy.dtype.itemsize, on_gpu=on_gpu)


def _fed(policy: Policy, rollout: Rollout) -> Tensor:
    return fed_embeddings(rollout, policy.embedding, policy.embedding_scale)


def _gradients(policy: Policy, rollout: Rollout, config: Config) -> list[Tensor]:
    """Of a replay: states, two hops and the gradient of the policy's weights, states and gradient of the base."""
    with torch.enable_grad():
        apart, x = _prompts_apart(policy, config), _fed(policy, rollout).requires_grad_()
        hidden = policy_pass(policy, rollout, x, apart=apart, compiled=True)
        found, gradient = [hidden.detach()], combination(hidden)
        with policy.switches.gradients_of_inputs():
            for _ in range(2):
                (gradient,) = torch.autograd.grad(hidden, x, gradient, retain_graph=True)
                found.append(gradient)
        found.append(_of_weights(policy, hidden))
        base = base_pass(policy, rollout, x, prompt_cache=config.method.prompt_cache, compiled=True)
        states = torch.cat([base.reference, base.response], dim=1)
        return [*found, states.detach(), *torch.autograd.grad(states, x, combination(states))]


def _values(policy: Policy, rollout: Rollout, config: Config) -> list[Tensor]:
    """Of a policy gradient: states and the gradient of the policy's weights, those of the policy as it was, and of
    the base."""
    apart, x = _prompts_apart(policy, config), _fed(policy, rollout)
    with torch.enable_grad():
        hidden = policy_pass(policy, rollout, x, apart=apart, compiled=True)
        found = [hidden.detach(), _of_weights(policy, hidden)]
    with torch.no_grad():
        if config.method.name in ("ppo", "grpo"):  # the old policy's, where there are several updates
            found.append(policy_pass(policy, rollout, x, apart=apart, compiled=True))
        base = base_pass(policy, rollout, x, prompt_cache=config.method.prompt_cache, compiled=True)
    return [*found, base.reference, base.response]


def _of_weights(policy: Policy, hidden: Tensor) -> Tensor:
    gradients = torch.autograd.grad(hidden, policy.parameters(), combination(hidden))
    return torch.cat([gradient.flatten() for gradient in gradients])
