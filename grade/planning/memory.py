"""What a device holds during a step, by what it is for: in sampling, and in the passes over what was sampled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from grade.config.bounds import BATCH
from grade.planning.run import Run

SHARE = 0.8
"""Of a device's memory that a run may take: allocators lose some to fragments, and libraries keep some."""
_WIDENED = 2**25
"""Bytes of a block of the head's weight in float32, where it is a 16-bit one."""
_PIECES, _PIECE_BYTES = 10, 2 * 2**19
"""Arrays of elementwise passes over a chunk, and the bytes of one on two CPU cores; kernels on a GPU need none."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one device, by what they are for; "rollout" and "passes" are the two times at which they are held, and
    "always" what is held in both.

    Attributes:
        parts: {time: {what: bytes}}.
    """

    parts: dict[str, dict[str, float]]

    def total(self, time: str) -> float:
        return sum(self.parts["always"].values()) + sum(self.parts[time].values())

    @property
    def peak(self) -> float:
        return max(self.total("rollout"), self.total("passes"))


def memory_of(run: Run) -> Memory:
    """Of a run; what libraries and the driver take is in none of the parts."""
    rollout = _rollout(run) if run.samples_here else {}
    return Memory({"always": _always(run), "rollout": rollout, "passes": _passes(run)})


def _always(run: Run) -> dict[str, float]:
    trained, shape = run.trained, run.shape
    parts = {"base's layers": run.layer_bytes / run.shards, "table, head, norms": run.other_bytes}
    if run.shards > 1:  # the layer that is computed and the one that comes next
        parts["gathered layers"] = 2 * run.layer_bytes / shape.layers
    if trained.everything:
        parts["trained copy of the layers"] = 4.0 * trained.parameters
    else:
        parts["adapter"] = 4.0 * trained.parameters
    parts["optimizer's moments"] = 8.0 * trained.parameters
    if run.classifier is not None:
        parts["reward's model"] = float(run.classifier.parameters * run.item)
    return parts


def _rollout(run: Run) -> dict[str, float]:
    """Keys and values are written in place, in room for the longest response."""
    k = run.config.generation.top_k
    shape, tokens = run.shape, run.prompts_of(run.together) * run.prompt
    parts = {
        "keys and values": run.passes.cache(run.together * run.whole),
        "responses and their candidates": run.responses * run.response * (8.0 * k + 24),
        "a layer of the prompts' pass": tokens * _layer_width(run) * run.item,
        "logits of a token": 3 * 4.0 * min(run.together, run.chunk_rows) * shape.vocabulary,
    }
    if run.device.name == "cpu" and run.together >= 4 and shape.table >= 2**20:  # in a layout of the CPU's own
        parts["packed head"] = float(shape.table * run.item)
    if run.merges:
        parts["weights with the adapter added"] = 4.0 * run.trained.copied
    return parts


def _layer_width(run: Run) -> int:
    """Numbers that a layer holds at a time for a token, in a pass without a graph."""
    return 3 * run.shape.inner + 2 * run.shape.width


def _graph(run: Run, tokens: float, *, adapters: bool) -> float:
    """What a graph over whole sequences keeps: all of every layer, or with recomputation what goes into each."""
    kept = run.shape.width * run.item if run.recompute else run.passes.kept(adapters)
    return tokens * run.shape.layers * kept


def _of_a_layer(run: Run, batch: int) -> float:
    """A backward pass's own: a layer's gradients, as large as what it kept, and with recomputation that too."""
    apart = max(run.prompts_of(batch) * run.prompt, batch * run.response)  # one after the other
    return (apart if run.prompts_apart else batch * run.whole) * run.passes.kept(True) * (2 if run.recompute else 1)


def base_graph(run: Run, batch: int) -> float:
    """Of the frozen base: behind the prompt's cache the response's positions, and the keys and values of all."""
    if not run.reads_prompt_cache:
        return _graph(run, batch * run.whole, adapters=False)
    return _graph(run, batch * run.response, adapters=False) + _read_by_responses(run, batch)


def _read_by_responses(run: Run, batch: int) -> float:
    """What a graph keeps of the prompts that responses read: keys and values, repeated for the heads that share them,
    and as the cache holds them while the pass goes on."""
    shape = run.shape
    repeated = 2 * shape.queries * run.item * shape.layers * batch * run.prompt
    return repeated + run.passes.cache(batch * run.whole)


def policy_graph(run: Run, batch: int) -> float:
    """Of the policy's pass over whole sequences, or of the distinct prompts' and the responses'."""
    if not run.prompts_apart:
        return _graph(run, batch * run.whole, adapters=True)
    positions = run.prompts_of(batch) * run.prompt + batch * run.response
    return _graph(run, positions, adapters=True) + _read_by_responses(run, batch)


def _passes(run: Run) -> dict[str, float]:
    batch, shape, k = run.micro_batch, run.shape, run.config.generation.top_k
    rows = batch * run.response
    logits = 4.0 * min(run.chunk_rows, rows) * shape.vocabulary
    pieces = _PIECES * min(_PIECE_BYTES, logits) if run.device.name == "cpu" else 0.0
    # Of policy and reference; a third array of the chunk's bound is there for soft caps. Backward passes come later.
    chunks = 2 * logits + pieces + (_WIDENED if run.item < 4 else 0)
    parts = {
        "gradients of what is trained": 4.0 * run.trained.parameters,
        "responses and their candidates": run.responses * run.response * (8.0 * k + 24),
        "policy's graph": policy_graph(run, batch),
        "a chunk of the head, or a layer's gradients": max(chunks, _of_a_layer(run, batch)),
    }
    if run.differentiates:
        parts["base's graph"] = base_graph(run, batch)
        # Hidden states of both, and their gradients in float32; candidates' ids and logits.
        parts["rows of responses"] = rows * (shape.width * (2 * run.item + 3 * 4.0) + k * 12.0)
    else:
        parts["rows of responses"] = rows * (shape.width * (run.item + 4.0) + k * 12.0)
        parts["reference's states, of a step"] = run.responses * run.response * shape.width * float(run.item)
    if run.judged and run.differentiates:
        judge = run.classifier_passes or run.passes
        kept = judge.shape.width * run.item if run.recompute else judge.kept(False)
        parts["reward's graph"] = batch * run.judged * judge.shape.layers * kept
    return parts


def room(run: Run) -> float | None:
    """Bytes of a device that a run may take; None where the device has no memory of its own."""
    return None if run.device.memory is None else SHARE * run.device.memory


def recomputes(run: Run) -> bool:
    """What method.activation_checkpointing comes to: `auto` recomputes where it would not fit otherwise."""
    setting = run.config.method.activation_checkpointing
    return not fits(replace(run, recompute=False)) if setting == "auto" else setting


def fits(run: Run) -> bool:
    """Whether a run fits into `SHARE` of its devices' memory."""
    limit = room(run)
    return limit is None or memory_of(run).peak <= limit


def largest_micro_batch(run: Run) -> int | None:
    """Most responses that may pass together; None where not even one fits, or where it is not known what there is."""
    return _largest(run, lambda size: memory_of(replace(run, passed=size)).total("passes"))


def largest_rollout(run: Run) -> int | None:
    """Most responses that may be sampled together, in whole groups of generation.samples_per_prompt; None as above."""
    group = run.config.generation.samples_per_prompt
    largest = _largest(run, lambda size: memory_of(replace(run, sampled=size * group)).total("rollout"))
    return None if largest is None else largest * group


def _largest(run: Run, held: Callable[[int], float]) -> int | None:
    limit = room(run)
    if limit is None:
        return None
    low, high = 0, 1
    while high <= BATCH and held(high) <= limit:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if held(middle) <= limit else (low, middle)
    return low or None


def fewest_shards(run: Run) -> int | None:
    """Devices that must hold the base between them, a power of two, for single responses to fit, recomputed if need be;
    None: no number of them is enough, or the base cannot be sharded."""
    model = run.config.model
    most = 1 if model.quantization is not None or model.finetuning == "full" else 2**12
    group, shards = run.config.generation.samples_per_prompt, 1
    while shards <= most:
        if fits(replace(run, shards=shards, devices=shards, recompute=True, passed=1, sampled=group)):
            return shards
        shards *= 2
    return None
