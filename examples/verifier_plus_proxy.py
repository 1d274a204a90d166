"""A verifier beside a learned proxy: a function without a gradient and a differentiable reward in one run.

    python examples/verifier_plus_proxy.py RUN_DIR

GRADE follows the proxy by backpropagation and the verifier by the score function, on the same responses. Here the
proxy is the nearness of a response's embeddings to a text's, and the verifier asks for a word that the data set names
for each prompt. Both are logged by name.
"""

from __future__ import annotations

import os
import sys

import torch

from grade import DifferentiableReward, EmbeddingTable, GradeConfig, GradeTrainer

MODEL = os.environ.get("MODEL", "built-in:demo")
ROWS = [
    {"prompt": "I watched this film with", "word": "comedy"},
    {"prompt": "The story is set in", "word": "the"},
    {"prompt": "It is a comedy about", "word": "funny"},
    {"prompt": "We saw it at home and", "word": "was"},
]


class Proxy(DifferentiableReward):
    """Cosine between the response's mean embedding and a text's."""

    raises = "the nearness to a text"
    reads = "response"

    def __init__(self, policy):
        self.tables = [EmbeddingTable(policy.embedding, policy.embedding_scale)]
        ids = policy.tokenizer("a funny comedy", add_special_tokens=False)["input_ids"]
        self.target = policy.embed(torch.tensor(ids, device=policy.device)).float().mean(0)

    def value(self, rollout, base, fed=(), *, activation_checkpointing=False):
        mean = fed[0].float().sum(1) / rollout.mask.sum(1, keepdim=True)
        return torch.nn.functional.cosine_similarity(mean, self.target, dim=-1)


def verifier(prompts, completions, word):
    """1 where the word that the row names is in the response."""
    return [float(wanted in text) for text, wanted in zip(completions, word, strict=True)]


def main(run_dir: str) -> None:
    config = GradeConfig(device="cpu")
    config.model.dtype = "float32"
    config.generation.max_new_tokens, config.generation.top_k, config.generation.samples_per_prompt = 16, 128, 4
    config.train.run_dir, config.train.steps, config.train.learning_rate = run_dir, 12, 5e-3
    config.train.batch_size, config.train.accumulation_steps = 16, 1
    config.evaluation.every = 6
    trainer = GradeTrainer(MODEL, [(Proxy, 1.0), (verifier, 0.5)], ROWS, config=config)
    result = trainer.train()
    for name in ("Proxy", "verifier"):
        mean = f"rewards/{name}/mean"
        print(f"{name}: {result.base.details[mean]:.3f} and {result.best.details[mean]:.3f}")
    print(f"reward {result.base.reward:.3f} before, {result.best.reward:.3f} after")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/verifier")
