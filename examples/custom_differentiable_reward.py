"""A differentiable reward of your own: how near a response is to a text, in the space of the policy's embeddings.

    python examples/custom_differentiable_reward.py RUN_DIR

It trains a built-in model of about a million parameters for a few steps, on a CPU and without a hub. With `MODEL`
another, `Nearness` stays as it is.
"""

from __future__ import annotations

import os
import sys

import torch

from grade import Callback, DifferentiableReward, EmbeddingTable, GradeConfig, GradeTrainer

MODEL = os.environ.get("MODEL", "built-in:demo")
PROMPTS = ["I watched this film with", "The story is set in", "It is a comedy about", "We saw it at home and"]


class Nearness(DifferentiableReward):
    """Cosine between the response's mean embedding and a text's.

    It reads the response in the policy's own embedding table, so its gradient flows to the tokens' embeddings and
    through no model.
    """

    raises = "the nearness to a text"
    reads = "response"

    def __init__(self, policy, text):
        self.tables = [EmbeddingTable(policy.embedding, policy.embedding_scale)]  # [V, d]; the response comes as `fed`
        ids = torch.tensor(policy.tokenizer(text, add_special_tokens=False)["input_ids"], device=policy.device)
        self.text = text
        self.target = policy.embed(ids).float().mean(0)  # [d]

    def value(self, rollout, base, fed=(), *, activation_checkpointing=False):
        mean = fed[0].float().sum(1) / rollout.mask.sum(1, keepdim=True)  # [B, d]; padding is zero
        return torch.nn.functional.cosine_similarity(mean, self.target, dim=-1)  # [B]


class Print(Callback):
    def on_validation(self, trainer, evaluation):
        print(f"after {evaluation.step} steps: {evaluation.reward:.3f}")


def main(run_dir: str) -> None:
    config = GradeConfig(device="cpu")
    config.model.dtype = "float32"
    config.generation.max_new_tokens, config.generation.top_k = 16, 128
    config.method.kl_coef = 0.05
    config.train.run_dir, config.train.steps, config.train.learning_rate = run_dir, 12, 5e-3
    config.train.batch_size, config.train.accumulation_steps = 16, 1
    config.evaluation.every = 6
    trainer = GradeTrainer(
        MODEL,
        lambda policy: Nearness(policy, "a funny comedy with good jokes"),
        PROMPTS,
        config=config,
        callbacks=[Print()],
    )
    result = trainer.train()
    print(f"nearness {result.base.reward:.3f} before, {result.best.reward:.3f} after")
    print("\n".join(trainer.generate(PROMPTS)))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/nearness")
