"""What makes decoding quick changes nothing: a cache written in place, rows that ended dropped, the adapter merged, the
head packed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rollouts import PROMPTS, draw
from tiny import CONFIGS, VOCAB, KeepDouble, tiny_policy

import grade.sampling.few_rows
import grade.sampling.packed_head
import grade.sampling.sample
from grade.model.decoder import Decoder
from grade.model.frozen_linear import quicken
from grade.model.policy import Policy
from grade.rollout import pad_prompts
from grade.sampling.decode import Decoding
from grade.sampling.draw import draw_tokens
from grade.sampling.few_rows import WeightFirst, quick_products
from grade.sampling.packed_head import pack, packed_product, worth_packing
from grade_kernels import Head


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_cache_written_in_place_is_transformers_own_to_the_bit(name, monkeypatch):
    policy = tiny_policy(name)
    ours = draw(policy, copies=3, soft=True)
    concatenating = Policy.new_cache
    monkeypatch.setattr(Policy, "new_cache", lambda self, capacity=None: concatenating(self))
    theirs = draw(policy, copies=3, soft=True)
    assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.indices, theirs.indices)
    assert torch.equal(ours.weights, theirs.weights)


def test_a_full_cache_is_refused():
    policy = tiny_policy("llama")
    ids, mask = pad_prompts(PROMPTS[:1], policy.pad_id)
    cache = policy.new_cache(len(PROMPTS[0]) - 1)
    with pytest.raises(ValueError, match="a cache for 2 positions was given 3"), torch.no_grad():
        policy.hidden(policy.embed(ids), mask, cache)


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("soft", [False, True])
def test_rows_that_ended_are_dropped(name, soft, monkeypatch):
    batches = []
    feed = Decoder.feed
    monkeypatch.setattr(Decoder, "feed", lambda self, x: batches.append(len(x)) or feed(self, x))
    monkeypatch.setattr(grade.sampling.sample, "_END_CHECK_INTERVAL", 2)
    with KeepDouble():
        policy = tiny_policy(name, dtype=torch.float64)
        policy.eos_ids = torch.arange(0, VOCAB, 6)
        batches.clear()  # the probe decodes too
        dropped = draw(policy, copies=4, soft=soft)
        assert batches == sorted(batches, reverse=True) and batches[-1] < batches[0] == 4 * len(PROMPTS)
        monkeypatch.setattr(grade.sampling.sample, "_DROP_AT", 0)
        kept = draw(policy, copies=4, soft=soft)
    mask = kept.mask
    assert torch.equal(dropped.tokens, kept.tokens) and torch.equal(dropped.mask, mask)
    assert torch.equal(dropped.indices[mask], kept.indices[mask])
    torch.testing.assert_close(dropped.token_weight[mask], kept.token_weight[mask], rtol=1e-9, atol=1e-12)
    if soft:
        torch.testing.assert_close(dropped.weights[mask], kept.weights[mask], rtol=1e-9, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_merged_adapter_is_the_adapter(name):
    with KeepDouble():
        policy = tiny_policy(name, dtype=torch.float64)
        x = policy.embed(torch.tensor(PROMPTS[0]))[None]
        before = [p.clone() for p in policy.model.parameters()]
        expected = policy.hidden(x, None)
        with policy.state(adapters=False):
            base = policy.hidden(x, None)
        with policy.merged():
            merged = policy.hidden(x, None)
        with pytest.raises(RuntimeError, match="on the way"), policy.merged():
            raise RuntimeError("on the way")
        after = policy.hidden(x, None)
    torch.testing.assert_close(merged, expected, rtol=1e-10, atol=1e-12)
    assert (merged - base).abs().max() > 1e-4  # the adapter says something
    assert torch.equal(after, expected)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))


@torch.no_grad()
def test_an_adapter_is_not_rounded_into_16_bit_weights():
    policy = tiny_policy("llama", dtype=torch.bfloat16)
    x = policy.embed(torch.tensor(PROMPTS[0]))[None]
    expected = policy.hidden(x, None)
    weights = [p.data_ptr() for p in policy.model.parameters()]
    with policy.merged():
        assert torch.equal(policy.hidden(x, None), expected)
        assert weights == [p.data_ptr() for p in policy.model.parameters()]


# -- the packed head ---------------------------------------------------------------------------------------------


needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@needs_onednn
@pytest.mark.parametrize("size", [(1000, 64), (4099, 288), (37, 5)], ids=str)
@pytest.mark.parametrize("rows", [1, 4, 7, 16, 33])
def test_the_packed_product_is_the_product(size, rows):
    """Of whole numbers exactly, else within float32's rounding of a sum."""
    generator = torch.Generator().manual_seed(rows)
    weight, hidden = (torch.randn(n, size[1], generator=generator) for n in (size[0], rows))
    expected = hidden.double() @ weight.double().T
    error = (packed_product(hidden, pack(weight)) - expected).abs()
    bound = size[1] * torch.finfo(torch.float32).eps * (hidden.abs().double() @ weight.abs().double().T)
    assert (error <= bound).all()
    whole = [x.mul(8).round() for x in (hidden, weight)]
    assert torch.equal(packed_product(whole[0], pack(whole[1])).double(), whole[0].double() @ whole[1].double().T)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("transform", [{}, dict(scale=0.3, softcap=2.0)], ids=["plain", "transformed"])
def test_a_packed_head_samples_the_same(soft, transform, packed_heads):
    """With everything that a head can have beside its weight; rows leave the batch on the way. Token by token from the
    same hidden states: soft tokens that are fed back would carry a product's rounding on and enlarge it."""
    policy = tiny_policy("llama", unknown=3)
    policy.eos_ids = torch.arange(0, VOCAB, 6)
    if transform:
        bias = torch.randn(policy.vocab_size, generator=torch.Generator().manual_seed(0)).double()
        policy.head = replace(policy.head, bias=bias, **transform)
    width = policy.head.weight.shape[1]

    class Both(Decoding):
        def draw(self, hidden, sampling, **noise):
            packed, plain = super().draw(hidden, sampling, **noise), draw_tokens(policy, hidden, sampling, **noise)
            assert torch.equal(packed.tokens, plain.tokens) and torch.equal(packed.indices, plain.indices)
            # A logit is a sum of `width` products and a few further steps, scale and cap at most as steep as 1; below
            # 20, the noise. Twice that between two, and a softmax of them over tau at most doubles it once more.
            size = (hidden.abs() @ policy.head.weight.abs().T).amax(1, keepdim=True) + 20
            rounding = (width + 8) * torch.finfo(torch.float32).eps * size
            bound = plain.weights * torch.expm1(4 * rounding / sampling.tau) + torch.finfo(torch.float32).eps
            assert ((packed.weights - plain.weights).abs() <= bound).all()
            return packed

    draw(policy, copies=4, soft=soft, max_new_tokens=20, decoding=Both(policy))
    assert 4 * len(PROMPTS) == packed_heads[0] > packed_heads[-1]


def test_what_is_packed(packed_heads, monkeypatch):
    """float32 that fits, where the products of a rollout are quicker by more than the packing takes."""
    weight = torch.zeros(8, 4)
    assert worth_packing(Head(weight), rows=4, tokens=16)
    for dtype in (torch.float64, torch.bfloat16):
        assert not worth_packing(Head(weight.to(dtype)), rows=4, tokens=16)
    large = Head(torch.zeros(1, 1).expand(2**20, 64))
    assert worth_packing(large, rows=16, tokens=16) and not worth_packing(large, rows=17, tokens=16)
    policy = tiny_policy("llama")
    draw(policy, top_p=0.9, max_new_tokens=16)  # a nucleus reads its own statistics of the head
    assert not packed_heads
    measured = {"packing": 9.0, "packed": 1.0, "plain": 2.0}
    monkeypatch.setattr(grade.sampling.packed_head, "seconds_of", lambda what, ways: measured)
    assert [worth_packing(Head(weight), rows=4, tokens=tokens) for tokens in (1, 11, 12)] == [False, False, True]


# -- the layers' products ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_the_weight_on_the_left_is_the_product(dtype, bias):
    """Of whole numbers exactly, for one position a row; of several it is the layer's own."""
    layer = torch.nn.Linear(24, 40, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_((parameter * 20).round())
    x = torch.randint(-4, 5, (5, 1, 24)).to(dtype)
    several = x.view(1, 5, 24)
    expected, parallel = layer(x), layer(several)
    layer.__class__ = WeightFirst
    assert torch.equal(layer(x), expected) and layer(x).is_contiguous() and layer(x).shape == expected.shape
    assert torch.equal(layer(several), parallel)


@pytest.fixture
def weight_first(monkeypatch):
    """Every layer multiplies with its weight on the left; how often one did."""
    calls, product = [], grade.sampling.few_rows.weight_first
    monkeypatch.setattr(grade.sampling.few_rows, "quickest", lambda what, ways: "weight first")
    monkeypatch.setattr(
        grade.sampling.few_rows, "weight_first", lambda *args: calls.append(args[0].shape) or product(*args)
    )
    return calls


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_weight_on_the_left_samples_the_same(name, weight_first, monkeypatch):
    """Every architecture, with rows that leave the batch; afterwards the layers are as they were."""
    with KeepDouble():
        policy = tiny_policy(name, dtype=torch.float64)
        policy.eos_ids = torch.arange(0, VOCAB, 6)
        ours = draw(policy, copies=4, soft=True)
        assert weight_first or name == "gpt2"  # whose layers are no torch.nn.Linear
        assert not any(isinstance(module, WeightFirst) for module in policy.modules.modules())
        monkeypatch.setattr(grade.sampling.few_rows, "quickest", lambda what, ways: "linear")
        plain = draw(policy, copies=4, soft=True)
    assert torch.equal(ours.tokens, plain.tokens) and torch.equal(ours.mask, plain.mask)
    torch.testing.assert_close(ours.weights[ours.mask], plain.weights[ours.mask], rtol=1e-9, atol=1e-12)


def test_layers_come_back_after_a_failure(weight_first):
    layer = torch.nn.Linear(3, 2)
    quicken(layer)
    before = type(layer)
    with pytest.raises(RuntimeError, match="on the way"), quick_products([layer], rows=4):
        assert type(layer) is WeightFirst
        raise RuntimeError("on the way")
    assert type(layer) is before is not WeightFirst
