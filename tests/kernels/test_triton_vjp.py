"""soft_token_vjp on the Triton path: the noise over a support, the four rules, their pull-back."""

import pytest
import torch
import triton
import triton.language as tl
from kernel_checks import Allocations, assert_no_worse

from grade_kernels import Head, candidate_grad, soft_token_vjp
from grade_kernels.backend import VARIABLE
from grade_kernels.torch_ops import support
from grade_kernels.torch_ops import vjp as torch_ops
from grade_kernels.triton_ops import launch, noise
from grade_kernels.triton_ops import vjp as ops

pytestmark = pytest.mark.triton
V, SEED, INF, NAN = 60, -(2**62) - 12345, torch.inf, torch.nan
RULES = {
    "gumbel": ("gumbel", range(1)),
    "conditional gumbel": ("gumbel", range(1, 2)),
    "rao": ("rao", range(1, 4)),
    "straight_through": ("straight_through", range(1)),
    "reinmax": ("reinmax", range(1)),
}


@triton.jit(do_not_specialize=["k", "low", "high", "draw"])
def support_kernel(
    values, ids, keys, tokens, z_out, w_out, winners, low, high, draw, tau, k, KP: tl.constexpr, GIVEN: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, KP)
    valid = lane < k
    x, i = tl.load(values + row * k + lane, mask=valid), tl.load(ids + row * k + lane, mask=valid)
    z = noise.noisy_logits(x, i, valid, tl.load(keys + row), low, high, draw, tl.load(tokens + row), GIVEN)
    tl.store(z_out + row * k + lane, z, mask=valid)
    tl.store(w_out + row * k + lane, noise.tempered_softmax(z, valid, tau), mask=valid)
    tl.store(winners + row, noise.winner(z, i, valid))


@triton.jit
def next_below_kernel(x, out, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    tl.store(out + lane, noise.next_below(tl.load(x + lane)))


def problem(n, k, device, dtype=torch.float32, widths=(7,)):
    """(gradients, tables, logits, ids, tokens, keys); the ids of a row are distinct, the tokens among them."""
    ids = torch.rand(n, V).argsort(-1)[:, :k].contiguous().to(device)
    keys = torch.randint(-(2**60), 2**60, (n,)).to(device)
    logits = (2 * torch.randn(n, k)).to(device, dtype)
    grads = [torch.randn(n, d).to(device, dtype) for d in widths]
    tables = [torch.randn(V, d).to(device, dtype) for d in widths]
    return grads, tables, logits, ids, ids[:, k // 2].clone(), keys


def both(case, rule, tau=0.5):
    """dlogits of the Triton path, of the PyTorch path in float32, and in float64 from the same noise bits."""
    grads, tables, logits, *rest = case
    estimator, draws = RULES[rule]
    args = (*rest, estimator, tau, SEED, draws)
    ours = ops.token_vjp(grads, tables, logits, *args, torch.float32)
    plain = torch_ops.token_vjp(grads, tables, logits, *args, torch.float32)
    double = [[x.double() for x in grads], [x.double() for x in tables], logits.double()]
    return ours, plain, torch_ops.token_vjp(*double, *args, torch.float64)


@pytest.mark.parametrize("draw", [0, 1, 2**31 + 5])
def test_noise_weights_and_winner_over_a_support(device, draw):
    n, k = 12, 13
    _, _, values, ids, tokens, keys = problem(n, k, device)
    values[1], values[2, :5], values[3, 2], values[4, 3] = -INF, -INF, NAN, INF
    values[5] += 1e4
    values[6, 0] = 60.0  # the token, another one, is drawn from the far tail
    values[7, 1:] = -INF
    tokens[7] = ids[7, 0]  # alone
    tokens[8] = V + 1  # not in the support
    values[9] = -1e30
    z, w = torch.empty_like(values), torch.empty_like(values)
    winners, given = torch.empty_like(tokens), tokens if draw else None
    signed = draw - (draw >> 31 << 32)
    launch.launch(
        support_kernel, (n,), values, ids, keys, tokens, z, w, winners, *launch.words(SEED), signed, 0.5, k,
        num_warps=1, KP=16, GIVEN=draw > 0,
    )  # fmt: skip
    plain = support.noisy_logits(values, ids, keys, SEED, draw, given)
    weights = support.tempered_softmax(plain, 0.5)
    torch.testing.assert_close(w, weights, rtol=1e-5, atol=1e-7, equal_nan=True)
    assert torch.equal(winners, support.winner(plain, ids))
    z[3] = plain[3]  # a row with a NaN is not centred in the same way
    torch.testing.assert_close(z, plain, rtol=2e-6, atol=2e-6, equal_nan=True)
    if draw:
        inside = [0, 2, 5, 6, 7, 9, 10, 11]
        assert torch.equal(winners[inside], tokens[inside])
        top = z.masked_fill(ids != tokens[:, None], -INF)[inside].amax(-1, keepdim=True)
        assert ((z[inside] >= top).sum(-1) == 1).all()  # the only argmax


def test_a_tie_goes_to_the_lower_id(device):
    z = torch.tensor([[1.0, INF, INF, 2.0]], device=device)  # no finite values tie: the noise tells them apart
    ids = torch.tensor([[1, 50, 30, 2]], device=device)
    keys, out, winners = ids[:, 0], torch.empty_like(z), ids[:, 0].clone()
    launch.launch(
        support_kernel, (1,), z, ids, keys, keys, out, out, winners, 1, 0, 0, 1.0, 4, num_warps=1, KP=4, GIVEN=False
    )
    assert winners.item() == 30


def test_next_below(device):
    values = [0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, 1e-45, -1e-45, 3.4028234663852886e38, -3.4028234663852886e38]
    x = torch.tensor(values + [2.0, -2.0, 1e-38, 4.0, 5.0], device=device)
    out = torch.empty_like(x)
    launch.launch(next_below_kernel, (1,), x, out, num_warps=1, SIZE=16)
    assert torch.equal(out.view(torch.int32)[~x.isnan()], x.nextafter(x.new_tensor(-INF)).view(torch.int32)[~x.isnan()])
    assert out[6].isnan()


# Candidates: one; fewer than lanes; a power of two and one more; more than a tile of 32 dot products.
@pytest.mark.parametrize("k", [1, 5, 16, 17, 40])
@pytest.mark.parametrize("rule", RULES)
def test_rules(device, rule, k):
    case = problem(2, k, device)
    copies = [x.clone() for x in (*case[0], *case[1], *case[2:])]
    ours, plain, exact = both(case, rule)
    if k == 1:  # the one weight is 1 and its derivative 0
        assert (ours == 0).all()
    else:
        assert_no_worse(ours, plain, exact)
    assert all(map(torch.equal, (*case[0], *case[1], *case[2:]), copies))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES)
def test_16_bits_and_two_models_of_different_widths(device, rule, dtype):
    # widths: part of a lane; a full step of 32 lanes of 8 entries and a tail
    case = problem(2, 9, device, dtype, widths=(3, 300))
    assert_no_worse(*both(case, rule, tau=2.0))
    v = candidate_grad(*case[:2], case[3])
    plain = torch_ops.candidate_grad(*case[:2], case[3])
    exact = torch_ops.candidate_grad(*([x.double() for x in xs] for xs in case[:2]), case[3])
    assert v.dtype == torch.float32
    assert_no_worse(v, plain, exact)


def test_three_models(device):
    assert_no_worse(*both(problem(2, 5, device, widths=(1, 64, 10)), "gumbel"))


def test_strides(device):
    case = list(problem(3, 5, device))
    plain = ops.token_vjp(*case, "reinmax", 0.5, SEED, range(1), torch.float32)
    wide = [torch.cat([x, x], -1)[:, :5] for x in case[2:4]]
    grads, tables = ([x.t().contiguous().t()] for x in (case[0][0], case[1][0]))
    keys = torch.stack([case[4], case[5]], -1)
    ours = ops.token_vjp(grads, tables, *wide, *keys.unbind(-1), "reinmax", 0.5, SEED, range(1), torch.float32)
    assert torch.equal(ours, plain)


def test_a_thousand_candidates(device):
    # As many lanes as the largest support that is tested on a GPU, one of them idle; ids repeat.
    case = list(problem(1, 10, device))
    case[2], case[3] = torch.randn(1, 1023, device=device), torch.randint(0, V, (1, 1023), device=device)
    assert_no_worse(*both(case, "rao"))


@pytest.mark.parametrize("rule", RULES)
def test_masked_candidates_and_absent_tokens(device, rule):
    case = problem(3, 6, device)
    blocked = torch.zeros(3, 6, dtype=torch.bool, device=device)
    blocked[:, 4:] = True
    case[2].masked_fill_(blocked, -INF)
    case[2][2] = -INF  # a support without any mass
    case[4][1] = V + 7  # a token that the support lacks
    ours, plain, exact = both(case, rule)
    assert (ours[:2][blocked[:2]] == 0).all()
    assert_no_worse(ours[:2], plain[:2], exact[:2])
    assert ours[2].isnan().all() and plain[2].isnan().all()


@pytest.mark.parametrize("options", [{"softcap": 4.0}, {"scale": 0.7, "softcap": 30.0}, {}])
def test_pull_back(device, monkeypatch, options):
    grads, tables, logits, ids, tokens, _ = problem(6, 5, device, widths=(7, 9))
    weight = torch.randn(V, 12, device=device)
    shaped = {"logits": logits.view(2, 3, 5), "indices": ids.view(2, 3, 5), "tokens": tokens.view(2, 3)}
    args = {"tau": 0.5, "estimator": "rao", "samples": 2, "seed": SEED}
    grads = [g.view(2, 3, -1) for g in grads]
    ours = soft_token_vjp(grads, tables, head=Head(weight, **options), **shaped, **args)
    monkeypatch.setenv(VARIABLE, "torch")
    plain = soft_token_vjp(grads, tables, head=Head(weight, **options), **shaped, **args)
    double = [[x.double() for x in xs] for xs in (grads, tables)]
    shaped["logits"] = shaped["logits"].double()
    exact = soft_token_vjp(*double, head=Head(weight.double(), **options), **shaped, **args)
    assert_no_worse(ours.dlogits, plain.dlogits, exact.dlogits)
    assert_no_worse(ours.dhidden, plain.dhidden, exact.dhidden)


def test_batch_split_changes_nothing(device):
    grads, tables, *rest = problem(3, 5, device)
    whole = ops.token_vjp(grads, tables, *rest, *RULES["rao"][:1], 0.5, SEED, range(1, 3), torch.float32)
    for i in range(3):
        part = (x[i : i + 1] for x in rest)
        alone = ops.token_vjp([grads[0][i : i + 1]], tables, *part, "rao", 0.5, SEED, range(1, 3), torch.float32)
        assert torch.equal(alone[0], whole[i])


@pytest.mark.parametrize("models", [1, 3])
def test_launches(models):
    """One for each model; the rule and its draws cost none."""
    case = problem(2, 5, "cpu", widths=(4,) * models)
    with launch.recording() as launches:
        ops.token_vjp(*case, "rao", 0.5, SEED, range(1, 17), torch.float32)
    assert len(launches) == models


@pytest.mark.parametrize("rule", ["rao", "reinmax"])
def test_memory(device, rule):
    case = problem(6, 30, device, widths=(40, 8))
    with Allocations() as made:
        ops.token_vjp(*case, RULES[rule][0], 0.5, SEED, RULES[rule][1], torch.float32)
    assert made.largest <= 6 * 30 and made.peak <= 4 * 6 * 30  # the result alone


def test_custom_op(device):
    grads, tables, logits, ids, tokens, keys = problem(2, 3, device, widths=(4, 2))
    for rule, first, draws, given in (("gumbel", 0, 1, None), ("rao", 1, 2, tokens)):
        numbers = (rule, 0.5, *launch.words(SEED), first, draws)
        torch.library.opcheck(torch.ops.grade_kernels.token_vjp, (grads, tables, logits, ids, given, keys, *numbers))
