"""Folders as `grade train` and `grade compare` leave them, written by hand in a few lines, for the report's tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from grade.studies.compare.frontier import frontier_table

PHASES = {"seconds/rollout": 0.5, "seconds/backward": 1.0, "seconds/update": 0.5}


def evaluation(step: int, reward: float, **further) -> dict:
    """An entry of evaluation.json."""
    samples = [
        {"prompt": f"prompt {i}", "response": f"answer {i} after {step} steps", "reward": max(reward - 0.1 * i, 0.0)}
        for i in range(3)
    ]
    return {
        "split": "validation",
        "step": step,
        "model": "policy" if step else "base",
        "reward": reward,
        "reward_stderr": 0.01,
        "kl": 0.01 * step,
        "kl_sequence": 0.1 * step,
        "entropy": 2.0,
        "unique_token_ratio": 0.9,
        "mean_length": 10.0,
        "eos_rate": 1.0,
        "prompts": 50,
        "details": {},
        "samples": samples,
        **further,
    }


def training_row(step: int, tau: float | None = None) -> dict:
    """A line of metrics.jsonl: 100 tokens and 2 seconds a step; reward 0.5 and 0.6 in turn."""
    reward = 0.5 + 0.1 * (step % 2)
    return {
        "step": step,
        "loss": -reward,
        "reward": reward,
        "kl": 0.01 * step,
        "entropy": 2.0,
        "tokens": 100.0,
        "grad_norm": 0.5,
        "updates": 1,
        "tokens_per_second": 50.0,
        "memory/peak_gib": 1.5,
        **PHASES,
        **({} if tau is None else {"tau": tau}),
    }


def write_run(
    folder: Path,
    *,
    method: str = "grpo",
    seed: int = 0,
    validations: Sequence[float] = (0.5, 0.65, 0.75),
    every: int = 2,
    test: float | None = 0.7,
    planned: int | None = None,
    taus: list[float] | None = None,
    settings: dict[str, object] | None = None,
) -> Path:
    """A run validated every `every` steps with rewards `validations`, the base model's first.

    Args:
        test: the best checkpoint's test reward; None: no test yet.
        planned: train.steps; None: as many as there are.
        taus: temperature of each step.
        settings: further dotted settings.
    """
    steps = every * (len(validations) - 1)
    config = {
        "name": "synthetic",
        "seed": seed,
        "task": {"name": "sentiment", "dataset": "reviews"},
        "model": {"name": "a_model"},
        "method": {
            "name": method,
            "kl_coef": 0.1,
            "tau_start": 2.0,
            "tau_end": 0.5,
            "tau_steps": 10,
            "grpo": {"level": "sequence"},
            "reinforce": {"baseline": "ema"},
        },
        "train": {
            "steps": steps if planned is None else planned,
            "learning_rate": 1e-3,
            "batch_size": 4,
            "accumulation_steps": 2,
            "max_grad_norm": 1.0,
        },
        "evaluation": {"every": every, "sampler": "policy"},
    }
    for name, value in (settings or {}).items():
        *sections, last = name.split(".")
        place = config
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    evaluations = [evaluation(i * every, reward) for i, reward in enumerate(validations)]
    rows: list[dict] = []
    for row in evaluations:
        rows.append(
            {
                "step": row["step"],
                **{f"validation/{key}": row[key] for key in ("reward", "kl", "kl_sequence", "entropy")},
            }
        )
        if row["step"] < steps:
            trained = range(row["step"], row["step"] + every)
            rows += [training_row(step, taus[step] if taus else None) for step in trained]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    best = max(evaluations[1:], key=lambda row: row["reward"], default=None)
    record = {
        "validation": evaluations,
        "best": best and {"step": best["step"], "metric": best["reward"], "reward": best["reward"]},
    }
    if test is not None and best:
        record["test"] = {
            "base": evaluation(0, 0.5, split="test"),
            "best": evaluation(best["step"], test, split="test"),
        }
    (folder / "evaluation.json").write_text(json.dumps(record), encoding="utf-8")
    (folder / "run.json").write_text('{"task": {"task": "sentiment", "dataset": "reviews"}}', encoding="utf-8")
    return folder


def write_comparison(folder: Path, rewards: dict[str, Sequence[float]], *, finished: bool = True) -> Path:
    """A comparison: test rewards by method and seed; the checkpoint of step 2 was chosen, though step 4 validated
    better. Its runs have no test of their own."""
    results = {"base/None/0": evaluation(0, 0.5, split="test", judge=0.5)}
    for method, of_seeds in rewards.items():
        for seed, reward in enumerate(of_seeds):
            write_run(folder / f"{method}-seed{seed}", method=method, seed=seed, test=None)
            results[f"{method}/{seed}/2"] = evaluation(2, reward, split="test", judge=reward - 0.1)
    (folder / "tests.json").write_text(json.dumps({"identity": {}, "results": results}), encoding="utf-8")
    if finished:
        tables = [{"method": m, "seeds": list(range(len(r))), "best_steps": [2] * len(r)} for m, r in rewards.items()]
        (folder / "comparison.json").write_text(
            json.dumps(
                {
                    "config": {"compare": {"jobs": 1}},
                    "tables": {"tokens": tables, "seconds": tables},
                    "learning_rates": {method: 1e-3 for method in rewards},
                    "failures": {},
                    "sweep": [{"method": "grpo", "learning_rate": 1e-3, "objective": 0.6}],
                    "machine": {"cpu": "a processor", "torch": "2"},
                }
            ),
            encoding="utf-8",
        )
    return folder


def add_frontier(folder: Path) -> Path:
    """Gives a comparison of grade-ste and ppo a frontier: two seeds of each, whose reward rises by 0.1 and 0.05 for
    every √nat."""
    base = {"kl_sequence": 0.0, "reward": 0.5, "judge": 0.5, "nats_per_byte": 1.0}
    points = [
        {
            **{"method": method, "seed": seed, "kl_coef": 0.1, "step": 2 * i, "kl_sequence": float((i + seed) ** 2)},
            **{"reward": 0.5 + slope * (i + seed), "judge": 0.5, "nats_per_byte": 1.0 + 0.1 * i},
        }
        for method, slope in (("grade-ste", 0.1), ("ppo", 0.05))
        for seed in (0, 1)
        for i in (1, 2, 3)
    ]
    best_of = [{"n": n, "kl_sequence": kl, "reward": 0.5 + kl, "judge": 0.5} for n, kl in ((1, 0.0), (4, 0.6))]
    frontier = {"prompts": 16, "base": base, "points": points, "best_of": best_of}
    path = folder / "comparison.json"
    comparison = json.loads(path.read_text(encoding="utf-8"))
    comparison["frontier"] = {**frontier, "table": frontier_table(points, base, best_of)}
    path.write_text(json.dumps(comparison), encoding="utf-8")
    return folder


VARIANCE = {
    "machine": {"cpu": "a processor"},
    "config": {"variance": {"responses": 16}, "model": {"name": "a_model"}},
    "rows": [
        {
            "method": "grade-ste",
            "estimator": "gumbel",
            "tau": 1.0,
            "hops": "converged",
            "length": 8,
            "top_k": 64,
            "draws": 48,
            "relative_variance": 12.5,
            "relative_variance_interval": [9.0, None],
            "cosine": 0.9,
            "cosine_interval": [0.8, 0.95],
            "verdict": "biased",
        },
        {
            "method": "grade-ste",
            "estimator": "straight_through",
            "tau": None,
            "hops": 0,
            "length": 8,
            "top_k": 64,
            "draws": 48,
            "relative_variance": 20.0,
            "cosine": 0.8,
            "verdict": "biased",
        },
        {
            "method": "grpo",
            "estimator": None,
            "tau": None,
            "hops": None,
            "length": 8,
            "top_k": 64,
            "draws": 48,
            "relative_variance": 1300.0,
            "cosine": None,
            "cosine_interval": None,
            "verdict": "unbiased",
        },
    ],
}
