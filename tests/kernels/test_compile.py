"""Every op traces into one graph (by the eager backend of AOTAutograd, without code); compiled noise is the noise."""

import shutil

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import grade_kernels as gk
from grade_kernels.common.checks import suppress_ids
from grade_kernels.common.random import random_bits

V, D = 64, 8


def sample_and_embed(hidden, weight, logits):
    tokens = gk.gumbel_topk(logits, 8, 0.5, seed=1)
    return gk.soft_embedding(tokens, weight).sum() + tokens.weights.square().sum()


def divergence(hidden, weight, logits):
    return gk.logits_kl(logits, logits.detach().flip(0)).sum()


def logprob(hidden, weight, logits):
    values, entropies = gk.token_logprob(logits, torch.tensor([1, 2, 3], device=logits.device))
    return values.sum() + entropies.sum()


def linear_divergence(hidden, weight, logits):
    return gk.linear_kl(hidden, gk.Head(weight), hidden.detach().flip(0)).sum()


def linear_sample(hidden, weight, logits):
    return gk.linear_gumbel_topk(hidden, gk.Head(weight), 8, 0.5, seed=1).weights.square().sum()


def sweep_and_vjp(hidden, weight, logits):
    head = gk.Head(weight, softcap=5.0)
    out = gk.vocab_head(hidden, head, ref_hidden=hidden.flip(0), k=8, suppress=[3], grad=True)
    at = {"logits": out.logits, "indices": out.indices, "tokens": out.indices[:, 2], "head": head}
    grad = gk.soft_token_vjp([hidden, hidden], [weight, weight], **at, estimator="rao", samples=2, seed=1)
    return out.grad_hidden.sum() + out.kl.sum() + grad.dlogits.square().sum() + grad.dhidden.sum()


def objective(hidden, weight, logits):
    ids, per_row = torch.arange(1, 7, device=hidden.device).view(3, 2), torch.rand(3, device=hidden.device)
    options = {"tokens": ids[:, 1], "suppress": [3], "entropy_weight": 0.1, "kl_weight": per_row, "ref_kl_weight": 0.5}
    out = gk.vocab_objective(hidden, gk.Head(weight), indices=ids, ref_hidden=hidden.flip(0), **options)
    return out.grad_hidden.sum() + out.kl.sum() + out.ref_kl.sum() + out.entropy.sum() + out.logits.sum()


FUNCTIONS = [sample_and_embed, divergence, logprob, linear_divergence, linear_sample, sweep_and_vjp, objective]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_one_graph(backend, device, function):
    arguments = [torch.randn(shape, device=device, requires_grad=True) for shape in ((3, D), (V, D), (3, V))]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)
    eager = function(*arguments)
    torch.testing.assert_close(compiled, eager)
    if eager.requires_grad:
        grads = [torch.autograd.grad(x, arguments, allow_unused=True) for x in (compiled, eager)]
        torch.testing.assert_close(*grads)


class Devices(TorchDispatchMode):
    """Kinds of the devices that results lie on."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {leaf.device.type for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)}
        return out


def test_suppressed_ids_in_a_list_use_no_host_memory(monkeypatch):
    """A CUDA graph would read a copy's source again, whatever is there by then. Tensors without data stand for a GPU's;
    the kernels' shapes are known without one."""
    pytest.importorskip("triton")
    monkeypatch.setenv("GRADE_KERNELS_BACKEND", "triton")

    def sampled(logits):
        return gk.gumbel_topk(logits, 4, seed=1, suppress=[9, 3, 4, 3]).weights

    with FakeTensorMode():
        logits = torch.empty(3, V, device="cuda")
        with Devices() as devices:
            sampled(logits)
        assert devices.seen == {"cuda"}
        torch._dynamo.reset()
        assert torch.compile(sampled, fullgraph=True, backend="eager")(logits).device.type == "cuda"


@pytest.mark.parametrize("ids", [[9, 3, 4, 3], [0], [V - 1, 0], list(range(5, V))], ids=str)
def test_a_list_of_ids_is_the_tensor_of_them(ids, device):
    assert set(suppress_ids(ids, V, torch.device(device)).tolist()) == set(ids)


@pytest.mark.skipif(not any(shutil.which(name) for name in ("g++", "c++", "clang++")), reason="needs a C++ compiler")
def test_compiled_noise_is_the_noise_to_the_bit():
    """Its products wrap in int64, which C++ leaves undefined and torch's code generator does not mention."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.cat([torch.arange(500), torch.randint(2**40, 2**62, (500,), generator=generator)])
    ids = torch.randint(0, 2**18, (1000, 33), generator=generator)
    torch._dynamo.reset()
    arguments = (2**63 + 12345, 1, rows, ids)
    for ours, expected in zip(torch.compile(random_bits)(*arguments), random_bits(*arguments), strict=True):
        assert torch.equal(ours, expected)
