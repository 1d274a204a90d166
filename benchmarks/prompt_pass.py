"""The policy's pass over prompts and responses as one and as two, the prompts' first: time and memory of its parts.

    python -m benchmarks.prompt_pass                                  # a 15M-parameter Llama on a CPU; minutes
    python -m benchmarks.prompt_pass --sizes 32,64,4,1 128,256,4,1    # P, S, B and samples of a prompt
    python -m benchmarks.prompt_pass --table benchmarks/results/prompt_pass.json    # of numbers kept with --save

For each of the sizes: a forward pass with a graph, a hop (the backward pass to the response's embeddings) and the
backward pass to the adapter. Times are those of one processor thread, so that other work on the machine counts little:
medians of `--repeats`, the two ways in turns, two passes over one. Memory is the peak of the bytes in living tensors.
What is expected of the two is the rule of `grade/planning/prompt_pass.py`, by which a run decides.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial

import torch
from torch import Tensor

from benchmarks.saved import command, new_parser
from benchmarks.training_setup import SHAPES, Bench, Setting
from grade.machine import machine, machine_line
from grade.memory.peak import peak_bytes
from grade.model.passes import fed_embeddings, pass_sizes, policy_pass
from grade.model.policy import Policy
from grade.model.probe import combination, relative_error
from grade.planning.prompt_pass import FEW_HOPS
from grade.rollout import Rollout
from grade.tables import Column, Table, numbers

_SIZES = (
    "32,64,4,1",
    "32,256,4,1",
    "128,64,4,1",
    "128,256,4,1",
    "128,64,16,1",
    "64,64,16,8",
    "32,256,16,4",
    "16,256,4,1",
    "8,128,4,1",
    "128,1024,2,1",
)
_PARTS = ("forward", "hop", "backward")
_HOPS = 2  # that are timed together


def measure_sizes(
    policy: Policy, prompt: int, response: int, batch: int, copies: int, padded: bool, repeats: int
) -> dict:
    """{"seconds": {"one" and "two": of each part}, "bytes": of each way, "error": of the gradients, "pays": by the
    rule, for a replay}."""
    rollout = _rollout(policy, prompt, response, batch, copies, padded)
    seconds: dict[str, list[list[float]]] = {"one": [], "two": []}
    results = {}
    for turn in range(repeats + 1):
        for name in ("one", "two") if turn % 2 else ("two", "one"):
            results[name], times = _parts(policy, rollout, apart=name == "two")
            if turn:  # not the first, which loads what is loaded lazily
                seconds[name].append(times)
    held = {
        name: peak_bytes(partial(_parts, policy, rollout, apart=name == "two"), torch.device("cpu"))[1]
        for name in seconds
    }
    return {
        "seconds": {name: [statistics.median(part) for part in zip(*of, strict=True)] for name, of in seconds.items()},
        "bytes": held,
        "error": relative_error(results["two"], results["one"]),
        "pays": pass_sizes(policy, rollout).pay_apart(FEW_HOPS),
    }


def _rollout(policy: Policy, prompt: int, response: int, batch: int, copies: int, padded: bool) -> Rollout:
    """Of random tokens; with `padded` the first prompt is a third shorter than the others."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, policy.vocab_size, (batch // copies, prompt), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, : prompt // 3 if padded else 0] = False
    tokens = torch.randint(3, policy.vocab_size, (batch, response), generator=generator)
    return Rollout(
        prompt_ids=ids.repeat_interleave(copies, dim=0),
        prompt_mask=mask.repeat_interleave(copies, dim=0),
        tokens=tokens,
        mask=torch.ones_like(tokens, dtype=torch.bool),
        indices=tokens[..., None],
        token_weight=torch.ones(tokens.shape),
        rows=tokens,
        samples_per_prompt=copies,
        padded=padded,
    )


def _parts(policy: Policy, rollout: Rollout, *, apart: bool) -> tuple[Tensor, list[float]]:
    """(gradients of the adapter as one vector, seconds of a thread for each of `_PARTS`)."""
    x = fed_embeddings(rollout, policy.embedding, policy.embedding_scale).requires_grad_()
    clock = [time.thread_time()]
    hidden = policy_pass(policy, rollout, x, apart=apart)
    clock.append(time.thread_time())
    weights = combination(hidden)
    for _ in range(_HOPS):
        torch.autograd.grad(hidden, x, weights, retain_graph=True)
    clock.append(time.thread_time())
    gradients = torch.autograd.grad(hidden, policy.parameters(), weights)
    clock.append(time.thread_time())
    forward, hops, backward = (end - start for start, end in zip(clock, clock[1:], strict=False))
    return torch.cat([gradient.flatten() for gradient in gradients]), [forward, hops / _HOPS, backward]


def measure(options: argparse.Namespace) -> dict:
    torch.set_num_threads(1)
    setting = Setting(shape=options.shape, batch=1, prompt=1, length=1, k=16)
    policy, rows = Bench(setting, "replay").policy, []
    for sizes in options.sizes:
        prompt, response, batch, copies = map(int, sizes.split(","))
        for padded in (False, True):
            found = measure_sizes(policy, prompt, response, batch, copies, padded, options.repeats)
            rows.append({"sizes": [prompt, response, batch, copies], "padded": padded, **found})
    return {"shape": options.shape, "machine": machine(), "rows": rows}


def document(saved: dict) -> str:
    """Seconds of one pass, and of two over one, as Markdown."""
    lines = []
    for row in saved["rows"]:
        one, two = row["seconds"]["one"], row["seconds"]["two"]
        times = [f"{a * 1e3:.0f} ms × {b / a:.2f}" for a, b in zip(one, two, strict=True)]
        # The replay that the rule has in mind.
        whole = [forward + FEW_HOPS * hop + backward for forward, hop, backward in (one, two)]
        held = row["bytes"]["two"] / row["bytes"]["one"]
        kind = "yes" if row["padded"] else "no"
        cells = [*map(str, row["sizes"]), kind, *times, f"{whole[1] / whole[0]:.2f}", f"{held:.2f}"]
        lines.append([*cells, "two" if row["pays"] else "one"])
    titles = ("P", "S", "B", "samples", "padding", *_PARTS, f"with {FEW_HOPS} hops", "memory")
    table = Table("", [*numbers(titles), Column("a run takes")], lines).markdown()
    return f"{saved['shape']}; two passes over one:\n\n{table}\n\n{machine_line(saved['machine'])}\n"


def main(arguments: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--shape", default="llama-15m", choices=SHAPES)
    parser.add_argument("--sizes", nargs="+", default=list(_SIZES), help="P,S,B and samples of a prompt")
    parser.add_argument("--repeats", type=int, default=5)
    command(parser, arguments, measure, document, "shape", "machine", "rows", of_rows=("sizes", "seconds", "bytes"))


if __name__ == "__main__":
    main()
