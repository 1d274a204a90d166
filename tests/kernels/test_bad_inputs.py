"""Every refusal: the right exception, in words that name the argument; and the backend switch."""

import subprocess
import sys
import types

import pytest
import torch

import grade_kernels as gk
from grade_kernels import backend
from grade_kernels.common import environment

L = torch.randn(3, 10)
H, W = torch.randn(3, 4), torch.randn(10, 4)
IDS, TOK = torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
HEAD = gk.Head(W)
META = "meta"  # a second device that every machine has
SPARSE = gk.gumbel_topk(L, 2, seed=0)


def sparse(**change):
    return gk.SparseTokens(**{**vars(SPARSE), **change})


def topk(*args, seed=0, **kwargs):
    return lambda: gk.gumbel_topk(*args, seed=seed, **kwargs)


def vjp(grad=H, table=W, logits=L[:, :2], indices=IDS, **kwargs):
    kwargs = {"tokens": TOK, "seed": 0, **kwargs}
    return lambda: gk.soft_token_vjp(grad, table, logits=logits, indices=indices, **kwargs)


def rule(grad=H, table=W, **kwargs):
    return lambda: gk.SoftTokenRule(**{"logits": L[:, :2], "indices": IDS, "seed": 0, **kwargs})(grad, table)


def part(**change):
    return lambda: gk.Head(**{"weight": W, **change})


def head(hidden=H, head=HEAD, **kwargs):
    return lambda: gk.vocab_head(hidden, head, **{"k": 2, **kwargs})


def objective(indices=IDS, **kwargs):
    return lambda: gk.vocab_objective(H, HEAD, indices=indices, **kwargs)


def linear_kl(ref_hidden=H, ref_head=None, direction="policy_ref"):
    return lambda: gk.linear_kl(H, HEAD, ref_hidden, ref_head, direction)


CASES = {
    # gumbel_topk
    "integer logits": (topk(L.long(), 2), TypeError, "logits must be float16"),
    "list logits": (topk([1.0, 2.0], 2), TypeError, "logits must be a torch.Tensor, got list"),
    "scalar logits": (topk(torch.tensor(1.0), 1), ValueError, "logits must have at least 1 dimension"),
    "empty vocabulary": (topk(L[:, :0], 1), ValueError, "last dimension of logits is empty"),
    "k of 0": (topk(L, 0), ValueError, "k must be between 1 and the vocabulary size 10, got 0"),
    "k above V": (topk(L, 11), ValueError, "k must be between 1 and the vocabulary size 10, got 11"),
    "default k above V": (topk(L), ValueError, "got 256"),
    "float k": (topk(L, 2.0), TypeError, "k must be a python integer, got float"),
    "boolean k": (topk(L, True), TypeError, "k must be a python integer, got bool"),
    "tau of 0": (topk(L, 2, 0.0), ValueError, "tau must be a finite number above 0, got 0.0"),
    "negative tau": (topk(L, 2, -1.0), ValueError, "tau must be a finite number above 0"),
    "NaN tau": (topk(L, 2, float("nan")), ValueError, "tau must be a finite number above 0, got nan"),
    "infinite tau": (topk(L, 2, float("inf")), ValueError, "tau must be a finite number above 0"),
    "tau of a dimension": (
        topk(L, 2, torch.ones(1)),
        TypeError,
        "tau must be .* of no dimension, got torch.float32 of",
    ),
    "integer tau": (
        topk(L, 2, torch.tensor(1)),
        TypeError,
        "tau must be .* float64 tensor .*, got torch.int64 of shape",
    ),
    "trained tau": (topk(L, 2, torch.ones((), requires_grad=True)), ValueError, "detach it with tau.detach"),
    "tau elsewhere": (topk(L, 2, torch.ones((), device="meta")), ValueError, "tau is on meta but the other inputs"),
    "float seed": (topk(L, 2, seed=0.5), TypeError, "seed must be a python integer, got float"),
    "tensor seed": (topk(L, 2, seed=torch.tensor(1)), TypeError, "seed must be a python integer, got Tensor"),
    "float draw": (topk(L, 2, draw=1.5), TypeError, "draw must be a python integer"),
    "rows of floats": (topk(L, 2, rows=TOK.float()), TypeError, "rows must be int64, got torch.float32"),
    "rows of a wrong shape": (topk(L, 2, rows=TOK[:2]), ValueError, r"rows must have shape \(3,\), got"),
    "int32 tokens": (topk(L, 2, tokens=TOK.int()), TypeError, "tokens must be int64, got torch.int32"),
    "tokens of a wrong shape": (topk(L, 2, tokens=IDS), ValueError, r"tokens must have shape \(3,\)"),
    "tokens elsewhere": (topk(L, 2, tokens=TOK.to(META)), ValueError, "tokens is on meta but the other"),
    "int32 indices": (topk(L, indices=IDS.int()), TypeError, "indices must be int64"),
    "indices of a wrong shape": (topk(L, indices=IDS[:2]), ValueError, r"indices must have shape \(3, 2\)"),
    "no indices": (topk(L, indices=IDS[:, :0]), ValueError, "indices must end in a non-empty candidate"),
    "indices in a list": (topk(L, indices=[[1]]), TypeError, "indices must be a torch.Tensor, got list"),
    "suppress outside": (topk(L, 2, suppress=[10]), ValueError, r"id 10, outside the vocabulary 0\.\.9"),
    "negative suppress": (topk(L, 2, suppress=[-1]), ValueError, "id -1, outside the vocabulary"),
    "float suppress": (topk(L, 2, suppress=[1.0]), TypeError, "every id in suppress must be a python int"),
    "int32 suppress": (topk(L, 2, suppress=TOK.int()), TypeError, "suppress must be int64"),
    "2-d suppress": (topk(L, 2, suppress=IDS), ValueError, r"suppress must have shape \(6,\)"),
    # place_tokens
    "place: shape": (lambda: gk.place_tokens(IDS, TOK[:2]), ValueError, "indices must have shape"),
    "place: dtype": (lambda: gk.place_tokens(IDS, TOK.int()), TypeError, "tokens must be int64"),
    # soft_embedding
    "embed dense": (lambda: gk.soft_embedding(L, W), TypeError, "tokens must be a SparseTokens"),
    "embed integer table": (lambda: gk.soft_embedding(SPARSE, W.long()), TypeError, "weight must be float16"),
    "embed 1-d table": (lambda: gk.soft_embedding(SPARSE, W[0]), ValueError, "weight must be .vocabulary,"),
    "embed elsewhere": (lambda: gk.soft_embedding(SPARSE, W.to(META)), ValueError, "weight is on meta"),
    "embed shapes": (
        lambda: gk.soft_embedding(sparse(weights=torch.randn(3, 5)), W),
        ValueError,
        r"tokens.weights must have shape \(3, 2\)",
    ),
    # logits_kl
    "kl shapes": (lambda: gk.logits_kl(L, L[:2]), ValueError, r"ref_logits must have shape \(3, 10\)"),
    "kl dtype": (lambda: gk.logits_kl(L, L.long()), TypeError, "ref_logits must be float16"),
    "kl device": (lambda: gk.logits_kl(L, L.to(META)), ValueError, "ref_logits is on meta"),
    "kl direction": (
        lambda: gk.logits_kl(L, L, "forward"),
        ValueError,
        "direction must be one of 'policy_ref', 'ref_policy', got 'forward'",
    ),
    # token_logprob
    "logprob tokens": (lambda: gk.token_logprob(L, TOK.int()), TypeError, "tokens must be int64"),
    "logprob shape": (lambda: gk.token_logprob(L, IDS), ValueError, "tokens must have shape"),
    # heads
    "head weight": (part(weight=W[0]), ValueError, "weight must be .vocabulary,"),
    "head integer weight": (part(weight=W.long()), TypeError, "weight must be float16"),
    "head bias": (part(bias=torch.randn(4)), ValueError, r"bias must have shape \(10,\)"),
    "head bias elsewhere": (part(bias=torch.randn(10).to(META)), ValueError, "bias is on meta"),
    "head integer bias": (part(bias=torch.zeros(10).long()), TypeError, "bias must be float16"),
    "head softcap": (part(softcap=0.0), ValueError, "softcap must be a finite number above 0"),
    "head scale": (part(scale=float("nan")), ValueError, "scale must be a finite number, got nan"),
    "head tensor scale": (part(scale=torch.tensor(1.0)), TypeError, "scale must be a python number"),
    "head width": (head(H[:, :3]), ValueError, "hidden has width 3, but head.weight has rows of 4"),
    "head dtype": (head(head=gk.Head(W.half())), TypeError, "hidden is torch.float32 but head.weight is torch.float16"),
    "head device": (head(head=gk.Head(W.to(META))), ValueError, "head.weight is on meta"),
    "head without a Head": (head(head=W), TypeError, "head must be a Head, got Tensor; wrap the weight in Head"),
    "head k": (head(k=11), ValueError, "k must be between 1 and the vocabulary size 10"),
    "head direction": (head(ref_hidden=H, direction="x"), ValueError, "direction must be one of"),
    "head ref shape": (head(ref_hidden=H[:2]), ValueError, r"ref_hidden must have shape \(3, 4\)"),
    "head ref dtype": (head(ref_hidden=H.half()), TypeError, "ref_hidden is torch.float16 but head.weight"),
    "head grad": (head(grad=True), ValueError, "grad=True asks for the gradient of the KL, which needs ref"),
    "head chunk": (head(chunk_bytes=0), ValueError, "chunk_bytes must be at least 1"),
    "head tokens": (head(tokens=TOK.int()), TypeError, "tokens must be int64"),
    "head indices": (head(indices=IDS[:2]), ValueError, "indices must have shape"),
    # vocab_objective
    "objective indices": (objective(indices=IDS[:2]), ValueError, r"indices must have shape \(3, 2\)"),
    "objective no support": (objective(indices=None), TypeError, "indices must be a torch.Tensor, got NoneType"),
    "objective tokens": (objective(tokens=TOK.int()), TypeError, "tokens must be int64"),
    "objective ref shape": (objective(ref_hidden=H[:2]), ValueError, r"ref_hidden must have shape \(3, 4\)"),
    "objective ref dtype": (objective(ref_hidden=H.half()), TypeError, "ref_hidden is torch.float16 but head.weight"),
    "objective kl": (objective(kl_weight=1.0), ValueError, "kl_weight weights a KL, which needs ref_hidden"),
    "objective ref kl": (objective(ref_kl_weight=L[:, 0]), ValueError, "ref_kl_weight weights a KL, which needs"),
    "objective weight shape": (objective(entropy_weight=L), ValueError, r"entropy_weight must have shape \(3,\)"),
    "objective weight dtype": (objective(entropy_weight=TOK), TypeError, "entropy_weight must be a number or a float"),
    "objective weight device": (objective(entropy_weight=L[:, 0].to(META)), ValueError, "entropy_weight is on meta"),
    "objective NaN weight": (
        objective(ref_hidden=H, kl_weight=float("nan")),
        ValueError,
        "kl_weight must be a finite number or a float tensor",
    ),
    "objective suppress": (objective(suppress=[10]), ValueError, "id 10, outside the vocabulary"),
    "objective chunk": (objective(chunk_bytes=0), ValueError, "chunk_bytes must be at least 1"),
    "linear kl ref": (
        linear_kl(ref_head=gk.Head(torch.randn(9, 4))),
        ValueError,
        r"ref_head.weight must have shape \(10, 4\)",
    ),
    "linear kl ref width": (
        linear_kl(ref_head=gk.Head(torch.randn(10, 5))),
        ValueError,
        "has width 4, but ref_head.weight has rows of 5",
    ),
    "linear kl rows": (linear_kl(H[:2]), ValueError, "ref_hidden must have shape"),
    "linear kl cap": (linear_kl(ref_head=gk.Head(W, softcap=2.0)), ValueError, "ref_head.softcap is 2.0 but head.soft"),
    "linear kl precision": (linear_kl(H.double(), gk.Head(W.double())), TypeError, "make both float64 or neither"),
    "linear kl direction": (linear_kl(direction="x"), ValueError, "direction must be one of"),
    "linear logprob": (lambda: gk.linear_token_logprob(H, HEAD, IDS), ValueError, "tokens must have shape"),
    "linear topk": (lambda: gk.linear_gumbel_topk(H, HEAD, 11, seed=0), ValueError, "k must be between 1 and"),
    # soft_token_vjp
    "vjp estimator": (vjp(estimator="ste"), ValueError, "estimator must be one of 'gumbel', 'rao', "),
    "vjp samples": (vjp(estimator="rao", samples=0), ValueError, "samples must be at least 1, got 0"),
    "vjp float samples": (vjp(estimator="rao", samples=1.5), TypeError, "samples must be a python integer"),
    "vjp tensor tau": (vjp(tau=torch.tensor(1.0)), TypeError, "tau must be a python number, not a tensor"),
    "vjp tau": (vjp(tau=0.0), ValueError, "tau must be a finite number above 0"),
    "vjp rao tokens": (vjp(estimator="rao", tokens=None), ValueError, "estimator='rao' needs tokens"),
    "vjp conditional tokens": (vjp(conditional=True, tokens=None), ValueError, "conditional=True needs"),
    "vjp seed": (vjp(seed=None), ValueError, "estimator='gumbel' needs the seed of the noise"),
    "vjp indices": (vjp(indices=IDS[:, :1]), ValueError, r"indices must have shape \(3, 2\)"),
    "vjp rows": (vjp(rows=IDS), ValueError, "rows must have shape"),
    "vjp integer logits": (vjp(logits=IDS), TypeError, "logits must be float16"),
    "vjp table width": (vjp(table=W[:, :2]), ValueError, "embedding has rows of width 2, expected 4"),
    "vjp grad shape": (vjp(grad=H[:2]), ValueError, "indices must have shape"),
    "vjp pairs": (vjp(grad=[H, H], table=[W]), ValueError, r"must pair up one to one, got 2 gradient\(s\)"),
    "vjp no models": (vjp(grad=[], table=[]), ValueError, "must pair up one to one"),
    "vjp head": (vjp(head=W), TypeError, "head must be a Head, got Tensor"),
    "vjp head elsewhere": (vjp(head=gk.Head(W.to(META))), ValueError, "head.weight is on meta"),
    "rule keep_bytes": (rule(keep_bytes=-1), ValueError, "keep_bytes must be at least 0, got -1"),
    "rule float keep_bytes": (rule(keep_bytes=1e9), TypeError, "keep_bytes must be a python integer, got float"),
    "rule seed": (rule(seed=None), ValueError, "estimator='gumbel' needs the seed of the noise"),
    "rule grad shape": (rule(grad=H[:2]), ValueError, "indices must have shape"),
    "pull_back": (lambda: gk.pull_back(L, IDS, HEAD), ValueError, r"indices must have shape \(3, 10\)"),
    "pull_back cap": (lambda: gk.pull_back(L[:, :2], IDS, gk.Head(W, softcap=2.0)), ValueError, "needs logits"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_in_words(case):
    call, error, message = CASES[case]
    with pytest.raises(error, match=message):
        call()


def test_numpy_integers_are_integers():
    import numpy as np

    a, b = gk.gumbel_topk(L, np.int64(2), seed=np.int32(7)), gk.gumbel_topk(L, 2, seed=7)
    assert torch.equal(a.weights, b.weights)


OPS = {
    "gumbel_topk": topk(L, 2),
    "soft_embedding": lambda: gk.soft_embedding(SPARSE, W),
    "logits_kl": lambda: gk.logits_kl(L, L),
    "token_logprob": lambda: gk.token_logprob(L, TOK),
    "linear_kl": linear_kl(),
    "linear_token_logprob": lambda: gk.linear_token_logprob(H, HEAD, TOK),
    "linear_gumbel_topk": lambda: gk.linear_gumbel_topk(H, HEAD, 2, seed=0),
    "vocab_head": head(),
    "vocab_objective": objective(),
    "soft_token_vjp": vjp(),
    "scatter_tokens": lambda: gk.scatter_tokens(SPARSE, 10),
    "candidate_grad": lambda: gk.candidate_grad(H, W, IDS),
    "pull_back": lambda: gk.pull_back(IDS.float(), IDS, HEAD),
}


@pytest.mark.parametrize("op", OPS)
def test_backend_switch(monkeypatch, op):
    for value in ("", "torch"):
        monkeypatch.setenv(backend.VARIABLE, value)
        OPS[op]()
        assert gk.backend_for(op, L) == "torch"
    monkeypatch.setenv(backend.VARIABLE, "triton")
    with pytest.raises(RuntimeError, match=f"{op} was given a tensor on cpu.*set TRITON_INTERPRET=1"):
        OPS[op]()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gk.backend_for(op, L) == "triton"
    with pytest.raises(TypeError, match=f"{op} has float64 inputs.*convert them with .float()"):
        gk.backend_for(op, L, L.double())
    monkeypatch.setenv(backend.VARIABLE, "")
    assert gk.backend_for(op, L, L.double()) == "torch"
    monkeypatch.setenv(backend.VARIABLE, "cuda")
    with pytest.raises(
        ValueError, match="GRADE_KERNELS_BACKEND must be 'torch' or 'triton', or unset to choose by device, got 'cuda'"
    ):
        OPS[op]()


@pytest.mark.parametrize(
    ("version", "works"), [("3.5.1", False), ("3.6.0", True), ("3.9.2+git1", True), ("3.10.0", False), ("main", False)]
)
def test_triton_version(monkeypatch, version, works):
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__=version))
    if works:
        return environment.check_triton()
    with pytest.raises(RuntimeError, match=r"is not supported; the kernels work with 3.6 to 3.9: pip install"):
        environment.check_triton()


def test_triton_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeError, match="cannot be imported.*work with 3.6 to 3.9.*GRADE_KERNELS_BACKEND=torch"):
        environment.check_triton()


def test_import_is_light():
    """Neither triton nor the compiler comes with the import, and no device is asked anything."""
    code = (
        "import torch, sys; before = set(sys.modules); import grade_kernels; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "assert 'triton' not in new, new; assert 'torch._dynamo' not in sys.modules; "
        "assert not torch.cuda.is_initialized()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
