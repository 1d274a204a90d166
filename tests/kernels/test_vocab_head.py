"""vocab_head: one sweep against dense float64 autograd, its kernel against the PyTorch path of a chunk, its memory."""

import pytest
import torch
from kernel_checks import (
    HALF,
    HEADS,
    Allocations,
    Launches,
    assert_no_worse,
    assert_same_fields,
    chunk_pair,
    make_head,
    rel_err,
    supports,
)  # fmt: skip

from grade_kernels import Head, chunk_rows, reference, vocab_head
from grade_kernels.backend import implementation
from grade_kernels.common import chunks
from grade_kernels.common import head as head_ops
from grade_kernels.torch_ops import topk

DIRECTIONS = ["policy_ref", "ref_policy"]
V, D, INF = 37, 6, torch.inf
TILE = 4096  # of the kernel: 256 lanes of 16 entries
# Six rows at once; one by one; and in chunks of 2 (float64) or 4, with whatever a head has.
HEADS_AND_CHUNKS = [*((options, 2**28) for options in HEADS), (HEADS[-1], 1), (HEADS[-1], 3 * 8 * V * 2)]


def dense(hidden, head, ref_hidden, direction="policy_ref"):
    h, rh = hidden.detach().double().requires_grad_(), ref_hidden.detach().double().requires_grad_()
    bias = None if head.bias is None else head.bias.double()
    head = Head(head.weight.double(), bias, head.scale, head.softcap)
    logits, ref_logits = reference.head_logits(h, head), reference.head_logits(rh, head)
    kl = reference.kl(logits, ref_logits, direction)
    d_h, d_rh = torch.autograd.grad(kl.sum(), (h, rh))
    return logits.detach(), ref_logits.detach(), kl.detach(), d_h, d_rh


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("options", "chunk_bytes"), HEADS_AND_CHUNKS)
def test_everything_against_dense_float64(backend, device, options, chunk_bytes, direction, dtype):
    hidden, ref_hidden = torch.randn(2, 3, 2, D, dtype=dtype, device=device).unbind()
    head, tokens = make_head(options, V, D, dtype, device), torch.randint(0, V, (3, 2), device=device)
    logits, ref_logits, kl, d_h, d_rh = dense(hidden, head, ref_hidden, direction)
    tokens[1] = logits[1].argmax(-1)  # held; most of the others are missed
    wanted = {"ref_hidden": ref_hidden, "k": 9, "tokens": tokens, "direction": direction, "grad": True}
    out = vocab_head(hidden, head, **wanted, chunk_bytes=chunk_bytes)
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
        tolerance = {} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 2e-6, "check_dtype": False}
        torch.testing.assert_close(getattr(out, name), value, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_half_operands_are_not_rounded_on_the_way(backend, monkeypatch, dtype):
    monkeypatch.setattr(head_ops, "_BLOCK_BYTES", 4 * 64 * 100)
    hidden = torch.randn(8, 64).to(dtype)
    ref_hidden = (hidden.float() + 0.01 * torch.randn(8, 64)).to(dtype)
    head, tokens = Head(torch.randn(700, 64).to(dtype)), torch.randint(0, 700, (8,))
    logits, _, kl, d_h, d_rh = dense(hidden, head, ref_hidden)
    out = vocab_head(hidden, head, ref_hidden=ref_hidden, k=20, tokens=tokens, grad=True)
    floats = [t for t in vars(out).values() if t.dtype != torch.int64]
    assert all(t.dtype == torch.float32 for t in floats)
    logprob, entropy = reference.token_logprob(logits, tokens)
    assert rel_err(out.logits, logits.gather(-1, out.indices)) < 1e-6
    assert rel_err(out.logprob, logprob) < 1e-6 and rel_err(out.entropy, entropy) < 1e-5
    for mine, exact in ((out.kl, kl), (out.grad_hidden, d_h), (out.grad_ref_hidden, d_rh)):
        assert rel_err(mine, exact) < 1e-4  # of a divergence of 1e-2 nats and of its gradient


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("step", [3.0, 0.3, 1e-3, 1e-6])
def test_float32_keeps_its_digits(step, direction):
    """An identity head, so that the gradients are those to the logits; KL from nats down to 1e-13."""
    logits = 2 * torch.randn(12, 500)
    ref_logits, bias = logits + step * torch.randn(12, 500), torch.zeros(500)
    bias[3::7] = -torch.inf  # ids that neither side has
    head = Head(torch.eye(500), bias)
    out = vocab_head(logits, head, ref_hidden=ref_logits, k=None, direction=direction, grad=True)
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


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_identical_hidden_states(backend, device, direction):
    hidden, head = torch.randn(2, D).to(device, torch.bfloat16), Head(torch.randn(TILE + 60, D).to(device).bfloat16())
    out = vocab_head(hidden, head, ref_hidden=hidden.clone(), k=4, direction=direction, grad=True)
    for name in ("kl", "grad_hidden", "grad_ref_hidden"):
        assert (getattr(out, name) == 0).all()
    assert torch.equal(out.lse, out.ref_lse)


def test_what_was_not_asked_for_is_none(backend, device):
    hidden, head = torch.randn(4, D, device=device), make_head({}, V, D, torch.float32, device)
    out = vocab_head(hidden, head, k=None)
    assert {name for name, value in vars(out).items() if value is not None} == {"entropy", "lse"}
    out = vocab_head(hidden, head, ref_hidden=hidden, k=3)
    missing = {name for name, value in vars(out).items() if value is None}
    assert missing == {"logprob", "grad_hidden", "grad_ref_hidden"}


def test_given_indices_suppress_and_tokens(backend, device):
    hidden, head = torch.randn(2, D, device=device), make_head({}, V, D, torch.float32, device)
    logits = hidden @ head.weight.T
    indices = torch.tensor([[5, 3, 9], [1, 2, 3]], device=device)
    out = vocab_head(hidden, head, indices=indices, suppress=[3])
    assert torch.equal(out.indices, indices)
    expected = logits.gather(-1, indices).masked_fill(indices == 3, -torch.inf)
    torch.testing.assert_close(out.logits, expected)
    torch.testing.assert_close(out.mass, (expected - logits.logsumexp(-1, keepdim=True)).exp().sum(-1))
    out = vocab_head(hidden, head, indices=indices, tokens=torch.tensor([3, 7], device=device), suppress=[3])
    assert out.indices.tolist() == [[5, 3, 9], [1, 2, 7]]
    assert torch.isfinite(out.logits[0]).all()  # the given token is not blocked
    torch.testing.assert_close(out.logprob, logits.log_softmax(-1)[[0, 1], [3, 7]])
    top = logits.argmax(-1)
    out = vocab_head(hidden, head, k=V - 2, suppress=top.unique())
    assert not (out.indices == top[:, None]).any()
    assert indices.tolist() == [[5, 3, 9], [1, 2, 3]]


@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (2, 3)])
def test_leading_shapes(backend, device, leading):
    hidden, head = torch.randn(*leading, D, device=device), make_head({}, V, D, torch.float32, device)
    tokens = torch.zeros(leading, dtype=torch.int64, device=device)
    out = vocab_head(hidden, head, ref_hidden=hidden, k=4, tokens=tokens, grad=True)
    trailing = {"indices": (4,), "logits": (4,), "grad_hidden": (D,), "grad_ref_hidden": (D,)}
    for name, value in vars(out).items():
        assert value.shape == (*leading, *trailing.get(name, ())), name


def test_makes_no_graph_and_leaves_its_inputs(backend, device):
    hidden, weight = (torch.randn(n, D, device=device, requires_grad=True) for n in (4, V))
    copies = hidden.detach().clone(), weight.detach().clone()
    out = vocab_head(hidden, Head(weight, softcap=2.0), ref_hidden=hidden * 2, k=4, grad=True)
    assert not any(t.requires_grad for t in vars(out).values() if t is not None)
    assert torch.equal(hidden, copies[0]) and torch.equal(weight, copies[1])


def test_chunk_rows():
    assert chunk_rows(1000, 12_000 * 7) == 7
    assert chunk_rows(1000, 12_000 * 7, itemsize=8) == 3
    assert chunk_rows(151_936, 2**28) == 128  # 147 would be one tile of a GPU's product and part of a second
    assert chunk_rows(1000, 12_000 * 300) == 256 and chunk_rows(1000, 12_000 * 127) == 127
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
    head = Head(torch.randn(vocab, d).to(dtype), softcap=softcap)
    outputs = 4 * n * (2 * d + 3 * k + 8)
    for rows in (2, 12):
        chunk_bytes = 3 * 4 * vocab * rows
        assert chunk_rows(vocab, chunk_bytes) == rows
        with Allocations().ignore(hidden, head.weight) as made:
            vocab_head(hidden, head, ref_hidden=ref_hidden, k=k, grad=True, chunk_bytes=chunk_bytes)
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


def test_split_product_at_the_ends_of_float32():
    """The largest powers of two have no inverse that is normal, the smallest none that is finite."""
    x = torch.randn(3, 300) * torch.tensor([[5e37], [1.0], [1e-40]])
    weight = torch.randn(300, 20).to(torch.float16) / 256
    product = head_ops.split_product(x, weight, lambda a, b: (a.double() @ b.double()).float())
    exact = x.double() @ weight.double()
    assert ((product - exact).abs() <= (x.double().abs() @ weight.double().abs()) * 2.0**-12).all()


@pytest.mark.parametrize(("dtype", "launches"), [(torch.bfloat16, 5), (torch.float16, 20)])
def test_a_gpu_pulls_a_chunk_back_in_one_product(monkeypatch, dtype, launches):
    """Kernels to launch, whatever the weight's size, and memory: both halves of the gradient, of half its width."""
    monkeypatch.setattr(head_ops, "_mm_float32", lambda a, b: torch.mm(a.float(), b.float()))
    monkeypatch.setattr(head_ops, "_BLOCK_BYTES", 4 * 64 * 100)  # a CPU would take seven
    hidden, weight = torch.randn(6, 64), torch.randn(700, 64).to(dtype)
    expected = 0.5 * hidden @ weight.float().T @ weight.float()
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "is_cuda", True)
        head, gradient = Head(weight, scale=0.5), hidden @ weight.float().T
        with Launches() as counted, Allocations() as made:
            found = head.grad_hidden(gradient)
    assert rel_err(found, expected) < 1e-4
    widened = 2  # copies to float32 of the product that stands for a GPU's
    assert counted.names["mm"] == 1 and sum(counted.names.values()) - widened <= launches
    assert made.largest <= max(2 * gradient.numel(), weight.numel())


@pytest.mark.parametrize("dtype", HALF)
def test_the_split_product_compiles_into_one_graph(dtype):
    x, weight = torch.randn(5, 300), torch.randn(300, 20).to(dtype)

    def product(x, weight):
        return head_ops.split_product(x, weight, lambda a, b: a.float() @ b.float())

    torch._dynamo.reset()
    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")(x, weight)
    torch.testing.assert_close(compiled, product(x, weight))


def both_paths(logits, ref, *args):
    """(fields, logits afterwards, reference's logits afterwards) of the Triton path and of the PyTorch path."""
    results = []
    for backend in ("triton", "torch"):
        pair = [None if x is None else x.clone() for x in (logits, ref)]
        results.append((implementation(backend).sweep.head_chunk(*pair, *args), *pair))
    return results


@pytest.mark.triton
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("vocab", [1, 70, TILE - 1, TILE, TILE + 1, 2 * TILE + 16])
def test_sizes(vocab, direction, device):
    logits, ref = chunk_pair(3, vocab, device)
    k = min(vocab, 20)
    indices, tokens = supports(3, vocab, k, device), torch.randint(0, vocab, (3,)).to(device)
    args = (k, None, indices, tokens, direction, True, None)
    (ours, *mine), (theirs, *plain) = both_paths(logits, ref, *args)
    assert_same_fields(ours, theirs)
    p, q = (logits, ref) if direction == "policy_ref" else (ref, logits)
    logp, logq = p.double().log_softmax(-1), q.double().log_softmax(-1)
    x = logq - logp
    kl = (logp.exp() * (x.expm1() - x)).sum(-1)
    exact = [-logp.exp() * (x + kl[:, None]), logp.exp() * x.expm1()]
    if direction == "ref_policy":
        exact.reverse()
    logprob, entropy = reference.token_logprob(logits.double(), tokens)
    if vocab == 1:
        assert all((g == 0).all() for g in mine) and (ours["kl"] == 0).all()
        return
    for m, t, e in zip((*mine, ours["kl"]), (*plain, theirs["kl"]), (*exact, kl), strict=True):
        assert_no_worse(m, t, e)
    assert_no_worse(ours["entropy"], theirs["entropy"], entropy)
    assert_no_worse(ours["logprob"], theirs["logprob"], logprob)
    for name, value in (("lse", logits), ("ref_lse", ref)):
        torch.testing.assert_close(ours[name].double(), value.double().logsumexp(-1), rtol=3e-7, atol=3e-7)


@pytest.mark.triton
@pytest.mark.parametrize("with_tokens", [True, False])
@pytest.mark.parametrize("with_ref", [True, False])
# One lane, a full power of two, one more, the largest support.
@pytest.mark.parametrize("k", [None, 1, 16, 17, 1024])
def test_supports(k, with_ref, with_tokens, device):
    vocab = 1500
    logits, ref = chunk_pair(2, vocab, device)
    indices = None if k is None else supports(2, vocab, k, device)
    tokens = torch.randint(0, vocab, (2,))
    if k is not None:
        tokens[0] = indices[0, k // 2]  # held; the other is missed, unless all but a few are held
    tokens = tokens.to(device) if with_tokens else None
    args = (k, None, indices, tokens, "policy_ref", False, None)
    (ours, *after), (theirs, *_) = both_paths(logits, ref if with_ref else None, *args)
    assert_same_fields(ours, theirs)
    assert torch.equal(after[0], logits) and (after[1] is None or torch.equal(after[1], ref))


@pytest.mark.triton
def test_suppressed_candidates(device):
    vocab = 40
    logits, ref = chunk_pair(3, vocab, device)
    indices = torch.arange(vocab).expand(3, vocab).to(device)
    suppress = torch.tensor([0, 15, 16, 31, 32, 39, 39]).to(device)  # the edges of the bitmap's words
    for tokens in (None, torch.tensor([15, 3, 39]).to(device)):  # a given token is never blocked
        args = (vocab, suppress, indices, tokens, "policy_ref", True, None)
        (ours, *_), (theirs, *_) = both_paths(logits, ref, *args)
        assert_same_fields(ours, theirs)
    assert ours["logits"].isneginf().sum() == 3 * 6 - 2


@pytest.mark.triton
@pytest.mark.parametrize("ids", [None, [], [3], [0, 15, 16, 40]])
def test_bitmap(ids, device):
    suppress = None if ids is None else torch.tensor(ids, dtype=torch.int64, device=device)
    bits = implementation("triton").sweep.suppress_bits(suppress, 41, device)
    if ids is None:
        assert bits is None
    else:
        words = bits.tolist()
        assert bits.dtype == torch.int32 and len(words) == 3
        assert [i for i in range(48) if words[i >> 4] >> (i & 15) & 1] == ids


@pytest.mark.triton
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_masks_and_bad_rows(softcap, direction, device):
    logits, ref = chunk_pair(6, TILE + 60, "cpu")
    logits, ref = (x.clamp(-3.9, 3.9) for x in (logits, ref))
    logits[0, ::3] = -INF
    logits[1, ::3] = ref[1, ::3] = -INF
    ref[2, ::5] = -INF
    logits[3, -1] = torch.nan
    ref[4, 0] = torch.nan
    indices, tokens = supports(6, logits.shape[1], 8, device), torch.full((6,), 2).to(device)
    args = (8, None, indices, tokens, direction, True, softcap)
    (ours, *mine), (theirs, *plain) = both_paths(logits.to(device), ref.to(device), *args)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=2e-6, equal_nan=True, msg=name)
    rows = ~ours["kl"].isinf()
    for m, t in zip(mine, plain, strict=True):
        torch.testing.assert_close(m[rows], t[rows], rtol=1e-4, atol=1e-7, equal_nan=True)


@pytest.mark.triton
def test_custom_ops(device):
    logits, ref = chunk_pair(3, 40, device)
    indices, tokens = supports(3, 40, 5, device), torch.randint(0, 40, (3,)).to(device)
    suppress = torch.tensor([1, 7]).to(device)
    ops = torch.ops.grade_kernels
    torch.library.opcheck(ops.head_sweep, (logits, ref, indices, tokens, suppress, True))
    torch.library.opcheck(ops.head_sweep, (logits, None, None, None, None, True))
    torch.library.opcheck(ops.head_sweep_grads, (logits, ref, indices, tokens, None, False, 3.0))
