"""StageActor: one stage of the pipeline on one device. Decides nothing.

A loop takes step messages from its inbox, runs the slice, waits out a paced device's time and
sends the rows on: to the next stage, or, from the last stage, the drawn tokens to the lane. Every
plan in force has its number, the epoch, and a route of its own through the stages: layers, and who
comes next. While layers move, steps of the old epoch and of the new run side by side; what comes
from an epoch behind the fence is dropped.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

import msgpack
import numpy as np
import ray
import torch

from actors import wire
from actors.engine.adapter import Adapter
from actors.engine.arrays import Array, as_tensor, to_array
from actors.engine.batch import StepBatch, StepResult
from actors.engine.checkpoint import Checkpoint
from actors.engine.config import EngineConfig
from actors.engine.frames import decode_tensor, encode_tensor
from actors.engine.pace import DeviceClock
from actors.engine.packed import seconds_in
from actors.engine.slice import StageSlice
from actors.loop import ServingLoop
from actors.stage_experts import ExpertAccess, ExpertUser, StageExperts
from placement.costs import StageCost, stage_cost
from placement.topology import Device
from placement.workload import ModelProfile

_log = logging.getLogger(__name__)
_POLL_S = 0.2
_REPORT_EVERY_S = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSpec:
    """What a stage is: its layers, its device, and how it computes."""

    model: str
    first_layer: int
    end_layer: int
    device: Device
    profile: ModelProfile
    num_kv_blocks: int
    """Of each lane."""
    num_lanes: int
    engine: EngineConfig
    epoch: int = 0
    host: str = "127.0.0.1"
    """Address of the node's own interface that other nodes can reach."""
    experts: ExpertAccess | None = None
    """How its routed experts are reached that are elsewhere; None: they are here. The profile is
    then that of the model without them."""


@dataclass(frozen=True, slots=True)
class _Route:
    """What the steps of an epoch run through here, and where they go on."""

    slice: StageSlice
    cost: StageCost
    next: wire.Outbox | None
    """None: this is the last stage."""
    lanes: Mapping[int, tuple[int, wire.Outbox]]
    """By index: (life, where it receives)."""

    def outboxes(self) -> list[wire.Outbox]:
        lanes = [outbox for _, outbox in self.lanes.values()]
        return lanes if self.next is None else [self.next, *lanes]


class StageWorker(ExpertUser):
    """Hosts the slices of one device. The constructor loads; `connect` starts serving."""

    def __init__(self, spec: StageSpec, keys: wire.WireKeys, monitor: wire.Address) -> None:
        torch.set_num_threads(spec.engine.cpu_threads)
        self._spec = spec
        self._keys = keys
        self._monitor = wire.Outbox(monitor, keys)
        self._clock = DeviceClock(time.monotonic, time.sleep, spec.device.kind == "paced")
        self._turn = threading.Lock()
        """Held while a step runs."""
        self._loading = threading.Lock()
        """Held while slices are made or given up."""
        self._given_up: set[int] = set()
        """Epochs that will not come into force, though one may still be loading."""
        self._oldest_epoch = spec.epoch
        self._slices: dict[int, StageSlice] = {}
        self._routes: dict[int, _Route] = {}
        self._outboxes: dict[wire.Address, wire.Outbox] = {}
        """Shared by the routes: to close one that stays in use would lose what is on its way."""
        self._closed_bytes = 0
        self._loop = ServingLoop("stage", self._take_turn)
        self._is_serving = False
        self._loaded_fraction = 0.0
        self._reported_s = 0.0
        self._report()
        checkpoint = Checkpoint.open(
            spec.model, allow_unverified=spec.engine.allow_unverified_architectures
        )
        name = f"stage on {spec.device.id}"
        self._experts = None
        if spec.experts is not None:
            self._experts = StageExperts(spec.experts, name, keys, host=spec.host, beside=monitor)
        try:
            self._slices[spec.epoch] = self._first_slice(checkpoint)
            # What is loaded stays: a full collection that walks it would stop the steps for 0.3 s.
            gc.collect()
            gc.freeze()
            # Last: a stage that cannot load leaves no socket behind.
            self._inbox = wire.Inbox(name, keys, host=spec.host, beside=monitor)
        except BaseException:
            self._close_links()
            raise

    def ready(self) -> wire.Address:
        """Return where the stage receives, once the constructor has loaded it."""
        return self._inbox.address

    def bytes_read(self) -> int:
        """Tensor bytes that the newest slice took from disk."""
        return self._newest.bytes_read

    def prepare(self, epoch: int, first_layer: int, end_layer: int) -> None:
        """Load what an epoch's layers need beside what is there; steps go on meanwhile."""
        with self._loading:
            if epoch in self._given_up:
                return
            base = self._slices[max(number for number in self._slices if number <= epoch)]
            slice_ = base.recut(first_layer, end_layer, on_progress=self._note_progress)
            if epoch in self._given_up:
                self._free(slice_)
            else:
                self._slices[epoch] = slice_

    def connect(
        self,
        epoch: int,
        next_stage: wire.Address | None,
        lanes: Mapping[int, tuple[int, wire.Address]],
    ) -> None:
        """Serve an epoch that is loaded: towards the next stage (None: this is the last), and the
        lanes, by index with their lives."""
        slice_ = self._slices[epoch]
        spec = self._spec
        cost = stage_cost(spec.device, spec.profile, slice_.first_layer, slice_.end_layer)
        with self._turn:
            self._routes[epoch] = _Route(
                slice_,
                cost,
                None if next_stage is None else self._outbox(next_stage),
                {index: (life, self._outbox(at)) for index, (life, at) in lanes.items()},
            )
            self._close_unused()
        if not self._is_serving:
            self._is_serving = True
            self._loop.start()

    def fence(self, epoch: int) -> None:
        """Drop what comes from epochs before this one, from the end of the present step on."""
        with self._turn:
            self._oldest_epoch = max(self._oldest_epoch, epoch)

    def retire(self, epoch: int) -> None:
        """Fence, and free what epochs before this one needed and it does not."""
        with self._turn:
            self._oldest_epoch = max(self._oldest_epoch, epoch)
            self._drop_routes(0, epoch)
        with self._loading:
            old = [self._slices.pop(number) for number in sorted(self._slices) if number < epoch]
            later = [self._slices[number] for number in self._slices if number > epoch]
            if old:
                self._slices[epoch].settle(old, later)

    def forget(self, epoch: int) -> None:
        """Undo `prepare` and `connect` of an epoch that never came into force."""
        self._given_up.add(epoch)
        with self._turn:
            self._drop_routes(epoch, epoch + 1)
        # Not behind one that loads: `prepare` frees what was given up, `retire` what is old.
        if self._loading.acquire(blocking=False):
            try:
                if epoch in self._slices and len(self._slices) > 1:
                    self._free(self._slices.pop(epoch))
            finally:
                self._loading.release()

    def take_kv(self, epoch: int, lane: int, layers: range, blocks: list[int]) -> Array:
        """Return the KV of a lane's blocks, (layers, blocks, block_tokens, 2, Hk, D)."""
        return to_array(self._slices[epoch].kv[lane].take(layers, blocks))

    def put_kv(
        self, epoch: int, lane: int, layers: range, blocks: list[int], values: Array
    ) -> None:
        """Store what another stage's `take_kv` returned."""
        slice_ = self._slices[epoch]
        slice_.kv[lane].put(layers, blocks, as_tensor(values, slice_.dtype))

    def load_adapter(self, version: int, message: np.ndarray, keep: int) -> None:
        """Make an adapter ready beside the steps; of those before it only `keep` stays.

        `message` is `Adapter.encode`'s bytes, which Ray maps without copying.

        Raises:
            AdapterError: It does not fit this stage's layers.
        """
        self._newest.adapters.load(version, Adapter.decode(message.data), keep=keep)

    def slow_down(self, slowness: float) -> None:
        """Make a paced device take a multiple of its declared time, to try what that does."""
        self._clock.slowness = slowness

    def ping(self) -> None:
        """Answer, beside steps: this process runs."""

    def watch(self) -> None:
        """Block while the stage serves; the caller learns of its death by this call's error."""
        self._loop.watch()

    def stop(self) -> None:
        """Stop serving and close the sockets. Safe to call twice."""
        self._loop.stop()
        self._inbox.close()
        self._monitor.close()
        for outbox in self._outboxes.values():
            outbox.close()
        self._close_links()

    @property
    def _newest(self) -> StageSlice:
        return self._slices[max(self._slices)]

    def _first_slice(self, checkpoint: Checkpoint) -> StageSlice:
        spec = self._spec
        return StageSlice(
            checkpoint,
            spec.first_layer,
            spec.end_layer,
            config=spec.engine,
            num_kv_blocks=spec.num_kv_blocks,
            num_lanes=spec.num_lanes,
            device="cuda" if spec.device.kind == "cuda" else "cpu",
            on_progress=self._first_progress,
            experts=None if self._experts is None else self._experts.links,
        )

    def _close_links(self) -> None:
        if self._experts is not None:
            self._experts.links.close()

    def _free(self, given_up: StageSlice) -> None:
        first, *others = self._slices.values()
        first.settle([given_up], others)

    def _drop_routes(self, first: int, end: int) -> None:
        for number in [number for number in self._routes if first <= number < end]:
            del self._routes[number]
        self._close_unused()

    def _outbox(self, address: wire.Address) -> wire.Outbox:
        if address not in self._outboxes:
            self._outboxes[address] = wire.Outbox(address, self._keys)
        return self._outboxes[address]

    def _close_unused(self) -> None:
        used = {box.address for route in self._routes.values() for box in route.outboxes()}
        for address in self._outboxes.keys() - used:
            outbox = self._outboxes.pop(address)
            self._closed_bytes += outbox.bytes_sent
            outbox.close()

    def _take_turn(self) -> None:
        parts = self._inbox.receive(_POLL_S)
        if parts is not None:
            with self._turn:
                self._handle(parts)
        if time.monotonic() - self._reported_s > _REPORT_EVERY_S:
            self._reported_s = time.monotonic()
            with self._turn:
                self._report()

    def _handle(self, parts: list[memoryview]) -> None:
        """Run one step; what it cannot run is refused to its lane, and serving goes on."""
        started_s = time.monotonic()
        try:
            batch = StepBatch.decode(parts[1])
            if batch.epoch < self._oldest_epoch:
                return  # its lane has forgotten it
            route = self._routes.get(batch.epoch) or self._routes[max(self._routes)]
            life, lane = route.lanes[batch.lane]
            if batch.life != life:
                return  # the lane that sent it is no more
        except (ValueError, TypeError, IndexError, KeyError) as error:
            _log.warning("%s dropped a message: %r", self._spec.device.id, error)
            return
        try:
            if batch.epoch not in self._routes:
                raise ValueError(
                    f"step {batch.step} is of plan {batch.epoch}; it has {[*self._routes]}"
                )
            hidden = decode_tensor(parts[3], parts[4]) if len(parts) > 4 else None
            out, waited_s = self._forward(route.slice, batch, hidden)
            occupied_s = self._clock.finish(batch, started_s, route.cost, elsewhere_s=waited_s)
            seconds = msgpack.packb([*seconds_in(parts[2]), occupied_s + waited_s])
            if isinstance(out, StepResult):
                result = msgpack.packb([batch.step, out.to_wire()])
                lane.send([wire.RESULT, result, seconds])
            elif route.next is not None:
                route.next.send([wire.STEP, parts[1], seconds, *encode_tensor(out)])
        except Exception as error:  # noqa: BLE001 - whatever a step raises, its lane must hear it
            _log.exception("%s failed step %s", self._spec.device.id, batch.step)
            text = f"the stage on {self._spec.device.id}: {error}"
            lane.send([wire.REFUSED, msgpack.packb([batch.step, text])])

    def _forward(
        self, slice_: StageSlice, batch: StepBatch, hidden: torch.Tensor | None
    ) -> tuple[torch.Tensor | StepResult, float]:
        """Run a step; returns also how long it waited for experts elsewhere."""
        if self._experts is None:
            return slice_.forward(batch, hidden), 0.0
        links = self._experts.links
        waited_s = links.waited_s
        with self._experts.step(batch):
            out = slice_.forward(batch, hidden)
        return out, links.waited_s - waited_s

    def _first_progress(self, loaded_fraction: float) -> None:
        self._loaded_fraction = loaded_fraction
        self._report()

    def _note_progress(self, loaded_fraction: float) -> None:
        """Beside the serving loop, which reports it."""
        self._loaded_fraction = loaded_fraction

    def _report(self) -> None:
        """Tell the driver how far loading is, and what the stage has done."""
        sent = self._closed_bytes + sum(box.bytes_sent for box in self._outboxes.values())
        values = {
            "stage": self._spec.device.id,
            "epoch": max(self._routes, default=self._spec.epoch),
            "active": self._is_serving,
            "loaded_fraction": self._loaded_fraction,
            "busy_s": self._clock.busy_s,
            "predicted_s": self._clock.predicted_s,
            "steps": self._clock.steps,
            "late_s": self._clock.late_s,
            "link_bytes": sent,
        }
        self._monitor.send([wire.REPORT, msgpack.packb(values)])


StageActor = ray.remote(StageWorker)
