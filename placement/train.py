"""Training plans: forward and backward stages for a pool of unequal devices, and their dispatch.

Weights live in host memory, so no stage is bound to a device: a slot goes to whichever device is
predicted to finish it first. The planner chooses the two partitions and the fused stage by the
simulated seconds per round, not by a count of stages (after RoundPipe, Luo et al., 2026, whose
plans assume equal devices and minimise slots x longest slot).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from placement.errors import InfeasiblePlanError
from placement.pooling.bounds import lower_bound_s
from placement.pooling.cuts import Cut
from placement.pooling.keeping import kept_cuts
from placement.pooling.search import CutSimulator, Objective, best_cuts
from placement.pooling.shortfalls import check_feasible, no_room_to_prefetch, too_small
from placement.pooling.slot_memory import SlotNeed, devices_of_slots, keeping_needs
from placement.pooling.slot_prices import SlotPrices
from placement.pooling.steady import SteadyState, steady_state
from placement.simulate import simulate_slots
from placement.train_plan import DeviceShare, PlannedSlot, TrainPlan
from placement.training import (
    Grains,
    RecomputeGrain,
    Slot,
    SlotSchedule,
    TrainingCosts,
)

__all__ = ["DeviceShare", "PlannedSlot", "TrainPlan", "plan_cut", "plan_train"]

SEARCH_EFFORT = 3_000_000
"""(slot, device) pairs priced while searching: one or two seconds."""
KEEP_GAIN = 0.02
"""Share by which keeping activations must shorten a round to be planned."""


def plan_train(
    costs: TrainingCosts,
    *,
    micro_batches: int,
    rounds_per_step: int | None = 1,
    synchronous: bool = False,
    grains: Grains = "auto",
    search_effort: int = SEARCH_EFFORT,
) -> TrainPlan:
    """Cut the layers into slots so that a round of `micro_batches` takes as little as possible.

    Heuristic: evened cuts of many shapes, the best of them improved step by step, all priced by
    the simulator; O(`search_effort`). Slots go to the device that is predicted to finish them
    first; where all devices are equal, in turn, in order of id. Ties: the fewest slots, then the
    smallest layer counts. The order of the devices in `costs` does not matter. Of models of up to
    4 layers all cuts are tried.

    `rounds_per_step` rounds accumulate gradients for one optimizer step. Asynchronous: a step's
    rounds wait for the step before the last, so gradients are one step old. That bounds how far
    fast and slow devices drift apart: more rounds per step leave unequal devices less idle (None:
    no bound). Synchronous: every step starts from an empty pool.

    Where memory holds activations from forward to backward slots, cuts that keep some are tried as
    well, unless `grains` is "recompute"; one is planned where it shortens a round by 2 %.

    The lower bound is that of `placement.pooling.bounds`. Where devices differ by one factor for
    all layers it is the work over the aggregate speed.

    Raises:
        InfeasiblePlanError: Some layer or the head fits no device.
        ValueError: A count is below 1, or a synchronous plan has no `rounds_per_step`.
    """
    _check(micro_batches, rounds_per_step, synchronous, search_effort)
    every = costs.in_order(sorted(range(costs.num_devices), key=lambda d: costs.device_ids[d]))
    small = too_small(every)
    check_feasible(every)
    able = every.in_order([d for d in range(every.num_devices) if every.device_ids[d] not in small])
    objective = Objective(micro_batches, rounds_per_step, synchronous)
    simulator = CutSimulator(able, objective)
    cuts = best_cuts(simulator, search_effort)
    if not cuts:
        raise InfeasiblePlanError(no_room_to_prefetch(able))
    schedule, outcome = _best(simulator, cuts)
    kept = [] if grains == "recompute" else kept_cuts(simulator, cuts, search_effort)
    if kept:
        keeping = _best(simulator, kept)
        if keeping[1].seconds_per_round < (1.0 - KEEP_GAIN) * outcome.seconds_per_round:
            schedule, outcome = keeping
    return _assemble(every, able, schedule, outcome, small)


def _best(simulator: CutSimulator, cuts: Sequence[Cut]) -> tuple[SlotSchedule, SteadyState]:
    """Return the cut whose rounds are shortest when they are measured for long."""
    candidates = []
    for cut in cuts:
        schedule = simulator.schedule(cut)
        assert schedule is not None
        outcome = _outcome(simulator.costs, schedule)
        candidates.append((outcome.seconds_per_round, cut.num_slots, cut, schedule, outcome))
    _, _, _, schedule, outcome = min(candidates, key=lambda candidate: candidate[:3])
    return schedule, outcome


def plan_cut(
    costs: TrainingCosts,
    slots: Sequence[Slot],
    *,
    micro_batches: int,
    rounds_per_step: int | None = 1,
    synchronous: bool = False,
    grain: RecomputeGrain = "stage",
) -> TrainPlan:
    """Return the plan of a given cut, every backward slot at one grain; nothing is searched.

    Raises:
        InfeasiblePlanError: Some slot fits no device.
        ValueError: The slots do not cover the layers, or a count is below 1.
    """
    _check(micro_batches, rounds_per_step, synchronous, 1)
    _check_cover(costs, slots)
    every = costs.in_order(sorted(range(costs.num_devices), key=lambda d: costs.device_ids[d]))
    prices = SlotPrices(every)
    grains: list[RecomputeGrain] = [grain if slot.kind == "backward" else "none" for slot in slots]
    needs = [
        SlotNeed(
            chosen,
            prices.resident_bytes(slot, chosen),
            prices.weight_bytes(slot),
            prices.option(slot, chosen, 0).total_s,
        )
        for slot, chosen in zip(slots, grains, strict=True)
    ]
    if grain == "keep":
        pairs = _mirrored_pairs(slots)
        needs = keeping_needs(prices, slots, needs, pairs, micro_batches)
    devices = devices_of_slots(needs, every.memory_bytes)
    if devices is None:
        most_bytes = max(need.resident_bytes + need.weight_bytes for need in needs)
        kept_bytes = sum(need.kept_bytes for need in needs)
        also = f" beside {kept_bytes} bytes that are kept" if kept_bytes else ""
        raise InfeasiblePlanError(
            f"a slot of the given cut needs {most_bytes} bytes with the next one's weights{also}; "
            f"the devices offer {', '.join(map(str, every.memory_bytes))}. Give smaller slots, or "
            f"leave the cut to the planner"
        )
    is_free = grain != "keep" and all(len(row) == every.num_devices for row in devices)
    schedule = SlotSchedule(
        slots=tuple(slots),
        micro_batches=micro_batches,
        dispatch="round_robin" if every.is_uniform and is_free else "earliest_finish",
        grains=tuple(grains),
        devices=devices,
        rounds_per_step=rounds_per_step,
        staleness=0 if synchronous else 1,
    )
    outcome = _outcome(every, schedule)
    return _assemble(every, every, schedule, outcome, {})


def _mirrored_pairs(slots: Sequence[Slot]) -> list[tuple[int, int]]:
    """Return every backward slot with the forward slot that holds the same layers."""
    forward = {
        (slot.first_layer, slot.end_layer): index
        for index, slot in enumerate(slots)
        if slot.kind == "forward"
    }
    pairs = []
    for index, slot in enumerate(slots):
        if slot.kind == "backward":
            layers = slot.first_layer, slot.end_layer
            if layers not in forward:
                raise ValueError(
                    f"no forward slot holds just the layers [{layers[0]}, {layers[1]}) of backward "
                    f"slot {index}, so nothing can be kept for it; give grain stage or layer"
                )
            pairs.append((forward[layers], index))
    return pairs


def _check_cover(costs: TrainingCosts, slots: Sequence[Slot]) -> None:
    last = next((slot.end_layer for slot in slots if slot.kind == "fused"), None)
    if last != costs.num_layers:
        raise ValueError(f"the cut ends at layer {last}, the model has {costs.num_layers} layers")


def _check(
    micro_batches: int, rounds_per_step: int | None, synchronous: bool, search_effort: int
) -> None:
    if micro_batches < 1:
        raise ValueError(f"micro_batches ({micro_batches}) must be at least 1")
    if search_effort < 1:
        raise ValueError(f"search_effort ({search_effort}) must be at least 1")
    if rounds_per_step is None:
        if synchronous:
            raise ValueError("a synchronous plan needs rounds_per_step; give at least 1")
    elif rounds_per_step < 1:
        raise ValueError(f"rounds_per_step ({rounds_per_step}) must be at least 1")


def _outcome(costs: TrainingCosts, schedule: SlotSchedule) -> SteadyState:
    if schedule.staleness:
        return steady_state(costs, schedule)
    # A flush empties the pool, so one step from an empty pool is every step.
    rounds = schedule.rounds_per_step or 1
    step = simulate_slots(costs, schedule, rounds=rounds)
    return SteadyState(
        seconds_per_round=step.makespan_s / rounds,
        idle_fraction=step.idle_fraction,
        busy_s=tuple(busy_s / rounds for busy_s in step.busy_s),
        rounds_measured=rounds,
        is_periodic=True,
        rounds_in_flight=step.rounds_in_flight,
    )


def _assemble(
    every: TrainingCosts,
    able: TrainingCosts,
    schedule: SlotSchedule,
    outcome: SteadyState,
    small: Mapping[str, str],
) -> TrainPlan:
    slots = _planned_slots(able, schedule)
    shares, left_out = [], []
    busy_s = dict(zip(able.device_ids, outcome.busy_s, strict=True))
    for device_id, node, cap in zip(every.device_ids, every.nodes, every.memory_bytes, strict=True):
        own = [slot for slot in slots if device_id in slot.device_ids]
        busy = busy_s.get(device_id, 0.0)
        shares.append(
            DeviceShare(
                device_id=device_id,
                node=node,
                busy_s=busy,
                # An average over a window may count a visit that began before it.
                busy_fraction=min(1.0, busy / outcome.seconds_per_round),
                peak_bytes=max((slot.resident_bytes for slot in own), default=0)
                + max((slot.weight_bytes for slot in own), default=0)
                + sum(slot.kept_bytes for slot in own),
                memory_bytes=cap,
            )
        )
        if not busy:
            left_out.append((device_id, _why_left_out(device_id, own, slots, small)))
    return TrainPlan(
        micro_batches=schedule.micro_batches,
        rounds_per_step=schedule.rounds_per_step,
        synchronous=schedule.staleness == 0,
        dispatch=schedule.dispatch,
        slots=slots,
        devices=tuple(shares),
        seconds_per_round=outcome.seconds_per_round,
        idle_fraction=outcome.idle_fraction,
        # Rounding alone could put the bound a hair above a plan that meets it.
        lower_bound_s=min(lower_bound_s(able, schedule), outcome.seconds_per_round),
        rounds_in_flight=outcome.rounds_in_flight,
        left_out=tuple(left_out),
    )


def _planned_slots(costs: TrainingCosts, schedule: SlotSchedule) -> tuple[PlannedSlot, ...]:
    assert schedule.devices is not None
    prices = SlotPrices(costs)
    return tuple(
        PlannedSlot(
            index=index,
            kind=slot.kind,
            first_layer=slot.first_layer,
            end_layer=slot.end_layer,
            grain=grain,
            weight_bytes=prices.weight_bytes(slot, grain),
            resident_bytes=prices.resident_bytes(slot, grain),
            kept_with=partner,
            kept_bytes=(
                prices.kept_bytes(slot, schedule.micro_batches)
                if slot.kind == "forward" and partner is not None
                else 0
            ),
            device_ids=tuple(costs.device_ids[device] for device in devices),
            micro_batch_s=tuple(option.total_s for option in prices.options(slot, grain, devices)),
        )
        for index, (slot, grain, devices, partner) in enumerate(
            zip(
                schedule.slots,
                schedule.grain_list,
                schedule.devices,
                schedule.kept_with,
                strict=True,
            )
        )
    )


def _why_left_out(
    device_id: str,
    own: list[PlannedSlot],
    slots: tuple[PlannedSlot, ...],
    small: Mapping[str, str],
) -> str:
    if device_id in small:
        return small[device_id]
    if own:
        return f"another device is predicted to finish each of its {len(own)} slots first"
    least_bytes = min(slot.resident_bytes + slot.weight_bytes for slot in slots)
    return f"the plan's smallest slot needs {least_bytes} bytes with the next one's weights"
