"""The sampler as a distribution: chi-squared and Kolmogorov-Smirnov tests at fixed seeds.

Through PyTorch, which draws tens of thousands of rows; that Triton's noise is the same is seen number by number.
"""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from grade_kernels import gumbel_topk
from grade_kernels.torch_ops import support as ops

ROWS = 60_000
LOGITS = torch.tensor([0.3, -1.2, 2.0, 0.0, -3.0, 1.1, -0.4, 0.9, -0.1, -5.0, 0.6, 1.9])


def assert_frequencies(tokens: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor = LOGITS) -> None:
    """Tokens follow softmax(logits) restricted to `ids`."""
    observed = torch.bincount(tokens, minlength=len(logits))
    assert observed.sum() == observed[ids].sum() == len(tokens)
    expected = logits[ids].double().softmax(-1) * len(tokens)
    assert stats.chisquare(observed[ids].numpy(), expected.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("k", [2, 7, 12])
def test_free_samples(k, dtype):
    logits = LOGITS.to(dtype).to(torch.float32)  # bf16 rounds the logits, not the frequencies
    result = gumbel_topk(LOGITS.to(dtype).expand(ROWS, -1), k, 0.5, seed=k)
    assert_frequencies(result.tokens, logits.sort(descending=True, stable=True).indices[:k], logits)


def test_suppressed_samples():
    result = gumbel_topk(LOGITS.expand(ROWS, -1), 6, seed=1, suppress=[2, 7])
    assert_frequencies(result.tokens, torch.tensor([11, 5, 10, 0, 3, 8]))


def test_large_vocabulary():
    # 4,000 samples over 30,000 ids, binned into deciles of probability.
    logits = torch.randn(30_000, generator=torch.Generator().manual_seed(0)) * 2
    tokens = [gumbel_topk(logits.expand(400, -1), 256, seed=s).tokens for s in range(10)]
    probs, ids = logits.double().sort(descending=True, stable=True)
    probs, ids = probs[:256].softmax(-1), ids[:256]
    bins = (probs.cumsum(0) * 10).long().clamp(max=9)
    lookup = torch.full((30_000,), -1)
    lookup[ids] = bins
    observed = torch.bincount(lookup[torch.cat(tokens)], minlength=10)
    expected = torch.zeros(10, dtype=torch.float64).index_add(0, bins, probs) * 4_000
    assert stats.chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-3


def test_rows_draws_and_seeds_are_independent():
    # Pairs of tokens of neighbouring rows, of two draws and of two seeds fill the product table.
    logits = LOGITS[[0, 2, 5, 11]].expand(ROWS, -1)
    first = gumbel_topk(logits, 4, seed=1).tokens
    others = {
        "rows": first.roll(1),
        "draws": gumbel_topk(logits, 4, seed=1, draw=1).tokens,
        "seeds": gumbel_topk(logits, 4, seed=2).tokens,
    }
    for name, other in others.items():
        table = torch.bincount(first * 4 + other, minlength=16).view(4, 4)
        assert stats.chi2_contingency(table.numpy()).pvalue > 1e-3, name


@pytest.fixture(scope="module")
def conditional():
    """Gumbels (z - logits) of conditional draws whose tokens come from torch's own sampler."""
    logits = LOGITS.double()
    tokens = torch.multinomial(logits.softmax(-1), ROWS, replacement=True, generator=torch.Generator().manual_seed(5))
    ids = torch.arange(12).expand(ROWS, 12)
    z = ops.noisy_logits(logits.expand(ROWS, 12).contiguous(), ids, torch.arange(ROWS), 17, 1, tokens)
    assert torch.equal(z.argmax(-1), tokens)
    return tokens, z


def test_conditional_noise_is_gumbel_once_tokens_are_averaged(conditional):
    _, z = conditional
    gumbel = z - (LOGITS.double() - LOGITS.double().max())  # z comes centred
    for column in range(12):
        assert stats.kstest(gumbel[:, column].numpy(), "gumbel_r").pvalue > 1e-3, column


def test_conditional_noise_is_independent_across_candidates(conditional):
    _, z = conditional
    uniform = torch.exp(-torch.exp(-(z - (LOGITS.double() - LOGITS.double().max()))))
    correlation = torch.corrcoef(uniform.T) - torch.eye(12)
    assert correlation.abs().max() < 5 / ROWS**0.5


@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_conditional_weights_are_free_weights_once_tokens_are_averaged(conditional, tau):
    tokens, _ = conditional
    logits = LOGITS.expand(ROWS, -1)
    free = gumbel_topk(logits, 12, tau, seed=31)
    given = gumbel_topk(logits, 12, tau, seed=32, draw=1, tokens=tokens)
    assert torch.equal(free.indices, given.indices)
    for column in range(12):
        pair = free.weights[:, column].numpy(), given.weights[:, column].numpy()
        assert stats.ks_2samp(*pair).pvalue > 1e-3, column


def test_conditional_weights_of_one_token_are_the_free_weights_that_drew_it():
    free = gumbel_topk(LOGITS.expand(ROWS, -1), 12, 0.5, seed=41)
    for token in (2, 5, 1):
        drawn = free.weights[free.tokens == token]
        tokens = torch.full((20_000,), token)
        given = gumbel_topk(LOGITS.expand(20_000, -1), 12, 0.5, seed=42, draw=1, tokens=tokens).weights
        for column in (0, 1, 5, 11):
            assert stats.ks_2samp(drawn[:, column].numpy(), given[:, column].numpy()).pvalue > 1e-3
