"""`rollout.compile` samples what plain decoding samples."""

from __future__ import annotations

import math
import shutil
import sys
import sysconfig
from dataclasses import replace

import pytest
import torch
from rollouts import PROMPTS
from tiny import KeepDouble, tiny_policy
from torch._dynamo.utils import counters
from transformers import StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import grade.sampling.compiled
import grade.sampling.grouped_attention
from grade.errors import GradeError
from grade.memory.peak import peak_bytes
from grade.rollout import pad_prompts
from grade.sampling.compiled import CompiledDecoding
from grade.sampling.draw import Sampling, draw_from_product, suppressed_ids
from grade.sampling.sample import sample

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "c++", "clang++")), reason="needs a C++ compiler"
)


@needs_compiler
def test_compiled_decoding_is_decoding():
    """With padding and several samples; again with other weights and prompts, and for the base, in the same cache."""
    torch._dynamo.reset()
    with KeepDouble():
        policy = tiny_policy("llama", dtype=torch.float64)
        decoding = CompiledDecoding(policy)
        counters.clear()
        for tau, prompts, adapters in ((1.0, PROMPTS, True), (0.5, PROMPTS[::-1], True), (0.7, PROMPTS, False)):
            ids, mask = pad_prompts(prompts, policy.pad_id)
            rows = torch.arange(2 * len(prompts)) * 100
            draw = dict(seed=0, first_rows=rows, samples_per_prompt=2, adapters=adapters)
            sampling = Sampling(max_new_tokens=6, top_k=7, soft=True, tau=tau)
            plain = sample(policy, ids, mask, sampling, **draw)
            ours = sample(policy, ids, mask, sampling, decoding=decoding, **draw)
            assert torch.equal(plain.tokens, ours.tokens) and torch.equal(plain.mask, ours.mask)
            assert (plain.weights - ours.weights)[plain.mask].abs().max() < 1e-9
            assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
            with torch.no_grad():
                for parameter in policy.parameters():
                    parameter += 0.1 * torch.randn_like(parameter)
    assert decoding.places(1, 1) is decoding.places(1, 64) is not decoding.places(1, 65)
    assert decoding.places(1, 65) is decoding.places(1, 64) is not decoding.places(2, 64)


class Peaks(list):
    """Of every call of a graph.

    Attributes:
        graphs: themselves.
        moving: inputs of theirs that the compiler expects anywhere.
        addresses: of all a graph was given, by graph one set of them for every call.
    """

    def __init__(self):
        self.graphs, self.moving, self.addresses = [], [], []


@pytest.fixture
def traced(monkeypatch):
    """Graphs are recorded, but no code is made of them; the peaks of what they hold while they run, in bytes."""
    compiled, peaks = torch.compile, Peaks()

    def backend(graph, _):
        given = graph.graph.find_nodes(op="placeholder")
        peaks.graphs.append(graph.graph)
        peaks.moving += [x.name for x in given if not x.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")]
        addresses = set()
        peaks.addresses.append(addresses)

        def run(*arguments):
            addresses.add(tuple(x.data_ptr() for x in arguments if isinstance(x, torch.Tensor)))
            result, peak = peak_bytes(lambda: graph(*arguments), torch.device("cpu"))
            peaks.append(peak)
            return result

        return run

    monkeypatch.setattr(torch, "compile", lambda call, **_: compiled(call, dynamic=False, backend=backend))
    monkeypatch.setattr(grade.sampling.compiled, "_find_compiler", lambda: None)
    torch._dynamo.reset()
    return peaks


def test_batches_that_alternate_are_recorded_once(traced):
    """As do the full batches of a step and what is left, step and draw of each; the shape that was not used for longest
    makes room."""
    decoding = CompiledDecoding(tiny_policy("llama"))
    counters.clear()
    graphs = []
    for size in (4, 1, 4, 1, 4):
        ids, mask = pad_prompts(PROMPTS[:size], decoding.policy.pad_id)
        rows = torch.arange(size) * 100
        sample(decoding.policy, ids, mask, Sampling(3, top_k=7), seed=0, first_rows=rows, decoding=decoding)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [2, 4, 4, 4, 4] and not counters["graph_break"]
    with torch.inference_mode():
        one, four = decoding.places(1, 9), decoding.places(4, 9)
        three = decoding.places(3, 9)
        assert decoding.places(4, 9) is four and decoding.places(3, 9) is three
        assert decoding.places(1, 9) is not one and decoding.places(3, 9) is three and decoding.places(4, 9) is not four


def _as_transformers(module, query, key, value, mask, **options):
    """The filled part of the cache, by transformers' own attention."""
    key, value = (x[:, :, : mask.shape[-1]] for x in (key, value))
    return sdpa_attention_forward(module, query, key, value, mask, **options)


def test_the_compiled_step_reads_the_filled_part_only(traced, monkeypatch):
    """In one graph for every length; and what it was compiled for is compared at a rollout's first token only."""
    checked, stance = [], torch.compiler.set_stance
    monkeypatch.setattr(torch.compiler, "set_stance", lambda **how: checked.append(how) or stance(**how))
    decoding = CompiledDecoding(tiny_policy("llama"))
    ids, mask = pad_prompts(PROMPTS, decoding.policy.pad_id)
    counters.clear()
    checked.clear()
    for start in (0, 1000):
        rows = start + torch.arange(len(PROMPTS)) * 100
        sample(decoding.policy, ids, mask, Sampling(9, top_k=7), seed=0, first_rows=rows, decoding=decoding)
    assert counters["stats"]["unique_graphs"] == 2 == len(traced.graphs)  # the draw and the step
    calls = [node for graph in traced.graphs for node in graph.nodes if node.op == "call_function"]
    nodes = [node for node in calls if "scaled_dot_product_attention" in str(node.target)]
    read = [node.args[1].meta["example_value"] for node in nodes]
    assert len(read) == 2 and all(isinstance(keys.shape[2], torch.SymInt) for keys in read)  # of each layer
    assert checked.count({"skip_guard_eval_unsafe": True}) >= 2 * (9 - 1 - 1)


def test_the_compiled_step_copies_no_keys(traced, monkeypatch):
    """Two query heads share each key and value head; transformers would copy both for each, in every layer."""
    policy = tiny_policy("llama")
    sampling = Sampling(3, top_k=7, ignore_eos=True)
    ids, mask = pad_prompts([list(range(4, 54 - short)) for short in range(len(PROMPTS))], policy.pad_id)
    draw = dict(seed=0, first_rows=torch.arange(len(PROMPTS)) * 100)
    plain, held = sample(policy, ids, mask, sampling, **draw), {}
    for name in ("ours", "transformers"):
        if name == "transformers":
            monkeypatch.setattr(grade.sampling.grouped_attention, "grouped_sdpa", _as_transformers)
        traced.clear()
        decoding = CompiledDecoding(policy)
        rollout = sample(policy, ids, mask, sampling, decoding=decoding, **draw)
        assert torch.equal(rollout.tokens, plain.tokens)
        held[name] = max(traced)
    half_the_heads = policy.embedding.shape[1] // 2
    filled = ids.shape[1] + 1
    keys = 4 * half_the_heads * len(PROMPTS) * filled  # bytes, at the first token
    assert held["ours"] < keys / 2  # of one layer, of which two copies of twice the size are saved
    assert held["transformers"] > 2 * 2 * keys


@needs_compiler
def test_the_compiled_draw_is_the_draw(packed_heads):
    """From a packed head with all it can have, for suppressed ids and temperatures that change. Token by token from the
    same product: soft tokens that are fed back would carry the compiler's rounding on and enlarge it."""
    torch._dynamo.reset()
    counters.clear()
    policy = tiny_policy("llama", unknown=3)
    policy.head = replace(policy.head, bias=torch.linspace(-1, 1, policy.vocab_size), scale=0.3, softcap=2.0)
    eps, compared = torch.finfo(torch.float32).eps, []

    class Noting(CompiledDecoding):
        def _product(self, hidden, sampling):
            product = super()._product(hidden, sampling)
            compared.append(product.clone())
            return product

    decoding = Noting(policy)
    ids, mask = pad_prompts(PROMPTS, policy.pad_id)
    graphs = []
    for tau, soft in ((2.0, False), (1.5, True), (1.0, True)):
        early = 0 if soft else 4
        sampling = Sampling(max_new_tokens=16, min_new_tokens=early, top_k=9, tau=tau, soft=soft)
        rows = torch.arange(len(PROMPTS)) * 100
        compared.clear()
        ours = sample(policy, ids, mask, sampling, seed=0, first_rows=rows, decoding=decoding)
        assert len(compared) == 16
        suppressed = suppressed_ids(policy, early, False)
        for step, product in enumerate(compared[: ours.tokens.shape[1]]):
            noise = {"seed": 0, "rows": rows + step, "suppress": suppressed(step)}
            with torch.inference_mode():  # as the product was made
                plain = draw_from_product(policy, product, sampling, **noise)
            real = ours.mask[:, step]
            assert torch.equal(plain.tokens[real], ours.tokens[real, step])
            assert torch.equal(plain.indices[real], ours.indices[real, step])
            # Some eight roundings of logits and noise below 20, which a softmax over tau at most doubles.
            bound = plain.weights * math.expm1(2 * 8 * eps * 20 / tau) + eps
            if soft:
                assert ((ours.weights[:, step] - plain.weights).abs() <= bound)[real].all()
            chosen = (plain.indices == plain.tokens[:, None]).nonzero(as_tuple=True)
            assert ((ours.token_weight[:, step] - plain.weights[chosen]).abs() <= bound[chosen])[real].all()
        graphs.append(counters["stats"]["unique_graphs"])
    assert packed_heads == [len(PROMPTS)] * (16 * 3)
    # The model and two sets of suppressed ids; the same for mixtures, with one set; and no more for any temperature.
    assert graphs == [3, 5, 5] and not counters["graph_break"]


def test_more_shapes_than_torch_compiles_for_are_compiled(traced):
    """Growing lengths and the trainings of one process; where torch stops compiling, the tokens that follow fail."""
    torch._dynamo.reset()
    policy = tiny_policy("llama")
    decoding = CompiledDecoding(policy, one_graph=True)
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1):
        for number in (1, 2):
            ids, mask = pad_prompts(PROMPTS[:number], policy.pad_id)
            draw = dict(seed=0, first_rows=torch.arange(number) * 100, decoding=decoding)
            sample(policy, ids, mask, Sampling(max_new_tokens=4, top_k=7, ignore_eos=True), **draw)
    assert counters["stats"]["unique_graphs"] == 2 and len(traced) == 2 * 3


def test_a_nucleus_adds_up_what_may_not_be_drawn_once():
    with KeepDouble():
        policy = tiny_policy("llama", unknown=3, dtype=torch.float64)
        policy.eos_ids = torch.arange(0, policy.vocab_size, 6)
        decoding = CompiledDecoding(policy, one_graph=True)
        decoding._token = decoding._next_token  # what is compiled computes the same
        ids, mask = pad_prompts(PROMPTS, policy.pad_id)
        draw = dict(seed=5, first_rows=torch.arange(len(PROMPTS)) * 100)
        sampling = Sampling(max_new_tokens=4, min_new_tokens=3, top_k=7, top_p=0.8)
        plain = sample(policy, ids, mask, sampling, **draw)
        ours = sample(policy, ids, mask, sampling, decoding=decoding, **draw)
    assert torch.equal(plain.tokens, ours.tokens) and torch.equal(plain.mask, ours.mask)
    torch.testing.assert_close(plain.token_weight[plain.mask], ours.token_weight[plain.mask], rtol=1e-9, atol=1e-12)


def test_the_probe_decodes_as_the_graph_does(monkeypatch):
    """Over the whole cache, of which a mask says what is filled."""
    policy, widths = tiny_policy("llama"), []
    own = policy.forward

    def forward(embeddings, mask, positions, cache):
        if isinstance(cache, StaticCache):
            widths.append(mask.shape[-1] / cache.layers[0].max_cache_len)
        return own(embeddings, mask, positions, cache)

    monkeypatch.setattr(policy, "forward", forward)
    CompiledDecoding(policy, one_graph=True)
    assert widths and set(widths) == {1.0}


@pytest.mark.parametrize("one_graph", [False, True])
def test_a_temperature_that_is_none_is_refused(one_graph):
    policy = tiny_policy("llama")
    decoding = CompiledDecoding(policy, one_graph=one_graph)
    ids, mask = pad_prompts(PROMPTS, policy.pad_id)
    with pytest.raises(ValueError, match="tau must be a finite number above 0"):
        sample(policy, ids, mask, Sampling(4, top_k=7, tau=0.0), seed=0, first_rows=torch.arange(4), decoding=decoding)


@pytest.mark.parametrize("soft, unknown, graphs", [(False, 3, 1), (True, 0, 2)])
def test_a_token_is_one_graph_that_stays_in_its_memory(traced, soft, unknown, graphs):
    """On a GPU it is recorded: what it reads and writes lies where it lay in the rollout before, and the compiler knows
    that of all of it. The first tokens may not end a response; where nothing else is suppressed they have a graph of
    their own."""
    with KeepDouble():
        policy = tiny_policy("llama", unknown=unknown, dtype=torch.float64)
        policy.eos_ids = torch.arange(0, policy.vocab_size, 6)
        decoding = CompiledDecoding(policy, one_graph=True)
        counters.clear()
        kept = []
        for tau, prompts in ((0.7, PROMPTS), (1.0, PROMPTS[::-1])):
            ids, mask = pad_prompts(prompts, policy.pad_id)
            draw = dict(seed=5, first_rows=torch.arange(len(prompts)) * 100)
            sampling = Sampling(max_new_tokens=7, min_new_tokens=3, top_k=7, tau=tau, soft=soft)
            plain = sample(policy, ids, mask, sampling, **draw)
            ours = sample(policy, ids, mask, sampling, decoding=decoding, **draw)
            kept.append((ours, ours.tokens.clone(), ours.token_weight.clone()))
            assert torch.equal(plain.tokens, ours.tokens) and torch.equal(plain.mask, ours.mask)
            assert torch.equal(plain.indices[plain.mask], ours.indices[plain.mask])
            torch.testing.assert_close(plain.token_weight, ours.token_weight, rtol=1e-9, atol=1e-12)
            if soft:
                torch.testing.assert_close(plain.weights[plain.mask], ours.weights[plain.mask], rtol=1e-9, atol=1e-12)
    assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]
    assert len(traced) == 2 * (7 - 1) and [len(places) for places in traced.addresses] == [1] * graphs
    assert not traced.moving
    for rollout, tokens, weight in kept:  # of its own
        assert torch.equal(rollout.tokens, tokens) and torch.equal(rollout.token_weight, weight)


@pytest.mark.parametrize(
    "name, attention, message",
    [
        ("gemma2", "sdpa", "layers that keep something else than all earlier positions .sliding_attention."),
        ("llama", "eager", "set model.attn_implementation=sdpa"),
    ],
)
def test_what_cannot_be_compiled_is_refused(name, attention, message):
    policy = tiny_policy(name)
    policy.config._attn_implementation = attention
    with pytest.raises(GradeError, match=rf"(?i)rollout\.compile: .*{message}"):
        CompiledDecoding(policy)


def test_a_missing_compiler_is_told_at_once(monkeypatch):
    def missing():
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr(grade.sampling.compiled, "_find_compiler", missing)
    with pytest.raises(GradeError, match=r"rollout\.compile: torch\.compile failed \(no working C\+\+ compiler\)"):
        CompiledDecoding(tiny_policy("llama"))


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch looks for headers in other places too")
def test_missing_headers_are_told_at_once(monkeypatch, tmp_path):
    """A C++ compiler is often there without them; `auto` decodes plainly then, and does not end at the first step."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(GradeError, match=r"rollout\.compile: torch\.compile failed \(.*Python\.h is missing"):
        CompiledDecoding(tiny_policy("llama"))


@needs_compiler
@pytest.mark.parametrize("part", ["_states", "_finish", "_token"])
def test_a_failing_compiler_is_told(monkeypatch, part, packed_heads):
    policy = tiny_policy("llama")
    decoding = CompiledDecoding(policy, one_graph=part == "_token")

    def fail(*_, **__):
        raise torch._dynamo.exc.BackendCompilerFailed(lambda: None, RuntimeError("no C++ compiler"), None)

    monkeypatch.setattr(decoding, "_finish", decoding._note, raising=False)
    monkeypatch.setattr(decoding, part, fail)
    ids, mask = pad_prompts(PROMPTS, policy.pad_id)
    with pytest.raises(GradeError, match=r"rollout\.compile: torch\.compile failed"):
        sample(
            policy,
            ids,
            mask,
            Sampling(max_new_tokens=16, top_k=3),
            seed=0,
            first_rows=torch.arange(len(PROMPTS)),
            decoding=decoding,
        )
    assert packed_heads or part == "_token"
