"""The policy's contract with transformers: probes, refusals, the adapter and dropout switches, recomputation."""

from __future__ import annotations

import copy
import functools
import math
import warnings

import pytest
import torch
from tiny import (
    CONFIGS,
    EOS,
    LLAMA_SIZES,
    SIZES,
    TARGETS,
    VOCAB,
    KeepDouble,
    TinyTokenizer,
    base_model,
    embeddings_of,
    loaded_policy,
    policy_around,
    tiny_policy,
    tiny_reward,
)
from transformers import CohereConfig, FalconConfig, GraniteConfig, PhiConfig

from grade.errors import GradeError
from grade.replay.replay import ReplaySettings, replay
from grade.rollout import pad_prompts
from grade.sampling.draw import Sampling
from grade.sampling.sample import sample
from grade_kernels import vocab_head

DTYPES = [torch.float32, torch.bfloat16]


# -- probes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_probes_find_embedding_scale_logit_scale_and_cap(name, dtype):
    policy = policy_around(base_model(CONFIGS[name](), dtype), TARGETS.get(name))
    if name == "gemma2":
        scale = torch.tensor(math.sqrt(LLAMA_SIZES["hidden_size"])).to(dtype).item()
        assert (policy.embedding_scale, policy.head.scale, policy.head.softcap) == (scale, 1.0, 3.0)
    else:
        assert (policy.embedding_scale, policy.head.scale, policy.head.softcap) == (1.0, 1.0, None)


SCALED = {
    "cohere": (CohereConfig(**SIZES, **LLAMA_SIZES, num_key_value_heads=2, logit_scale=0.07), 0.07),
    "granite": (
        GraniteConfig(
            **SIZES,
            **LLAMA_SIZES,
            num_key_value_heads=2,
            logits_scaling=7.0,
            embedding_multiplier=12.0,
            residual_multiplier=0.22,
            attention_multiplier=0.3,
        ),
        1 / 7,
    ),
}


def biased():
    base = base_model(PhiConfig(**SIZES, **LLAMA_SIZES))
    torch.nn.init.normal_(base.lm_head.bias)
    return base


@pytest.mark.parametrize("name", [*CONFIGS, *SCALED, "biased"])
def test_embedding_and_head_are_the_models_own(name):
    """With the logit scale that is found, and the bias: what replay's sweep says is what the model's own logits say."""
    config, scale = SCALED.get(name, (None, 1.0))
    base = biased() if name == "biased" else base_model(config or CONFIGS[name]())
    policy = policy_around(base, TARGETS.get(name))
    assert policy.head.scale == scale and (policy.head.bias is not None) == (name == "biased")
    ids = torch.arange(10)[None] * 7 % VOCAB
    assert torch.equal(policy.embed(ids), policy.causal_lm.get_input_embeddings()(ids))
    with torch.no_grad():
        hidden = policy.hidden(policy.embed(ids), torch.ones_like(ids, dtype=torch.bool))
        logits = policy.causal_lm(input_ids=ids, use_cache=False).logits
    out = vocab_head(hidden, policy.head, k=VOCAB, tokens=ids)
    assert torch.allclose(out.logits, logits.gather(-1, out.indices), rtol=1e-4, atol=1e-4)
    assert torch.allclose(out.logprob, logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0], rtol=1e-4, atol=1e-4)


# -- refusals ------------------------------------------------------------------------------------------------------


def square_logits(base):
    base.lm_head.register_forward_hook(lambda module, args, out: out**2)


def shift_embedding(base):
    base.get_input_embeddings().register_forward_hook(lambda module, args, out: out + 0.5)


def look_ahead(base):
    def hook(module, args, kwargs, out):
        out.last_hidden_state = out.last_hidden_state + out.last_hidden_state.mean(1, keepdim=True)

    base.base_model.register_forward_hook(hook, with_kwargs=True)


def treat_ids_specially(base):
    def hook(module, args, kwargs, out):
        if kwargs.get("input_ids") is not None:
            out.last_hidden_state = -out.last_hidden_state

    base.base_model.register_forward_hook(hook, with_kwargs=True)


def misuse_cache(base):
    def hook(module, args, kwargs, out):
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # its name from transformers 5.24 on, and before
        if cache is not None and cache.get_seq_length() > 6:
            out.last_hidden_state = out.last_hidden_state * 2

    base.base_model.register_forward_hook(hook, with_kwargs=True)


def lose_padded_rows(base):
    """What attention with nothing to attend to gives."""

    def hook(module, args, kwargs, out):
        mask = kwargs.get("attention_mask")
        if mask is not None and not mask.all():
            out.last_hidden_state = out.last_hidden_state * torch.nan

    base.base_model.register_forward_hook(hook, with_kwargs=True)


def ignore_positions(base):
    original = base.transformer.forward

    @functools.wraps(original)
    def forward(*args, position_ids=None, **kwargs):
        return original(*args, **kwargs)

    base.transformer.forward = forward


def fail_with_a_cache(base):
    """Its own error becomes one sentence."""

    def hook(module, args, kwargs):
        if kwargs.get("use_cache"):
            raise RuntimeError("no cache in this one\nand more")

    base.base_model.register_forward_pre_hook(hook, with_kwargs=True)


def need_ids(base):
    def hook(module, args, kwargs):
        if kwargs.get("input_ids") is None:
            raise AttributeError("'NoneType' object has no attribute 'reshape'")

    base.base_model.register_forward_pre_hook(hook, with_kwargs=True)


REFUSALS = [
    ("llama", square_logits, "in its head"),
    ("gemma2", square_logits, "in its head"),
    ("llama", shift_embedding, "input embedding"),
    ("gemma2", shift_embedding, "input embedding"),
    ("llama", look_ahead, "not causal"),
    ("llama", treat_ids_specially, "inputs_embeds"),
    ("llama", misuse_cache, "KV cache"),
    ("gpt2", ignore_positions, "left padding"),
    ("llama", lose_padded_rows, "left padding"),
    ("llama", fail_with_a_cache, r"cannot run .*\(no cache in this one and more\)\."),
    ("llama", need_ids, "reads the ids beside their embeddings"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, spoil, reason", REFUSALS, ids=lambda x: getattr(x, "__name__", None))
def test_models_outside_the_contract_are_refused_by_name(name, spoil, reason, dtype):
    """In bfloat16 too, where rounding is coarse."""
    base = base_model(CONFIGS[name](), dtype)
    spoil(base)
    with pytest.raises(GradeError, match=f"{type(base).__name__}.*{reason}"):
        policy_around(base, TARGETS.get(name))


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_adapters_on_head_or_embedding_are_refused(target):
    with pytest.raises(GradeError, match="model.lora.target_modules"):
        policy_around(base_model(CONFIGS["llama"]()), ["q_proj", target])


# -- tokenizer and end of sequence ---------------------------------------------------------------------------------


def test_suppressed_ids_are_those_the_tokenizer_does_not_know():
    policy = policy_around(base_model(CONFIGS["llama"]()), tokenizer=TinyTokenizer(unknown=4))
    assert policy.suppressed.tolist() == [57, 58, 59, 60] and policy.suppressed.dtype == torch.int64

    class Gaps(TinyTokenizer):
        def get_vocab(self):
            known = {name: i for name, i in super().get_vocab().items() if i not in (7, 30)}
            return {**known, "<beyond the head>": VOCAB + 5}

    assert policy_around(base_model(CONFIGS["llama"]()), tokenizer=Gaps()).suppressed.tolist() == [7, 30]
    assert tiny_policy().suppressed.numel() == 0


def test_a_model_without_eos_is_refused_and_pad_falls_back_to_eos():
    class Bare(TinyTokenizer):
        pad_token_id = eos_token_id = None

    base = base_model(CONFIGS["llama"]())
    assert policy_around(base, tokenizer=Bare()).pad_id == EOS
    base = base_model(CONFIGS["llama"]())
    base.generation_config.eos_token_id = base.config.eos_token_id = None
    with pytest.raises(GradeError, match="end-of-sequence"):
        policy_around(base, tokenizer=Bare())


# -- padding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_left_padding_does_not_change_logits(name):
    """Rows of 9, 5 and 1 tokens in one batch, each against itself alone, whatever stands in the padding."""
    with KeepDouble(), torch.no_grad():
        policy = tiny_policy(name, dtype=torch.float64)
        prompts = [[5, 9, 2, 7, 11, 13, 17, 19, 4], [6, 8, 10, 12, 14], [23]]
        ids, mask = pad_prompts(prompts, 0)
        for filler in (0, 40):
            filled = torch.where(mask, ids, filler)
            logits = policy.causal_lm.get_output_embeddings()(policy.hidden(policy.embed(filled), mask))
            for row, prompt in enumerate(prompts):
                hidden = policy.backbone(input_ids=torch.tensor([prompt]), use_cache=False).last_hidden_state
                expected = policy.causal_lm.get_output_embeddings()(hidden)[0]
                assert (logits[row, -len(prompt) :] - expected).abs().max() < 1e-11 * expected.abs().max()


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_segments_equal_one_pass(name):
    with KeepDouble(), torch.no_grad():
        policy = tiny_policy(name, dtype=torch.float64)
        ids, mask = pad_prompts([list(range(4, 15)), [9, 3, 20]], 0)
        x, cache = policy.embed(ids), policy.new_cache()
        pieces = [policy.hidden(x[:, a:b], mask[:, :b], cache) for a, b in ((0, 8), (8, 9), (9, 11))]
        whole = policy.hidden(x, mask)
        assert (torch.cat(pieces, 1) - whole)[mask].abs().max() < 1e-11 * whole.abs().max()


# -- state ---------------------------------------------------------------------------------------------------------


def switches(policy):
    """Everything `state` may touch: adapter switches, and the training flag of every module."""
    adapters = [layer._disable_adapters for layer in policy.adapter_layers]
    return adapters, [module.training for module in policy.model.modules()]


@torch.no_grad()
def test_adapters_off_is_the_bare_base_model_exactly():
    base = base_model(CONFIGS["llama"]())
    bare = copy.deepcopy(base)
    policy = policy_around(base)
    x, mask = embeddings_of(policy)
    expected = bare.base_model(inputs_embeds=x, use_cache=False).last_hidden_state
    with policy.state(adapters=False):
        assert torch.equal(policy.hidden(x, mask), expected)
    assert (policy.hidden(x, mask) - expected).abs().max() > 0.1


@torch.no_grad()
def test_state_nests_and_is_restored():
    policy = tiny_policy(dropout=0.5)
    x, mask = embeddings_of(policy)

    def now():
        torch.manual_seed(0)
        return policy.hidden(x, mask)

    on, before = now(), switches(policy)
    with policy.state(adapters=False):
        off = now()
        with policy.state(adapters=True):
            assert torch.equal(now(), on)
            with policy.state(adapters=True, dropout=True):
                dropped = now()
                with policy.state(adapters=False, dropout=True):
                    assert torch.equal(now(), off)  # dropout is the adapter's
                assert torch.equal(now(), dropped)
            assert torch.equal(now(), on)
        assert torch.equal(now(), off)
    assert torch.equal(now(), on) and switches(policy) == before
    assert not torch.equal(on, off) and not torch.equal(on, dropped)
    with pytest.raises(ZeroDivisionError), policy.state(adapters=False, dropout=True):
        raise ZeroDivisionError
    assert torch.equal(now(), on) and switches(policy) == before


def test_state_never_changes_requires_grad():
    """Autograd drops the gradient of a leaf whose flag is down during a recomputation."""
    policy = tiny_policy(dropout=0.5)
    expected = [p.requires_grad for p in policy.model.parameters()]
    assert policy.parameters() and len(policy.parameters()) < len(expected)
    for adapters in (True, False):
        for dropout in (True, False):
            with policy.state(adapters=adapters, dropout=dropout):
                assert [p.requires_grad for p in policy.model.parameters()] == expected
    assert [p.requires_grad for p in policy.model.parameters()] == expected


# -- checkpointing -------------------------------------------------------------------------------------------------


def checkpointed(name="llama", **options):
    policy = tiny_policy(name, **options)
    policy.enable_activation_checkpointing()
    return policy


def count_recomputations(policy):
    """A list that grows by one whenever attention runs in the first layer."""
    calls = []
    attention = next(m for n, m in policy.model.named_modules() if n.endswith(("layers.0.self_attn", "h.0.attn")))
    attention.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "gemma2", "qwen3"])
def test_checkpointing_leaves_training_flags_down(name):
    policy = checkpointed(name, dropout=0.5)
    x, mask = embeddings_of(policy)
    before = switches(policy)
    assert not any(before[1])
    with policy.state(adapters=True, activation_checkpointing=True):
        policy.hidden(x.requires_grad_(), mask).sum().backward()
        with policy.state(adapters=True, activation_checkpointing=False):
            assert switches(policy) == before
        with policy.state(adapters=True, activation_checkpointing=True):
            pass
        assert switches(policy) != before  # an inner state gives the outer one back
    assert switches(policy) == before
    with pytest.raises(RuntimeError), policy.state(adapters=False, activation_checkpointing=True):
        policy.hidden(x[..., :5], mask)
    assert switches(policy) == before


def test_models_without_checkpointed_layers_are_refused():
    policy = tiny_policy()
    policy.causal_lm.supports_gradient_checkpointing = False
    with pytest.raises(GradeError, match="activation_checkpointing.*LlamaForCausalLM"):
        policy.enable_activation_checkpointing()


def test_policy_recomputed_while_adapters_are_off_and_dropout_stands_otherwise():
    """Adapter dropout on, random state fixed: gradients of input and parameters are those of the forward's masks."""
    policy = checkpointed(dropout=0.5)
    x, mask = embeddings_of(policy)
    x.requires_grad_()
    calls = count_recomputations(policy)

    def gradients(checkpoint, dropout=True):
        torch.manual_seed(3)
        with policy.state(adapters=True, dropout=dropout, activation_checkpointing=checkpoint):
            hidden = policy.hidden(x, mask)
        torch.manual_seed(99)
        with policy.state(adapters=False):
            return torch.autograd.grad(hidden.square().sum(), [x, *policy.parameters()])

    plain, recomputed, without = gradients(False), gradients(True), gradients(True, dropout=False)
    assert len(calls) == 5
    for value, expected in zip(recomputed, plain, strict=True):
        assert torch.allclose(value, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())
    assert (without[0] - plain[0]).norm() > 0.01 * plain[0].norm()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("reads", ["prompt+response", "response"])
def test_replay_with_and_without_checkpointing(name, reads):
    """The whole gradient: policy with adapters, base and reward without, one set of weights."""
    policy = checkpointed(name)
    reward = tiny_reward(policy, reads)
    ids, mask = pad_prompts([[5, 9, 2], [7]], policy.pad_id)
    rollout = sample(policy, ids, mask, Sampling(6, top_k=7), seed=0, first_rows=torch.tensor([0, 50]))
    vectors = []
    for checkpoint in (False, True):
        settings = ReplaySettings(tau=1.0, hop_tol=0.0, max_hops=3, activation_checkpointing=checkpoint)
        weight = torch.full(rollout.mask.shape, 0.1)
        replay(policy, reward, rollout, settings, reward_weight=torch.full((2,), 0.5), kl_weight=weight)
        vectors.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
        policy.model.zero_grad()
    assert (vectors[1] - vectors[0]).norm() < 1e-4 * vectors[0].norm()


def test_layers_that_call_dropout_themselves_do_not_drop_when_checkpointed():
    """Falcon's decoder layer passes its own training flag, the one that checkpointing needs up, to dropout."""
    config = FalconConfig(
        **SIZES,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_dropout=0.5,
        attention_dropout=0.5,
        alibi=False,
        parallel_attn=False,
    )
    policy = policy_around(base_model(config), ["query_key_value"])
    policy.enable_activation_checkpointing()
    x, mask = embeddings_of(policy)
    x.requires_grad_()
    results = []
    for checkpoint in (False, True):
        with policy.state(adapters=True, activation_checkpointing=checkpoint):
            hidden = policy.hidden(x, mask)
        inside = torch.autograd.grad(hidden.square().sum(), [x], retain_graph=True)[0]
        with policy.state(adapters=True, activation_checkpointing=True):  # recomputation while the flags are up
            results.append((hidden, inside, torch.autograd.grad(hidden.square().sum(), [x])[0]))
    for plain, recomputed in zip(*results, strict=True):
        assert torch.allclose(recomputed, plain, rtol=1e-5, atol=1e-6 * plain.abs().max().item())


def test_nothing_that_a_run_calls_is_deprecated(tiny_config):
    """By transformers and peft, which tell their callers by FutureWarning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        policy = loaded_policy(tiny_config)
        policy.enable_activation_checkpointing()
        reward = tiny_reward(policy)
        ids, mask = pad_prompts([[5, 9, 2], [7]], policy.pad_id)
        rollout = sample(policy, ids, mask, Sampling(6, top_k=7), seed=0, first_rows=torch.tensor([0, 50]))
        for checkpoint in (False, True):
            replay(
                policy,
                reward,
                rollout,
                ReplaySettings(tau=1.0, activation_checkpointing=checkpoint),
                reward_weight=torch.full((2,), 0.5),
                kl_weight=torch.full(rollout.mask.shape, 0.1),
            )
