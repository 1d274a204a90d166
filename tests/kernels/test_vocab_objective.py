"""vocab_objective: statistics, and one gradient for entropy and both divergences, against dense float64 autograd."""

import itertools

import pytest
import torch
from kernel_checks import HALF, Allocations, rel_err

from grade_kernels import reference, vocab_head, vocab_objective
from grade_kernels.common import chunks
from grade_kernels.common import head as head_ops
from grade_kernels.torch_ops.objective import objective_chunk

HEADS = [{}, {"bias": True}, {"scale": 0.25}, {"softcap": 3.0}, {"bias": True, "scale": -1.5, "softcap": 2.0}]
NAMES = ("entropy_weight", "kl_weight", "ref_kl_weight")
V, D = 37, 6
INF = torch.inf


def exact_grad(hidden, ref_hidden, weight, bias, options, weights):
    h, w = hidden.detach().double().requires_grad_(), weight.double()
    b = None if bias is None else bias.double()
    logits = reference.head_logits(h, w, b, **options)
    ref_logits = None if ref_hidden is None else reference.head_logits(ref_hidden.double(), w, b, **options)
    given = {name: weight for name, weight in weights.items() if weight is not None}
    total = reference.objective(logits, ref_logits, **given).sum()
    return torch.autograd.grad(total, h)[0], logits.detach(), ref_logits


@pytest.mark.parametrize("chunk_bytes", [1, 3 * 8 * V * 4, 2**28])
@pytest.mark.parametrize("options", HEADS)
def test_everything_against_dense_float64(options, chunk_bytes):
    options = dict(options)
    hidden, ref_hidden = torch.randn(2, 3, 5, D, dtype=torch.float64).unbind()
    weight, tokens = torch.randn(V, D, dtype=torch.float64), torch.randint(0, V, (3, 5))
    indices = torch.stack([torch.randperm(V)[:9] for _ in range(15)]).view(3, 5, 9)
    bias = torch.randn(V, dtype=torch.float64) if options.pop("bias", False) else None
    weights = {"entropy_weight": 0.3, "kl_weight": torch.randn(3, 5), "ref_kl_weight": -1.5}
    grad, logits, ref_logits = exact_grad(hidden, ref_hidden, weight, bias, options, weights)
    out = vocab_objective(
        hidden, weight, indices=indices, tokens=tokens, ref_hidden=ref_hidden, bias=bias, chunk_bytes=chunk_bytes,
        **weights, **options,
    )  # fmt: skip
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
    for name, value in expected.items():
        torch.testing.assert_close(getattr(out, name), value, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_ref", [True, False])
def test_every_combination_of_weights(with_ref, softcap):
    hidden, ref_hidden = torch.randn(2, 5, D, dtype=torch.float64).unbind()
    weight, indices = torch.randn(V, D, dtype=torch.float64), torch.zeros(5, 1, dtype=torch.int64)
    ref_hidden = ref_hidden if with_ref else None
    choices = (None, 0.7, torch.randn(5, dtype=torch.float64))
    for values in itertools.product(choices, *[choices if with_ref else (None,)] * 2):
        weights = dict(zip(NAMES, values, strict=True))
        out = vocab_objective(hidden, weight, indices=indices, ref_hidden=ref_hidden, softcap=softcap, **weights)
        if all(value is None for value in values):
            assert out.grad_hidden is None and out.objective is None
            continue
        grad, *_ = exact_grad(hidden, ref_hidden, weight, None, {"softcap": softcap}, weights)
        torch.testing.assert_close(out.grad_hidden, grad)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_half_operands_are_not_rounded_on_the_way(monkeypatch, dtype):
    monkeypatch.setattr(head_ops, "_BLOCK_BYTES", 4 * 64 * 100)
    hidden = torch.randn(30, 64).to(dtype)
    ref_hidden = (hidden.float() + 0.01 * torch.randn(30, 64)).to(dtype)
    weight, indices = torch.randn(701, 64).to(dtype), torch.randint(0, 701, (30, 20))
    for name in NAMES:
        out = vocab_objective(hidden, weight, indices=indices, ref_hidden=ref_hidden, **{name: torch.ones(30).half()})
        grad, logits, ref_logits = exact_grad(hidden, ref_hidden, weight, None, {}, {name: 1.0})
        assert rel_err(out.grad_hidden, grad) < 1e-4  # of the gradient of a divergence of 1e-2 nats
    assert rel_err(out.kl, reference.kl(logits, ref_logits)) < 1e-4
    assert rel_err(out.ref_kl, reference.kl(logits, ref_logits, "ref_policy")) < 1e-4
    assert all(t.dtype == torch.float32 for name, t in vars(out).items() if t is not None and name != "indices")


def test_the_fields_of_vocab_head():
    hidden, ref_hidden = torch.randn(2, 4, D).unbind()
    weight, tokens = torch.randn(V, D), torch.tensor([3, 7, 8, 9])
    indices = torch.stack([torch.randperm(V)[:8] for _ in range(4)])
    shared = {"indices": indices, "tokens": tokens, "suppress": [3, 5, *indices[0].tolist()], "ref_hidden": ref_hidden}
    before = indices.clone()
    out = vocab_objective(hidden, weight, **shared, kl_weight=1.0)
    head = vocab_head(hidden, weight, **shared, grad=True)
    for name in ("entropy", "kl", "logprob", "lse", "ref_lse", "indices", "logits", "mass", "grad_hidden"):
        torch.testing.assert_close(getattr(out, name), getattr(head, name), msg=name)
    assert out.logits.isneginf().any() and not out.logits.isneginf().all() and torch.equal(indices, before)
    out = vocab_objective(hidden, weight, **shared, ref_kl_weight=1.0)
    head = vocab_head(hidden, weight, **shared, direction="ref_policy", grad=True)
    torch.testing.assert_close(out.ref_kl, head.kl)
    torch.testing.assert_close(out.grad_hidden, head.grad_hidden)


def test_identical_hidden_states():
    hidden, weight = torch.randn(9, D).bfloat16(), torch.randn(V, D).bfloat16()
    indices = torch.zeros(9, 1, dtype=torch.int64)
    options = {"indices": indices, "ref_hidden": hidden.clone(), "kl_weight": 2.0, "ref_kl_weight": 3.0}
    out = vocab_objective(hidden, weight, **options)
    assert (out.kl == 0).all() and (out.ref_kl == 0).all() and (out.grad_hidden == 0).all()


def run_chunk(logits, ref_logits, *weights, softcap=None):
    """(fields, gradient to the logits) with a weight of each row for entropy, kl and ref_kl, or None."""
    n = logits.shape[0]
    weights = [w if w is None else torch.as_tensor(w, dtype=logits.dtype).expand(n) for w in weights]
    grad, indices = logits.clone(), torch.zeros(n, 1, dtype=torch.int64)
    return objective_chunk(grad, ref_logits, None, indices, None, weights, True, softcap), grad


def test_no_digits_are_lost_where_the_two_nearly_agree():
    p = 3 * torch.randn(8, 500)
    q = p + 1e-4 * torch.randn(8, 500)
    logp, logq = p.double().log_softmax(-1), q.double().log_softmax(-1)
    x, prob = logq - logp, logp.exp()
    kl, ref_kl = (prob * (x.expm1() - x)).sum(-1), (logq.exp() * ((-x).expm1() + x)).sum(-1)
    for weights, exact in (((None, 1.0, None), -prob * (x + kl[:, None])), ((None, None, 1.0), -prob * x.expm1())):
        out, grad = run_chunk(p, q, *weights)
        assert rel_err(out["kl"], kl) < 1e-5 and rel_err(out["ref_kl"], ref_kl) < 1e-5
        assert rel_err(grad, exact) < 1e-5
    assert rel_err(p.softmax(-1) - q.softmax(-1), -prob * x.expm1()) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_entries(dtype):
    """-inf on both sides does not count; where only the policy has it, the pull of ref_kl remains."""
    p, q = torch.randn(2, 6, 20, dtype=dtype).unbind()
    p[:, ::3] = q[:, ::3] = -INF
    kept = [i for i in range(20) if i % 3]
    exact = p[:, kept].clone().requires_grad_()
    reference.objective(exact, q[:, kept], 0.5, 2.0, -1.0).sum().backward()
    out, grad = run_chunk(p, q, 0.5, 2.0, -1.0)
    torch.testing.assert_close(grad[:, kept], exact.grad)
    assert (grad[:, ::3] == 0).all() and out["kl"].isfinite().all() and out["ref_kl"].isfinite().all()
    p[:, 1] = -INF
    out, grad = run_chunk(p, q, 0.5, 2.0, 3.0)
    assert out["ref_kl"].isposinf().all() and out["kl"].isfinite().all() and grad.isfinite().all()
    torch.testing.assert_close(grad[:, 1], -3.0 * q.softmax(-1)[:, 1])


def test_weight_0_is_gradient_0_even_where_the_divergence_is_infinite():
    p, q = torch.randn(2, 3, 20).unbind()
    q[1, 4] = -INF
    zero_there = torch.tensor([1.0, 0.0, 1.0])
    out, grad = run_chunk(p, q, None, zero_there, None)
    assert out["kl"].isposinf().tolist() == [False, True, False]
    assert (grad[1] == 0).all() and (grad[[0, 2]] != 0).all()
    _, both = run_chunk(p, q, 1.0, zero_there, None)  # the other terms of the row remain
    _, alone = run_chunk(p, q, 1.0, None, None)
    torch.testing.assert_close(both[1], alone[1])
    p[0, 0] = torch.nan
    _, grad = run_chunk(p, q, torch.tensor([0.0, 1.0, 1.0]), torch.zeros(3), torch.zeros(3))
    assert (grad[0] == 0).all() and (grad[1:] != 0).any()


@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (2, 3)])
def test_leading_shapes(leading):
    hidden, weight = torch.randn(*leading, D), torch.randn(V, D)
    indices, tokens = torch.zeros(*leading, 4, dtype=torch.int64), torch.zeros(leading, dtype=torch.int64)
    weights = {"entropy_weight": torch.ones(leading), "kl_weight": 1.0, "ref_kl_weight": 1}
    out = vocab_objective(hidden, weight, indices=indices, tokens=tokens, ref_hidden=hidden, **weights)
    trailing = {"indices": (4,), "logits": (4,), "grad_hidden": (D,)}
    for name, value in vars(out).items():
        assert value.shape == (*leading, *trailing.get(name, ())), name


def test_what_was_not_asked_for_is_none():
    hidden, weight, indices = torch.randn(4, D), torch.randn(V, D), torch.zeros(4, 2, dtype=torch.int64)
    out = vocab_objective(hidden, weight, indices=indices)
    assert {name for name, value in vars(out).items() if value is None} == {
        "kl", "ref_kl", "logprob", "ref_logprob", "ref_lse", "objective", "grad_hidden",
    }  # fmt: skip
    options = dict(indices=indices, ref_hidden=hidden.flip(0), ref_kl=False)
    assert vocab_objective(hidden, weight, **options).ref_kl is None
    assert vocab_objective(hidden, weight, **options, ref_kl_weight=1.0).ref_kl is not None


def test_only_logits_and_objective_have_a_graph_and_inputs_stay():
    hidden, weight = torch.randn(4, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    row_weights, indices = torch.rand(4, requires_grad=True), torch.zeros(4, 2, dtype=torch.int64)
    copies = [t.detach().clone() for t in (hidden, weight, row_weights)]
    out = vocab_objective(hidden, weight, indices=indices, ref_hidden=hidden * 2, kl_weight=row_weights, softcap=2.0)
    assert {name for name, t in vars(out).items() if t is not None and t.requires_grad} == {"logits", "objective"}
    assert all(torch.equal(*pair) for pair in zip((hidden, weight, row_weights), copies, strict=True))
    (out.logits.sum() + out.objective.sum()).backward()
    assert hidden.grad is not None and weight.grad is None and row_weights.grad is None


@pytest.mark.parametrize("options", HEADS)
def test_a_loss_is_differentiated_as_through_the_dense_logits(options):
    """A policy gradient's loss: any function of the support's logits plus multiples of each row's objective."""
    options = {name: value for name, value in options.items() if name != "bias"}
    hidden, ref_hidden = torch.randn(2, 6, D, dtype=torch.float64).unbind()
    weight = torch.randn(V, D, dtype=torch.float64)
    indices = torch.stack([torch.randperm(V)[:7] for _ in range(6)])
    weights = {"entropy_weight": -0.2, "kl_weight": torch.rand(6).double(), "ref_kl_weight": 0.5}
    upstream = torch.randn(6, dtype=torch.float64)

    def gradient(values_of):
        leaf = hidden.clone().requires_grad_()
        logits, objective = values_of(leaf)
        (logits.log_softmax(-1)[:, 2].exp().square().sum() + (upstream * objective).sum()).backward()
        return leaf.grad

    def dense(leaf):
        logits = reference.head_logits(leaf, weight, **options)
        return logits.gather(1, indices), reference.objective(
            logits, reference.head_logits(ref_hidden, weight, **options), *weights.values()
        )

    def swept(leaf):
        out = vocab_objective(leaf, weight, indices=indices, ref_hidden=ref_hidden, **weights, **options)
        return out.logits, out.objective

    torch.testing.assert_close(gradient(swept), gradient(dense))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_is_as_documented(monkeypatch, dtype):
    n, vocab, d, k = 36, 4000, 16, 8
    piece = 4 * vocab  # one row a piece
    monkeypatch.setattr(chunks, "_PIECE_BYTES_CPU", piece)
    monkeypatch.setattr(head_ops, "_BLOCK_BYTES", 4 * d * 250)
    hidden, ref_hidden = torch.randn(2, n, d).to(dtype).unbind()
    weight, indices = torch.randn(vocab, d).to(dtype), torch.randint(0, vocab, (n, k))
    outputs = 4 * n * (d + 3 * k + 12)
    options = {"indices": indices, "ref_hidden": ref_hidden, "softcap": 5.0, **dict.fromkeys(NAMES, 1.0)}
    for rows in (2, 9):
        chunk_bytes = 3 * 4 * vocab * rows
        with Allocations().ignore(hidden, weight) as made:
            vocab_objective(hidden, weight, chunk_bytes=chunk_bytes, **options)
        assert made.largest <= max(rows * vocab, outputs // 4)
        assert 2 * 4 * vocab * rows < made.peak < chunk_bytes + 10 * piece + outputs + 4 * d * 250
