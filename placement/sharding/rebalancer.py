"""The rebalancer of experts: a state machine from what was measured and done to what to do.

It knows which copies are whole on which device, the map in force, and at most one map that it has
told and that is not in force yet. A rebalancing is a queue of swaps of one layer each: copies are
loaded into free and staging slots, a budget of bytes per step; when all of a swap are whole, the
layer changes over in the next version of the map; when that is in force, what it does not name is
released. So every expert of the map in force is whole on its devices at all times, but for those
that a lost device took along: these are read from the checkpoint at once, outside the budget,
because their rows wait.

What goes wrong ends the rebalancing and keeps the map in force: a failed copy, a refused map. A
device that is lost or joins ends it too, and gives the next map. So does one that is to leave:
layer by layer others load what it alone holds, outside the budget, for an operator waits; the last
map then names it no more.

No clock: steps are the measure of time. Equal events give equal commands.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, assert_never

import numpy as np
from numpy.typing import NDArray

from placement.errors import InfeasiblePlanError
from placement.experts import ExpertDevice, layer_problems
from placement.moving.moves import Move, Piece, Release
from placement.sharding.chains import Layout, layouts_between
from placement.sharding.copies import Copies, Copy, copies_of
from placement.sharding.decision import (
    RebalanceDecision,
    RebalanceSettings,
    decide,
    refreshed_weights,
)
from placement.sharding.expert_map import ExpertMap, weighted_layer
from placement.sharding.rebalance_values import (
    CopyDone,
    CopyFailed,
    ExpertCommand,
    ExpertDeviceJoined,
    ExpertDeviceLeaving,
    ExpertDeviceLost,
    ExpertEvent,
    HaltExperts,
    LoadsMeasured,
    MapInForce,
    MapRefused,
    RebalanceRequested,
    StepsDone,
    UseMap,
)
from placement.sharding.recovery import recover

_MOST_OFFERS = 3


class _Swap(NamedTuple):
    """One layer changes over to what its devices shall hold."""

    layer: int
    layout: Layout


class ExpertRebalancer:
    """Keeps a placement of experts near its optimum, and whole.

    Args:
        current: In force, and true: every device holds what it names.
        settings: When and how fast experts move.
    """

    def __init__(self, current: ExpertMap, settings: RebalanceSettings) -> None:
        self.map = current
        """In force."""
        self.halted: str | None = None
        """Why nothing can be served; None: it can."""
        self.last_decision: RebalanceDecision | None = None
        self._settings = settings
        self._devices = list(current.devices)
        self._refused_devices: list[ExpertDevice] = []
        """Have joined with a map that was refused, maybe for another one's sake."""
        self._num_offers: Counter[str] = Counter()
        """Of maps with such a device, by its id."""
        self._leaving: set[str] = set()
        """Devices that are not to be used, the gone included."""
        self._copies = Copies(copies_of(current), settings.expert_bytes)
        self._told: ExpertMap | None = None
        self._last_version = current.version
        self._is_recovering = False
        self._swaps: deque[_Swap] = deque()
        """What the first of them loads is wanted of the copies."""
        self._attempts: Counter[Copy] = Counter()
        """Of reloads."""
        self._rows_LE = np.ones((len(current.layers), current.num_experts))
        self._cool_steps = 0
        self._is_forced = False
        self._has_room = False
        """A device has joined that holds nothing yet."""

    @property
    def newest(self) -> ExpertMap:
        """The map told last, in force or not."""
        return self._told or self.map

    @property
    def missing(self) -> tuple[tuple[str, Piece], ...]:
        """Copies that the newest map names and no device has yet: rows for them wait."""
        wanted = copies_of(self.newest) - self._copies.held
        return tuple(sorted(wanted, key=lambda copy: (copy.piece, copy.device_id)))

    @property
    def loads(self) -> NDArray[np.float64]:
        """[L, E] rows a step lately; all alike until some were measured."""
        return self._rows_LE

    @property
    def leaving(self) -> frozenset[str]:
        """Devices that are to hold nothing, and do not yet."""
        return frozenset(self._leaving & {device.id for device in self._devices})

    @property
    def expert_bytes(self) -> int:
        """Of one expert of a layer."""
        return self._settings.expert_bytes

    @property
    def is_moving(self) -> bool:
        """A rebalancing is going on."""
        return bool(self._swaps)

    def holds(self, device_id: str, layer: int) -> frozenset[int]:
        """Return the experts of a layer that are whole on a device, those not in use included."""
        return frozenset(
            copy.piece.expert
            for copy in self._copies.held
            if copy.device_id == device_id and copy.piece.layer == layer
        )

    def handle(self, event: ExpertEvent) -> list[ExpertCommand]:
        """Return what to do about an event."""
        match event:
            case LoadsMeasured():
                return self._measured(event)
            case StepsDone():
                return self._stepped(event.steps)
            case CopyDone():
                return self._copied(event.move)
            case CopyFailed():
                return self._copy_failed(event)
            case MapInForce():
                return self._in_force(event.version)
            case MapRefused():
                return self._refused(event)
            case ExpertDeviceLost() | ExpertDeviceJoined() | ExpertDeviceLeaving():
                return self._fleet_changed(event)
            case RebalanceRequested():
                self._is_forced = True
                return []
            case _:
                assert_never(event)

    def _measured(self, event: LoadsMeasured) -> list[ExpertCommand]:
        summary = event.summary
        if summary.recent_rows_LE.shape != self._rows_LE.shape:
            raise ValueError(
                f"loads have shape {summary.recent_rows_LE.shape}; the map has "
                f"{self._rows_LE.shape[0]} layers of {self._rows_LE.shape[1]} experts"
            )
        if int(summary.recent_steps_L.min()) < self._settings.least_steps:
            return []
        self._rows_LE = summary.recent_rows_LE
        if self._is_busy or self.leaving:
            return []
        if not self._cool_steps and self._plan(float(summary.drift_L.max())):
            return []
        if changed := refreshed_weights(self.map, self._rows_LE, self._settings):
            made = self.map.with_layers(changed)
            return self._tell(made, f"weights of {len(changed)} layers follow the load")
        return []

    def _stepped(self, steps: int) -> list[ExpertCommand]:
        self._cool_steps = max(0, self._cool_steps - steps)
        if self.leaving:
            return [] if self._cool_steps else self._vacate()
        if self._has_room and not self._is_busy:
            self._plan(0.0)
        return [*self._copies.ask(steps * self._settings.step_budget_bytes, self._nodes)]

    @property
    def _is_busy(self) -> bool:
        return bool(self.halted or self._swaps or self._told or self.missing)

    def _plan(self, drift: float) -> bool:
        """Begin a rebalancing for the loads that are known, if it pays; returns whether it does."""
        is_forced = self._is_forced or self._has_room
        self._is_forced = self._has_room = False
        decision = self.last_decision = decide(
            self.map, self._rows_LE, self._settings, drift=drift, is_forced=is_forced
        )
        for layer, planned in decision.layers:
            self._queue(layer, planned.layout)
        if self._swaps:
            self._prepare()
        return bool(self._swaps)

    def _queue(self, layer: int, wanted: Layout) -> None:
        """Queue the swaps that take a layer to what its devices shall hold."""
        held = tuple(map(frozenset, self.map.layers[layer].experts))
        slots = [device.slots_per_layer for device in self._devices]
        staging = self._settings.staging_slots
        layouts = layouts_between(held, wanted, slots, staging_slots=staging)
        self._swaps += [_Swap(layer, layout) for layout in layouts]

    def _prepare(self) -> None:
        """List what the first swap has to load."""
        swap = self._swaps[0]
        wanted = [
            Copy(device.id, Piece(part="expert", layer=swap.layer, expert=expert))
            for device, experts in zip(self._devices, swap.layout, strict=True)
            for expert in sorted(experts)
        ]
        self._copies.want(wanted)

    @property
    def _nodes(self) -> dict[str, str]:
        return {device.id: device.node for device in self._devices}

    def _copied(self, move: Move) -> list[ExpertCommand]:
        copy = Copy(move.target, move.piece)
        if not self._copies.end(move):
            return self._release_stray(copy)
        if not move.is_last:
            return []
        self._copies.whole(copy)
        self._attempts.pop(copy, None)
        return self._change_over()

    def _release_stray(self, copy: Copy) -> list[ExpertCommand]:
        """Give up what came of a move that is no longer wanted."""
        is_known = any(device.id == copy.device_id for device in self._devices)
        copies = self._copies
        is_used = copy in copies.held or copy in copies.wanted or copy in self.missing
        return [copy.release] if is_known and not is_used else []

    def _change_over(self) -> list[ExpertCommand]:
        """Tell the next map, once all that the first swap loads is whole."""
        if not self._swaps or self._copies.wanted or self._told:
            return []
        swap = self._swaps[0]
        rows_1E = self._rows_LE[swap.layer : swap.layer + 1]
        [problem] = layer_problems(rows_1E, self._devices, self._settings.objective)
        layer = weighted_layer(swap.layout, problem.loads, problem.speeds)
        return self._tell(
            self.map.with_layers({swap.layer: layer}),
            f"layer {swap.layer} changes over; {len(self._swaps) - 1} more swaps",
        )

    def _tell(
        self, made: ExpertMap, reason: str, *, is_recovery: bool = False
    ) -> list[ExpertCommand]:
        self._last_version += 1
        self._told = replace(made, version=self._last_version)
        self._is_recovering = is_recovery
        return [UseMap(map=self._told, reason=reason, is_recovery=is_recovery)]

    def _in_force(self, version: int) -> list[ExpertCommand]:
        if self._told is None or version != self._told.version:
            return []
        self.map, self._told = self._told, None
        self._is_recovering = False
        commands: list[ExpertCommand] = [*self._release_unused()]
        if self._swaps:
            self._swaps.popleft()
            if not self._swaps:
                self._cool_steps = self._settings.cool_down_steps
        # What a map before still had to read and this one does not name is given up on arrival.
        self._copies.keep_moves(copies_of(self.map))
        commands += self._ask_for_missing()
        if not self._swaps:
            return [*commands, *self._vacate(), *self._ask_again()]
        self._prepare()
        if self.leaving:
            commands += self._copies.ask_for_all(self._nodes)
        return [*commands, *self._change_over()]

    def _release_unused(self) -> list[Release]:
        """Release what the map in force does not name."""
        return [copy.release for copy in self._copies.drop_unnamed(copies_of(self.map))]

    def _ask_for_missing(self) -> list[Move]:
        asked = self._copies.asked()
        missing = [Copy(*copy) for copy in self.missing if copy not in asked]
        return self._copies.read(missing, self._nodes)

    def _refused(self, event: MapRefused) -> list[ExpertCommand]:
        if self._told is None or event.version != self._told.version:
            return []
        if self._is_recovering:
            return self._halt(f"map {event.version} was refused: {event.reason}")
        self._told = None
        named = set(self.map.device_ids)
        self._refused_devices = [device for device in self._devices if device.id not in named]
        self._devices = list(self.map.devices)
        commands = self._abandon()
        return [*commands, *self._ask_for_missing()]

    def _ask_again(self) -> list[ExpertCommand]:
        """Offer a map with a device whose first one was refused, a few times."""
        while self._refused_devices and not self._is_busy:
            device = self._refused_devices.pop(0)
            self._num_offers[device.id] += 1
            if self._num_offers[device.id] <= _MOST_OFFERS:
                return self._joined(device)
        return []

    def _copy_failed(self, event: CopyFailed) -> list[ExpertCommand]:
        move = event.move
        copy = Copy(move.target, move.piece)
        if not self._copies.end(move):
            return []
        if copy in self._copies.wanted:
            return self._abandon()
        if copy not in self.missing:
            return []
        self._attempts[copy] += 1
        if self._attempts[copy] >= self._settings.max_reload_attempts:
            reason = f"{move.piece} could not be loaded {self._attempts[copy]} times"
            return self._lost(ExpertDeviceLost(device_id=move.target, reason=reason))
        return [*self._copies.read([copy], self._nodes)]

    def _abandon(self) -> list[ExpertCommand]:
        """End the rebalancing; the map in force stays, and what it does not name is released."""
        if not self._swaps:
            return []
        begun = self._copies.want_nothing()
        self._swaps.clear()
        self._cool_steps = self._settings.cool_down_steps
        known = {device.id for device in self._devices}
        # Also what is only half there.
        partial = [copy.release for copy in begun if copy.device_id in known]
        # A told map may be in force somewhere: what it names is released when another one is.
        return [*partial, *([] if self._told else self._release_unused())]

    def _fleet_changed(
        self, event: ExpertDeviceLost | ExpertDeviceJoined | ExpertDeviceLeaving
    ) -> list[ExpertCommand]:
        if isinstance(event, ExpertDeviceJoined):
            return self._joined(event.device)
        self._not_refused(event.device_id)
        if isinstance(event, ExpertDeviceLost):
            return self._lost(event)
        self._leaving.add(event.device_id)
        return [*self._abandon(), *self._vacate()]

    def _not_refused(self, device_id: str) -> None:
        """What a device's refused map had said of it is out of date."""
        self._refused_devices = [d for d in self._refused_devices if d.id != device_id]

    def _lost(self, event: ExpertDeviceLost) -> list[ExpertCommand]:
        left = [device for device in self._devices if device.id != event.device_id]
        # One that leaves is named by the map in force to the last.
        if len(left) == len(self._devices) and event.device_id not in self.map.device_ids:
            return []
        if sum(device.slots_per_layer for device in left) < self.map.num_experts:
            left, self._refused_devices = [*left, *self._refused_devices], []
        self._devices = left
        self._copies.lose(event.device_id)
        return self._regroup(left, f"{event.device_id} is lost: {event.reason}")

    def _joined(self, device: ExpertDevice) -> list[ExpertCommand]:
        self._leaving.discard(device.id)
        self._not_refused(device.id)
        others = [known for known in self._devices if known.id != device.id]
        is_known = len(others) < len(self._devices)
        if not device.slots_per_layer:
            return self._lost(ExpertDeviceLost(device_id=device.id, reason="it offers no slot"))
        self._devices = sorted([*others, device], key=lambda known: (known.node, known.id))
        self._is_forced = True
        self._has_room |= not is_known
        why = "has other figures" if is_known else "has joined"
        return self._regroup(self._devices, f"{device.id} {why}")

    def _regroup(self, devices: Sequence[ExpertDevice], why: str) -> list[ExpertCommand]:
        """Go on with these devices: a new map, and reloads once it is in force."""
        commands = self._abandon()
        try:
            made = recover(self.newest, devices, self._rows_LE, objective=self._settings.objective)
        except InfeasiblePlanError as error:
            return [*commands, *self._halt(f"{why}; {error}")]
        self.halted = None
        self._attempts.clear()
        self._cool_steps = 0
        is_loss = not set(self.map.device_ids) <= set(made.map.device_ids)
        reason = f"{why}; {len(made.reloads)} experts are read again"
        return [*commands, *self._tell(made.map, reason, is_recovery=is_loss)]

    def _vacate(self) -> list[ExpertCommand]:
        """Take what devices that leave hold to the others, as soon as nothing else goes on."""
        leaving = self.leaving
        if not leaving or self._is_busy:
            return []
        left = [device for device in self._devices if device.id not in leaving]
        try:
            made = recover(self.map, left, self._rows_LE, objective=self._settings.objective)
        except InfeasiblePlanError:
            return []  # until a device joins
        if not made.reloads:
            self._devices = left
            return self._tell(made.map, f"{', '.join(sorted(leaving))} leaves")
        for layer in sorted({each.layer for each in made.reloads}):
            held = dict(zip(made.map.device_ids, made.map.layers[layer].experts, strict=True))
            self._queue(layer, tuple(frozenset(held.get(d.id, ())) for d in self._devices))
        self._prepare()
        return [*self._copies.ask_for_all(self._nodes), *self._change_over()]

    def _halt(self, reason: str) -> list[ExpertCommand]:
        self.halted = reason
        # Whether it came into force or not: another map is told before anything is served again.
        self._told = None
        return [HaltExperts(reason=reason)]
