"""The Triton path of vocab_objective: one fused kernel a chunk, against the PyTorch path of the same chunk."""

import itertools

import pytest
import torch
from kernel_checks import HALF, assert_no_worse, rel_err

from grade_kernels import reference, vocab_objective
from grade_kernels.torch_ops import objective as torch_objective
from grade_kernels.triton_ops import objective as triton_objective

NAMES = ("entropy_weight", "kl_weight", "ref_kl_weight")
INF = torch.inf
# A tile is 256 lanes of 16 entries.
TILE = 4096


def chunk(n, vocab, device, noise=0.3):
    logits = torch.randn(n, vocab) * 3
    return logits.to(device), (logits + noise * torch.randn(n, vocab)).to(device)


def supports(n, vocab, k, device):
    return torch.stack([torch.randperm(vocab)[:k] for _ in range(n)]).to(device)


def per_row(weights, n, device):
    return [w if w is None else torch.as_tensor(w, dtype=torch.float32).expand(n).to(device) for w in weights]


def both_paths(logits, ref, suppress, indices, tokens, weights, softcap=None):
    """(fields, logits afterwards) of the Triton path and of the PyTorch path; the reference's logits stay."""
    results, weights = [], per_row(weights, logits.shape[0], logits.device)
    for ops in (triton_objective, torch_objective):
        grad, other = logits.clone(), None if ref is None else ref.clone()
        results.append((ops.objective_chunk(grad, other, suppress, indices, tokens, weights, True, softcap), grad))
        assert ref is None or torch.equal(other.nan_to_num(), ref.nan_to_num())
    return results


def assert_same_fields(ours, theirs, rtol=1e-5, atol=2e-6):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        if name in ("indices", "logits"):
            assert torch.equal(value, theirs[name]), name
        else:
            torch.testing.assert_close(value, theirs[name], rtol=rtol, atol=atol, equal_nan=True, msg=name)


@pytest.mark.parametrize("vocab", [1, 70, TILE - 1, TILE, TILE + 1, 2 * TILE + 16])
def test_sizes(vocab, device):
    logits, ref = chunk(3, vocab, device)
    indices, tokens = supports(3, vocab, min(vocab, 20), device), torch.randint(0, vocab, (3,)).to(device)
    weights = (0.5, torch.tensor([1.0, -2.0, 0.0]), 3.0)
    (ours, mine), (theirs, plain) = both_paths(logits, ref, None, indices, tokens, weights)
    assert_same_fields(ours, theirs)
    exact = logits.double().requires_grad_()
    columns = [w.double() for w in per_row(weights, 3, device)]
    reference.objective(exact, ref.double(), *columns).sum().backward()
    if vocab == 1:
        assert (mine == 0).all() and (ours["kl"] == 0).all() and (ours["ref_kl"] == 0).all()
        return
    assert_no_worse(mine, plain, exact.grad)
    for name, direction in (("kl", "policy_ref"), ("ref_kl", "ref_policy")):
        assert_no_worse(ours[name], theirs[name], reference.kl(logits.double(), ref.double(), direction))


@pytest.mark.parametrize("with_ref", [True, False])
def test_every_combination_of_weights(with_ref, device):
    logits, ref = (x.clamp(-3.9, 3.9) for x in chunk(3, 70, device))
    indices = supports(3, 70, 3, device)
    divergences = (None, torch.tensor([-1.0, 0.0, 2.0])) if with_ref else (None,)
    for weights in itertools.product((None, 0.7), divergences, divergences):
        args = (logits, ref if with_ref else None, None, indices, None, weights, 4.0)
        (ours, mine), (theirs, plain) = both_paths(*args)
        assert_same_fields(ours, theirs)
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-6)
        assert torch.equal(mine, logits) == all(w is None for w in weights)


@pytest.mark.parametrize("with_tokens", [True, False])
@pytest.mark.parametrize("k", [1, 17, 1024])
def test_supports(k, with_tokens, device):
    vocab = 1500
    logits, ref = chunk(4, vocab, device)
    indices, tokens = supports(4, vocab, k, device), torch.randint(0, vocab, (4,))
    tokens[:2] = indices[:2, k // 2].cpu()  # held; most of the others are missed
    suppress = torch.cat([tokens[:1], indices[:, 0].cpu(), torch.tensor([0, 15, 16, vocab - 1])]).to(device)
    tokens = tokens.to(device) if with_tokens else None
    (ours, _), (theirs, _) = both_paths(logits, ref, suppress, indices, tokens, (1.0, None, None))
    assert_same_fields(ours, theirs)
    assert ours["logits"].isneginf().any() == (k > 1 or not with_tokens)  # a given token is never blocked


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_masks_and_bad_rows(softcap, device):
    logits, ref = (x.clamp(-3.9, 3.9) for x in chunk(7, TILE + 60, "cpu"))
    logits[0, ::3] = -INF
    logits[1, ::3] = ref[1, ::3] = -INF
    ref[2, ::5] = -INF
    logits[3, -1] = torch.nan
    ref[4, 0] = torch.nan
    ref[5, ::5] = -INF
    indices, tokens = supports(7, logits.shape[1], 8, device), torch.full((7,), 2).to(device)
    # Row 5 has an infinite KL and no weight for it.
    weights = (0.5, torch.tensor([1.0] * 5 + [0.0, 1.0]), 2.0)
    args = (logits.to(device), ref.to(device), None, indices, tokens, weights, softcap)
    (ours, mine), (theirs, plain) = both_paths(*args)
    assert ours["ref_kl"][0].isposinf() and ours["kl"][[2, 5]].isposinf().all()
    assert ours["kl"][[3, 4]].isnan().all() and ours["ref_kl"][[3, 4]].isnan().all()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=2e-6, equal_nan=True, msg=name)
    rows = [0, 1, 3, 4, 5, 6]
    assert mine[[0, 1, 5, 6]].isfinite().all()
    torch.testing.assert_close(mine[rows], plain[rows], rtol=1e-4, atol=1e-7, equal_nan=True)


def test_weight_0_is_gradient_0(device):
    logits, ref = chunk(3, 70, device)
    ref[0, 3], logits[1, 3] = -INF, torch.nan
    no = torch.tensor([0.0, 0.0, 1.0])
    (_, mine), _ = both_paths(logits, ref, None, supports(3, 70, 2, device), None, (no, no, no))
    assert (mine[:2] == 0).all() and (mine[2] != 0).all()


def test_identical_rows(device):
    """The divergences and their gradients are exactly 0."""
    logits, _ = chunk(3, TILE + 60, device)
    weights = per_row((None, 2.0, 3.0), 3, device)
    args = (None, supports(3, 60, 2, device), None, weights, True, None)
    fields = triton_objective.objective_chunk(logits, logits.clone(), *args)
    assert (fields["kl"] == 0).all() and (fields["ref_kl"] == 0).all() and (logits == 0).all()
    assert torch.equal(fields["lse"], fields["ref_lse"])


@pytest.mark.parametrize("noise", [1e-4, 1e-2, 3.0, 12.0])
def test_both_divergences_keep_their_digits(noise, device):
    logits, ref = chunk(4, TILE + 60, device, noise)
    logp, logq = logits.double().log_softmax(-1), ref.double().log_softmax(-1)
    x = logq - logp
    kl, ref_kl = (logp.exp() * (x.expm1() - x)).sum(-1), (logq.exp() * ((-x).expm1() + x)).sum(-1)
    indices = supports(4, 60, 2, device)
    d_kl, d_ref_kl = -logp.exp() * (x + kl[:, None]), -logp.exp() * x.expm1()
    for weights, exact in (((None, 1.0, None), d_kl), ((None, None, 1.0), d_ref_kl)):
        (ours, mine), _ = both_paths(logits, ref, None, indices, None, weights)
        assert rel_err(mine, exact) < 1e-5
        assert ((ours["kl"] - kl) / kl).abs().max() < 1e-5 and ((ours["ref_kl"] - ref_kl) / ref_kl).abs().max() < 1e-5


def heads(vocab, d, dtype, device):
    hidden = torch.randn(2, 3, d)
    ref = hidden + 0.05 * torch.randn(2, 3, d)
    weight = torch.randn(vocab, d) / 2
    return (x.to(device, dtype) for x in (hidden, ref, weight))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "scale": 0.5}, {"ref_hidden": None}])
def test_vocab_objective_as_on_the_pytorch_path(options, dtype, device, monkeypatch):
    hidden, ref, weight = heads(201, 16, dtype, device)
    tokens, bias = torch.randint(0, 201, (2, 3)).to(device), torch.randn(201).to(device)
    kwargs = {"ref_hidden": ref, "indices": supports(6, 201, 12, device).view(2, 3, 12), "tokens": tokens}
    kwargs |= {"bias": bias, "suppress": [0, 7, 200], "entropy_weight": torch.rand(2, 3).to(device, dtype)}
    kwargs |= {"chunk_bytes": 3 * 4 * 201 * 4} | options  # 4 rows, then 2
    if kwargs["ref_hidden"] is not None:
        kwargs |= {"kl_weight": 0.5, "ref_kl_weight": torch.rand(3, 2).to(device).T}
    ours = vocab_objective(hidden, weight, **kwargs)
    monkeypatch.setenv("GRADE_KERNELS_BACKEND", "torch")
    theirs = vocab_objective(hidden, weight, **kwargs)
    for name, value in vars(theirs).items():
        mine = getattr(ours, name)
        assert (mine is None) == (value is None), name
        if value is not None:
            assert mine.dtype == value.dtype
            torch.testing.assert_close(mine, value, rtol=1e-5, atol=2e-6, msg=name)


def test_no_rows(device):
    hidden, ref, weight = (x[..., :0, :] if x.dim() == 3 else x for x in heads(50, 4, torch.float32, device))
    indices = torch.zeros(2, 0, 5, dtype=torch.int64, device=device)
    out = vocab_objective(hidden, weight, indices=indices, ref_hidden=ref, kl_weight=1.0)
    assert out.kl.shape == (2, 0) and out.indices.shape == (2, 0, 5) and out.grad_hidden.shape == (2, 0, 4)


def test_custom_ops(device):
    logits, ref = chunk(3, 40, device)
    indices, tokens = supports(3, 40, 5, device), torch.randint(0, 40, (3,)).to(device)
    suppress, rows = torch.tensor([1, 7]).to(device), torch.rand(3).to(device)
    ops = torch.ops.grade_kernels
    torch.library.opcheck(ops.objective, (logits, ref, indices, tokens, suppress))
    torch.library.opcheck(ops.objective_grad, (logits, ref, indices, tokens, None, None, rows, rows, 3.0))


def test_compiles_into_one_graph(device):
    def sweep(hidden, ref, weight, indices):
        weights = dict.fromkeys(NAMES, 0.5)
        out = vocab_objective(hidden, weight, indices=indices, ref_hidden=ref, suppress=[3], **weights)
        return out.grad_hidden, out.kl, out.ref_kl, out.logits, out.entropy

    hidden, ref, weight = heads(60, 8, torch.float32, device)
    arguments = (hidden, ref, weight, supports(6, 60, 5, device).view(2, 3, 5))
    torch._dynamo.reset()
    compiled = torch.compile(sweep, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(compiled, sweep(*arguments))
