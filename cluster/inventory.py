"""Which nodes there are and what their devices can do: asked of Ray, measured where undeclared.

What `motley profile` measured is used when it is cached; else a measurement is short: matrix
products, a memory copy and the free memory. It ranks devices well enough to cut layers; it is not
a profile of the checkpoint.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray

from actors.engine.checkpoint import Checkpoint
from actors.engine.measure import QUICK, QUICK_ROWS
from actors.hosting import Host
from actors.link_timer import ProbeError
from cluster.config import ConfigError, DeviceSpec, MotleyConfig
from cluster.planning import dtype_bytes
from cluster.probes import Probes
from cluster.profile import (
    LOCAL,
    assemble,
    declared_profile,
    known_topology,
    measured_topology,
)
from cluster.profile_cache import ProfileCache, fingerprint
from placement.profiles import DeviceProfile
from placement.topology import Topology

_MEASURE_TIMEOUT_S = 120.0
NODE_RESOURCE = "motley-node:"
"""A Ray resource of this prefix names its node, where addresses are not known beforehand."""


def find_hosts(*, may_grow: bool = False) -> dict[str, Host]:
    """Return the live nodes under every name a configuration may use for them; see
    `hosts_by_name`."""
    own_id = ray.get_runtime_context().get_node_id()
    return hosts_by_name(_live_nodes(), own_id, socket.gethostname(), may_grow=may_grow)


def hosts_by_name(
    nodes: Sequence[Mapping[str, Any]],
    own_id: str,
    own_host_name: str,
    *,
    may_grow: bool = False,
) -> dict[str, Host]:
    """Return nodes (as Ray lists them) by name; a name that several have names none of them.

    A node's names are its address, its host name, its Ray node name, its Ray node id, and NAME for
    each resource `motley-node:NAME` that it offers. "local" is the node of `own_id`. On a cluster
    of one node everything stays on loopback, unless it may grow.
    """
    hosts: dict[str, Host] = {}
    taken = Counter(name for node in nodes for name in _names(node))
    for node in nodes:
        address = node["NodeManagerAddress"] if len(nodes) > 1 or may_grow else "127.0.0.1"
        host = Host(ray_node_id=node["NodeID"], address=address)
        names = {name for name in _names(node) if taken[name] == 1}
        if node["NodeID"] == own_id:
            names |= {LOCAL} | ({own_host_name} if own_host_name not in taken else set())
        hosts |= dict.fromkeys(names, host)
    return hosts


def _names(node: Mapping[str, Any]) -> set[str]:
    given = {
        resource.removeprefix(NODE_RESOURCE)
        for resource in node["Resources"]
        if resource.startswith(NODE_RESOURCE)
    }
    fixed = {node[key] for key in ("NodeManagerAddress", "NodeManagerHostname", "NodeName")}
    return (given | fixed | {node["NodeID"]}) - {"", LOCAL}


def _live_nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def find_specs(config: MotleyConfig, hosts: Mapping[str, Host]) -> list[DeviceSpec]:
    """Return the configured devices, all on live nodes.

    Without configured devices: one for each GPU of the cluster, or one CPU a node where a node has
    none.

    Raises:
        ConfigError: A device's node is not in the cluster, or has too few GPUs.
    """
    specs = list(config.devices or _discover(hosts))
    missing = sorted({spec.node for spec in specs} - set(hosts))
    if missing:
        raise ConfigError(_not_found(missing, hosts, _live_nodes()))
    _check_gpus(specs, hosts)
    return specs


def find_topology(config: MotleyConfig, hosts: Mapping[str, Host]) -> Topology:
    """Return the devices of `find_specs` with every figure, and the links between their nodes.

    What is not declared comes from the cached profile; else devices are measured shortly, and
    links are taken to be `default_link`. Free memory is always that of this moment.

    Raises:
        ConfigError: A device's node is not in the cluster, or could not be measured.
    """
    specs = find_specs(config, hosts)
    if not any(spec.missing_figures for spec in specs):
        return known_topology(config.model_copy(update={"devices": tuple(specs)}))
    checkpoint = Checkpoint.open(
        config.model, allow_unverified=config.engine.allow_unverified_architectures
    )
    cache = ProfileCache(fingerprint(checkpoint.config))
    try:
        entries = _known_or_quick(config, specs, hosts, cache)
    except ProbeError as error:
        raise ConfigError(
            f"{error}; or declare the device's flops_per_s, memory_bytes_per_s and memory_bytes"
        ) from error
    profile = assemble(config, specs, entries, cache.links(), cache.fingerprint)
    model = checkpoint.profile(
        dtype_bytes=dtype_bytes(config.engine, [spec.kind for spec in specs])
    )
    return measured_topology(profile, config.model_copy(update={"devices": tuple(specs)}), model)


def find_joined(
    config: MotleyConfig, topology: Topology, hosts: Mapping[str, Host]
) -> Topology | None:
    """Return the topology with the devices of nodes that have joined, measured shortly; None:
    there are none.

    Raises:
        ConfigError: One could not be measured.
    """
    known = {device.id for device in topology.devices}
    new = tuple(spec for spec in find_specs(config, hosts) if spec.id not in known)
    if not new:
        return None
    found = find_topology(config.model_copy(update={"devices": new}), hosts)
    pairs = {(link.source_node, link.target_node) for link in topology.links}
    links = [link for link in found.links if (link.source_node, link.target_node) not in pairs]
    return replace(
        topology,
        devices=(*topology.devices, *found.devices),
        links=(*topology.links, *links),
    )


def _known_or_quick(
    config: MotleyConfig,
    specs: Sequence[DeviceSpec],
    hosts: Mapping[str, Host],
    cache: ProfileCache,
) -> list[DeviceProfile]:
    """Return a profile of each spec; the devices of a node are measured one after another."""
    unmeasured = [spec for spec in specs if spec.missing_figures]
    measured: dict[str, DeviceProfile] = {}
    entries = []
    with Probes(unmeasured, hosts, config.engine, _MEASURE_TIMEOUT_S) as probes:
        for spec in specs:
            if not spec.missing_figures:
                entries.append(declared_profile(spec))
                continue
            first = probes.first_of(spec)
            if first.id not in measured:
                found = probes.find(first)
                known = cache.find(found.key)
                measured[first.id] = (
                    probes.measure(first, found, effort=QUICK, rows=QUICK_ROWS[spec.kind])
                    if known is None
                    else replace(known, memory_bytes=found.free_bytes)
                )
            entries.append(measured[first.id])
    return entries


def _not_found(
    missing: Sequence[str], hosts: Mapping[str, Host], nodes: Sequence[Mapping[str, Any]]
) -> str:
    """Say which nodes are not there, and which names mean more than one."""
    counts = Counter(name for node in nodes for name in _names(node))
    for name in missing:
        if counts[name] > 1:
            return (
                f"devices: {counts[name]} live Ray nodes are called {name}; name one by its "
                f"address, or give each a name of its own: "
                f"ray start --resources='{{\"{NODE_RESOURCE}NAME\": 1}}'"
            )
    known = ", ".join(sorted(set(hosts) - _ids(hosts)))
    return f"devices: no live Ray node is called {', '.join(missing)}; known: {known}"


def _check_gpus(specs: Sequence[DeviceSpec], hosts: Mapping[str, Host]) -> None:
    """Refuse more cuda devices on a node than Ray sees GPUs there: they would wait for ever."""
    wanted = Counter(hosts[spec.node].ray_node_id for spec in specs if spec.kind == "cuda")
    for node in _live_nodes():
        count, present = wanted[node["NodeID"]], int(node["Resources"].get("GPU", 0))
        if count > present:
            raise ConfigError(
                f"devices: {count} of kind cuda on node {node['NodeManagerAddress']}, where Ray "
                f"sees {present} GPUs; remove some, or start its Ray node with --num-gpus"
            )


def _discover(hosts: Mapping[str, Host]) -> list[DeviceSpec]:
    by_name = {_shown_name(node_id, hosts): node_id for node_id in _ids(hosts)}
    gpus = {node["NodeID"]: int(node["Resources"].get("GPU", 0)) for node in _live_nodes()}
    specs: list[DeviceSpec] = []
    for name, node_id in sorted(by_name.items()):
        if gpus.get(node_id):
            specs += [
                DeviceSpec.model_validate({"id": f"{name}-gpu{i}", "node": name, "kind": "cuda"})
                for i in range(gpus[node_id])
            ]
        else:
            specs.append(
                DeviceSpec.model_validate({"id": f"{name}-cpu", "node": name, "kind": "cpu"})
            )
    return specs


def _shown_name(node_id: str, hosts: Mapping[str, Host]) -> str:
    """Return the first of a node's names, "local" before all, its id after all."""
    names = {name for name, host in hosts.items() if host.ray_node_id == node_id}
    return min(names, key=lambda name: (name != LOCAL, name == node_id, name))


def _ids(hosts: Mapping[str, Host]) -> set[str]:
    return {host.ray_node_id for host in hosts.values()}
