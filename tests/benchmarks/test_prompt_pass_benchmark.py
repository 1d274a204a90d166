"""The benchmark of the policy's two ways: that they agree, and what its table says."""

from __future__ import annotations

from benchmarks.prompt_pass import document, measure_sizes
from benchmarks.training_setup import Bench, Setting


def test_both_ways_are_measured_and_agree():
    policy = Bench(Setting(shape="llama-260k", batch=1, prompt=1, length=1, k=16), "replay").policy
    found = measure_sizes(policy, 48, 8, 4, 2, True, repeats=1)
    assert found["error"] < 1e-5 and found["pays"]
    assert all(len(times) == 3 and min(times) > 0 for times in found["seconds"].values())
    assert found["bytes"]["two"] < found["bytes"]["one"]  # two prompts of four responses


def test_the_table():
    seconds = {"one": [1.0, 2.0, 3.0], "two": [1.5, 1.0, 3.0]}
    row = {"sizes": [4, 8, 2, 1], "padded": True, "seconds": seconds, "bytes": {"one": 4, "two": 5}, "pays": True}
    machine = {"cpu": "a", "cores": 1, "device": "none", "python": "3", "torch": "2", "transformers": "5"}
    text = document({"shape": "llama-15m", "machine": machine, "rows": [row]})
    assert "| 4 | 8 | 2 | 1 | yes | 1000 ms × 1.50 | 2000 ms × 0.50 | 3000 ms × 1.00 | 0.75 | 1.25 | two |" in text
