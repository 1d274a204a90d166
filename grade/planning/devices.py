"""What devices can do at most, as their makers' data sheets say, and the share of it that a step is taken to reach.

Memory and rates are decimal, as data sheets have them (a driver may report some per cent more memory). Rates of matrix
products are dense: data sheets often print twice as much, for weights with a structure of zeros that these are not.
An interconnect's rate is that of one direction, half of the sum of both that is printed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from grade.errors import GradeError

GB, TB, TERA = 1e9, 1e12, 1e12
DType = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Efficiency:
    """What of a device's numbers a step is taken to reach. These are assumptions, printed with every result.

    Attributes:
        flops, bandwidth, link: share of the device's rate, in (0, 1].
        layer_seconds: that a layer takes at least in a pass, however little it computes, since the host has to launch
            its kernels.
        compiled_seconds: the same where rollout.compile (or another engine) decodes by a recorded graph.
        fused: share of `layer_seconds` that a layer takes where train.compile compiles it: its kernels in a replay of
            6 hops over those of its own code, as benchmarks/results/launches.json counts them. What the host takes to
            call compiled code has not been measured on a GPU.
        exchange_seconds: that an exchange between devices takes at least.
        attention_square: share of the square of positions that attention computes: 1 with the masks that padded
            prompts need; kernels that skip what causality masks compute about half.
        attention_backward: attention's products backwards over those forwards: 2.5 where the scores are computed anew
            (flash attention), 2 where they were kept.
    """

    flops: float = 0.5
    bandwidth: float = 0.7
    link: float = 0.7
    layer_seconds: float = 250e-6
    compiled_seconds: float = 25e-6
    fused: float = 0.23
    exchange_seconds: float = 15e-6
    attention_square: float = 1.0
    attention_backward: float = 2.5


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        memory: bytes; None where it is not the device's own.
        bandwidth: of its memory, bytes/s.
        flops: of matrix products by dtype, operations/s. float32 is full float32, as torch multiplies unless told
            otherwise, and not TF32.
        link: to the other devices of its node, bytes/s in one direction; 0: there are none.
        network: to other nodes, bytes/s in one direction for each device.
        per_node: devices of a node that `link` joins.
        source: of the numbers.
        is_beside_host: whether it computes while the host launches what comes next.
        reached: what of them a step is taken to reach, unless told otherwise.
    """

    name: str
    title: str
    memory: float | None
    bandwidth: float
    flops: dict[DType, float]
    link: float
    network: float
    per_node: int
    source: str
    reached: Efficiency = Efficiency()
    is_beside_host: bool = True

    def rate(self, dtype: DType) -> float:
        """Operations/s of matrix products.

        Raises:
            GradeError: the device has no number for this dtype.
        """
        if dtype not in self.flops:
            raise GradeError(
                f"--gpu {self.name} has only been measured in {', '.join(self.flops)}, and model.dtype is {dtype}. Set "
                "model.dtype, or plan for another device."
            )
        return self.flops[dtype]


DEVICES = {
    device.name: device
    for device in (
        Device(
            # NVIDIA A100 Tensor Core GPU data sheet (SXM, 80 GB): 312 TFLOPS BF16, 19.5 FP32, 2,039 GB/s, NVLink
            # 600 GB/s both ways. Network: DGX A100 data sheet, one 200 Gb/s adapter for each GPU.
            "a100-80",
            "NVIDIA A100 SXM 80 GB",
            80 * GB,
            2.039 * TB,
            {"bfloat16": 312 * TERA, "float32": 19.5 * TERA},
            300 * GB,
            25 * GB,
            8,
            "NVIDIA A100 and DGX A100 data sheets",
        ),
        Device(
            # NVIDIA H100 Tensor Core GPU data sheet (SXM): 1,979 TFLOPS BF16 with sparsity, half of it dense; 67 FP32,
            # 3.35 TB/s, NVLink 900 GB/s both ways. Network: DGX H100 data sheet, one 400 Gb/s adapter for each GPU.
            "h100",
            "NVIDIA H100 SXM",
            80 * GB,
            3.35 * TB,
            {"bfloat16": 989.5 * TERA, "float32": 67 * TERA},
            450 * GB,
            50 * GB,
            8,
            "NVIDIA H100 and DGX H100 data sheets",
        ),
        Device(
            # NVIDIA H200 Tensor Core GPU data sheet (SXM): the rates of an H100, 141 GB at 4.8 TB/s. DGX H200: as H100.
            "h200",
            "NVIDIA H200 SXM",
            141 * GB,
            4.8 * TB,
            {"bfloat16": 989.5 * TERA, "float32": 67 * TERA},
            450 * GB,
            50 * GB,
            8,
            "NVIDIA H200 and DGX H200 data sheets",
        ),
        Device(
            # NVIDIA DGX B200 data sheet, an eighth of it: 1,440 GB at 64 TB/s. NVIDIA HGX B200: 36 PFLOPS BF16 with
            # sparsity, half of it dense; 600 TFLOPS FP32; NVLink 1.8 TB/s both ways. One 400 Gb/s adapter for each GPU.
            "b200",
            "NVIDIA B200 (HGX)",
            180 * GB,
            8 * TB,
            {"bfloat16": 2250 * TERA, "float32": 75 * TERA},
            900 * GB,
            50 * GB,
            8,
            "NVIDIA HGX B200 and DGX B200 data sheets",
        ),
        Device(
            # AMD Instinct MI300X data sheet: 1,307.4 TFLOPS BF16, 163.4 FP32, 192 GB at 5.3 TB/s. Platform data sheet:
            # 896 GB/s of Infinity Fabric both ways. The network is not AMD's to say: 400 Gb/s for each, as the others.
            "mi300x",
            "AMD Instinct MI300X",
            192 * GB,
            5.3 * TB,
            {"bfloat16": 1307.4 * TERA, "float32": 163.4 * TERA},
            448 * GB,
            50 * GB,
            8,
            "AMD Instinct MI300X and platform data sheets; the network is taken to be 400 Gb/s a device",
        ),
        Device(
            # No data sheet: `rates` of benchmarks/results/training-cpu.json, measured on two cores in float32.
            "cpu",
            "two CPU cores, as measured in benchmarks/results/training-cpu.json",
            None,
            66.1 * GB,
            {"float32": 475.1e9},
            0.0,
            0.0,
            1,
            "measured by python -m benchmarks.training",
            # Fitted to the phases of that file (benchmarks/scaling.py --seconds), whose prompts have one length. It has
            # none of compiled layers.
            Efficiency(
                flops=0.45, bandwidth=0.8, layer_seconds=5e-4, compiled_seconds=3.75e-4, fused=1.0, attention_square=0.5
            ),
            is_beside_host=False,
        ),
    )
}
