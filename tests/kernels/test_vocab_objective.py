"""vocab_objective: statistics, and one gradient for entropy and both divergences, against dense float64 autograd."""

import itertools

import pytest
import torch
from kernel_checks import (
    HALF,
    HEADS,
    Allocations,
    assert_no_worse,
    assert_same_fields,
    chunk_pair,
    make_head,
    rel_err,
    supports,
)  # fmt: skip

from grade_kernels import Head, reference, vocab_head, vocab_objective
from grade_kernels.backend import implementation
from grade_kernels.common import chunks
from grade_kernels.common import head as head_ops

NAMES = ("entropy_weight", "kl_weight", "ref_kl_weight")
V, D = 37, 6
INF = torch.inf
TILE = 4096  # of the kernel: 256 lanes of 16 entries
# Six rows at once; one by one; and in chunks of 2 (float64) or 4, with whatever a head has.
HEADS_AND_CHUNKS = [*((options, 2**28) for options in HEADS), (HEADS[-1], 1), (HEADS[-1], 3 * 8 * V * 2)]


def exact_grad(hidden, ref_hidden, head, weights):
    """(gradient of the objective to the hidden states, logits, reference's logits), all in float64."""
    h, bias = hidden.detach().double().requires_grad_(), None if head.bias is None else head.bias.double()
    head = Head(head.weight.double(), bias, head.scale, head.softcap)
    logits = reference.head_logits(h, head)
    ref_logits = None if ref_hidden is None else reference.head_logits(ref_hidden.double(), head)
    weights = {name: weight for name, weight in weights.items() if weight is not None}
    total = reference.objective(logits, ref_logits, **weights).sum()
    return torch.autograd.grad(total, h)[0], logits.detach(), ref_logits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("options", "chunk_bytes"), HEADS_AND_CHUNKS)
def test_everything_against_dense_float64(backend, device, options, chunk_bytes, dtype):
    hidden, ref_hidden = torch.randn(2, 3, 2, D, dtype=dtype, device=device).unbind()
    head, tokens = make_head(options, V, D, dtype, device), torch.randint(0, V, (3, 2), device=device)
    indices = supports(6, V, 9, device).view(3, 2, 9)
    tokens[1] = indices[1, :, 4]  # held; most of the others are missed
    weights = {"entropy_weight": 0.3, "kl_weight": -1.5, "ref_kl_weight": torch.randn(2, 3, device=device).T}
    grad, logits, ref_logits = exact_grad(hidden, ref_hidden, head, weights)
    shared = {"indices": indices, "tokens": tokens, "ref_hidden": ref_hidden}
    out = vocab_objective(hidden, head, **shared, **weights, chunk_bytes=chunk_bytes)
    logprob, entropy = reference.token_logprob(logits, tokens)
    ids, missing = indices.clone(), ~(indices == tokens[..., None]).any(-1)
    assert missing.any() and not missing.all()
    ids[..., -1] = torch.where(missing, tokens, ids[..., -1])
    expected = {
        "entropy": entropy,
        "kl": reference.kl(logits, ref_logits),
        "ref_kl": reference.kl(logits, ref_logits, "ref_policy"),
        "logprob": logprob,
        "lse": logits.logsumexp(-1),
        "ref_lse": ref_logits.logsumexp(-1),
        "indices": ids,
        "logits": logits.gather(-1, ids),
        "mass": logits.softmax(-1).gather(-1, ids).sum(-1),
        "ref_logprob": reference.token_logprob(ref_logits, tokens)[0],
        "objective": reference.objective(logits, ref_logits, *weights.values()),
        "grad_hidden": grad,
    }
    assert {*expected} == {*vars(out)}
    tolerance = {} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 2e-6, "check_dtype": False}
    for name, value in expected.items():
        torch.testing.assert_close(getattr(out, name), value, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_ref", [True, False])
def test_every_combination_of_weights(backend, device, with_ref, softcap, dtype):
    hidden, ref_hidden = torch.randn(2, 2, D, dtype=dtype, device=device).unbind()
    head = make_head({"softcap": softcap}, V, D, dtype, device)
    shared = {"indices": torch.zeros(2, 1, dtype=torch.int64, device=device)}
    shared["ref_hidden"] = ref_hidden if with_ref else None
    choices = (None, torch.randn(2, dtype=dtype, device=device))
    tolerance = {} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 2e-6, "check_dtype": False}
    for values in itertools.product(choices, *[choices if with_ref else (None,)] * 2):
        weights = dict(zip(NAMES, values, strict=True))
        out = vocab_objective(hidden, head, **shared, **weights)
        if all(value is None for value in values):
            assert out.grad_hidden is None and out.objective is None
            continue
        grad, *_ = exact_grad(hidden, shared["ref_hidden"], head, weights)
        torch.testing.assert_close(out.grad_hidden, grad, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_half_operands_are_not_rounded_on_the_way(backend, monkeypatch, dtype):
    monkeypatch.setattr(head_ops, "_BLOCK_BYTES", 4 * 64 * 100)
    hidden = torch.randn(4, 64).to(dtype)
    ref_hidden = (hidden.float() + 0.01 * torch.randn(4, 64)).to(dtype)
    head, indices = Head(torch.randn(701, 64).to(dtype)), torch.randint(0, 701, (4, 20))
    for name in NAMES:
        out = vocab_objective(hidden, head, indices=indices, ref_hidden=ref_hidden, **{name: torch.ones(4).half()})
        grad, logits, ref_logits = exact_grad(hidden, ref_hidden, head, {name: 1.0})
        assert rel_err(out.grad_hidden, grad) < 1e-4  # of the gradient of a divergence of 1e-2 nats
    assert rel_err(out.kl, reference.kl(logits, ref_logits)) < 1e-4
    assert rel_err(out.ref_kl, reference.kl(logits, ref_logits, "ref_policy")) < 1e-4
    assert all(t.dtype == torch.float32 for name, t in vars(out).items() if t is not None and name != "indices")


def test_the_fields_of_vocab_head(backend, device):
    hidden, ref_hidden = torch.randn(2, 4, D, device=device).unbind()
    head, tokens = make_head({}, V, D, torch.float32, device), torch.tensor([3, 7, 8, 9], device=device)
    indices = supports(4, V, 8, device)
    shared = {"indices": indices, "tokens": tokens, "suppress": [3, 5, *indices[0].tolist()], "ref_hidden": ref_hidden}
    before = indices.clone()
    out = vocab_objective(hidden, head, **shared, kl_weight=1.0)
    swept = vocab_head(hidden, head, **shared, grad=True)
    for name in ("entropy", "kl", "logprob", "lse", "ref_lse", "indices", "logits", "mass", "grad_hidden"):
        torch.testing.assert_close(getattr(out, name), getattr(swept, name), msg=name)
    assert out.logits.isneginf().any() and not out.logits.isneginf().all() and torch.equal(indices, before)
    out = vocab_objective(hidden, head, **shared, ref_kl_weight=1.0)
    swept = vocab_head(hidden, head, **shared, direction="ref_policy", grad=True)
    torch.testing.assert_close(out.ref_kl, swept.kl)
    torch.testing.assert_close(out.grad_hidden, swept.grad_hidden)


def test_identical_hidden_states(backend, device):
    hidden, head = torch.randn(2, D).to(device, torch.bfloat16), Head(torch.randn(TILE + 60, D).to(device).bfloat16())
    indices = torch.zeros(2, 1, dtype=torch.int64, device=device)
    options = {"indices": indices, "ref_hidden": hidden.clone(), "kl_weight": 2.0, "ref_kl_weight": 3.0}
    out = vocab_objective(hidden, head, **options)
    assert (out.kl == 0).all() and (out.ref_kl == 0).all() and (out.grad_hidden == 0).all()
    assert torch.equal(out.lse, out.ref_lse)


def run_chunk(ops, logits, ref_logits, *weights, softcap=None):
    """(fields, gradient to the logits) with a weight of each row for entropy, kl and ref_kl, or None."""
    n = logits.shape[0]
    weights = [w if w is None else torch.as_tensor(w, dtype=logits.dtype).expand(n).to(logits.device) for w in weights]
    grad, indices = logits.clone(), torch.zeros(n, 1, dtype=torch.int64, device=logits.device)
    return ops.objective.objective_chunk(grad, ref_logits, None, indices, None, weights, True, softcap), grad


@pytest.mark.parametrize("noise", [1e-4, 1e-2, 3.0, 12.0])
def test_no_digits_are_lost(ops, device, noise):
    p, q = chunk_pair(4, TILE + 60, device, noise)
    logp, logq = p.double().log_softmax(-1), q.double().log_softmax(-1)
    x, prob = logq - logp, logp.exp()
    kl, ref_kl = (prob * (x.expm1() - x)).sum(-1), (logq.exp() * ((-x).expm1() + x)).sum(-1)
    for weights, exact in (((None, 1.0, None), -prob * (x + kl[:, None])), ((None, None, 1.0), -prob * x.expm1())):
        out, grad = run_chunk(ops, p, q, *weights)
        assert ((out["kl"] - kl) / kl).abs().max() < 1e-5 and ((out["ref_kl"] - ref_kl) / ref_kl).abs().max() < 1e-5
        assert rel_err(grad, exact) < 1e-5
    if noise == 1e-4:
        assert rel_err(p.softmax(-1) - q.softmax(-1), -prob * x.expm1()) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_entries(ops, device, dtype):
    """-inf on both sides does not count; where only the policy has it, the pull of ref_kl remains."""
    p, q = torch.randn(2, 6, 20, dtype=dtype, device=device).unbind()
    p[:, ::3] = q[:, ::3] = -INF
    kept = [i for i in range(20) if i % 3]
    exact = p[:, kept].clone().requires_grad_()
    reference.objective(exact, q[:, kept], 0.5, 2.0, -1.0).sum().backward()
    out, grad = run_chunk(ops, p, q, 0.5, 2.0, -1.0)
    torch.testing.assert_close(grad[:, kept], exact.grad)
    assert (grad[:, ::3] == 0).all() and out["kl"].isfinite().all() and out["ref_kl"].isfinite().all()
    p[:, 1] = -INF
    out, grad = run_chunk(ops, p, q, 0.5, 2.0, 3.0)
    assert out["ref_kl"].isposinf().all() and out["kl"].isfinite().all() and grad.isfinite().all()
    torch.testing.assert_close(grad[:, 1], -3.0 * q.softmax(-1)[:, 1])


def test_weight_0_is_gradient_0_even_where_the_divergence_is_infinite(ops, device):
    p, q = torch.randn(2, 3, 20, device=device).unbind()
    q[1, 4] = -INF
    zero_there = torch.tensor([1.0, 0.0, 1.0])
    out, grad = run_chunk(ops, p, q, None, zero_there, None)
    assert out["kl"].isposinf().tolist() == [False, True, False]
    assert (grad[1] == 0).all() and (grad[[0, 2]] != 0).all()
    _, both = run_chunk(ops, p, q, 1.0, zero_there, None)  # the other terms of the row remain
    _, alone = run_chunk(ops, p, q, 1.0, None, None)
    torch.testing.assert_close(both[1], alone[1])
    p[0, 0] = torch.nan
    _, grad = run_chunk(ops, p, q, torch.tensor([0.0, 1.0, 1.0]), torch.zeros(3), torch.zeros(3))
    assert (grad[0] == 0).all() and (grad[1:] != 0).any()


@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (2, 3)])
def test_leading_shapes(backend, device, leading):
    hidden, head = torch.randn(*leading, D, device=device), make_head({}, V, D, torch.float32, device)
    indices, tokens = (torch.zeros((*leading, *k), dtype=torch.int64, device=device) for k in ((4,), ()))
    weights = {"entropy_weight": torch.ones(leading, device=device), "kl_weight": 1.0, "ref_kl_weight": 1}
    out = vocab_objective(hidden, head, indices=indices, tokens=tokens, ref_hidden=hidden, **weights)
    trailing = {"indices": (4,), "logits": (4,), "grad_hidden": (D,)}
    for name, value in vars(out).items():
        assert value.shape == (*leading, *trailing.get(name, ())), name


def test_what_was_not_asked_for_is_none(backend, device):
    hidden, head = torch.randn(4, D, device=device), make_head({}, V, D, torch.float32, device)
    indices = torch.zeros(4, 2, dtype=torch.int64, device=device)
    out = vocab_objective(hidden, head, indices=indices)
    assert {name for name, value in vars(out).items() if value is None} == {
        "kl", "ref_kl", "logprob", "ref_logprob", "ref_lse", "objective", "grad_hidden",
    }  # fmt: skip
    options = dict(indices=indices, ref_hidden=hidden.flip(0), ref_kl=False)
    assert vocab_objective(hidden, head, **options).ref_kl is None
    assert vocab_objective(hidden, head, **options, ref_kl_weight=1.0).ref_kl is not None


def test_only_logits_and_objective_have_a_graph_and_inputs_stay():
    hidden, weight = torch.randn(4, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    row_weights, indices = torch.rand(4, requires_grad=True), torch.zeros(4, 2, dtype=torch.int64)
    copies = [t.detach().clone() for t in (hidden, weight, row_weights)]
    options = {"indices": indices, "ref_hidden": hidden * 2, "kl_weight": row_weights}
    out = vocab_objective(hidden, Head(weight, softcap=2.0), **options)
    assert {name for name, t in vars(out).items() if t is not None and t.requires_grad} == {"logits", "objective"}
    assert all(torch.equal(*pair) for pair in zip((hidden, weight, row_weights), copies, strict=True))
    (out.logits.sum() + out.objective.sum()).backward()
    assert hidden.grad is not None and weight.grad is None and row_weights.grad is None


@pytest.mark.parametrize("options", HEADS)
def test_a_loss_is_differentiated_as_through_the_dense_logits(options):
    """A policy gradient's loss: any function of the support's logits plus multiples of each row's objective."""
    hidden, ref_hidden = torch.randn(2, 6, D, dtype=torch.float64).unbind()
    head, indices = make_head(options, V, D, torch.float64), supports(6, V, 7)
    weights = {"entropy_weight": -0.2, "kl_weight": torch.rand(6).double(), "ref_kl_weight": 0.5}
    upstream = torch.randn(6, dtype=torch.float64)

    def gradient(values_of):
        leaf = hidden.clone().requires_grad_()
        logits, objective = values_of(leaf)
        (logits.log_softmax(-1)[:, 2].exp().square().sum() + (upstream * objective).sum()).backward()
        return leaf.grad

    def dense(leaf):
        logits, ref_logits = (reference.head_logits(x, head) for x in (leaf, ref_hidden))
        return logits.gather(1, indices), reference.objective(logits, ref_logits, *weights.values())

    def swept(leaf):
        out = vocab_objective(leaf, head, indices=indices, ref_hidden=ref_hidden, **weights)
        return out.logits, out.objective

    torch.testing.assert_close(gradient(swept), gradient(dense))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_is_as_documented(monkeypatch, dtype):
    n, vocab, d, k = 36, 4000, 16, 8
    piece = 4 * vocab  # one row a piece
    monkeypatch.setattr(chunks, "_PIECE_BYTES_CPU", piece)
    monkeypatch.setattr(head_ops, "_BLOCK_BYTES", 4 * d * 250)
    hidden, ref_hidden = torch.randn(2, n, d).to(dtype).unbind()
    head, indices = Head(torch.randn(vocab, d).to(dtype), softcap=5.0), torch.randint(0, vocab, (n, k))
    outputs = 4 * n * (d + 3 * k + 12)
    options = {"indices": indices, "ref_hidden": ref_hidden, **dict.fromkeys(NAMES, 1.0)}
    for rows in (2, 9):
        chunk_bytes = 3 * 4 * vocab * rows
        with Allocations().ignore(hidden, head.weight) as made:
            vocab_objective(hidden, head, chunk_bytes=chunk_bytes, **options)
        assert made.largest <= max(rows * vocab, outputs // 4)
        assert 2 * 4 * vocab * rows < made.peak < chunk_bytes + 10 * piece + outputs + 4 * d * 250


def per_row(weights, n, device):
    return [w if w is None else torch.as_tensor(w, dtype=torch.float32).expand(n).to(device) for w in weights]


def both_paths(logits, ref, suppress, indices, tokens, weights, softcap=None):
    """(fields, logits afterwards) of the Triton path and of the PyTorch path; the reference's logits stay."""
    results, weights = [], per_row(weights, logits.shape[0], logits.device)
    for backend in ("triton", "torch"):
        grad, other = logits.clone(), None if ref is None else ref.clone()
        objective_chunk = implementation(backend).objective.objective_chunk
        results.append((objective_chunk(grad, other, suppress, indices, tokens, weights, True, softcap), grad))
        assert ref is None or torch.equal(other.nan_to_num(), ref.nan_to_num())
    return results


@pytest.mark.triton
@pytest.mark.parametrize("vocab", [1, 70, TILE - 1, TILE, TILE + 1, 2 * TILE + 16])
def test_sizes(vocab, device):
    logits, ref = chunk_pair(3, vocab, device)
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


@pytest.mark.triton
@pytest.mark.parametrize("with_tokens", [True, False])
@pytest.mark.parametrize("k", [1, 17, 1024])
def test_supports(k, with_tokens, device):
    vocab = 1500
    logits, ref = chunk_pair(2, vocab, device)
    indices, tokens = supports(2, vocab, k, device), torch.randint(0, vocab, (2,))
    tokens[0] = indices[0, k // 2]  # held; the other is missed, unless all but a few are held
    suppress = torch.cat([tokens[:1], indices[:, 0].cpu(), torch.tensor([0, 15, 16, vocab - 1])]).to(device)
    tokens = tokens.to(device) if with_tokens else None
    (ours, _), (theirs, _) = both_paths(logits, ref, suppress, indices, tokens, (1.0, None, None))
    assert_same_fields(ours, theirs)
    assert ours["logits"].isneginf().any() == (k > 1 or not with_tokens)  # a given token is never blocked


@pytest.mark.triton
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_masks_and_bad_rows(softcap, device):
    logits, ref = (x.clamp(-3.9, 3.9) for x in chunk_pair(7, TILE + 60, "cpu"))
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


@pytest.mark.triton
def test_custom_ops(device):
    logits, ref = chunk_pair(3, 40, device)
    indices, tokens = supports(3, 40, 5, device), torch.randint(0, 40, (3,)).to(device)
    suppress, rows = torch.tensor([1, 7]).to(device), torch.rand(3).to(device)
    ops = torch.ops.grade_kernels
    torch.library.opcheck(ops.objective, (logits, ref, indices, tokens, suppress))
    torch.library.opcheck(ops.objective_grad, (logits, ref, indices, tokens, None, None, rows, rows, 3.0))
