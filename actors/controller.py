"""The controller's shell: tells it what happens to a fleet, and carries out what it says.

One thread does both, so a command never meets another. What happens meanwhile waits in a queue;
a loss in the middle of a move makes the move fail, and is found right after.
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

from actors.fleet import Fleet
from actors.hosting import FleetError, MemberLostError
from actors.losses import Member
from actors.moving import (
    MoveReport,
    StandingStillError,
    add_lane,
    move,
    retire_lane,
    stand_still,
)
from actors.wire import Address
from placement.controller import Controller
from placement.stages import StagesPlan
from placement.steering.log import LogEntry
from placement.steering.values import (
    ChangeLanes,
    Command,
    Deploy,
    DeviceLost,
    Event,
    Halt,
    LanesChanged,
    MoveDone,
    MoveFailed,
    MoveLayers,
    NodeLost,
    ReleaseNode,
    StageMeasurement,
    StagesMeasured,
    Tick,
)

_log = logging.getLogger(__name__)
_WATCH_S = 0.2
_JOIN_TIMEOUT_S = 5.0
_TURN_TIMEOUT_S = 1.0
_MOST_LANE_LOSSES = 5
_LANE_LOSS_WINDOW_S = 60.0
"""More in so short a time are no accident."""


@dataclass(frozen=True, slots=True)
class Counters:
    """What the fleet has reported, summed since it began."""

    stages: Mapping[str, Mapping[str, Any]]
    """By device: steps, busy_s, predicted_s."""
    tokens: int
    running: int
    """Sequences in flight now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hooks:
    """Whom the shell tells, on its own thread."""

    counters: Callable[[], Counters]
    adapter_version: Callable[[], int]
    """That lanes use."""
    is_node_alive: Callable[[str], bool]
    """Asks the node itself; takes seconds when it does not answer."""
    on_interrupted: Callable[[str], None]
    """A part is lost; what is in flight waits."""
    on_plan: Callable[[StagesPlan, MoveReport], None]
    on_lane: Callable[[int, Address], None]
    """A lane, by its index, is there: a new one, or one in the place of a lost one."""
    on_lane_retired: Callable[[int], None]
    """A lane is about to stop."""
    on_resumed: Callable[[], None]
    on_halt: Callable[[str], None]
    on_entry: Callable[[LogEntry], None]
    """Every event with the commands that followed, for a log."""
    on_fatal: Callable[[str], None]
    """Nothing will go on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShellSettings:
    """Deadlines and rhythm."""

    window_s: float
    """Between two measurements."""
    start_timeout_s: float


class ControllerShell:
    """Runs a `Controller` over a `Fleet`."""

    def __init__(
        self,
        controller: Controller,
        fleet: Fleet,
        hooks: Hooks,
        settings: ShellSettings,
        *,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.controller = controller
        self.state = controller.state
        """As it was after the last turn."""
        self._fleet = fleet
        self._hooks = hooks
        self._settings = settings
        self._now_s = now_s
        self._events: SimpleQueue[Callable[[], Event]] = SimpleQueue()
        self._commands: list[Command] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="controller", daemon=True)
        self._window_began_s = 0.0
        self._before: Counters | None = None
        self._running: list[int] = []
        self._missing: set[int] = set()
        """Lost lanes that have no successor yet."""
        self._num_failed_lanes = 0
        """In a row, in which a lane was started and did not come up."""
        self._lane_losses_s: deque[float] = deque(maxlen=2 * _MOST_LANE_LOSSES)
        self.turn = threading.Lock()
        """Held while the fleet is used; whoever else uses it holds it too."""

    def start(self) -> None:
        self._begin_window()
        self._thread.start()

    def stop(self) -> None:
        """End after the present turn; a long move is left to fail with its fleet. Safe to call
        twice."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(_JOIN_TIMEOUT_S)

    def what_if(self) -> tuple[StagesPlan | None, str]:
        """Return what the controller would do now; while it does something it is not asked."""
        if not self.turn.acquire(timeout=_TURN_TIMEOUT_S):
            return None, "a move is under way"
        try:
            return self.controller.what_if()
        finally:
            self.turn.release()

    def tell(self, event: Callable[[float], Event]) -> None:
        """Queue an event, made at the time at which it is handled; from any thread."""
        self._events.put(lambda: event(self._now_s()))

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._take_turn()
        except Exception as error:  # noqa: BLE001 - whatever it is, nobody steers any more
            _log.exception("the controller failed")
            if not self._stopping.is_set():
                self._hooks.on_fatal(f"the controller failed: {error}")

    def _take_turn(self) -> None:
        loss = self._fleet.lost(_WATCH_S)
        if self._stopping.is_set():
            return
        with self.turn:
            if loss is not None:
                self._lose(loss.member, loss.reason)
            self._running.append(self._hooks.counters().running)
            if self._now_s() - self._window_began_s >= self._settings.window_s:
                self._handle(self._measured())
            try:
                while True:
                    self._handle(self._events.get_nowait()())
            except Empty:
                pass
            self._handle(Tick(at_s=self._now_s()))
            for index in sorted(self._missing):
                self._replace_lane(index)
            self.state = self.controller.state

    def _lose(self, member: Member, reason: str) -> None:
        self._bury(member, reason)
        if member.kind == "lane":
            return
        node = self._node_of(member)
        if self._hooks.is_node_alive(node):
            event: Event = DeviceLost(at_s=self._now_s(), device_id=str(member.key), reason=reason)
        else:
            event = NodeLost(at_s=self._now_s(), node=node, reason=reason)
        self._handle(event)

    def _bury(self, member: Member, reason: str) -> None:
        """Take a lost part out; what it had to do waits."""
        _log.error("%s", reason)
        self._hooks.on_interrupted(reason)
        self._fleet.bury(member)
        if member.kind == "stage":
            stand_still(self._fleet)
            return
        assert isinstance(member.key, int)
        self._missing.add(member.key)
        now_s = self._now_s()
        self._lane_losses_s.append(now_s)
        recent = [at_s for at_s in self._lane_losses_s if now_s - at_s < _LANE_LOSS_WINDOW_S]
        if len(recent) > _MOST_LANE_LOSSES:
            self._give_up(
                f"{reason}; {len(recent)} lanes were lost within {_LANE_LOSS_WINDOW_S:g} s"
            )

    def _bury_node(self, node: str, reason: str) -> None:
        """What is on a lost node may still run, and must not come back."""
        self._fleet.bury_spares(node)
        on_it = [m for m in self._fleet.stages.values() if self._node_of(m) == node]
        if on_it:
            self._hooks.on_interrupted(reason)
            stand_still(self._fleet)
        for member in on_it:
            self._fleet.bury(member)

    def _node_of(self, member: Member) -> str:
        return self._fleet.devices[str(member.key)].node

    def _add_lane(self, index: int) -> bool:
        """Returns whether it came up."""
        try:
            lane = add_lane(
                self._fleet,
                index,
                adapter_version=self._hooks.adapter_version(),
                timeout_s=self._settings.start_timeout_s,
            )
        except FleetError as error:
            _log.warning("lane %d did not come up: %s", index, error)
            is_stage = isinstance(error, MemberLostError) and error.member.kind == "stage"
            self._num_failed_lanes += not is_stage
            return False
        self._num_failed_lanes = 0
        assert lane.address is not None
        self._hooks.on_lane(index, lane.address)
        return True

    def _replace_lane(self, index: int) -> None:
        """Put another lane in the place of a lost one; the requests go on there. Where it does not
        come up, a part may have died with it: that is found, and this is tried again."""
        if self._stopping.is_set():
            return
        if self._add_lane(index):
            self._missing.discard(index)
            self._resume()
        elif self._num_failed_lanes > _MOST_LANE_LOSSES:
            self._give_up(f"lane {index} did not come up {self._num_failed_lanes} times in a row")

    def _resume(self) -> None:
        if not self._missing and self._fleet.is_whole:
            self._hooks.on_resumed()

    def _give_up(self, reason: str) -> None:
        self._stopping.set()
        self._hooks.on_fatal(reason)

    def _handle(self, event: Event) -> None:
        """Tell the controller, and do what it says until it says no more."""
        if isinstance(event, NodeLost):
            self._bury_node(event.node, event.reason)
        commands = self._ask(event)
        while commands and not self._stopping.is_set():
            command = commands.pop(0)
            _log.info("controller: %s", _words(command))
            for answer in self._obey(command):
                # What it says to the answer takes the place of what it said before.
                commands = [*self._ask(answer), *commands]

    def _ask(self, event: Event) -> list[Command]:
        commands = self.controller.handle(event)
        self._hooks.on_entry(LogEntry(event=event, commands=tuple(commands)))
        return commands

    def _obey(self, command: Command) -> Sequence[Event]:
        """Do what a command says; returns what came of it, for the controller."""
        match command:
            case Deploy(plan=plan):
                return self._move(plan, recompute=True)
            case MoveLayers(plan=plan, recompute_kv=recompute_kv):
                return self._move(plan, recompute=recompute_kv)
            case Halt(reason=reason):
                self._hooks.on_halt(reason)
            case ReleaseNode(node=node):
                _log.info("node %s holds nothing any more", node)
            case ChangeLanes(num_lanes=num_lanes):
                return [self._change_lanes(num_lanes)]
            case _:
                assert_never(command)
        return ()

    def _change_lanes(self, num_lanes: int) -> LanesChanged:
        """Add lanes, or retire the last ones, whose requests go on elsewhere; says how many there
        are then."""
        lanes = self._fleet.lanes
        for index in range(num_lanes):
            if index not in lanes and index not in self._missing and not self._add_lane(index):
                break
        for index in sorted(lanes.keys() | self._missing, reverse=True):
            if index < num_lanes:
                break
            self._hooks.on_lane_retired(index)
            self._missing.discard(index)
            if index in lanes:
                self._retire_lane(lanes[index])
        self._resume()
        return LanesChanged(at_s=self._now_s(), num_lanes=len(lanes) + len(self._missing))

    def _retire_lane(self, lane: Member) -> None:
        try:
            retire_lane(self._fleet, lane, timeout_s=self._fleet.spec.silence_s)
        except FleetError as error:
            # Whoever did not hear of it is lost or will be; what it sends there goes nowhere.
            _log.warning("%s is retired, but: %s", lane.name, error)

    def _move(self, plan: StagesPlan, *, recompute: bool) -> Sequence[Event]:
        """Carry a move out; returns what came of it."""
        settings = self._settings
        before = frozenset(self._fleet.stages)
        try:
            report = move(
                self._fleet,
                plan,
                recompute=recompute,
                timeout_s=settings.start_timeout_s,
                step_timeout_s=self._fleet.spec.silence_s,
            )
        except FleetError as error:
            _log.warning("plan %d did not come into force: %s", plan.epoch, error)
            dead_nodes = self._bury_the_dead()
            # Those of before are known to be lost.
            held = before & {stage.device_id for stage in self._fleet.plan.stages}
            failed = MoveFailed(
                at_s=self._now_s(),
                epoch=plan.epoch,
                reason=str(error),
                lost_device_ids=tuple(sorted(held - self._fleet.stages.keys())),
                stands_still=isinstance(error, StandingStillError),
            )
            return [*dead_nodes, failed]
        self._hooks.on_plan(plan, report)
        self._begin_window()
        return [
            MoveDone(
                at_s=self._now_s(),
                epoch=plan.epoch,
                pause_s=report.pause_s,
                moved_bytes=report.kv_bytes,
            )
        ]

    def _bury_the_dead(self) -> list[Event]:
        """Find out at once who is lost, and bury them; returns the nodes that are lost too."""
        nodes: dict[str, str] = {}
        while (loss := self._fleet.lost(0.0)) is not None:
            self._bury(loss.member, loss.reason)
            if loss.member.kind == "stage":
                nodes[self._node_of(loss.member)] = loss.reason
        now_s = self._now_s()
        gone: list[Event] = []
        for node, reason in nodes.items():
            if not self._hooks.is_node_alive(node):
                self._bury_node(node, reason)
                gone.append(NodeLost(at_s=now_s, node=node, reason=reason))
        return gone

    def _begin_window(self) -> None:
        self._window_began_s, self._before = self._now_s(), self._hooks.counters()
        self._running = []

    def _measured(self) -> StagesMeasured:
        """Return what the window that ends now has shown."""
        before, after, now_s = self._before, self._hooks.counters(), self._now_s()
        assert before is not None
        window_s = now_s - self._window_began_s
        stages = tuple(
            StageMeasurement(
                device_id=device_id,
                steps=_grown("steps", before, after, device_id),
                busy_s=_grown("busy_s", before, after, device_id),
                predicted_s=_grown("predicted_s", before, after, device_id),
            )
            for device_id in self._fleet.stages
            if device_id in after.stages
        )
        measured = StagesMeasured(
            at_s=now_s,
            epoch=self._fleet.plan.epoch,
            window_s=window_s,
            tokens_per_s=(after.tokens - before.tokens) / window_s,
            running=sum(self._running) / max(1, len(self._running)),
            stages=stages,
        )
        self._begin_window()
        return measured


def _grown(name: str, before: Counters, after: Counters, device_id: str) -> Any:
    """Return by how much a counter has grown; one of a new actor began at 0."""
    old = before.stages.get(device_id, {}).get(name, 0)
    new = after.stages[device_id].get(name, 0)
    return new - old if new >= old else new


def _words(command: Command) -> str:
    reason = getattr(command, "reason", "")
    epoch = getattr(command, "epoch", "")
    return f"{type(command).__name__} {epoch} {reason}".strip()
