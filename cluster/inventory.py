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
from actors.fleet import Host
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


def find_hosts() -> dict[str, Host]:
    """Return the live nodes under every name a configuration may use for them.

    "local" is this process's node. On a cluster of one node everything stays on loopback.
    """
    alive = _live_nodes()
    own_id = ray.get_runtime_context().get_node_id()
    hosts: dict[str, Host] = {}
    for node in alive:
        address = node["NodeManagerAddress"] if len(alive) > 1 else "127.0.0.1"
        host = Host(ray_node_id=node["NodeID"], address=address)
        names = {node["NodeManagerAddress"], node["NodeManagerHostname"], node["NodeName"]}
        if node["NodeID"] == own_id:
            names |= {LOCAL, socket.gethostname()}
        for name in names:
            hosts[name] = host
    return hosts


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
        known = ", ".join(sorted(hosts))
        raise ConfigError(
            f"devices: no live Ray node is called {', '.join(missing)}; known: {known}"
        )
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
    by_id = {host.ray_node_id: name for name, host in sorted(hosts.items(), reverse=True)}
    by_id |= {host.ray_node_id: name for name, host in hosts.items() if name == LOCAL}
    gpus = {node["NodeID"]: int(node["Resources"].get("GPU", 0)) for node in _live_nodes()}
    specs: list[DeviceSpec] = []
    for node_id, name in sorted(by_id.items(), key=lambda pair: pair[1]):
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
