"""What a run will need of memory at its peak, and what to change where that is more than there is.

    peak = weights + optimizer + compiled + max(rollout, activations + head, evaluation)

The activations of a pass are measured (`grade.activations`); what the rest of a step holds (the cache, the candidates,
the arrays of the vocabulary sweep and of the hops) follows from shapes.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Callable, Dict, Iterable, Iterator, List, Optional, Tuple

import torch
from torch import Tensor, nn

from grade.activations import PassBytes, cache_bytes, measure_pass, policy_forward, reads_response, reward_forward
from grade.compiled_decoding import capacity_of
from grade.config import Config, GradeError
from grade.errors import first_line
from grade.method_config import DIFFERENTIATING, micro_batch_size
from grade.model import Policy
from grade.packed_head import packs
from grade.reward import Reward
from grade_kernels import backend_for, chunk_rows
from grade_kernels.torch_ops.chunks import piece_rows

_SHARE = 0.8  # of what is free that a run may take by this estimate: allocators lose some to fragments
_GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """Peak memory of a run, bytes.

    Attributes:
        sizes: "B", "P", "S", "k": responses of a pass, longest prompt and response in tokens, candidates of a token.
        loaded: what is there already: the weights of policy and reward.
        parts: "weights", "optimizer", with rollout.compile "compiled" (its cache stays), and by phase "rollout",
            "activations" and "head" (together), "evaluation".
        checkpointed: the same with activation checkpointing; None where the architecture has none.
    """

    sizes: Dict[str, int]
    loaded: int
    parts: Dict[str, int]
    checkpointed: Optional[Dict[str, int]]

    def total(self, checkpoint: bool) -> int:
        parts = self._parts(checkpoint)
        always = parts["weights"] + parts["optimizer"] + parts.get("compiled", 0)
        return always + max(parts["rollout"], _passes(parts), parts["evaluation"])

    def more(self, checkpoint: bool) -> int:
        """What is needed beside what is loaded."""
        return self.total(checkpoint) - self.loaded

    def largest(self, checkpoint: bool) -> str:
        """The section whose settings decide, "train" or "evaluation"."""
        parts = self._parts(checkpoint)
        return "evaluation" if parts["evaluation"] > max(parts["rollout"], _passes(parts)) else "train"

    def sampling_decides(self, checkpoint: bool) -> bool:
        """Whether sampling takes more than the passes that training makes over what was sampled."""
        parts = self._parts(checkpoint)
        return parts["rollout"] > _passes(parts)

    def sentence(self, checkpoint: bool) -> str:
        """Total and parts, such as `about 1.3 GiB at B = 8, P = 32, S = 64, k = 256 (weights 0.1, ...)`."""
        at = ", ".join(f"{name} = {size:,}" for name, size in self.sizes.items())
        parts = ", ".join(f"{name} {size / _GIB:.1f}" for name, size in self._parts(checkpoint).items())
        return f"about {self.total(checkpoint) / _GIB:.1f} GiB at {at} ({parts})"

    def _parts(self, checkpoint: bool) -> Dict[str, int]:
        return self.checkpointed if checkpoint and self.checkpointed else self.parts


def _passes(parts: Dict[str, int]) -> int:
    return parts["activations"] + parts["head"]


@dataclass(frozen=True)
class _Shapes:
    """What the arrays of a run are made of.

    Args:
        prompt, response: P and S, tokens.
        width, vocabulary, candidates: d, V and k.
        item: bytes of one of the model's numbers.
        cache: bytes of one position's keys and values, in all layers.
        layer_cache: the same in one layer.
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
        cache = (self.cache + self.layer_cache) * responses * self.whole
        return cache + max(ours.layer(self.prompt) * prompts, self.logits(responses))

    def scoring(self, responses: int, ours: PassBytes) -> float:
        """Both passes without a graph, one after the other, and the sweep: hidden states, the base's cache, one layer,
        and per candidate the ids twice, logits and a comparison."""
        rows, tokens = responses * self.response, responses * self.whole
        hidden = (3 * tokens + 4 * rows) * self.width * self.item
        working = max(self.cache * tokens + ours.layer(self.whole) * responses, self.logits(rows))
        return hidden + working + 24 * rows * self.candidates

    def replay_head(self, rows: int) -> Tuple[float, float]:
        """(held, worked with) by the vocabulary sweep with its gradients and by the hops: three float32 hidden states,
        and per candidate the id, logits twice, whether allowed; a chunk, or seven hidden states and four [n, k]."""
        states, candidates = 4 * rows * self.width, rows * self.candidates
        return 3 * states + 17 * candidates, max(self.logits(rows), 7 * states + 16 * candidates)

    def objective_head(self, rows: int) -> Tuple[float, float]:
        """The same of `grade_kernels.vocab_objective` and its backward: hidden states of both models and a gradient,
        and per candidate the id, logits four times, whether allowed; a chunk, or two hidden states and three [n, k]."""
        states, candidates = 4 * rows * self.width, rows * self.candidates
        return 3 * states + 25 * candidates, max(self.logits(rows), 2 * states + 12 * candidates)


def estimate(policy: Policy, reward: Reward, config: Config, prompt_length: int) -> Estimate:
    """The peak memory of a run of `config`, for up to ten forwards of at most 96 tokens; the models stay as they were.

    Args:
        prompt_length: P, tokens of the longest prompt.
    """
    generation, train, method = config.generation, config.train, config.method
    responses, copies = train.batch_size * train.accumulation_steps, generation.samples_per_prompt
    decoded = min(generation.batch_size or responses, responses)
    batch = micro_batch_size(method, train.batch_size, responses)
    cache, layer_cache = cache_bytes(policy)
    vocabulary, k = policy.vocab_size, generation.top_k
    in_pieces = backend_for("vocab_head", policy.head, k=k) == "torch"
    shapes = _Shapes(
        prompt_length, generation.max_new_tokens, policy.head.shape[1], vocabulary, k, policy.dtype.itemsize, cache,
        layer_cache, chunk_rows(vocabulary, method.head_chunk_bytes(policy.device.type)),
        piece_rows(vocabulary, torch.float32, policy.device) if in_pieces else 0,
    )
    padded = batch > 1  # one response alone is cut to its own length
    ours = measure_pass(
        policy.model, policy_forward(policy, adapters=True, dropout=method.replay_dropout, padded=padded), shapes.whole
    )
    # Sampled responses wait for their turn: ids and, for soft tokens, weights of the candidates.
    waiting = responses * shapes.response * generation.top_k * (12 if method.name == "grade" else 8)
    modules = [policy.model, *(m for m in vars(reward).values() if isinstance(m, nn.Module))]
    weights = _bytes(t for m in modules for t in (*m.parameters(), *m.buffers()))
    compiled = config.rollout.compile and config.rollout.source is None
    merged = _bytes(policy.merged_weights())  # copies, while something is sampled
    merged_here = 0 if compiled and policy.device.type == "cuda" else merged

    def packed(rows: int) -> int:
        return _bytes([policy.head]) if packs(policy.head, rows, shapes.response) else 0

    before = {
        "weights": weights, "optimizer": 3 * _bytes(policy.parameters()),  # gradients and two moments
        "rollout": shapes.rollout(decoded, max(decoded // copies, 1), ours) + merged_here + packed(decoded) + waiting,
    }
    if compiled:
        before["compiled"] = cache * decoded * capacity_of(shapes.whole)
    asked = config.evaluation.batch_size
    candidates = 8 * asked * shapes.response * k
    after = {
        "evaluation": candidates
        + max(shapes.rollout(asked, asked, ours) + merged + packed(asked), shapes.scoring(asked, ours))
    }
    if method.name in DIFFERENTIATING:
        base = measure_pass(policy.model, policy_forward(policy, adapters=False), shapes.whole)
        activations = _replay_activations(policy, reward, shapes, ours, base, prompt_cache=method.prompt_cache)
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
    sizes = {"B": batch, "P": prompt_length, "S": shapes.response, "k": generation.top_k}
    return Estimate(sizes, weights, found[0], found[1] if policy.can_checkpoint else None)


def _replay_activations(
    policy: Policy, reward: Reward, shapes: _Shapes, ours: PassBytes, base: PassBytes, *, prompt_cache: bool
) -> Callable[[bool], float]:
    """Of one response: the graphs of policy, base and reward, which replay holds at the same time, their inputs and
    hidden states; as a function of whether they are checkpointed."""
    own = None
    if not reward.shares_base_pass:
        own = measure_pass(getattr(reward, "model", policy.model), reward_forward(policy, reward), shapes.whole)
        length = shapes.response if reads_response(reward) else shapes.whole
    states = shapes.width * shapes.item * (2 * shapes.whole + 3 * shapes.response)

    def activations(checkpoint: bool) -> float:
        graphs = ours.held(shapes.whole, checkpoint) + states
        if checkpoint or not prompt_cache:
            graphs += base.held(shapes.whole, checkpoint)
        else:  # the graph is that of the response, which reads the prompt's keys and values
            graphs += base.whole.between(shapes.response, shapes.whole) + shapes.cache * shapes.prompt
        return graphs + (own.held(length, checkpoint) if own else 0)

    return activations


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of storages, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


# -- decision ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryPlan:
    """What a run will need, what there is, and whether it checkpoints.

    Args:
        free: bytes; None where the platform does not tell.
        chunk_bytes: of the head's logits.
    """

    config: Config
    estimate: Estimate
    free: Optional[int]
    checkpoint: bool
    chunk_bytes: int

    @property
    def line(self) -> str:
        """What the run says before its first step."""
        method, needed = self.config.method, self.estimate.more(self.checkpoint)
        auto = " (auto)" if method.activation_checkpointing == "auto" else ""
        free = "free memory unknown" if self.free is None else f"{self.free / _GIB:.1f} GiB free"
        line = (
            f"memory: {self.estimate.sentence(self.checkpoint)}; {free}; activation checkpointing "
            f"{'on' if self.checkpoint else 'off'}{auto}"
        )
        if self.free is not None and needed > self.free:
            line += f". That may not fit. {self._change(self.estimate.largest(self.checkpoint))}"
        return line

    @contextmanager
    def explained(self, what: str, section: str) -> Iterator[None]:
        """Turn running out of memory into what to change.

        Args:
            what: such as "step 3".
            section: "train" or "evaluation", whose settings decide.

        Raises:
            GradeError: memory ran out.
        """
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise GradeError(
                f"out of memory in {what}, which was estimated to need {self.estimate.sentence(self.checkpoint)}. "
                f"{self._change(section)} What was saved is kept. ({first_line(error)})"
            ) from error

    def _change(self, section: str) -> str:
        """The settings that lower the peak of training or evaluation, those first that leave the result what it is."""
        config, train, generation = self.config, self.config.train, self.config.generation
        responses, chunk = train.batch_size * train.accumulation_steps, self.chunk_bytes // 2**20
        changes: List[str] = []
        if section == "train":
            if not self.checkpoint and self.estimate.checkpointed:
                changes.append("method.activation_checkpointing to true")
            if train.batch_size > 1:
                changes.append(
                    f"train.batch_size below {train.batch_size} (with train.accumulation_steps above "
                    f"{train.accumulation_steps} for the same gradient)"
                )
            together = min(generation.batch_size or responses, responses)
            if together > generation.samples_per_prompt:
                first = 0 if self.estimate.sampling_decides(self.checkpoint) else len(changes)
                changes.insert(first, f"generation.batch_size below {together}")
        elif config.evaluation.batch_size > 1:
            changes.append(f"evaluation.batch_size below {config.evaluation.batch_size}")
        if chunk > 16:
            changes.append(f"method.head_chunk_mib below {chunk}")
        changes.append(f"generation.max_new_tokens below {generation.max_new_tokens}")
        return f"Set {', '.join(changes[:-1])} or {changes[-1]}." if changes[1:] else f"Set {changes[0]}."


def plan(
    policy: Policy, reward: Reward, config: Config, prompt_length: int, free: Optional[int],
    any_process: Callable[[bool], bool] = bool,
) -> MemoryPlan:
    """Estimate, and decide where method.activation_checkpointing is `auto`: on if the run would take more than 80 % of
    what is free on any process, and less with it."""
    found, asked = estimate(policy, reward, config, prompt_length), config.method.activation_checkpointing
    if asked == "auto":
        tight = free is not None and found.more(checkpoint=False) > _SHARE * free
        asked = any_process(tight and found.total(checkpoint=True) < found.total(checkpoint=False))
    return MemoryPlan(config, found, free, asked, config.method.head_chunk_bytes(policy.device.type))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out, on any device."""
    # oneDNN has no other word for it.
    words = ("DefaultCPUAllocator", "can't allocate memory", "could not create a primitive", "error: out of memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)
