"""Another batch, seed, row, draw or temperature is never another compilation.

Without a device the launches are recorded and the keys compared under which Triton's JIT would look them up; on a
GPU the compilations are counted as they happen.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from grade_kernels.common.environment import check_triton
from grade_kernels.common.stats import KLStats, TokenStats

try:
    check_triton()
except RuntimeError as error:
    pytest.skip(str(error), allow_module_level=True)

from grade_kernels.triton_ops import embedding, kl, launch, logprob, objective, sample, scatter, sweep, vjp

ODD, EVEN = 8209, 8192  # rows that lie off the alignment of a vector load, and on it; both of several tiles
K, D = 17, 48


@dataclass(frozen=True)
class Call:
    """What changes from call to call."""

    vocab: int
    n: int = 16
    seed: int = 16
    first_row: int = 16
    draw: int = 16
    samples: int = 16
    tau: float = 1.0
    cap: float = 16.0

    def logits(self, device, dtype=torch.bfloat16):
        return torch.zeros(self.n, self.vocab, dtype=dtype, device=device)

    def ids(self, device):
        return torch.arange(K, device=device).repeat(self.n, 1)

    def floats(self, *shape, device):
        return torch.ones(self.n, *shape, device=device)

    def keys(self, device):
        return self.first_row + torch.arange(self.n, device=device)

    def tokens(self, device):
        return torch.zeros(self.n, dtype=torch.int64, device=device)


def call_kl(c: Call, device):
    p, q = c.logits(device), c.logits(device)
    stats = kl.kl_stats(p, q, torch.float32)
    kl.kl_grads(p, q, stats, c.floats(device=device), c.logits(device), c.logits(device), c.cap)


def call_kl_with_stats_made_elsewhere(c: Call, device):
    p = c.logits(device)
    stats = KLStats(*torch.zeros(6, c.n, device=device).unbind())
    kl.kl_grads(p, p, stats, None, c.logits(device), None)


def call_logprob(c: Call, device):
    x, rest = c.logits(device), (c.floats(device=device), c.floats(device=device), c.logits(device))
    stats = logprob.token_stats(x, c.tokens(device), torch.float32)
    logprob.token_stats_grad(x, c.tokens(device), TokenStats(*stats), *rest, c.cap)


def call_sweep(c: Call, device):
    x, y = c.logits(device, torch.float32), c.logits(device, torch.float32)
    sweep.head_chunk(x, y, K, None, c.ids(device), c.tokens(device), "policy_ref", True, c.cap)


def call_objective(c: Call, device):
    x, y = c.logits(device, torch.float32), c.logits(device, torch.float32)
    weights = torch.ones(3, c.n, device=device).unbind()
    objective.objective_chunk(x, y, None, c.ids(device), c.tokens(device), weights, True, c.cap)


def call_embedding(c: Call, device):
    table, grad = torch.ones(64, D, device=device), c.floats(D, device=device)
    embedding.weighted_sum(c.floats(K, device=device), c.ids(device), table)
    embedding.candidate_dots(grad, c.ids(device), table)
    embedding.scatter_sum(c.floats(K, device=device), c.ids(device), grad, 64)


def call_vjp(c: Call, device):
    table, grad = torch.ones(64, D, device=device), c.floats(D, device=device)
    shared = ([grad], [table], c.floats(K, device=device), c.ids(device), c.tokens(device), c.keys(device))
    vjp.token_vjp(*shared, "gumbel", c.tau, c.seed, range(1), torch.float32)
    vjp.token_vjp(*shared, "gumbel", c.tau, c.seed, range(c.draw, c.draw + 1), torch.float32)
    vjp.token_vjp(*shared, "rao", c.tau, c.seed, range(1, c.samples + 1), torch.float32)


def call_select(c: Call, device):
    sample.select(c.logits(device), K, None, None, None, torch.float32)


def call_sample(c: Call, device):
    sample.select_and_sample(
        c.logits(device), K, c.tau, c.keys(device), c.seed, c.draw, None, None, c.tokens(device), torch.float32
    )


def call_sample_from_a_support(c: Call, device):
    support = sample.Support(c.ids(device), c.floats(K, device=device), c.floats(device=device))
    drawn = sample.sample(support, c.keys(device), c.seed, c.draw, None, c.tau)
    scatter.weights_vjp(drawn.weights, c.floats(K, device=device), c.tau)
    scatter.scatter(c.ids(device), c.floats(K, device=device), c.vocab, torch.float32)


CALLS = [
    call_kl, call_kl_with_stats_made_elsewhere, call_logprob, call_sweep, call_objective, call_embedding, call_vjp,
    call_select, call_sample, call_sample_from_a_support,
]  # fmt: skip
# 1 would become a constant, 17 is not divisible by 16; the words of a seed are above and below 2^31, and negative.
CHANGES = {
    "batch": [{"n": n} for n in (1, 5, 17, 33)],
    "seed": [{"seed": seed} for seed in (0, 1, 17, -1, 2**31, 2**63 + 5, 2**70)],
    "row": [{"first_row": row} for row in (0, 1, 17, 2**40)],
    "draw": [{"draw": draw} for draw in (1, 2, 17)] + [{"samples": samples} for samples in (1, 2, 17)],
    "scalar": [{"tau": 0.5}, {"tau": 16.0}, {"cap": 1.0}, {"cap": 30.5}],
}
# Few rows are split over several programs: that is another kernel, so batches are compared within either side.
SPLITTING = {call_select, call_sample}


@pytest.fixture(params=["recorded", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """Where the tensors are: "cpu" for recorded launches."""
    return "cpu" if request.param == "recorded" else "cuda"


@pytest.fixture
def compilations(device, monkeypatch):
    """A function from a call to the compilations it needs (recorded) or causes (on a GPU)."""
    if device == "cpu":
        from grade_kernels.aot.command import configuration

        def needed(call, change):
            with launch.recording() as launches:
                call(change, device)
            assert launches
            return {(configuration(one, target).key, str(configuration(one, target))) for one in launches
                    for target in ("sm_90", "gfx942")}  # fmt: skip

        return needed

    import triton

    made = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **what: made.append(what["repr"]))

    def caused(call, change):
        made.clear()
        call(change, device)
        torch.cuda.synchronize()
        return set(made)

    return caused


def assert_no_new(compilations, device, call, first: Call, changes):
    known = compilations(call, first)
    for change in changes:
        found = compilations(call, replace(first, **change))
        new = found - known if device == "cpu" else found
        assert not new, f"{change} compiles again: {sorted(str(n[1] if device == 'cpu' else n) for n in new)}"


@pytest.mark.parametrize("vocab", [ODD, EVEN])
@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__.removeprefix("call_"))
def test_nothing_is_compiled_again(compilations, device, call, what, vocab):
    first, changes = Call(vocab), CHANGES[what]
    if what == "batch" and call in SPLITTING:
        many = launch.multiprocessors(torch.device(device))
        assert_no_new(compilations, device, call, Call(vocab, n=many), [{"n": 4 * many + 1}, {"n": 17 * many}])
        first, changes = Call(vocab, n=2), [{"n": n} for n in (1, 3)]
    assert_no_new(compilations, device, call, first, changes)


def test_another_dtype_is_noticed(compilations, device):
    def call(c: Call, device):
        logprob.token_stats(c.logits(device, torch.float16 if c.seed else torch.float32), None, torch.float32)

    with pytest.raises(AssertionError, match="compiles again"):
        assert_no_new(compilations, device, call, Call(ODD, seed=0), [{"seed": 1}])
