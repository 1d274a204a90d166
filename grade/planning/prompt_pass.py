"""Whether the policy's pass over prompts and responses is one, or two: the prompts' first, whose keys and values the
responses' then reads.

A hop asks for the gradient at the response's embeddings, which no state of the prompt depends on: in two passes it
leaves the prompt's positions out. And samples of one prompt share its pass, forwards and backwards. What two passes
cost is the start of one more, forwards and backwards, and in batches without padding kernels for plain causal
attention, which skip what nobody sees.

The rule is one of sizes alone, so that a run that goes on from a checkpoint computes what it would have computed.
"""

from __future__ import annotations

from dataclasses import dataclass

from grade.config import Config
from grade.config.methods import DIFFERENTIATING

FEW_HOPS = 3
"""Hops that a replay is expected to have at least, where `method.max_hops` allows them."""
ADVANTAGE = 0.97
"""Two passes are made where they take at most this share of the time of one."""

# Operations of a layer for a position, over the square of the width: 4 matrices of attention and about 8 of the MLP.
_PRODUCTS = 24
# Attention's time for an operation over that of the layers' products, forwards and backwards together: its backward
# pass has 2.5 times the products of its forward pass, theirs has as many.
_ATTENTION = 2.5
# Operations in the time that the start of a layer takes. On a CPU fitted to benchmarks/results/prompt_pass.json: about
# 60 positions of width 288, and no more than 128 of any. On a GPU an estimate, not measured: 250 microseconds of
# launches at half of an H100's rate, in 16 bits and in float32.
_START_ON_CPU, _MOST_ON_CPU = 1.2e8, 128
_START_ON_GPU = {2: 1.25e11, 4: 8.4e9}
# Keys that kernels for causal attention take at a time: what lies ahead in the same block is computed. On a GPU a mask
# also takes another kernel, of about half their rate.
_BLOCK_ON_CPU, _BLOCK_ON_GPU = 512, 128
_MASK_ON_GPU = 2.0


@dataclass(frozen=True)
class PassSizes:
    """What the time of the two ways depends on.

    Args:
        responses, prompts: B, and U distinct prompts of these.
        prompt, response: P and S, tokens.
        width: d.
        item: bytes of a number of the hidden states.
        padded: whether prompts have padding before them, so that both ways need a mask.
        on_gpu: whether the host launches what another device computes.
    """

    responses: float
    prompts: float
    prompt: int
    response: int
    width: int
    item: int
    padded: bool
    on_gpu: bool

    def pay_apart(self, hops: int) -> bool:
        """Whether two passes are quicker than one: the time of a forward pass, a backward pass to the parameters and
        `hops` backward passes to the response's embeddings, in positions of a layer."""
        whole = self.prompt + self.response
        together = self._time(self.responses, whole, self._causal(whole))
        prompts = self._time(self.prompts, self.prompt, self._causal(self.prompt))
        masked = _MASK_ON_GPU if self.on_gpu and not self.padded else 1.0
        responses = self._time(self.responses, self.response, masked * whole)
        return 2 * (prompts + responses) + hops * responses <= ADVANTAGE * (2 + hops) * together

    def _time(self, sequences: float, length: int, keys: float) -> float:
        """Of `length` positions each, which compare themselves with `keys` others on average."""
        attention = _ATTENTION * 4 * keys / (_PRODUCTS * self.width)
        return sequences * length * (1 + attention) + self._start

    def _causal(self, length: int) -> float:
        """Keys of a position in attention without a cache."""
        block = _BLOCK_ON_GPU if self.on_gpu else _BLOCK_ON_CPU
        return length if self.padded or length <= block else (length + block) / 2

    @property
    def _start(self) -> float:
        position = _PRODUCTS * self.width**2
        if self.on_gpu:
            return _START_ON_GPU[4 if self.item >= 4 else 2] / position
        return min(_START_ON_CPU / position, _MOST_ON_CPU)


def pays_in_run(config: Config, responses: int, *, width: int, item: int, on_gpu: bool) -> bool:
    """Whether the policy's pass over this many responses of a run, all at their longest and without recomputation, is
    two. The other arguments are those of `PassSizes`."""
    method, copies = config.method, config.generation.samples_per_prompt
    differentiates = method.name in DIFFERENTIATING
    if not method.prompt_cache or (differentiates and method.replay_dropout):
        return False
    sizes = PassSizes(
        responses=responses,
        prompts=max(responses / copies, 1),
        prompt=config.task.prompt_max_tokens,
        response=config.generation.max_new_tokens,
        width=width,
        item=item,
        padded=True,
        on_gpu=on_gpu,
    )
    return sizes.pay_apart(min(method.max_hops, FEW_HOPS) if differentiates else 0)
