"""Several seeds of one config as a Markdown table: base model and best checkpoint, validation and test.

    for seed in 0 1 2; do grade train imdb_small --seed $seed; done
    python -m benchmarks.seeds runs/imdb_small-seed*            # prints the table
    python -m benchmarks.seeds runs/imdb_small-seed* --save benchmarks/results/imdb_small.json
    python -m benchmarks.seeds benchmarks/results/imdb_small.json

The base model does not depend on the seed (fixed prompts, fixed noise): its ± is the standard error over prompts.
The trained rows have the mean over seeds ± their standard deviation. Seconds per step are the median over all steps
of all seeds, with their 20th and 80th percentile, evaluation excluded.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from benchmarks.saved import SAVED, check_place, new_parser, read_saved, write_saved
from grade.jsonl import read_rows
from grade.machine import machine, machine_line
from grade.tables import Column, Table

COLUMNS = {"reward": 3, "kl": 3, "entropy": 2, "unique_token_ratio": 3, "mean_length": 1}
TITLES = ["reward", "KL, nats/token", "entropy, nats", "distinct tokens", "length, tokens"]


def read_run(run_dir: Path) -> dict:
    """What the table needs of one finished run.

    Raises:
        SystemExit: the run has no test evaluation yet.
    """
    evaluation = json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))
    if "test" not in evaluation:
        sys.exit(f"{run_dir}: the run has not been tested yet. Finish it (--train.resume true).")
    steps = read_rows(run_dir / "metrics.jsonl").rows
    seconds = [sum(v for k, v in row.items() if k.startswith("seconds/")) for row in steps if "loss" in row]
    best = evaluation["best"]["step"]
    validation = evaluation["validation"]
    rows = {
        "validation": {"base": validation[0], "best": next(r for r in validation[1:] if r["step"] == best)},
        "test": evaluation["test"],
    }
    for models in rows.values():
        for name, row in models.items():
            models[name] = {k: v for k, v in row.items() if k != "samples"}
    peak = max(row["memory/peak_gib"] for row in steps if "loss" in row)
    record = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    return {
        "run": run_dir.name,
        "best_step": best,
        "rows": rows,
        "step_seconds": seconds,
        "peak_gib": peak,
        "reward_head": record.get("reward_head", {}).get("accuracy", {}),
    }


def table(runs: list[dict]) -> str:
    """The Markdown table."""
    lines = []
    for split in ("validation", "test"):
        base = runs[0]["rows"][split]["base"]
        cells = [f"{base[name]:.{digits}f}" for name, digits in COLUMNS.items()]
        cells[0] += f" ± {base['reward_stderr']:.3f}"
        lines.append([f"{split}, {base['prompts']} prompts", "base", *cells])
        cells = []
        for name, digits in COLUMNS.items():
            values = [run["rows"][split]["best"][name] for run in runs]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        lines.append(["", f"trained, {len(runs)} seed{'s' * (len(runs) > 1)}", *cells])
    return Table("", list(map(Column, ("split", "model", *TITLES))), lines).markdown()


def summary(runs: list[dict]) -> str:
    """Best steps, reward per seed, time and memory."""
    seconds = sorted(s for run in runs for s in run["step_seconds"])
    low, high = seconds[len(seconds) // 5], seconds[len(seconds) * 4 // 5]
    rewards = ", ".join(f"{run['rows']['test']['best']['reward']:.3f}" for run in runs)
    heads = ", ".join(f"{v:.3f} on the first {k}" for k, v in runs[0]["reward_head"].items())
    return (
        f"Test reward by seed: {rewards}; best steps: {', '.join(str(run['best_step']) for run in runs)}.\n"
        f"Seconds per step: median {statistics.median(seconds):.2f} (20 % {low:.2f}, 80 % {high:.2f}, n = "
        f"{len(seconds)}); peak memory {max(run['peak_gib'] for run in runs):.2f} GiB.\n"
        f"Held-out accuracy of the reward head: {heads}."
    )


def main(arguments: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories, or one file written by --save")
    parser.add_argument("--save", type=Path, help="keep what the table needs, with the machine's description")
    options = parser.parse_args(arguments)
    if options.save is not None:
        check_place("--save", options.save)
    if len(options.runs) == 1 and options.runs[0].is_file():
        saved = read_saved(options.runs[0], SAVED, "machine", "runs")
    else:
        saved = {"machine": machine(), "runs": [read_run(run) for run in options.runs]}
    if options.save is not None:
        write_saved(options.save, saved)
    print(table(saved["runs"]))
    print()
    print(summary(saved["runs"]))
    print(machine_line(saved["machine"]))


if __name__ == "__main__":
    main()
