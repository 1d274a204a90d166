"""Replay at S hops equals step-by-step autograd of the published algorithm."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from enumeration import full_terms
from peft import LoraConfig, get_peft_model
from published import gradients, published_loss, relative_error
from rollouts import MIN_NEW, PROMPTS, gradient, rollout_of
from tiny import CONFIGS, EOS, FURTHER, VOCAB, KeepDouble, tiny_policy, tiny_reward
from transformers import AutoModelForCausalLM, AutoTokenizer

from grade.model.policy import Policy
from grade.replay.replay import ReplaySettings, prepare, replay
from grade.replay.score import ScoreSettings, score
from grade.rollout import pad_prompts
from grade.sampling.draw import Sampling
from grade.sampling.sample import sample
from grade_kernels import pull_back


def ragged_rollout(policy, **options):
    """A rollout in which some responses end early: a token that they would sample becomes an end token."""
    free = rollout_of(policy, **options)
    for token in free.tokens[:, MIN_NEW + 1].tolist():
        policy.eos_ids = torch.tensor([EOS, token])
        rollout = rollout_of(policy, **options)
        lengths = rollout.mask.sum(1)
        if lengths.min() < lengths.max() == rollout.tokens.shape[1] == free.tokens.shape[1]:
            assert lengths.min() >= MIN_NEW
            return rollout
    raise AssertionError("no response ended early")


CASES = [
    # (soft, k, kl_reduction, kl_prefix_grad, kl_direction, reads): each choice against the others at least once
    (False, 7, "token_mean", "both", "policy_ref", "prompt+response"),
    (True, 7, "sequence_sum", "both", "policy_ref", "prompt+response"),
    (False, VOCAB, "sequence_sum", "both", "ref_policy", "response"),
    (True, VOCAB, "token_mean", "both", "policy_ref", "response"),
    (False, 7, "token_mean", "policy", "policy_ref", "prompt+response"),
    (False, 7, "token_mean", "none", "policy_ref", "prompt+response"),
]


# The first two choices on every architecture, the rest where they differ most: a plain model and a soft-capped one.
MATRIX = [(n, c) for n in CONFIGS for c in (CASES if n in ("llama", "gemma2") else CASES[:2])]


def error_against_published(
    policy,
    rollout,
    *,
    tau=1.0,
    k=7,
    soft=False,
    reduction="token_mean",
    prefix="both",
    direction="policy_ref",
    reads="prompt+response",
    check=True,
):
    """Of replay with every hop, relative."""
    reward = tiny_reward(policy, reads)
    settings = ReplaySettings(
        tau=tau, max_hops=rollout.tokens.shape[1], hop_tol=0.0, kl_prefix_grad=prefix, kl_direction=direction
    )
    ours = gradient(policy, reward, rollout, settings, kl_reduction=reduction)
    loss = published_loss(
        policy,
        reward.head,
        rollout,
        tau=tau,
        k=k,
        soft=soft,
        kl_coef=0.3,
        kl_reduction=reduction,
        kl_direction=direction,
        kl_prefix_grad=prefix,
        min_new_tokens=MIN_NEW,
        reads=reads,
        check=check,
    )
    return relative_error(ours, gradients(policy, loss))


@pytest.mark.parametrize(
    "name, case", MATRIX, ids=[f"{n}-{'soft' if c[0] else 'ste'}-k{c[1]}-{'-'.join(c[2:])}" for n, c in MATRIX]
)
def test_equals_published_algorithm(name, case):
    case = dict(zip(("soft", "k", "reduction", "prefix", "direction", "reads"), case, strict=True))
    with KeepDouble():
        policy = tiny_policy(name, dtype=torch.float64, unknown=2)
        rollout = ragged_rollout(policy, k=case["k"], tau=1.3, soft=case["soft"])
        assert error_against_published(policy, rollout, tau=1.3, **case) < 1e-9


@pytest.mark.parametrize("name", FURTHER)
def test_equals_published_algorithm_whatever_is_kept_of_the_past(name):
    """Recurrent states, keys and values of different widths: sampled in copies, with padding, from a cache."""
    with KeepDouble():
        policy = tiny_policy(name, dtype=torch.float64)
        rollout = rollout_of(policy, max_new=5, prompts=PROMPTS[:2], copies=2)
        assert error_against_published(policy, rollout) < 1e-9


# Not Gemma-2: its float64 attention mask overflows in transformers' float32 softmax, and padding becomes NaN.
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "gemma2"])
def test_equals_published_algorithm_with_transformers_as_it_is(name):
    """Without the patch transformers rounds to float32 inside, differently in one long pass and in many short."""
    policy = tiny_policy(name, dtype=torch.float64)
    assert error_against_published(policy, rollout_of(policy, max_new=6), check=False) < 1e-6


@pytest.fixture
def setting():
    """A policy in float64, its reward, ragged responses, and settings that run every hop."""
    policy = tiny_policy("llama", dtype=torch.float64)
    reward = tiny_reward(policy)
    rollout = ragged_rollout(policy)
    return policy, reward, rollout, ReplaySettings(tau=1.0, max_hops=20, hop_tol=0.0)


def test_hops_are_exact_after_s_minus_one(setting):
    policy, reward, rollout, settings = setting
    longest = rollout.tokens.shape[1]
    exact = gradient(policy, reward, rollout, settings)
    assert torch.equal(gradient(policy, reward, rollout, replace(settings, max_hops=longest - 1)), exact)
    one_less = gradient(policy, reward, rollout, replace(settings, max_hops=longest - 2))
    assert 0 < relative_error(one_less, exact) < 1
    ones = torch.ones(rollout.mask.shape)
    result = replay(policy, reward, rollout, settings, reward_weight=ones[:, 0], kl_weight=ones)
    gradients(policy)
    # The term after a sequence's last hop is exactly zero, which is what ends it.
    assert torch.equal(result.hops, rollout.mask.sum(1)) and result.residual.max() == 0


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_sum"])
@pytest.mark.parametrize("hop_tol", [0.0, 0.05])
def test_micro_batches_change_nothing(setting, reduction, hop_tol):
    """Also when hops stop on the tolerance: the test is per sequence."""
    policy, reward, rollout, settings = setting
    settings = replace(settings, hop_tol=hop_tol)
    whole = gradient(policy, reward, rollout, settings, kl_reduction=reduction)
    for micro in (1, 3):
        split = gradient(policy, reward, rollout, settings, kl_reduction=reduction, micro=micro)
        assert relative_error(split, whole) < 1e-6  # transformers' float32 corners


def test_converged_sequences_are_frozen(setting):
    """A sequence stops at its own hop, whatever the others need."""
    policy, reward, rollout, settings = setting
    settings = replace(settings, hop_tol=0.1)
    ones = torch.ones(rollout.mask.shape)
    together = replay(policy, reward, rollout, settings, reward_weight=ones[:, 0], kl_weight=ones)
    for row in range(len(rollout)):
        alone = rollout.cut(row, row + 1)
        weights = torch.ones(alone.mask.shape)
        result = replay(policy, reward, alone, settings, reward_weight=weights[:, 0], kl_weight=weights)
        assert result.hops.item() == together.hops[row].item()
        assert result.residual.item() == pytest.approx(together.residual[row].item(), rel=1e-4)
    assert together.residual.max() <= 0.1
    gradients(policy)


def test_sharing_a_prompt_equals_separate_prompts(setting):
    policy, reward, _, settings = setting
    rollout = rollout_of(policy, prompts=PROMPTS[:2], copies=3)
    assert rollout.samples_per_prompt == 3
    shared = gradient(policy, reward, rollout, settings)
    separate = gradient(policy, reward, replace(rollout, samples_per_prompt=1), settings)
    uncached = gradient(policy, reward, rollout, replace(settings, prompt_cache=False))
    assert relative_error(shared, separate) < 1e-6 and relative_error(shared, uncached) < 1e-6


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 3e-7), (torch.bfloat16, 4e-4)])
def test_kl_of_a_fresh_adapter(name, dtype, bound):
    """Exactly 0 when both passes have the same shapes, within rounding when the base reads a cached prompt."""
    policy = tiny_policy(name, dtype=dtype, adapter_scale=0.0)
    reward = tiny_reward(policy)
    rollout = rollout_of(policy)
    same = score(policy, reward, rollout, ScoreSettings(prompt_cache=False))
    assert same.kl.abs().max() == 0
    cached = score(policy, reward, rollout, ScoreSettings())
    assert 0 <= cached.kl.min() and cached.kl[rollout.mask].mean() < bound


def test_kl_is_aligned_masked_and_exact(setting):
    """Against dense log-softmaxes of transformers' own logits."""
    policy, reward, rollout, settings = setting
    result, expected = score(policy, reward, rollout, settings), full_terms(policy, rollout)
    pairs = (result.kl, expected.kl), (result.logprob, expected.full), (result.entropy, expected.entropy)
    for found, values in pairs:
        assert torch.allclose(found, values.detach(), atol=1e-5) and (found[~rollout.mask] == 0).all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "gemma2"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_no_gradient(name, dropout):
    """The trap: recomputation happens in backward, when the adapter switch stands the other way. Adapters not zero."""
    policy = tiny_policy(name, dropout=dropout)
    reward = tiny_reward(policy)
    rollout = rollout_of(policy, max_new=6)
    settings = ReplaySettings(tau=1.0, max_hops=3, hop_tol=0.0, prompt_cache=False, dropout=dropout > 0)
    torch.manual_seed(5)
    plain = gradient(policy, reward, rollout, settings)
    policy.enable_activation_checkpointing()
    torch.manual_seed(5)
    checkpointed = gradient(policy, reward, rollout, replace(settings, activation_checkpointing=True))
    assert relative_error(checkpointed, plain) < 1e-6
    assert plain.norm() > 0 and not any(m.training for m in policy.model.modules())


@pytest.mark.parametrize("which", ["imdb_lm", "stories260k"])
def test_four_hops_at_tau_two_on_trained_models(which, request):
    """32 tokens, k = 256, reward only: within 2 % of the converged series."""
    path = request.getfixturevalue(which)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    base.requires_grad_(False)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(0)
    policy = Policy(get_peft_model(base, lora), AutoTokenizer.from_pretrained(path))
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    reward = tiny_reward(policy)
    ids, mask = pad_prompts([[5, 9, 2, 40], [7, 11, 13, 17, 19, 100, 200], [23, 99]], policy.pad_id)
    sampling = Sampling(max_new_tokens=32, min_new_tokens=32, top_k=256)
    rollout = sample(policy, ids, mask, sampling, seed=3, first_rows=torch.arange(3) * 32)
    settings = ReplaySettings(tau=2.0, max_hops=32, hop_tol=0.0)
    exact = gradient(policy, reward, rollout, settings, kl_coef=0.0)
    four = gradient(policy, reward, rollout, replace(settings, max_hops=4), kl_coef=0.0)
    none = gradient(policy, reward, rollout, replace(settings, max_hops=0), kl_coef=0.0)
    assert relative_error(four, exact) < 2e-2 < relative_error(none, exact)


def test_bfloat16_base_with_float32_adapter():
    """What peft makes of a bfloat16 model: the gradient is that of float32, to bfloat16's precision."""
    policy, half = tiny_policy("llama"), tiny_policy("llama")
    half = Policy(half.model.to(torch.bfloat16), half.tokenizer)
    for parameter, own in zip(half.parameters(), policy.parameters(), strict=True):
        parameter.data = own.detach().clone()
    rollout = rollout_of(policy)
    settings = ReplaySettings(tau=2.0, max_hops=8, hop_tol=0.0)
    exact = gradient(policy, tiny_reward(policy), rollout, settings)
    reward = tiny_reward(half)
    reward.head.float()
    rounded = gradient(half, reward, rollout, settings)
    assert rounded.dtype == torch.float32
    # Measured 0.11: eight mantissa bits through two layers and eight hops; a wrong gradient is off by 1.
    assert relative_error(rounded, exact) < 0.25


@pytest.mark.parametrize(
    "prefix, soft, scored",
    [
        ("both", False, False),
        ("policy", False, False),
        ("none", False, False),
        ("both", True, False),
        ("none", True, False),
        ("both", False, True),
        ("none", False, True),
    ],
)
def test_path_scale_multiplies_all_but_the_kl_of_a_step_itself(setting, prefix, soft, scored):
    """The KL of a step itself is what remains of the published algorithm without a reward and without prefix. Of a term
    that is followed by the score function nothing has come through an embedding."""
    policy, reward, rollout, settings = setting
    if soft:
        policy.eos_ids = torch.tensor([EOS])
        rollout = ragged_rollout(policy, tau=1.0, soft=True)
    settings = replace(settings, kl_prefix_grad=prefix)
    loss = published_loss(
        policy,
        reward.head,
        rollout,
        tau=1.0,
        k=7,
        soft=soft,
        kl_coef=0.3,
        kl_reduction="token_mean",
        kl_prefix_grad="none",
        min_new_tokens=MIN_NEW,
        reward_fn=lambda prompt, tokens: 0.0 * tokens.sum(),
        check=False,
    )
    own = gradients(policy, loss)
    path = gradient(policy, reward, rollout, settings) - own
    score_weight = torch.linspace(-1.0, 2.0, len(rollout), dtype=torch.float64) / len(rollout) if scored else None
    whole = gradient(policy, reward, rollout, settings, score_weight=score_weight)
    assert (relative_error(whole, own + path) > 0.1) is scored
    scaled = gradient(policy, reward, rollout, replace(settings, path_scale=3.0), score_weight=score_weight)
    assert relative_error(scaled, whole + 2 * path) < 1e-6  # transformers' float32 corners
    assert path.norm() > 0.02 * scaled.norm()


@pytest.mark.parametrize(
    "prefix, hops", [("both", 20), ("policy", 20), ("none", 20), ("both", 0), ("none", 0), ("both", 2)]
)
def test_what_reaches_the_logits_is_what_is_pulled_back_to_the_hidden_states(setting, prefix, hops):
    """But for KL's own gradient, the score function's, and path_scale, which come after."""
    policy, reward, rollout, settings = setting
    settings = replace(settings, kl_prefix_grad=prefix, max_hops=hops)
    ones = torch.ones(rollout.mask.shape, dtype=torch.float64)
    prepared = prepare(policy, reward, rollout, settings, reward_weight=ones[:, 0], kl_weight=0.3 * ones)
    at_logits, done = prepared.logit_gradient(replace(settings, path_scale=3.0)), prepared.done
    pulled = pull_back(at_logits, done.real.indices, policy.head, done.swept.logits)
    hidden, _, _ = prepared.hidden_gradient(settings)
    error = relative_error(pulled, hidden - prepared.kl_gradient)
    assert error < 1e-6 < relative_error(pulled, hidden)  # transformers' float32 corners
    every, _, _ = prepared.hidden_gradient(replace(settings, max_hops=20))
    assert (relative_error(every, hidden) > 1e-6) is (hops < 20)
