"""`python -m benchmarks.kernels`: its rows, its formulas, and that it times nothing that is wrong."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # `benchmarks` is run from the repository and not installed

from benchmarks import kernel_cases, kernel_rows, kernel_setup, kernels, measure  # noqa: E402

# 24 rows: more than the 16 that are checked.
TINY = kernel_setup.Sizes(24, 640, 16, 8, (1, 3), 640, 2)


@pytest.fixture(autouse=True)
def small_and_on_the_cpu(monkeypatch):
    """Tiny sizes, one thread, few repetitions, a copy of a megabyte."""
    copy = measure.Machine.copy_bandwidth
    monkeypatch.setattr(kernels, "sizes_for", lambda machine, quick: TINY)
    monkeypatch.setattr(kernels, "budget", lambda machine, quick: 1e-3)
    monkeypatch.setattr(measure.Machine, "copy_bandwidth", lambda machine, n_bytes=None: copy(machine, 2**20))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_plot(monkeypatch):
    monkeypatch.setattr(kernels, "draw", lambda *args: None)


def run(folder: Path, *arguments: str, status: int = 0) -> list[dict[str, str]]:
    """The rows of the CSV that a run writes into `folder`."""
    given = ["--device", "cpu", "--quick", "--no-compile", "--out", str(folder), *arguments]
    assert kernels.main(given) == status
    (path,) = folder.glob("*.csv")
    return read(path)


def read(path: Path) -> list[dict[str, str]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("# ")))


def test_a_row_has_every_column_and_sensible_values(tmp_path, capsys):
    rows = run(tmp_path, "--kernel", "logits_kl")
    (path,) = tmp_path.glob("kernels-cpu-*.csv")
    head = [line for line in path.read_text().splitlines() if line.startswith("# ")]
    for fact in ("device: cpu", "torch: ", "triton: ", "python: ", "copy bandwidth: "):
        assert any(line.startswith(f"# {fact}") for line in head), fact
    assert tuple(rows[0]) == kernel_rows.COLUMNS
    variants = ["forward", "backward", "forward+backward", "backward, both sides"]
    assert list(dict.fromkeys(row["variant"] for row in rows)) == variants
    measured = [row for row in rows if row["status"] == "ok"]
    assert {row["implementation"] for row in measured} == {"ours", "textbook"}
    for row in measured:
        assert row["device"].startswith("cpu: ") and row["dtype"] == "float32" and row["shape"] == "N=24 V=640"
        assert 0 < float(row["ms_p20"]) <= float(row["ms"]) <= float(row["ms_p80"])
        rate = float(row["bytes"]) / float(row["ms"]) / 1e6
        assert float(row["gb_s"]) == pytest.approx(rate, rel=1e-3) and float(row["copy_percent"]) > 0
        assert float(row["peak_mb"]) > 0 and 0 <= float(row["error"]) < 1e-4
        assert row["goal"] == row["goal_met"] == ""  # goals are a GPU's
    for mine, textbook in zip(
        *([r for r in measured if r["implementation"] == n] for n in ("ours", "textbook")), strict=True
    ):
        assert float(mine["ratio"]) == 1
        assert float(textbook["ratio"]) == pytest.approx(float(textbook["ms"]) / float(mine["ms"]), rel=1e-3)
    said = capsys.readouterr().out
    assert "tell nothing about a GPU" in said and str(path) in said
    if importlib.util.find_spec("matplotlib"):
        assert path.with_suffix(".png").exists()
    else:
        assert "no plot: " in said


@pytest.mark.usefixtures("no_plot")
def test_liger_is_left_out_with_a_reason(tmp_path):
    rows = run(tmp_path, "--kernel", "token_logprob")
    reasons = {row["status"] for row in rows if row["implementation"] == "liger"}
    wanted = "needs a GPU" if importlib.util.find_spec("liger_kernel") else "liger_kernel is not installed"
    assert len(reasons) == 1 and reasons.pop().startswith(f"skipped: {wanted}")


@pytest.mark.usefixtures("no_plot")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_kernel_agrees_with_float64(tmp_path, dtype):
    rows = run(tmp_path, "--dtype", dtype)
    assert {row["kernel"] for row in rows} == set(kernel_cases.KERNELS)
    for row in rows:
        assert row["status"] == "ok" or row["status"].startswith("skipped: "), row
        alone = row["kernel"] == "scatter_tokens"  # its weights are float32 whatever the logits are
        assert row["dtype"] == ("float32" if alone else dtype)


def case_of(kernel: str, number: int) -> kernel_cases.Case:
    return [case for case in kernel_cases.cases(TINY) if case.kernel == kernel][number]


def test_bytes_that_must_move_by_hand():
    cpu = torch.device("cpu")
    # 2 x [24, 640] bf16 read, and 24 KLs of 4 bytes written
    assert case_of("logits_kl", 0).build(TINY, torch.bfloat16, cpu).moved == 2 * 24 * 640 * 2 + 24 * 4 == 61536
    # [24, 640] fp32 read; 24 x 8 ids of 8 bytes and weights of 4; a token of 8 bytes and a mass of 4 a row
    sample = case_of("gumbel_topk", 0).build(TINY, torch.float32, cpu)
    assert sample.moved == 24 * 640 * 4 + 24 * 8 * 12 + 24 * 12 == 64032
    # three rows of the decoding vocabulary
    decode = case_of("gumbel_topk", 3).build(TINY, torch.float32, cpu)
    assert decode.variant == "decode 3" and decode.moved == 3 * 640 * 4 + 3 * 8 * 12 + 3 * 12


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--kernel", "kl"], "unknown kernel 'kl'; known: gumbel_topk, logits_kl"),
        (["--dtype", "float8"], "invalid choice: 'float8'"),
        (["--time-limit", "0"], "must be above 0 seconds"),
        (["--out", "FILE/below"], "cannot write to"),
    ],
)
def test_bad_options_are_refused(tmp_path, capsys, arguments, said):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit) as stopped:
        kernels.main([argument.replace("FILE", str(file)) for argument in arguments])
    assert stopped.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU")
def test_a_missing_gpu_is_said(capsys):
    with pytest.raises(SystemExit):
        kernels.main(["--device", "cuda"])
    assert "no CUDA or ROCm device" in capsys.readouterr().err


@pytest.mark.usefixtures("no_plot")
@pytest.mark.parametrize("mistake", [lambda kl: kl * 1.01, lambda kl: kl + float("nan")], ids=["scaled", "nan"])
def test_a_wrong_implementation_is_not_timed(tmp_path, monkeypatch, mistake):
    right = kernel_cases.logits_kl
    monkeypatch.setattr(kernel_cases, "logits_kl", lambda *args: mistake(right(*args)))
    rows = [row for row in run(tmp_path, "--kernel", "logits_kl", status=1) if row["variant"] == "forward"]
    ours, textbook = rows
    assert ours["status"].startswith("wrong: relative error") and ours["ms"] == ours["ratio"] == ""
    assert textbook["status"] == "ok" and textbook["ratio"] == ""  # there is nothing to compare with


@pytest.mark.usefixtures("no_plot")
def test_a_token_that_did_not_win_is_noticed(tmp_path, monkeypatch):
    right = kernel_cases.gumbel_topk

    def last_candidate(*args, **kwargs):
        found = right(*args, **kwargs)
        return replace(found, tokens=found.indices[:, -1])

    monkeypatch.setattr(kernel_cases, "gumbel_topk", last_candidate)
    rows = run(tmp_path, "--kernel", "gumbel_topk", status=1)
    ours = [row["status"] for row in rows if row["implementation"] == "ours"]
    assert len(ours) == 4 and all(status.startswith("wrong") for status in ours[:2])


@pytest.mark.usefixtures("no_plot")
def test_what_does_not_fit_is_a_row_and_is_repeated_smaller(tmp_path, monkeypatch):
    """Out of memory in ours at 256 rows: measured with a quarter of them."""

    def limited(logits, tokens):
        if logits.shape[0] > 64:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore.")
        return right(logits, tokens)

    right = kernel_cases.token_logprob
    monkeypatch.setattr(kernel_cases, "token_logprob", limited)
    monkeypatch.setattr(kernels, "sizes_for", lambda machine, quick: replace(TINY, rows=256))
    rows = [row for row in run(tmp_path, "--kernel", "token_logprob") if row["variant"] == "forward"]
    ours = [(row["shape"], row["status"]) for row in rows if row["implementation"] == "ours"]
    assert ours[0] == ("N=256 V=640", "out of memory: OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB.")
    assert ours[1] == ("N=64 V=640", "ok")


def test_a_failing_baseline_is_a_row():
    setup = case_of("logits_kl", 0).build(TINY, torch.float32, torch.device("cpu"))

    def broken(**arguments):
        raise RuntimeError("no C++ compiler\nand a long story")

    ours, textbook, _compiled = setup.runs
    too_large = replace(textbook, needs=2**60)
    setup.runs = [replace(textbook, fn=broken), too_large, ours]
    failed, skipped, last = kernel_rows.rows_of(setup, measure.Machine("cpu"), 10.0, 0.01)
    assert failed["status"] == "failed: RuntimeError: no C++ compiler"
    assert skipped["status"].startswith("needs 1073741824.0 GB above its inputs")
    assert last["status"] == "ok"


@pytest.mark.usefixtures("no_plot")
def test_nothing_measured_is_lost_or_overwritten(tmp_path, monkeypatch):
    """A crash in the second set-up leaves the first one's rows; a second run of the day has its own file."""

    def crash(*args, **kwargs):
        raise KeyboardInterrupt

    scatter, *rest = [case for case in kernel_cases.cases(TINY) if case.kernel == "scatter_tokens"]
    monkeypatch.setattr(kernels, "cases", lambda sizes: [scatter, replace(scatter, build=crash)])
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            kernels.main(["--device", "cpu", "--quick", "--no-compile", "--out", str(tmp_path)])
    files = sorted(tmp_path.glob("*.csv"))
    assert len(files) == 2
    assert all([row["status"] for row in read(path)] == ["ok", "ok"] for path in files)


@pytest.mark.usefixtures("no_plot")
def test_the_time_limit_leaves_rows_that_say_so(tmp_path):
    rows = run(tmp_path, "--time-limit", "1e-9", "--kernel", "scatter_tokens")
    assert [row["status"] for row in rows] == ["skipped: the time limit of 1e-09 s has passed"] * 2


def test_goals():
    fast, wide, times = (kernel_setup.Goal(*goal) for goal in (("ms", 0.03), ("copy_percent", 85), ("ratio", 8)))
    assert fast.met(0.029) and not fast.met(0.031) and str(fast) == "<= 30 us"
    assert wide.met(86) and not wide.met(84) and str(wide) == ">= 85 % of copy"
    assert times.met(9) and not times.met(7) and str(times) == ">= 8 x ours"


def test_gpu_script_without_a_gpu_says_so():
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    done = subprocess.run(["bash", "benchmarks/gpu.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 4 and "no usable GPU" in done.stdout
