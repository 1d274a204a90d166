"""The phases of a step of each method, by the names that a run logs, and what a device does in them.

Every response is taken to be at its longest, `generation.max_new_tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from grade.planning.run import Run
from grade.planning.work import Passes, Work


@dataclass(frozen=True)
class Phase:
    """A phase of a step.

    Attributes:
        parts: that follow each other, and are bound each by something of its own.
    """

    name: str
    parts: tuple[Work, ...]

    @property
    def work(self) -> Work:
        return sum(self.parts, Work())


def phases_of(run: Run) -> list[Phase]:
    """Of one step, on one device; a rollout that another engine makes is none."""
    sampled = [Phase("rollout", rollout(run))] if run.samples_here else []
    between = _replayed(run) if run.differentiates else _policy_gradient(run)
    return [*sampled, *between, Phase("update", (update(run), summed_gradients(run)))]


def rollout(run: Run) -> tuple[Work, ...]:
    """The prompts' pass, and the tokens one after the other."""
    passes, batch = run.passes, run.together
    times = run.responses / batch
    prompts = run.prompts_of(batch)
    merged = run.merges
    first = passes.forward(prompts * run.prompt, passes.pairs(prompts, 0, run.prompt), adapters=not merged)
    tokens = passes.decode(batch, run.prompt, run.response, adapters=True, merged=merged)
    if run.config.method.name == "grade":  # the mixtures of candidates that are fed
        k = run.config.generation.top_k
        tokens += Work(traffic=batch * run.response * k * run.shape.width * run.item)
    if run.records:
        tokens = replace(tokens, recorded=tokens.layers, layers=0.0)
    copies = Work()
    if merged:  # the adapter's product, added to copies
        copies = Work(flops=2 * run.trained.rank * run.trained.copied, traffic=3 * 4 * run.trained.copied)
    return first * times, tokens * times, copies * times


def _parts(run: Run, passes: Passes, batch: float, *, apart: bool) -> list[tuple[float, float]]:
    """(positions, pairs that attention compares) of the one pass over prompts and responses or, `apart`, of the
    distinct prompts' and the responses'."""
    if not apart:
        return [(batch * run.whole, passes.pairs(batch, 0, run.whole))]
    prompts = run.prompts_of(batch)
    first = (prompts * run.prompt, passes.pairs(prompts, 0, run.prompt))
    return [first, (batch * run.response, passes.pairs(batch, run.prompt, run.response))]


def _policy(run: Run, passes: Passes, batch: float) -> tuple[Work, Work, Work]:
    """The policy's forward pass, a backward pass to the response's embeddings, and the one to the parameters.

    The first of these leaves out the prompts that have a pass of their own, but no part of whole sequences.
    """
    parts = _parts(run, passes, batch, apart=run.prompts_apart)
    forward = sum((passes.forward(*part, adapters=True) for part in parts), Work())
    hop = passes.backward(*parts[-1], adapters=True, recompute=run.recompute)
    final = (passes.backward(*part, adapters=True, parameters=True, recompute=run.recompute) for part in parts)
    return forward, hop, sum(final, Work())


def _base_forward(run: Run, passes: Passes, batch: float) -> Work:
    """The frozen base over prompt and response, and a reward with a pass of its own."""
    parts = _parts(run, passes, batch, apart=run.reads_prompt_cache)
    work = sum((passes.forward(*part, adapters=False) for part in parts), Work())
    if run.judged:
        judge = run.classifier_passes or passes
        work += judge.forward(batch * run.judged, judge.pairs(batch, 0, run.judged), adapters=False)
    return work


def _base_backward(run: Run, passes: Passes, batch: float) -> Work:
    """Back to what base and reward were fed. Without a cache of the prompt its positions are computed too."""
    work = Work()
    if run.shares_base or run.config.method.kl_prefix_grad == "both":
        response = _parts(run, passes, batch, apart=run.reads_prompt_cache)[-1]
        work += passes.backward(*response, adapters=False, recompute=run.recompute)
    tables = 1
    if run.judged:
        judge = run.classifier_passes or passes
        pairs = judge.pairs(batch, 0, run.judged)
        work += judge.backward(batch * run.judged, pairs, adapters=False, recompute=run.recompute)
        tables = 2
    return work + passes.rule(batch * run.response, run.config.generation.top_k, tables)


def _replayed(run: Run) -> list[Phase]:
    """GRADE and GRADE-STE: forwards, the sweep over the vocabulary, and the backward passes, of every micro-batch."""
    passes, batch = run.training_passes, run.micro_batch
    times = run.responses / batch
    rows = batch * run.response
    forward, hop, final = _policy(run, passes, batch)
    hop += passes.rule(rows, run.config.generation.top_k, 1)
    works = {
        "policy_forward": forward,
        "base_forward": _base_forward(run, passes, batch),
        "head": passes.head(rows, 2, 2, run.chunk_rows),
        "base_backward": _base_backward(run, passes, batch),
        "hops": hop * run.hops,
        "policy_backward": final,
    }
    return [Phase(name, (work * times,)) for name, work in works.items()]


def _policy_gradient(run: Run) -> list[Phase]:
    """PPO, REINFORCE and GRPO: what is fixed is scored once, then every pass over the responses is a forward of the
    policy, a sweep over its head, and a backward pass."""
    passes, method, batch = run.training_passes, run.config.method, run.micro_batch
    times = run.responses / batch
    rows = batch * run.response
    forward, _, back = _policy(run, passes, batch)
    epochs, reference = 1, True
    if method.name == "ppo":
        sampled, epochs, reference = True, method.ppo.epochs, method.ppo.kl == "loss"
    elif method.name == "grpo":
        epochs = method.grpo.epochs
        sampled = epochs * method.grpo.minibatches > 1 or method.grpo.entropy_reward_coef > 0
    else:
        sampled = method.reinforce.baseline == "leave_one_out"
    score = _base_forward(run, passes, batch)
    if sampled:
        score += forward + passes.head(rows, 2, 0, run.chunk_rows)
    sweep = passes.head(rows, 2 if reference else 1, 1, run.chunk_rows)
    return [Phase("score", (score * times,)), Phase("backward", ((forward + sweep + back) * (times * epochs),))]


def updates_of(run: Run) -> int:
    """Optimizer steps of a step of the method, at most."""
    method = run.config.method
    epochs = getattr(getattr(method, method.name, None), "epochs", 1)
    return epochs * method.minibatches


def update(run: Run) -> Work:
    """Clipping and AdamW: norms read the gradients and scale them, and AdamW reads parameter, gradient and two moments
    and writes all but the gradient."""
    return Work(traffic=(3 + 7) * 4 * run.trained.parameters, layers=1) * updates_of(run)


def summed_gradients(run: Run) -> Work:
    """The sum of the trained parameters' gradients over devices, tensor by tensor: a ring passes each number on twice
    as often as there are devices."""
    if run.devices == 1:
        return Work()
    received = 2 * (1 - 1 / run.devices) * 4 * run.trained.parameters
    return Work(received=received, exchanges=run.trained.tensors) * updates_of(run)


def engine_rollout(run: Run, devices: int, batch: int) -> tuple[Work, ...]:
    """What each of `devices` does where an engine such as vLLM splits every product among them (tensor parallelism) and
    samples `batch` responses together: each reads its share of weights, keys and values, and receives the sum of
    partial results twice a layer. Launches are recorded."""
    passes = replace(run.passes, shards=1)
    prompts = run.prompts_of(batch)
    first = passes.forward(prompts * run.prompt, passes.pairs(prompts, 0, run.prompt), adapters=True)
    tokens = passes.decode(batch, run.prompt, run.response, adapters=True)

    def split(work: Work, positions: float, steps: float) -> Work:
        sums = 2 * run.shape.layers  # of one pass
        received = 2 * (1 - 1 / devices) * sums * positions * run.shape.width * run.item
        return Work(
            flops=work.flops / devices,
            bytes=work.bytes / devices,
            traffic=work.traffic / devices,
            received=received,
            recorded=work.layers,
            exchanges=sums * steps if devices > 1 else 0.0,
        )

    return (split(first, prompts * run.prompt, 1), split(tokens, batch * (run.response - 1), run.response - 1))
