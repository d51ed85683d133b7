"""The shell of the experts' rebalancer: tells it what happens, and carries out what it says.

A thread of its own, so that a lost worker is made good while layers move: only the replacement of
stages and lanes needs the fleet. Copies are read by their targets from the checkpoint, in the
background, in the parts that the rebalancer's budget makes of them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, assert_never

import ray
from ray.exceptions import RayError

from actors.expert_crew import ExpertCrew
from actors.hosting import FleetError, end_for_certain
from actors.losses import Loss, Member, Watches, cause_of
from placement.moving.moves import Move, Release
from placement.sharding.loads import Phase, choose_summaries
from placement.sharding.log import ExpertEntry
from placement.sharding.rebalance_values import (
    CopyDone,
    CopyFailed,
    DeviceMadeGood,
    ExpertCommand,
    ExpertDeviceJoined,
    ExpertDeviceLeaving,
    ExpertDeviceLost,
    ExpertEvent,
    HaltExperts,
    LoadsMeasured,
    MapChange,
    MapInForce,
    MapRefused,
    StepsDone,
    UseMap,
)
from placement.sharding.rebalancer import ExpertRebalancer
from placement.sharding.recording import Steps
from placement.stages import StagesPlan

_log = logging.getLogger(__name__)
_WATCH_S = 0.05
_BUSY_WATCH_S = 0.005
"""While copies are on their way."""
_JOIN_TIMEOUT_S = 5.0
_MOST_RECOVERIES = 100
_MOST_CHANGES = 50
MOST_STARTS = 5
"""Of a device's worker, one after another, before the device is left out."""
_IDLE_STEPS_PER_S = 20.0
"""What may be copied while nothing is computed, and nobody disturbed, in budgets of a step."""
_STEADY_S = 60.0
"""A worker that has lived so long is lost for another reason than the one before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertHooks:
    """Whom the shell tells, on its own thread."""

    plan: Callable[[], StagesPlan]
    """In force."""
    steps: Callable[[], int]
    """That the last stage has done, in all."""
    is_node_alive: Callable[[str], bool]
    on_interrupted: Callable[[str], None]
    """Experts are lost; what is in flight waits."""
    on_halted: Callable[[str], None]
    """What is left cannot hold the experts."""
    on_resumed: Callable[[], None]
    """After either."""
    on_fatal: Callable[[str], None]
    on_entry: Callable[[ExpertEntry], None] = lambda _: None
    """Every event with the commands that followed, for a log."""
    on_steps: Callable[[Mapping[int, Steps]], None] | None = None
    """What each stage's steps have asked of experts since the last time; None: not asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertShellSettings:
    """Deadlines and rhythm."""

    window_s: float
    """Between two looks at the loads."""
    start_timeout_s: float
    silence_s: float
    follows_load: bool
    """False: experts move only when a worker is lost or back."""
    phase: Phase
    """Whose loads are balanced."""


class ExpertsShell:
    """Runs an `ExpertRebalancer` over an `ExpertCrew`."""

    def __init__(
        self,
        crew: ExpertCrew,
        rebalancer: ExpertRebalancer,
        hooks: ExpertHooks,
        settings: ExpertShellSettings,
    ) -> None:
        self.rebalancer = rebalancer
        self.num_maps = 0
        """That came into force since the first."""
        self.changes: deque[MapChange] = deque(maxlen=_MOST_CHANGES)
        """The last of them."""
        self.recoveries: deque[DeviceMadeGood] = deque(maxlen=_MOST_RECOVERIES)
        self._crew = crew
        self._hooks = hooks
        self._settings = settings
        self._offers = {device.id: device for device in rebalancer.map.devices}
        self._watches = Watches(settings.silence_s)
        self._events: SimpleQueue[ExpertEvent] = SimpleQueue()
        self._copies: dict[Any, Move] = {}
        """By the call that reads it."""
        self._starting: dict[Any, tuple[Member, float]] = {}
        """Workers in the place of lost ones and until when, by the call that waits for them."""
        self._drains: SimpleQueue[tuple[str, bool]] = SimpleQueue()
        """(node, whether it is to be used again after all)."""
        self._drained: set[str] = set()
        """Nodes whose devices are to hold nothing."""
        self._unreached: set[str] = set()
        """Devices that hold nothing until their node answers again."""
        self._back: SimpleQueue[str] = SimpleQueue()
        """Nodes that do."""
        self._num_starts: dict[str, int] = {}
        self._started_s: dict[str, float] = {}
        """When its worker was started last, by device."""
        self._lost_s: dict[str, float] = {}
        """When a worker was noticed to be lost whose experts nobody serves yet, by device."""
        self._steps = 0
        self._stepped_s = self._idle_s = time.monotonic()
        """When steps were done last, and when what nobody needs was last given to copies."""
        self._looked_s = 0.0
        self._is_halted = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="experts", daemon=True)

    def start(self) -> None:
        self._watch(list(self._crew.members.values()))
        self._steps = self._hooks.steps()
        self._thread.start()

    def stop(self) -> None:
        """End after the present turn. Safe to call twice."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(_JOIN_TIMEOUT_S)
        for worker, _ in self._starting.values():
            end_for_certain(worker)

    def tell(self, event: ExpertEvent) -> None:
        """Queue an event; from any thread."""
        self._events.put(event)

    @property
    def nodes_away(self) -> frozenset[str]:
        """Nodes whose devices hold no experts since they did not answer."""
        return frozenset(self._offers[device_id].node for device_id in list(self._unreached))

    def rejoin(self, node: str) -> None:
        """A node answers again: its devices are to hold experts; from any thread."""
        self._back.put(node)

    def drain(self, node: str, *, cancel: bool) -> None:
        """Let a node's devices hold nothing, or use them again; from any thread."""
        self._drains.put((node, cancel))

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._take_turn()
        except Exception as error:  # noqa: BLE001 - whatever it is, nobody cares for experts any more
            _log.exception("the experts' rebalancer failed")
            if not self._stopping.is_set():
                self._hooks.on_fatal(f"the experts' rebalancer failed: {error}")

    def _take_turn(self) -> None:
        loss = self._watches.next_loss(_BUSY_WATCH_S if self._copies else _WATCH_S)
        if self._stopping.is_set():
            return
        if loss is not None:
            self._lose(loss.member, loss.reason)
        self._end_copies()
        self._start_on_nodes_back()
        self._take_in_started()
        self._obey_drains()
        self._count_steps()
        if time.monotonic() - self._looked_s >= self._settings.window_s:
            self._looked_s = time.monotonic()
            self._crew.retire()
            self._record_steps()
            self._look_at_loads()
        try:
            while True:
                self._handle(self._events.get_nowait())
        except Empty:
            pass

    # What happens.

    def _lose(self, worker: Member, reason: str) -> None:
        device_id = str(worker.key)
        _log.error("%s", reason)
        if device_id in self._crew.map.device_ids:  # and not drained, or new
            self._lost_s[device_id] = time.monotonic()
            self._hooks.on_interrupted(reason)
        self._crew.lose(worker)
        self._handle(ExpertDeviceLost(device_id=device_id, reason=reason))
        self._start_again(device_id)

    def _start_again(self, device_id: str) -> None:
        """Start another worker in the place of a lost one; it is taken in when it is ready."""
        node = self._offers[device_id].node
        if node in self._drained:
            return
        now_s = time.monotonic()
        if now_s - self._started_s.get(device_id, now_s) > _STEADY_S:
            self._num_starts.pop(device_id, None)
        self._started_s[device_id] = now_s
        self._num_starts[device_id] = self._num_starts.get(device_id, 0) + 1
        if self._num_starts[device_id] > MOST_STARTS:
            _log.error("device %s holds no experts any more; restart motley to use it", device_id)
            return
        if not self._hooks.is_node_alive(node):
            _log.error("device %s holds no experts until its node %s answers", device_id, node)
            self._unreached.add(device_id)
            return
        worker = self._crew.start_worker(device_id)
        deadline_s = now_s + self._settings.start_timeout_s
        self._starting[worker.actor.ready.remote()] = worker, deadline_s

    def _start_on_nodes_back(self) -> None:
        while not self._back.empty():
            node = self._back.get()
            for device_id in sorted(self._unreached):
                if self._offers[device_id].node == node:
                    self._unreached.discard(device_id)
                    self._num_starts.pop(device_id, None)
                    self._start_again(device_id)

    def _take_in_started(self) -> None:
        for call in _done(self._starting):
            worker, _ = self._starting.pop(call)
            try:
                worker.address = ray.get(call)
            except RayError as error:
                self._give_up_start(worker, cause_of(error))
                continue
            self._crew.admit([worker])
            self._watch([worker])
            offer = self._offers[str(worker.key)]
            if offer.node not in self._drained:
                self._handle(ExpertDeviceJoined(device=offer))
        now_s = time.monotonic()
        for call, (worker, deadline_s) in list(self._starting.items()):
            if now_s > deadline_s:
                del self._starting[call]
                timeout_s = self._settings.start_timeout_s
                self._give_up_start(worker, f"{timeout_s:g} s have passed (ray.start_timeout_s)")

    def _give_up_start(self, worker: Member, reason: str) -> None:
        _log.warning("%s did not start: %s", worker.name, reason)
        end_for_certain(worker)
        self._start_again(str(worker.key))

    def _obey_drains(self) -> None:
        while not self._drains.empty():
            node, is_cancelled = self._drains.get()
            (self._drained.discard if is_cancelled else self._drained.add)(node)
            for device_id, offer in self._offers.items():
                if offer.node != node:
                    continue
                if not is_cancelled:
                    self._handle(ExpertDeviceLeaving(device_id=device_id))
                elif device_id in self._crew.members:
                    self._handle(ExpertDeviceJoined(device=offer))
                elif all(str(worker.key) != device_id for worker, _ in self._starting.values()):
                    self._num_starts.pop(device_id, None)
                    self._start_again(device_id)

    def _end_copies(self) -> None:
        for call in _done(self._copies):
            move = self._copies.pop(call)
            try:
                ray.get(call)
            except RayError as error:
                self._handle(CopyFailed(move=move, reason=cause_of(error)))
            else:
                self._handle(CopyDone(move=move))

    def _count_steps(self) -> None:
        now_s, steps = time.monotonic(), self._hooks.steps()
        # Of another last stage, they begin anew.
        grown = steps - self._steps if steps >= self._steps else steps
        self._steps = steps
        if grown:
            self._stepped_s = now_s
        elif now_s - self._stepped_s > self._settings.window_s:
            grown = round((now_s - self._idle_s) * _IDLE_STEPS_PER_S)
        if grown:
            self._idle_s = now_s
            self._handle(StepsDone(steps=grown))

    def _record_steps(self) -> None:
        if self._hooks.on_steps is None:
            return
        try:
            holders = {s.device_id: s.index for s in self._hooks.plan().stages}
            self._hooks.on_steps(self._crew.steps(holders))
        except FleetError as error:
            _log.info("no steps of experts this time: %s", error)

    def _look_at_loads(self) -> None:
        if not self._settings.follows_load or self.rebalancer.halted:
            return
        plan = self._hooks.plan()
        try:
            parts = self._crew.loads({s.device_id: s.index for s in plan.stages})
        except FleetError as error:
            _log.info("no loads of experts this time: %s", error)
            return
        if len(parts) < len(plan.stages):
            return  # a stage is being replaced
        holders = [
            next(s.index for s in plan.stages if s.first_layer <= layer < s.end_layer)
            for layer in self._crew.spec.layers
        ]
        phase = self._settings.phase
        counted = [parts[index][phase] for index in sorted(parts)]
        self._handle(LoadsMeasured(summary=choose_summaries(counted, holders)))

    # What is done about it.

    def _handle(self, event: ExpertEvent) -> None:
        """Tell the rebalancer, and do what it says until it says no more."""
        commands = self._decide(event)
        while commands and not self._stopping.is_set():
            command = commands.pop(0)
            for answer in self._obey(command):
                commands += self._decide(answer)

    def _decide(self, event: ExpertEvent) -> list[ExpertCommand]:
        commands = self.rebalancer.handle(event)
        self._hooks.on_entry(ExpertEntry(event=event, commands=tuple(commands)))
        return commands

    def _obey(self, command: ExpertCommand) -> Sequence[ExpertEvent]:
        match command:
            case Move():
                return self._copy(command)
            case Release(device_id=device_id, piece=piece):
                self._crew.release(device_id, piece.layer, piece.expert)
            case UseMap():
                return [self._use(command)]
            case HaltExperts(reason=reason):
                _log.error("experts: %s", reason)
                self._is_halted = True
                self._hooks.on_halted(reason)
            case _:
                assert_never(command)
        return ()

    def _copy(self, move: Move) -> Sequence[ExpertEvent]:
        there_bytes = move.first_byte + move.num_bytes
        share = 1.0 if move.is_last else there_bytes / self.rebalancer.expert_bytes
        try:
            call = self._crew.fetch(move.target, move.piece.layer, move.piece.expert, share)
        except FleetError as error:
            return [CopyFailed(move=move, reason=str(error))]
        self._copies[call] = move
        return ()

    def _use(self, command: UseMap) -> ExpertEvent:
        made, before = command.map, self._crew.map
        try:
            timeout_s, in_place = self._settings.start_timeout_s, command.is_recovery
            self._crew.use(made, timeout_s, self._look, in_place=in_place)
        except FleetError as error:
            _log.warning("expert map %d did not come into force: %s", made.version, error)
            return MapRefused(version=made.version, reason=str(error))
        self.num_maps += 1
        copies = tuple(sorted(made.copies() - before.copies()))
        self.changes.append(
            MapChange(
                at_s=time.monotonic(), version=made.version, reason=command.reason, copies=copies
            )
        )
        _log.info("expert map %d is in force: %s", made.version, command.reason)
        self._resume(command.reason)
        return MapInForce(version=made.version)

    def _resume(self, reason: str) -> None:
        now_s = time.monotonic()
        for device_id, lost_s in self._lost_s.items():
            done = DeviceMadeGood(device_id=device_id, seconds=now_s - lost_s, reason=reason)
            self.recoveries.append(done)
            _log.info("experts go on %.2f s after the loss of %s", done.seconds, device_id)
        if self._lost_s or self._is_halted:
            self._lost_s.clear()
            self._is_halted = False
            self._hooks.on_resumed()

    def _look(self) -> Loss | None:
        return self._watches.look(list(self._crew.members.values()))

    def _watch(self, workers: Sequence[Member]) -> None:
        for worker in workers:
            self._watches.add(worker)


def _done(calls: dict[Any, Any]) -> list[Any]:
    """Return the calls that have ended, in the order in which they began."""
    if not calls:
        return []
    done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
    return [call for call in calls if call in set(done)]
