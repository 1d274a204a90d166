"""What the files hold that this program writes and reads again (the terms are those of `grade.shapes`).

Further entries are allowed everywhere: a later version may have written them. Whatever a command reads stands here with
its kind, so that a file that was damaged, or written by something else, is told by name before it is used.
"""

from __future__ import annotations

from typing import Any

from grade.shapes import NUMBER, Fixed, Whole

COUNT = Whole()
_MEAN = {"mean": NUMBER, "stderr?": (NUMBER, None), "n": COUNT}
_INTERVAL = (Fixed((NUMBER, None), (NUMBER, None)), None)

SAMPLE = {"prompt?": str, "response?": str, "reward?": (NUMBER, None)}
_OF_EVALUATION = (
    "reward",
    "reward_stderr",
    "kl",
    "kl_sequence",
    "entropy",
    "unique_token_ratio",
    "mean_length",
    "eos_rate",
)
EVALUATION: dict[Any, Any] = {
    "split": str,
    "step": COUNT,
    "model": str,
    **dict.fromkeys(_OF_EVALUATION, NUMBER),
    "prompts": COUNT,
    "details?": {str: NUMBER},
    "samples?": [SAMPLE],
}
"""An entry of evaluation.json."""
SHOWN: dict[Any, Any] = {
    "step": COUNT,
    "split?": str,
    "model?": str,
    **dict.fromkeys((f"{name}?" for name in _OF_EVALUATION), (NUMBER, None)),
    "prompts?": (COUNT, None),
    "details?": {str: (NUMBER, None)},
    "samples?": ([SAMPLE], None),
}
"""The same for a report, which shows what there is, of any version."""
BEST = {"step": COUNT, "metric": NUMBER, "reward": NUMBER, "beats_base?": bool}
EVALUATIONS = {"validation": [EVALUATION], "best?": (BEST, None), "test?": {"base": EVALUATION, "best": EVALUATION}}
"""evaluation.json of a run."""

EVALUATIONS_SHOWN = {
    "validation?": ([SHOWN], None),
    "best?": ({"step": COUNT}, None),
    "test?": {"base?": SHOWN, "best?": SHOWN},
}
"""The same for a report."""

_OF_STEPS = ("reward", "kl", "entropy", "grad_norm", "tokens", "updates", "memory/peak_gib")
_OF_VALIDATIONS = tuple(f"validation/{name}" for name in ("reward", "solve_rate", "kl", "kl_sequence", "entropy"))
LOGGED: dict[Any, Any] = {
    "step": COUNT,
    **dict.fromkeys((f"{name}?" for name in (*_OF_STEPS, *_OF_VALIDATIONS)), (NUMBER, None)),
    str: (NUMBER, str, None),
}
"""A line of metrics.jsonl, of any version."""
LOGGED_HERE: dict[Any, Any] = {"step": COUNT, str: (NUMBER, None)}
"""The same of a run that goes on here: loggers take numbers alone, and null for one that was not finite."""

_SESSION = {
    "command?": str,
    "started?": (str, None),
    "ended?": (str, None),
    "after_step?": (COUNT, None),
    "processes?": COUNT,
    "versions?": {str: (str, None)},
    "machine?": {str: (str, None)},
    "git_commit?": (str, None),
}
SETTINGS_SHOWN: dict[Any, Any] = {
    "name?": (str, None),
    "seed": COUNT,
    "method.name": str,
    "train.steps?": (COUNT, None),
    "train.batch_size?": (COUNT, None),
    "train.accumulation_steps?": (COUNT, None),
}
"""What a report calculates with of config.yaml, by dotted name; the rest it shows."""
RECORD = {
    "task?": {"splits?": dict},  # the rest is a task's own
    "inputs": {str: (str, COUNT)},
    "model_given?": bool,
    "reward?": str,
    "reward_head?": dict,
    "sessions?": [_SESSION],
}
"""run.json."""

MANIFEST = {
    "format": COUNT,
    "step": COUNT,
    "files": {str: str},
    "sha256": str,
    "base_sha256?": str,
    "base_transformers?": (str, None),
}
"""manifest.json of a checkpoint."""

_EXTENT = Fixed(COUNT, str)
STATE = {
    "optimizer": {"state": dict, "param_groups": [dict]},
    "method": dict,
    "kl_coef?": NUMBER,
    "inputs": {str: (str, COUNT)},
    "reward?": dict,
    "best": (BEST, None),
    "evaluations": [EVALUATION],
    "steps": COUNT,
    "guard?": dict,
    "cpu_products?": ({"rows": NUMBER, "work": NUMBER}, None),
    "logs": {"metrics.jsonl": _EXTENT, "samples.jsonl": _EXTENT},
}
"""The trainer's state in a checkpoint."""

HEAD = {
    "sha256?": str,
    "label_type?": str,
    "identity?": {"inputs": dict, "reward": dict},
    "judged_length?": COUNT,
    "held_out?": COUNT,
    "trained_on?": COUNT,
    "accuracy?": {str: (NUMBER, None)},
    "r2?": {str: (NUMBER, None)},
    "mean_absolute_error?": {str: (NUMBER, None)},
    "loss?": NUMBER,
}
"""reward.json of a reward head."""

JUDGE = {"accuracy": {str: NUMBER}, "trained_on": COUNT, "held_out": COUNT, "identity?": dict}
"""judge.json of a comparison."""

_SPREAD = {"length": [NUMBER], "entropy": [NUMBER]}
_TEST = {
    **dict.fromkeys((f"{name}?" for name in (*_OF_EVALUATION, "judge", "nats_per_byte", "solve_rate")), (NUMBER, None)),
    **dict.fromkeys(("perplexity?", "repetition?", "length_distance?", "entropy_distance?"), (NUMBER, None)),
    "step?": (COUNT, None),
    "prompts?": COUNT,
    "adapter_sha256?": (str, None),
    "details?": {str: (NUMBER, None)},
    "samples?": [SAMPLE],
}
_POINT = {
    "kl_sequence": NUMBER,
    "reward": NUMBER,
    **dict.fromkeys(
        ("judge?", "nats_per_byte?", "solve_rate?", "repetition?", "perplexity?", "length_distance?"), (NUMBER, None)
    ),
    "entropy_distance?": (NUMBER, None),
}
_BEST_OF = [{"n": Whole(1), **_POINT}]
_TESTED = {"kl_sequence": NUMBER, "reward": NUMBER, "prompts": COUNT, **_TEST}
TESTS = {
    "identity": dict,
    "results": {str: _TEST},
    "spread?": _SPREAD,
    "frontier?": {
        "prompts": COUNT,
        "points": {str: {**_TESTED, "adapter_sha256": (str, None)}},
        "base?": {"row": _TESTED, "spread": _SPREAD},
        "best_of?": {"of": [COUNT], "rows": _BEST_OF},
    },
}
"""tests.json of a comparison."""

COMPARISON = {
    "config?": {"compare?": {"jobs?": (Whole(1), None)}},
    "tables?": {"tokens?": [{"method": str, "seeds": [COUNT], "best_steps": [COUNT]}]},
    "failures?": {str: str},
    "sweep?": [
        {"method": str, "learning_rate?": (NUMBER, None), "schedule?": (str, None), "objective?": (NUMBER, None)}
    ],
    "learning_rates?": {str: NUMBER},
    "schedules?": {str: (str, None)},
    "machine?": dict,
    "frontier?": (
        {
            "prompts": COUNT,
            "base": _POINT,
            "points": [{"method": str, "seed": COUNT, "step?": COUNT, **_POINT}],
            "best_of": _BEST_OF,
            "table": {
                "kls": [NUMBER],
                "rows": [
                    {
                        "method": str,
                        "seeds": [COUNT],
                        **dict.fromkeys(
                            ("reward?", "judge?", "nats_per_byte?", "solve_rate?", "repetition?"), [(_MEAN, None)]
                        ),
                    }
                ],
            },
        },
        None,
    ),
}
"""What a report reads of comparison.json."""

_MEASURED = (
    *("mean_norm", "trace", "relative_variance", "snr_per_sample", "snr_per_second", "seconds_per_sample"),
    *("bias", "scale", "cosine", "tensor_norm_std", "best", "plain_step", "plain_share", "plain_ceiling"),
    *("plain_step_per_second", "natural_step", "natural_share", "natural_ceiling", "factor", "fisher_factor"),
)
VARIANCE_ROW: dict[Any, Any] = {
    "method": str,
    "estimator": (str, None),
    "tau": (NUMBER, None),
    "hops": (COUNT, str, None),
    "length": COUNT,
    "top_k": COUNT,
    "draws": COUNT,
    "prefixes?": COUNT,
    "verdict?": str,
    **dict.fromkeys((f"{name}?" for name in _MEASURED), (NUMBER, None)),
    **dict.fromkeys((f"{name}_interval?" for name in _MEASURED), _INTERVAL),
}
TESTS_SHOWN = {"results?": {str: {"reward?": (NUMBER, None), "samples?": ([SAMPLE], None)}}}
"""What a report reads of tests.json."""
VARIANCE = {
    "rows": [VARIANCE_ROW],
    "config?": {"variance?": dict, "model?": {"name?": (str, None)}, "task?": {"name?": (str, None)}},
    "adapter_sha256?": (str, None),
    "machine?": dict,
    "inputs?": dict,
}
"""variance.json."""
