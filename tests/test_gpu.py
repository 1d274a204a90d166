"""The same numbers on a GPU as on CPU: `pytest -m gpu`. Skipped, with a reason, where there is none."""

from __future__ import annotations

import pytest
import torch
from published import relative_error
from rollouts import PROMPTS, gradient, rollout_of
from tiny import tiny_policy, tiny_reward
from torch._dynamo.utils import counters

from grade.model.policy import Policy
from grade.replay.replay import ReplaySettings
from grade.rollout import Rollout, pad_prompts
from grade.sampling.compiled import CompiledDecoding
from grade.sampling.draw import Sampling
from grade.sampling.sample import sample
from grade_kernels import Head, gumbel_topk, soft_embedding, vocab_head

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")]


def to_device(rollout: Rollout, device: str) -> Rollout:
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in vars(rollout).items()}
    return Rollout(**moved)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_replay(name):
    policy = tiny_policy(name)
    rollout = rollout_of(policy)
    settings = ReplaySettings(tau=1.0, max_hops=8, hop_tol=0.0)
    expected = gradient(policy, tiny_reward(policy), rollout, settings)
    there = Policy(policy.model.to("cuda"), policy.tokenizer)
    ours = gradient(there, tiny_reward(there), to_device(rollout, "cuda"), settings)
    assert relative_error(ours.cpu(), expected) < 1e-3


def test_sampling_draws_the_same_tokens():
    """Equal noise; logits in float32 may differ in the last place, so a near-tie in 4,096 draws is allowed."""
    logits = torch.randn(4096, 5000, generator=torch.Generator().manual_seed(0))
    here, there = (gumbel_topk(x, 64, seed=7) for x in (logits, logits.cuda()))
    assert torch.equal(here.indices, there.indices.cpu())
    assert (here.tokens != there.tokens.cpu()).sum() <= 1
    table = torch.randn(5000, 32)
    close = (soft_embedding(here, table) - soft_embedding(there, table.cuda()).cpu()).abs().amax(-1) < 1e-6
    assert close.float().mean() > 0.999


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_vocab_head(dtype, bound):
    generator = torch.Generator().manual_seed(0)
    hidden, ref, weight = (torch.randn(n, 64, generator=generator).to(dtype) for n in (96, 96, 3000))
    tokens = torch.arange(96)
    here = vocab_head(hidden, Head(weight), ref_hidden=ref, k=32, tokens=tokens, grad=True)
    there = vocab_head(hidden.cuda(), Head(weight.cuda()), ref_hidden=ref.cuda(), k=32, tokens=tokens.cuda(), grad=True)
    for name in ("kl", "entropy", "logprob", "lse", "grad_hidden", "grad_ref_hidden"):
        assert relative_error(getattr(there, name).cpu().float(), getattr(here, name).float()) < bound, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_decoding(dtype):
    """A CUDA graph of a token draws what plain decoding draws, also once weights and temperature have changed."""
    policy = tiny_policy("llama", dtype=dtype)
    there = Policy(policy.model.to("cuda"), policy.tokenizer)
    decoding = CompiledDecoding(there)
    ids, mask = pad_prompts(PROMPTS, there.pad_id, "cuda")
    rows = torch.arange(2 * len(PROMPTS), device="cuda") * 100
    agree = []
    counters.clear()
    for tau in (1.0, 0.5, 2.0):
        draw = dict(seed=0, first_rows=rows, samples_per_prompt=2)
        sampling = Sampling(max_new_tokens=8, top_k=7, ignore_eos=True, tau=tau)
        plain, ours = (sample(there, ids, mask, sampling, decoding=how, **draw) for how in (None, decoding))
        same = plain.tokens == ours.tokens
        agree.append(same.float().mean())
        if dtype == torch.float32:  # the second token is the graph's first, and reads this temperature
            second = same[:, :2].all(1)
            torch.testing.assert_close(
                ours.token_weight[second, 1], plain.token_weight[second, 1], rtol=1e-2, atol=1e-4
            )
        rows = rows + 1000
        with torch.no_grad():
            for parameter in there.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    # Compiled once, and recorded: code that cannot be is run without a graph, and only slower.
    assert counters["stats"]["unique_graphs"] == 1 and not counters["inductor"]["cudagraph_skips"]
    assert min(agree) > (0.99 if dtype == torch.float32 else 0.8)  # roundings differ, and one token changes the next
