"""Best-of-n from the base model: what choosing among n of its own responses by the reward gains, without any training.

Of N responses to a prompt, those with the highest reward among every subset of n are known at once: in the order of
their rewards the i-th of N (from 1) is the best of C(i - 1, n - 1) of the C(N, n) subsets. The mean over them is an
unbiased estimate for every n up to N (N. Stiennon et al., "Learning to summarize from human feedback", NeurIPS 2020; L.
Gao et al., "Scaling laws for reward overoptimization", ICML 2023, appendix I).

The best of n is at most log n - (n - 1) / n nats a response from the base, KL(best of n | base). Both papers take that
for its value; it is an upper bound (A. Beirami et al., "Theoretical guarantees on the best-of-n alignment policy",
2024), and little of it is spent where few responses differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from grade.config import Config
from grade.errors import present
from grade.model.policy import Policy
from grade.rewards.base import Reward
from grade.rollout import Rollout, pad_prompts
from grade.sampling.sample import sample
from grade.studies.compare.fluency import BYTES, NATS
from grade.studies.compare.measures import ratio
from grade.training.evaluation import Measures, evaluation_sampling, score_records, score_settings

Floats = NDArray[np.float64]
_SEED = 1
"""Beyond evaluation.seed: noise of its own, as a prompt has N responses here, and one in a test."""
_MEASURES = ("solve_rate", "judge", "repetition", NATS, BYTES)


def best_of_weights(n: int, of: int) -> Floats:
    """The share of the subsets of size n among `of` responses whose best is the i-th, from the worst on: float64 [of],
    which sums to 1.

    Raises:
        ValueError: n is not in 1..of.
    """
    if not 1 <= n <= of:
        raise ValueError(f"the best of {n} cannot be told from {of}")
    total = math.comb(of, n)
    return np.array([math.comb(i, n - 1) / total for i in range(of)])


def best_of(rewards: Floats, values: Mapping[str, Floats], n: int) -> dict[str, float]:
    """Means over prompts of the reward of the best of n responses, and of other measures of that response.

    Args:
        rewards: float64 [prompts, N], N >= n.
        values: measures by name, [prompts, N]. Where responses have the same reward, each of them is as likely chosen.

    Returns:
        "reward" and a mean for each measure, over all subsets of n of the N responses.
    """
    weights = best_of_weights(n, rewards.shape[1])
    order = np.argsort(rewards, axis=1)
    ranked = np.take_along_axis(rewards, order, axis=1)
    shares = np.stack([_of_equals(row, weights) for row in ranked])
    found = {"reward": float((shares * ranked).sum(1).mean())}
    for name, measured in values.items():
        found[name] = float((shares * np.take_along_axis(measured, order, axis=1)).sum(1).mean())
    return found


def _of_equals(ranked: Floats, weights: Floats) -> Floats:
    """Weights [N] of a prompt's responses in the order of their rewards, those of equal rewards shared evenly."""
    _, group, count = np.unique(ranked, return_inverse=True, return_counts=True)
    return (np.bincount(group, weights=weights) / count)[group]


def kl_bound(n: int) -> float:
    """The most that the best of n responses is from the base, nats a response."""
    return math.log(n) - (n - 1) / n


def sampled_best_of(
    policy: Policy, reward: Reward, prompts: Sequence[list[int]], config: Config, measure: Callable[[Rollout], Measures]
) -> list[dict]:
    """The best of each n of compare.best_of, from max(n) responses of the base model to every prompt.

    Returns:
        For each n, ascending: "n", "kl_sequence" (`kl_bound`), "reward" and, where they are measured, "solve_rate",
        "judge", "repetition" and "nats_per_byte".
    """
    sizes = sorted(config.compare.best_of)
    rewards, values = _sampled(policy, reward, prompts, config, measure, sizes[-1])
    rows = []
    for n in sizes:
        found: dict[str, float | None] = {**best_of(rewards, values, n)}
        if NATS in found:
            found["nats_per_byte"] = ratio(present(found.pop(NATS)), present(found.pop(BYTES)))
        rows.append({"n": n, "kl_sequence": kl_bound(n), **found})
    return rows


def _sampled(
    policy: Policy,
    reward: Reward,
    prompts: Sequence[list[int]],
    config: Config,
    measure: Callable[[Rollout], Measures],
    copies: int,
) -> tuple[Floats, dict[str, Floats]]:
    """Rewards and measures [prompts, copies] of the base's responses, of which at most evaluation.batch_size are in a
    pass."""
    sampling = evaluation_sampling(config.evaluation, config.generation)
    settings = score_settings(config.method, policy.device)
    size, records = config.evaluation.batch_size, []
    for chosen, own in _passes(len(prompts), copies, size):
        ids, mask = pad_prompts([prompts[i] for i in chosen], policy.pad_id, policy.device)
        numbers = torch.tensor([i * copies + copy for i in chosen for copy in own], device=policy.device)
        rollout = sample(
            policy,
            ids,
            mask,
            sampling,
            seed=config.evaluation.seed + _SEED,
            first_rows=numbers * sampling.max_new_tokens,
            samples_per_prompt=len(own),
            adapters=False,
        ).of("test", chosen)
        of_each = [number for number in chosen for _ in own]
        records += score_records(policy, reward, rollout, settings, of_each, adapters=False, measure=measure)
    rewards = np.array([record["reward"] for record in records]).reshape(len(prompts), copies)
    known = [name for name in _MEASURES if name in records[0]["details"]]
    return rewards, {
        name: np.array([record["details"][name] for record in records]).reshape(len(prompts), copies) for name in known
    }


def _passes(prompts: int, copies: int, size: int) -> Iterator[tuple[range, range]]:
    """(numbers of prompts, which of their copies) of passes of at most `size` responses: of several prompts whole, or
    of one in parts, so that responses come in the order of prompts."""
    together, each = max(size // copies, 1), min(size, copies)
    for start in range(0, prompts, together):
        for first in range(0, copies, each):
            yield range(start, min(start + together, prompts)), range(first, min(first + each, copies))
