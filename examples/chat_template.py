"""An instruct model: prompts are conversations, which the tokenizer's chat template writes.

    python examples/chat_template.py RUN_DIR

The built-in model is no instruct model and has no template, so it is given a small one; `MODEL` names another, whose
own template is used.
"""

from __future__ import annotations

import os
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grade import DifferentiableReward, EmbeddingTable, GradeConfig, GradeTrainer
from grade.built_in.demo_model import demo_model

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
QUESTIONS = ["What did you watch last night?", "How was the film?", "Who played in it?", "What is it about?"]
CONVERSATIONS = [
    [{"role": "system", "content": "You talk about films."}, {"role": "user", "content": question}]
    for question in QUESTIONS
]


class Words(DifferentiableReward):
    """The share of a response's tokens that are one of some words, softly: their embeddings' nearness to the words'."""

    raises = "the share of tokens that are near some words"
    reads = "response"

    def __init__(self, policy, words):
        ids = [i for word in words for i in policy.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]]
        self.tables = [EmbeddingTable(policy.embedding, policy.embedding_scale)]
        words = policy.embed(torch.tensor(ids, device=policy.device)).float()
        self.words = torch.nn.functional.normalize(words, dim=-1)

    def value(self, rollout, base, fed=(), *, activation_checkpointing=False):
        tokens = torch.nn.functional.normalize(fed[0].float(), dim=-1, eps=1e-6)  # [B, S, d]
        nearest = torch.logsumexp(8 * tokens @ self.words.T, dim=-1) / 8  # [B, S]
        return (nearest * rollout.mask).sum(1) / rollout.mask.sum(1)


def main(run_dir: str) -> None:
    name = os.environ.get("MODEL") or str(demo_model())
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.chat_template = tokenizer.chat_template or TEMPLATE

    config = GradeConfig(device="cpu")
    config.generation.max_new_tokens, config.generation.top_k = 16, 128
    config.train.run_dir, config.train.steps, config.train.learning_rate = run_dir, 8, 5e-3
    config.train.batch_size, config.train.accumulation_steps = 16, 1
    config.evaluation.every = 4
    trainer = GradeTrainer(
        model,
        lambda policy: Words(policy, ["comedy", "funny", "jokes"]),
        CONVERSATIONS,
        config=config,
        tokenizer=tokenizer,
    )
    result = trainer.train()
    print(f"reward {result.base.reward:.3f} before, {result.best.reward:.3f} after")
    for question, answer in zip(QUESTIONS, trainer.generate(CONVERSATIONS), strict=True):
        print(f"> {question}\n{answer}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/chat")
