"""soft_token_vjp: the four estimators, their pull-back, and what they have in common."""

import pytest
import torch
from kernel_checks import HALF, Allocations, rel_err

from grade_kernels import (
    Head,
    SoftTokenRule,
    candidate_grad,
    gumbel_topk,
    linear_gumbel_topk,
    pull_back,
    reference,
    soft_embedding,
    soft_token_vjp,
)
from grade_kernels.common import random
from grade_kernels.torch_ops import embedding as embedding_ops
from grade_kernels.torch_ops import vjp as vjp_ops

ESTIMATORS = ["gumbel", "rao", "straight_through", "reinmax"]
N, K, V, D = 7, 6, 40, 5
SEED = 13


@pytest.fixture
def problem():
    torch.manual_seed(1)
    full = 2 * torch.randn(N, V, dtype=torch.float64)
    rows = torch.randint(0, 2**45, (N,))
    sample = gumbel_topk(full, K, seed=SEED, rows=rows)
    return {
        "grad": torch.randn(N, D, dtype=torch.float64),
        "table": torch.randn(V, D, dtype=torch.float64),
        "full": full,
        "sample": sample,
        "common": {
            "logits": full.gather(-1, sample.indices),
            "indices": sample.indices,
            "tokens": sample.tokens,
            "seed": SEED,
            "rows": rows,
        },
    }


def candidates(p):
    return torch.einsum("nd,nkd->nk", p["grad"], p["table"][p["sample"].indices])


def draws(p, *, free=False, numbers):
    """Noisy logits [M, N, K] of the numbered draws, from the noise and the textbook."""
    c, noisy = p["common"], []
    for draw in numbers:
        noise = random.exponential(SEED, draw, c["rows"], c["indices"], torch.float64)
        if free:
            noisy.append(c["logits"] - noise.log())
        else:
            position = (c["indices"] == c["tokens"][:, None]).int().argmax(-1)
            noisy.append(reference.conditional_gumbel(c["logits"], position, noise))
    return torch.stack(noisy)


@pytest.mark.parametrize("tau", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("estimator", [*ESTIMATORS, "gumbel conditional"])
def test_against_the_written_out_rules(problem, estimator, tau):
    conditional = estimator.endswith("conditional")
    name = estimator.split()[0]
    options = {"tau": tau, "estimator": name, "samples": 5, "conditional": conditional}
    ours = soft_token_vjp(problem["grad"], problem["table"], **options, **problem["common"])
    numbers = {"gumbel": [1] if conditional else [0], "rao": range(1, 6)}.get(name, [0])
    z = draws(problem, free=name == "gumbel" and not conditional, numbers=numbers)
    one_hot = (problem["sample"].indices == problem["sample"].tokens[:, None]).double()
    exact = reference.soft_token_vjp(name, problem["common"]["logits"], candidates(problem), tau, z, one_hot)
    torch.testing.assert_close(ours.dlogits, exact)
    torch.testing.assert_close(ours.dlogits.sum(-1), torch.zeros(N, dtype=torch.float64))
    assert ours.dhidden is None


@pytest.mark.parametrize("hard", [False, True])
def test_gumbel_is_the_backward_pass_of_the_sampler(problem, hard):
    full = problem["full"].requires_grad_()
    sample = gumbel_topk(full, K, 0.4, seed=SEED, rows=problem["common"]["rows"], hard=hard)
    (dense,) = torch.autograd.grad(soft_embedding(sample, problem["table"]), full, problem["grad"])
    ours = soft_token_vjp(problem["grad"], problem["table"], tau=0.4, **problem["common"])
    torch.testing.assert_close(ours.dlogits, dense.gather(-1, sample.indices))


def test_conditional_gumbel_is_the_backward_pass_of_the_conditional_sampler(problem):
    c = problem["common"]
    full = problem["full"].requires_grad_()
    sample = gumbel_topk(full, K, 0.4, seed=SEED, rows=c["rows"], draw=1, tokens=c["tokens"])
    (dense,) = torch.autograd.grad(soft_embedding(sample, problem["table"]), full, problem["grad"])
    ours = soft_token_vjp(problem["grad"], problem["table"], tau=0.4, conditional=True, **c)
    torch.testing.assert_close(ours.dlogits, dense.gather(-1, sample.indices))


def test_rao_is_the_mean_of_the_conditional_draws(problem):
    c, v, singles = problem["common"], candidates(problem), []
    for draw in (1, 2, 3):
        key = {"seed": SEED, "rows": c["rows"], "draw": draw}
        w = gumbel_topk(problem["full"], K, 0.5, tokens=c["tokens"], **key).weights
        singles.append((w * v - w * (w * v).sum(-1, keepdim=True)) / 0.5)
    ours = soft_token_vjp(problem["grad"], problem["table"], tau=0.5, estimator="rao", samples=3, **c)
    torch.testing.assert_close(ours.dlogits, torch.stack(singles).mean(0))
    one = soft_token_vjp(problem["grad"], problem["table"], tau=0.5, estimator="rao", samples=1, **c)
    given = soft_token_vjp(problem["grad"], problem["table"], tau=0.5, conditional=True, **c)
    torch.testing.assert_close(one.dlogits, given.dlogits)


def test_rao_and_gumbel_have_the_same_mean():
    """E[rao] = E[gumbel] over tokens and noise; straight_through is another estimator."""
    rows, k, tau = 40_000, 4, 0.5
    logits = torch.tensor([0.5, -0.3, 1.0, 0.0], dtype=torch.float64).expand(rows, k).contiguous()
    table = torch.eye(k, dtype=torch.float64)
    grad = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64).expand(rows, k)
    sample = gumbel_topk(logits, k, seed=5)
    means, errors = {}, {}
    for name in ("gumbel", "rao"):
        at = {"logits": logits.gather(-1, sample.indices), "indices": sample.indices, "tokens": sample.tokens}
        d = soft_token_vjp(grad, table, **at, tau=tau, estimator=name, seed=5, samples=4).dlogits
        means[name], errors[name] = d.mean(0), d.std(0) / rows**0.5
    gap = (means["gumbel"] - means["rao"]).abs()
    assert (gap < 4 * (errors["gumbel"] ** 2 + errors["rao"] ** 2).sqrt()).all()
    assert (errors["rao"] < errors["gumbel"]).all()


def test_reinmax_is_exact_for_two_candidates_with_linear_loss():
    """Second-order accuracy: for a linear function the mean over tokens is the exact gradient."""
    logits = torch.tensor([[0.7, -0.4]], dtype=torch.float64)
    table, grad = torch.eye(2, dtype=torch.float64), torch.tensor([[2.0, -1.0]], dtype=torch.float64)
    pi, total = logits.softmax(-1), 0.0
    for token in (0, 1):
        at = {"logits": logits, "indices": torch.tensor([[0, 1]]), "tokens": torch.tensor([token])}
        d = soft_token_vjp(grad, table, **at, estimator="reinmax").dlogits
        total = total + pi[0, token] * d
    exact = (reference.softmax_jacobian(pi) @ grad[..., None])[..., 0]
    torch.testing.assert_close(total, exact)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_linear_in_v(problem, estimator):
    def d(grad, table=problem["table"]):
        args = {"tau": 0.5, "estimator": estimator, **problem["common"]}
        return soft_token_vjp(grad, table, head=Head(problem["table"]), **args)

    a, b = problem["grad"], torch.randn(N, D, dtype=torch.float64)
    whole, first, second = d(2 * a - 3 * b), d(a), d(b)
    torch.testing.assert_close(whole.dlogits, 2 * first.dlogits - 3 * second.dlogits)
    torch.testing.assert_close(whole.dhidden, 2 * first.dhidden - 3 * second.dhidden)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_several_models_add_up(problem, estimator):
    grads = [problem["grad"], torch.randn(N, 9, dtype=torch.float64)]
    tables = [problem["table"], torch.randn(V, 9, dtype=torch.float64)]
    args = {"tau": 0.5, "estimator": estimator, **problem["common"]}
    both = soft_token_vjp(grads, tables, **args).dlogits
    parts = [soft_token_vjp(g, t, **args).dlogits for g, t in zip(grads, tables, strict=True)]
    torch.testing.assert_close(both, parts[0] + parts[1])


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_pull_back_to_the_hidden_state(problem, estimator, softcap):
    hidden = torch.randn(N, 8, dtype=torch.float64, requires_grad=True)
    head = Head(torch.randn(V, 8, dtype=torch.float64), scale=0.7, softcap=softcap)
    at_support = reference.head_logits(hidden, head).gather(-1, problem["sample"].indices)
    args = {**problem["common"], "logits": at_support.detach(), "tau": 0.5, "estimator": estimator}
    ours = soft_token_vjp(problem["grad"], problem["table"], head=head, **args)
    (exact,) = torch.autograd.grad(at_support, hidden, ours.dlogits)
    torch.testing.assert_close(ours.dhidden, exact)
    plain = soft_token_vjp(problem["grad"], problem["table"], **args)
    torch.testing.assert_close(plain.dlogits, ours.dlogits)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_rule_serves_several_gradients(monkeypatch, problem, estimator, kept):
    """Weights are made once if they fit: they take 8 bytes for each candidate and term."""
    terms, noises = {"rao": 3, "reinmax": 2}.get(estimator, 1), []
    noisy_logits = vjp_ops.noisy_logits
    monkeypatch.setattr(vjp_ops, "noisy_logits", lambda *args: noises.append(args) or noisy_logits(*args))
    args = {"tau": 0.5, "estimator": estimator, "samples": 3, "head": Head(problem["table"]), **problem["common"]}
    rule = SoftTokenRule(**args, keep_bytes=terms * N * K * 8 - (not kept))
    other = torch.randn(N, 9, dtype=torch.float64), torch.randn(V, 9, dtype=torch.float64)
    pairs = [(problem["grad"], problem["table"]), other, ([problem["grad"], other[0]], [problem["table"], other[1]])]
    several = [rule(*pair) for pair in pairs]
    assert len(noises) == {"gumbel": 1, "rao": 3}.get(estimator, 0) * (1 if kept else len(pairs))
    for pair, ours in zip(pairs, several, strict=True):
        exact = soft_token_vjp(*pair, **args)
        assert torch.equal(ours.dlogits, exact.dlogits) and torch.equal(ours.dhidden, exact.dhidden)


def test_a_rule_computes_in_the_precision_of_each_gradient(problem):
    single = {**problem["common"], "logits": problem["common"]["logits"].float()}
    rule, grad, table = SoftTokenRule(**single), problem["grad"], problem["table"]
    for dtype in (torch.float32, torch.float64, torch.float32):
        ours = rule(grad.to(dtype), table.to(dtype)).dlogits
        assert ours.dtype == dtype
        assert torch.equal(ours, soft_token_vjp(grad.to(dtype), table.to(dtype), **single).dlogits)


def test_hidden_gradient_equals_the_linear_sampler():
    hidden = torch.randn(N, 8, dtype=torch.float64, requires_grad=True)
    head = Head(torch.randn(V, 8, dtype=torch.float64), scale=0.5, softcap=3.0)
    grad, table = torch.randn(N, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64)
    sample = linear_gumbel_topk(hidden, head, K, 0.5, seed=SEED)
    (exact,) = torch.autograd.grad(soft_embedding(sample, table), hidden, grad)
    logits = reference.head_logits(hidden.detach(), head).gather(-1, sample.indices)
    ours = soft_token_vjp(grad, table, logits=logits, indices=sample.indices, tau=0.5, seed=SEED, head=head)
    torch.testing.assert_close(ours.dhidden, exact)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_blocked_candidates_get_no_gradient(problem, estimator, softcap):
    args = {**problem["common"], "logits": problem["common"]["logits"].clone()}
    blocked = torch.zeros(N, K, dtype=torch.bool)
    blocked[:, -2:] = True
    blocked &= args["indices"] != args["tokens"][:, None]
    args["logits"][blocked] = -torch.inf
    args.update(estimator=estimator, head=Head(problem["table"], softcap=softcap))
    ours = soft_token_vjp(problem["grad"], problem["table"], **args)
    assert blocked.any() and (ours.dlogits[blocked] == 0).all()
    assert torch.isfinite(ours.dlogits).all() and torch.isfinite(ours.dhidden).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_batch_split_changes_nothing(problem, estimator):
    args = {"tau": 0.5, "estimator": estimator}
    c = problem["common"]
    whole = soft_token_vjp(problem["grad"], problem["table"], **args, **c).dlogits
    for i in range(N):
        part = {name: value if name == "seed" else value[i] for name, value in c.items()}
        alone = soft_token_vjp(problem["grad"][i], problem["table"], **args, **part).dlogits
        torch.testing.assert_close(alone, whole[i])


def test_tokens_outside_the_support(problem):
    """A conditional draw without its token is a free one; a one-hot without it is 0."""
    c = {**problem["common"], "tokens": torch.full((N,), V - 1)}
    c["indices"] = torch.where(c["indices"] == V - 1, 0, c["indices"])
    ours = soft_token_vjp(problem["grad"], problem["table"], tau=0.5, conditional=True, **c).dlogits
    noise = random.gumbel(SEED, 1, c["rows"], c["indices"], torch.float64)
    w = ((c["logits"] + noise) / 0.5).softmax(-1)
    v = candidate_grad(problem["grad"], problem["table"], c["indices"])
    torch.testing.assert_close(ours, (w * v - w * (w * v).sum(-1, keepdim=True)) / 0.5)
    ours = soft_token_vjp(problem["grad"], problem["table"], estimator="reinmax", **c).dlogits
    assert torch.isfinite(ours).all()


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_precision_of_candidate_grad_and_pull_back(monkeypatch, dtype, columns):
    monkeypatch.setattr(embedding_ops, "_prefer_columns", lambda indices, table: columns)
    monkeypatch.setattr(embedding_ops, "_BLOCK_BYTES", 2**13)
    grad, table = torch.randn(20, 48).to(dtype), torch.randn(100, 48).to(dtype)
    indices, dlogits = torch.randint(0, 100, (20, 12)), torch.randn(20, 12)
    v, back = candidate_grad(grad, table, indices), pull_back(dlogits, indices, Head(table))
    gathered = table.double()[indices]
    assert v.dtype == back.dtype == torch.float32
    assert rel_err(v, torch.einsum("nd,nkd->nk", grad.double(), gathered)) < 1e-6
    assert rel_err(back, torch.einsum("nk,nkd->nd", dlogits.double(), gathered)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_single_precision_against_double(problem, dtype):
    c = {**problem["common"], "logits": problem["common"]["logits"].to(dtype)}
    grad, table = problem["grad"].to(dtype), problem["table"].to(dtype)
    exact_c = {**c, "logits": c["logits"].double()}
    for estimator in ESTIMATORS:
        args = {"tau": 0.5, "estimator": estimator}
        ours = soft_token_vjp(grad, table, head=Head(table), **args, **c)
        wide = table.double()
        exact = soft_token_vjp(grad.double(), wide, head=Head(wide), **args, **exact_c)
        assert ours.dlogits.dtype == ours.dhidden.dtype == torch.float32
        assert rel_err(ours.dlogits, exact.dlogits) < 1e-5
        assert rel_err(ours.dhidden, exact.dhidden) < 1e-5


@pytest.mark.parametrize("leading", [(), (0,), (0, 2), (2, 3)])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_leading_shapes(backend, device, leading, estimator):
    indices = torch.randint(0, V, (*leading, K), device=device)
    grad, logits = torch.randn(*leading, D, device=device), torch.randn(*leading, K, device=device)
    table, head = torch.randn(V, D, device=device), Head(torch.randn(V, 9, device=device))
    at = {"logits": logits, "indices": indices, "tokens": indices[..., 0]}
    ours = soft_token_vjp(grad, table, **at, estimator=estimator, seed=0, samples=2, head=head)
    assert candidate_grad(grad, table, indices).shape == (*leading, K)
    assert ours.dlogits.shape == (*leading, K) and ours.dhidden.shape == (*leading, 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_and_inputs(monkeypatch, dtype):
    monkeypatch.setattr(embedding_ops, "_BLOCK_BYTES", 2**16)
    n, k, d, vocab = 64, 128, 96, 2000
    grad, table = torch.randn(n, d).to(dtype), torch.randn(vocab, d).to(dtype)
    logits, indices = torch.randn(n, k), torch.randint(0, vocab, (n, k))
    copies = [t.clone() for t in (grad, table, logits, indices)]
    with Allocations().ignore(table) as made:
        at = {"logits": logits, "indices": indices, "tokens": indices[:, 3], "head": Head(table, softcap=30.0)}
        soft_token_vjp(grad, table, **at, estimator="rao", seed=0)
    assert made.largest < n * k * d / 8
    for now, before in zip((grad, table, logits, indices), copies, strict=True):
        assert torch.equal(now, before)
