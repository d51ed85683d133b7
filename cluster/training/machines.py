"""The machines of a run: devices, weight hosts, and the plan that suits those that are there."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import torch

from actors.engine.training_values import EMBEDDING_UNIT, HEAD_UNIT
from actors.hosting import FleetError, Host
from actors.pool_values import PoolDeviceSpec
from actors.trainer import ExpertPlace
from actors.weights import WeightHostSpec
from cluster.inventory import find_hosts, find_joined
from cluster.planning import dtype_bytes, training_pool
from cluster.training.checkpoints import TrainingState
from cluster.training.errors import HostsLostError, TrainingError
from cluster.training.events import (
    DeviceJoined,
    DeviceLost,
    SlotsTraced,
    TrainingEvent,
    TrainingPlanned,
)
from cluster.training.executor import ExecutorHooks, SlotExecutor
from cluster.training.experts import TrainingExperts
from cluster.training.hosts import WeightHosts
from cluster.training.job import TrainingJob
from cluster.training.planner import RunPlanner
from cluster.training.pool import StartedDevice, start_again, start_devices, stop_devices
from cluster.training.rounds import units_of
from cluster.training.saving import load_units, save_units
from placement.costs import memory_cap_bytes
from placement.dispatch import SlotDispatcher
from placement.errors import InfeasiblePlanError
from placement.topology import Device, Topology
from placement.trace import Event
from placement.train import PlannedSlot

_log = logging.getLogger(__name__)
_REVIVE_EVERY_S = 2.0
_WATCH_EVERY_S = 2.0
_NO_DEVICE_TIMEOUT_S = 120.0
_WAIT_TIMEOUT_S = 600.0
"""Longest wait of a slot for its inputs; a driver that is gone ends its devices anyway."""


class Machines:
    """Devices and weight hosts, alive as long as the run."""

    def __init__(
        self,
        job: TrainingJob,
        topology: Topology,
        hosts: Mapping[str, Host],
        on_event: Callable[[TrainingEvent], None],
        *,
        trace: bool,
    ) -> None:
        self._job = job
        self._hosts = dict(hosts)
        self._tell = on_event
        self.dtype = _compute_dtype(job, topology)
        # Another number format would change what the rest of the run computes.
        self._fixed = job.fixed | {"compute_dtype": self.dtype}
        if job.state is not None:
            job.state.check_same(self._fixed)
        width = getattr(torch, self.dtype).itemsize
        self._whole = job.checkpoint.profile(dtype_bytes=width), topology
        """The model and the devices; without experts that are elsewhere they are those below."""
        pool = training_pool(job.config, *self._whole)
        self._profile, self._topology, self._shards = pool.profile, pool.topology, pool.shards
        self._experts: TrainingExperts | None = None
        self._planner = RunPlanner(_planned_config(job), self._profile, self._topology)
        self.plan = self._planner.first
        """Of rounds that are made now."""
        self._outdated = asyncio.Event()
        """Devices have come or gone since."""
        self._started: dict[str, StartedDevice] = {}
        self._watching: list[asyncio.Task[None]] = []
        self._traced: list[Event] | None = [] if trace else None
        self._busy_mark: tuple[float, dict[str, float]] = (time.monotonic(), {})
        self.weights = WeightHosts(
            job.units, is_tied=job.is_tied, rounds_per_step=job.settings.rounds_per_step
        )
        self.executor = self._new_executor()

    async def start(self) -> None:
        """Start devices and weight hosts.

        Raises:
            TrainingError: One of them does not come up. HostsLostError: a weight host; the devices
                are up.
        """
        self._tell_plan()
        if self._shards is not None:
            loop = asyncio.get_running_loop()

            def fail(reason: str) -> None:
                error = TrainingError(reason)
                loop.call_soon_threadsafe(lambda: self.executor.fail(error))

            self._experts = TrainingExperts(
                self._job,
                self._shards,
                *self._whole,
                self._hosts,
                dtype=self.dtype,
                on_fatal=fail,
            )
            await self._experts.start()
        specs = [self._spec(device) for device in self._topology.devices if self._is_used(device)]
        devices, weights = await asyncio.gather(
            start_devices(specs, self._hosts, self._place),
            self._start_weights(),
            return_exceptions=True,
        )
        if isinstance(devices, BaseException):
            raise devices
        await self._introduce(devices)
        for started in devices:
            self._use(started)
        self._watching = [
            asyncio.create_task(work)
            for work in (self._revive(), self._watch(), self._watch_hosts(), self._replan())
        ]
        for task in self._watching:
            task.add_done_callback(self._watch_ended)
        if isinstance(weights, BaseException):
            raise weights

    def _place(self, device: Device) -> ExpertPlace | None:
        return None if self._experts is None else self._experts.place(device)

    async def _introduce(self, devices: Sequence[StartedDevice]) -> None:
        """Let devices that have started use experts that are elsewhere.

        Raises:
            TrainingError: One of them died, or did not answer in time.
        """
        if self._experts is None:
            return
        try:
            await self._experts.serve({each.spec.device.id: each.actor for each in devices})
        except FleetError as error:
            stop_devices(devices)
            for each in devices:
                self._experts.forget(each.spec.device.id)
            raise TrainingError(str(error)) from error

    async def _is_introduced(self, device: StartedDevice) -> bool:
        """Whether a device that is back can be used; it is stopped otherwise."""
        try:
            await self._introduce([device])
        except TrainingError as error:
            _log.warning("device %s does not come back: %s", device.spec.device.id, error)
            return False
        return True

    async def load(self, folder: Path | None, step: int) -> None:
        """Bring every trained unit to what a step folder holds; None: to the model's own."""
        self.weights.resume_at(step)
        if folder is not None:
            await load_units(self._job, self.weights, folder, step)

    async def restart_hosts(self) -> None:
        """Start the weight hosts anew after one died; what devices were doing is given up."""
        old = self.executor
        await old.drain()
        self.executor = self._new_executor()
        for pooled in old.devices.values():
            self.executor.add_device(pooled.device, pooled.actor)
        self._hosts = await asyncio.to_thread(find_hosts)
        await self._start_weights()

    def idle_fractions(self, now_s: float) -> dict[str, float]:
        """Return each device's share of idle time since the last call."""
        since_s, before = self._busy_mark
        busy = {device_id: pooled.busy_s for device_id, pooled in self.executor.devices.items()}
        self._busy_mark = now_s, busy
        seconds = max(now_s - since_s, 1e-9)
        return {
            device_id: min(1.0, max(0.0, 1.0 - (busy_s - before.get(device_id, 0.0)) / seconds))
            for device_id, busy_s in busy.items()
        }

    def tell_trace(self) -> None:
        """Report what devices did since the last call, when a trace was asked for."""
        if self._traced:
            self._tell(SlotsTraced(events=tuple(self._traced)))
            self._traced.clear()

    async def save(self, step: int, tokens: int, losses: tuple[float, ...]) -> Path:
        """Write a checkpoint.

        Raises:
            CheckpointSaveError: It cannot be written; those before it are untouched.
        """
        state = TrainingState(
            step=step,
            seed=self._job.settings.seed,
            settings=self._fixed,
            tokens_seen=tokens,
            losses=losses,
        )
        return await save_units(self._job, self.weights, state)

    def close(self) -> None:
        """Stop all actors."""
        for task in self._watching:
            task.cancel()
        stop_devices(list(self._started.values()))
        if self._experts is not None:
            self._experts.stop()
        self.weights.stop()

    def _new_executor(self) -> SlotExecutor:
        trained = {unit.name for unit in self._job.units if unit.trained}

        def names(slot: PlannedSlot) -> tuple[str, ...]:
            return units_of(slot, is_tied=self._job.is_tied, head_unit=HEAD_UNIT)

        def num_gradients(slot: PlannedSlot) -> int:
            if slot.kind == "forward":
                return 0
            has_both = slot.kind == "fused" and slot.first_layer == 0 and self._job.is_tied
            return len(trained.intersection(names(slot))) + (has_both and EMBEDDING_UNIT in trained)

        executor = SlotExecutor(
            self.weights,
            ExecutorHooks(
                units_of=lambda slot: () if slot.grain == "keep" else names(slot),
                num_gradients=num_gradients,
                on_gradients=self.weights.add,
                on_device_lost=self._lost,
                on_event=None if self._traced is None else self._traced.append,
            ),
        )
        executor.dispatcher = SlotDispatcher(self.plan.plan, self.plan.costs)
        return executor

    async def _start_weights(self) -> None:
        settings = self._job.settings
        spec = WeightHostSpec(
            model=str(self._job.checkpoint.path),
            allow_unverified=self._job.config.engine.allow_unverified_architectures,
            units=(),
            lora=settings.lora,
            experts_elsewhere=settings.experts == "shards",
            optimizer=settings.optimizer,
            seed=settings.seed,
        )
        nodes = {device.node for device in self._topology.devices if device.node in self._hosts}
        by_id = {self._hosts[node].ray_node_id: self._hosts[node] for node in sorted(nodes)}
        await self.weights.start(spec, list(by_id.values()))

    def _spec(self, device: Device) -> PoolDeviceSpec:
        job = self._job
        # A device that comes back is none of the plan that was made without it.
        plan = self._planner.first.plan
        share = next(share for share in plan.devices if share.device_id == device.id)
        cap = memory_cap_bytes(device.memory_bytes, job.config.plan.headroom_fraction)
        spare = max(0, cap - share.peak_bytes)
        own = [slot for slot in plan.slots if device.id in slot.device_ids]
        in_use = 2 * max(slot.weight_bytes for slot in own)
        return PoolDeviceSpec(
            device=device,
            model=str(job.checkpoint.path),
            allow_unverified=job.config.engine.allow_unverified_architectures,
            dtype=self.dtype,
            weight_dtype=job.settings.optimizer.weight_dtype,
            lora=job.settings.lora,
            loss_chunk_tokens=job.settings.loss_chunk_tokens,
            seed=job.settings.seed,
            threads=job.config.engine.cpu_threads,
            weights_cap_bytes=spare // 2 + in_use,
            # A slot's results wait beside those of the slot before.
            outputs_cap_bytes=spare // 4,
            wait_timeout_s=_WAIT_TIMEOUT_S,
        )

    def _is_used(self, device: Device) -> bool:
        return any(device.id in slot.device_ids for slot in self._planner.first.plan.slots)

    def _use(self, started: StartedDevice) -> None:
        self._started[started.spec.device.id] = started
        self._busy_mark[1].pop(started.spec.device.id, None)
        self.executor.add_device(started.spec.device, started.actor)

    def _lost(self, device_id: str, reason: str, num_slots: int) -> None:
        self._outdated.set()
        ray.kill(self._started.pop(device_id).actor)
        if self._experts is not None:
            self._experts.forget(device_id)
        self._tell(DeviceLost(device_id=device_id, reason=reason, num_slots=num_slots))

    async def _replan(self) -> None:
        """Plan again for the devices that are there, whenever they are others."""
        while True:
            await self._outdated.wait()
            self._outdated.clear()
            present = set(self.executor.devices)
            if not present:
                continue  # none is left; one that comes back sets the event again
            assert self.executor.dispatcher is not None
            factors = {
                device_id: self.executor.dispatcher.factor(device_id)
                for device_id in present & self.plan.device_ids
            }
            try:
                planned = await asyncio.to_thread(self._planner.again, present, factors)
            except InfeasiblePlanError as error:
                # The devices that are left cannot do it; the one that is lost may come back.
                _log.info("no plan for %s: %s", ", ".join(sorted(present)), error)
                continue
            self.plan = planned
            self.executor.replan(planned)
            self._tell_plan()

    async def _revive(self) -> None:
        """Start lost devices again while their nodes are there, and those of nodes that joined;
        they are used from the next round on."""
        while True:
            await asyncio.sleep(_REVIVE_EVERY_S)
            if self._job.config.devices is None:
                await self._find_joined()
            if self._experts is not None:
                self._experts.look_at_nodes(await asyncio.to_thread(find_hosts))
            missing = [
                device
                for device in self._topology.devices
                if device.id not in self._started and self._is_used(device)
            ]
            if not missing:
                continue
            self._hosts = await asyncio.to_thread(find_hosts)
            for device in missing:
                started = await start_again(self._spec(device), self._hosts, self._place)
                if started is not None and await self._is_introduced(started):
                    self._use(started)
                    self._outdated.set()
                    self._tell(DeviceJoined(device_id=device.id))

    async def _find_joined(self) -> None:
        """Take devices of new nodes into the topology, measured shortly."""
        hosts = await asyncio.to_thread(find_hosts)
        grown = await asyncio.to_thread(find_joined, self._job.config, self._topology, hosts)
        if grown is None:
            return
        self._topology = grown
        self._planner = await asyncio.to_thread(
            RunPlanner, _planned_config(self._job), self._profile, self._topology
        )

    async def _watch(self) -> None:
        """End waiting that nothing will end: for a device that hangs, or for one to come back."""
        stuck_since_s: float | None = None
        while True:
            await asyncio.sleep(_WATCH_EVERY_S)
            self.executor.lose_silent()
            reason = self.executor.no_device
            if reason is None:
                stuck_since_s = None
                continue
            stuck_since_s = stuck_since_s or time.monotonic()
            if time.monotonic() - stuck_since_s > _NO_DEVICE_TIMEOUT_S:
                self.executor.fail(
                    TrainingError(
                        f"{reason}; no device came back within {_NO_DEVICE_TIMEOUT_S:g} s. Start "
                        f"its node again and run with --resume"
                    )
                )

    async def _watch_hosts(self) -> None:
        """Notice hosts that are lost while nobody calls them, and activations that are."""
        while True:
            await asyncio.sleep(_WATCH_EVERY_S)
            executor = self.executor
            try:
                await self.weights.check()
                await executor.check_fed()
            except HostsLostError as error:
                executor.fail(error)

    def _watch_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.executor.fail(error)

    def _tell_plan(self) -> None:
        nodes = {device.id: device.node for device in self._topology.devices}
        self._tell(TrainingPlanned(plan=self.plan.plan, nodes=nodes))


def _compute_dtype(job: TrainingJob, topology: Topology) -> str:
    """Return one number format for the whole pool; activations go from any device to any."""
    chosen = job.config.engine.dtype
    if chosen != "auto":
        return chosen
    width = dtype_bytes(job.config.engine, [device.kind for device in topology.devices])
    return "bfloat16" if width == 2 else "float32"


def _planned_config(job: TrainingJob) -> Any:
    trained = sum(unit.num_trained for unit in job.units)
    total = trained + sum(unit.num_frozen for unit in job.units)
    training = job.settings.model_copy(update={"trained_fraction": trained / max(1, total)})
    return job.config.model_copy(update={"training": training})
