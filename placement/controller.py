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
from typing import assert_never

from placement.errors import InfeasiblePlanError
from placement.stages import StagesPlan
from placement.steering.fleet import Fleet
from placement.steering.options import Options
from placement.steering.patience import Patience
from placement.steering.settings import ControllerSettings
from placement.steering.standing import Pending, Standing
from placement.steering.state import ControllerState, Outcome, Phase
from placement.steering.targets import Cut, Proposal, Targets, cut_of, devices_of
from placement.steering.trials import Conditions, Load, Trial, Verdict, load_of
from placement.steering.values import (
    ChangeLanes,
    Command,
    DeviceLost,
    DrainCancelled,
    DrainRequested,
    Event,
    LanesChanged,
    LinkMeasured,
    MoveDone,
    MoveFailed,
    NodeJoined,
    NodeLost,
    PlanRequested,
    ReleaseNode,
    StagesMeasured,
    Tick,
)
from placement.topology import Topology
from placement.workload import ModelProfile, ServingWorkload

_FleetEvent = NodeJoined | NodeLost | DeviceLost | LinkMeasured | DrainRequested | DrainCancelled


class Controller:
    """Steers one deployment; see the module.

    Args:
        profile: The model's cost figures.
        topology: The devices and links that are there at first.
        workload: The load that is planned for.
        settings: How eagerly to move.
        in_force: The plan that runs already; None: the first event is answered by a `Deploy`.
        last_epoch: The last epoch that a controller before this one gave; 0: there was none.
    """

    def __init__(
        self,
        profile: ModelProfile,
        topology: Topology,
        workload: ServingWorkload,
        settings: ControllerSettings | None = None,
        in_force: StagesPlan | None = None,
        last_epoch: int = 0,
    ) -> None:
        self._settings = settings or ControllerSettings()
        self._fleet = Fleet(topology, self._settings)
        self._targets = Targets(profile, workload, self._settings)
        self._standing = Standing(in_force, last_epoch, self._settings)
        self._options = Options(self._fleet, self._targets, self._standing, self._settings)
        self._patience = Patience(self._settings)
        self._trial: Trial | None = None
        self._windows: deque[StagesMeasured] = deque(maxlen=self._settings.confirm_windows)
        """The last ones of the plan in force."""
        self._num_lanes = workload.lanes
        self._has_fitted_lanes = False
        self._now_s = 0.0
        self._why_not = ""
        self._lose({d for d in devices_of(in_force) if not self._fleet.has_device(d)})

    @property
    def state(self) -> ControllerState:
        """Return what a status page shows."""
        standing = self._standing
        return ControllerState(
            plan=standing.in_force,
            epoch=standing.epoch,
            phase=self._phase,
            halt_reason=standing.halt_reason,
            num_lanes=self._num_lanes,
            lost_devices=tuple(sorted(standing.lost)),
            drains=self._options.drains(self._now_s),
            unused=self._fleet.unused(self._now_s),
            slowness=self._fleet.speeds.measured(),
            moves=standing.records.all(),
            why_not=self._why_not,
        )

    @property
    def _phase(self) -> Phase:
        if self._standing.halt_reason:
            return "halted"
        if self._standing.pending is not None:
            return "moving"
        return "idle" if self._trial is None else "trial"

    @property
    def _running(self) -> float:
        load = load_of(self._windows)
        return load.running if load else 0.0

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
            is_requested = isinstance(event, PlanRequested)
            commands += self._improve(is_requested=is_requested)
            looks_at_lanes = is_requested or not self._has_fitted_lanes
            if not commands and self._trial is None and looks_at_lanes:
                commands += self._fit_lanes()
        return commands + self._release()

    def what_if(self) -> tuple[StagesPlan | None, str]:
        """Return the plan that would be moved to now, and a verdict in words; changes nothing."""
        try:
            topology, best = self._options.ground(self._now_s)
        except InfeasiblePlanError as error:
            return None, f"no plan fits: {error}"
        now = self._options.in_force_on(topology)
        if now is None or self._standing.needs_mending():
            return best, "the plan in force cannot stay as it is; this one is for what is there"
        if (pending := self._standing.pending) is not None:
            return pending.plan, f"a move to epoch {pending.plan.epoch} is under way"
        proposal = self._options.proposal(now, topology, self._running)
        if no_gain := self._patience.no_gain(proposal, self._now_s, is_requested=True):
            return proposal.plan, f"would not move: {no_gain}"
        waits = self._patience.no_gain(proposal, self._now_s, is_requested=False)
        if waits or (waits := self._patience.waits(self._now_s)):
            waits = f"; by itself it waits: {waits.removeprefix(proposal.verdict).strip('; ')}"
        return proposal.plan, f"would move: {proposal.verdict}{waits}"

    # What events change.

    def _take_in(self, event: Event) -> list[Command]:
        match event:
            case StagesMeasured():
                return self._measure(event)
            case MoveDone():
                return self._move_done(event)
            case MoveFailed():
                self._move_failed(event)
            case LanesChanged():
                self._num_lanes = event.num_lanes
            case PlanRequested() | Tick():
                pass
            case _:
                self._fleet_changed(event)
        return []

    def _fleet_changed(self, event: _FleetEvent) -> None:
        fleet = self._fleet
        match event:
            case NodeJoined():
                self._join(event)
            case NodeLost():
                self._lose(fleet.lose_node(event.node, event.reason))
            case DeviceLost():
                self._lose_stages([event.device_id])
            case LinkMeasured():
                fleet.set_link(event.to_link())
                # What is measured from now on is not the move alone.
                self._drop_trial("not measured: a link changed")
            case DrainRequested():
                if not fleet.drain(event.node):
                    self._why_not = f"cannot drain {event.node}: no such node is there"
            case DrainCancelled():
                fleet.cancel_drain(event.node)
            case _:
                assert_never(event)

    def _join(self, event: NodeJoined) -> None:
        self._fleet.join(event.node, event.devices, event.links)
        self._lose({d for d in self._standing.devices if not self._fleet.has_device(d)})
        self._patience.joined()
        # What could not be done before may be possible now.
        self._standing.retry_at_s = self._now_s

    def _lose_stages(self, device_ids: Collection[str]) -> None:
        steady = [self._fleet.lose_stage(d, self._now_s) for d in sorted(device_ids)]
        self._lose(device_ids, at_once=all(steady))

    def _lose(self, device_ids: Collection[str], *, at_once: bool = True) -> None:
        if self._standing.lose(device_ids, self._now_s, at_once=at_once):
            self._patience.disturbed()
            self._drop_trial("not measured: a stage was lost")

    def _move_done(self, event: MoveDone) -> list[Command]:
        origin = self._standing.in_force
        done = self._standing.done(event)
        if done is None:
            return []
        self._patience.moved(self._now_s)
        self._windows.clear()
        self._why_not = ""
        if origin is None or done.before is None or self._standing.lost:
            return self._fit_lanes()
        self._begin_trial(done, cut_of(origin), done.before)
        return []

    def _move_failed(self, event: MoveFailed) -> None:
        failed = self._standing.fail(
            event.epoch, event.reason, self._now_s, stands_still=event.stands_still
        )
        if failed is None:
            return
        self._back_off(failed, event.reason)
        self._lose_stages(event.lost_device_ids)

    def _back_off(self, failed: Pending, reason: str) -> None:
        self._why_not = f"the move to epoch {failed.plan.epoch} failed: {reason}"
        if failed.proposal is not None:
            self._patience.failed(cut_of(failed.plan), self._now_s)

    def _expire(self) -> list[Command]:
        """Give up waiting for what should have been over."""
        if expired := self._standing.expire(self._now_s):
            self._back_off(expired, "it had no answer")
        if self._trial is not None and (verdict := self._trial.overdue(self._now_s)):
            return self._end_trial(self._trial, verdict)
        return []

    # Measurements and trials.

    def _measure(self, window: StagesMeasured) -> list[Command]:
        in_force = self._standing.in_force
        if in_force is None or window.epoch != in_force.epoch:
            return []
        for measurement in window.stages:
            self._fleet.speeds.observe(measurement, self._now_s)
        self._fleet.speeds.forgive(self._fleet.ids - self._standing.devices, self._now_s)
        self._windows.append(window)
        if (trial := self._trial) is None:
            return []
        verdict = trial.observe(window, self._conditions(trial.origin, trial.tried))
        return [] if verdict is None else self._end_trial(trial, verdict)

    def _begin_trial(self, done: Pending, origin: Cut, before: Load) -> None:
        tried = cut_of(done.plan)
        self._trial = Trial(
            self._settings,
            origin=origin,
            tried=tried,
            epoch=done.plan.epoch,
            since_s=self._now_s,
            before=before,
            conditions=self._conditions(origin, tried),
            is_half=done.proposal is not None and done.proposal.is_half,
        )
        self._standing.records.end(done.plan.epoch, "on trial")

    def _drop_trial(self, why: str) -> None:
        if self._trial is not None:
            self._standing.records.end(self._trial.epoch, "done", verdict=why)
            self._trial = None

    def _conditions(self, origin: Cut, tried: Cut) -> Conditions:
        factor = self._fleet.speeds.factor
        same = sorted(set(origin) & set(tried))
        return Conditions(slowness=tuple((d, factor(d)) for d, _, _ in same))

    def _end_trial(self, trial: Trial, verdict: Verdict) -> list[Command]:
        self._trial = None
        outcome: Outcome = "kept" if verdict.keeps else "rolled back"
        self._standing.records.end(
            trial.epoch, outcome, verdict=verdict.reason, measured_gain=verdict.measured_gain
        )
        if verdict.keeps:
            self._patience.kept(is_half=trial.is_half)
            return self._fit_lanes()
        self._patience.rolled_back(trial.tried, self._now_s)
        self._why_not = f"epoch {trial.epoch} was {verdict.reason}"
        plan = self._options.possible(trial.origin, self._now_s)
        if plan is None:
            self._why_not += "; the cut before is not possible any more"
            return []
        return [self._send(plan, verdict.reason, is_roll_back=True)]

    def _fit_lanes(self) -> list[Command]:
        """Ask for another number of lanes, once the plan in force is there to stay."""
        plan, topology = self._standing.in_force, self._fleet.topology(self._fleet.present())
        if plan is None or self._standing.needs_mending() or topology is None:
            return []
        self._has_fitted_lanes = True
        num_lanes, reason = self._targets.num_lanes(plan, topology, self._num_lanes)
        if num_lanes == self._num_lanes:
            return []
        self._windows.clear()
        return [ChangeLanes(num_lanes=num_lanes, reason=reason)]

    # Decisions.

    def _mend(self) -> list[Command]:
        """Act on losses, then on drains; both without waiting for windows."""
        standing = self._standing
        reason = standing.needs_mending()
        if standing.pending is not None and not reason:
            return []
        if self._now_s < standing.retry_at_s:
            if reason:
                left_s = standing.retry_at_s - self._now_s
                self._why_not = f"{reason}; tried again in {left_s:.3g} s"
            return []
        try:
            topology, best = self._options.ground(self._now_s)
        except InfeasiblePlanError as error:
            return self._halt(str(error)) if reason else []
        if reason:
            return [self._recover(topology, best, reason)]
        return self._make_way(topology, best)

    def _recover(self, topology: Topology, best: StagesPlan, reason: str) -> Command:
        if wanted := self._standing.roll_back_to:
            plan = self._targets.priced(wanted, topology)
            if plan is not None:
                is_recovery = bool(self._standing.lost) or self._standing.is_unsure
                return self._send(plan, reason, is_recovery=is_recovery, is_roll_back=True)
        has_failed = self._patience.backoff_s(cut_of(best), self._now_s) > 0
        plan = self._options.mended(topology, best, has_failed=has_failed)
        return self._send(plan, reason, is_recovery=self._standing.in_force is not None)

    def _halt(self, reason: str) -> list[Command]:
        self._why_not = reason
        self._drop_trial("not measured: serving halted")
        return self._standing.halt(reason)

    def _make_way(self, topology: Topology, best: StagesPlan) -> list[Command]:
        """Move off devices that are not to be used, or that their stages do not fit any more."""
        if self._options.in_force_on(topology) is not None:
            return []
        reason = self._options.why_leave(topology, self._now_s)
        return [self._send(self._options.in_place(best, topology), reason)]

    def _improve(self, *, is_requested: bool) -> list[Command]:
        """Move to a better cut, if there is one and nothing holds it back."""
        standing = self._standing
        if standing.pending is not None or standing.needs_mending():
            if is_requested:
                self._why_not = standing.needs_mending() or "a move is under way"
            return []
        if not is_requested and (self._trial is not None or not self._settings.moves_for_gain):
            return []
        proposal = self._next_proposal()
        if proposal is None:
            return []
        no_gain = self._patience.no_gain(proposal, self._now_s, is_requested=is_requested)
        if is_requested:
            self._why_not = no_gain
        else:
            self._patience.confirm(gains=not no_gain)
            self._why_not = no_gain or self._patience.waits(self._now_s)
        if self._why_not:
            return []
        if not is_requested:
            self._patience.begin(self._now_s)
        return [self._send(proposal.plan, proposal.verdict, proposal=proposal)]

    def _next_proposal(self) -> Proposal | None:
        """Return what could be better than the plan in force; None: that fits nothing here."""
        try:
            topology, _ = self._options.ground(self._now_s)
        except InfeasiblePlanError as error:
            self._why_not = str(error)
            return None
        now = self._options.in_force_on(topology)
        return None if now is None else self._options.proposal(now, topology, self._running)

    def _send(
        self,
        plan: StagesPlan,
        reason: str,
        *,
        is_recovery: bool = False,
        is_roll_back: bool = False,
        proposal: Proposal | None = None,
    ) -> Command:
        before = load_of(self._windows) if proposal is not None else None
        self._drop_trial("not measured: another move came first")
        self._patience.disturbed()
        return self._standing.send(
            plan,
            reason,
            self._now_s,
            slowness=self._fleet.factors(),
            is_recovery=is_recovery,
            is_roll_back=is_roll_back,
            recompute_kv=is_recovery or self._options.recomputes_kv(plan, self._running),
            proposal=proposal,
            before=before if before is not None and before.tokens_per_s > 0 else None,
        )

    def _release(self) -> list[Command]:
        """Let go of nodes that drain and hold nothing, once that is certain."""
        if self._standing.is_unsure:
            return []
        draining = set(self._fleet.draining) - set(self._fleet.released)
        free = sorted(draining - self._standing.nodes)
        for node in free:
            self._fleet.release(node)
        return [ReleaseNode(node=node) for node in free]
