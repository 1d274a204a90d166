"""torch.compile with dynamic shapes: one graph for all batch sizes, forward and backward."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import grade_kernels as gk

pytestmark = pytest.mark.triton
TABLE = torch.arange(600.0).view(60, 10)


def embedded(x: torch.Tensor, hard: bool) -> torch.Tensor:
    indices, chosen = torch.arange(4, device=x.device).expand(len(x), 4), torch.ones_like(x[:, 0], dtype=torch.int64)
    tokens = gk.SparseTokens(indices, x[:, :4].softmax(-1), chosen, x.detach()[:, 0], hard)
    table = x.sum() * TABLE.to(x.device)
    return gk.soft_embedding(tokens, table).square().sum() + gk.scatter_tokens(tokens, 60).square().sum()


FUNCTIONS = {
    "gumbel_topk": lambda x: gk.gumbel_topk(x, 4, 0.5, seed=1).weights.square().sum(),
    "logits_kl": lambda x: gk.logits_kl(x, x.detach() + 0.1 * x.detach().square()).sum(),
    "soft tokens": lambda x: embedded(x, False),
    "hard tokens": lambda x: embedded(x, True),
    "token_logprob": lambda x: gk.token_logprob(x, x.argmax(-1))[0].sum(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_graph_for_all_batches(name, device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, dynamic=True, backend=counter)
    for n in (5, 6, 9):
        x = torch.randn(n, 60, device=device, requires_grad=True)
        value = compiled(x)
        torch.testing.assert_close(value, FUNCTIONS[name](x))
        if value.requires_grad:
            torch.testing.assert_close(*(torch.autograd.grad(v, x)[0] for v in (value, FUNCTIONS[name](x))))
    assert counter.frame_count == 1
