"""Which names mean which Ray node."""

from __future__ import annotations

from typing import Any

import pytest

from cluster import inventory
from cluster.config import ConfigError, MotleyConfig
from cluster.inventory import NODE_RESOURCE, find_specs, hosts_by_name


def node(
    node_id: str, address: str = "", *, host: str = "", name: str = "", **resources: float
) -> dict[str, Any]:
    """A node as Ray lists it; a resource `called_x` stands for `motley-node:x`."""
    offered = {
        key.replace("called_", NODE_RESOURCE) if key.startswith("called_") else key: value
        for key, value in resources.items()
    }
    return {
        "NodeID": node_id,
        "Alive": True,
        "NodeManagerAddress": address or f"10.0.0.{node_id}",
        "NodeManagerHostname": host or f"host-{node_id}",
        "NodeName": name or address or f"10.0.0.{node_id}",
        "Resources": {"CPU": 4.0} | offered,
    }


def ids(nodes: list[dict[str, Any]], own_id: str = "1") -> dict[str, str]:
    found = hosts_by_name(nodes, own_id, "here")
    return {name: host.ray_node_id for name, host in found.items()}


def test_a_node_is_found_by_address_host_name_node_name_id_and_resource() -> None:
    found = ids([node("1"), node("2", "10.0.0.7", host="box", name="second", called_big=1)])

    assert {name for name, node_id in found.items() if node_id == "2"} == {
        "10.0.0.7", "box", "second", "2", "big",
    }  # fmt: skip
    assert found["local"] == found["here"] == found["host-1"] == "1"


def test_a_name_that_two_nodes_have_means_neither_but_local_stays_local() -> None:
    pods = [node("1", host="pod", called_gpu=1), node("2", host="pod", called_gpu=1)]
    found = ids(pods, own_id="2")

    assert not {"pod", "gpu"} & set(found)
    assert found["local"] == "2"
    assert (found["10.0.0.1"], found["10.0.0.2"]) == ("1", "2")


def test_one_node_alone_is_reached_over_loopback() -> None:
    assert {h.address for h in hosts_by_name([node("1")], "1", "here").values()} == {"127.0.0.1"}
    grows = hosts_by_name([node("1")], "1", "here", may_grow=True)
    assert {host.address for host in grows.values()} == {"10.0.0.1"}
    two = hosts_by_name([node("1"), node("2")], "1", "here")
    assert (two["local"].address, two["2"].address) == ("10.0.0.1", "10.0.0.2")


def with_nodes(monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, Any]]) -> Any:
    monkeypatch.setattr(inventory, "_live_nodes", lambda: nodes)
    return hosts_by_name(nodes, "1", "here")


def on_nodes(*names: str) -> MotleyConfig:
    devices = [{"id": f"d{i}", "node": name, "kind": "cpu"} for i, name in enumerate(names)]
    return MotleyConfig.model_validate({"model": "org/tiny", "devices": devices})


def test_a_device_on_a_name_that_two_nodes_share_is_refused_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hosts = with_nodes(monkeypatch, [node("1"), node("2", called_gpu=1), node("3", called_gpu=1)])

    with pytest.raises(ConfigError, match=r"2 live Ray nodes are called gpu.*motley-node:NAME"):
        find_specs(on_nodes("gpu"), hosts)


def test_a_device_on_a_node_that_is_not_there_is_refused_with_the_names_that_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hosts = with_nodes(monkeypatch, [node("1"), node("2", called_gpu=1)])

    with pytest.raises(ConfigError, match=r"is called card; known: .*gpu"):
        find_specs(on_nodes("local", "card"), hosts)


def test_nodes_without_a_name_of_their_own_are_discovered_by_their_id(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    twins = [node("1"), *(node(i, "10.0.0.9", host="pod", GPU=2) for i in ("7", "8"))]
    hosts = with_nodes(monkeypatch, twins)
    config = MotleyConfig.model_validate({"model": "org/tiny"})

    assert [(spec.id, spec.node) for spec in find_specs(config, hosts)] == [
        ("7-gpu0", "7"), ("7-gpu1", "7"), ("8-gpu0", "8"), ("8-gpu1", "8"), ("local-cpu", "local"),
    ]  # fmt: skip
