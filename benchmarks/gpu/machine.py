"""What rows are measured on: device, versions, code; `python -m benchmarks.gpu.machine` prints the device's part."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "transformers", "peft")
NO_GPU = 4
"""Exit status where there is nothing to measure on."""


def versions() -> dict[str, str]:
    """Of Python and the packages that decide the results; nothing is imported."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str:
    """Of the working tree, with a mark where it holds changes; "unknown" without git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "--short=12", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def code(places: Iterable[str]) -> str:
    """A digest of these Python files and of those below these folders, as they are on disk."""
    digest = hashlib.sha256()
    found = (ROOT / place for place in places)
    for path in sorted(path for place in found for path in (place.rglob("*.py") if place.is_dir() else [place])):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def fingerprint(machine: dict[str, str], places: Iterable[str]) -> str:
    """Equal for rows that need not be measured again: of the same device, versions and code in these places."""
    text = json.dumps([sorted(machine.items()), code(places)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def devices() -> dict[str, str]:
    """Name, capability and memory of the first GPU, its runtime and driver; {} where torch sees none."""
    import torch

    if not torch.cuda.is_available():
        return {}
    sizes = torch.cuda.get_device_properties(0)
    return {
        "device": torch.cuda.get_device_name(0),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(0))),
        "GPU memory": f"{sizes.total_memory / 2**30:.0f} GiB",
        "runtime": f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}",
        "driver": _driver(),
    }


def _driver() -> str:
    """The version that the driver's tool names, or its kernel module."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        module = Path("/sys/module/amdgpu/version")
        return module.read_text().strip() if module.exists() else "unknown"


def device_answers() -> bool:
    """Whether the device takes more work: after an illegal access in a kernel it takes none from this process."""
    import torch

    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


if __name__ == "__main__":
    found = devices()
    print(json.dumps(found))
    sys.exit(0 if found else NO_GPU)
