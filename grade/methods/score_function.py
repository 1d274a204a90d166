"""Functions beside a reward with a gradient: their part of the gradient by the score function.

A function f that has no gradient is followed by REINFORCE on the responses that are replayed anyway,

    - 1/N sum over responses of (f - b) d log p(response),    p: what the tokens were drawn from,

with a baseline b that does not know the response: the mean of f over the other samples of its prompt, or where there is
one sample each, over the step's other responses (Kool et al. 2019). It is added to the gradient at the logits after the
hops: the score function holds the sampled tokens fixed, so nothing of it travels through them.

For `grade-ste` that is without bias. For `grade` the mixtures that were fed are held fixed too, of which the tokens say
only a part.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def advantages(shares: Tensor, copies: int, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """[n] float64, what the functions gave each response beyond its baselines, summed over functions.

    A function that does not apply to a response has given it 0, and is left out of the baselines of the others; a
    response that has no others to compare with has the baseline 0.

    Args:
        shares: [n, T] float64, what T functions add to the total reward of this process' responses of a step, NaN where
            one does not apply. Samples of a prompt stand next to each other.
        copies: samples of a prompt.
        reduce: a float64 tensor on the CPU -> its sum over processes.
    """
    applies = ~shares.isnan()
    values, counts = torch.where(applies, shares, 0.0), applies.double()
    if copies > 1:

        def whole(x: Tensor) -> Tensor:
            return x.unflatten(0, (-1, copies)).sum(1).repeat_interleave(copies, dim=0)
    else:

        def whole(x: Tensor) -> Tensor:
            return reduce(x.sum(0).cpu()).to(x.device)

    others, compared = whole(values) - values, whole(counts) - counts
    return (values - torch.where(compared > 0, others / compared.clamp_min(1), 0.0)).sum(1)
