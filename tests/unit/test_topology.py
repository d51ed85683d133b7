from __future__ import annotations

import math
from typing import Any

import pytest

from placement.topology import (
    DEFAULT_LINK_BYTES_PER_S,
    DEFAULT_LINK_LATENCY_S,
    LOOPBACK_BYTES_PER_S,
    LOOPBACK_LATENCY_S,
    Device,
    Link,
    Topology,
)


def device(device_id: str = "a", **changes: Any) -> Device:
    fields: dict[str, Any] = {
        "node": "n0",
        "kind": "paced",
        "flops_per_s": 1e9,
        "memory_bytes_per_s": 1e9,
        "memory_bytes": 1 << 20,
    }
    return Device(id=device_id, **(fields | changes))


def link(source: str, target: str, bandwidth: float = 1e6, latency_s: float = 0.001) -> Link:
    return Link(
        source_node=source,
        target_node=target,
        bandwidth_bytes_per_s=bandwidth,
        latency_s=latency_s,
    )


@pytest.mark.parametrize("field", ["flops_per_s", "memory_bytes_per_s", "memory_bytes"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_a_device_without_a_real_rate_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"device gpu: {field} \({value}\) must be above 0"):
        device("gpu", **{field: value})


def test_an_empty_device_id_is_refused() -> None:
    with pytest.raises(ValueError, match="empty id"):
        device("")


@pytest.mark.parametrize("latency_s", [-0.1, math.nan, math.inf])
def test_a_link_with_an_impossible_latency_is_refused(latency_s: float) -> None:
    with pytest.raises(ValueError, match="link x->y: latency_s"):
        link("x", "y", latency_s=latency_s)


def test_a_link_without_bandwidth_is_refused() -> None:
    with pytest.raises(ValueError, match="link x->y: bandwidth_bytes_per_s \\(0\\)"):
        link("x", "y", bandwidth=0)


def test_a_topology_needs_devices_with_ids_of_their_own() -> None:
    with pytest.raises(ValueError, match="0 devices"):
        Topology(devices=())
    with pytest.raises(ValueError, match="2 devices are called a"):
        Topology(devices=(device("a"), device("a")))


def test_two_links_of_one_direction_are_refused() -> None:
    with pytest.raises(ValueError, match="2 links lead from x to y"):
        Topology(devices=(device(),), links=(link("x", "y"), link("x", "y", 2.0)))


def test_a_declared_link_wins_over_its_opposite() -> None:
    topology = Topology(
        devices=(device(),), links=(link("y", "x", 5.0), link("x", "y", 7.0), link("x", "x", 9.0))
    )

    assert topology.link("x", "y").bandwidth_bytes_per_s == 7.0
    assert topology.link("y", "x").bandwidth_bytes_per_s == 5.0
    assert topology.link("x", "x").bandwidth_bytes_per_s == 9.0


def test_one_declared_direction_speaks_for_both() -> None:
    topology = Topology(devices=(device(),), links=(link("x", "y", 7.0, 0.25),))

    assert topology.link("y", "x") == link("y", "x", 7.0, 0.25)


def test_undeclared_pairs_get_loopback_or_gigabit() -> None:
    topology = Topology(devices=(device(),))

    assert topology.link("x", "x") == link("x", "x", LOOPBACK_BYTES_PER_S, LOOPBACK_LATENCY_S)
    assert topology.link("x", "y") == link(
        "x", "y", DEFAULT_LINK_BYTES_PER_S, DEFAULT_LINK_LATENCY_S
    )
