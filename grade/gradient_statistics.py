"""Statistics of a gradient estimator from repeated draws: mean, spread, and distance from an unbiased reference.

A draw is the gradient of one batch, a vector of all trainable parameters. What is kept of many draws is their mean in
each of a few blocks. An inner product of the means of two different blocks has no noise of its own in expectation, the
product of a block with itself does: so everything below that squares a mean is averaged over pairs of different blocks
(split halves, with more than two parts), and leaving out one block at a time gives its standard error (jackknife,
Efron & Stein 1981). Noise then widens an interval; it is never read as agreement, nor as bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, List, Optional, Sequence, Tuple

import torch
from scipy import stats
from torch import Tensor


class Draws:
    """Accumulates the draws of one estimator.

    Args:
        count: draws that will come; they fall into `blocks` blocks of adjacent draws.
        batch: responses behind a draw.
    """

    def __init__(self, count: int, batch: int, blocks: int = 10):
        self.count, self.batch, self.blocks = count, batch, blocks
        self.sizes = [0] * blocks
        self.sums: List[Optional[Tensor]] = [None] * blocks
        self.square = 0.0
        self.tensor_norm_std = 0.0
        self.seconds = 0.0
        self.taken = 0

    def add(self, gradients: Sequence[Tensor], seconds: float) -> None:
        """One draw, as the gradients of the parameter tensors, and the seconds it took."""
        flat = torch.cat([g.detach().flatten().float() for g in gradients]).cpu()
        block = min(self.taken * self.blocks // self.count, self.blocks - 1)
        self.sums[block] = flat if self.sums[block] is None else self.sums[block].add_(flat)
        self.sizes[block] += 1
        self.taken += 1
        self.square += float(flat.double().square().sum())
        self.tensor_norm_std += float(torch.stack([g.detach().double().norm() for g in gradients]).std())
        self.seconds += seconds

    def spread(self) -> Spread:
        """Of the draws so far.

        Raises:
            ValueError: there are fewer than two.
        """
        n = self.taken
        if n < 2:
            raise ValueError(f"a spread needs two draws or more, there are {n}")
        total = sum(s.double() for s in self.sums if s is not None)
        squared_mean = float((total / n).square().sum())
        trace = (self.square - n * squared_mean) / (n - 1)  # of the covariance of a draw
        return Spread(
            draws=n, mean_norm=squared_mean**0.5, trace=trace * self.batch,
            squared_signal=squared_mean - trace / n, seconds_per_sample=self.seconds / (n * self.batch),
            tensor_norm_std=self.tensor_norm_std / n,
        )

    def means(self) -> Tensor:
        """[blocks with a draw, p] float32."""
        return torch.stack([s / size for s, size in zip(self.sums, self.sizes, strict=True) if s is not None])


@dataclass
class Spread:
    """Of one estimator at fixed parameters; gradients in units of the objective per unit of parameter.

    Args:
        draws: how many.
        mean_norm: Euclidean norm of their mean, noise included.
        trace: of the covariance of a single response's gradient: that of a draw times its responses.
        squared_signal: the squared norm of the expected gradient without the noise's share; may come out negative
            where there is hardly a signal.
        seconds_per_sample: to sample a response and take its gradient.
        tensor_norm_std: standard deviation over parameter tensors of their gradients' norms, mean over draws. The
            published code calls this gradient variance; it says how the tensors differ, not how draws do.
    """

    draws: int
    mean_norm: float
    trace: float
    squared_signal: float
    seconds_per_sample: float
    tensor_norm_std: float

    @property
    def relative_variance(self) -> Optional[float]:
        """trace / squared norm of the expected gradient; None where no signal stands out."""
        return self.trace / self.squared_signal if self.squared_signal > 0 else None

    @property
    def snr_per_sample(self) -> float:
        """Squared signal over variance of one response; 0 where no signal stands out."""
        return max(self.squared_signal, 0.0) / self.trace if self.trace > 0 else float("inf")

    @property
    def snr_per_second(self) -> float:
        """The same of as many responses as a second gives."""
        return self.snr_per_sample / self.seconds_per_sample


@dataclass
class Agreement:
    """An estimator against an unbiased reference; intervals at 95 %.

    Args:
        bias: ||E g - reference|| / ||reference||, noise taken out; `bias_interval` from its square's.
        scale: of the part along the reference; 1 is the reference's length. An optimizer that normalises, such as Adam,
            does not see it.
        cosine: of the two expectations, noise taken out.
        verdict: what the intervals allow to say.
    """

    bias: Optional[float]
    bias_interval: Optional[Tuple[float, float]]
    scale: Optional[float]
    cosine: Optional[float]
    cosine_interval: Optional[Tuple[float, float]]
    verdict: str


def agreement(estimator: Tensor, reference: Tensor, *, same_scale: bool = True) -> Agreement:
    """Bias and cosine from block means.

    Args:
        estimator, reference: [blocks, p], from independent draws, two blocks or more each.
        same_scale: False for a method that rescales its gradient (normalised advantages): only the direction counts.
    """
    ours, theirs = estimator.double(), reference.double()
    both = torch.cat([ours, theirs])
    gram, n = both @ both.T, len(ours)

    def products(keep: Tensor) -> Tuple[float, float, float]:
        """(ours·ours, ours·theirs, theirs·theirs), each over pairs of different blocks among `keep` [blocks] bool."""
        a, b = torch.where(keep[:n])[0], n + torch.where(keep[n:])[0]
        aa, bb, ab = gram[a][:, a], gram[b][:, b], gram[a][:, b]
        return _off_diagonal(aa), float(ab.mean()), _off_diagonal(bb)

    signal, signal_error = _jackknife(lambda keep: products(keep)[2], n, len(theirs))
    critical = float(stats.t.ppf(0.975, min(n, len(theirs)) - 1))
    if signal < critical * signal_error:
        return Agreement(None, None, None, None, None, "reference too noisy to judge")
    square, error = _jackknife(lambda keep: _relative_square(*products(keep)), n, len(theirs))
    low, high = (max(square + sign * critical * error, 0.0) ** 0.5 for sign in (-1, 1))
    own, own_error = _jackknife(lambda keep: products(keep)[0], n, len(theirs))
    cosine = interval = None
    if own > critical * own_error:
        cosine, spread = _jackknife(lambda keep: _cosine(*products(keep)), n, len(theirs))
        interval = (max(cosine - critical * spread, -1.0), min(cosine + critical * spread, 1.0))
    if not same_scale:
        verdict = "direction only" if cosine is not None else "too noisy to judge"
        return Agreement(None, None, None, cosine, interval, verdict)
    if low > 0:
        verdict = f"biased, by {low:.0%} at least"
    else:
        verdict = f"no bias found, at most {high:.0%}" if high < 1 else "too noisy to judge"
    _, cross, reference_square = products(torch.ones(len(both), dtype=torch.bool))
    return Agreement(max(square, 0.0) ** 0.5, (low, high), cross / reference_square, cosine, interval, verdict)


def _off_diagonal(gram: Tensor) -> float:
    """Mean over pairs of different blocks."""
    blocks = len(gram)
    return float((gram.sum() - gram.diagonal().sum()) / (blocks * (blocks - 1)))


def _relative_square(own: float, cross: float, reference: float) -> float:
    return (own - 2 * cross + reference) / reference if reference > 0 else float("inf")


def _cosine(own: float, cross: float, reference: float) -> float:
    return cross / (own * reference) ** 0.5 if own > 0 and reference > 0 else 0.0


def _jackknife(statistic: Callable[[Tensor], float], ours: int, theirs: int) -> Tuple[float, float]:
    """(value, standard error) of a statistic of two independent sets of blocks."""
    everything = torch.ones(ours + theirs, dtype=torch.bool)
    variance = 0.0
    for first, blocks in ((0, ours), (ours, theirs)):
        left_out = []
        for block in range(first, first + blocks):
            keep = everything.clone()
            keep[block] = False
            left_out.append(statistic(keep))
        values = torch.tensor(left_out, dtype=torch.float64)
        variance += float((blocks - 1) / blocks * (values - values.mean()).square().sum())
    return statistic(everything), variance**0.5
