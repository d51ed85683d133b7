"""What to plan next: the best cut of the fleet as it is, what it gains, and what the way costs."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from placement.costs import stage_kv_bytes, stage_weight_bytes
from placement.decode import ROUNDING, plan_decode
from placement.errors import InfeasiblePlanError
from placement.migrate import MigrationPlan, Outlook, migrate_stages
from placement.moving.cutover import KvState
from placement.moving.handout import (
    hand_out,
    interchangeable_groups,
    renamed_stages,
    renamings,
)
from placement.moving.moves import Piece
from placement.stages import StagesPlan, plan_stages
from placement.steering.settings import ControllerSettings
from placement.topology import Topology
from placement.workload import ModelProfile, ServingWorkload

Cut = tuple[tuple[str, int, int], ...]
"""(device id, first layer, end layer) of every stage: what a plan does, without its figures."""

_MOST_KEPT = 8


def cut_of(plan: StagesPlan) -> Cut:
    """Return which device runs which layers."""
    return tuple((s.device_id, s.first_layer, s.end_layer) for s in plan.stages)


def devices_of(plan: StagesPlan | None) -> frozenset[str]:
    """Return the devices that hold layers; none without a plan."""
    return frozenset(stage.device_id for stage in plan.stages) if plan else frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposal:
    """Another cut than the one in force, and whether it is worth the way there."""

    plan: StagesPlan
    gain_fraction: float
    """The old objective over the new, less 1."""
    pause_s: float | None
    """Predicted; None: the move cannot be priced."""
    is_worth_it: bool
    """It gains more than the way costs, and the way can be gone."""
    is_half: bool
    verdict: str


class Targets:
    """Plans for one model, one load and one set of knobs; remembers the last few answers."""

    def __init__(
        self, profile: ModelProfile, workload: ServingWorkload, settings: ControllerSettings
    ) -> None:
        self._profile = profile
        self._workload = workload
        self._settings = settings
        self._best: dict[Topology, StagesPlan | InfeasiblePlanError] = {}
        self._priced: dict[tuple[Cut, Topology], StagesPlan | None] = {}

    def best(self, topology: Topology) -> StagesPlan:
        """Return the best plan; raises InfeasiblePlanError as `plan_stages` does."""
        if topology not in self._best:
            _forget_oldest(self._best)
            self._best[topology] = self._plan(topology)
        answer = self._best[topology]
        if isinstance(answer, InfeasiblePlanError):
            raise InfeasiblePlanError(str(answer))
        return answer

    def _plan(self, topology: Topology) -> StagesPlan | InfeasiblePlanError:
        try:
            return plan_stages(
                self._profile,
                topology,
                workload=self._workload,
                headroom_fraction=self._settings.headroom_fraction,
                objective=self._settings.objective,
                device_order=self._settings.device_order,
            )
        except InfeasiblePlanError as error:
            return error

    def needs_a_device(self) -> str:
        """Say what a fleet without devices lacks."""
        profile, kv_tokens = self._profile, self._workload.kv_tokens
        weight_bytes = stage_weight_bytes(profile, 0, profile.num_layers)
        kv_bytes = stage_kv_bytes(profile, 0, profile.num_layers, kv_tokens)
        return (
            f"{profile.num_layers} layers need {weight_bytes + kv_bytes} bytes ({weight_bytes} of "
            f"weights, {kv_bytes} of KV for {kv_tokens} tokens) and 0 devices may be used; start a "
            f"node that joins, or cancel a drain"
        )

    def priced(self, cut: Cut, topology: Topology) -> StagesPlan | None:
        """Return what a cut would do on these devices; None: it is not possible there."""
        key = (cut, topology)
        if key not in self._priced:
            _forget_oldest(self._priced)
            self._priced[key] = self._price(cut, topology)
        return self._priced[key]

    def _price(
        self, cut: Cut, topology: Topology, workload: ServingWorkload | None = None
    ) -> StagesPlan | None:
        by_id = {device.id: device for device in topology.devices}
        if any(device_id not in by_id for device_id, _, _ in cut):
            return None
        devices = tuple(by_id[device_id] for device_id, _, _ in cut)
        try:
            plan = plan_stages(
                self._profile,
                replace(topology, devices=devices),
                workload=workload or self._workload,
                headroom_fraction=self._settings.headroom_fraction,
                objective=self._settings.objective,
                layer_counts=[end - first for _, first, end in cut],
            )
        except InfeasiblePlanError:
            return None
        left_out = tuple(
            (device.id, "the cut was given without it")
            for device in topology.devices
            if device not in devices
        )
        return replace(plan, device_order=self._settings.device_order, left_out=left_out)

    def in_place(
        self, plan: StagesPlan, old: StagesPlan | None, lost: Collection[str], topology: Topology
    ) -> StagesPlan:
        """Hand the plan's stages out among equal devices so that the fewest bytes move."""
        if old is None:
            return plan
        held = {device.id: frozenset[Piece]() for device in topology.devices}
        planned = dict(held)
        for pieces, stages in ((held, old.stages), (planned, plan.stages)):
            for stage in stages:
                if stage.device_id in pieces and not (pieces is held and stage.device_id in lost):
                    layers = range(stage.first_layer, stage.end_layer)
                    pieces[stage.device_id] = frozenset(
                        Piece(part="layer", layer=i) for i in layers
                    )
        piece_bytes = {
            Piece(part="layer", layer=index): layer.weight_bytes
            for index, layer in enumerate(self._profile.layers)
        }
        groups = interchangeable_groups(topology, None, {})
        renamed = renamings(hand_out(held, planned, groups, piece_bytes), None)
        return renamed_stages(plan, renamed, topology)

    def gain_fraction(self, old: StagesPlan, new: StagesPlan) -> float:
        return old.objective_value / new.objective_value - 1.0

    def proposal(
        self,
        now: StagesPlan,
        topology: Topology,
        *,
        running: float,
        may_halve: bool,
    ) -> Proposal:
        """Hold the best cut against the one in force, `now` as priced on the same topology.

        `running` sequences are in flight. `may_halve` says that one slowed device is all the
        evidence.
        """
        target, is_half = self.in_place(self.best(topology), now, (), topology), False
        if may_halve and self._settings.half_step:
            half = self._half_way(now, target, topology)
            target, is_half = half or target, half is not None
        gain = self.gain_fraction(now, target)
        if cut_of(target) == cut_of(now):
            return Proposal(
                plan=target,
                gain_fraction=0.0,
                pause_s=None,
                is_worth_it=False,
                is_half=False,
                verdict="the plan in force is the best there is",
            )
        change = f"{_shown(now)} becomes {_shown(target)} ({gain:+.1%})"
        if gain <= 0:
            return Proposal(
                plan=target,
                gain_fraction=gain,
                pause_s=None,
                is_worth_it=False,
                is_half=is_half,
                verdict=change,
            )
        try:
            way = self._way(now, target, topology, running)
        except InfeasiblePlanError as error:
            return Proposal(
                plan=target,
                gain_fraction=gain,
                pause_s=None,
                is_worth_it=False,
                is_half=is_half,
                verdict=f"{change}, but it cannot be moved to: {error}",
            )
        # Joules are not paid for in seconds: there the gain alone decides.
        pays = way.worth_it if self._settings.objective != "energy" else gain > 0
        return Proposal(
            plan=target,
            gain_fraction=gain,
            pause_s=way.pause_s,
            is_worth_it=pays,
            is_half=is_half,
            verdict=(
                f"{change}; {way.moved_bytes} bytes move, with a pause of {way.pause_s:.3g} s"
                + ("" if pays else f", which does not pay: {way.reason}")
            ),
        )

    def _way(
        self, old: StagesPlan, new: StagesPlan, topology: Topology, running: float
    ) -> MigrationPlan:
        workload, settings = self._workload, self._settings
        tokens = math.ceil(running * workload.context_tokens_per_sequence)
        old_step_s, new_step_s = (
            plan.latency_s if settings.objective == "latency" else plan.period_s
            for plan in (old, new)
        )
        return migrate_stages(
            old,
            new,
            self._profile,
            topology,
            kv=KvState(
                tokens_in_use=min(tokens, workload.kv_tokens),
                reserved_tokens=workload.kv_tokens,
                recompute_tokens_per_s=self._replay_tokens_per_s(new, topology),
            ),
            outlook=Outlook(
                old_step_s=old_step_s,
                new_step_s=new_step_s,
                steps=settings.horizon_s / old_step_s,
                slowdown_fraction=settings.slowdown_fraction,
            ),
            terms=settings.copy_terms,
            headroom_fraction=settings.headroom_fraction,
            activation_bytes=max(stage.activation_bytes for stage in (*old.stages, *new.stages)),
            interchangeable=(),
        )

    def recomputes_kv(
        self, old: StagesPlan, new: StagesPlan, topology: Topology, running: float
    ) -> bool:
        """Whether it is quicker to compute `running` sequences again than to ship their KV."""
        if running <= 0:
            return False
        try:
            return self._way(old, new, topology, running).kv_bytes == 0
        except InfeasiblePlanError:
            return False

    def _replay_tokens_per_s(self, plan: StagesPlan, topology: Topology) -> float | None:
        """Return the rate at which full steps of prompt tokens pass the stages of a plan."""
        rows = self._workload.step_tokens
        full = replace(self._workload, sequences_per_lane=rows)
        priced = self._price(cut_of(plan), topology, full)
        return None if priced is None else rows / priced.period_s

    def _half_way(
        self, now: StagesPlan, target: StagesPlan, topology: Topology
    ) -> StagesPlan | None:
        """Return the cut half the way, if it and what then remains each gain enough."""
        if [s.device_id for s in now.stages] != [s.device_id for s in target.stages]:
            return None
        ends = [
            old.end_layer + math.trunc((new.end_layer - old.end_layer) / 2)
            for old, new in zip(now.stages, target.stages, strict=True)
        ]
        firsts = [0, *ends[:-1]]
        if any(end <= first for first, end in zip(firsts, ends, strict=True)):
            return None
        cut = tuple(
            (stage.device_id, first, end)
            for stage, first, end in zip(now.stages, firsts, ends, strict=True)
        )
        half = self.priced(cut, topology)
        least = self._settings.min_gain_fraction
        if half is None or self.gain_fraction(now, half) < least:
            return None
        return half if self.gain_fraction(half, target) >= least else None

    def num_lanes(self, plan: StagesPlan, topology: Topology, current: int) -> tuple[int, str]:
        """Return how many lanes suit a plan, and why; the current number unless others gain."""
        settings, workload = self._settings, self._workload
        if settings.max_lanes is None:
            return current, "max_lanes is not set"
        try:
            decode = plan_decode(
                self._profile,
                topology,
                plan,
                sequences=workload.lanes * workload.sequences_per_lane,
                context_tokens_per_sequence=workload.context_tokens_per_sequence,
                block_tokens=settings.block_tokens,
                headroom_fraction=settings.headroom_fraction,
                max_lanes=settings.max_lanes,
                step_tokens=workload.step_tokens,
            )
        except InfeasiblePlanError as error:
            return current, str(error)
        # Every lane has room for the sequences of the settings, so there are no fewer of them.
        rates = {
            count.lanes: count.tokens_per_s
            for count in decode.alternatives
            if count.fits and count.lanes >= workload.lanes
        }
        if not rates:
            return current, f"no number from {workload.lanes} on fits"
        most = max(rates.values())
        best = min(lanes for lanes, rate in rates.items() if rate >= most * (1 - ROUNDING))
        known = rates.get(current)
        why = f"{best} lanes are predicted to give {rates[best]:.1f} tokens/s"
        if known is None:
            return best, f"{why}; {current} do not fit"
        if rates[best] / known - 1.0 < settings.min_gain_fraction:
            return current, f"{why}; {current} give {known:.1f}"
        return best, f"{why}; {current} give {known:.1f}"


def _forget_oldest(answers: dict[Any, Any]) -> None:
    while len(answers) >= _MOST_KEPT:
        del answers[next(iter(answers))]


def _shown(plan: StagesPlan) -> str:
    if plan.objective == "energy":
        return f"{plan.objective_value:.3g} J a token"
    return f"{plan.objective_value * 1e3:.3g} ms a step"
