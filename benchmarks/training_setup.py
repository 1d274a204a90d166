"""Models in real shapes with random weights, and one training step by each of the compared algorithms."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.published import published_step
from grade.config import Config, GenerationConfig, LoraSettings, ModelConfig, TrainConfig
from grade.config.methods import MethodConfig
from grade.memory.peak import peak_bytes
from grade.methods import make_method
from grade.methods.metrics import Phases, now, peak_memory_gib, reset_peak_memory
from grade.methods.services import Services
from grade.model.loading import add_adapter
from grade.model.passes import pass_sizes
from grade.model.policy import Policy
from grade.planning.prompt_pass import FEW_HOPS
from grade.planning.public_shapes import PUBLIC
from grade.replay.compiling import compile_layers
from grade.rewards.shared import RewardHead, SharedReward
from grade.sampling.compiled import CompiledDecoding
from grade.sampling.decode import Decoding
from grade.sampling.sample import sample

ALGORITHMS = {
    "published": "published",
    "cached": "published, KV cache",
    "replay": "replay",
    "checkpointed": "replay, activation checkpointing",
    "compiled": "replay, rollout.compile",
    "layers": "replay, rollout.compile and train.compile",
}
REPLAYED = ("replay", "checkpointed", "compiled", "layers")
COMPILED = ("compiled", "layers")
_EOS = 2
_LORA = ["q_proj", "k_proj", "v_proj", "o_proj"]
_LLAMA_15M = dict(
    vocab_size=32_000,
    hidden_size=288,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=6,
)


def _qwen3(name: str) -> tuple[str, dict[str, Any]]:
    sizes = {key: value for key, value in PUBLIC[name].items() if key not in ("model_type", "tie_word_embeddings")}
    return "qwen3", {**sizes, "rope_theta": 1_000_000.0}


_LLAMA_260K = dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=172,
    num_hidden_layers=5,
    num_attention_heads=8,
    num_key_value_heads=4,
)
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-260k": ("llama", _LLAMA_260K),
    "llama-15m": ("llama", _LLAMA_15M),
    "qwen3-0.6b": _qwen3("Qwen/Qwen3-0.6B"),
    "qwen3-4b": _qwen3("Qwen/Qwen3-4B"),
}


@dataclass(frozen=True)
class Setting:
    """What every algorithm is given.

    Args:
        shape: a key of SHAPES.
        batch, prompt, length, k: responses, tokens of a prompt, tokens of a response, candidates per token.
        dtype: of the frozen weights.
        layers: decoder layers, if fewer than the shape's: kernels are compiled for the widths alone.
    """

    shape: str
    batch: int
    prompt: int
    length: int
    k: int = 256
    tau: float = 2.0
    hop_tol: float = 1e-2
    max_hops: int = 16
    kl_coef: float = 0.1
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda", "meta"] = "cpu"
    seed: int = 0
    layers: int | None = None


class _Tokenizer:
    """The part of a tokenizer that `Policy` reads."""

    pad_token_id = eos_token_id = _EOS

    def __init__(self, size: int):
        self._size = size

    def get_vocab(self) -> dict[str, int]:
        return {str(number): number for number in range(self._size)}


class Bench:
    """A policy on random weights with an adapter that is not zero, its reward, prompts and optimizer.

    Attributes:
        compiling_seconds: that compiling took before the first step.
    """

    def __init__(self, setting: Setting, algorithm: str):
        self.setting, self.algorithm = setting, algorithm
        self.config = Config(
            seed=setting.seed,
            device="cpu" if setting.device == "meta" else setting.device,
            model=ModelConfig(name=setting.shape, dtype=setting.dtype, lora=LoraSettings(target_modules=_LORA)),
            generation=GenerationConfig(
                max_new_tokens=setting.length, min_new_tokens=0, top_k=setting.k, ignore_eos=True
            ),
            method=MethodConfig(
                tau_start=setting.tau,
                tau_end=setting.tau,
                hop_tol=setting.hop_tol,
                max_hops=setting.max_hops,
                kl_coef=setting.kl_coef,
                activation_checkpointing=algorithm == "checkpointed",
            ),
            train=TrainConfig(batch_size=setting.batch, accumulation_steps=1, compile=algorithm == "layers"),
        )
        self.device = torch.device(setting.device)
        self.policy = self._policy()
        start = now(self.device)
        self.decoding = (CompiledDecoding if algorithm in COMPILED else Decoding)(self.policy)
        compile_layers(self.policy, self.config)
        self.compiling_seconds = now(self.device) - start
        self.reward = SharedReward(self.policy, RewardHead(self.policy.head.weight.shape[1], 64))
        generator = torch.Generator().manual_seed(setting.seed)
        size = (setting.batch, setting.prompt)
        self.prompts = torch.randint(_EOS + 1, self.policy.vocab_size, size, generator=generator).to(self.device)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-4)
        self.phases = Phases(self.device)

    def _policy(self) -> Policy:
        from transformers import AutoConfig, AutoModelForCausalLM

        setting, (kind, sizes) = self.setting, SHAPES[self.setting.shape]
        if setting.layers is not None:
            sizes = {**sizes, "num_hidden_layers": setting.layers}
        context = max(4096, setting.prompt + setting.length)
        config = AutoConfig.for_model(
            kind,
            **sizes,
            max_position_embeddings=context,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=_EOS,
            pad_token_id=_EOS,
        )
        torch.manual_seed(setting.seed)
        with self.device:  # billions of weights are drawn where they will stay
            base = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, setting.dtype))
        model = add_adapter(base, self.config.model, self.config.seed)
        generator = torch.Generator().manual_seed(setting.seed)
        with torch.no_grad():  # at zero the adapter's first factor has no gradient to compare
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        return Policy(model.to(self.device), _Tokenizer(sizes["vocab_size"]), probe=setting.device != "meta")

    def restore(self, weights: list[Tensor]) -> None:
        """Put the adapter back; the optimizer's moments stay."""
        with torch.no_grad():
            for parameter, kept in zip(self.policy.parameters(), weights, strict=True):
                parameter.copy_(kept)

    def rows(self) -> Tensor:
        """[B, S] int64 noise rows, the trainer's."""
        first = torch.arange(self.setting.batch, device=self.device) * self.setting.length
        return first[:, None] + torch.arange(self.setting.length, device=self.device)

    def step(self) -> dict:
        """One whole training step by the algorithm: {"seconds" by the clock, "phases": their seconds, "tokens": [B, S],
        "gradient": [p], and for replay "hops" and "apart", whether the policy's pass was two}."""
        self.phases.take()
        measured: dict = {}
        start = now(self.device)

        def update() -> float:
            nonlocal start
            parameters = self.policy.parameters()
            copying = now(self.device)
            measured["gradient"] = torch.cat([p.grad.flatten().float() for p in parameters if p.grad is not None]).cpu()
            start += now(self.device) - copying  # no part of a step
            with self.phases("update"):
                norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
            return norm

        if self.algorithm in REPLAYED:
            config = self.config
            method = make_method(
                self.policy,
                self.reward,
                config.method,
                config.generation,
                config.train,
                Services(phase=self.phases),
                seed=config.seed,
                activation_checkpointing=config.method.activation_checkpointing is True,
            )
            mask = torch.ones_like(self.prompts, dtype=torch.bool)
            with self.phases("rollout"):
                rollout = sample(
                    self.policy,
                    self.prompts,
                    mask,
                    method.sampling(0),
                    seed=self.setting.seed,
                    first_rows=self.rows()[:, 0],
                    decoding=self.decoding,
                )
            measured["tokens"] = rollout.tokens.cpu()
            sizes, hops = pass_sizes(self.policy, rollout), min(config.method.max_hops, FEW_HOPS)
            measured["apart"] = self.algorithm != "checkpointed" and sizes.pay_apart(hops)
            measured["hops"] = method.step([rollout], 0, update)["hops"]
        else:
            setting = self.setting
            measured["tokens"] = published_step(
                self.policy,
                self.reward,
                self.prompts,
                length=setting.length,
                k=setting.k,
                tau=setting.tau,
                seed=setting.seed,
                rows=self.rows(),
                kl_coef=setting.kl_coef,
                cached=self.algorithm == "cached",
                phase=self.phases,
            ).cpu()
            update()
        return {**measured, "seconds": now(self.device) - start, "phases": self.phases.take()}


def measure(
    setting: Setting,
    algorithm: str,
    *,
    repeats: int,
    seconds: float,
    counted: float,
    keep: Callable[[dict], None] = lambda step: None,
) -> dict:
    """Steps of one algorithm, each from the same weights: at most `repeats`, or fewer once they took `seconds`.

    A step first loads what is loaded lazily: a short one, or where shapes are compiled one of the same length. Peak
    memory is that of the whole process (resident on CPU, allocated on the accelerator); `before_gib` is what it held
    before the steps. On a CPU `tensors_gib` is the peak of the bytes in living tensors, counted in one step more (not
    where a step takes longer than `counted` seconds): what a heap loses between them is no part of it. `first_seconds`
    is what compiled: the first step, and layers before it. `keep` is given every step as soon as it is measured: its
    seconds and phases, with hops and memory so far.
    """
    if algorithm not in COMPILED:
        Bench(replace(setting, length=2), algorithm).step()
        gc.collect()  # checkpointed layers and their policy hold each other
    bench = Bench(setting, algorithm)
    weights = [p.detach().clone() for p in bench.policy.parameters()]
    first = None
    if algorithm in COMPILED:
        first = bench.compiling_seconds + bench.step()["seconds"]
        bench.restore(weights)
    reset_peak_memory(bench.device)
    before = peak_memory_gib(bench.device)  # nothing has happened since: what is held now
    taken: list[dict] = []
    while True:
        found = bench.step()
        taken.append({"seconds": found["seconds"], "phases": found["phases"]})
        peak = max(before, peak_memory_gib(bench.device))
        keep({**taken[-1], "hops": found.get("hops"), "peak_gib": peak, "before_gib": before, "first_seconds": first})
        total = sum(step["seconds"] for step in taken)
        if len(taken) == repeats or total + total / len(taken) > seconds:
            break
        bench.restore(weights)
    # The kernel counts pages in batches: a peak can read a little below what was held before.
    peak, living = max(before, peak_memory_gib(bench.device)), None
    if bench.device.type == "cpu" and algorithm not in COMPILED and found["seconds"] <= counted:
        bench.restore(weights)
        living = peak_bytes(bench.step, bench.device)[1] / 2**30
    return {
        "steps": taken,
        "peak_gib": peak,
        "before_gib": before,
        "tensors_gib": living,
        "tokens": found["tokens"],
        "gradient": found["gradient"],
        "hops": found.get("hops"),
        "apart": found.get("apart"),
        "first_seconds": first,
    }
