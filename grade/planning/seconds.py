"""How long work takes on a device, and what bounds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from grade.planning.run import Run
from grade.planning.work import Work

PRODUCTS, MEMORY, INTERCONNECT, LAUNCHING = "products", "memory", "interconnect", "launching"


class Time(NamedTuple):
    """Seconds, and what bounds them."""

    seconds: float
    bound: str


def link_rate(run: Run, devices: int) -> float:
    """Bytes/s that each of a group of devices receives: the node's interconnect where they fit into a node."""
    if devices <= run.device.per_node:
        return run.device.link
    return min(run.device.link, run.device.network)


def time_of_part(work: Work, run: Run, devices: int) -> Time:
    """Of work without an order of its own. Products and the weights that they read overlap, and what is moved between
    products comes on top; the interconnect and the host's launching overlap with both, unless the host is the device.

    Args:
        devices: of the group that exchanges what is received.
    """
    device, efficiency = run.device, run.efficiency
    products = work.flops / (device.rate(run.dtype) * efficiency.flops)
    weights, traffic = (x / (device.bandwidth * efficiency.bandwidth) for x in (work.bytes, work.traffic))
    rate = link_rate(run, devices) * efficiency.link
    received = work.received / rate if work.received else 0.0
    layers = work.layers + work.fused * efficiency.fused
    launching = layers * efficiency.layer_seconds + work.recorded * efficiency.compiled_seconds
    by_bound = {
        PRODUCTS if products > weights + traffic else MEMORY: max(products, weights) + traffic,
        INTERCONNECT: received + work.exchanges * efficiency.exchange_seconds,
        LAUNCHING: launching,
    }
    bound = max(by_bound, key=lambda name: by_bound[name])
    return Time(by_bound[bound] if device.is_beside_host else sum(by_bound.values()), bound)


def time_of(parts: Sequence[Work], run: Run, devices: int) -> Time:
    """Of parts that follow each other; they are bound by what binds the longest of them."""
    times = [time_of_part(work, run, devices) for work in parts]
    return Time(sum(time.seconds for time in times), max(times, key=lambda time: time.seconds).bound)
