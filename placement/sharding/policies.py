"""Who keeps a placement how: three ways, each driven step by step by the same trace.

- `StaticPolicy`: the placement made before anything was measured, for ever; rows by its weights.
- `EplbPolicy`: DeepSeek's balancer as vLLM runs it by default: the sum of the last 1000 steps is
  re-planned from scratch every 3000 steps, for the first time after 3/4 of that; equal devices,
  equal slots (as many as the fleet has in all, wherever its memory is), equal shares.
- `MotleyPolicy`: `placement.sharding.rebalancer`, with the rows of a step divided
  for that step, or by the map's weights.

Simulated: a copy is there one step after it was asked for, a map is in force at the next step.
Copies under the budget are taken to hide behind steps; EPLB's exchange and the reload of lost
experts are counted as pauses, at `copy_bytes_per_s` of the device that receives most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from placement.experts import ExpertDevice
from placement.moving.moves import Move
from placement.packing.eplb import rebalance_experts
from placement.sharding.decision import RebalanceSettings
from placement.sharding.expert_map import ExpertMap
from placement.sharding.few_rows import StepCosts, choose_replicas
from placement.sharding.loads import LoadWindow
from placement.sharding.rebalance_values import (
    CopyDone,
    ExpertCommand,
    ExpertDeviceLost,
    LoadsMeasured,
    MapInForce,
    StepsDone,
    UseMap,
)
from placement.sharding.rebalancer import ExpertRebalancer
from placement.sharding.recovery import recover
from placement.sharding.routing import RoutingTable, Rows

EPLB_WINDOW_STEPS = 1000
EPLB_INTERVAL_STEPS = 3000
"""vLLM's defaults (`window_size`, `step_interval`); its counter starts at 3/4 of the interval."""


class Policy(Protocol):
    """Serves a trace step by step."""

    name: str
    moved_bytes: int
    pause_s: float

    def device_s(self, layer: int, rows_E: Rows) -> NDArray[np.float64]:
        """Return [devices] seconds of one layer of this step."""

    def step_done(self, rows_LE: Rows) -> None:
        """Look at what a step asked for, and act."""

    def lost(self, device_id: str) -> None:
        """Go on without a device."""


def layer_device_s(
    table: RoutingTable, rows_R: Rows, devices: Sequence[ExpertDevice], *, counts_reads: bool
) -> NDArray[np.float64]:
    """Return [devices] seconds for the rows of each replica, or for the reads they cause."""
    if counts_reads:
        each_s = np.array([device.expert_read_s or 0.0 for device in devices])
        rows_R = (rows_R > 0).astype(np.int64)
    else:
        each_s = np.array([1.0 / device.rows_per_s for device in devices])
    device_s: NDArray[np.float64] = table.device_rows(rows_R) * each_s
    return device_s


class StaticPolicy:
    """No rebalancing; a lost device's experts are reloaded elsewhere."""

    def __init__(self, current: ExpertMap, settings: RebalanceSettings) -> None:
        self.name = "none"
        self.moved_bytes, self.pause_s = 0, 0.0
        self._settings = settings
        self._use(current)

    def _use(self, current: ExpertMap) -> None:
        self._map = current
        self._tables = _tables(current)

    def device_s(self, layer: int, rows_E: Rows) -> NDArray[np.float64]:
        table = self._tables[layer]
        return layer_device_s(
            table,
            table.split(rows_E),
            self._map.devices,
            counts_reads=self._settings.objective == "activated",
        )

    def step_done(self, rows_LE: Rows) -> None:
        """Nothing follows the load."""

    def lost(self, device_id: str) -> None:
        left = [device for device in self._map.devices if device.id != device_id]
        loads_LE = np.ones((len(self._map.layers), self._map.num_experts))
        made = recover(self._map, left, loads_LE, objective=self._settings.objective)
        self.moved_bytes += len(made.reloads) * self._settings.expert_bytes
        self.pause_s += (
            _busiest(reload.device_id for reload in made.reloads) * self._settings.copy_s
        )
        self._use(made.map)


class EplbPolicy:
    """EPLB with a window and an interval."""

    def __init__(
        self,
        devices: Sequence[ExpertDevice],
        num_layers: int,
        num_experts: int,
        settings: RebalanceSettings,
        *,
        window_steps: int = EPLB_WINDOW_STEPS,
        interval_steps: int = EPLB_INTERVAL_STEPS,
    ) -> None:
        self.name = "eplb"
        self.moved_bytes, self.pause_s = 0, 0.0
        self._devices = list(devices)
        self._settings = settings
        self._window_SLE = np.zeros((window_steps, num_layers, num_experts), dtype=np.int64)
        self._interval_steps = interval_steps
        self._counter = 3 * interval_steps // 4
        self._num_steps = 0
        self._held: list[list[frozenset[int]]] = []
        self.replan(np.ones((num_layers, num_experts)))
        # Before the first step there was nothing to move from.
        self.moved_bytes, self.pause_s = 0, 0.0

    def device_s(self, layer: int, rows_E: Rows) -> NDArray[np.float64]:
        table = self._tables[layer]
        return layer_device_s(
            table,
            table.split(rows_E),
            self._devices,
            counts_reads=self._settings.objective == "activated",
        )

    def step_done(self, rows_LE: Rows) -> None:
        self._window_SLE[self._num_steps % len(self._window_SLE)] = rows_LE
        self._num_steps += 1
        self._counter += 1
        if self._counter >= self._interval_steps:
            self._counter = 0
            self.replan(self._window_SLE.sum(axis=0).astype(np.float64))

    def lost(self, device_id: str) -> None:
        position = [device.id for device in self._devices].index(device_id)
        del self._devices[position]
        self._held = [layer[:position] + layer[position + 1 :] for layer in self._held]
        self.replan(self._window_SLE.sum(axis=0).astype(np.float64))

    def replan(self, rows_LE: NDArray[np.float64]) -> int:
        """Place from scratch for these loads; return the bytes that move."""
        num_devices, num_experts = len(self._devices), rows_LE.shape[1]
        slots = max(num_experts, sum(device.slots_per_layer for device in self._devices))
        num_slots = -(-slots // num_devices) * num_devices
        placed = rebalance_experts(rows_LE, num_slots=num_slots, num_devices=num_devices)
        held_LDC = placed.expert_of_slot.reshape(len(rows_LE), num_devices, -1)
        self._tables = [_equal_shares(held_DC, num_experts) for held_DC in held_LDC]
        held = [[frozenset(here.tolist()) for here in held_DC] for held_DC in held_LDC]
        received = Counter(
            {
                device: sum(
                    len(new[device] - old[device])
                    for new, old in zip(held, self._held or held, strict=True)
                )
                for device in range(num_devices)
            }
        )
        self._held = held
        moved_bytes = received.total() * self._settings.expert_bytes
        self.moved_bytes += moved_bytes
        self.pause_s += max(received.values()) * self._settings.copy_s
        return moved_bytes


class MotleyPolicy:
    """The rebalancer, with an executor that does what it is told."""

    def __init__(
        self,
        current: ExpertMap,
        settings: RebalanceSettings,
        *,
        window_steps: int,
        measure_every_steps: int,
        divides_each_step: bool = True,
    ) -> None:
        self.name = "motley"
        self._divides_each_step = divides_each_step
        self.moved_bytes, self.pause_s = 0, 0.0
        self._settings = settings
        self._rebalancer = ExpertRebalancer(current, settings)
        self._window = LoadWindow(
            len(current.layers), current.num_experts, window_steps=window_steps
        )
        self._measure_every_steps = measure_every_steps
        self._num_steps = 0
        self._todo: list[ExpertCommand] = []
        self._use()

    @property
    def map(self) -> ExpertMap:
        """In force."""
        return self._rebalancer.map

    def _use(self) -> None:
        devices = self.map.devices
        self._version = self.map.version
        self._tables = _tables(self.map)
        self._holders = [table.holders() for table in self._tables]
        self._speeds = [device.rows_per_s for device in devices]
        self._costs = StepCosts(
            nodes=tuple(device.node for device in devices),
            read_s=tuple(device.expert_read_s or 0.0 for device in devices),
            latency_s=(0.0,) * len(devices),
            message_s={},
        )

    def device_s(self, layer: int, rows_E: Rows) -> NDArray[np.float64]:
        table = self._tables[layer]
        counts_reads = self._settings.objective == "activated"
        if counts_reads:
            activated = np.flatnonzero(rows_E).tolist()
            chosen = choose_replicas(activated, self._holders[layer], self._costs)
            is_chosen_R = table.device_R == np.array(
                [chosen.get(expert, -1) for expert in table.expert_R.tolist()]
            )
            rows_R = rows_E[table.expert_R] * is_chosen_R
        elif self._divides_each_step:
            rows_R = table.balanced_rows(rows_E, self._speeds)
        else:
            rows_R = table.split(rows_E)
        return layer_device_s(table, rows_R, self.map.devices, counts_reads=counts_reads)

    def step_done(self, rows_LE: Rows) -> None:
        for layer, rows_E in enumerate(rows_LE):
            self._window.add(layer, rows_E)
        self._num_steps += 1
        self._execute()
        if self._num_steps % self._measure_every_steps == 0:
            self._todo += self._rebalancer.handle(LoadsMeasured(summary=self._window.summary()))
        self._todo += self._rebalancer.handle(StepsDone())
        self.moved_bytes += sum(c.num_bytes for c in self._todo if isinstance(c, Move))

    def _execute(self) -> None:
        """Do what was asked for in the step before."""
        todo, self._todo = self._todo, []
        for command in todo:
            if isinstance(command, Move):
                self._todo += self._rebalancer.handle(CopyDone(move=command))
            elif isinstance(command, UseMap):
                self._todo += self._rebalancer.handle(MapInForce(version=command.map.version))
        if self.map.version != self._version:
            self._use()

    def lost(self, device_id: str) -> None:
        rebalancer = self._rebalancer
        self._todo = rebalancer.handle(ExpertDeviceLost(device_id=device_id, reason="lost"))
        if rebalancer.halted:
            raise ValueError(f"the replay ends: {rebalancer.halted}")
        missing = [device for device, _ in rebalancer.missing]
        self.moved_bytes += len(missing) * self._settings.expert_bytes
        self.pause_s += _busiest(missing) * self._settings.copy_s
        # Rows wait for what is missing, so that all of it is there before the next step.
        while rebalancer.missing or rebalancer.newest is not rebalancer.map:
            self._execute()


def _tables(current: ExpertMap) -> list[RoutingTable]:
    return [RoutingTable.of_layer(layer, current.num_experts) for layer in current.layers]


def _busiest(device_ids: Iterable[str]) -> int:
    """Return the most copies that one device receives."""
    return max(Counter(device_ids).values(), default=0)


def _equal_shares(held_DC: NDArray[np.int64], num_experts: int) -> RoutingTable:
    """Return a layer in which every slot takes an equal part; slots of one device add up."""
    num_devices = len(held_DC)
    copy = held_DC * num_devices + np.arange(num_devices)[:, None]
    code_R, slots_R = np.unique(copy, return_counts=True)
    expert_R = code_R // num_devices
    slots_E = np.bincount(expert_R, weights=slots_R, minlength=num_experts)
    counts_E = np.bincount(expert_R, minlength=num_experts)
    return RoutingTable(
        expert_R=expert_R,
        device_R=code_R % num_devices,
        weight_R=slots_R / slots_E[expert_R],
        first_E=np.concatenate(([0], np.cumsum(counts_E))),
        num_devices=num_devices,
    )
