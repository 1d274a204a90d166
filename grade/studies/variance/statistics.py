"""Statistics of a gradient estimator from repeated draws: mean, spread, and distance from an unbiased reference.

A draw is the gradient of one batch, a vector of all trainable parameters. What is kept of many draws is their mean in
each of a few blocks. An inner product of the means of two different blocks has no noise of its own in expectation, the
product of a block with itself does: so everything below that squares a mean is averaged over pairs of different blocks
(split halves, with more than two parts), and leaving out one block at a time gives its standard error (jackknife,
Efron & Stein 1981). Noise then widens an interval; it is never read as signal, as agreement, or as bias. Intervals are
at 95 % each, so of many estimators a few will miss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grade.config.studies import BLOCKS
from grade.jackknife import critical, jackknife_error

Interval = tuple[float, float]
JUDGED = 0.25
"""A reference whose norm is known less well than this judges nothing."""


class Draws:
    """Accumulates the draws of one estimator.

    Args:
        count: draws that will come; they fall into BLOCKS blocks of adjacent draws, whose sums are kept: 4 bytes a
            parameter each.
        batch: responses behind a draw.
    """

    def __init__(self, count: int, batch: int):
        self.count, self.batch, self.taken, self.seconds = count, batch, 0, 0.0
        self._sums: list[Tensor | None] = [None] * BLOCKS
        self._squares, self._sizes = [0.0] * BLOCKS, [0] * BLOCKS
        self._tensor_norm_std = 0.0

    def add(self, gradients: Sequence[Tensor], seconds: float) -> None:
        """One draw, as the gradients of the parameter tensors, and the seconds it took."""
        flat = torch.cat([g.detach().flatten().float() for g in gradients]).cpu()
        block = min(self.taken * BLOCKS // self.count, BLOCKS - 1)
        so_far = self._sums[block]
        self._sums[block] = flat if so_far is None else so_far.add_(flat)
        self._squares[block] += float(flat.double().square().sum())
        self._sizes[block] += 1
        self.taken += 1
        self._tensor_norm_std += float(torch.stack([g.detach().double().norm() for g in gradients]).std())
        self.seconds += seconds

    def means(self) -> Tensor:
        """[blocks with a draw, p] float32."""
        return torch.stack([s / n for s, n in zip(self._sums, self._sizes, strict=True) if s is not None])

    def spread(self) -> Spread | None:
        """Of the draws so far; None while they fill fewer than three blocks."""
        sizes = torch.tensor([n for n in self._sizes if n], dtype=torch.float64)
        squares = torch.tensor([s for s, n in zip(self._squares, self._sizes, strict=True) if n], dtype=torch.float64)
        if len(sizes) < 3:
            return None
        means = self.means().double()
        gram = means @ means.T

        def trace(keep: Tensor) -> float:
            """Of the covariance of a draw."""
            n, total = sizes[keep].sum(), (sizes[keep, None] * sizes[keep] * gram[keep][:, keep]).sum()
            return float((squares[keep].sum() - total / n) / (n - 1))

        def snr(keep: Tensor) -> float:
            spread = trace(keep) * self.batch
            return _off_diagonal(gram[keep][:, keep]) / spread if spread > 0 else 0.0

        everything = torch.ones(len(sizes), dtype=torch.bool)
        value, error = jackknife(snr, len(sizes))
        reach = critical(len(sizes)) * error
        return Spread(
            draws=self.taken,
            mean_norm=float((self._total() / self.taken).norm()),
            trace=trace(everything) * self.batch,
            snr_per_sample=max(value, 0.0),
            snr_per_sample_interval=(max(value - reach, 0.0), max(value + reach, 0.0)),
            seconds_per_sample=self.seconds / (self.taken * self.batch),
            tensor_norm_std=self._tensor_norm_std / self.taken,
        )

    def _total(self) -> Tensor:
        return torch.stack([s for s in self._sums if s is not None]).double().sum(0)


@dataclass
class Spread:
    """Of one estimator at fixed parameters.

    Args:
        draws: how many.
        mean_norm: Euclidean norm of their mean, noise included.
        trace: of the covariance of a draw, times its responses: that of a single response's gradient, where those of a
            draw are independent.
        snr_per_sample: squared norm of the expected gradient, noise taken out, over the trace.
        seconds_per_sample: to sample a response and take its gradient.
        tensor_norm_std: standard deviation over parameter tensors of their gradients' norms, mean over draws. The
            published code calls this gradient variance; it says how the tensors differ, not how draws do.
    """

    draws: int
    mean_norm: float
    trace: float
    snr_per_sample: float
    snr_per_sample_interval: Interval
    seconds_per_sample: float
    tensor_norm_std: float

    @property
    def relative_variance(self) -> float | None:
        """trace / squared norm of the expected gradient; None where no signal stands out of the noise."""
        return 1 / self.snr_per_sample if self.snr_per_sample_interval[0] > 0 else None

    @property
    def relative_variance_interval(self) -> tuple[float | None, float | None]:
        """Its ends; the upper one is None where there may be no signal, both where there is no variance either."""
        low, high = self.snr_per_sample_interval
        return (1 / high if high > 0 else None, 1 / low if low > 0 else None)

    @property
    def snr_per_second(self) -> float | None:
        """The signal-to-noise ratio of as many responses as a second gives; None where no signal stands out."""
        return self.snr_per_sample / self.seconds_per_sample if self.relative_variance is not None else None


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

    bias: float | None
    bias_interval: Interval | None
    scale: float | None
    cosine: float | None
    cosine_interval: Interval | None
    verdict: str


def norm_error(reference: Tensor) -> float:
    """Relative half-width of the 95 % interval of the norm of an expectation, from block means [blocks, p]; inf where
    it may be 0."""
    gram = reference.double() @ reference.double().T
    square, error = jackknife(lambda keep: _off_diagonal(gram[keep][:, keep]), len(gram))
    reach = critical(len(gram)) * error
    return reach / (2 * square) if square > reach else float("inf")


def agreement(estimator: Tensor, reference: Tensor, *, same_scale: bool = True) -> Agreement:
    """Bias and cosine from block means.

    Args:
        estimator, reference: [blocks, p], from independent draws, three blocks or more each.
        same_scale: False for a method that rescales its gradient (normalised advantages): only the direction counts.

    Raises:
        ValueError: fewer blocks.
    """
    ours, theirs = estimator.double(), reference.double()
    n, both = len(ours), torch.cat([ours, theirs])
    if min(n, len(theirs)) < 3:
        raise ValueError(f"agreement needs three blocks or more of each, got {n} and {len(theirs)}")
    if not norm_error(theirs) <= JUDGED:
        return Agreement(None, None, None, None, None, "reference too noisy to judge")
    gram, quantile = both @ both.T, critical(min(n, len(theirs)))

    def products(keep: Tensor) -> tuple[float, float, float]:
        """(ours·ours, ours·theirs, theirs·theirs), each over pairs of different blocks among `keep` [blocks] bool."""
        a, b = torch.where(keep[:n])[0], n + torch.where(keep[n:])[0]
        return _off_diagonal(gram[a][:, a]), float(gram[a][:, b].mean()), _off_diagonal(gram[b][:, b])

    def interval(statistic: Callable[[float, float, float], float]) -> tuple[float, float, float]:
        value, error = jackknife(lambda keep: statistic(*products(keep)), n, len(theirs))
        return value, value - quantile * error, value + quantile * error

    cosine = cosine_interval = None
    if interval(lambda own, cross, reference: own)[1] > 0:
        value, low, high = interval(lambda own, cross, reference: cross / (max(own, 1e-300) * reference) ** 0.5)
        cosine, cosine_interval = min(value, 1.0), (max(low, -1.0), min(high, 1.0))
    if not same_scale:
        verdict = "direction only" if cosine is not None else "draws too noisy to judge"
        return Agreement(None, None, None, cosine, cosine_interval, verdict)
    square, *ends = interval(lambda own, cross, reference: (own - 2 * cross + reference) / reference)
    low, high = (max(end, 0.0) ** 0.5 for end in ends)
    if low > 0:
        verdict = f"biased, by {low:.0%} at least"
    else:
        verdict = f"no bias found, at most {high:.0%}" if high <= 0.5 else "draws too noisy to judge"
    own, cross, reference_square = products(torch.ones(len(both), dtype=torch.bool))
    scale = cross / reference_square
    return Agreement(max(square, 0.0) ** 0.5, (low, high), scale, cosine, cosine_interval, verdict)


def _off_diagonal(gram: Tensor) -> float:
    """Mean over pairs of different blocks."""
    blocks = len(gram)
    return float((gram.sum() - gram.diagonal().sum()) / (blocks * (blocks - 1)))


def jackknife(statistic: Callable[[Tensor], float], *sets: int) -> tuple[float, float]:
    """(value, standard error) of a statistic of independent sets of blocks, given which blocks to keep [sum] bool."""
    everything = torch.ones(sum(sets), dtype=torch.bool)
    variance, first = 0.0, 0
    for blocks in sets:
        left_out = []
        for block in range(first, first + blocks):
            keep = everything.clone()
            keep[block] = False
            left_out.append(statistic(keep))
        variance += jackknife_error(left_out) ** 2
        first += blocks
    return statistic(everything), variance**0.5
