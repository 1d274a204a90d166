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
from benchmarks.training_setup import ALGORITHMS, SHAPES, Setting
from grade.tables import Column, Table, numbers

_READ_BYTES = 2**30  # more than caches hold
_SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices


def rates(device: str, dtype: str) -> dict[str, float]:
    """{"read_gb_s", "gflop_s"}: reading memory, and multiplying square matrices of this dtype."""
    machine, side = Machine(device), _SIDE[device]

    def median(operation: Callable[[Tensor], Tensor], operand: Tensor) -> float:
        return machine.time(lambda: operation(operand), 0.5, least=5).median  # ms

    read = median(torch.sum, torch.ones(_READ_BYTES // 4, device=device))
    multiply = median(lambda a: a @ a, torch.randn(side, side, device=device, dtype=getattr(torch, dtype)))
    machine.clear()  # the steps run in other processes
    return {"read_gb_s": _READ_BYTES / read / 1e6, "gflop_s": 2 * side**3 / multiply / 1e6}


def floors(setting: Setting, length: int, hops: float, measured: dict[str, float]) -> dict[str, float]:
    """Seconds by phase.

    Args:
        hops: of a sequence, on average; a batch makes as many passes as its slowest, so this is a lower bound.
        measured: `rates`.
    """
    _, shape = SHAPES[setting.shape]
    width, layers, vocabulary = shape["hidden_size"], shape["num_hidden_layers"], shape["vocab_size"]
    heads, groups = shape["num_attention_heads"], shape["num_key_value_heads"]
    size = shape.get("head_dim", width // heads)
    inner = layers * (width * size * (2 * heads + 2 * groups) + 3 * width * shape["intermediate_size"])
    item = torch.empty(0, dtype=getattr(torch, setting.dtype)).element_size()
    rows, tokens = setting.batch * length, setting.batch * (setting.prompt + length)

    whole = setting.prompt + length
    attention = 2 * layers * heads * size * setting.batch * whole**2  # two products of half a square
    forward = 2 * inner * tokens + attention
    backward = 2 * inner * tokens + 2 * attention  # an adapter's own share is small
    outside = 2 * layers * heads * size * setting.batch * setting.prompt**2
    to_inputs = 2 * inner * rows + 2 * (attention - outside)  # only the response's embeddings ask for a gradient
    kept = 2 * layers * groups * size * item * setting.batch * sum(range(setting.prompt + 1, whole))
    # A local rule reads its candidates' rows in two tables, and what many tokens share no more than once.
    gathered = 2 * min(rows * setting.k, vocabulary) * width * item
    operations, read = 1 / (1e9 * measured["gflop_s"]), 1 / (1e9 * measured["read_gb_s"])
    return {
        "rollout": (length * (inner + vocabulary * width) * item + kept) * read,
        "policy_forward": forward * operations,
        "base_forward": forward * operations,
        "head": 4 * 2 * rows * vocabulary * width * operations,
        "base_backward": to_inputs * operations,
        "hops": hops * to_inputs * operations + (hops + 1) * gathered * read,
        "policy_backward": backward * operations,
    }


def table(payload: dict) -> str:
    """Measured seconds over the floor's, for replay and with rollout.compile; "" where the rates were not measured."""
    measured = payload.get("rates")
    rows = [row for row in payload["rows"] if row["status"] == "ok" and row["algorithm"] in ("replay", "compiled")]
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
