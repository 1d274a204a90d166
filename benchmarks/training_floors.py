"""What a replay step must take at least on this machine, phase by phase: bytes over bandwidth, operations over peak.

Decoding reads every weight once a token, for the whole batch, and the keys and values so far (from memory: a model
that a cache holds has no such floor); the parallel passes multiply. Both rates are measured here, so a floor says how
far a phase is from what this machine can do, not from what another would.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.measure import Machine
from benchmarks.training_setup import ALGORITHMS, COMPILED, SHAPES, Setting
from grade.planning.shape import shape_of
from grade.planning.work import Passes
from grade.tables import Column, Table, numbers
from grade_kernels.common.cpu_products import product

_READ_BYTES = 2**30  # more than caches hold
_SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices


def rates(device: str, dtype: str, quick: bool = False) -> dict[str, float]:
    """{"read_gb_s", "gflop_s"}: reading memory, and multiplying square matrices of this dtype.

    Args:
        quick: on so little of both that caches hold it, which says nothing of a machine.
    """
    machine, side, read_bytes = Machine(device), 256 if quick else _SIDE[device], 2**22 if quick else _READ_BYTES

    def median(operation: Callable[[Tensor], Tensor], operand: Tensor) -> float:
        return machine.time(lambda: operation(operand), 0.5, least=5).median  # ms

    read = median(torch.sum, torch.ones(read_bytes // 4, device=device))
    multiply = median(lambda a: product(a, a), torch.randn(side, side, device=device, dtype=getattr(torch, dtype)))
    machine.clear()  # the steps run in other processes
    return {"read_gb_s": read_bytes / read / 1e6, "gflop_s": 2 * side**3 / multiply / 1e6}


def floors(setting: Setting, length: int, hops: float, measured: dict[str, float]) -> dict[str, float]:
    """Seconds by phase.

    Args:
        hops: of a sequence, on average; a batch makes as many passes as its slowest, so this is a lower bound.
        measured: `rates`.
    """
    kind, sizes = SHAPES[setting.shape]
    shape = shape_of({**sizes, "model_type": kind, "tie_word_embeddings": True}, setting.shape)
    item = torch.empty(0, dtype=getattr(torch, setting.dtype)).element_size()
    # At least: half of attention's square, and no more than its four products backwards; an adapter's share is small.
    passes = Passes(shape, item, shape.products * item, attention_square=0.5, attention_backward=2.0, accelerated=False)
    batch, prompt, whole = setting.batch, setting.prompt, setting.prompt + length
    rows, tokens = batch * length, batch * whole
    pairs = passes.pairs(batch, 0, whole)
    forward = passes.forward(tokens, pairs, adapters=False).flops
    backward = passes.backward(tokens, pairs, adapters=False).flops
    # Only the response's embeddings ask for a gradient.
    to_inputs = passes.backward(rows, passes.pairs(batch, prompt, length), adapters=False).flops
    kept = passes.cache(batch * sum(range(prompt + 1, whole)))
    # A local rule reads its candidates' rows in two tables, and what many tokens share no more than once.
    gathered = passes.gathered_rows(rows, setting.k, 1, shared=True)
    operations, read = 1 / (1e9 * measured["gflop_s"]), 1 / (1e9 * measured["read_gb_s"])
    return {
        "rollout": (length * (passes.layer_bytes + shape.table * item) + kept) * read,
        "policy_forward": forward * operations,
        "base_forward": forward * operations,
        "head": passes.head(rows, 2, 2).flops * operations,
        "base_backward": to_inputs * operations,
        "hops": hops * to_inputs * operations + (hops + 1) * gathered * read,
        "policy_backward": backward * operations,
    }


def table(payload: dict) -> str:
    """Measured seconds over the floor's, for replay, compiled or not; "" where the rates were not measured."""
    measured = payload.get("rates")
    shown = ("replay", *COMPILED)
    rows = [row for row in payload["rows"] if row["status"] == "ok" and row["algorithm"] in shown]
    if not measured or not rows:
        return ""
    setting = Setting(**payload["setting"])
    found: list[tuple] = [(row, floors(setting, row["length"], row["hops"], measured)) for row in rows]
    names = list(found[0][1])
    lines = []
    for row, least in found:
        cells = [f"{row['phases'][name] / least[name]:.1f} × {least[name]:.3g} s" for name in names]
        total = sum(least.values())
        cells.append(f"{sum(row['phases'].values()) / total:.1f} × {total:.3g} s")
        lines.append([str(row["length"]), ALGORITHMS[row["algorithm"]], *cells])
    columns = [*numbers(["S"]), Column("algorithm"), *numbers([*names, "all"])]
    return (
        f"Replay against the floor of each phase, at the {measured['read_gb_s']:.1f} GB/s and "
        f"{measured['gflop_s']:.0f} GFLOP/s measured here:\n\n" + Table("", columns, lines).markdown()
    )
