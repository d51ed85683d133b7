"""What is in force, what is moved to, and what of both is lost; who waits for which answer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from placement.stages import StagesPlan
from placement.steering.records import Records
from placement.steering.settings import ControllerSettings
from placement.steering.state import MoveRecord
from placement.steering.targets import Cut, Proposal, cut_of, devices_of
from placement.steering.trials import Load, doubled
from placement.steering.values import Command, Deploy, Halt, MoveDone, MoveLayers


@dataclass(frozen=True, kw_only=True, slots=True)
class Pending:
    """A plan command without an answer yet."""

    plan: StagesPlan
    since_s: float
    proposal: Proposal | None
    """Of a move for gain."""
    before: Load | None
    """Measured before it; None: nothing was, or it is not for gain."""
    slowness: Mapping[str, float]
    """Of every device when it was decided."""
    is_roll_back: bool = False
    hit: frozenset[str] = frozenset()
    """Devices that it needs and that were lost after the command."""


class Standing:
    """One plan is in force, and at most one is moved to."""

    def __init__(
        self, in_force: StagesPlan | None, last_epoch: int, settings: ControllerSettings
    ) -> None:
        self._settings = settings
        self.records = Records()
        self.in_force = in_force
        self.epoch = max(last_epoch, in_force.epoch if in_force else 0)
        """Of the last plan command."""
        self.slowness: Mapping[str, float] = {}
        """Of every device when the plan in force was decided; none: as profiled."""
        self.lost: set[str] = set()
        """Devices whose stage of the plan in force is lost."""
        self.pending: Pending | None = None
        self.is_unsure = False
        """A move had no answer, or ended half-way: what is in force may not be what is thought."""
        self.roll_back_to: Cut | None = None
        """What a roll-back that failed was to bring back."""
        self.halt_reason = ""
        self.retry_at_s = 0.0
        """Nothing is mended before."""
        self._num_failures = 0

    @property
    def nodes(self) -> set[str]:
        """The nodes that hold layers, or shall."""
        plans = (self.in_force, self.pending.plan if self.pending else None)
        return {stage.node for plan in plans if plan for stage in plan.stages}

    @property
    def devices(self) -> frozenset[str]:
        """The devices that hold layers, or shall."""
        moved_to = self.pending.plan if self.pending else None
        return devices_of(self.in_force) | devices_of(moved_to)

    def needs_mending(self) -> str:
        """Return why something has to be done at once; empty: nothing has."""
        if self.pending is not None:
            hit = ", ".join(sorted(self.pending.hit))
            return f"{hit} was lost, which the move needs" if hit else ""
        if self.in_force is None:
            return "nothing is deployed"
        if self.lost:
            return f"stages were lost on {', '.join(sorted(self.lost))}"
        if self.roll_back_to is not None:
            return "the cut before has to come back, and its move failed"
        return "a move ended half-way, or had no answer" if self.is_unsure else ""

    def lose(self, device_ids: Collection[str], now_s: float, *, at_once: bool) -> frozenset[str]:
        """Note lost stages; returns those that count. Not at once: the wait of a retry comes first.

        A device that keeps losing stages is not worth a hot loop.
        """
        lost = self.devices & frozenset(device_ids)
        if not lost:
            return lost
        if at_once:
            self.retry_at_s = now_s
        elif self.retry_at_s <= now_s:
            self.wait_to_retry(now_s)
        if self.pending is not None:
            self.pending = replace(self.pending, hit=self.pending.hit | lost)
        self.lost |= lost & devices_of(self.in_force)
        return lost

    def wait_to_retry(self, now_s: float) -> None:
        settings = self._settings
        wait_s = doubled(settings.retry_s, self._num_failures, settings.max_retry_s)
        self._num_failures += 1
        self.retry_at_s = now_s + wait_s

    def send(
        self,
        plan: StagesPlan,
        reason: str,
        now_s: float,
        *,
        slowness: Mapping[str, float],
        is_recovery: bool = False,
        is_roll_back: bool = False,
        recompute_kv: bool = False,
        proposal: Proposal | None = None,
        before: Load | None = None,
    ) -> Command:
        """Put a plan on its way, in place of one that is not done."""
        if self.pending is not None:
            self.records.end(self.epoch, "superseded")
        self.epoch += 1
        self.halt_reason, self.roll_back_to = "", None
        plan = replace(plan, epoch=self.epoch)
        self.pending = Pending(
            plan=plan,
            since_s=now_s,
            proposal=proposal,
            before=before,
            slowness=slowness,
            is_roll_back=is_roll_back,
        )
        self.records.add(
            MoveRecord(
                at_s=now_s,
                epoch=self.epoch,
                reason=reason,
                is_recovery=is_recovery,
                is_roll_back=is_roll_back,
                outcome="under way",
                predicted_gain=proposal.gain_fraction if proposal else None,
                predicted_pause_s=proposal.pause_s if proposal else None,
            )
        )
        if devices_of(self.in_force) <= self.lost:
            return Deploy(epoch=self.epoch, plan=plan, reason=reason)
        return MoveLayers(
            epoch=self.epoch,
            plan=plan,
            reason=reason,
            is_recovery=is_recovery,
            is_roll_back=is_roll_back,
            recompute_kv=recompute_kv,
        )

    def halt(self, reason: str) -> list[Command]:
        """Give up what is under way; says so once for every reason."""
        if self.pending is not None:
            self.records.end(self.epoch, "superseded")
            self.pending, self.is_unsure = None, True
        if reason == self.halt_reason:
            return []
        self.halt_reason = reason
        return [Halt(reason=reason)]

    def done(self, event: MoveDone) -> Pending | None:
        """Put in force what was moved to; None: the answer is of another epoch."""
        pending = self.pending
        if pending is None or event.epoch != self.epoch:
            return None
        self.in_force, self.pending = pending.plan, None
        self.slowness = pending.slowness
        self.lost = set(pending.hit & devices_of(pending.plan))
        self.is_unsure, self._num_failures = False, 0
        self.records.end(event.epoch, "done", pause_s=event.pause_s, moved_bytes=event.moved_bytes)
        return pending

    def fail(
        self, epoch: int, reason: str, now_s: float, *, stands_still: bool = False
    ) -> Pending | None:
        """Stay with what is in force, or where nothing is, bring it back; None: the answer is of
        another epoch.

        A move that was needed is tried again after a wait.
        """
        pending = self.pending
        if pending is None or epoch != self.epoch:
            return None
        self.pending = None
        self.records.end(epoch, "failed", verdict=reason)
        if pending.is_roll_back:
            self.roll_back_to = cut_of(pending.plan)
        self.is_unsure = self.is_unsure or stands_still
        if stands_still and not self._num_failures:
            self._num_failures, self.retry_at_s = 1, now_s
        elif stands_still or pending.proposal is None:
            self.wait_to_retry(now_s)
        return pending

    def expire(self, now_s: float) -> Pending | None:
        """Give up waiting for an answer after the deadline; None: there is time."""
        deadline_s = self._settings.move_deadline_s
        if self.pending is None or now_s - self.pending.since_s <= deadline_s:
            return None
        reason = f"no answer within move_deadline_s ({deadline_s:g})"
        expired = self.fail(self.epoch, reason, now_s)
        # Whether it came about is not known; the next command settles it.
        self.is_unsure, self.retry_at_s = True, now_s
        return expired
