"""DeviceActor: one device of the training pool. Decides nothing.

A slot is one call that streams: for every micro-batch the results (arrays, in shared memory), then
a small report. What the driver has of a device that dies it keeps, for it owns what was streamed.
Weights of the next slot are brought by another thread while this one computes.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import ray
import torch

from actors import wire
from actors.engine.arrays import Array, as_tensor, to_array
from actors.engine.checkpoint import Checkpoint
from actors.engine.trainable import TrainableModel
from actors.engine.training_values import MicroBatch, RouterLoads
from actors.mailbox import Mailbox, SlotCancelledError
from actors.pool_values import (
    BoundaryName,
    KeptKey,
    MicroBatchReport,
    PoolDeviceSpec,
    SlotKey,
    SlotReport,
    SlotTask,
)
from actors.residency import Residency
from actors.stage_experts import ExpertAccess, ExpertUser, StageExperts

_WEIGHTS = "weights"
_NUM_ENDED = 64
"""Ended slots that are remembered, so that what arrives late for them is dropped."""
Outputs = dict[BoundaryName, torch.Tensor]
Left = dict[tuple[BoundaryName, int], torch.Tensor]
"""(boundary, micro-batch): results that a slot left on its device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertPlace:
    """Where a device reaches sharded experts from."""

    access: ExpertAccess
    keys: wire.WireKeys
    host: str
    """The node's own interface that workers reach."""
    beside: wire.Address
    """The driver's inbox."""


class DeviceWorker(ExpertUser):
    """Hosts one `TrainableModel`."""

    def __init__(self, spec: PoolDeviceSpec, experts: ExpertPlace | None = None) -> None:
        """With `experts` they are frozen, and no part of what this device is brought."""
        torch.set_num_threads(spec.threads)
        self._spec = spec
        self._dtype = getattr(torch, spec.dtype)
        self._experts = None
        if experts is not None:
            self._experts = StageExperts(
                experts.access,
                f"trainer on {spec.device.id}",
                experts.keys,
                host=experts.host,
                beside=experts.beside,
            )
        self._model = TrainableModel(
            Checkpoint.open(spec.model, allow_unverified=spec.allow_unverified),
            dtype=self._dtype,
            device="cuda" if spec.device.kind == "cuda" else "cpu",
            lora=spec.lora,
            loss_chunk_tokens=spec.loss_chunk_tokens,
            seed=spec.seed,
            experts=None if self._experts is None else self._experts.links,
        )
        self._residency = Residency(self._model, spec)
        self._boxes: dict[SlotKey, Mailbox] = {}
        self._ended: deque[SlotKey] = deque(maxlen=_NUM_ENDED)
        self._boxes_lock = threading.Lock()
        self._left: Left = {}
        self._kept: set[KeptKey] = set()

    def ready(self) -> None:
        """Return once the constructor is done."""

    def prepare(self, task: SlotTask, weights: Mapping[str, tuple[Any, Any]]) -> None:
        """Bring a coming slot's weights: (trained, frozen) references by unit."""
        box = self._box(task.key)
        try:
            if not box.is_cancelled:
                self._residency.bring(task.key, task.version, weights)
        except Exception as error:  # noqa: BLE001 - raised again by the slot that waits for them
            box.fail(error)
        else:
            box.put(_WEIGHTS, None)

    def feed(
        self,
        key: SlotKey,
        micro_batch: int,
        loads: RouterLoads | None,
        names: tuple[BoundaryName, ...],
        *arrays: Array,
    ) -> None:
        """Hand a slot inputs of one micro-batch; Ray has brought the arrays.

        All names are of one kind; those without an array are taken from what the slot before left
        on this device.
        """
        tensors = [as_tensor(array, self._dtype) for array in arrays]
        given = dict(zip_longest(names, tensors))
        self._box(key).put((names[0][0], micro_batch), (given, loads))

    def cancel(self, key: SlotKey) -> None:
        """Take a slot back; it ends at its next wait."""
        self._box(key).cancel()

    def run_slot(self, task: SlotTask, batches: tuple[MicroBatch, ...]) -> Iterator[Any]:
        """Run a slot over the round's micro-batches; streams arrays and reports."""
        box = self._box(task.key)
        gradients: dict[str, torch.Tensor] = {}
        try:
            # Even a slot that was taken back waits: its claim on weights ends after they came.
            box.take(_WEIGHTS, self._spec.wait_timeout_s, cancellable=False)
            box.check()
            self._residency.place(task.key)
            visit = _Visit(self._model, self._spec, task, box, self._left)
            if task.is_kept:
                self._kept.add(visit.kept_key)
            for m, batch in enumerate(batches):
                box.check()
                yield from visit.run(m, batch)
            if task.grain == "keep":
                self._kept.discard(visit.kept_key)
            self._left = visit.left
            gradients = visit.gradients()
        except SlotCancelledError:
            gradients = {}
        finally:
            self._residency.release(task.key)
            with self._boxes_lock:
                del self._boxes[task.key]
                self._ended.append(task.key)
        for gradient in gradients.values():
            yield to_array(gradient)
        yield SlotReport(gradients=tuple(gradients))

    def forget_kept(self, keys: tuple[KeptKey, ...] | None = None) -> None:
        """Drop activations whose backward slot will not come, or will have others; None: all."""
        for key in self._kept.copy() if keys is None else keys:
            self._model.drop_kept(key)
            self._kept.discard(key)

    def _box(self, key: SlotKey) -> Mailbox:
        with self._boxes_lock:
            if key in self._ended:
                return Mailbox()
            return self._boxes.setdefault(key, Mailbox())


class _Visit:
    """One slot while it runs: takes inputs from the box, computes, waits out declared time."""

    def __init__(
        self,
        model: TrainableModel,
        spec: PoolDeviceSpec,
        task: SlotTask,
        box: Mailbox,
        found: Left,
    ) -> None:
        self.left: Left = {}
        self._room_bytes = spec.outputs_cap_bytes
        self._found = found
        self._device = model.device
        self._timeout_s = spec.wait_timeout_s
        self.kept_key = KeptKey(task.key.step, task.key.round, task.first_layer, task.end_layer)
        self._task = task
        self._box = box
        self._slot = model.open_slot(
            task.kind,
            task.first_layer,
            task.end_layer,
            grain=task.grain,
            saves=task.saves,
            scales=task.scales,
            step=task.key.step,
            first_micro_batch=task.first_micro_batch,
            round_key=self.kept_key,
            train=task.is_trained,
            keep=task.is_kept,
        )

    def run(self, m: int, batch: MicroBatch) -> Iterator[Any]:
        """Run one micro-batch; streams its arrays, then its report."""
        run = self._backward if self._task.kind == "backward" else self._forward
        outputs, report = run(m, batch)
        for tensor in outputs.values():
            yield to_array(tensor)
        yield replace(report, is_left=self._leave(m, outputs))

    def gradients(self) -> dict[str, torch.Tensor]:
        """Return the slot's parameter gradients by unit; see `TIED_INPUT`."""
        has_any = self._task.is_trained and self._task.kind != "forward"
        return self._slot.gradients(splits_tied=True) if has_any else {}

    def _forward(self, m: int, batch: MicroBatch) -> tuple[Outputs, MicroBatchReport]:
        task = self._task
        hidden: torch.Tensor | None = None
        loads: RouterLoads | None = None
        if task.first_layer:
            given, loads = self._take("hidden", m)
            hidden = given[task.first_layer]
        begin_s = time.monotonic()
        loss = None
        if task.kind == "fused":
            fused = self._slot.fused(m, batch, hidden, loads)
            outputs = _gradient_of(task, fused.gradient_BTH)
            loads, loss = fused.loads, fused.loss_sum
        else:
            result = self._slot.forward(m, batch, hidden, loads)
            outputs = {("hidden", layer): tensor for layer, tensor in result.saved.items()}
            outputs["hidden", task.end_layer] = result.hidden_BTH
            loads = result.loads
        self._pace(begin_s, task.declared_s)
        return outputs, MicroBatchReport(
            micro_batch=m,
            outputs=tuple(outputs),
            loads=loads,
            loss=loss,
            busy_s=time.monotonic() - begin_s,
        )

    def _backward(self, m: int, batch: MicroBatch) -> tuple[Outputs, MicroBatchReport]:
        """Recompute as soon as the saved inputs are there, then wait for the gradient."""
        task = self._task
        saved: dict[int, torch.Tensor] = {}
        if task.needs_saved:
            saved, _ = self._take("hidden", m)
        begin_s = time.monotonic()
        self._slot.recompute(m, batch, saved)
        self._pace(begin_s, task.declared_lead_s if task.declared_s else None)
        lead_s = time.monotonic() - begin_s
        gradients, loads = self._take("gradient", m)
        middle_s = time.monotonic()
        outputs = _gradient_of(task, self._slot.backward(m, gradients[task.end_layer], loads))
        rest_s = None if task.declared_s is None else task.declared_s - task.declared_lead_s
        self._pace(middle_s, rest_s)
        return outputs, MicroBatchReport(
            micro_batch=m,
            outputs=tuple(outputs),
            loads=None,
            busy_s=lead_s + time.monotonic() - middle_s,
        )

    def _take(self, kind: str, m: int) -> tuple[dict[int, torch.Tensor], RouterLoads | None]:
        """Return (tensors by layer, router loads)."""
        given, loads = self._box.take((kind, m), self._timeout_s)
        tensors = {}
        for name, tensor in given.items():
            # Taken out, so that it does not lie here while this slot leaves its own.
            found = self._found.pop((name, m)) if tensor is None else tensor.to(self._device)
            tensors[name[1]] = found
        return tensors, loads

    def _leave(self, m: int, outputs: Outputs) -> bool:
        """Leave the last result here for the next slot, while there is room."""
        name, tensor = next(reversed(outputs.items()), (None, None))
        if name is None or tensor is None or tensor.nbytes > self._room_bytes:
            return False
        self._room_bytes -= tensor.nbytes
        self.left[name, m] = tensor
        return True

    def _pace(self, begin_s: float, declared_s: float | None) -> None:
        """Wait until the declared time has passed."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if declared_s is not None:
            time.sleep(max(0.0, begin_s + declared_s - time.monotonic()))


def _gradient_of(task: SlotTask, gradient: torch.Tensor | None) -> Outputs:
    return {} if gradient is None else {("gradient", task.first_layer): gradient}


EXPERT_GROUP = "experts"
"""Of the calls of `ExpertUser`, some of which wait for each other. With more threads for what is of
no group instead, Ray 2.60 was seen to leave slots without their inputs."""
_GROUPS = {"slots": 1, "weights": 1, "feed": 1, "control": 2, EXPERT_GROUP: 4}
DeviceActor = ray.remote(concurrency_groups=_GROUPS)(DeviceWorker)  # type: ignore[call-overload]
