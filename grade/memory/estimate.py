"""What a run will need of memory at its peak.

    peak = weights + optimizer + compiled + max(rollout, activations + head, evaluation)

The activations of a pass are measured (`grade.memory.activations`); what the rest of a step holds (the cache, the
candidates, the arrays of the vocabulary sweep and of the hops) follows from shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grade.config import Config
from grade.config.methods import DIFFERENTIATING, micro_batch_size
from grade.memory.activations import (
    PassBytes,
    cache_bytes,
    measure_pass,
    policy_forward,
    reads_response,
    reward_forward,
)
from grade.model.policy import Policy
from grade.rewards.base import Reward
from grade.sampling.compiled import capacity_of
from grade.sampling.packed_head import worth_packing
from grade_kernels import backend_for, chunk_rows
from grade_kernels.common.chunks import piece_rows

_GIB = 2**30
# What the largest phase is called.
_WHERE = {"passes": "", "rollout": "in sampling ", "evaluation": "in evaluation "}


@dataclass(frozen=True)
class Estimate:
    """Peak memory of a run, bytes.

    Attributes:
        sizes: "P", "S", "k": longest prompt and response in tokens, candidates of a token.
        batches: B by phase, "rollout", "passes" and "evaluation": responses at a time.
        loaded: what is there already: the weights of policy and reward.
        parts: "weights", "optimizer", with rollout.compile "compiled" (its cache stays), and by phase "rollout",
            "activations" and "head" (together), "evaluation".
        checkpointed: the same with activation checkpointing; None where the architecture has none.
    """

    sizes: dict[str, int]
    batches: dict[str, int]
    loaded: int
    parts: dict[str, int]
    checkpointed: dict[str, int] | None

    def total(self, checkpoint: bool) -> int:
        parts = self._parts(checkpoint)
        always = parts["weights"] + parts["optimizer"] + parts.get("compiled", 0)
        return always + max(_phases(parts).values())

    def more(self, checkpoint: bool) -> int:
        """What is needed beside what is loaded."""
        return self.total(checkpoint) - self.loaded

    def largest(self, checkpoint: bool) -> str:
        """The phase whose settings decide: "rollout", "passes" (that training makes over what was sampled) or
        "evaluation"."""
        phases = _phases(self._parts(checkpoint))
        return max(phases, key=lambda name: phases[name])

    def sentence(self, checkpoint: bool) -> str:
        """Total and parts, such as `about 1.3 GiB at B = 8, P = 32, S = 64, k = 256 (weights 102 MiB, ...)`."""
        largest = self.largest(checkpoint)
        sizes = {"B": self.batches[largest], **self.sizes}
        at = ", ".join(f"{name} = {size:,}" for name, size in sizes.items())
        size = {name: f"{name} {size_of(part)}" for name, part in self._parts(checkpoint).items()}
        always = ", ".join(size[name] for name in ("weights", "optimizer", "compiled") if name in size)
        return (
            f"about {size_of(self.total(checkpoint))} {_WHERE[largest]}at {at} ({always}; and the largest of "
            f"{size['rollout']}, {size['activations']} + {size['head']}, {size['evaluation']})"
        )

    def _parts(self, checkpoint: bool) -> dict[str, int]:
        return self.checkpointed if checkpoint and self.checkpointed else self.parts


def _phases(parts: dict[str, int]) -> dict[str, int]:
    """Of which one is in memory at a time; the first of equals counts as the largest."""
    return {
        "passes": parts["activations"] + parts["head"], "rollout": parts["rollout"], "evaluation": parts["evaluation"],
    }


def size_of(size: float) -> str:
    """Bytes in GiB, or in MiB where they are less."""
    return f"{size / _GIB:.1f} GiB" if size >= _GIB else f"{math.ceil(size / 2**20)} MiB"


@dataclass(frozen=True)
class _Shapes:
    """What the arrays of a run are made of.

    Args:
        prompt, response: P and S, tokens.
        width, vocabulary, candidates: d, V and k.
        item: bytes of one of the model's numbers.
        cache: bytes of one position's keys and values, in all layers.
        layer_cache: the same in one layer.
        states: bytes of a response's recurrent states, twice: one set is copied when rows leave the batch.
        chunk, piece: rows of the vocabulary sweep's chunks, and of what its elementwise passes make at a time (0 for
            kernels that keep that in registers).
    """

    prompt: int
    response: int
    width: int
    vocabulary: int
    candidates: int
    item: int
    cache: float
    layer_cache: float
    states: float
    chunk: int
    piece: int

    @property
    def whole(self) -> int:
        return self.prompt + self.response

    def logits(self, rows: int) -> float:
        """Of the vocabulary sweep: three float32 arrays of a chunk, and about five of a piece."""
        return 4 * self.vocabulary * (3 * min(rows, self.chunk) + 5 * min(rows, self.piece))

    def rollout(self, responses: int, prompts: int, ours: PassBytes) -> float:
        """Sampling together: the cache, one layer's copy of it, and the prompts' pass or a token's logits."""
        cache = (self.cache + self.layer_cache) * responses * self.whole + self.states * responses
        return cache + max(ours.layer(self.prompt) * prompts, self.logits(responses))

    def scoring(self, responses: int, ours: PassBytes) -> float:
        """Both passes without a graph, one after the other, and the sweep: hidden states, the base's cache, one layer,
        and per candidate the ids twice, logits and a comparison."""
        rows, tokens = responses * self.response, responses * self.whole
        hidden = (3 * tokens + 4 * rows) * self.width * self.item
        working = max(self.cache * tokens + ours.layer(self.whole) * responses, self.logits(rows))
        return hidden + working + 24 * rows * self.candidates

    def replay_head(self, rows: int) -> tuple[float, float]:
        """(held, worked with) by the vocabulary sweep with its gradients and by the hops: three float32 hidden states,
        and per candidate the id, logits twice, whether allowed; a chunk, or seven hidden states and four [n, k]."""
        states, candidates = 4 * rows * self.width, rows * self.candidates
        return 3 * states + 17 * candidates, max(self.logits(rows), 7 * states + 16 * candidates)

    def objective_head(self, rows: int) -> tuple[float, float]:
        """The same of `grade_kernels.vocab_objective` and its backward: hidden states of both models and a gradient,
        and per candidate the id, logits four times, whether allowed; a chunk, or two hidden states and three [n, k]."""
        states, candidates = 4 * rows * self.width, rows * self.candidates
        return 3 * states + 25 * candidates, max(self.logits(rows), 2 * states + 12 * candidates)


def estimate(
    policy: Policy, reward: Reward, config: Config, prompt_length: int, evaluated: int | None = None
) -> Estimate:
    """The peak memory of a run of `config`, for up to ten forwards of at most 96 tokens; the models stay as they were.

    Args:
        prompt_length: P, tokens of the longest prompt.
        evaluated: prompts of the largest evaluation; None: as many as evaluation.batch_size or more.
    """
    generation, train, method = config.generation, config.train, config.method
    responses, copies = train.batch_size * train.accumulation_steps, generation.samples_per_prompt
    decoded = min(generation.batch_size or responses, responses)
    batch = micro_batch_size(method, train.batch_size, responses)
    cache, layer_cache, states = cache_bytes(policy)
    prompt_cache = method.prompt_cache and policy.reads_prompt_cache
    vocabulary, k = policy.vocab_size, generation.top_k
    in_pieces = backend_for("vocab_head", policy.head.weight, k=k) == "torch"
    shapes = _Shapes(
        prompt_length, generation.max_new_tokens, policy.head.weight.shape[1], vocabulary, k, policy.dtype.itemsize,
        cache, layer_cache, 2 * states, chunk_rows(vocabulary, method.head_chunk_bytes(policy.device.type)),
        piece_rows(vocabulary, torch.float32, policy.device) if in_pieces else 0,
    )
    padded = batch > 1  # one response alone is cut to its own length
    forward = policy_forward(policy, adapters=True, dropout=method.replay_dropout, padded=padded)
    ours = measure_pass(policy.modules, forward, shapes.whole)
    # Sampled responses wait for their turn: ids and, for soft tokens, weights of the candidates.
    waiting = responses * shapes.response * generation.top_k * (12 if method.name == "grade" else 8)
    modules = [policy.modules, *reward.modules]
    weights = _bytes(t for m in modules for t in (*m.parameters(), *m.buffers()))
    sampled = config.rollout.source is None
    compiled = config.rollout.compile and sampled
    merged = _bytes(policy.merged_weights())  # copies, while something is sampled
    merged_here = 0 if compiled and policy.device.type == "cuda" else merged

    def packed(rows: int) -> int:
        return _bytes([policy.head.weight]) if worth_packing(policy.head.weight, rows, shapes.response) else 0

    optimizer = 3 * _bytes(policy.parameters())  # gradients and two moments
    before: dict[str, float] = {"weights": weights, "optimizer": optimizer, "rollout": waiting}
    if sampled:
        before["rollout"] += shapes.rollout(decoded, max(decoded // copies, 1), ours) + merged_here + packed(decoded)
    if compiled:
        before["compiled"] = cache * decoded * capacity_of(shapes.whole)
    asked = config.evaluation.batch_size
    if evaluated is not None:
        asked = min(asked, evaluated)
    candidates = 8 * asked * shapes.response * k
    copied = merged + (packed(asked) if config.evaluation.sampler == "policy" else 0)
    after = {"evaluation": candidates + max(shapes.rollout(asked, asked, ours) + copied, shapes.scoring(asked, ours))}
    if method.name in DIFFERENTIATING:
        base = measure_pass(policy.modules, policy_forward(policy, adapters=False), shapes.whole)
        activations = _replay_activations(policy, reward, shapes, ours, base, prompt_cache=prompt_cache)
        held, working = shapes.replay_head(batch * shapes.response)
        terms = {"rao": method.rao_samples, "reinmax": 2}.get(method.estimator, 1)
        further = 4 * (terms - 1) * batch * shapes.response * k  # weights that hops keep, up to a bound
        held += further if in_pieces and further <= method.head_chunk_bytes(policy.device.type) else 0
    else:
        def activations(checkpoint: bool) -> float:
            return ours.held(shapes.whole, checkpoint) + shapes.whole * shapes.width * shapes.item
        # of every response, the reference's hidden states and those of the policy that sampled
        waiting += 2 * responses * shapes.response * shapes.width * shapes.item
        held, working = shapes.objective_head(batch * shapes.response)
    found = []
    for checkpoint in (False, True):
        layer = batch * ours.at_work(shapes.whole, checkpoint)
        passes = {"activations": waiting + batch * activations(checkpoint), "head": held + max(working, layer)}
        found.append({name: math.ceil(size) for name, size in {**before, **passes, **after}.items()})
    sizes = {"P": prompt_length, "S": shapes.response, "k": k}
    batches = {"rollout": decoded, "passes": batch, "evaluation": asked}
    return Estimate(sizes, batches, weights, found[0], found[1] if policy.supports_activation_checkpointing else None)


def _replay_activations(
    policy: Policy, reward: Reward, shapes: _Shapes, ours: PassBytes, base: PassBytes, *, prompt_cache: bool
) -> Callable[[bool], float]:
    """Of one response: the graphs of policy, base and reward, which replay holds at the same time, their inputs and
    hidden states; as a function of whether they are checkpointed."""
    own = None
    if not reward.shares_base_pass:
        whole = nn.ModuleList([policy.modules, *reward.modules])
        own = measure_pass(whole, reward_forward(policy, reward), shapes.whole)
        length = shapes.response if reads_response(reward) else shapes.whole
    states = shapes.width * shapes.item * (2 * shapes.whole + 3 * shapes.response)

    frozen = 2 if policy.has_reference and reward.shares_base_pass else 1  # base, and a reference of its own

    def activations(checkpoint: bool) -> float:
        graphs = ours.held(shapes.whole, checkpoint) + states
        if checkpoint or not prompt_cache:
            graphs += frozen * base.held(shapes.whole, checkpoint)
        else:  # the graph is that of the response, which reads the prompt's keys and values
            one = base.whole.between(shapes.response, shapes.whole) + shapes.cache * shapes.prompt
            graphs += frozen * one
        return graphs + (own.held(length, checkpoint) if own else 0)

    return activations


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of storages, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
