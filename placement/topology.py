"""What there is to plan over: devices with declared or measured rates, and links between nodes.

Values only. A device is an accelerator, or a share of a CPU, on a node; a link joins two nodes
in one direction. A rate is what a step can really use (measured), not a data sheet's peak.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from placement.errors import InfeasiblePlanError
from placement.measured import MatmulRate, MeasuredLayer, check_ascending

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


def _check_rate(owner: str, rate: Link | LinkRate) -> None:
    _check_positive(owner, "bandwidth_bytes_per_s", rate.bandwidth_bytes_per_s)
    if not (math.isfinite(rate.latency_s) and rate.latency_s >= 0):
        raise ValueError(f"{owner}: latency_s ({rate.latency_s}) must be 0 or more and finite")


def _check_positive(owner: str, field: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{owner}: {field} ({value}) must be above 0 and finite")


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One accelerator or CPU share that can host a stage."""

    id: str
    node: str
    kind: DeviceKind
    flops_per_s: float
    memory_bytes_per_s: float
    memory_bytes: int
    active_power_w: float | None = None
    """Watts drawn while computing, above what the idle device draws; None: not known. Idle power
    is drawn whatever the plan says, so it is nobody's to save."""
    host_bytes_per_s: float | None = None
    """Rate at which weights reach the device from its node's memory; None: it computes in that
    memory and waits for nothing."""
    matmul_rates: tuple[MatmulRate, ...] = ()
    """By ascending rows; empty: `flops_per_s` at every size."""
    measured_layers: tuple[MeasuredLayer, ...] = ()
    """Layers of the checkpoint timed on this device; others are predicted by the roofline."""

    def __post_init__(self) -> None:
        if not self.id:
            raise ValueError("a device has an empty id; give every device a name")
        owner = f"device {self.id}"
        for field in ("active_power_w", "host_bytes_per_s"):
            if getattr(self, field) is not None:
                _check_positive(owner, field, getattr(self, field))
        check_ascending(f"{owner}: rows of matmul_rates", [r.rows for r in self.matmul_rates])
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
        _check_rate(f"link {self.source_node}->{self.target_node}", self)


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkRate:
    """What a link can do, whichever nodes it joins."""

    bandwidth_bytes_per_s: float
    latency_s: float

    def __post_init__(self) -> None:
        _check_rate("the default link", self)


LOOPBACK = LinkRate(bandwidth_bytes_per_s=LOOPBACK_BYTES_PER_S, latency_s=LOOPBACK_LATENCY_S)
GIGABIT = LinkRate(bandwidth_bytes_per_s=DEFAULT_LINK_BYTES_PER_S, latency_s=DEFAULT_LINK_LATENCY_S)


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Devices in the order in which stages may use them, and the links between their nodes."""

    devices: tuple[Device, ...]
    links: tuple[Link, ...] = ()
    default_link: LinkRate | None = GIGABIT
    """Between two nodes that no link names; None: they cannot reach each other."""

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

    @cached_property
    def _rates(self) -> dict[tuple[str, str], LinkRate]:
        """Declared rates by direction; a declared opposite direction fills a missing one."""
        rates: dict[tuple[str, str], LinkRate] = {}
        for link in self.links:
            rate = LinkRate(
                bandwidth_bytes_per_s=link.bandwidth_bytes_per_s, latency_s=link.latency_s
            )
            rates[link.source_node, link.target_node] = rate
        for link in self.links:
            pair = (link.source_node, link.target_node)
            rates.setdefault((link.target_node, link.source_node), rates[pair])
        return rates

    def rate(self, source_node: str, target_node: str) -> LinkRate | None:
        """Return what one node can send another at; None: it cannot reach it.

        A declared link wins, also from a node to itself; then the declared opposite direction
        (links are taken as symmetric until both directions are given); then loopback within a
        node and `default_link` between nodes.
        """
        declared = self._rates.get((source_node, target_node))
        if declared is not None:
            return declared
        return LOOPBACK if source_node == target_node else self.default_link

    def link(self, source_node: str, target_node: str) -> Link:
        """Return the link between two nodes (see `rate`).

        Raises:
            InfeasiblePlanError: No link joins them and there is no default.
        """
        rate = self.rate(source_node, target_node)
        if rate is None:
            raise InfeasiblePlanError(
                f"no link leads from {source_node} to {target_node} and there is no default; "
                f"declare one in links, or set default_link"
            )
        return Link(
            source_node=source_node,
            target_node=target_node,
            bandwidth_bytes_per_s=rate.bandwidth_bytes_per_s,
            latency_s=rate.latency_s,
        )
