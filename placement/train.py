"""Training plans: forward and backward stages for a pool of unequal devices, and their dispatch.

Weights live in host memory, so no stage is bound to a device: a slot goes to whichever device is
predicted to finish it first. The planner chooses the two partitions and the fused stage by the
simulated seconds per round, not by a count of stages (after RoundPipe, Luo et al., 2026, whose
plans assume equal devices and minimise slots x longest slot).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from placement.errors import InfeasiblePlanError
from placement.pooling.search import CutSimulator, Objective, best_cuts
from placement.pooling.slot_memory import SlotNeed, devices_of_slots
from placement.pooling.slot_prices import SlotPrices
from placement.pooling.steady import SteadyState, alone_s, steady_state
from placement.simulate import simulate_slots
from placement.training import (
    Dispatch,
    RecomputeGrain,
    Slot,
    SlotKind,
    SlotSchedule,
    TrainingCosts,
)

SEARCH_EFFORT = 3_000_000
"""(slot, device) pairs priced while searching: one or two seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedSlot:
    """One visit per round, on one of the devices that have the memory for it."""

    index: int
    kind: SlotKind
    first_layer: int
    end_layer: int
    """The fused slot also runs the head; it holds nothing else where this equals `first_layer`."""
    grain: RecomputeGrain
    weight_bytes: int
    resident_bytes: int
    """Weights, gradients and one micro-batch's activations while it runs. The next slot's weights
    come on top."""
    device_ids: tuple[str, ...]
    micro_batch_s: tuple[float, ...]
    """Per entry of `device_ids`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceShare:
    """What one device is predicted to do."""

    device_id: str
    node: str
    busy_s: float
    """Per round, on average."""
    busy_fraction: float
    peak_bytes: int
    """Its largest slot beside the heaviest weights it may be sent meanwhile."""
    memory_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainPlan:
    """The slots of a round, who may run them, what a round should cost and how good it could be."""

    epoch: int = 0
    micro_batches: int
    rounds_per_step: int | None
    synchronous: bool
    dispatch: Dispatch
    slots: tuple[PlannedSlot, ...]
    devices: tuple[DeviceShare, ...]
    """In order of id, those left out included."""
    seconds_per_round: float
    """In the steady state; when synchronous, of a whole step over its rounds."""
    idle_fraction: float
    """Share of the aggregate speed of all devices that could hold a layer, in work or not."""
    lower_bound_s: float
    """No dispatch and no other cut with the same fused stage has shorter rounds on the devices that
    could hold a layer: the work over the aggregate speed (see `plan_train`)."""
    rounds_in_flight: int
    """Most rounds begun and not done at once; sizes the boundary activations in host memory."""
    left_out: tuple[tuple[str, str], ...]
    """(device id, why it is predicted to run nothing)."""

    @property
    def gap(self) -> float:
        """By what share the rounds are longer than the lower bound."""
        return self.seconds_per_round / self.lower_bound_s - 1.0

    def schedule(self, costs: TrainingCosts) -> SlotSchedule:
        """Return the plan as input for the simulator.

        Raises:
            ValueError: `costs` lacks a device of the plan.
        """
        missing = {share.device_id for share in self.devices} - set(costs.device_ids)
        if missing:
            raise ValueError(f"the costs lack the plan's devices {sorted(missing)}")
        index = {device_id: position for position, device_id in enumerate(costs.device_ids)}
        return SlotSchedule(
            slots=tuple(
                Slot(kind=slot.kind, first_layer=slot.first_layer, end_layer=slot.end_layer)
                for slot in self.slots
            ),
            micro_batches=self.micro_batches,
            dispatch=self.dispatch,
            grains=tuple(slot.grain for slot in self.slots),
            devices=tuple(
                tuple(sorted(index[device_id] for device_id in slot.device_ids))
                for slot in self.slots
            ),
            rounds_per_step=self.rounds_per_step,
            staleness=0 if self.synchronous else 1,
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        value = asdict(self)
        value["slots"] = [
            asdict(slot)
            | {"device_ids": list(slot.device_ids), "micro_batch_s": list(slot.micro_batch_s)}
            for slot in self.slots
        ]
        value["devices"] = [asdict(share) for share in self.devices]
        value["left_out"] = [list(pair) for pair in self.left_out]
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TrainPlan:
        """Rebuild a plan from the values of `to_json`."""
        fields = dict(value)
        fields["slots"] = tuple(
            PlannedSlot(
                **slot
                | {
                    "device_ids": tuple(slot["device_ids"]),
                    "micro_batch_s": tuple(slot["micro_batch_s"]),
                }
            )
            for slot in value["slots"]
        )
        fields["devices"] = tuple(DeviceShare(**share) for share in value["devices"])
        fields["left_out"] = tuple((pair[0], pair[1]) for pair in value["left_out"])
        return cls(**fields)


def plan_train(
    costs: TrainingCosts,
    *,
    micro_batches: int,
    rounds_per_step: int | None = 1,
    synchronous: bool = False,
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

    The lower bound: with L_d the share of device d in the aggregate speed, no round is shorter
    than any weighted mean of the devices' busy times, hence not than the sum over layer passes of
    min over d of L_d x seconds on d. Where devices differ by one factor for all layers that is the
    work over the aggregate speed.

    Raises:
        InfeasiblePlanError: Some layer or the head fits no device.
        ValueError: A count is below 1, or a synchronous plan has no `rounds_per_step`.
    """
    _check(micro_batches, rounds_per_step, synchronous, search_effort)
    every = costs.in_order(sorted(range(costs.num_devices), key=lambda d: costs.device_ids[d]))
    small = _too_small(every)
    _check_feasible(every)
    able = every.in_order([d for d in range(every.num_devices) if every.device_ids[d] not in small])
    objective = Objective(micro_batches, rounds_per_step, synchronous)
    simulator = CutSimulator(able, objective)
    candidates = []
    for cut in best_cuts(simulator, search_effort):
        schedule = simulator.schedule(cut)
        assert schedule is not None
        outcome = _outcome(able, schedule)
        candidates.append((outcome.seconds_per_round, cut.num_slots, cut, schedule, outcome))
    if not candidates:
        raise InfeasiblePlanError(_no_room_to_prefetch(able))
    _, _, _, schedule, outcome = min(candidates, key=lambda candidate: candidate[:3])
    return _assemble(every, able, schedule, outcome, small)


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
    devices = devices_of_slots(needs, every.memory_bytes)
    if devices is None:
        most_bytes = max(need.resident_bytes + need.weight_bytes for need in needs)
        raise InfeasiblePlanError(
            f"a slot of the given cut needs {most_bytes} bytes with the next one's weights; the "
            f"devices offer {', '.join(map(str, every.memory_bytes))}. Give smaller slots, or "
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
    return _assemble(every, every, schedule, _outcome(every, schedule), {})


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


def _finest_needs(costs: TrainingCosts) -> list[tuple[str, int]]:
    """Return (what, bytes) of every slot that cannot be made smaller."""
    prices = SlotPrices(costs)
    last = costs.num_layers
    head = Slot(kind="fused", first_layer=last, end_layer=last)
    needs = [("the head", prices.alone_bytes(head, "none"))]
    for layer in range(costs.num_layers):
        forward = Slot(kind="forward", first_layer=layer, end_layer=layer + 1)
        backward = Slot(kind="backward", first_layer=layer, end_layer=layer + 1)
        needs.append((f"layer {layer}, forward", prices.alone_bytes(forward, "none")))
        needs.append((f"layer {layer}, backward", prices.alone_bytes(backward, "layer")))
    return needs


def _too_small(costs: TrainingCosts) -> dict[str, str]:
    """Return why each device that holds no slot at all is left out."""
    what, least_bytes = min(_finest_needs(costs), key=lambda need: need[1])
    return {
        device_id: (
            f"its {cap} bytes hold no slot; the smallest ({what}) needs {least_bytes}, weights "
            f"twice because the next slot's are brought meanwhile"
        )
        for device_id, cap in zip(costs.device_ids, costs.memory_bytes, strict=True)
        if cap < least_bytes
    }


def _check_feasible(costs: TrainingCosts) -> None:
    what, need_bytes = max(_finest_needs(costs), key=lambda need: need[1])
    cap, device_id = max(zip(costs.memory_bytes, costs.device_ids, strict=True))
    if need_bytes > cap:
        raise InfeasiblePlanError(
            f"{what} needs {need_bytes} bytes (weights twice, because the next slot's are brought "
            f"meanwhile, gradients, and one micro-batch's activations); the roomiest of "
            f"{costs.num_devices} devices, {device_id}, offers {cap} after headroom. Use fewer "
            f"sequences or tokens per micro-batch, a smaller dtype or frozen weights, lower "
            f"headroom_fraction, or add a device with more memory."
        )


def _no_room_to_prefetch(costs: TrainingCosts) -> str:
    what, need_bytes = max(_finest_needs(costs), key=lambda need: need[1])
    return (
        f"every layer fits some device alone, but in no tried cut does every slot find one that "
        f"also has room for the next slot's weights: {what} needs {need_bytes} bytes, and the "
        f"devices offer {', '.join(map(str, costs.memory_bytes))}. Use fewer sequences or tokens "
        f"per micro-batch, lower headroom_fraction, or add memory or devices."
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
                + max((slot.weight_bytes for slot in own), default=0),
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
        lower_bound_s=min(_lower_bound_s(able, schedule), outcome.seconds_per_round),
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
            weight_bytes=prices.weight_bytes(slot),
            resident_bytes=prices.resident_bytes(slot, grain),
            device_ids=tuple(costs.device_ids[device] for device in devices),
            micro_batch_s=tuple(option.total_s for option in prices.options(slot, grain, devices)),
        )
        for index, (slot, grain, devices) in enumerate(
            zip(schedule.slots, schedule.grain_list, schedule.devices, strict=True)
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


def _lower_bound_s(costs: TrainingCosts, schedule: SlotSchedule) -> float:
    speeds = [1.0 / seconds for seconds in alone_s(SlotPrices(costs), schedule)]
    shares = [speed / sum(speeds) for speed in speeds]
    first_fused = next(slot.first_layer for slot in schedule.slots if slot.kind == "fused")

    def least_s(*seconds: float) -> float:
        return min(share * value for share, value in zip(shares, seconds, strict=True))

    devices = range(costs.num_devices)
    total_s = least_s(*(costs.head_forward_s[d] + costs.head_backward_s[d] for d in devices))
    for layer in range(costs.num_layers):
        if layer < first_fused:
            total_s += least_s(*(costs.forward_s[d][layer] for d in devices))
            total_s += least_s(
                *(costs.recompute_s[d][layer] + costs.backward_s[d][layer] for d in devices)
            )
        else:
            total_s += least_s(
                *(costs.forward_s[d][layer] + costs.backward_s[d][layer] for d in devices)
            )
    return schedule.micro_batches * total_s
