"""What a run says before its first step: what it raises, and what else decides what its numbers mean."""

from __future__ import annotations

from grade.config import GenerationConfig, ModelConfig, TrainConfig
from grade.model.end_of_sequence import how_responses_end
from grade.model.policy import Policy
from grade.rewards.base import Reward


def opening_lines(
    model: ModelConfig,
    train: TrainConfig,
    generation: GenerationConfig,
    policy: Policy,
    reward: Reward,
    processes: int = 1,
) -> list[str]:
    """Lines for the terminal: what a higher reward means, what a step is, how responses end, what the policy goes on
    from, whether a model's own code runs."""
    lines = [f"reward: {reward.raises} is raised", step_line(train, generation, processes)]
    lines.append(how_responses_end(generation, policy))
    if policy.trains_all:
        count = sum(p.numel() for p in policy.parameters())
        lines.append(f"model.finetuning: {count:,} weights are trained; head and embedding table stay as they are")
    if model.adapter is not None:
        reference = "the policy as it started" if policy.has_reference else "the base without it"
        lines.append(f"model.adapter: goes on from {model.adapter}; the reference of KL is {reference}")
    if model.fsdp:
        where = f"sharded over {processes} processes" if policy.sharding is not None else "whole in this one process"
        lines.append(f"model.fsdp: the base's layers lie {where}")
    if model.trust_remote_code:
        lines.append(f"model.trust_remote_code: code that comes with {model.name} may run here")
    return lines


def step_line(train: TrainConfig, generation: GenerationConfig, processes: int) -> str:
    """What an optimizer step is made of: `a step: 8 prompts × 2 samples = 16 responses (...), 512 tokens at most`."""
    samples = generation.samples_per_prompt
    responses = train.batch_size * train.accumulation_steps * processes
    tokens = responses * generation.max_new_tokens
    parts = [f"train.batch_size {train.batch_size}", f"train.accumulation_steps {train.accumulation_steps}"]
    parts += [f"{processes} processes"] if processes > 1 else []
    return (
        f"a step: {responses // samples:,} prompts × {samples} {'sample' if samples == 1 else 'samples'} = "
        f"{responses:,} responses ({' × '.join(parts)}), {tokens:,} tokens at most"
    )
