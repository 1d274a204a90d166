"""Time, memory and copy bandwidth of a device, and what it is."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from grade.machine import cpu_name, free_bytes
from grade.memory.peak import hand_back

# Written between repetitions on a GPU: more than any L2 (256 MiB on an MI300X), so that every repetition starts cold.
FLUSH_BYTES = 2**29
# What the copy bandwidth is measured on: much more than the caches.
COPY_BYTES = {"cuda": 2**31, "cpu": 2**28}


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call; n repetitions."""

    median: float
    p20: float
    p80: float
    n: int

    @classmethod
    def of(cls, times: list[float]) -> Times:
        if len(times) == 1:
            return cls(times[0], times[0], times[0], 1)
        fifths = statistics.quantiles(times, n=5, method="inclusive")
        return cls(statistics.median(times), fifths[0], fifths[3], len(times))


class Machine:
    """One device: `cuda` (also ROCm) or `cpu`."""

    def __init__(self, kind: str):
        self.kind, self.device = kind, torch.device(kind)
        self.is_gpu = kind == "cuda"
        self._flush: torch.Tensor | None = None

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name() if self.is_gpu else f"cpu: {cpu_name()}"

    def versions(self) -> dict[str, str]:
        """What the header of a result says beside the device's name."""
        try:
            import triton

            found = triton.__version__
        except ImportError:
            found = "not installed"
        runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        versions = {
            "device": self.name,
            "torch": torch.__version__,
            "triton": found,
            "runtime": runtime if self.is_gpu else "no GPU",
            "python": platform.python_version(),
        }
        if self.is_gpu:
            versions["GPU memory"] = f"{torch.cuda.mem_get_info()[1] / 2**30:.0f} GiB"
        return versions | {"cpu": f"{cpu_name()}, {torch.get_num_threads()} thread(s) used"}

    def free_bytes(self) -> int | None:
        """Free memory; what the caching allocator holds unused counts as free. None where it is not known."""
        return free_bytes(self.device)

    def synchronize(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    def clear(self) -> None:
        """Hand unused memory back, so that one measurement's leftovers are not the next one's shortage."""
        if self.is_gpu:
            hand_back()

    def time(self, step: Callable[[], object], seconds: float, least: int = 5, most: int = 100) -> Times:
        """Repeat `step` for about `seconds`.

        GPU: events around each call, after a write of FLUSH_BYTES that empties the L2; the calls are queued while
        the device writes, so launches are hidden as far as that takes.  CPU: the wall clock, caches as they are.
        `step` must have run before: nothing is compiled here.
        """
        first = self._once(step)
        n = max(least, min(most, int(1e3 * seconds / max(first, 1e-3))))
        if first > 1e3 * seconds:  # slow ones are steady
            n = min(n, 3)
        return Times.of(self._events(step, n) if self.is_gpu else [self._once(step) for _ in range(n)])

    def _once(self, step: Callable[[], object]) -> float:
        self.synchronize()
        start = time.perf_counter()
        step()
        self.synchronize()
        return 1e3 * (time.perf_counter() - start)

    def _events(self, step: Callable[[], object], n: int) -> list[float]:
        if self._flush is None:
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.device)
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
        for start, end in pairs:
            self._flush.zero_()
            start.record()
            step()
            end.record()
        self.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    def graph(self, step: Callable[[], object]) -> Callable[[], object]:
        """`step` as a captured CUDA graph: its kernels without the launches."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = step()

        def replay(_kept: object = kept) -> None:  # the outputs live in the graph's memory
            graph.replay()

        return replay

    def copy_bandwidth(self, n_bytes: int | None = None) -> float:
        """GB/s of tensor.copy_: bytes read plus bytes written."""
        n_bytes = n_bytes or COPY_BYTES[self.kind]
        if (free := self.free_bytes()) is not None and self.is_gpu:
            n_bytes = min(n_bytes, free // 4)
        source = torch.ones(n_bytes // 4, device=self.device)
        target = torch.empty_like(source)
        target.copy_(source)
        times = self.time(lambda: target.copy_(source), 0.5, least=5)
        return 2 * source.nbytes / times.median / 1e6
