"""The Triton path of vocab_head: one fused kernel a chunk, against the PyTorch path of the same chunk."""

import pytest
import torch
from kernel_checks import HALF, assert_no_worse

from grade_kernels import reference, vocab_head
from grade_kernels.torch_ops import sweep as torch_sweep
from grade_kernels.triton_ops import sweep as triton_sweep
from grade_kernels.triton_ops.suppress import suppress_bits

DIRECTIONS = ["policy_ref", "ref_policy"]
INF = torch.inf
# A tile is 256 lanes of 16 entries.
TILE = 4096


def chunk(n, vocab, device, noise=0.3):
    logits = torch.randn(n, vocab) * 3
    return logits.to(device), (logits + noise * torch.randn(n, vocab)).to(device)


def supports(n, vocab, k, device):
    return torch.stack([torch.randperm(vocab)[:k] for _ in range(n)]).to(device)


def both_paths(logits, ref, *args):
    """(fields, logits afterwards, reference's logits afterwards) of the Triton path and of the PyTorch path."""
    results = []
    for ops in (triton_sweep, torch_sweep):
        pair = [None if x is None else x.clone() for x in (logits, ref)]
        results.append((ops.head_chunk(*pair, *args), *pair))
    return results


def assert_same_fields(ours, theirs, rtol=1e-5, atol=2e-6):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        if name in ("indices", "logits"):
            assert torch.equal(value, theirs[name]), name
        else:
            torch.testing.assert_close(value, theirs[name], rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("vocab", [1, 70, TILE - 1, TILE, TILE + 1, 2 * TILE + 16])
def test_sizes(vocab, direction, device):
    logits, ref = chunk(3, vocab, device)
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


@pytest.mark.parametrize("with_tokens", [True, False])
@pytest.mark.parametrize("with_ref", [True, False])
# One lane, a full power of two, one more, the largest support.
@pytest.mark.parametrize("k", [None, 1, 16, 17, 1024])
def test_supports(k, with_ref, with_tokens, device):
    vocab = 1500
    logits, ref = chunk(4, vocab, device)
    indices = None if k is None else supports(4, vocab, k, device)
    tokens = torch.randint(0, vocab, (4,))
    if k is not None:
        tokens[:2] = indices[:2, k // 2].cpu()  # held; most of the others are missed
    tokens = tokens.to(device) if with_tokens else None
    args = (k, None, indices, tokens, "policy_ref", False, None)
    (ours, *after), (theirs, *_) = both_paths(logits, ref if with_ref else None, *args)
    assert_same_fields(ours, theirs)
    assert torch.equal(after[0], logits) and (after[1] is None or torch.equal(after[1], ref))


def test_suppressed_candidates(device):
    vocab = 40
    logits, ref = chunk(3, vocab, device)
    indices = torch.arange(vocab).expand(3, vocab).to(device)
    suppress = torch.tensor([0, 15, 16, 31, 32, 39, 39]).to(device)  # the edges of the bitmap's words
    for tokens in (None, torch.tensor([15, 3, 39]).to(device)):  # a given token is never blocked
        args = (vocab, suppress, indices, tokens, "policy_ref", True, None)
        (ours, *_), (theirs, *_) = both_paths(logits, ref, *args)
        assert_same_fields(ours, theirs)
    assert ours["logits"].isneginf().sum() == 3 * 6 - 2


@pytest.mark.parametrize("ids", [None, [], [3], [0, 15, 16, 40]])
def test_bitmap(ids, device):
    bits = suppress_bits(None if ids is None else torch.tensor(ids, dtype=torch.int64, device=device), 41, device)
    if ids is None:
        assert bits is None
    else:
        words = bits.tolist()
        assert bits.dtype == torch.int32 and len(words) == 3
        assert [i for i in range(48) if words[i >> 4] >> (i & 15) & 1] == ids


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_masks_and_bad_rows(softcap, direction, device):
    logits, ref = chunk(6, TILE + 60, "cpu")
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


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_fresh_adapter(direction, device):
    """Identical rows: KL and its gradients are exactly 0."""
    logits, _ = chunk(3, TILE + 60, device)
    fields = triton_sweep.head_chunk(logits, ref := logits.clone(), None, None, None, None, direction, True, None)
    assert (fields["kl"] == 0).all() and (logits == 0).all() and (ref == 0).all()
    assert torch.equal(fields["lse"], fields["ref_lse"])


def heads(vocab, d, dtype, device):
    hidden = torch.randn(2, 3, d)
    ref = hidden + 0.05 * torch.randn(2, 3, d)
    weight = torch.randn(vocab, d) / 2
    return (x.to(device, dtype) for x in (hidden, ref, weight))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "scale": 0.5}, {"k": None}, {"grad": False}])
def test_vocab_head_as_on_the_pytorch_path(options, direction, device, monkeypatch):
    hidden, ref, weight = heads(200, 16, torch.float32, device)
    tokens, bias = torch.randint(0, 200, (2, 3)).to(device), torch.randn(200).to(device)
    kwargs = {"ref_hidden": ref, "k": 12, "tokens": tokens, "suppress": [0, 7, 199], "direction": direction}
    kwargs |= {"grad": True, "bias": bias, "chunk_bytes": 3 * 4 * 200 * 4} | options  # 4 rows, then 2
    ours = vocab_head(hidden, weight, **kwargs)
    monkeypatch.setenv("GRADE_KERNELS_BACKEND", "torch")
    theirs = vocab_head(hidden, weight, **kwargs)
    for name, value in vars(theirs).items():
        mine = getattr(ours, name)
        assert (mine is None) == (value is None), name
        if value is not None:
            torch.testing.assert_close(mine, value, rtol=1e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("dtype", HALF)
def test_vocab_head_from_half_precision(dtype, device, monkeypatch):
    hidden, ref, weight = heads(300, 16, dtype, device)
    kwargs = {"ref_hidden": ref, "indices": supports(6, 300, 9, device).view(2, 3, 9), "grad": True}
    ours = vocab_head(hidden, weight, **kwargs)
    monkeypatch.setenv("GRADE_KERNELS_BACKEND", "torch")
    theirs = vocab_head(hidden, weight, **kwargs)
    for name in ("kl", "entropy", "lse", "ref_lse", "logits", "mass", "grad_hidden", "grad_ref_hidden"):
        mine, value = getattr(ours, name), getattr(theirs, name)
        assert mine.dtype == value.dtype
        torch.testing.assert_close(mine, value, rtol=1e-5, atol=2e-6, msg=name)


def test_no_rows(device):
    hidden, ref, weight = (x[..., :0, :] if x.dim() == 3 else x for x in heads(50, 4, torch.float32, device))
    out = vocab_head(hidden, weight, ref_hidden=ref, k=5, grad=True)
    assert out.kl.shape == (2, 0) and out.indices.shape == (2, 0, 5) and out.grad_hidden.shape == (2, 0, 4)


def test_custom_ops(device):
    logits, ref = chunk(3, 40, device)
    indices, tokens = supports(3, 40, 5, device), torch.randint(0, 40, (3,)).to(device)
    suppress = torch.tensor([1, 7]).to(device)
    ops = torch.ops.grade_kernels
    torch.library.opcheck(ops.head_sweep, (logits, ref, indices, tokens, suppress, True))
    torch.library.opcheck(ops.head_sweep, (logits, None, None, None, None, True))
    torch.library.opcheck(ops.head_sweep_grads, (logits, ref, indices, tokens, None, False, 3.0))


def test_compiles_into_one_graph(device):
    def sweep(hidden, ref, weight, indices):
        out = vocab_head(hidden, weight, ref_hidden=ref, indices=indices, grad=True, suppress=[3])
        return out.grad_hidden, out.grad_ref_hidden, out.kl, out.logits, out.entropy

    hidden, ref, weight = heads(60, 8, torch.float32, device)
    arguments = (hidden, ref, weight, supports(6, 60, 5, device).view(2, 3, 5))
    torch._dynamo.reset()
    compiled = torch.compile(sweep, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(compiled, sweep(*arguments))
