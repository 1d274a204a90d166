"""Where and with what something was measured, for the record; what memory is free, and whether it ran out."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CONTROL_GROUP = Path("/sys/fs/cgroup")


def machine() -> dict[str, object]:
    """Names and versions, ready for JSON."""
    import torch
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "cpu": cpu_name(),
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def cache_folder() -> Path:
    """Where what is made once a machine is kept, such as small models, whether or not it exists yet."""
    # An empty or relative XDG_CACHE_HOME counts as unset, as its specification demands.
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "grade"


def cpu_name() -> str:
    """The processor's model and its number of cores."""
    name, cores = platform.processor() or platform.machine(), 0
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name, cores = (names[0], len(names)) if names else (name, 0)
    return f"{name}, {cores} cores" if cores else name


def machine_line(description: dict[str, object]) -> str:
    """A recorded `machine` in one line."""
    return "Machine: " + ", ".join(f"{name} {value}" for name, value in description.items()) + "."


def free_bytes(device: torch.device, processes: int = 1) -> int | None:
    """Free memory of a device; what the caching allocator holds unused counts as free. None where it is not known.

    Args:
        processes: among which the machine's memory is shared; accelerators belong to one each.
    """
    import torch

    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    found = [line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")]
    left = min((*(int(line.split()[1]) * 1024 for line in found), *_left_to_container()), default=None)
    return None if left is None else left // processes


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out here, on any device; not what another program answers of its own memory."""
    import torch

    if not isinstance(error, (MemoryError, RuntimeError)):
        return False
    # oneDNN has no other word for it.
    words = ("DefaultCPUAllocator", "can't allocate memory", "could not create a primitive", "error: out of memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)


def _left_to_container() -> list[int]:
    """Bytes until this control group's limit, where it has one (cgroup v2); file caches give way."""
    try:
        limit, used = ((CONTROL_GROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        cached = [
            line.split()[1]
            for line in (CONTROL_GROUP / "memory.stat").read_text().splitlines()
            if line.startswith("inactive_file ")
        ]
    except OSError:
        return []
    return [] if limit == "max" else [int(limit) - int(used) + sum(map(int, cached))]
