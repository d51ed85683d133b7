"""The controller: events in, commands out. It decides which device runs which layers, and when.

The law, in order of urgency:

1. What is lost is planned for at once: layers without a holder, a move whose devices are gone, a
   move without an answer. The cut in force comes back where its devices may still be used and
   nothing is clearly better; the best one is taken elsewhere. Where nothing fits, it halts and says
   which bytes are short. A recovery that fails is tried again after a wait that doubles.
2. A node that drains is planned around at once, but never at the price of service.
3. A better cut is moved to when the gain is predicted in successive windows, pays for the way,
   comes after the cool-down, and was not measured to fail lately. Then it is on trial: the next
   windows, at comparable load, keep it or bring the old cut back.

One move is under way at a time; only a loss takes its place. Every plan command has the next
epoch, and answers or measurements of another epoch are void. Time is what events say. Equal events
give equal commands.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import assert_never

from placement.errors import InfeasiblePlanError
from placement.stages import StagesPlan
from placement.steering.fleet import Fleet
from placement.steering.records import Records
from placement.steering.settings import ControllerSettings
from placement.steering.state import ControllerState, MoveRecord, Outcome, Phase
from placement.steering.targets import Cut, Proposal, Targets, cut_of, devices_of
from placement.steering.trials import Backoffs, Conditions, Load, Trial, Verdict, doubled, load_of
from placement.steering.values import (
    ChangeLanes,
    Command,
    Deploy,
    DeviceLost,
    DrainCancelled,
    DrainRequested,
    Event,
    Halt,
    LinkMeasured,
    MoveDone,
    MoveFailed,
    MoveLayers,
    NodeJoined,
    NodeLost,
    PlanRequested,
    ReleaseNode,
    StagesMeasured,
    Tick,
)
from placement.topology import Topology
from placement.workload import ModelProfile, ServingWorkload

_HOUR_S = 3600.0
_NO_GAIN = 1e-6
"""Rounding, not a gain."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pending:
    """A plan command without an answer yet."""

    plan: StagesPlan
    since_s: float
    is_for_gain: bool
    is_half: bool = False
    before: Load | None = None
    slowness: tuple[tuple[str, float], ...] = ()
    """Of every device when it was decided."""
    hit: frozenset[str] = frozenset()
    """Devices that it needs and that were lost after the command."""


class Controller:
    """Steers one deployment; see the module.

    Args:
        profile: The model's cost figures.
        topology: The devices and links that are there at first.
        workload: The load that is planned for.
        settings: How eagerly to move.
        in_force: The plan that runs already; None: the first event is answered by a `Deploy`.
    """

    def __init__(
        self,
        profile: ModelProfile,
        topology: Topology,
        workload: ServingWorkload,
        settings: ControllerSettings | None = None,
        in_force: StagesPlan | None = None,
    ) -> None:
        self._settings = settings or ControllerSettings()
        self._fleet = Fleet(topology, self._settings)
        self._targets = Targets(profile, workload, self._settings)
        self._backoffs = Backoffs(self._settings)
        self._records = Records()
        self._num_lanes = workload.lanes
        self._now_s = 0.0

        self._in_force = in_force
        self._epoch = in_force.epoch if in_force else 0
        self._in_force_slowness: dict[str, float] = {}
        """Of every device when the plan in force was decided."""
        self._lost = {d for d in devices_of(in_force) if not self._fleet.has_device(d)}
        """Devices whose stage of the plan in force is lost."""
        self._pending: _Pending | None = None
        self._is_unsure = False
        """A move had no answer, so what is in force may not be what is thought."""
        self._halt_reason = ""
        self._num_failures = 0
        self._retry_at_s = 0.0

        self._trial: Trial | None = None
        self._num_rolled_back = 0
        """Trials in a row."""
        self._num_confirmed = 0
        self._cool_since_s: float | None = None
        self._gain_moves_s: deque[float] = deque()
        self._windows: deque[StagesMeasured] = deque(maxlen=self._settings.confirm_windows)
        """The last ones of the plan in force."""
        self._why_not = ""

    @property
    def state(self) -> ControllerState:
        """Return what a status page shows."""
        return ControllerState(
            plan=self._in_force,
            epoch=self._epoch,
            phase=self._phase,
            halt_reason=self._halt_reason,
            num_lanes=self._num_lanes,
            lost_devices=tuple(sorted(self._lost)),
            draining=self._fleet.draining,
            released=self._fleet.released,
            unused=self._fleet.unused(self._now_s),
            slowness=self._fleet.speeds.measured(),
            moves=self._records.all(),
            why_not=self._why_not,
        )

    @property
    def _phase(self) -> Phase:
        if self._halt_reason:
            return "halted"
        if self._pending is not None:
            return "moving"
        return "idle" if self._trial is None else "trial"

    @property
    def away(self) -> tuple[str, ...]:
        """Nodes that are lost and have not joined again."""
        return self._fleet.away

    def handle(self, event: Event) -> list[Command]:
        """Take in an event; returns what to do about it, in order."""
        # An event that comes late does not turn time back.
        self._now_s = max(self._now_s, event.at_s)
        commands = [*self._expire(), *self._take_in(event), *self._mend()]
        if isinstance(event, StagesMeasured | PlanRequested):
            commands += self._improve(is_requested=isinstance(event, PlanRequested))
        return commands + self._release()

    def what_if(self) -> tuple[StagesPlan | None, str]:
        """Return the plan that would be moved to now, and a verdict in words; changes nothing."""
        try:
            topology, best = self._ground()
        except InfeasiblePlanError as error:
            return None, f"no plan fits: {error}"
        now = self._priced_in_force(topology)
        if now is None or self._needs_mending() is not None:
            return best, "the plan in force cannot stay as it is; this one is for what is there"
        proposal = self._proposal(now, topology)
        if no_gain := self._no_gain(proposal, is_requested=True):
            return proposal.plan, f"would not move: {no_gain}"
        waits = self._no_gain(proposal, is_requested=False) or self._waits()
        by_itself = f"; by itself it waits: {waits}" if waits else ""
        return proposal.plan, f"would move: {proposal.verdict}{by_itself}"

    # What events change.

    def _take_in(self, event: Event) -> list[Command]:
        match event:
            case NodeJoined():
                self._join(event)
            case NodeLost():
                self._lose(self._fleet.lose_node(event.node, event.reason))
            case DeviceLost():
                self._lose_stages([event.device_id])
            case StagesMeasured():
                return self._measure(event)
            case LinkMeasured():
                self._fleet.set_link(event.to_link())
            case DrainRequested():
                if not self._fleet.drain(event.node):
                    self._why_not = f"cannot drain {event.node}: no such node is there"
            case DrainCancelled():
                self._fleet.cancel_drain(event.node)
            case MoveDone():
                return self._move_done(event)
            case MoveFailed():
                self._move_failed(event)
            case PlanRequested() | Tick():
                pass
            case _:
                assert_never(event)
        return []

    def _join(self, event: NodeJoined) -> None:
        self._fleet.join(event.node, event.devices, event.links)
        gone = {d for d in self._needed() if not self._fleet.has_device(d)}
        self._lose(gone)
        self._num_rolled_back = 0
        # What could not be done before may be possible now.
        self._retry_at_s = self._now_s

    def _needed(self) -> frozenset[str]:
        """Return the devices of the plan in force, and of the one that is moved to."""
        moved_to = self._pending.plan if self._pending else None
        return devices_of(self._in_force) | devices_of(moved_to)

    def _lose_stages(self, device_ids: Collection[str]) -> None:
        steady = [self._fleet.lose_stage(d, self._now_s) for d in sorted(device_ids)]
        self._lose(device_ids, at_once=all(steady))

    def _lose(self, device_ids: Collection[str], *, at_once: bool = True) -> None:
        """Note lost holders; a device that keeps losing stages is not worth a hot loop."""
        lost = self._needed() & set(device_ids)
        if not lost:
            return
        if at_once:
            self._retry_at_s = self._now_s
        elif self._retry_at_s <= self._now_s:
            self._wait_to_retry()
        if self._pending is not None:
            self._pending = replace(self._pending, hit=self._pending.hit | lost)
        if held := lost & devices_of(self._in_force):
            self._lost |= held
            self._drop_trial("not measured: a stage was lost")
        self._num_confirmed = 0

    def _move_done(self, event: MoveDone) -> list[Command]:
        pending = self._pending
        if pending is None or event.epoch != self._epoch:
            return []
        origin, self._in_force, self._pending = self._in_force, pending.plan, None
        self._in_force_slowness = dict(pending.slowness)
        self._lost = set(pending.hit & devices_of(pending.plan))
        self._is_unsure, self._num_failures = False, 0
        self._cool_since_s, self._num_confirmed, self._why_not = self._now_s, 0, ""
        self._windows.clear()
        if origin is not None and pending.before is not None and not self._lost:
            self._begin_trial(pending, cut_of(origin), pending.before)
        self._records.end(
            event.epoch,
            "done" if self._trial is None else "on trial",
            pause_s=event.pause_s,
            moved_bytes=event.moved_bytes,
        )
        return self._fit_lanes() if self._trial is None else []

    def _move_failed(self, event: MoveFailed) -> None:
        if self._pending is None or event.epoch != self._epoch:
            return
        self._fail(event.reason)
        self._lose_stages(event.lost_device_ids)

    def _fail(self, reason: str) -> None:
        pending = self._pending
        assert pending is not None
        self._pending = None
        self._records.end(self._epoch, "failed", verdict=reason)
        self._why_not = f"the move to epoch {self._epoch} failed: {reason}"
        if pending.is_for_gain:
            self._backoffs.fail(cut_of(pending.plan), self._now_s)
        else:
            self._wait_to_retry()

    def _wait_to_retry(self) -> None:
        settings = self._settings
        wait_s = doubled(settings.retry_s, self._num_failures, settings.max_retry_s)
        self._num_failures += 1
        self._retry_at_s = self._now_s + wait_s

    def _expire(self) -> list[Command]:
        """Give up waiting for what should have been over."""
        pending, deadline_s = self._pending, self._settings.move_deadline_s
        if pending is not None and self._now_s - pending.since_s > deadline_s:
            self._fail(f"no answer within move_deadline_s ({deadline_s:g})")
            # Whether it came about is not known; the next command settles it.
            self._is_unsure, self._retry_at_s = True, self._now_s
        if self._trial is not None and (verdict := self._trial.overdue(self._now_s)):
            return self._end_trial(self._trial, verdict)
        return []

    # Measurements and trials.

    def _measure(self, window: StagesMeasured) -> list[Command]:
        if self._in_force is None or window.epoch != self._in_force.epoch:
            return []
        for measurement in window.stages:
            self._fleet.speeds.observe(measurement)
        self._windows.append(window)
        trial = self._trial
        if trial is None or self._pending is not None:
            return []
        verdict = trial.observe(window, self._conditions(trial.origin, trial.tried))
        return [] if verdict is None else self._end_trial(trial, verdict)

    def _begin_trial(self, pending: _Pending, origin: Cut, before: Load) -> None:
        tried = cut_of(pending.plan)
        self._trial = Trial(
            self._settings,
            origin=origin,
            tried=tried,
            epoch=pending.plan.epoch,
            since_s=self._now_s,
            before=before,
            conditions=self._conditions(origin, tried),
            is_half=pending.is_half,
        )

    def _drop_trial(self, why: str) -> None:
        if self._trial is not None:
            self._records.end(self._trial.epoch, "done", verdict=why)
            self._trial = None

    def _conditions(self, origin: Cut, tried: Cut) -> Conditions:
        same = sorted(set(origin) & set(tried))
        factor = self._fleet.speeds.factor
        return Conditions(slowness=tuple((d, factor(d)) for d, _, _ in same))

    def _end_trial(self, trial: Trial, verdict: Verdict) -> list[Command]:
        self._trial = None
        outcome: Outcome = "kept" if verdict.keeps else "rolled back"
        self._records.end(
            trial.epoch, outcome, verdict=verdict.reason, measured_gain=verdict.measured_gain
        )
        if not verdict.keeps:
            return self._roll_back(trial, verdict.reason)
        self._num_rolled_back = 0
        if trial.is_half:
            # What was measured of the first half speaks for the second.
            self._cool_since_s = None
            self._num_confirmed = self._settings.confirm_windows - 1
        return self._fit_lanes()

    def _roll_back(self, trial: Trial, reason: str) -> list[Command]:
        self._backoffs.fail(trial.tried, self._now_s)
        self._num_rolled_back += 1
        self._why_not = f"epoch {trial.epoch} was {reason}"
        try:
            topology, _ = self._ground()
        except InfeasiblePlanError as error:
            self._why_not += f"; no plan fits: {error}"
            return []
        plan = self._targets.priced(trial.origin, topology)
        if plan is None:
            self._why_not += "; the cut before is not possible any more"
            return []
        return [self._send(plan, reason, is_roll_back=True)]

    def _fit_lanes(self) -> list[Command]:
        topology = self._fleet.topology(self._fleet.present())
        if self._in_force is None or self._lost or topology is None:
            return []
        if not all(map(self._fleet.has_device, devices_of(self._in_force))):
            return []
        num_lanes, reason = self._targets.num_lanes(self._in_force, topology, self._num_lanes)
        if num_lanes == self._num_lanes:
            return []
        self._num_lanes = num_lanes
        self._windows.clear()
        return [ChangeLanes(num_lanes=num_lanes, reason=reason)]

    # Decisions.

    def _ground(self) -> tuple[Topology, StagesPlan]:
        """Return the devices to plan over and their best plan: the first choice that has one."""
        error: InfeasiblePlanError | None = None
        for devices in self._fleet.choices(self._now_s):
            topology = self._fleet.topology(devices)
            if topology is None:
                continue
            try:
                return topology, self._targets.best(topology)
            except InfeasiblePlanError as shortfall:
                error = shortfall
        unused = self._fleet.unused(self._now_s)
        without = "; ".join(f"without {device_id}: {why}" for device_id, why in unused.items())
        facts = str(error) if error else self._targets.needs_a_device()
        raise InfeasiblePlanError(f"{facts} ({without})" if without else facts)

    def _priced_in_force(self, topology: Topology) -> StagesPlan | None:
        return self._targets.priced(cut_of(self._in_force), topology) if self._in_force else None

    def _needs_mending(self) -> str | None:
        """Return why something has to be done at once; None: nothing has."""
        if self._pending is not None:
            hit = ", ".join(sorted(self._pending.hit))
            return f"{hit} was lost, which the move needs" if hit else None
        if self._in_force is None:
            return "nothing is deployed"
        if self._lost:
            return f"stages were lost on {', '.join(sorted(self._lost))}"
        return "a move had no answer" if self._is_unsure else None

    def _mend(self) -> list[Command]:
        """Act on losses, then on drains; both without waiting for windows."""
        reason = self._needs_mending()
        if self._pending is not None and reason is None:
            return []
        if self._now_s < self._retry_at_s:
            if reason is not None:
                self._why_not = f"{reason}; tried again in {self._retry_at_s - self._now_s:.3g} s"
            return []
        try:
            topology, best = self._ground()
        except InfeasiblePlanError as error:
            return self._halt(str(error)) if reason is not None else []
        if reason is not None:
            return [self._send(self._mended(topology, best), reason, is_recovery=True)]
        return self._make_way(topology, best)

    def _mended(self, topology: Topology, best: StagesPlan) -> StagesPlan:
        """Return the cut in force, if it may stay and nothing is clearly better; or the best."""
        now = self._priced_in_force(topology)
        if now is not None:
            gain = self._targets.gain_fraction(now, best)
            failed = self._backoffs.left_s(cut_of(best), self._now_s) > 0
            if failed or gain < self._settings.min_gain_fraction:
                return now
        return self._targets.in_place(best, self._in_force, self._lost, topology)

    def _halt(self, reason: str) -> list[Command]:
        if self._pending is not None:
            self._records.end(self._epoch, "superseded")
            self._pending, self._is_unsure = None, True
        if reason == self._halt_reason:
            return []
        self._halt_reason = self._why_not = reason
        return [Halt(reason=reason)]

    def _make_way(self, topology: Topology, best: StagesPlan) -> list[Command]:
        """Move off devices that are not to be used, and onto ones that fit."""
        now = self._priced_in_force(topology)
        if now is not None:
            return []
        usable = {device.id for device in topology.devices}
        leaving = sorted(devices_of(self._in_force) - usable)
        why = [f"{d}: {self._fleet.why_unused(d, self._now_s)}" for d in leaving]
        reason = "; ".join(why) or "the plan in force does not fit its devices any more"
        plan = self._targets.in_place(best, self._in_force, (), topology)
        return [self._send(plan, reason)]

    def _improve(self, *, is_requested: bool) -> list[Command]:
        """Move to a better cut, if there is one and nothing holds it back."""
        if self._pending is not None or self._in_force is None or self._halt_reason:
            if is_requested:
                self._why_not = "a move is under way" if self._pending else "nothing is in force"
            return []
        if self._needs_mending() is not None or (self._trial and not is_requested):
            return []
        if not (is_requested or self._settings.moves_for_gain):
            return []
        topology, _ = self._ground()
        now = self._priced_in_force(topology)
        if now is None:
            return []
        proposal = self._proposal(now, topology)
        no_gain = self._no_gain(proposal, is_requested=is_requested)
        self._num_confirmed = 0 if no_gain else self._num_confirmed + 1
        self._why_not = no_gain or ("" if is_requested else self._waits())
        if self._why_not:
            return []
        if not is_requested:
            self._gain_moves_s.append(self._now_s)
        return [self._send(proposal.plan, proposal.verdict, proposal=proposal)]

    def _proposal(self, now: StagesPlan, topology: Topology) -> Proposal:
        load = load_of(self._windows)
        jump = self._settings.jump_fraction
        changes = [
            self._fleet.speeds.factor(device.id) / self._in_force_slowness.get(device.id, 1.0) - 1.0
            for device in topology.devices
        ]
        changed = [change for change in changes if abs(change) > jump]
        return self._targets.proposal(
            now,
            topology,
            running=load.running if load else 0.0,
            may_halve=len(changed) == 1 and changed[0] > 0,
        )

    def _no_gain(self, proposal: Proposal, *, is_requested: bool) -> str:
        """Say why a proposal is not worth a move; empty: it is."""
        least = 0.0 if is_requested else self._settings.min_gain_fraction
        if proposal.gain_fraction <= _NO_GAIN or proposal.gain_fraction < least:
            return f"{proposal.verdict}; min_gain_fraction is {least:g}"
        if not proposal.is_worth_it:
            return proposal.verdict
        left_s = self._backoffs.left_s(cut_of(proposal.plan), self._now_s)
        if left_s:
            return f"{proposal.verdict}; this cut failed and is not tried again for {left_s:.3g} s"
        return ""

    def _waits(self) -> str:
        """Say what holds back a move that gains; empty: nothing does."""
        settings = self._settings
        if self._num_confirmed < settings.confirm_windows:
            return (
                f"a gain was seen in {self._num_confirmed} of confirm_windows "
                f"({settings.confirm_windows}) windows"
            )
        if self._cool_since_s is not None:
            cool_s = settings.cool_down_s * 2.0 ** min(self._num_rolled_back, 6)
            left_s = cool_s - (self._now_s - self._cool_since_s)
            if left_s > 0:
                return f"a gain waits for the cool-down of {cool_s:g} s, {left_s:.3g} s more"
        while self._gain_moves_s and self._now_s - self._gain_moves_s[0] >= _HOUR_S:
            self._gain_moves_s.popleft()
        if len(self._gain_moves_s) >= settings.max_moves_per_hour:
            return f"max_moves_per_hour ({settings.max_moves_per_hour}) moves were made"
        return ""

    def _send(
        self,
        plan: StagesPlan,
        reason: str,
        *,
        is_recovery: bool = False,
        is_roll_back: bool = False,
        proposal: Proposal | None = None,
    ) -> Command:
        """Put a plan on its way, in place of one that is not done."""
        if self._pending is not None:
            self._records.end(self._epoch, "superseded")
        self._drop_trial("not measured: another move came first")
        self._epoch += 1
        plan = replace(plan, epoch=self._epoch)
        before = load_of(self._windows)
        self._pending = _Pending(
            plan=plan,
            since_s=self._now_s,
            is_for_gain=proposal is not None,
            is_half=proposal is not None and proposal.is_half,
            before=before if proposal and before and before.tokens_per_s else None,
            slowness=tuple(self._fleet.factors().items()),
        )
        self._records.add(
            MoveRecord(
                at_s=self._now_s,
                epoch=self._epoch,
                reason=reason,
                is_recovery=is_recovery,
                is_roll_back=is_roll_back,
                outcome="under way",
                predicted_gain=proposal.gain_fraction if proposal else None,
                predicted_pause_s=proposal.pause_s if proposal else None,
            )
        )
        self._halt_reason, self._num_confirmed = "", 0
        if devices_of(self._in_force) <= self._lost:
            return Deploy(epoch=self._epoch, plan=plan, reason=reason)
        return MoveLayers(
            epoch=self._epoch,
            plan=plan,
            reason=reason,
            is_recovery=is_recovery,
            is_roll_back=is_roll_back,
        )

    def _release(self) -> list[Command]:
        """Let go of nodes that drain and hold nothing, once that is certain."""
        if self._is_unsure:
            return []
        plans = (self._in_force, self._pending.plan if self._pending else None)
        holding = {stage.node for plan in plans if plan for stage in plan.stages}
        free = set(self._fleet.draining) - set(self._fleet.released) - holding
        for node in sorted(free):
            self._fleet.release(node)
        return [ReleaseNode(node=node) for node in sorted(free)]
