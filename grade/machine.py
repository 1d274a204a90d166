"""Where and with what something was measured, for the record."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Dict, Optional

if TYPE_CHECKING:
    import torch


def machine() -> Dict[str, object]:
    """Names and versions, ready for JSON."""
    import torch
    import transformers

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
        cpu = f"{names[0]}, {len(names)} cores" if names else cpu
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "cpu": cpu, "device": device, "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def machine_line(description: Dict[str, object]) -> str:
    """A recorded `machine` in one line."""
    return "Machine: " + ", ".join(f"{name} {value}" for name, value in description.items()) + "."


def free_bytes(device: torch.device) -> Optional[int]:
    """Free memory of a device; what the caching allocator holds unused counts as free. None where it is not known."""
    import torch

    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    found = [line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:")]
    return int(found[0].split()[1]) * 1024 if found else None
