"""What devices can do in a second, and what counts of instructions allow of it.

A ceiling is a bound from counts, not a measurement. It says what share of the memory's speed a kernel could reach if
nothing but one unit held it up: the schedulers, which issue so many instructions a cycle, the float32 units or the
special-function units. The least of these is what it has. Above 1 the memory is the limit. A kernel does not reach it
where it waits for memory with too few warps, or where instructions of one kind follow each other; nor does a device
hold its highest clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from grade_kernels.aot.streams import Streamed


@dataclass(frozen=True)
class Processor:
    """A multiprocessor (NVIDIA) or compute unit (AMD) of an architecture.

    Attributes:
        issue_lanes: threads whose instructions all schedulers together issue in a cycle.
        float_lanes: float32 additions, multiplications or both fused in a cycle; None where `issue_lanes` says it.
        special_lanes: special functions in a cycle; None likewise.
        registers: of 4 bytes.
        granule: registers of a thread come in multiples of it.
        max_warps: that are resident at a time.
        max_blocks: likewise.
        shared: bytes of shared memory, of which each block takes `reserved` on top of its own.
    """

    issue_lanes: int
    float_lanes: int | None
    special_lanes: int | None
    registers: int
    granule: int
    max_warps: int
    max_blocks: int
    shared: int
    reserved: int


# CUDA C++ Programming Guide, the tables of arithmetic throughput and of technical specifications for each compute
# capability. Each of four schedulers issues one instruction of a warp of 32 in a cycle.
_NVIDIA = {"issue_lanes": 128, "special_lanes": 16, "registers": 65536, "granule": 8, "max_warps": 64, "max_blocks": 32}
PROCESSORS = {
    "sm_80": Processor(**_NVIDIA, float_lanes=64, shared=164 * 1024, reserved=1024),
    "sm_90": Processor(**_NVIDIA, float_lanes=128, shared=228 * 1024, reserved=1024),
    "sm_100": Processor(**_NVIDIA, float_lanes=128, shared=228 * 1024, reserved=1024),
    # AMD CDNA 3 architecture white paper and the performance model of ROCm Compute Profiler: four vector units of 16
    # lanes, which take 4 cycles for a wave of 64 (packed float32 too, which makes the data sheet's rate), 16 for a
    # quarter-rate instruction, which `Counts.issue` counts as four; one scalar instruction a cycle for a wave of 64,
    # which are as many lanes. 512 registers of 64 lanes in each of four units, 8 waves of each.
    "gfx942": Processor(64, None, None, 4 * 512 * 64, 8, 32, 16, 64 * 1024, 0),
}


@dataclass(frozen=True)
class Device:
    """A product: its architecture, processors, clock in Hz, and bandwidth of its memory in bytes/s."""

    target: str
    processors: int
    clock: float
    bandwidth: float


# Bandwidths are those of the data sheets; so are processors and the clock where they have them. Elsewhere the clock
# is the one that makes the data sheet's float32 rate of the processors: clock = rate / (2 x lanes x processors).
DEVICES = {
    # NVIDIA A100 data sheet (SXM, 80 GB): 19.5 TFLOPS, 2,039 GB/s. A100 white paper: 108 processors at 1.41 GHz.
    "A100": Device("sm_80", 108, 1.41e9, 2.039e12),
    # NVIDIA H100 data sheet (SXM): 67 TFLOPS, 3.35 TB/s. H100 white paper: 132 processors.
    "H100": Device("sm_90", 132, 1.98e9, 3.35e12),
    # NVIDIA H200 data sheet (SXM): as an H100, with 4.8 TB/s.
    "H200": Device("sm_90", 132, 1.98e9, 4.8e12),
    # NVIDIA HGX B200, an eighth of it: 75 TFLOPS, 8 TB/s (DGX B200: 64 TB/s). 148 processors, as drivers report.
    "B200": Device("sm_100", 148, 1.98e9, 8e12),
    # AMD Instinct MI300X data sheet: 304 compute units, peak engine clock 2,100 MHz, 5.3 TB/s.
    "MI300X": Device("gfx942", 304, 2.1e9, 5.3e12),
}


def devices_of(target: str) -> list[str]:
    """Names of the devices that a target is compiled for."""
    return [name for name, device in DEVICES.items() if device.target == target]


def bounds(streamed: Streamed, name: str) -> dict[str, float]:
    """Shares of a device's memory speed, by the unit that sets them: "issue", "float" and "special" functions."""
    device = DEVICES[name]
    processor = PROCESSORS[device.target]
    units = {
        # AMD's scalar unit works beside the vector units, and has as many lanes as they.
        "issue": (max(streamed.per_entry("issue"), streamed.per_entry("scalar")), processor.issue_lanes),
        "float": (streamed.per_entry("floats"), processor.float_lanes),
        "special": (streamed.per_entry("special"), processor.special_lanes),
    }
    bytes_per_lane = streamed.bytes_per_entry * device.processors * device.clock / device.bandwidth
    return {unit: bytes_per_lane * lanes / taken for unit, (taken, lanes) in units.items() if lanes and taken}


def ceiling(streamed: Streamed, name: str) -> float:
    """The least of `bounds`."""
    return min(bounds(streamed, name).values())


def resident_warps(target: str, registers: int, shared: int, num_warps: int, warp_size: int) -> int:
    """Warps of a processor that registers, shared memory and the limits on warps and blocks leave room for.

    Args:
        registers, shared: of a thread and, in bytes, of a block.
        num_warps: of a block.
    """
    processor = PROCESSORS[target]
    taken = -(-max(registers, 1) // processor.granule) * processor.granule * warp_size
    # Registers are those of one of four units, to which whole warps are assigned.
    by_registers = 4 * (processor.registers // 4 // taken)
    blocks = min(by_registers, processor.max_warps) // num_warps
    blocks = min(blocks, processor.max_blocks, processor.shared // max(shared + processor.reserved, 1))
    return blocks * num_warps
