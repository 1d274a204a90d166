"""token_logprob: against float64, masks, gradients, memory."""

import pytest
import torch
from kernel_checks import HALF, Allocations, assert_no_worse

from grade_kernels import reference, token_logprob
from grade_kernels.common import chunks

INF = torch.inf


@pytest.mark.parametrize("leading", [(), (0,), (5,), (2, 3)])
def test_float64_equals_the_textbook(leading):
    logits = torch.randn(*leading, 21, dtype=torch.float64)
    tokens = torch.randint(0, 21, leading)
    results = zip(token_logprob(logits, tokens), reference.token_logprob(logits, tokens), strict=True)
    for ours, exact in results:
        assert ours.shape == leading
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-14)


def test_gradcheck():
    logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([0, 8, 3, 3])
    assert torch.autograd.gradcheck(lambda x: token_logprob(x, tokens), logits)
    assert torch.autograd.gradcheck(lambda x: token_logprob(x, tokens)[0], logits)
    assert torch.autograd.gradcheck(lambda x: token_logprob(x, tokens)[1], logits)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_no_worse_than_plain_pytorch(dtype):
    logits = torch.randn(40, 3000).mul(3).to(dtype).requires_grad_()
    double = logits.detach().double().requires_grad_()
    tokens, v = torch.randint(0, 3000, (40,)), torch.randn(2, 40)
    results = []
    for function, x in (
        (token_logprob, logits),
        (reference.token_logprob, logits),
        (reference.token_logprob, double),
    ):
        logprob, entropy = function(x, tokens)
        (grad,) = torch.autograd.grad((logprob * v[0] + entropy * v[1]).sum(), x)
        results.append((logprob.detach(), entropy.detach(), grad))
    ours, plain, exact = results
    assert ours[0].dtype == ours[1].dtype == torch.float32 and ours[2].dtype == dtype
    for mine, theirs, judge in zip(ours, plain, exact, strict=True):
        assert_no_worse(mine, theirs, judge)


def test_masked_and_underflowing_entries():
    logits = torch.tensor([[-INF, 0.0, 1.0, -INF], [-500.0, 0.0, -400.0, 1e4]], requires_grad=True)
    tokens = torch.tensor([1, 0])
    logprob, entropy = token_logprob(logits, tokens)
    exact = reference.token_logprob(logits.detach().double(), tokens)
    torch.testing.assert_close(logprob.double(), exact[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(entropy.double(), exact[1], rtol=1e-6, atol=1e-12)
    (logprob.sum() + entropy.sum()).backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[0, [0, 3]] == 0).all()
    assert token_logprob(logits, torch.tensor([0, 0]))[0][0] == -INF


def test_nan_stays_in_its_row():
    logits = torch.randn(3, 9)
    logits[1, 4] = torch.nan
    for value in token_logprob(logits, torch.tensor([0, 1, 2])):
        assert value.isnan().tolist() == [False, True, False]


def test_pieces_strides_and_memory(monkeypatch):
    logits = torch.randn(40, 9, 50, dtype=torch.float64)
    tokens = torch.randint(0, 50, (40, 9))
    expected = reference.token_logprob(logits, tokens)
    monkeypatch.setattr(chunks, "_PIECE_BYTES_CPU", 8 * 50 * 2)
    view = logits[:, :-2].requires_grad_()
    with Allocations().ignore(logits) as made:
        got = token_logprob(view, tokens[:, :-2])
    assert made.peak < logits[0].numel() * 8 * 6 and made.largest < logits.numel() / 8
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b[:, :-2])
    (grad,) = torch.autograd.grad(got[0].sum(), view)
    one_hot = torch.nn.functional.one_hot(tokens[:, :-2], 50)
    torch.testing.assert_close(grad, one_hot - view.detach().softmax(-1))
