"""ExpertActor: routed experts on one device. Decides nothing.

Versions of the expert map are prepared beside running calls; calls name theirs, and those in
flight end with it.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgpack
import ray
import torch

from actors import wire
from actors.engine.arrays import Array, to_array
from actors.engine.checkpoint import Checkpoint
from actors.engine.config import EngineConfig
from actors.engine.expert_calls import ExpertError, ExpertRows
from actors.engine.expert_host import ExpertHost
from actors.engine.expert_slots import ExpertSlots
from actors.engine.pace import DeviceClock
from actors.engine.slice import resolve_dtype
from actors.expert_server import ExpertServer
from actors.loop import ServingLoop
from placement.costs import experts_s
from placement.topology import Device
from placement.workload import ModelProfile

_POLL_S = 0.05
_FINEST_S = 1e-3
_REPORT_EVERY_S = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertSpec:
    """What an expert worker is: its device, its room, and what it holds at first."""

    model: str
    device: Device
    profile: ModelProfile
    num_slots: int
    """Experts that the device has room for at once, over all layers and versions of the map."""
    num_guests: int = 0
    """Of these, guests (see `ExpertHost`)."""
    version: int
    experts: Mapping[int, tuple[int, ...]]
    """Of that version of the expert map, by layer."""
    engine: EngineConfig
    fingerprint: str = ""
    """Of the checkpoint that the stages serve; empty: any."""
    host: str = "127.0.0.1"
    """Address of the node's own interface that other nodes can reach."""


class ExpertWorker:
    """Hosts experts of one device. The constructor loads; `connect` starts serving."""

    def __init__(self, spec: ExpertSpec, keys: wire.WireKeys, monitor: wire.Address) -> None:
        torch.set_num_threads(spec.engine.cpu_threads)
        self._spec = spec
        self._keys = keys
        self._clock = DeviceClock(time.monotonic, time.sleep, spec.device.kind == "paced")
        self._turn = threading.Lock()
        """Held while a message is served."""
        self._outboxes: dict[wire.Address, wire.Outbox] = {}
        self._is_serving = False
        self._reported_s = 0.0
        self._host = _load(spec)
        # As in a stage: what is loaded stays, and no full collection need walk it.
        gc.collect()
        gc.freeze()
        # Last: a worker that cannot load leaves no socket behind.
        self._monitor = wire.Outbox(monitor, keys)
        name = f"experts on {spec.device.id}"
        self._inbox = wire.Inbox(name, keys, host=spec.host, beside=monitor)
        self._server = ExpertServer(
            spec.device.id, self._host, self._clock, self._seconds, self._inbox.address.ipc
        )
        self._loop = ServingLoop("experts", self._take_turn)

    def ready(self) -> wire.Address:
        """Return where the worker receives, once the constructor has loaded it."""
        return self._inbox.address

    def bytes_read(self) -> int:
        """Tensor bytes taken from disk so far."""
        return self._host.bytes_read

    def versions(self) -> tuple[int, ...]:
        """Return the versions of the map that calls may name."""
        return self._host.versions

    def connect(
        self, callers: Sequence[wire.Address], siblings: Mapping[str, wire.Address]
    ) -> None:
        """Serve these, and the other workers of the node by device; again when any is replaced."""
        with self._turn:
            wanted = {*callers, *siblings.values()}
            for address in wanted - self._outboxes.keys():
                self._outboxes[address] = wire.Outbox(address, self._keys)
            self._server.connect(
                [self._outboxes[address] for address in callers],
                {device: self._outboxes[address] for device, address in siblings.items()},
            )
            for address in self._outboxes.keys() - wanted:
                self._outboxes.pop(address).close()
        if not self._is_serving:
            self._is_serving = True
            self._loop.start()

    def prepare(
        self, version: int, experts: Mapping[int, Sequence[int]], *, in_place: bool = False
    ) -> None:
        """Load what a map version has here, beside running calls; all of it, or nothing changes.

        Raises:
            ExpertError: See `ExpertHost.prepare`.
        """
        self._host.prepare(version, experts, in_place=in_place)

    def fetch(self, layer: int, expert: int, share: float) -> None:
        """Load an expert for a version to come, or this share of it; see `ExpertHost.fetch`.

        Raises:
            ExpertError: No such expert, or no free slot.
        """
        self._host.fetch(layer, expert, share=share)

    def release(self, layer: int, expert: int) -> None:
        """Undo `fetch`."""
        self._host.release(layer, expert)

    def swap(self, version: int) -> None:
        """Forget versions before this one; calls that name them are refused from now on."""
        self._host.retire(version)

    def forget(self, version: int) -> None:
        """Undo `prepare` of a version that never came into force."""
        self._host.forget(version)

    def take_gradients(self) -> dict[tuple[int, int], tuple[Array, ...]]:
        """Return what gradients of weights have added up to, by (layer, expert)."""
        taken = self._host.take_gradients()
        return {key: tuple(map(to_array, weights)) for key, weights in taken.items()}

    def slow_down(self, slowness: float) -> None:
        """Make a paced device take a multiple of its declared time, to try what that does."""
        self._clock.slowness = slowness

    def ping(self) -> None:
        """Answer, beside calls: this process runs."""

    def watch(self) -> None:
        """Block while the worker serves; the caller learns of its death by this call's error."""
        self._loop.watch()

    def stop(self) -> None:
        """Stop serving and close the sockets. Safe to call twice."""
        self._loop.stop()
        self._host.close()
        self._inbox.close()
        self._monitor.close()
        for outbox in self._outboxes.values():
            outbox.close()

    def _take_turn(self) -> None:
        wait_s = self._server.wait_s(_POLL_S)
        if wait_s < _FINEST_S:
            # A socket counts whole milliseconds.
            time.sleep(wait_s)
            wait_s = 0.0
        parts = self._inbox.receive(wait_s)
        with self._turn:
            if parts is not None:
                self._server.handle(parts)
            self._server.tick()
            now_s = time.monotonic()
            if now_s - self._reported_s > _REPORT_EVERY_S:
                self._reported_s = now_s
                self._report()

    def _seconds(self, layer: int, experts: Sequence[ExpertRows]) -> float:
        spec = self._spec
        return experts_s(spec.device, spec.profile.layers[layer], (rows for _, rows in experts))

    def _report(self) -> None:
        """Tell the driver what the experts have done."""
        values = {
            "experts": self._spec.device.id,
            "versions": list(self._host.versions),
            "busy_s": self._clock.busy_s,
            "predicted_s": self._clock.predicted_s,
            "calls": self._clock.steps,
            "late_s": self._clock.late_s,
            "guests": self._host.num_taken_in,
            "link_bytes": sum(box.bytes_sent for box in self._outboxes.values()),
        }
        self._monitor.send([wire.REPORT, msgpack.packb(values)])


def _load(spec: ExpertSpec) -> ExpertHost:
    checkpoint = Checkpoint.open(
        spec.model, allow_unverified=spec.engine.allow_unverified_architectures
    )
    device = torch.device("cuda" if spec.device.kind == "cuda" else "cpu")
    slots = ExpertSlots(
        checkpoint,
        spec.num_slots,
        dtype=resolve_dtype(spec.engine.dtype, device),
        device=str(device),
    )
    if spec.fingerprint not in ("", slots.fingerprint):
        raise ExpertError(
            f"{checkpoint.path} on {spec.device.id} has the experts {slots.fingerprint}, the "
            f"stages serve {spec.fingerprint}; put the same checkpoint on every node"
        )
    host = ExpertHost(slots, num_guests=spec.num_guests)
    host.prepare(spec.version, spec.experts)
    return host


ExpertActor = ray.remote(ExpertWorker)
