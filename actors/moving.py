"""Leads a fleet from the plan in force to the next while its lanes go on.

The receivers load what they lack beside the steps, from the checkpoint. Then lane by lane: it is
held between two steps, the KV of layers that change their holder is copied, and it goes on with the
stages of the new epoch. Other lanes serve meanwhile, on the old epoch or the new one. When a holder
was lost there is no KV to copy: stages drop everything old, and the lanes run their sequences again
from their tokens, which draws the same ones.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from actors.fleet import Fleet
from actors.hosting import FleetError, MemberLostError
from actors.losses import Member, cause_of
from placement.moving.transit import tight_devices
from placement.stages import StagesPlan

_log = logging.getLogger(__name__)
_UNDO_TIMEOUT_S = 10.0
_HOLD_PATIENCE_S = 1.0
_LATE = "did not answer in time"


class StandingStillError(FleetError):
    """A move failed when the plan before could not come back: the lanes wait for another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MoveReport:
    """What a move cost."""

    pause_s: float
    """The longest time that a lane stood still."""
    kv_bytes: int
    load_s: float
    """Until the receivers had their weights; lanes served meanwhile."""
    total_s: float


def move(
    fleet: Fleet,
    plan: StagesPlan,
    *,
    recompute: bool,
    timeout_s: float,
    step_timeout_s: float,
) -> MoveReport:
    """Put another plan, with an epoch of its own, in force.

    Args:
        fleet: Without the members that are lost.
        recompute: Lanes run their sequences again instead of taking KV along; the only way when a
            holder is lost, and then steps under way have no answer. Also where a device's memory
            cannot hold what it has and what it gets at once; the lanes stand still meanwhile.
        timeout_s: For loading weights.
        step_timeout_s: For a step to come back.

    Raises:
        StandingStillError: It could not be done, and no plan is in force.
        FleetError: It could not be done. The plan before is in force where its stages are alive;
            those that had let go of layers are not.
    """
    began_s = time.monotonic()
    deadline_s = began_s + timeout_s
    limits = fleet.spec.limits
    kv_tokens = limits.num_blocks * limits.block_tokens * fleet.spec.max_lanes
    tight = [
        device_id
        for device_id in tight_devices(fleet.plan, plan, fleet.spec.profile, kv_tokens=kv_tokens)
        if device_id in fleet.stages
    ]
    if tight:
        recompute = True
        stand_still(fleet, timeout_s=_UNDO_TIMEOUT_S)
        _let_go(fleet, plan, tight, deadline_s)
    new = _load(fleet, plan, deadline_s, tight)
    loaded_s = time.monotonic()
    switched: list[Member] = []
    try:
        fleet.connect(plan, deadline_s)
        if recompute:
            everyone = list(fleet.stages.values())
            calls = [stage.actor.fence.remote(plan.epoch) for stage in everyone]
            fleet.wait_for(everyone, calls, time.monotonic() + step_timeout_s, _LATE)
        kv_bytes, pause_s = 0, 0.0
        # Lanes that may hang come last: others go on meanwhile.
        for lane in sorted(fleet.lanes.values(), key=fleet.is_quiet):
            switched.append(lane)
            try:
                lane_bytes, lane_s = _switch(fleet, plan, lane, recompute, step_timeout_s)
            except MemberLostError as error:
                if error.member is not lane:
                    raise
                continue  # another takes its place, on the new plan
            kv_bytes, pause_s = kv_bytes + lane_bytes, max(pause_s, lane_s)
    except FleetError as error:
        dead = [error.member] if isinstance(error, MemberLostError) else []
        goes_on = _undo(fleet, plan, switched, new, dead, is_fenced=recompute)
        _bury(fleet, tight)
        if not goes_on:
            raise StandingStillError(str(error)) from error
        raise
    fleet.plan, fleet.stands_still = plan, False
    _retire(fleet, plan)
    fleet.watch(new)
    now_s = time.monotonic()
    return MoveReport(
        pause_s=pause_s, kv_bytes=kv_bytes, load_s=loaded_s - began_s, total_s=now_s - began_s
    )


def stand_still(fleet: Fleet, *, timeout_s: float = _HOLD_PATIENCE_S) -> None:
    """Hold all lanes, whose steps have no answer: a stage is lost. `move` lets them go on.

    A lane that hangs is not waited for: that it is lost is found out while others recover.
    """
    lanes = [lane for lane in fleet.lanes.values() if not fleet.is_known_lost(lane)]
    _best_effort(lanes, _hold, timeout_s)


def add_lane(fleet: Fleet, index: int, *, adapter_version: int, timeout_s: float) -> Member:
    """Start a lane, also in the place of a lost one, and connect it.

    Where a stage of the plan is lost, it stands still until `move` lets it go on.

    Raises:
        FleetError: It did not come up; nothing of it is left.
    """
    deadline_s = time.monotonic() + timeout_s
    lane = fleet.start_lane(index, adapter_version=adapter_version)
    first = None
    try:
        fleet.admit([lane], deadline_s)
        if fleet.is_whole:
            fleet.connect(fleet.plan, deadline_s)
            first = fleet.stages[fleet.plan.stages[0].device_id].address
        fleet.wait_for([lane], [lane.actor.connect.remote(first)], deadline_s)
    except FleetError:
        fleet.bury(lane)
        raise
    fleet.watch([lane])
    return lane


def retire_lane(fleet: Fleet, lane: Member, *, timeout_s: float) -> None:
    """Stop a lane, of which nothing is wanted any more.

    Raises:
        FleetError: A stage did not hear of it; the lane is gone.
    """
    fleet.retire(lane)
    if fleet.is_whole:
        fleet.connect(fleet.plan, time.monotonic() + timeout_s)


def _let_go(fleet: Fleet, plan: StagesPlan, tight: Sequence[str], deadline_s: float) -> None:
    """Make stages hold no more than what they keep; who keeps nothing is started anew.

    Raises:
        FleetError: One of them died; all are buried, for the plan before is no more.
    """
    before = {stage.device_id: stage for stage in fleet.plan.stages}
    try:
        for placed in plan.stages:
            if placed.device_id not in tight:
                continue
            member, old = fleet.stages[placed.device_id], before[placed.device_id]
            first = max(old.first_layer, placed.first_layer)
            end = min(old.end_layer, placed.end_layer)
            if first >= end:
                fleet.retire(member)
                continue
            kept = member.actor.prepare.remote(plan.epoch, first, end)
            fleet.wait_for([member], [kept], deadline_s)
            fleet.wait_for([member], [member.actor.retire.remote(plan.epoch)], deadline_s)
    except FleetError:
        _bury(fleet, tight)
        raise


def _bury(fleet: Fleet, device_ids: Sequence[str]) -> None:
    for device_id in device_ids:
        if device_id in fleet.stages:
            fleet.bury(fleet.stages[device_id])


def _load(fleet: Fleet, plan: StagesPlan, deadline_s: float, tight: Sequence[str]) -> list[Member]:
    """Make every stage of a plan hold its layers; returns those that are not in force yet."""
    members: list[Member] = []
    calls: list[Any] = []
    new: list[Member] = []
    for placed in plan.stages:
        member = fleet.stages.get(placed.device_id)
        if member is None:
            member = fleet.take_spare(placed)
            is_started = member is None
            member = member or fleet.start_stage(placed, plan.epoch)
            new.append(member)
            if is_started:
                continue
        members.append(member)
        layers = placed.first_layer, placed.end_layer
        calls.append(member.actor.prepare.remote(plan.epoch, *layers))
    try:
        ready = [member.actor.ready.remote() for member in new]
        fleet.wait_for([*members, *new], [*calls, *ready], deadline_s)
        fleet.admit(new, deadline_s)
    except FleetError as error:
        # Of those that are late nobody knows which will ever be ready.
        dead = [error.member] if isinstance(error, MemberLostError) else new
        _undo(fleet, plan, [], new, dead, is_fenced=bool(tight))
        _bury(fleet, tight)
        raise
    return new


def _switch(
    fleet: Fleet, plan: StagesPlan, lane: Member, recompute: bool, step_timeout_s: float
) -> tuple[int, float]:
    """Take one lane over to the new epoch; returns (bytes of KV moved, seconds it stood still)."""
    deadline_s = time.monotonic() + step_timeout_s
    held = lane.actor.hold.remote(step_timeout_s, forget_step=recompute)
    [blocks] = fleet.wait_for([lane], [held], deadline_s, _LATE)
    kv_bytes = 0
    if blocks and not recompute:
        kv_bytes = _copy_kv(fleet, plan, lane, blocks, deadline_s)
    first = fleet.stages[plan.stages[0].device_id].address
    going = lane.actor.go_on.remote(plan.epoch, first, recompute)
    [pause_s] = fleet.wait_for([lane], [going], deadline_s, _LATE)
    return kv_bytes, pause_s


def _copy_kv(
    fleet: Fleet, plan: StagesPlan, lane: Member, blocks: Sequence[int], deadline_s: float
) -> int:
    """Bring the KV of blocks in use to the layers' new holders, all at once."""
    old = fleet.plan
    targets: list[Member] = []
    puts: list[Any] = []
    layer_bytes = fleet.spec.profile.layers
    kv_bytes = 0
    for source_id, target_id, layers in handed_over(old, plan):
        taken = fleet.stages[source_id].actor.take_kv.remote(old.epoch, lane.key, layers, blocks)
        target = fleet.stages[target_id]
        targets.append(target)
        puts.append(target.actor.put_kv.remote(plan.epoch, lane.key, layers, blocks, taken))
        tokens = len(blocks) * fleet.spec.limits.block_tokens
        kv_bytes += sum(layer_bytes[layer].kv_bytes_per_token * tokens for layer in layers)
    fleet.wait_for(targets, puts, deadline_s, _LATE)
    return kv_bytes


def handed_over(old: StagesPlan, new: StagesPlan) -> Iterator[tuple[str, str, range]]:
    """Yield (device that had it, device that gets it, layers) of every run of layers that moves."""
    for source in old.stages:
        for target in new.stages:
            first = max(source.first_layer, target.first_layer)
            layers = range(first, min(source.end_layer, target.end_layer))
            if layers and source.device_id != target.device_id:
                yield source.device_id, target.device_id, layers


def _retire(fleet: Fleet, plan: StagesPlan) -> None:
    """Free what only the plans before needed, and stop the stages that have no layers any more."""
    used = {placed.device_id for placed in plan.stages}
    for device_id, member in list(fleet.stages.items()):
        if device_id in used:
            # Nobody waits for it: a stage that dies over it is found by the watch.
            member.actor.retire.remote(plan.epoch)
        else:
            fleet.retire(member)
    fleet.bury_spares()


def _undo(
    fleet: Fleet,
    plan: StagesPlan,
    switched: Sequence[Member],
    new: Sequence[Member],
    dead: Sequence[Member],
    *,
    is_fenced: bool,
) -> bool:
    """Go back to the plan before, as far as its members are alive; the dead are found anyway.

    Returns whether the lanes go on. Behind a fence they do not: what may still be on its way from
    them would be written over what they compute again.
    """
    lanes = [lane for lane in switched if not fleet.is_known_lost(lane)]
    # First of all: a step of the new epoch that met no route for it would fail its requests.
    _best_effort(lanes, _hold, _UNDO_TIMEOUT_S)
    others = [member for member in fleet.stages.values() if member not in new]
    alive = [member for member in others if not fleet.is_known_lost(member)]
    _best_effort(alive, lambda stage: stage.actor.forget.remote(plan.epoch), _UNDO_TIMEOUT_S)
    placed = {stage.device_id: stage for stage in plan.stages}
    for member in new:
        if member in dead:
            fleet.bury(member)
        else:
            fleet.set_aside(member, placed[str(member.key)])
    old = fleet.plan
    first = fleet.stages.get(old.stages[0].device_id)
    if is_fenced or first is None or len(alive) < len(others):
        fleet.stands_still = True
        stand_still(fleet)
        return False
    at = first.address
    _best_effort(lanes, lambda lane: lane.actor.go_on.remote(old.epoch, at, True), _UNDO_TIMEOUT_S)
    return True


def _hold(lane: Member) -> Any:
    """For good: steps that are under way have no answer."""
    return lane.actor.hold.remote(_UNDO_TIMEOUT_S, forget_step=True)


def _best_effort(
    members: Sequence[Member], call: Callable[[Member], Any], timeout_s: float
) -> None:
    """Call each and wait for it, whatever becomes of the others."""
    calls = [call(member) for member in members]
    deadline_s = time.monotonic() + timeout_s
    for member, reference in zip(members, calls, strict=True):
        try:
            ray.get(reference, timeout=max(0.0, deadline_s - time.monotonic()))
        except RayError as error:
            _log.warning("while lanes were held: %s: %s", member.name, cause_of(error))
