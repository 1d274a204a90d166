"""One training step of GRADE-STE: the published algorithm, the same with a KV cache, and replay, side by side.

    python -m benchmarks.training                                   # a 15M-parameter Llama on CPU, S from 16 to 2,048
    python -m benchmarks.training --shape qwen3-0.6b --device cuda --dtype bfloat16
    python -m benchmarks.training --lengths 16 64 --algorithms published replay
    python -m benchmarks.training --save benchmarks/results/training-cpu    # also .json, .csv and .png
    python -m benchmarks.training --table benchmarks/results/training-cpu.json

A step is all of it: sampling S tokens, reference, reward, gradient, clipping, AdamW. All algorithms are given the same
random weights (real shapes), prompts and noise. On a CPU the published algorithm's products are plain PyTorch's (MKL);
replay's are made by the quicker of the two libraries that come with it. First the gradients are compared, in float32
and with all hops, at a short length: where one differs, nothing is timed. Then every step runs in a process of its own,
and the gradient of the timed step is compared once more, now with `--hop-tol`. How many hops that takes depends on the
weights: trained ones need others than these (`hops` in a run's metrics.jsonl).

Seconds are the median over `--rounds` rounds of `--repeats` steps (one, where it takes long), with the 20th and 80th
percentile; in a round every algorithm has its turn, since a machine's speed changes while it measures. Memory is
the peak of the process (resident on CPU, allocated on a GPU). On a CPU a heap that falls to pieces can hold many times
what is alive in it, so the peak of the bytes in living tensors is counted too, in a step of its own. A step that would
take longer than `--time-limit` is not run: its time is extrapolated from the two lengths before it and marked ~; one
that would not fit into memory is marked as such. Floors are what this machine must take at least for replay's phases.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks.measure import Machine, Times
from benchmarks.saved import SAVED, document_of, new_parser, read_saved, write_saved
from benchmarks.training_floors import rates
from benchmarks.training_setup import ALGORITHMS, REPLAYED, SHAPES, Setting, measure
from benchmarks.training_text import checked, document, write_csv
from grade.machine import is_out_of_memory
from grade_kernels.common.cpu_products import VARIABLE

SAME = 2e-4
"""Largest relative difference of two float32 gradients of one step that counts as rounding."""
_CHECKED = 16  # tokens of the compared step, at most
_OUT_OF_MEMORY = 17  # exit status of a child
_OF_MEMORY = 0.9  # share of what is free that a step may take
_COUNTED = 0.25  # share of the time limit that a step may take to be run once more, slower, counting living tensors


def main(arguments: list[str] | None = None) -> None:
    options = new_options().parse_args(arguments)
    if options.child:
        _child(options.child)
        return
    if options.table:
        payload = read_saved(options.table, SAVED, "setting", "machine", "check", "rows")
        print(document_of(options.table, payload, document), end="")
        return
    _check_options(options)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda, but torch sees no CUDA or ROCm device. Use --device cpu.")
    lengths = sorted(set(options.lengths))
    setting = Setting(
        shape=options.shape,
        batch=options.batch,
        prompt=options.prompt,
        length=0,
        k=options.top_k,
        tau=options.tau,
        hop_tol=options.hop_tol,
        dtype=options.dtype,
        device=options.device,
    )
    payload = {"setting": asdict(setting), "machine": Machine(options.device).versions(), "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        payload["rates"] = rates(setting.device, setting.dtype)
        payload["check"] = check(setting, min(_CHECKED, lengths[0]), options.algorithms, Path(folder))
        print(checked(payload["check"]), flush=True)
        for length in lengths:
            rows = rows_of(replace(setting, length=length), options, payload["rows"], Path(folder))
            for row in rows:
                payload["rows"].append(row)
                print(json.dumps(row), flush=True)
            if options.save:
                _save(options.save, payload)
    print("\n" + document(payload), end="")
    if any(row["status"].startswith("failed") for row in payload["rows"]):
        sys.exit(1)


def _check_options(options: argparse.Namespace) -> None:
    """Refuse numbers with which nothing can run."""
    whole = (
        ("--lengths", min(options.lengths), 2),
        ("--batch", options.batch, 1),
        ("--prompt", options.prompt, 1),
        ("--top-k", options.top_k, 1),
        ("--repeats", options.repeats, 1),
        ("--rounds", options.rounds, 1),
    )
    for name, value, least in whole:
        if value < least:
            sys.exit(f"{name} is {value}: it must be {least} or more.")
    vocabulary = SHAPES[options.shape][1]["vocab_size"]
    if options.top_k > vocabulary:
        sys.exit(f"--top-k is {options.top_k}, the vocabulary of {options.shape} {vocabulary}: lower it.")
    positive = {"--tau": options.tau, "--seconds": options.seconds, "--time-limit": options.time_limit}
    for name, value in positive.items():
        if not (math.isfinite(value) and value > 0):
            sys.exit(f"{name} is {value}: it must be a number above 0.")
    if options.save is not None:
        try:
            options.save.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            sys.exit(f"--save {options.save}: its folder cannot be made ({error.strerror}). Name another place.")
        if not os.access(options.save.parent, os.W_OK):
            sys.exit(f"--save {options.save}: its folder cannot be written to. Name another place.")
    if not (math.isfinite(options.hop_tol) and options.hop_tol >= 0):
        sys.exit(f"--hop-tol is {options.hop_tol}: it must be a number from 0 on.")


def check(setting: Setting, length: int, algorithms: list[str], folder: Path) -> dict[str, float]:
    """Relative difference of each algorithm's gradient from replay's with all hops, in float32; {} of replay alone.

    Raises:
        SystemExit: one is not the same, or the tokens are not.
    """
    if set(algorithms) == {"replay"}:
        return {}
    exact = replace(setting, length=length, hop_tol=0.0, max_hops=length - 1, dtype="float32")
    names = dict.fromkeys(["replay", *algorithms])
    found = {name: run_apart(exact, name, folder, repeats=1, seconds=0.0, limit=600.0) for name in names}
    failed = [name for name, result in found.items() if result["status"] != "ok"]
    if failed:
        sys.exit(f"{', '.join(failed)} could not run at S = {length}: {found[failed[0]]['status']}")
    ours = found.pop("replay")
    errors = {name: _difference(result, ours) for name, result in found.items()}
    wrong = [name for name, error in errors.items() if not error <= SAME]
    if wrong:
        sys.exit(f"gradients differ, nothing is timed: {errors} (other tokens: nan)")
    return errors


def rows_of(setting: Setting, options: argparse.Namespace, before: list[dict], folder: Path) -> list[dict]:
    """The algorithms at one length, taking turns; the gradient of each is compared with the published one."""
    rows: list[dict] = []
    found: dict[str, dict] = {}
    names = [name for name in ALGORITHMS if name in options.algorithms]
    ahead, refused = {}, {}
    for name in names:
        ahead[name], refused[name] = _expected([row for row in before if row["algorithm"] == name], setting, options)
    active = [name for name in names if not refused[name]]
    for turn in range(options.rounds):
        for name in active:
            result = run_apart(
                setting,
                name,
                folder,
                repeats=options.repeats,
                seconds=options.seconds,
                limit=1.5 * options.time_limit,
                counted=0.0 if turn else _COUNTED * options.time_limit,
            )
            found[name] = _joined(found[name], result) if turn else result
        active = [name for name in active if _affords(found[name], turn + 1, options.seconds)]
    baselines = (found[name] for name in ("published", "cached") if name in found)
    reference = next((result for result in baselines if result["status"] == "ok"), None)
    for name in names:
        row = {"algorithm": name, "length": setting.length}
        if refused[name] or found[name]["status"] != "ok":
            rows.append({**row, "status": refused[name] or found[name]["status"], **ahead[name]})
            continue
        row |= _summary(found[name], setting)
        tensors = ahead[name]["extrapolated_tensors_gib"]
        if row["tensors_gib"] is None and tensors is not None:
            row["extrapolated_tensors_gib"] = tensors
        if reference is not None:
            row["gradient_error"] = _difference(found[name], reference)
        rows.append(row)
    return rows


def _expected(
    earlier: list[dict], setting: Setting, options: argparse.Namespace
) -> tuple[dict[str, float | None], str]:
    """(What an algorithm's rows of the lengths before say of this one, why it is therefore not run or "")."""
    done = [row for row in earlier if row["status"] == "ok"]
    seconds, gib, tensors = (ahead_of(done, key, setting.length) for key in ("seconds", "step_gib", "tensors_gib"))
    peak = None if gib is None else gib + done[-1]["peak_gib"] - done[-1]["step_gib"]
    ahead = {"extrapolated_seconds": seconds, "extrapolated_peak_gib": peak, "extrapolated_tensors_gib": tensors}
    free = Machine(setting.device).free_bytes()
    too_large = any(row["status"] in ("would not fit", "out of memory") for row in earlier)
    if too_large or gib is not None and free is not None and gib * 2**30 > _OF_MEMORY * free:
        return ahead, "would not fit"
    return ahead, "too slow" if seconds is not None and seconds > options.time_limit else ""


def _affords(result: dict, turns: int, seconds: float) -> bool:
    """Whether one more turn, like those so far, stays within the seconds of an algorithm."""
    ok = result["status"] == "ok"
    return ok and sum(step["seconds"] for step in result["steps"]) * (turns + 1) / turns <= seconds


def _joined(done: dict, more: dict) -> dict:
    """A measurement and another round of it; what was measured stays if that fails."""
    if more["status"] != "ok":
        return done
    peak = max((done, more), key=lambda result: result["peak_gib"])
    return {**done, "steps": done["steps"] + more["steps"], **{key: peak[key] for key in ("peak_gib", "before_gib")}}


def _summary(result: dict, setting: Setting) -> dict:
    steps = result["steps"]
    times = Times.of([1e3 * step["seconds"] for step in steps])
    phases = {name: sum(step["phases"][name] for step in steps) / len(steps) for name in steps[0]["phases"]}
    return {
        "status": "ok",
        "steps": len(steps),
        "seconds": times.median / 1e3,
        "seconds_p20": times.p20 / 1e3,
        "seconds_p80": times.p80 / 1e3,
        "phases": phases,
        "tokens_per_second": 1e3 * setting.batch * setting.length / times.median,
        "peak_gib": result["peak_gib"],
        "step_gib": result["peak_gib"] - result["before_gib"],
        "tensors_gib": result["tensors_gib"],
        "hops": result["hops"],
        "apart": result["apart"],
        "first_seconds": result["first_seconds"],
    }


def ahead_of(rows: list[dict], key: str, length: int) -> float | None:
    """What the power law through the last two lengths says of this one; None of fewer."""
    rows = [row for row in rows if row[key] is not None]
    if len(rows) < 2:
        return None
    (s1, y1), (s2, y2) = ((row["length"], max(row[key], 1e-6)) for row in rows[-2:])
    return y2 * (length / s2) ** (math.log(y2 / y1) / math.log(s2 / s1))


def _difference(result: dict, reference: dict) -> float:
    """Relative, of the gradients; nan where the tokens differ."""
    if not result["tokens"].equal(reference["tokens"]):
        return math.nan
    return float((result["gradient"] - reference["gradient"]).norm() / reference["gradient"].norm())


# -- processes -----------------------------------------------------------------------------------------------


def run_apart(
    setting: Setting, algorithm: str, folder: Path, *, repeats: int, seconds: float, limit: float, counted: float = 0.0
) -> dict:
    """`training_setup.measure` in a process of its own, and "status"."""
    path = folder / "result.pt"
    path.unlink(missing_ok=True)
    task = {
        "setting": asdict(setting),
        "algorithm": algorithm,
        "path": str(path),
        "limits": {"repeats": repeats, "seconds": seconds, "counted": counted},
    }
    command = [sys.executable, "-m", "benchmarks.training", "--child", json.dumps(task)]
    try:
        done = subprocess.run(command, timeout=limit, capture_output=True, text=True, check=False)
    except subprocess.TimeoutExpired:
        return {"status": f"stopped after {limit:.0f} s"}
    if done.returncode in (_OUT_OF_MEMORY, -9):
        return {"status": "out of memory"}
    if done.returncode:
        print(f"{algorithm} at S = {setting.length} failed:\n{done.stderr}", file=sys.stderr)
        return {"status": f"failed: {(done.stderr.strip().splitlines() or [str(done.returncode)])[-1]}"}
    return {"status": "ok", **torch.load(path, weights_only=True)}


def _child(task: str) -> None:
    told = json.loads(task)
    setting = Setting(**told["setting"])
    if told["algorithm"] not in REPLAYED:
        os.environ.setdefault(VARIABLE, "mkl")
    free = Machine(setting.device).free_bytes()
    if setting.device == "cpu" and free is not None:  # an allocation that fails, not a machine that swaps
        import resource

        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + int(_OF_MEMORY * free),) * 2)
    try:
        result = measure(setting, told["algorithm"], **told["limits"])
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            sys.exit(_OUT_OF_MEMORY)
        raise
    torch.save(result, told["path"])


def _save(stem: Path, payload: dict) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    table, lines, figure = (stem.with_name(stem.name + kind) for kind in (".json", ".csv", ".png"))
    write_saved(table, payload)
    write_csv(lines, payload)
    try:
        from benchmarks.training_plot import plot
    except ImportError as error:
        print(f"no plot: {error} (pip install -e '.[report]')")
        return
    plot(figure, payload)


def new_options() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-15m")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 256, 512, 1024, 2048], metavar="S")
    usual = [name for name in ALGORITHMS if name != "layers"]
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=usual, help="default: all but layers")
    parser.add_argument("--batch", type=int, default=4, help="responses, one to a prompt")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--top-k", type=int, default=256)
    parser.add_argument("--tau", type=float, default=2.0)
    parser.add_argument("--hop-tol", type=float, default=1e-2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every algorithm at a length")
    parser.add_argument("--repeats", type=int, default=3, help="steps of a turn")
    parser.add_argument("--seconds", type=float, default=60.0, help="no further step beyond these, of an algorithm")
    parser.add_argument("--time-limit", type=float, default=900.0, help="seconds; a step beyond is extrapolated")
    parser.add_argument("--save", type=Path, metavar="STEM", help="write STEM.json, STEM.csv, STEM.png")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of a saved JSON and stop")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
