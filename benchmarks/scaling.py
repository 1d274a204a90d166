"""The formulas of `grade plan` against what a step really does: operations, bytes held, and seconds.

    python -m benchmarks.scaling                                              # counted here, in a minute
    python -m benchmarks.scaling --save benchmarks/results/scaling.json       # kept
    python -m benchmarks.scaling --table benchmarks/results/scaling.json      # the tables of what was kept
    python -m benchmarks.scaling --seconds benchmarks/results/training-cpu.json   # a measurement of benchmarks.training

A small Llama with random weights takes a step by each method at several lengths and numbers of responses. Operations
are those of matrix products, as `torch.utils.flop_counter` counts them, with attention written out in products (its
fused form on a CPU is not counted). Bytes are the peak of what living tensors hold beside the model, in a step of its
own. Seconds are compared phase by phase with those that `benchmarks.training` measured: at shares of the machine's
rates that are fitted to them, two numbers and a launch for all phases and lengths.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.saved import SAVED, command, document_of, new_parser, read_saved
from benchmarks.training_setup import SHAPES, Bench, Setting
from grade.config import Config, GenerationConfig, ModelConfig, TaskConfig, TrainConfig
from grade.config.methods import MethodConfig, PPOConfig, ReinforceConfig
from grade.memory.peak import peak_bytes
from grade.methods import make_method
from grade.methods.services import Services
from grade.model.policy import Policy
from grade.planning.devices import DEVICES, Efficiency
from grade.planning.memory import memory_of
from grade.planning.phases import phases_of
from grade.planning.run import Run
from grade.planning.seconds import time_of
from grade.planning.shape import ModelShape, shape_of
from grade.rewards.base import Reward
from grade.sampling.sample import sample
from grade.tables import Column, Table, numbers

WRITTEN_OUT = Efficiency(attention_backward=2.0)
"""Attention in products of its own, whose backward pass reads the scores that were kept."""
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
"""x [..., i] with a weight [o, i], for which torch.utils.flop_counter has no formula."""
_SHAPE, _K = "llama-260k", 16
_SIZES = ((1, 16, 32), (4, 16, 64), (2, 48, 128))
"""B, P and S."""
_STEPS = (
    ("grade-ste", False, 1),
    ("grade-ste", True, 1),
    ("grade", False, 1),
    ("ppo", False, 1),
    ("reinforce", False, 1),
    ("grpo", False, 2),
)
"""Methods, whether activations are recomputed, and samples of a prompt."""


class Counting(TorchDispatchMode):
    """Operations of the phases of a step, while it is active, by the formulas of `torch.utils.flop_counter`, whose own
    counter follows modules by hooks that recomputed layers do not bear."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: dict[str, float] = {}
        self._total = 0.0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        operator: Any = func
        kwargs, packet = kwargs or {}, operator._overloadpacket
        if packet is _ONEDNN:
            self._total += 2 * args[0].numel() * args[1].shape[0]
        elif packet not in flop_registry:
            with self:  # such as a linear layer in inference mode
                out = operator.decompose(*args, **kwargs)
            return func(*args, **kwargs) if out is NotImplemented else out
        out = func(*args, **kwargs)
        if packet in flop_registry:
            self._total += flop_registry[packet](*args, **kwargs, out_val=out)
        return out

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is counted inside is the phase's."""
        before = self._total
        yield
        self.flops[name] = self.flops.get(name, 0.0) + self._total - before


def step(policy: Policy, reward: Reward, config: Config, prompts: Tensor, services: Services) -> float:
    """A step of config's method without its update: sampled, and differentiated. Returns the hops of a sequence, 0
    where the method has none.

    Args:
        prompts: [U, P], without padding.
    """
    method = make_method(
        policy,
        reward,
        config.method,
        config.generation,
        config.train,
        services,
        seed=config.seed,
        activation_checkpointing=config.method.activation_checkpointing is True,
    )
    copies, length = config.generation.samples_per_prompt, config.generation.max_new_tokens
    rows = torch.arange(len(prompts) * copies) * length
    with services.phase("rollout"):
        rollout = sample(
            policy,
            prompts,
            torch.ones_like(prompts, dtype=torch.bool),
            method.sampling(0),
            seed=config.seed,
            first_rows=rows,
            samples_per_prompt=copies,
        )
    metrics = method.step([rollout], 0, lambda: 0.0)
    for parameter in policy.parameters():
        parameter.grad = None
    return metrics.get("hops", 0.0)


def counted(policy: Policy, reward: Reward, config: Config, prompts: Tensor) -> tuple[dict[str, float], float]:
    """({phase: operations}, hops) of a step, behind one that measures which products are the quickest here."""
    step(policy, reward, config, prompts, Services())
    with Counting() as counting:
        hops = step(policy, reward, config, prompts, Services(phase=counting.phase))
    return counting.flops, hops


def held(policy: Policy, reward: Reward, config: Config, prompts: Tensor) -> int:
    """Peak of the bytes that a step's tensors hold beside what is loaded."""
    return peak_bytes(lambda: step(policy, reward, config, prompts, Services()), torch.device("cpu"))[1]


def planned_run(
    shape: ModelShape, config: Config, hops: float, efficiency: Efficiency = WRITTEN_OUT, apart: bool | None = None
) -> Run:
    """The run whose formulas are compared."""
    recompute = config.method.activation_checkpointing is True
    return Run(config, shape, DEVICES["cpu"], hops=hops, recompute=recompute, efficiency=efficiency, apart=apart)


def planned_flops(run: Run) -> dict[str, float]:
    """{phase: operations} by the formulas, of the phases that multiply."""
    return {phase.name: phase.work.flops for phase in phases_of(run) if phase.work.flops}


def planned_bytes(run: Run) -> float:
    """What a step holds beside what is loaded and the optimizer's moments, by the formulas."""
    memory = memory_of(run)
    return memory.peak - sum(memory.parts["always"].values())


def shape_named(name: str) -> ModelShape:
    """Of `benchmarks.training_setup.SHAPES`."""
    kind, sizes = SHAPES[name]
    return shape_of({**sizes, "model_type": kind, "tie_word_embeddings": True}, name)


def config_of(setting: Setting, method: str = "grade-ste", recompute: bool = False, copies: int = 1) -> Config:
    """As `benchmarks.training_setup.Bench` has it, by another method and with several samples of a prompt."""
    return Config(
        task=TaskConfig(prompt_max_tokens=setting.prompt),
        model=ModelConfig(name=setting.shape, dtype=setting.dtype),
        generation=GenerationConfig(
            max_new_tokens=setting.length, min_new_tokens=0, top_k=setting.k, ignore_eos=True, samples_per_prompt=copies
        ),
        method=MethodConfig(
            name=cast(Any, method),
            tau_start=setting.tau,
            tau_end=setting.tau,
            hop_tol=setting.hop_tol,
            max_hops=setting.max_hops,
            activation_checkpointing=recompute,
            reinforce=ReinforceConfig(baseline="leave_one_out" if setting.batch > 1 else "none"),
            ppo=PPOConfig(minibatches=1, target_kl=None),
        ),
        train=TrainConfig(batch_size=setting.batch),
    )


def measure(options: argparse.Namespace) -> dict:
    """Counts of every step of `_STEPS` and `_SIZES`."""
    rows: list[dict] = []
    # As many hops for each response: a batch makes those of its slowest.
    first = Setting(shape=_SHAPE, batch=1, prompt=1, length=1, k=_K, hop_tol=0.0, max_hops=3)
    benches = {recompute: Bench(first, "checkpointed" if recompute else "replay") for recompute in (False, True)}
    for method, recompute, copies in _STEPS:
        bench = benches[recompute]
        for batch, prompt, length in _SIZES:
            if batch % copies:
                continue
            setting = replace(first, batch=batch, prompt=prompt, length=length)
            config = config_of(setting, method, recompute, copies)
            generator = torch.Generator().manual_seed(0)
            prompts = torch.randint(3, bench.policy.vocab_size, (batch // copies, prompt), generator=generator)
            bench.policy.causal_lm.set_attn_implementation("sdpa")
            bytes_held = held(bench.policy, bench.reward, config, prompts)
            bench.policy.causal_lm.set_attn_implementation("eager")
            flops, hops = counted(bench.policy, bench.reward, config, prompts)
            row = {"setting": asdict(setting), "method": method, "recompute": recompute, "copies": copies}
            rows.append({**row, "hops": hops, "flops": flops, "bytes": bytes_held})
    return {"torch": torch.__version__, "rows": rows}


def document(payload: dict) -> str:
    """Operations and bytes that were counted, and the formulas' over these."""
    lines = []
    for row in payload["rows"]:
        setting = Setting(**row["setting"])
        run = planned_run(
            shape_named(setting.shape), config_of(setting, row["method"], row["recompute"], row["copies"]), row["hops"]
        )
        found = {name: flops for name, flops in row["flops"].items() if flops}
        planned = planned_flops(run)
        ratios = [planned.get(name, 0.0) / flops for name, flops in found.items()]
        name = row["method"] + (", recomputed" if row["recompute"] else "")
        lines.append(
            [
                f"{name}",
                *map(str, (setting.batch, setting.prompt, setting.length)),
                f"{sum(found.values()) / 1e9:.3g}",
                f"{sum(planned.values()) / sum(found.values()):.4f}",
                f"{min(ratios):.4f} to {max(ratios):.4f}",
                f"{row['bytes'] / 2**20:.1f}",
                f"{planned_bytes(run) / row['bytes']:.2f}",
            ]
        )
    titles = ("B", "P", "S", "GFLOP, counted", "planned / counted", "of each phase", "MiB held", "planned / held")
    return Table("", [Column("method"), *numbers(titles)], lines).markdown() + "\n"


def seconds_document(payload: dict) -> str:
    """Seconds and bytes of a measurement of `benchmarks.training`, the formulas' over these."""
    base = Setting(**payload["setting"])
    shape, lines, errors = shape_named(base.shape), [], []
    for row in payload["rows"]:
        if row["status"] != "ok" or row["algorithm"] not in ("replay", "checkpointed"):
            continue
        setting = replace(base, length=row["length"])
        config = config_of(setting, recompute=row["algorithm"] == "checkpointed")
        # Rows from before there were two passes do not say which it was.
        run = planned_run(shape, config, row["hops"], DEVICES["cpu"].reached, apart=row.get("apart", False))
        planned = {phase.name: time_of(phase.parts, run, 1).seconds for phase in phases_of(run)}
        names = [name for name in planned if name != "update"]
        errors += [abs(math.log(planned[name] / row["phases"][name])) for name in names]
        cells = [f"{planned[name] / row['phases'][name]:.2f}" for name in names]
        total = sum(planned.values()) / sum(row["phases"].values())
        held_bytes = planned_bytes(run) / (row["tensors_gib"] * 2**30)
        recomputed = "recomputed" if run.recompute else "kept"
        lines.append([str(setting.length), recomputed, *cells, f"{total:.2f}", f"{held_bytes:.2f}"])
    if not lines:
        sys.exit("That file has no step by replay that was measured.")
    columns = [*numbers(["S"]), Column("activations"), *numbers([*names, "step", "bytes held"])]
    middle = math.exp(sorted(errors)[len(errors) // 2])
    return (
        f"{base.shape}, B = {base.batch}, P = {base.prompt}; planned over measured:\n\n"
        + Table("", columns, lines).markdown()
        + f"\n\nHalf of the {len(errors)} phases are within a factor of {middle:.2f}, all within "
        f"{math.exp(max(errors)):.2f}.\n"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--seconds", type=Path, help="compare with a saved measurement of benchmarks.training instead")
    options, others = parser.parse_known_args(arguments)
    if options.seconds is not None:
        saved = read_saved(options.seconds, SAVED, "setting", "rows")
        print(document_of(options.seconds, saved, seconds_document), end="")
        return
    parser = new_parser(__doc__)
    command(parser, others, measure, document, "rows", of_rows=("setting", "flops", "bytes"))


if __name__ == "__main__":
    main()
