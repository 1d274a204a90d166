"""vocab_head: one sweep against dense float64 autograd, and its memory."""

import pytest
import torch
from kernel_checks import HALF, Allocations, rel_err

from grade_kernels import chunk_rows, reference, vocab_head
from grade_kernels.common import chunks
from grade_kernels.common import head as head_ops
from grade_kernels.torch_ops import topk

HEADS = [{}, {"bias": True}, {"scale": 0.25}, {"softcap": 3.0}, {"bias": True, "scale": -1.5, "softcap": 2.0}]
V, D = 37, 6


def dense(hidden, weight, ref_hidden, bias, direction, options):
    h, rh = hidden.detach().double().requires_grad_(), ref_hidden.detach().double().requires_grad_()
    w, b = weight.double(), None if bias is None else bias.double()
    logits = reference.head_logits(h, w, b, **options)
    ref_logits = reference.head_logits(rh, w, b, **options)
    kl = reference.kl(logits, ref_logits, direction)
    d_h, d_rh = torch.autograd.grad(kl.sum(), (h, rh))
    return logits.detach(), ref_logits.detach(), kl.detach(), d_h, d_rh


@pytest.mark.parametrize("chunk_bytes", [1, 3 * 8 * V * 4, 2**28])
@pytest.mark.parametrize("direction", ["policy_ref", "ref_policy"])
@pytest.mark.parametrize("options", HEADS)
def test_everything_against_dense_float64(options, direction, chunk_bytes):
    options = dict(options)
    hidden, ref_hidden = torch.randn(2, 3, 5, D, dtype=torch.float64).unbind()
    weight, tokens = torch.randn(V, D, dtype=torch.float64), torch.randint(0, V, (3, 5))
    bias = torch.randn(V, dtype=torch.float64) if options.pop("bias", False) else None
    logits, ref_logits, kl, d_h, d_rh = dense(hidden, weight, ref_hidden, bias, direction, options)
    out = vocab_head(
        hidden,
        weight,
        ref_hidden=ref_hidden,
        k=9,
        tokens=tokens,
        direction=direction,
        grad=True,
        bias=bias,
        chunk_bytes=chunk_bytes,
        **options,
    )
    logprob, entropy = reference.token_logprob(logits, tokens)
    ids = reference.topk(logits, 9)
    missing = ~(ids == tokens[..., None]).any(-1)
    assert missing.any() and not missing.all()
    ids[..., -1] = torch.where(missing, tokens, ids[..., -1])
    expected = {
        "kl": kl,
        "entropy": entropy,
        "logprob": logprob,
        "lse": logits.logsumexp(-1),
        "ref_lse": ref_logits.logsumexp(-1),
        "indices": ids,
        "logits": logits.gather(-1, ids),
        "mass": logits.softmax(-1).gather(-1, ids).sum(-1),
        "grad_hidden": d_h,
        "grad_ref_hidden": d_rh,
    }
    assert {*expected} == {*vars(out)}
    for name, value in expected.items():
        torch.testing.assert_close(getattr(out, name), value, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_half_operands_are_not_rounded_on_the_way(monkeypatch, dtype):
    monkeypatch.setattr(head_ops, "_BLOCK_BYTES", 4 * 64 * 100)
    hidden = torch.randn(30, 64).to(dtype)
    ref_hidden = (hidden.float() + 0.01 * torch.randn(30, 64)).to(dtype)
    weight, tokens = torch.randn(700, 64).to(dtype), torch.randint(0, 700, (30,))
    logits, _, kl, d_h, d_rh = dense(hidden, weight, ref_hidden, None, "policy_ref", {})
    out = vocab_head(hidden, weight, ref_hidden=ref_hidden, k=20, tokens=tokens, grad=True)
    floats = [t for t in vars(out).values() if t.dtype != torch.int64]
    assert all(t.dtype == torch.float32 for t in floats)
    logprob, entropy = reference.token_logprob(logits, tokens)
    assert rel_err(out.logits, logits.gather(-1, out.indices)) < 1e-6
    assert rel_err(out.logprob, logprob) < 1e-6 and rel_err(out.entropy, entropy) < 1e-5
    for mine, exact in ((out.kl, kl), (out.grad_hidden, d_h), (out.grad_ref_hidden, d_rh)):
        assert rel_err(mine, exact) < 1e-4  # of a divergence of 1e-2 nats and of its gradient


@pytest.mark.parametrize("direction", ["policy_ref", "ref_policy"])
@pytest.mark.parametrize("step", [3.0, 0.3, 1e-3, 1e-6])
def test_float32_keeps_its_digits(step, direction):
    """An identity head, so that the gradients are those to the logits; KL from nats down to 1e-13."""
    logits = 2 * torch.randn(12, 500)
    ref_logits, bias = logits + step * torch.randn(12, 500), torch.zeros(500)
    bias[3::7] = -torch.inf  # ids that neither side has
    out = vocab_head(logits, torch.eye(500), ref_hidden=ref_logits, k=None, direction=direction, grad=True, bias=bias)
    kept = bias == 0
    first, second = [x[:, kept].double().log_softmax(-1) for x in (logits, ref_logits)]
    p, q = (first, second) if direction == "policy_ref" else (second, first)
    kl = (p.exp() * (torch.expm1(q - p) - (q - p))).sum(-1)
    grads = [p.exp() * (p - q - kl[:, None]), p.exp() * torch.expm1(q - p)]
    torch.testing.assert_close(out.kl.double(), kl, rtol=2e-6, atol=0)
    torch.testing.assert_close(out.entropy.double(), -(first.exp() * first).sum(-1), rtol=1e-6, atol=0)
    outs = (out.grad_hidden, out.grad_ref_hidden)
    for mine, exact in zip(outs if direction == "policy_ref" else outs[::-1], grads, strict=True):
        assert (mine[:, ~kept] == 0).all()
        assert ((mine[:, kept] - exact).norm(dim=-1) / exact.norm(dim=-1)).max() < 2e-6


def test_identical_hidden_states():
    hidden, weight = torch.randn(9, D).bfloat16(), torch.randn(V, D).bfloat16()
    out = vocab_head(hidden, weight, ref_hidden=hidden.clone(), k=4, grad=True)
    for name in ("kl", "grad_hidden", "grad_ref_hidden"):
        assert (getattr(out, name) == 0).all()


def test_what_was_not_asked_for_is_none():
    hidden, weight = torch.randn(4, D), torch.randn(V, D)
    out = vocab_head(hidden, weight, k=None)
    assert {name for name, value in vars(out).items() if value is not None} == {"entropy", "lse"}
    out = vocab_head(hidden, weight, ref_hidden=hidden, k=3)
    missing = {name for name, value in vars(out).items() if value is None}
    assert missing == {"logprob", "grad_hidden", "grad_ref_hidden"}


def test_given_indices_suppress_and_tokens():
    hidden, weight = torch.randn(2, D), torch.randn(V, D)
    logits = hidden @ weight.T
    indices = torch.tensor([[5, 3, 9], [1, 2, 3]])
    out = vocab_head(hidden, weight, indices=indices, suppress=[3])
    assert torch.equal(out.indices, indices)
    expected = logits.gather(-1, indices).masked_fill(indices == 3, -torch.inf)
    torch.testing.assert_close(out.logits, expected)
    torch.testing.assert_close(out.mass, (expected - logits.logsumexp(-1, keepdim=True)).exp().sum(-1))
    out = vocab_head(hidden, weight, indices=indices, tokens=torch.tensor([3, 7]), suppress=[3])
    assert out.indices.tolist() == [[5, 3, 9], [1, 2, 7]]
    assert torch.isfinite(out.logits[0]).all()  # the given token is not blocked
    torch.testing.assert_close(out.logprob, logits.log_softmax(-1)[[0, 1], [3, 7]])
    top = logits.argmax(-1)
    out = vocab_head(hidden, weight, k=V - 2, suppress=top.unique())
    assert not (out.indices == top[:, None]).any()
    assert indices.tolist() == [[5, 3, 9], [1, 2, 3]]


@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (2, 3)])
def test_leading_shapes(leading):
    hidden, weight = torch.randn(*leading, D), torch.randn(V, D)
    tokens = torch.zeros(leading, dtype=torch.int64)
    out = vocab_head(hidden, weight, ref_hidden=hidden, k=4, tokens=tokens, grad=True)
    trailing = {"indices": (4,), "logits": (4,), "grad_hidden": (D,), "grad_ref_hidden": (D,)}
    for name, value in vars(out).items():
        assert value.shape == (*leading, *trailing.get(name, ())), name


def test_makes_no_graph_and_leaves_its_inputs():
    hidden, weight = torch.randn(4, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    copies = hidden.detach().clone(), weight.detach().clone()
    out = vocab_head(hidden, weight, ref_hidden=hidden * 2, k=4, grad=True, softcap=2.0)
    assert not any(t.requires_grad for t in vars(out).values() if t is not None)
    assert torch.equal(hidden, copies[0]) and torch.equal(weight, copies[1])


def test_chunk_rows():
    assert chunk_rows(1000, 12_000 * 7) == 7
    assert chunk_rows(1000, 12_000 * 7, itemsize=8) == 3
    assert chunk_rows(151_936, 2**28) == 147
    assert chunk_rows(1000, 1) == 1
    with pytest.raises(ValueError, match="chunk_bytes must be at least 1"):
        chunk_rows(1000, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_peak_memory_is_as_documented(monkeypatch, dtype, softcap):
    n, vocab, d, k = 96, 4000, 16, 8
    piece = 4 * vocab  # one row a piece
    monkeypatch.setattr(chunks, "_PIECE_BYTES_CPU", piece)
    monkeypatch.setattr(topk, "_KEY_BYTES", 2 * piece)
    monkeypatch.setattr(head_ops, "_BLOCK_BYTES", 4 * d * 250)
    hidden, ref_hidden = torch.randn(2, n, d).to(dtype).unbind()
    weight = torch.randn(vocab, d).to(dtype)
    outputs = 4 * n * (2 * d + 3 * k + 8)
    for rows in (2, 12):
        chunk_bytes = 3 * 4 * vocab * rows
        assert chunk_rows(vocab, chunk_bytes) == rows
        with Allocations().ignore(hidden, weight) as made:
            options = {"k": k, "grad": True, "softcap": softcap, "chunk_bytes": chunk_bytes}
            vocab_head(hidden, weight, ref_hidden=ref_hidden, **options)
        assert made.largest <= max(rows * vocab, outputs // 4)
        assert made.largest <= n * vocab / 8
        assert 2 * 4 * vocab * rows < made.peak < chunk_bytes + 10 * piece + outputs + 4 * d * 250


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 15), (torch.float16, 20)])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e4])
def test_split_product(dtype, bits, size):
    """What a GPU multiplies in 16 bits keeps the digits of the float32 gradient, also where fp16 would underflow."""
    x, weight = size * torch.randn(5, 300), torch.randn(300, 20).to(dtype)
    x[2] = 0.0
    product = head_ops.split_product(x, weight, lambda a, b: (a.double() @ b.double()).float())
    exact = x.double() @ weight.double()
    bound = (x.double().abs() @ weight.double().abs()) * 2.0**-bits
    assert ((product - exact).abs() <= bound).all()
    rounded = x.to(dtype).double() @ weight.double()
    assert (rounded - exact).abs().max() > 20 * (product - exact).abs().max()
