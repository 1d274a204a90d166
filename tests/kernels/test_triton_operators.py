"""The kernels as PyTorch operators: schema, fake implementations and what torch.compile makes of them."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from grade_kernels.triton_ops import sample

pytestmark = pytest.mark.triton
OPS = torch.ops.grade_kernels


def test_kl(device):
    p, q = (torch.randn(2, 3, 40, device=device) for _ in range(2))
    opcheck(OPS.kl_stats, (p, q))
    stats, outs = OPS.kl_stats(p, q).unbind(), torch.zeros(2, 6, 40, device=device)
    opcheck(OPS.kl_grads, (p, q, *stats, None, *outs.unbind(), None))
    opcheck(OPS.kl_grads, (p, q, *stats, torch.rand(6, device=device), None, outs[0], 3.0))


def test_logprob(device):
    logits, tokens = torch.randn(2, 3, 40, device=device), torch.randint(0, 40, (6,), device=device)
    for ids in (tokens, None):
        opcheck(OPS.token_stats, (logits, ids))
    _, entropy, peak, norm = OPS.token_stats(logits, tokens).unbind()
    for cap in (None, 3.0):
        out = torch.zeros(6, 40, device=device)
        opcheck(OPS.token_stats_grad, (logits, tokens, entropy, peak, norm, peak, norm, out, cap))


def test_sample(device):
    logits, keys = torch.randn(2, 100, device=device), torch.arange(2, device=device)
    some = torch.tensor([3, 5], device=device)
    support = sample.select(logits, 4, None, None, None, torch.float32)
    opcheck(OPS.select, (logits, 4, some, None, None))
    tau = torch.tensor(0.5, device=device)
    opcheck(OPS.select_and_sample, (logits, 4, 0.5, None, keys, 1, 2, 1, None, None, some))
    opcheck(OPS.select_and_sample, (logits, 4, 1.0, tau, keys, 1, 2, 1, None, None, some))
    opcheck(OPS.sample, (support.values, support.ids, support.lse, keys, 1, 2, 0, None, 1.0, tau))
    opcheck(OPS.scatter, (support.ids, support.values, 100, torch.bfloat16))
    opcheck(OPS.weights_vjp, (support.values, support.values, 1.0, tau))


def test_embedding(device):
    weights, ids = torch.rand(2, 3, device=device), torch.randint(0, 20, (2, 3), device=device)
    grad, table = torch.randn(2, 5, device=device), torch.randn(20, 5, device=device)
    opcheck(OPS.weighted_sum, (weights, ids, table))
    opcheck(OPS.candidate_dots, ([grad, grad], [table, table], ids))
    opcheck(OPS.scatter_sum, (weights, ids, grad, 20))
    opcheck(OPS.scatter_sum, (None, ids[:, :1], grad, 20))
