"""Which links of a deployment are timed."""

from __future__ import annotations

from actors.hosting import Host
from cluster.config import LinkSpec
from cluster.link_probes import name_among, timed_pairs
from placement.topology import GIGABIT, Device, LinkRate, Topology

HOSTS = {
    name: Host(ray_node_id=ray_node_id, address=name)
    for name, ray_node_id in {"local": "1", "10.0.0.1": "1", "b": "2", "c": "3"}.items()
}


def topology(default: LinkRate | None = GIGABIT) -> Topology:
    device = Device(
        id="a", node="local", kind="paced", flops_per_s=1.0, memory_bytes_per_s=1.0, memory_bytes=1
    )
    return Topology(devices=(device,), default_link=default)


def declared(source: str, target: str) -> LinkSpec:
    return LinkSpec(source_node=source, target_node=target, bandwidth_bytes_per_s=1e6)


def test_links_between_nodes_that_are_there_are_timed() -> None:
    pairs = [("local", "b"), ("b", "c"), ("c", "gone"), ("local", "10.0.0.1"), ("b", "b")]
    assert timed_pairs(pairs, HOSTS, topology(), []) == [("local", "b"), ("b", "c")]


def test_a_declared_link_is_taken_as_declared_both_ways() -> None:
    pairs = [("local", "b"), ("b", "local"), ("local", "c")]
    assert timed_pairs(pairs, HOSTS, topology(), [declared("b", "local")]) == [("local", "c")]


def test_nodes_that_are_declared_apart_are_not_joined_by_a_probe() -> None:
    assert timed_pairs([("local", "b")], HOSTS, topology(default=None), []) == []


def test_the_node_of_the_lanes_has_the_name_that_plans_use() -> None:
    assert name_among("local", {"10.0.0.1", "b"}, HOSTS) == "10.0.0.1"
    assert name_among("local", {"local", "10.0.0.1"}, HOSTS) == "local"
    assert name_among("local", {"b", "gone"}, HOSTS) == "local"
