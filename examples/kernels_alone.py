"""The kernels without the trainer: a reward's gradient through sampled tokens, in plain PyTorch.

    python examples/kernels_alone.py

A table of logits, one row a position, learns to draw tokens whose embeddings point along a direction. `grade_kernels`
needs torch and triton alone.
"""

from __future__ import annotations

import torch

from grade_kernels import gumbel_topk, soft_embedding

POSITIONS, VOCABULARY, WIDTH = 64, 5_000, 32


def main(steps: int = 60) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(VOCABULARY, WIDTH, generator=generator)
    direction = torch.nn.functional.normalize(torch.randn(WIDTH, generator=generator), dim=0)
    logits = torch.zeros(POSITIONS, VOCABULARY, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.3)
    rewards = []
    for step in range(steps):
        tokens = gumbel_topk(logits, k=64, tau=1.0, seed=step)  # draws among 64 candidates
        x = soft_embedding(tokens, embedding)  # [POSITIONS, WIDTH], exactly the drawn tokens' rows
        reward = (x @ direction).mean()
        optimizer.zero_grad()
        (-reward).backward()  # straight through the draw, to the candidates' logits
        optimizer.step()
        rewards.append(reward.item())
    first, last = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
    print(f"mean reward {first:.3f} before, {last:.3f} after (of the first and the last five steps)")
    return first, last


if __name__ == "__main__":
    main()
