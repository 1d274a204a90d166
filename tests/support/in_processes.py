"""A program of several processes for `tests/training/test_processes.py`, and how it is started.

Every process calls `work`; the runs' folders, and what the first process writes beside them, are what is compared.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from forked import forked
from prompt_data import chat_tokenizer
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers import LlamaConfig, LlamaForCausalLM

import grade
import grade.replay.replay
from grade.config import (
    Config,
    EvaluationConfig,
    GenerationConfig,
    LoraSettings,
    MethodConfig,
    ModelConfig,
    TrainConfig,
)
from grade.model.passes import fed_embeddings, policy_pass
from grade.model.policy import Policy
from grade.model.probe import combination
from grade.rollout import Rollout

PROMPTS = ["I saw this", "It", "We saw", "A", "The", "This", "They saw a film", "Is it"]
RESPONSES = 8
"""Of a step, over all processes."""


class Mean(grade.DifferentiableReward):
    """Reads the states of the base."""

    shares_base_pass = True

    def value(self, rollout, base, fed=(), *, activation_checkpointing=False):
        mask = rollout.mask[..., None]
        return torch.tanh((base.response.float() * mask).sum((1, 2)) / mask.sum((1, 2)))


class OfSomePrompts(grade.RewardFunction):
    """The same for all responses to every second prompt: their groups have no gradient."""

    def score(self, rollout):
        one = (rollout.tokens * rollout.mask % 7).sum(1) / rollout.mask.sum(1)
        return torch.where(rollout.prompt_index % 2 == 0, one, 1.0) if rollout.prompt_index is not None else one


def small_model(folder: Path) -> Path:
    """A Llama of random weights that ends some responses early, with a tokenizer of characters."""
    tokenizer = chat_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.15,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 4
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def config_of(method: str, run_dir: Path, processes: int, *, fsdp: bool = False, steps: int = 2) -> Config:
    """A run of `RESPONSES` a step, each process with its share, in responses of different lengths."""
    grpo = method == "grpo"
    return Config(
        name="several",
        device="cpu",
        model=ModelConfig(dtype="float32", fsdp=fsdp, lora=LoraSettings(r=2)),
        generation=GenerationConfig(max_new_tokens=20, top_k=16, batch_size=2, samples_per_prompt=2 if grpo else 1),
        method=replace(MethodConfig(), name=method, tau_start=2.0, tau_end=2.0, kl_coef=0.0 if grpo else 0.05),
        train=TrainConfig(
            steps=steps,
            batch_size=1,
            accumulation_steps=RESPONSES // processes,
            learning_rate=3e-3,
            run_dir=str(run_dir),
            tensorboard=False,
            samples_every=1,
            keep_adapters=True,
        ),
        evaluation=EvaluationConfig(every=2, validation_prompts=5, test_prompts=3, batch_size=2),
    )


def trained(model: str | Path, config: Config) -> grade.GradeTrainer:
    """The trainer of a run that is through."""
    reward = Mean() if config.method.name == "grade-ste" else OfSomePrompts()
    trainer = grade.GradeTrainer(str(model), reward, PROMPTS, config=config, test_prompts=PROMPTS[:3])
    trainer.train()
    return trainer


def work(model: str, folder: Path, methods: list[str]) -> None:
    """Train with every method, with whole layers and with sharded ones; count what the hops of GRADE send."""
    processes, main = int(os.environ["WORLD_SIZE"]), os.environ["RANK"] == "0"
    solve, sent = grade.replay.replay.solve_hops, []

    def counted(direct, hop, real, settings):
        with CommDebugMode() as seen:
            found = solve(direct, hop, real, settings)
        counts = {str(name).split(".")[-1]: number for name, number in seen.get_comm_counts().items()}
        sent.append({**counts, "hops": int(found[1].max())})
        return found

    grade.replay.replay.solve_hops = counted
    for method in methods:
        for fsdp in (False, True):
            name = f"{method}-{'sharded' if fsdp else 'whole'}"
            sent.clear()
            trainer = trained(model, config_of(method, folder / name, processes, fsdp=fsdp))
            if main:
                weights = dict(trainer.policy.causal_lm.named_parameters())
                parts = {n: p for n, p in weights.items() if isinstance(p, DTensor)}
                here = sum(p.to_local().numel() for p in parts.values())
                found = {
                    "sharded": sorted(parts),
                    "share": here / sum(p.numel() for p in parts.values()) if parts else 1.0,
                    "frozen": sorted(n for n, p in weights.items() if not p.requires_grad),
                    "trained": sorted(n for n, p in trainer.policy.model.named_parameters() if p.requires_grad),
                    "sent": list(sent),
                }
            if fsdp and method == "grade-ste":
                apart = of_one_pass_and_two(trainer.policy)
                if main:
                    found["apart"] = apart
            if main:
                (folder / f"{name}.json").write_text(json.dumps(found))


def of_one_pass_and_two(policy: Policy) -> dict:
    """How far states and gradients of the policy's two passes are from those of its one, and the positions of the
    passes. Two pay in the sizes of the first process alone."""
    batch, prompt, response = (4, 44, 6) if os.environ["RANK"] == "0" else (2, 5, 6)
    ids = torch.arange(batch * (prompt + response)).view(batch, -1) % len(policy.embedding)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :3] = False
    tokens = ids[:, prompt:]
    weight = torch.ones(tokens.shape)
    rollout = Rollout(
        ids[:, :prompt], mask[:, :prompt], tokens, mask[:, prompt:], tokens[..., None], weight, tokens, padded=True
    )
    found, lengths, forward = [], [], policy.forward

    def counted(embeddings, *rest):
        lengths.append(embeddings.shape[1])
        return forward(embeddings, *rest)

    policy.forward = counted
    for prompt_cache in (False, True):
        x = fed_embeddings(rollout, policy.embedding, policy.embedding_scale).requires_grad_()
        hidden = policy_pass(policy, rollout, x, prompt_cache=prompt_cache, hops=3)
        gradient = weights = combination(hidden)
        for _ in range(2):
            (gradient,) = torch.autograd.grad(hidden, x, gradient, retain_graph=True)
        of_weights = torch.autograd.grad(hidden, policy.parameters(), weights)
        found.append(torch.cat([part.flatten() for part in (hidden.detach(), gradient, *of_weights)]))
    policy.forward = forward
    one, two = found
    return {"lengths": lengths, "error": ((two - one).norm() / one.norm()).item()}


def killed(model: str, folder: Path) -> None:
    """The second process is killed in the second step."""
    from grade.training.trainer import Trainer

    in_step(Trainer, 1, signal.SIGKILL)
    config = config_of("grade-ste", folder / "killed", 2, steps=50)
    trained(model, replace(config, train=replace(config.train, save_every=1)))


def in_step(trainer: type, step: int, number: signal.Signals) -> None:
    """Let the second process send itself a signal in a step."""
    train_step = trainer.train_step

    def signalled(self):
        if os.environ["RANK"] == "1" and self.step == step:
            os.kill(os.getpid(), number)
        return train_step(self)

    trainer.train_step = signalled


def commands(config: str, folder: Path) -> None:
    """`grade train` in two processes: the second is asked to stop, then, in another run, killed."""
    import grade.cli
    from grade.training.trainer import Trainer

    grade.cli._PATIENCE = 0.1
    own, codes = Trainer.train_step, []
    for name, number in (("stopped", signal.SIGTERM), ("killed", signal.SIGKILL)):
        Trainer.train_step = own
        in_step(Trainer, 1, number)
        codes.append(grade.cli.main(["train", config, "--train.run_dir", str(folder / name)]))
        print(f"code {codes[-1]}", flush=True)


def launched(*arguments: str | Path, processes: int, timeout: float = 600) -> subprocess.CompletedProcess:
    """This program under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    program = [str(Path(__file__).resolve()), *map(str, arguments)]
    return subprocess.run([*launcher, *program], env=_environment(), capture_output=True, text=True, timeout=timeout)


def without_launcher(
    *arguments: str | Path,
    program: str | Path = __file__,
    processes: int = 2,
    cwd: Path | None = None,
    timeout: float = 600,
) -> list[tuple[int, str, str]]:
    """A program in processes that nobody ends where another does, forked from one that has imported what they need:
    exit code, output and errors of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    group |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    ranks = map(str, range(processes))
    return forked(
        [([Path(program).resolve(), *arguments], {**group, "RANK": rank, "LOCAL_RANK": rank}) for rank in ranks],
        cwd=cwd,
        timeout=timeout,
    )


def _environment() -> dict[str, str]:
    support = Path(__file__).resolve().parent
    paths = [str(support), str(support.parents[1]), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def main(what: str, first: str, folder: str, methods: str = "", then: str = "") -> None:
    """What the arguments ask for."""
    if what == "work":
        work(first, Path(folder), methods.split(","))
        if then == "killed":
            killed(first, Path(folder))
    else:
        commands(first, Path(folder))


if __name__ == "__main__":
    import in_processes  # by this name the rewards are the same in every program

    in_processes.main(*sys.argv[1:])
