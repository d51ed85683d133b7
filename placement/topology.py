"""What there is to plan over: devices with declared or measured rates, and links between nodes.

Values only. A device is an accelerator, or a share of a CPU, on a node; a link joins two nodes
in one direction. A rate is what a step can really use (measured), not a data sheet's peak.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

DeviceKind = Literal["cpu", "cuda", "paced"]

LOOPBACK_BYTES_PER_S = 1e9
"""A message between two processes of one node: 1 GB/s, what a ZeroMQ ipc socket moves with one
copy on each side."""
LOOPBACK_LATENCY_S = 1e-4
"""One ZeroMQ message one way on a small machine (measured: 0.08 ms)."""
DEFAULT_LINK_BYTES_PER_S = 117e6
"""A pair of nodes nobody described: gigabit Ethernet after framing."""
DEFAULT_LINK_LATENCY_S = 5e-4
"""The same, one way, with a switch between."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One accelerator or CPU share that can host a stage."""

    id: str
    node: str
    kind: DeviceKind
    flops_per_s: float
    memory_bytes_per_s: float
    memory_bytes: int

    def __post_init__(self) -> None:
        if not self.id:
            raise ValueError("a device has an empty id; give every device a name")
        owner = f"device {self.id}"
        _check_positive(owner, "flops_per_s", self.flops_per_s)
        _check_positive(owner, "memory_bytes_per_s", self.memory_bytes_per_s)
        _check_positive(owner, "memory_bytes", self.memory_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """What one node can send to another."""

    source_node: str
    target_node: str
    bandwidth_bytes_per_s: float
    latency_s: float

    def __post_init__(self) -> None:
        owner = f"link {self.source_node}->{self.target_node}"
        _check_positive(owner, "bandwidth_bytes_per_s", self.bandwidth_bytes_per_s)
        if not (math.isfinite(self.latency_s) and self.latency_s >= 0):
            raise ValueError(f"{owner}: latency_s ({self.latency_s}) must be 0 or more and finite")


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """Devices in the order in which stages may use them, and the links between their nodes."""

    devices: tuple[Device, ...]
    links: tuple[Link, ...] = ()

    def __post_init__(self) -> None:
        if not self.devices:
            raise ValueError("the topology has 0 devices; declare at least 1")
        for device_id, count in Counter(device.id for device in self.devices).items():
            if count > 1:
                raise ValueError(f"{count} devices are called {device_id}; give each its own id")
        pairs = Counter((link.source_node, link.target_node) for link in self.links)
        for (source, target), count in pairs.items():
            if count > 1:
                raise ValueError(f"{count} links lead from {source} to {target}; keep one")

    def link(self, source_node: str, target_node: str) -> Link:
        """Return the link between two nodes.

        A declared link wins, also from a node to itself; then the declared opposite direction
        (links are taken as symmetric until both directions are given); then a default: loopback
        within a node, gigabit Ethernet between nodes.
        """
        opposite = None
        for link in self.links:
            if (link.source_node, link.target_node) == (source_node, target_node):
                return link
            if (link.target_node, link.source_node) == (source_node, target_node):
                opposite = link
        if opposite is not None:
            bandwidth, latency_s = opposite.bandwidth_bytes_per_s, opposite.latency_s
        elif source_node == target_node:
            bandwidth, latency_s = LOOPBACK_BYTES_PER_S, LOOPBACK_LATENCY_S
        else:
            bandwidth, latency_s = DEFAULT_LINK_BYTES_PER_S, DEFAULT_LINK_LATENCY_S
        return Link(
            source_node=source_node,
            target_node=target_node,
            bandwidth_bytes_per_s=bandwidth,
            latency_s=latency_s,
        )


def _check_positive(owner: str, field: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{owner}: {field} ({value}) must be above 0 and finite")
