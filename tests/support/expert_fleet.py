"""Expert workers of several nodes in this process, over real sockets and without Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from expert_routes import EvenRoutes, experts_by_layer

from actors import wire
from actors.engine.checkpoint import Checkpoint
from actors.engine.config import EngineConfig
from actors.engine.expert_slots import ExpertSlots
from actors.engine.fingerprint import expert_fingerprint
from actors.expert import ExpertSpec, ExpertWorker
from actors.expert_links import ExpertLinks, ExpertNode
from placement.topology import Device, DeviceKind

NODES = {"near": ("n0", "n1"), "far": ("f0", "f1")}
"""Devices of two nodes; the first of each is its front."""
DEVICES = [device for devices in NODES.values() for device in devices]


def far(address: wire.Address) -> wire.Address:
    """The address as another machine sees it: reached by TCP with CURVE."""
    return replace(address, machine="another")


def expert_spec(
    path: Path,
    device: str,
    experts: Mapping[int, Sequence[int]],
    *,
    version: int = 0,
    spare: int = 0,
    kind: DeviceKind = "cpu",
    **options: Any,
) -> ExpertSpec:
    profile = Checkpoint.open(str(path)).profile(dtype_bytes=4)
    return ExpertSpec(
        model=str(path),
        device=Device(
            id=device, node="a node", kind=kind, flops_per_s=1e9, memory_bytes_per_s=1e9,
            memory_bytes=2**30,
        ),
        profile=profile,
        num_slots=sum(map(len, experts.values())) + spare or 1,
        version=version,
        experts={layer: tuple(held) for layer, held in experts.items()},
        engine=EngineConfig(),
        **options,
    )  # fmt: skip


class ExpertFleet:
    """The workers of `NODES`, each holding what the routes say."""

    def __init__(self, path: Path, routes: EvenRoutes, *, spare: int = 0, **options: Any) -> None:
        self._stack = ExitStack()
        self.path = path
        self.keys = wire.WireKeys.make()
        self.monitor = wire.Inbox("monitor", self.keys)
        self._stack.callback(self.monitor.close)
        checkpoint = Checkpoint.open(str(path))
        self.fingerprint = expert_fingerprint(checkpoint)
        self.layers = ExpertSlots(checkpoint, 1).layers
        self.workers: dict[str, ExpertWorker] = {}
        self.callers: list[wire.Address] = []
        for device in DEVICES:
            held = experts_by_layer(self.layers, routes.held_by(device))
            spec = expert_spec(path, device, held, version=routes.version, spare=spare, **options)
            worker = ExpertWorker(spec, self.keys, self.monitor.address)
            self._stack.callback(worker.stop)
            self.workers[device] = worker
        self.routes = self.over_nodes(routes)

    def over_nodes(self, routes: EvenRoutes) -> EvenRoutes:
        """The same map, with where its devices are."""
        nodes = []
        for name, devices in NODES.items():
            seen = {device: self.workers[device].ready() for device in devices}
            if name == "far":
                seen = {device: far(address) for device, address in seen.items()}
            nodes.append(ExpertNode(devices[0], seen))
        return replace(routes, nodes=nodes)

    def links(self, **options: Any) -> ExpertLinks:
        """A stage's way to the workers, in force with the first routes."""
        options = {"fingerprint": self.fingerprint} | options
        links = ExpertLinks("a stage", self.keys, **options)
        self._stack.callback(links.close)
        self.callers.append(links.address)
        self.connect()
        links.use(self.routes)
        return links

    def connect(self) -> None:
        for name, devices in NODES.items():
            callers = [far(each) if name == "far" else each for each in self.callers]
            for device in devices:
                siblings = {d: self.workers[d].ready() for d in devices if d != device}
                self.workers[device].connect(callers, siblings)

    def prepare(self, routes: EvenRoutes) -> EvenRoutes:
        """Have every worker load a new version of the map, and return it."""
        for device, worker in self.workers.items():
            worker.prepare(routes.version, experts_by_layer(self.layers, routes.held_by(device)))
        return self.over_nodes(routes)

    def swap(self, version: int) -> None:
        for worker in self.workers.values():
            worker.swap(version)

    def close(self) -> None:
        self._stack.close()
