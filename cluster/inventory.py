"""Which nodes there are and what their devices can do: asked of Ray, measured where undeclared.

A measurement is a short matmul, a memory copy and the free memory, taken on the node itself by a
Ray task. It ranks devices well enough to cut layers; it is not a profile of the checkpoint.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.fleet import Host
from cluster.config import ConfigError, DeviceSpec, MotleyConfig
from cluster.doctor_checks import available_memory_bytes
from cluster.planning import declared_device
from placement.topology import Device

LOCAL = "local"
_MEASURE_TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What a real device was measured to do."""

    flops_per_s: float
    memory_bytes_per_s: float
    memory_bytes: int


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


def find_devices(config: MotleyConfig, hosts: Mapping[str, Host]) -> list[Device]:
    """Return the configured devices with every figure, measuring what is not declared.

    Without configured devices: one for each GPU of the cluster, or one CPU a node where a node has
    none.

    Raises:
        ConfigError: A device's node is not in the cluster, or could not be measured.
    """
    specs = config.devices or _discover(hosts)
    missing = sorted({spec.node for spec in specs} - set(hosts))
    if missing:
        known = ", ".join(sorted(hosts))
        raise ConfigError(
            f"devices: no live Ray node is called {', '.join(missing)}; known: {known}"
        )
    _check_gpus(specs, hosts)
    unmeasured = [spec for spec in specs if spec.missing_figures]
    figures = _measure(unmeasured, hosts)
    return [
        _with_figures(spec, figures[spec.id]) if spec.id in figures else declared_device(spec)
        for spec in specs
    ]


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


def _with_figures(spec: DeviceSpec, measured: Figures) -> Device:
    return Device(
        id=spec.id,
        node=spec.node,
        kind=spec.kind,
        flops_per_s=spec.flops_per_s or measured.flops_per_s,
        memory_bytes_per_s=spec.memory_bytes_per_s or measured.memory_bytes_per_s,
        memory_bytes=spec.memory_bytes or measured.memory_bytes,
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


def _measure(specs: Sequence[DeviceSpec], hosts: Mapping[str, Host]) -> dict[str, Figures]:
    """Measure devices, one after another on a node so that they do not disturb each other."""
    sharing = Counter(hosts[spec.node].ray_node_id for spec in specs if spec.kind != "cuda")
    measured: dict[str, Figures] = {}
    for spec in specs:
        affinity = NodeAffinitySchedulingStrategy(hosts[spec.node].ray_node_id, soft=False)
        is_cuda = spec.kind == "cuda"
        task = _measure_here.options(
            num_cpus=0, num_gpus=1 if is_cuda else 0, scheduling_strategy=affinity
        )
        try:
            flops_per_s, memory_bytes_per_s, memory_bytes = ray.get(
                task.remote(is_cuda), timeout=_MEASURE_TIMEOUT_S
            )
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
            raise ConfigError(
                f"device {spec.id} could not be measured ({type(error).__name__}); declare its "
                "flops_per_s, memory_bytes_per_s and memory_bytes"
            ) from error
        share = 1 if is_cuda else sharing[hosts[spec.node].ray_node_id]
        measured[spec.id] = Figures(
            flops_per_s=flops_per_s,
            memory_bytes_per_s=memory_bytes_per_s,
            memory_bytes=int(memory_bytes) // share,
        )
    return measured


@ray.remote(max_retries=0)
def _measure_here(is_cuda: bool) -> tuple[float, float, int]:
    """Runs on the node: (FLOP/s of a float32 matmul, bytes/s of a copy, free bytes)."""
    import time

    import torch

    torch.set_num_threads(1)
    device = torch.device("cuda" if is_cuda else "cpu")
    size = 4096 if is_cuda else 512

    def seconds(work: Any, repeats: int) -> float:
        work()
        best = float("inf")
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            if is_cuda:
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        return best

    a = torch.randn(size, size, device=device)
    block = torch.empty(64 * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(block)
    flops_per_s = 2 * size**3 / seconds(lambda: a @ a, 5)
    # A copy reads and writes each byte.
    bytes_per_s = 2 * block.numel() / seconds(lambda: target.copy_(block), 5)
    if is_cuda:
        return flops_per_s, bytes_per_s, int(torch.cuda.mem_get_info()[0])
    return flops_per_s, bytes_per_s, available_memory_bytes() or 0
