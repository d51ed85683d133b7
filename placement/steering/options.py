"""What could be in force on the fleet as it is."""

from __future__ import annotations

from placement.errors import InfeasiblePlanError
from placement.stages import StagesPlan
from placement.steering.fleet import Fleet
from placement.steering.settings import ControllerSettings
from placement.steering.standing import Standing
from placement.steering.targets import Cut, Proposal, Targets, cut_of, devices_of
from placement.topology import Topology


class Options:
    """Plans over the devices that may be used; keeps nothing of its own."""

    def __init__(
        self, fleet: Fleet, targets: Targets, standing: Standing, settings: ControllerSettings
    ) -> None:
        self._fleet = fleet
        self._targets = targets
        self._standing = standing
        self._settings = settings

    def ground(self, now_s: float) -> tuple[Topology, StagesPlan]:
        """Return the devices to plan over and their best plan: the first choice that has one.

        Raises:
            InfeasiblePlanError: No choice has one; says what is short and who is not used, and why.
        """
        facts = ""
        for devices in self._fleet.choices(now_s):
            topology = self._fleet.topology(devices)
            if topology is None:
                continue
            try:
                return topology, self._targets.best(topology)
            except InfeasiblePlanError as error:
                facts = str(error)
        facts = facts or self._targets.needs_a_device()
        unused = self._fleet.unused(now_s)
        without = "; ".join(f"{device_id} is not used: {why}" for device_id, why in unused.items())
        raise InfeasiblePlanError(f"{facts} ({without})" if without else facts)

    def in_force_on(self, topology: Topology) -> StagesPlan | None:
        """Return the cut in force as it would do on some devices; None: it cannot be there."""
        in_force = self._standing.in_force
        return None if in_force is None else self._targets.priced(cut_of(in_force), topology)

    def possible(self, cut: Cut, now_s: float) -> StagesPlan | None:
        """Return a cut on the devices that may be used now; None: it is not possible there."""
        try:
            topology, _ = self.ground(now_s)
        except InfeasiblePlanError:
            return None
        return self._targets.priced(cut, topology)

    def mended(self, topology: Topology, best: StagesPlan, *, has_failed: bool) -> StagesPlan:
        """Return the cut in force, if it may stay and nothing is clearly better; or the best.

        `has_failed` says that the best was measured to fail lately.
        """
        now = self.in_force_on(topology)
        if now is not None:
            gain = self._targets.gain_fraction(now, best)
            if has_failed or gain < self._settings.min_gain_fraction:
                return now
        return self.in_place(best, topology)

    def in_place(self, best: StagesPlan, topology: Topology) -> StagesPlan:
        """Return a plan with its stages where most of their layers are."""
        standing = self._standing
        return self._targets.in_place(best, standing.in_force, standing.lost, topology)

    def proposal(self, now: StagesPlan, topology: Topology, running: float) -> Proposal:
        """Hold the best cut against the one in force, `now` as it does on the same devices."""
        factor, then = self._fleet.speeds.factor, self._standing.slowness
        changes = [factor(d.id) / then.get(d.id, 1.0) - 1.0 for d in topology.devices]
        changed = [change for change in changes if abs(change) > self._settings.jump_fraction]
        return self._targets.proposal(
            now, topology, running=running, may_halve=len(changed) == 1 and changed[0] > 0
        )

    def recomputes_kv(self, plan: StagesPlan, running: float) -> bool:
        """Whether the KV of what runs is computed again on the way from the plan in force."""
        in_force = self._standing.in_force
        topology = self._fleet.topology(self._fleet.present())
        if in_force is None or topology is None:
            return False
        return self._targets.recomputes_kv(in_force, plan, topology, running)

    def why_leave(self, topology: Topology, now_s: float) -> str:
        """Say why the cut in force cannot be on these devices."""
        usable = {device.id for device in topology.devices}
        leaving = sorted(devices_of(self._standing.in_force) - usable)
        why = [f"off {d}: {self._fleet.why_unused(d, now_s)}" for d in leaving]
        return "; ".join(why) or "the plan in force does not fit its devices any more"

    def drains(self, now_s: float) -> dict[str, str]:
        """Return how far every drain is, by node."""
        return {node: self._drain(node, now_s) for node in self._fleet.draining}

    def _drain(self, node: str, now_s: float) -> str:
        if node in self._fleet.released:
            return "released"
        if self._standing.pending is not None:
            return "layers move"
        topology = self._fleet.topology(next(self._fleet.choices(now_s)))
        if topology is None:
            return f"waits: {self._targets.needs_a_device()}"
        try:
            self._targets.best(topology)
        except InfeasiblePlanError as error:
            return f"waits: {error}"
        return "about to move"
