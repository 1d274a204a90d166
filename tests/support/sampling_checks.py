"""A sample of gumbel_topk against its definition in float64."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from grade_kernels import SparseTokens, gumbel_topk, reference
from grade_kernels.common import random

SEED = 2**63 + 9  # both words are in use, and the high one is negative as a signed integer


def check_sample(
    ops: ModuleType,
    logits: Tensor,
    k: int,
    *,
    tau: float = 0.7,
    draw: int = 0,
    suppress: Tensor | None = None,
    indices: Tensor | None = None,
    tokens: Tensor | None = None,
) -> SparseTokens:
    """Compare support, log-sum-exp, weights, token and mass of logits [N, V] with the definition; return the sample.

    The ids and their logits must be equal, and so must the tokens, but where the two best are nearly tied.
    """
    n, dtype = len(logits), torch.float64 if logits.dtype == torch.float64 else torch.float32
    ids = reference.topk(logits, k, suppress) if indices is None else indices.clone()
    if tokens is not None:
        missed = (ids != tokens[:, None]).all(-1)
        ids[missed, -1] = tokens[missed]
    raw = logits.double().gather(-1, ids)
    blocked = torch.zeros_like(ids, dtype=torch.bool) if suppress is None else torch.isin(ids, suppress)
    if tokens is not None:
        blocked &= ids != tokens[:, None]
    values = raw.masked_fill(blocked, -torch.inf)

    support = ops.sample.select(logits, ids.shape[1], suppress, indices, tokens, dtype)
    assert torch.equal(support.ids, ids) and torch.equal(support.values.double(), values)
    lse, eps = logits.double().logsumexp(-1), torch.finfo(dtype).eps
    torch.testing.assert_close(support.lse.double(), lse, rtol=8 * eps, atol=8 * eps)

    rows = torch.arange(n, device=logits.device) + 2**33  # keys beyond 32 bits
    options = {"suppress": suppress, "indices": indices, "tokens": tokens}
    sample = gumbel_topk(logits, k, tau, seed=SEED, draw=draw, rows=rows, **options)
    assert torch.equal(sample.indices, ids)
    assert sample.weights.dtype == sample.mass.dtype == dtype
    noise = random.exponential(SEED, draw, rows, ids, dtype).double()
    centred = values - values.amax(-1, keepdim=True)
    if tokens is None:
        z = centred - noise.log()
    else:
        z = reference.conditional_gumbel(centred, (ids == tokens[:, None]).int().argmax(-1), noise)
    # float32 noise carries a rounding of about 1e-6 at its largest, which 1/tau magnifies.
    close = 1e-12 if dtype == torch.float64 else 3e-6 * max(1, 1 / tau)
    rough = 30 if logits.is_cuda and dtype == torch.float32 else 1  # a GPU's exponentials are approximate
    weights = ((z - z.amax(-1, keepdim=True)) / tau).softmax(-1)
    torch.testing.assert_close(sample.weights.double(), weights, rtol=rough * close, atol=close)
    mass = (values - lse[:, None]).exp().sum(-1)
    torch.testing.assert_close(sample.mass.double(), mass, rtol=rough * (close + eps * float(lse.abs().max())), atol=0)
    if tokens is not None:
        assert torch.equal(sample.tokens, tokens)
        return sample
    chosen = ids == sample.tokens[:, None]
    assert (chosen.sum(-1) == 1).all()
    best = z.amax(-1)
    assert (z[chosen] >= best - 1e-5 * best.abs().clamp(min=1)).all()
    assert (chosen.int().argmax(-1) != z.argmax(-1)).float().mean() <= 0.001 + 1.0 / n * (z[chosen] < best).any()
    return sample
