"""Layers that read one tensor compute as one product what they compute one by one, and only where they may."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy

import pytest
import torch
from rollouts import PROMPTS, draw
from tiny import CONFIGS, tiny_policy
from torch.utils._python_dispatch import TorchDispatchMode

from grade.model.decoding import decoding
from grade.sampling.compiled import CompiledDecoding


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if name in ("mm", "addmm", "addmm_"):
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


def inputs(policy):
    return policy.embed(torch.tensor([PROMPTS[0], PROMPTS[0][::-1]]))


def states(policy):
    """Hidden states of a pass, and of one token behind its cache."""
    x = inputs(policy)
    cache = policy.new_cache(x.shape[1] + 1)
    return torch.cat([policy.hidden(x, None, cache), policy.hidden(x[:, :1], None, cache)], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("name", [*CONFIGS, "deepseek-v3", "llama4"])
def test_joined_layers_round_no_more_than_layers(name):
    """Against float32 arithmetic with the same 16-bit weights."""
    policy, exact = tiny_policy(name, dtype=torch.bfloat16), tiny_policy(name)
    for parameter, rounded in zip(exact.model.parameters(), policy.model.parameters(), strict=True):
        parameter.copy_(rounded)
    expected, beside = states(exact), states(policy)
    with decoding(policy):
        joined = states(policy)
    ours, theirs = ((x.float() - expected).norm() / expected.norm() for x in (joined, beside))
    assert ours <= 1.5 * theirs < 0.1
    assert torch.equal(states(policy), beside)  # what was joined is apart again


@torch.no_grad()
def test_products_of_a_layer():
    """Of queries, keys and values three, of the attention's output three, of gate and up one, and of down one: the
    adapters of q, k, v and o took two each."""
    policy = tiny_policy("llama", dtype=torch.bfloat16)
    x, layers = inputs(policy), 2
    counts = {}
    for name, state in (("beside", policy.state(adapters=True)), ("joined", decoding(policy))):
        with state:
            policy.hidden(x, None)
            with Products() as products:
                policy.hidden(x, None)
        counts[name] = products.found
    assert counts["beside"].total() == layers * (4 * 3 + 3)
    assert counts["joined"] == {"mm": layers * (2 + 2 + 1 + 1), "addmm_": layers * 2}


@torch.no_grad()
def test_weights_stay_what_they_were():
    policy = tiny_policy("llama", dtype=torch.bfloat16)
    before = {name: p.clone() for name, p in policy.model.state_dict().items()}
    with decoding(policy):
        policy.hidden(inputs(policy), None)
    places = [p.data_ptr() for p in policy.model.parameters()]
    with decoding(policy):  # where weights lie may have been recorded
        assert places == [p.data_ptr() for p in policy.model.parameters()]
    after = policy.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.is_contiguous() for p in policy.model.parameters())


@torch.no_grad()
def test_a_copied_policy_joins_its_own():
    """And keeps nothing of the first one's, whose weights would be there twice."""
    policy = tiny_policy("llama", dtype=torch.bfloat16)
    with decoding(policy):
        expected = policy.hidden(inputs(policy), None)
    copied = deepcopy(policy)
    assert policy.joined is not None and copied.joined is None
    with decoding(copied), Products() as products:
        assert torch.equal(copied.hidden(inputs(copied), None), expected)
    assert products.found["addmm_"]


@torch.no_grad()
def test_the_adapter_is_the_one_of_now():
    policy = tiny_policy("llama", dtype=torch.bfloat16)
    with decoding(policy):
        first = policy.hidden(inputs(policy), None)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.mul_(-1)
    with decoding(policy):
        second = policy.hidden(inputs(policy), None)
    apart = policy.hidden(inputs(policy), None)
    assert (second - first).norm() > 10 * (second - apart).norm()


def test_passes_of_another_kind_are_apart():
    """The base, one with a graph, and one with dropout; in the middle of decoding too."""
    policy = tiny_policy("llama", dtype=torch.bfloat16, dropout=0.5)
    x = inputs(policy)
    with torch.no_grad(), policy.state(adapters=False):
        base = policy.hidden(x, None)
    with policy.state(adapters=True):
        with_graph = policy.hidden(x, None)
    with decoding(policy):
        with torch.no_grad(), policy.state(adapters=False):
            assert torch.equal(policy.hidden(x, None), base)
        again = policy.hidden(x, None)
        gradients = torch.autograd.grad(again.float().square().sum(), policy.parameters())
        with torch.no_grad(), policy.state(adapters=True, dropout=True):
            assert not torch.equal(policy.hidden(x, None), policy.hidden(x, None))
    assert torch.equal(again, with_graph) and all(bool(g.any()) for g in gradients)


@torch.no_grad()
@pytest.mark.parametrize("part", ["base_layer", "lora_A"])
def test_a_layer_that_somebody_listens_to_is_called(part):
    policy = tiny_policy("llama", dtype=torch.bfloat16)
    heard = []
    layer = policy.adapter_layers[0]
    module = getattr(layer, part)["default"] if part == "lora_A" else getattr(layer, part)
    hook = module.register_forward_hook(lambda *_: heard.append(part))
    with decoding(policy):
        policy.hidden(inputs(policy), None)
    count = len(heard)
    hook.remove()
    with decoding(policy):
        policy.hidden(inputs(policy), None)
    assert count and len(heard) == count


@torch.no_grad()
def test_weights_that_were_replaced_or_merged_are_read():
    """By peft's own merging, and by anyone who puts another tensor in a weight's place."""
    policy = tiny_policy("llama", dtype=torch.bfloat16)
    with decoding(policy):
        policy.hidden(inputs(policy), None)
    weight = policy.adapter_layers[0].get_base_layer().weight
    weight.data = weight.data * 2
    expected = policy.hidden(inputs(policy), None)
    with decoding(policy):
        found = policy.hidden(inputs(policy), None)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    policy.model.merge_adapter()
    expected = policy.hidden(inputs(policy), None)
    with decoding(policy):
        torch.testing.assert_close(policy.hidden(inputs(policy), None), expected, rtol=0.05, atol=0.05)


@torch.no_grad()
def test_layers_between_which_their_input_changes_are_not_joined():
    """Found by the probe, when layers are joined for the first time."""
    policy = tiny_policy("llama", dtype=torch.bfloat16)
    attention = policy.backbone.layers[0].self_attn
    own = attention.v_proj.forward

    def doubled(module, args):
        args[0].mul_(2)

    attention.v_proj.register_forward_pre_hook(doubled)
    expected = policy.hidden(inputs(policy), None)
    with decoding(policy):
        assert torch.equal(policy.hidden(inputs(policy), None), expected)
    assert attention.v_proj.forward == own


def test_whole_weights_are_merged_unless_they_are_recorded():
    policy = tiny_policy("llama")
    x = inputs(policy)
    with torch.no_grad():
        expected = policy.hidden(x, None)
        with decoding(policy, recorded=True):
            recorded = [p.data_ptr() for p in policy.model.parameters()]
            torch.testing.assert_close(policy.hidden(x, None), expected, rtol=1e-5, atol=1e-5)
        with decoding(policy):
            assert recorded != [p.data_ptr() for p in policy.model.parameters()]
            torch.testing.assert_close(policy.hidden(x, None), expected, rtol=1e-5, atol=1e-5)
        with decoding(policy, recorded=True):
            assert recorded == [p.data_ptr() for p in policy.model.parameters()]
            torch.testing.assert_close(policy.hidden(x, None), expected, rtol=1e-5, atol=1e-5)


def test_a_compiled_step_of_joined_layers_is_one_graph(monkeypatch):
    compiled, graphs = torch.compile, []

    def backend(graph, _):
        graphs.append(Counter(getattr(node.target, "__name__", "") for node in graph.graph.nodes))
        return graph

    monkeypatch.setattr(
        torch, "compile", lambda call, **_: compiled(call, dynamic=False, fullgraph=True, backend=backend)
    )
    monkeypatch.setattr("grade.sampling.compiled._find_compiler", lambda: None)
    torch._dynamo.reset()
    policy = tiny_policy("llama", dtype=torch.bfloat16)
    plain = draw(policy, max_new_tokens=6)
    step = CompiledDecoding(policy)
    found = draw(policy, max_new_tokens=6, decoding=step)
    assert torch.equal(found.tokens, plain.tokens)
    assert [graph["linear"] for graph in graphs] == [2 * (2 + 2 + 1 + 1)]  # of two layers
