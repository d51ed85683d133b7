"""Measured profiles to plan with: from the cache, laid under what a configuration declares.

Imports neither torch nor Ray: `motley plan` reads profiles.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from actors.engine.config import EngineConfig
from cluster.config import ConfigError, DeviceSpec, MotleyConfig
from cluster.planning import declared_device, declared_devices, topology_of
from cluster.profile_cache import ProfileCache
from cluster.profile_cache import fingerprint as fingerprint
from cluster.profile_cache import read_profile as read_profile
from placement.profiles import DeviceProfile, LinkProfile, Profile
from placement.topology import Device, DeviceKind, Topology
from placement.workload import ModelProfile

LOCAL = "local"


def compute_dtype(engine: EngineConfig, kind: DeviceKind) -> str:
    """Return the number format that a device of this kind computes in."""
    if engine.dtype != "auto":
        return engine.dtype
    return "bfloat16" if kind == "cuda" else "float32"


def compute_threads(engine: EngineConfig, kind: DeviceKind) -> int:
    """Return the threads that a device of this kind computes with; 0 for a card."""
    return 0 if kind == "cuda" else engine.cpu_threads


def is_called(node: str, names: Sequence[str]) -> bool:
    """Whether a configuration's word for a node means the one with these names."""
    return (socket.gethostname() if node == LOCAL else node) in names


def load_cached(config: MotleyConfig, checkpoint_fingerprint: str) -> Profile | None:
    """Return the profile of a configuration from the cache; None: some device is not in it.

    Declared devices are taken as declared. Links that were not measured are left out. Without
    configured devices: those of this machine, unless a Ray cluster would be asked.

    Raises:
        ConfigError: A cached file is damaged.
    """
    cache = ProfileCache(checkpoint_fingerprint)
    entries = [entry for entry in cache.devices() if _suits(entry, config.engine)]
    specs = config.devices if config.devices is not None else _specs_here(config, entries)
    seen: Counter[tuple[str, str]] = Counter()
    found: list[DeviceProfile] = []
    for spec in specs:
        if not spec.missing_figures:
            found.append(declared_profile(spec))
            continue
        of_node = _entries_of(spec, entries)
        # Ray hands cards out in their order; the devices of a processor share it.
        nth = seen[spec.node, spec.kind] if spec.kind == "cuda" else 0
        seen[spec.node, spec.kind] += 1
        if nth >= len(of_node):
            return None
        found.append(of_node[nth])
    if not found:
        return None
    return assemble(config, specs, found, cache.links(), checkpoint_fingerprint)


def assemble(
    config: MotleyConfig,
    specs: Sequence[DeviceSpec],
    entries: Sequence[DeviceProfile],
    links: Sequence[LinkProfile],
    checkpoint_fingerprint: str,
) -> Profile:
    """Name measured devices and links as the configuration does, and share a node's memory."""
    sharing = Counter(spec.node for spec in specs if spec.missing_figures and spec.kind != "cuda")
    devices = []
    for spec, entry in zip(specs, entries, strict=True):
        share = 1 if entry.source == "declared" or spec.kind == "cuda" else sharing[spec.node]
        devices.append(
            replace(entry, id=spec.id, node=spec.node, memory_bytes=entry.memory_bytes // share)
        )
    directions = wanted_links([spec.node for spec in specs])
    joined = [link_between(config, links, source, target) for source, target in directions]
    return Profile(
        checkpoint=Path(config.model).name,
        fingerprint=checkpoint_fingerprint,
        devices=tuple(devices),
        links=tuple(link for link in joined if link is not None),
    )


def link_between(
    config: MotleyConfig, measured: Sequence[LinkProfile], source: str, target: str
) -> LinkProfile | None:
    """Return a link as declared (either direction declares both), else as measured."""
    for ends in ((source, target), (target, source)):
        for link in config.links:
            if (link.source_node, link.target_node) == ends:
                return LinkProfile(
                    source_node=source,
                    target_node=target,
                    source="declared",
                    rtt_s=2 * link.latency_s,
                    bandwidth_bytes_per_s=link.bandwidth_bytes_per_s,
                )
    for found in measured:
        if is_called(source, found.source_names) and is_called(target, found.target_names):
            return replace(found, source_node=source, target_node=target)
    return None


def wanted_links(nodes: Sequence[str]) -> list[tuple[str, str]]:
    """Return the directions that stages on these nodes may send in, a node to itself included."""
    distinct = list(dict.fromkeys(nodes))
    return [(source, target) for source in distinct for target in distinct]


def declared_profile(spec: DeviceSpec) -> DeviceProfile:
    """Return a device that is what its configuration says."""
    device = declared_device(spec)
    return DeviceProfile(
        id=spec.id,
        node=spec.node,
        kind=spec.kind,
        source="declared",
        flops_per_s=device.flops_per_s,
        memory_bytes_per_s=device.memory_bytes_per_s,
        memory_bytes=device.memory_bytes,
        active_power_w=device.active_power_w,
        host_bytes_per_s=device.host_bytes_per_s,
    )


# --- to plan with -----------------------------------------------------------------------------


def measured_devices(
    profile: Profile, config: MotleyConfig, model: ModelProfile
) -> tuple[Device, ...]:
    """Return the configured devices with what was measured; what is declared wins.

    Raises:
        ConfigError: A device is not in the profile, or is not what it was measured as.
    """
    if config.devices is None:
        return tuple(_checked(device, config).to_device(model) for device in profile.devices)
    by_id = {device.id: device for device in profile.devices}
    devices = []
    for spec in config.devices:
        if not spec.missing_figures:
            devices.append(declared_device(spec))
            continue
        measured = by_id.get(spec.id)
        if measured is None or (measured.kind, measured.node) != (spec.kind, spec.node):
            known = ", ".join(f"{d.id} ({d.kind} on {d.node})" for d in profile.devices)
            raise ConfigError(
                f"device {spec.id} ({spec.kind} on {spec.node}) is not in the profile of {known}; "
                f"run `motley profile` with this configuration"
            )
        devices.append(merged_device(spec, _checked(measured, config), model))
    return tuple(devices)


def measured_topology(profile: Profile, config: MotleyConfig, model: ModelProfile) -> Topology:
    """Return devices and links to plan with; raises like `measured_devices`."""
    return _joined(config, measured_devices(profile, config, model), profile.links)


def known_topology(config: MotleyConfig) -> Topology:
    """Return devices that are all declared, joined by declared links, else by measured ones.

    Within a node such devices are joined as if nothing had been measured.

    Raises:
        ConfigError: Some figure of a device is not declared, or a cached file is damaged.
    """
    devices = declared_devices(config)
    measured = ProfileCache("").links()
    nodes = [device.node for device in devices]
    between = [pair for pair in wanted_links(nodes) if pair[0] != pair[1]]
    found = [link_between(config, measured, source, target) for source, target in between]
    return _joined(config, devices, [link for link in found if link is not None])


def _joined(
    config: MotleyConfig, devices: Sequence[Device], links: Sequence[LinkProfile]
) -> Topology:
    """Join devices by the links that are declared; the given ones join the other nodes."""
    declared = topology_of(config, devices)
    nodes = {device.node for device in devices}
    ends = {frozenset((link.source_node, link.target_node)) for link in config.links}
    measured = tuple(
        link.to_link()
        for link in links
        if {link.source_node, link.target_node} <= nodes
        and frozenset((link.source_node, link.target_node)) not in ends
    )
    return replace(declared, links=declared.links + measured)


def merged_device(spec: DeviceSpec, measured: DeviceProfile, model: ModelProfile | None) -> Device:
    """Lay declared figures over measured ones.

    A declared rate makes the measurements that it contradicts void: the matmul rates where
    `flops_per_s` is declared, and the layers where either rate is.
    """
    device = measured.to_device(model)
    has_rate = spec.flops_per_s is not None
    has_any_rate = has_rate or spec.memory_bytes_per_s is not None
    return replace(
        device,
        id=spec.id,
        node=spec.node,
        flops_per_s=spec.flops_per_s or device.flops_per_s,
        memory_bytes_per_s=spec.memory_bytes_per_s or device.memory_bytes_per_s,
        memory_bytes=spec.memory_bytes or device.memory_bytes,
        active_power_w=spec.active_power_w or device.active_power_w,
        host_bytes_per_s=spec.host_bytes_per_s or device.host_bytes_per_s,
        matmul_rates=() if has_rate else device.matmul_rates,
        measured_layers=() if has_any_rate else device.measured_layers,
    )


def _checked(measured: DeviceProfile, config: MotleyConfig) -> DeviceProfile:
    wanted = compute_dtype(config.engine, measured.kind)
    if measured.source != "declared" and measured.dtype != wanted:
        raise ConfigError(
            f"device {measured.id} was profiled in {measured.dtype} and engine.dtype asks for "
            f"{wanted}; run `motley profile` with this configuration"
        )
    return measured


def _suits(entry: DeviceProfile, engine: EngineConfig) -> bool:
    return entry.dtype == compute_dtype(engine, entry.kind) and entry.threads == compute_threads(
        engine, entry.kind
    )


def _entries_of(spec: DeviceSpec, entries: Sequence[DeviceProfile]) -> list[DeviceProfile]:
    """Return the latest measurement of each device of this kind on the node, by index."""
    by_index: dict[int, DeviceProfile] = {}
    for entry in entries:
        if entry.kind == spec.kind and is_called(spec.node, entry.node_names):
            by_index.setdefault(entry.index, entry)
    return [by_index[index] for index in sorted(by_index)]


def _specs_here(config: MotleyConfig, entries: Sequence[DeviceProfile]) -> list[DeviceSpec]:
    """Return this machine's devices as `motley up` would find them; none where Ray must say."""
    if config.ray.address is not None or "RAY_ADDRESS" in os.environ:
        return []
    here = [entry for entry in entries if is_called(LOCAL, entry.node_names)]
    cards = sorted({entry.index for entry in here if entry.kind == "cuda"})
    if cards:
        return [local_spec("cuda", index) for index in cards]
    return [local_spec("cpu", 0)] if here else []


def local_spec(kind: DeviceKind, index: int) -> DeviceSpec:
    """Return a device of this machine that no configuration names."""
    name = f"{LOCAL}-gpu{index}" if kind == "cuda" else f"{LOCAL}-cpu"
    return DeviceSpec.model_validate({"id": name, "node": LOCAL, "kind": kind})
