"""Sampling: the same responses as a loop that anyone would write, masks by position, and the right distribution."""

from __future__ import annotations

import pytest
import torch
from rollouts import PROMPTS, draw
from tiny import CONFIGS, EOS, VOCAB, KeepDouble, tiny_policy, tiny_reward

import grade.sampling.draw
import grade.sampling.sample
from grade.model.passes import fed_embeddings, policy_pass
from grade.replay.score import ScoreSettings, score
from grade.rollout import pad_prompts
from grade.sampling.draw import nucleus
from grade.sampling.sample import support_is_allowed
from grade_kernels import vocab_head
from grade_kernels.common.random import gumbel

NO_EOS = torch.zeros(0, dtype=torch.int64)
PAD = 60
# Every architecture samples tokens; mixtures also where positions, windows and scaled embeddings are special.
EVERY_MODEL = [(name, False) for name in CONFIGS] + [(name, True) for name in ("llama", "gpt2", "gemma2")]
# 99.9 % quantiles of chi-squared by degrees of freedom; seeds are fixed, so a test that passes always does.
CHI_SQUARED_999 = {3: 16.27, 11: 31.26}


def responses(rollout):
    """Real tokens of each response."""
    return [tokens[mask].tolist() for tokens, mask in zip(rollout.tokens, rollout.mask, strict=True)]


@torch.no_grad()
def naive_response(policy, prompt, *, first_row, seed=0, steps=12, k=7, tau=1.0, soft=False, min_new=0, adapters=True):
    """One response by itself: the whole sequence through transformers' model for every token, no cache, no padding.

    Returns:
        tokens, supports (the candidates of each token, best first) and mixtures [S, k].
    """
    model, embed = policy.causal_lm, policy.causal_lm.get_input_embeddings()
    x = embed(torch.tensor(prompt))
    tokens, supports, mixtures = [], [], []
    with policy.state(adapters=adapters):
        for step in range(steps):
            logits = model(inputs_embeds=x[None], use_cache=False).logits[0, -1]
            logits[policy.suppressed] = -torch.inf
            if step + 1 < min_new:
                logits[policy.eos_ids] = -torch.inf
            support = sorted(range(VOCAB), key=lambda i: (-logits[i].item(), i))[:k]
            noise = gumbel(seed, 0, torch.tensor(first_row + step), torch.tensor(support), dtype=logits.dtype)
            noisy = logits[support] + noise
            mixture = torch.softmax(noisy / tau, dim=0)
            token = support[int(noisy.argmax())]
            tokens.append(token)
            supports.append(support)
            mixtures.append(mixture)
            if token in policy.eos_ids.tolist():
                break
            following = mixture @ embed(torch.tensor(support)) if soft else embed(torch.tensor(token))
            x = torch.cat([x, following[None]])
    return tokens, supports, torch.stack(mixtures)


# -- against the naive sampler -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, soft", EVERY_MODEL, ids=str)
def test_equals_a_sampler_without_cache_and_padding(name, soft):
    """Ragged prompts, ragged responses, positions under left padding (GPT-2), a window shorter than them (Gemma-2)."""
    with KeepDouble():
        policy = tiny_policy(name, dtype=torch.float64, unknown=5)
        policy.eos_ids = NO_EOS
        options = dict(tau=0.7, soft=soft)
        free = draw(policy, max_new_tokens=9, **options)
        policy.eos_ids = free.tokens[[0, 2], [4, 6]].unique()
        rollout = draw(policy, max_new_tokens=9, min_new_tokens=3, **options)
        lengths = rollout.mask.sum(1)
        assert lengths.min() < lengths.max()
        for b, prompt in enumerate(PROMPTS):
            tokens, supports, mixtures = naive_response(
                policy, prompt, first_row=100 * b, steps=9, min_new=3, **options
            )
            n = len(tokens)
            assert responses(rollout)[b] == tokens
            assert rollout.indices[b, :n].tolist() == supports  # the exact top-k of what may be sampled
            chosen = torch.tensor([m[s.index(t)] for m, s, t in zip(mixtures, supports, tokens, strict=True)])
            assert torch.allclose(rollout.token_weight[b, :n], chosen, rtol=1e-9, atol=0)
            if soft:
                assert torch.allclose(rollout.weights[b, :n], mixtures, rtol=1e-9, atol=1e-15)
    assert soft or rollout.weights is None


def test_without_adapters_the_base_is_sampled():
    policy = tiny_policy()
    rollout = draw(policy, adapters=False)
    expected = [naive_response(policy, p, first_row=100 * b, adapters=False)[0] for b, p in enumerate(PROMPTS)]
    assert responses(rollout) == expected
    assert responses(draw(policy)) != expected


# -- what keys the noise -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_batch_split_and_order_change_nothing(name):
    policy, rows = tiny_policy(name), torch.arange(4) * 100

    def tokens(order=(0, 1, 2, 3), shift=0, **options):
        """The responses to these prompts in one batch, at their own rows."""
        prompts = [PROMPTS[i] for i in order]
        return responses(draw(policy, prompts, rows=rows[list(order)] + shift, max_new_tokens=9, **options))

    together = tokens()
    assert tokens([0]) + tokens([1, 2]) + tokens([3]) == together
    assert tokens([2, 0, 3, 1]) == [together[i] for i in (2, 0, 3, 1)]
    assert tokens(shift=7) != together
    assert tokens(seed=1) != together


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_samples_per_prompt_equal_repeated_prompts(name):
    """The prompt's cache, computed once and repeated, serves each copy; samples of a prompt stand together."""
    policy = tiny_policy(name)
    shared = draw(policy, copies=3)
    repeated = draw(policy, [p for p in PROMPTS for _ in range(3)])
    assert shared.samples_per_prompt == 3
    assert torch.equal(shared.prompt_ids, repeated.prompt_ids) and torch.equal(shared.prompt_mask, repeated.prompt_mask)
    assert responses(shared) == responses(repeated)
    assert len({tuple(r) for r in responses(shared)[:3]}) == 3  # rows differ, so do the responses of one prompt


# -- the end of a response -----------------------------------------------------------------------------------------


def expected_mask(tokens, eos_ids):
    """Position by position: real until the first end token, which is real too."""
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for row, ids in zip(mask, tokens.tolist(), strict=True):
        for s, token in enumerate(ids):
            row[s] = True
            if token in eos_ids:
                break
    return mask


@pytest.mark.parametrize("eos_count", [1, 2, 4])
@pytest.mark.parametrize("pad_is_eos", [True, False])
def test_mask_keeps_eos_and_nothing_after_it(pad_is_eos, eos_count):
    policy = tiny_policy()
    free = draw(policy, ignore_eos=True)
    eos = free.tokens[[0, 1, 2, 3], [4, 2, 7, 11]][:eos_count].tolist()
    policy.eos_ids, policy.pad_id = torch.tensor(eos), eos[0] if pad_is_eos else PAD
    rollout = draw(policy)
    expected = expected_mask(free.tokens, eos)
    assert expected.sum(1).min() < 12
    width = int(expected.sum(1).max())
    assert torch.equal(rollout.mask, expected[:, :width])
    assert torch.equal(rollout.tokens[rollout.mask], free.tokens[expected])
    assert (rollout.tokens[~rollout.mask] == policy.pad_id).all()
    for response in responses(rollout):
        assert not set(response[:-1]) & set(eos)
        assert response[-1] in eos or len(response) == 12


def test_a_sampled_pad_token_is_a_token():
    """Pad that does not end a response may be sampled; masks never look at it."""
    policy = tiny_policy()
    free = draw(policy, ignore_eos=True)
    policy.pad_id, policy.eos_ids = int(free.tokens[0, 3]), NO_EOS
    rollout = draw(policy)
    assert rollout.mask.all() and torch.equal(rollout.tokens, free.tokens)


def test_minimum_length_counts_eos():
    policy = tiny_policy()
    policy.eos_ids = torch.arange(0, VOCAB, 2)  # a token in two
    lengths = draw(policy, copies=8, min_new_tokens=5).mask.sum(1)
    assert lengths.min() == 5
    rollout = draw(policy, copies=8, min_new_tokens=5)
    assert not torch.isin(rollout.tokens[:, :4], policy.eos_ids).any()
    assert not torch.isin(rollout.indices[:, :4], policy.eos_ids).any()
    assert torch.isin(rollout.tokens[:, 4], policy.eos_ids).any()
    assert draw(policy, copies=8, min_new_tokens=0).mask.sum(1).min() == 1


def test_ignore_eos_gives_full_length_and_suppresses_nothing():
    policy = tiny_policy()
    policy.eos_ids = torch.arange(0, VOCAB, 2)
    rollout = draw(policy, copies=8, ignore_eos=True, min_new_tokens=5)
    assert rollout.mask.all() and rollout.mask.shape == (32, 12)
    assert torch.isin(rollout.tokens[:, :4], policy.eos_ids).any()
    assert rollout.ignore_eos and support_is_allowed(policy, rollout).all()


def test_sampling_stops_when_all_responses_have_ended(monkeypatch):
    """Forwards are not spent on responses that are over, and no column holds only padding."""
    policy = tiny_policy()
    policy.eos_ids = torch.arange(0, VOCAB, 2)
    calls, hidden = [], policy.hidden
    monkeypatch.setattr(policy, "hidden", lambda *args: calls.append(1) or hidden(*args))
    rollout = draw(policy, max_new_tokens=50)
    longest = int(rollout.mask.sum(1).max())
    assert rollout.tokens.shape[1] == longest < 8
    assert len(calls) <= 8


# -- what may be sampled -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_p", [None, 0.9])
def test_ids_unknown_to_the_tokenizer_are_never_sampled(top_p):
    policy = tiny_policy(unknown=20)
    assert policy.suppressed.tolist() == list(range(VOCAB - 20, VOCAB))
    policy.head.weight[policy.suppressed] *= 4  # shares the model's memory: the model wants these ids most
    policy.eos_ids = NO_EOS
    for k in (7, VOCAB):
        rollout = draw(policy, copies=4, top_k=k, top_p=top_p, soft=True)
        wish = rollout_logits(policy, rollout).softmax(-1)[..., policy.suppressed].sum(-1)
        assert wish.mean() > 0.3
        assert rollout.tokens.max() < VOCAB - 20
        banned = rollout.indices >= VOCAB - 20
        assert banned.sum(-1).max() == (20 if k == VOCAB else 0)  # the support has them only where it must
        assert (rollout.weights[banned] == 0).all()
        assert torch.equal(support_is_allowed(policy, rollout), ~banned)


def test_support_is_allowed_knows_the_minimum_length():
    policy = tiny_policy(unknown=2)
    rollout = draw(policy, top_k=VOCAB, min_new_tokens=4)
    allowed = support_is_allowed(policy, rollout)
    for s in range(rollout.tokens.shape[1]):
        banned = {VOCAB - 2, VOCAB - 1} | ({EOS} if s < 3 else set())
        assert set(rollout.indices[0, s][~allowed[0, s]].tolist()) == banned


def rollout_logits(policy, rollout):
    """[B, S, V] logits that the rollout's tokens were drawn from, without suppression, by transformers' own model."""
    x = fed_embeddings(rollout, policy.embedding, policy.embedding_scale)
    mask = torch.cat([rollout.prompt_mask, rollout.mask], 1).long()
    with torch.no_grad():
        logits = policy.causal_lm(
            inputs_embeds=torch.cat([policy.embed(rollout.prompt_ids), x], 1),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp_min(0),
            use_cache=False,
        ).logits
    return logits[:, rollout.prompt_ids.shape[1] - 1 : -1]


# -- state ---------------------------------------------------------------------------------------------------------


def test_dropout_is_off():
    with_dropout, without = tiny_policy(dropout=0.5), tiny_policy(dropout=0.0)
    first, second, plain = draw(with_dropout), draw(with_dropout), draw(without)
    assert torch.equal(first.tokens, second.tokens) and torch.equal(first.tokens, plain.tokens)
    assert torch.equal(first.token_weight, second.token_weight) and torch.equal(first.token_weight, plain.token_weight)
    with with_dropout.state(adapters=True, dropout=True):  # off also inside a state that has it on
        assert torch.equal(draw(with_dropout).token_weight, plain.token_weight)


def test_sampling_leaves_no_graph_and_no_global_randomness():
    policy = tiny_policy()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    rollout = draw(policy, soft=True)
    assert torch.equal(torch.rand(3), expected)
    assert not rollout.weights.requires_grad and not rollout.token_weight.requires_grad
    kept = [value for value in vars(rollout).values() if isinstance(value, torch.Tensor)]
    assert len(kept) >= 7 and not any(value.is_inference() for value in kept)


@pytest.mark.parametrize(
    "rope",
    [
        dict(rope_type="dynamic", factor=2.0),
        dict(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4, original_max_position_embeddings=16),
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_what_a_model_notes_while_sampling_can_enter_a_graph(rope, monkeypatch):
    """Frequencies that are made anew for sequences longer than any before, and kept in the module."""
    config = CONFIGS["llama"]()
    config.max_position_embeddings, config.rope_parameters = 16, {"rope_theta": 10_000.0, **rope}
    monkeypatch.setitem(CONFIGS, "llama", lambda: config)
    policy = tiny_policy("llama")
    before = [buffer.clone() for buffer in policy.model.buffers()]
    rollout = draw(policy, max_new_tokens=24)
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.model.buffers(), strict=True))
    x = policy.embed(rollout.tokens).requires_grad_()
    policy.hidden(x, rollout.mask).square().sum().backward()
    assert x.grad.isfinite().all() and all(p.grad is not None for p in policy.parameters())


# -- replay sees what sampling saw ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name, soft", EVERY_MODEL, ids=str)
def test_importance_ratio_is_one_on_the_first_pass(name, soft, monkeypatch):
    """log-probabilities of the truncated distribution: of the cached pass that sampled, and of the parallel pass."""
    logits_at_sampling = []
    original = grade.sampling.draw.linear_gumbel_topk

    def record(hidden, head, *args, **kwargs):
        out = original(hidden, head, *args, **kwargs)
        seen = vocab_head(hidden, head, indices=out.indices, suppress=kwargs["suppress"])
        logits_at_sampling.append(seen.logits)
        return out

    monkeypatch.setattr(grade.sampling.draw, "linear_gumbel_topk", record)
    monkeypatch.setattr(grade.sampling.sample, "_DROP_AT", 0)  # whole batches can be stacked
    with KeepDouble():
        policy = tiny_policy(name, dtype=torch.float64, unknown=2, dropout=0.3)
        policy.eos_ids = torch.arange(0, VOCAB, 6)
        rollout = draw(policy, min_new_tokens=3, soft=soft, top_k=9, max_new_tokens=9)
        at = torch.stack(logits_at_sampling, 1)[:, : rollout.tokens.shape[1]]
        hidden = policy_pass(policy, rollout, fed_embeddings(rollout, policy.embedding, policy.embedding_scale))
        head = vocab_head(hidden.detach(), policy.head, indices=rollout.indices, tokens=rollout.tokens)
        result = score(policy, tiny_reward(policy), rollout, ScoreSettings())
    picked = rollout.indices == rollout.tokens[..., None]
    mask = rollout.mask
    assert (picked.sum(-1) == 1)[mask].all() and not mask.all()

    def truncated(logits):
        return logits.log_softmax(-1)[picked & mask[..., None]]

    assert (truncated(head.logits) - truncated(at)).abs().max() < 1e-10
    # score() has the same log-probability over the full vocabulary, and the mass of the candidates
    full = truncated(head.logits) + result.mass[mask].log()
    assert (full - result.logprob[mask]).abs().max() < 1e-10


# -- distribution --------------------------------------------------------------------------------------------------


def first_tokens(policy, count, **options):
    """First tokens of `count` responses to one prompt, and the model's logits for them."""
    rollout = draw(policy, PROMPTS[:1], rows=torch.arange(count), copies=count, max_new_tokens=1, **options)
    with torch.no_grad():
        logits = policy.causal_lm(input_ids=torch.tensor(PROMPTS[:1])).logits[0, -1]
    return rollout.tokens[:, 0], logits.double()


def chi_squared(tokens, support, probabilities):
    """Pearson's statistic of drawn tokens against the probabilities of the support."""
    counts = torch.tensor([(tokens == i).sum().item() for i in support], dtype=torch.float64)
    expected = probabilities * len(tokens)
    assert counts.sum() == len(tokens), "a token from outside the support"
    assert expected.min() > 5, "too few draws for the statistic"
    return ((counts - expected).square() / expected).sum().item()


def flat_policy():
    """A policy whose first token is uncertain."""
    policy = tiny_policy()
    policy.head.weight.mul_(0.5)
    return policy


def test_first_token_follows_softmax_over_the_top_k():
    policy = flat_policy()
    tokens, logits = first_tokens(policy, 6000, top_k=12, tau=0.3)
    top = logits.topk(12)
    assert chi_squared(tokens, top.indices.tolist(), top.values.softmax(-1)) < CHI_SQUARED_999[11]
    # a statistic that a wrong temperature would not survive
    assert chi_squared(tokens, top.indices.tolist(), (top.values / 0.7).softmax(-1)) > 2 * CHI_SQUARED_999[11]


def test_tokens_do_not_depend_on_tau():
    policy = flat_policy()
    cold, warm = draw(policy, copies=4, tau=0.1), draw(policy, copies=4, tau=4.0)
    assert torch.equal(cold.tokens, warm.tokens)
    assert not torch.allclose(cold.token_weight, warm.token_weight)


def test_top_p_follows_the_renormalised_nucleus():
    policy = flat_policy()
    _, logits = first_tokens(policy, 1)
    order = logits.argsort(descending=True)
    mass = logits.softmax(-1)[order].cumsum(0)
    top_p = ((mass[2] + mass[3]) / 2).item()  # reached by the fourth
    tokens, _ = first_tokens(policy, 4000, top_k=12, top_p=top_p)
    nucleus_ids = order[:4]
    assert chi_squared(tokens, nucleus_ids.tolist(), logits[nucleus_ids].softmax(-1)) < CHI_SQUARED_999[3]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_top_p_never_leaves_the_nucleus(name):
    with KeepDouble():
        policy = tiny_policy(name, dtype=torch.float64)
        rollout = draw(policy, copies=6, top_k=30, top_p=0.7)
        probabilities = rollout_logits(policy, rollout).softmax(-1)
    ahead = (probabilities * (probabilities > probabilities.gather(-1, rollout.tokens[..., None]))).sum(-1)
    assert (ahead[rollout.mask] < 0.7).all()
    assert (draw(policy, copies=6, top_k=30).tokens != rollout.tokens).any()  # it does restrict something


def test_top_p_of_one_is_no_restriction():
    policy = tiny_policy()
    assert torch.equal(draw(policy, top_p=1.0).tokens, draw(policy, top_p=None).tokens)


# -- nucleus -------------------------------------------------------------------------------------------------------


def test_nucleus_of_one_keeps_all():
    """A float32 running sum of 1 may be reached before the last candidate."""
    logits = torch.randn(200, VOCAB, generator=torch.Generator().manual_seed(0)).mul(4).sort(descending=True).values
    assert nucleus(logits, logits.logsumexp(-1), 1.0).all()


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_nucleus_equals_brute_force(top_p):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(50, VOCAB, generator=generator, dtype=torch.float64).mul(2).sort(descending=True).values
    lse, candidates = logits.logsumexp(-1), logits[:, :20]
    kept = nucleus(candidates, lse, top_p)
    for row in range(50):
        mass, count = 0.0, 0
        while count < 20 and mass < top_p:
            mass += torch.exp(logits[row, count] - lse[row]).item()
            count += 1
        assert kept[row].tolist() == [True] * count + [False] * (20 - count)


# -- containers ----------------------------------------------------------------------------------------------------


def test_pad_prompts():
    ids, mask = pad_prompts([[5, 9, 2], [7], [4, 8]], pad_id=0)
    assert ids.tolist() == [[5, 9, 2], [0, 0, 7], [0, 4, 8]] and ids.dtype == torch.int64
    assert mask.tolist() == [[True, True, True], [False, False, True], [False, True, True]]
    assert pad_prompts([[0, 5], [1]], pad_id=0)[1].tolist() == [[True, True], [False, True]]  # pad inside a prompt


@pytest.mark.parametrize("size, soft", [(1, True), (2, False), (3, False), (3, True), (8, True), (20, False)])
def test_micro_batches_trim_padding_and_keep_every_token(size, soft):
    policy = tiny_policy()
    policy.eos_ids = torch.arange(0, VOCAB, 3)
    rollout = draw(policy, copies=2, soft=soft)
    parts = list(rollout.micro_batches(size))
    assert [len(p) for p in parts] == [min(size, 8 - start) for start in range(0, 8, size)]
    assert sum((responses(p) for p in parts), []) == responses(rollout)
    prompts = [ids[m].tolist() for p in parts for ids, m in zip(p.prompt_ids, p.prompt_mask, strict=True)]
    assert prompts == [p for p in PROMPTS for _ in range(2)]
    for name in ("indices", "token_weight", "rows") + (("weights",) if soft else ()):
        pieces = torch.cat([getattr(p, name)[p.mask] for p in parts])
        assert torch.equal(pieces, getattr(rollout, name)[rollout.mask]), name
    for start, part in zip(range(0, 8, size), parts, strict=True):
        assert part.prompt_mask[:, -1].all() and part.prompt_mask[:, 0].any()  # left-padded, no empty column
        assert part.mask[:, -1].any() and part.tokens.shape == part.mask.shape == part.rows.shape
        assert part.indices.shape[:2] == part.mask.shape == part.token_weight.shape
        assert part.samples_per_prompt == (2 if start % 2 == 0 and len(part) % 2 == 0 else 1)
        assert (part.seed, part.min_new_tokens, part.ignore_eos) == (0, 0, False)
    assert min(p.tokens.shape[1] for p in parts) < rollout.tokens.shape[1] or size >= 8


def test_micro_batches_by_length_compute_less_padding():
    policy = tiny_policy()
    policy.eos_ids = torch.arange(0, VOCAB, 6)
    rollout = draw(policy, PROMPTS * 4, max_new_tokens=20)
    plain, sorted_ = (list(rollout.micro_batches(3, by_length=by_length)) for by_length in (False, True))
    lengths = [part.mask.sum(1).tolist() for part in sorted_]
    assert sum(lengths, []) == sorted(rollout.mask.sum(1).tolist(), reverse=True)
    assert sum(p.mask.numel() for p in sorted_) < sum(p.mask.numel() for p in plain)
    for parts in (plain, sorted_):  # the same responses, with what belongs to them
        found = {
            int(row[0]): (t[m].tolist(), i[m].tolist())
            for p in parts
            for row, t, m, i in zip(p.rows, p.tokens, p.mask, p.indices, strict=True)
        }
        assert found == {
            int(row[0]): (t[m].tolist(), i[m].tolist())
            for row, t, m, i in zip(rollout.rows, rollout.tokens, rollout.mask, rollout.indices, strict=True)
        }
    together = draw(policy, copies=2)  # the samples of a prompt are not parted
    assert [p.tokens.tolist() for p in together.micro_batches(2, by_length=True)] == [
        p.tokens.tolist() for p in together.micro_batches(2)
    ]
