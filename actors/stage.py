"""StageActor: one stage of the pipeline on one device. Decides nothing.

A loop takes step messages from its inbox, runs the slice, waits out a paced device's time and
sends the rows on: to the next stage, or, from the last stage, the drawn tokens to the lane.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

import msgpack
import numpy as np
import ray
import torch

from actors import wire
from actors.engine.adapter import Adapter
from actors.engine.batch import StepBatch, StepResult
from actors.engine.checkpoint import Checkpoint
from actors.engine.config import EngineConfig
from actors.engine.frames import decode_tensor, encode_tensor
from actors.engine.pace import DeviceClock
from actors.engine.packed import seconds_in
from actors.engine.slice import StageSlice
from actors.loop import ServingLoop
from placement.costs import stage_cost
from placement.topology import Device
from placement.workload import ModelProfile

_log = logging.getLogger(__name__)
_POLL_S = 0.2
_REPORT_EVERY_S = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSpec:
    """What a stage is: its layers, its device, and how it computes."""

    index: int
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


class StageWorker:
    """Hosts one `StageSlice`. The constructor loads; `connect` starts serving."""

    def __init__(self, spec: StageSpec, keys: wire.WireKeys, monitor: wire.Address) -> None:
        torch.set_num_threads(spec.engine.cpu_threads)
        self._spec = spec
        self._keys = keys
        self._monitor = wire.Outbox(monitor, keys)
        is_paced = spec.device.kind == "paced"
        cost = stage_cost(spec.device, spec.profile, spec.first_layer, spec.end_layer)
        self._clock = DeviceClock(time.monotonic, time.sleep, cost if is_paced else None)
        self._next: wire.Outbox | None = None
        self._lanes: dict[int, wire.Outbox] = {}
        self._loop = ServingLoop("stage", self._take_turn)
        self._reported_s = 0.0
        self._report(0.0)
        self._slice = StageSlice(
            Checkpoint.open(
                spec.model, allow_unverified=spec.engine.allow_unverified_architectures
            ),
            spec.first_layer,
            spec.end_layer,
            config=spec.engine,
            num_kv_blocks=spec.num_kv_blocks,
            num_lanes=spec.num_lanes,
            device="cuda" if spec.device.kind == "cuda" else "cpu",
            on_progress=self._report,
        )
        # What is loaded stays: a full collection that walks it would stop the steps for 0.3 s.
        gc.collect()
        gc.freeze()
        # Last: a stage that cannot load leaves no socket behind.
        self._inbox = wire.Inbox(f"stage {spec.index}", keys, host=spec.host)

    def ready(self) -> wire.Address:
        """Return where the stage receives, once the constructor has loaded it."""
        return self._inbox.address

    def bytes_read(self) -> int:
        """Tensor bytes this stage took from disk."""
        return self._slice.bytes_read

    def connect(self, next_stage: wire.Address | None, lanes: Mapping[int, wire.Address]) -> None:
        """Connect to the next stage (None: this is the last) and to the lanes; start serving."""
        if next_stage is not None:
            self._next = wire.Outbox(next_stage, self._keys)
        self._lanes = {index: wire.Outbox(address, self._keys) for index, address in lanes.items()}
        self._loop.start()

    def load_adapter(self, version: int, message: np.ndarray, keep: int) -> None:
        """Make an adapter ready beside the steps; of those before it only `keep` stays.

        `message` is `Adapter.encode`'s bytes, which Ray maps without copying.

        Raises:
            AdapterError: It does not fit this stage's layers.
        """
        self._slice.adapters.load(version, Adapter.decode(message.data), keep=keep)

    def watch(self) -> None:
        """Block while the stage serves; the caller learns of its death by this call's error."""
        self._loop.watch()

    def stop(self) -> None:
        """Stop serving and close the sockets. Safe to call twice."""
        self._loop.stop()
        self._inbox.close()
        for outbox in (self._monitor, self._next, *self._lanes.values()):
            if outbox is not None:
                outbox.close()

    def _take_turn(self) -> None:
        parts = self._inbox.receive(_POLL_S)
        if parts is not None:
            self._handle(parts)
        if time.monotonic() - self._reported_s > _REPORT_EVERY_S:
            self._reported_s = time.monotonic()
            self._report(1.0, active=True)

    def _handle(self, parts: list[memoryview]) -> None:
        """Run one step; what it cannot run is refused to its lane, and serving goes on."""
        started_s = time.monotonic()
        try:
            batch = StepBatch.decode(parts[1])
            lane = self._lanes[batch.lane]
        except (ValueError, TypeError, IndexError, KeyError) as error:
            _log.warning("stage %d dropped a message: %r", self._spec.index, error)
            return
        try:
            if batch.epoch != self._spec.epoch:
                raise ValueError(
                    f"step {batch.step} is of epoch {batch.epoch}, this is {self._spec.epoch}"
                )
            hidden = decode_tensor(parts[3], parts[4]) if len(parts) > 4 else None
            out = self._slice.forward(batch, hidden)
            occupied_s = self._clock.finish(batch, started_s)
            seconds = msgpack.packb([*seconds_in(parts[2]), occupied_s])
            self._send(batch, parts[1], seconds, out)
        except Exception as error:  # noqa: BLE001 - whatever a step raises, its lane must hear it
            _log.exception("stage %d failed step %s", self._spec.index, batch.step)
            text = f"stage {self._spec.index} on {self._spec.device.id}: {error}"
            lane.send([wire.REFUSED, msgpack.packb([batch.step, text])])

    def _send(
        self, batch: StepBatch, step: memoryview, seconds: bytes, out: torch.Tensor | StepResult
    ) -> None:
        if isinstance(out, StepResult):
            result = msgpack.packb([batch.step, out.to_wire()])
            self._lanes[batch.lane].send([wire.RESULT, result, seconds])
        elif self._next is not None:
            self._next.send([wire.STEP, step, seconds, *encode_tensor(out)])

    def _report(self, loaded_fraction: float, *, active: bool = False) -> None:
        """Tell the driver how far loading is, and what the stage has done."""
        sent = sum(box.bytes_sent for box in (*self._lanes.values(), *filter(None, [self._next])))
        self._monitor.send(
            [
                wire.REPORT,
                msgpack.packb(
                    {
                        "stage": self._spec.index,
                        "active": active,
                        "loaded_fraction": loaded_fraction,
                        "busy_s": self._clock.busy_s,
                        "steps": self._clock.steps,
                        "late_s": self._clock.late_s,
                        "link_bytes": sent,
                    }
                ),
            ]
        )


StageActor = ray.remote(StageWorker)
