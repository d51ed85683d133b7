"""Deterministic simulation of training schedules on equal or unequal devices.

Idle time is counted as a share of aggregate speed. A device's speed is 1 over the seconds that it
would take for all the work alone, so an idle second of a slow device weighs less:

    idle = sum over devices of speed x (makespan - busy) / (makespan x sum of speeds)

On equal devices that is 1 - busy / (D x makespan). Where devices differ by a factor that is the
same for all layers it is 1 - work / capacity.

Limits: optimizer steps, the saved inputs that a recompute reads back, and different slots that
share one link at the same time cost nothing here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from placement.pooling.pool import Pool, micro_batch_ends_s
from placement.pooling.schedules import BoundSchedule, Operation, operation_lists
from placement.pooling.slot_prices import SlotPrices
from placement.pooling.steady import (
    SteadyState,
    alone_s,
    most_in_flight,
    slot_options,
    steady_state,
)
from placement.trace import Event
from placement.training import SlotSchedule, TrainingCosts

__all__ = [
    "IdleSplit",
    "Simulation",
    "SteadyState",
    "simulate_bound",
    "simulate_slots",
    "steady_state",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class IdleSplit:
    """Where the idle time is, as shares that sum to the idle fraction."""

    fill: float
    """Before a device's first operation."""
    switch: float
    """Between the forwards before a device's first backward (or fused) operation and it."""
    intra: float
    """Any other gap."""
    drain: float
    """After a device's last operation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulation:
    """What happened, from an empty pool until everything was done."""

    device_ids: tuple[str, ...]
    nodes: tuple[str, ...]
    makespan_s: float
    busy_s: tuple[float, ...]
    """Per device."""
    idle_fraction: float
    """Share of aggregate speed; see the module docstring."""
    idle_split: IdleSplit
    events: tuple[Event, ...]
    """In order of start, then device."""

    @property
    def rounds_in_flight(self) -> int:
        """Most rounds begun and not done at once."""
        spans_s: dict[int, tuple[float, float]] = {}
        for event in self.events:
            begin_s, end_s = spans_s.get(event.round_index, (event.start_s, event.end_s))
            spans_s[event.round_index] = min(begin_s, event.start_s), max(end_s, event.end_s)
        return most_in_flight(list(spans_s.values()))


def simulate_bound(
    costs: TrainingCosts,
    schedule: BoundSchedule,
    layers_per_stage: Sequence[int],
    *,
    micro_batches: int,
) -> Simulation:
    """Simulate a schedule that binds stage s to device s mod D; one iteration, then a flush.

    A stage may have 0 layers: it takes no time (but for the head, on the last), yet its hand-offs
    do. A backward pass first recomputes its stage, as one operation. A hand-off delays its own
    micro-batch only. O(stages x micro_batches).

    Raises:
        ValueError: The counts do not sum to the layers, or do not suit the schedule.
    """
    if min(layers_per_stage, default=0) < 0 or sum(layers_per_stage) != costs.num_layers:
        raise ValueError(
            f"layers_per_stage {list(layers_per_stage)} must be 0 or more each and sum to the "
            f"{costs.num_layers} layers"
        )
    lists = operation_lists(
        schedule,
        num_devices=costs.num_devices,
        num_stages=len(layers_per_stage),
        micro_batches=micro_batches,
    )
    seconds = _stage_seconds(costs, layers_per_stage)
    events = _run_lists(costs, lists, seconds, len(layers_per_stage))
    return _summary(costs, events, [1.0 / sum(f + b for f, b in row) for row in seconds])


def simulate_slots(costs: TrainingCosts, schedule: SlotSchedule, *, rounds: int) -> Simulation:
    """Simulate `rounds` rounds from an empty pool until the last one is done.

    With `rounds` of one optimizer step this is the synchronous iteration.
    O(rounds x slots x (devices + micro_batches)).
    """
    if rounds < 1:
        raise ValueError(f"rounds ({rounds}) must be at least 1")
    prices = SlotPrices(costs, fused_forward_overlaps=schedule.fused_forward_overlaps)
    options = slot_options(prices, schedule)
    pool = Pool(costs.hand_off_s, schedule)
    events: list[Event] = []
    num_forward = schedule.num_forward
    for round_index in range(rounds):
        before_s = [pool.release_s()] * schedule.micro_batches
        clocks_s = list(pool.free_s), list(pool.upload_from_s)
        saved_s = [-math.inf] * schedule.micro_batches
        links_s: Sequence[float] = [0.0] * costs.num_devices
        for index, visit in enumerate(pool.run_round(options)):
            device, _, total_s, upload_s = visit.option
            ready_s = max(clocks_s[0][device], clocks_s[1][device] + upload_s)
            ends_s = micro_batch_ends_s(visit.option, ready_s, before_s, saved_s, links_s[device])
            clocks_s[0][device], clocks_s[1][device] = ends_s[-1], ends_s[0] - total_s
            events += [
                Event(
                    device_id=costs.device_ids[device],
                    start_s=end_s - total_s,
                    end_s=end_s,
                    kind=schedule.slots[index].kind,
                    stage=index,
                    micro_batch=micro_batch,
                    round_index=round_index,
                )
                for micro_batch, end_s in enumerate(ends_s)
            ]
            if index == num_forward:
                saved_s = before_s
            before_s, links_s = ends_s, costs.hand_off_s[device]
    return _summary(costs, events, [1.0 / seconds for seconds in alone_s(prices, schedule)])


def _stage_seconds(
    costs: TrainingCosts, layers_per_stage: Sequence[int]
) -> list[list[tuple[float, float]]]:
    """Return [device][stage] the seconds of a forward, and of a recompute with its backward."""
    ends = list(accumulate(layers_per_stage))
    seconds = []
    for device in range(costs.num_devices):
        row = []
        for count, end in zip(layers_per_stage, ends, strict=True):
            layers = slice(end - count, end)
            forward_s = math.fsum(costs.forward_s[device][layers])
            backward_s = math.fsum(costs.recompute_s[device][layers])
            backward_s += math.fsum(costs.backward_s[device][layers])
            row.append((forward_s, backward_s))
        forward_s, backward_s = row[-1]
        row[-1] = (
            forward_s + costs.head_forward_s[device],
            backward_s + costs.head_backward_s[device],
        )
        seconds.append(row)
    return seconds


def _run_lists(
    costs: TrainingCosts,
    lists: Sequence[Sequence[Operation]],
    seconds: Sequence[Sequence[tuple[float, float]]],
    num_stages: int,
) -> list[Event]:
    """Run each device's list in order; every operation starts as early as its inputs allow.

    The order within a device is fixed and nothing else is shared, so start times do not depend on
    the order in which devices are visited here.
    """
    ends_s: dict[Operation, float] = {}
    free_s = [0.0] * len(lists)
    position = [0] * len(lists)
    events = []
    while len(ends_s) < sum(map(len, lists)):
        for device, operations in enumerate(lists):
            while position[device] < len(operations):
                operation = operations[position[device]]
                inputs = _inputs(operation, num_stages)
                if not all(before in ends_s for before in inputs):
                    break
                arrivals_s = [
                    ends_s[before] + costs.hand_off_s[before.stage % len(lists)][device]
                    for before in inputs
                ]
                start_s = max(free_s[device], *arrivals_s, 0.0)
                stage = operation.stage
                free_s[device] = start_s + seconds[device][stage][operation.is_backward]
                ends_s[operation] = free_s[device]
                position[device] += 1
                events.append(
                    Event(
                        device_id=costs.device_ids[device],
                        start_s=start_s,
                        end_s=free_s[device],
                        kind="backward" if operation.is_backward else "forward",
                        stage=stage,
                        micro_batch=operation.micro_batch,
                    )
                )
    return events


def _inputs(operation: Operation, num_stages: int) -> list[Operation]:
    is_backward, stage, micro_batch = operation
    if not is_backward:
        return [Operation(False, stage - 1, micro_batch)] if stage else []
    inputs = [Operation(False, stage, micro_batch)]
    if stage < num_stages - 1:
        inputs.append(Operation(True, stage + 1, micro_batch))
    return inputs


def _summary(costs: TrainingCosts, events: Sequence[Event], speeds: Sequence[float]) -> Simulation:
    ordered = sorted(events, key=lambda event: (event.start_s, event.device_id, event.end_s))
    makespan_s = max(event.end_s for event in ordered)
    per_device: dict[str, list[Event]] = {device_id: [] for device_id in costs.device_ids}
    for event in ordered:
        per_device[event.device_id].append(event)
    busy_s, gaps_s = [], []
    for device_id in costs.device_ids:
        own = per_device[device_id]
        busy_s.append(math.fsum(event.end_s - event.start_s for event in own))
        gaps_s.append(_gaps_s(own, makespan_s, busy_s[-1]))
    capacity_s = makespan_s * sum(speeds)
    shares = [
        math.fsum(speed * gap_s for speed, gap_s in zip(speeds, column, strict=True)) / capacity_s
        for column in zip(*gaps_s, strict=True)
    ]
    return Simulation(
        device_ids=costs.device_ids,
        nodes=costs.nodes,
        makespan_s=makespan_s,
        busy_s=tuple(busy_s),
        idle_fraction=math.fsum(shares),
        idle_split=IdleSplit(fill=shares[0], switch=shares[1], intra=shares[2], drain=shares[3]),
        events=tuple(ordered),
    )


def _gaps_s(
    events: Sequence[Event], makespan_s: float, busy_s: float
) -> tuple[float, float, float, float]:
    """Return one device's fill, switch, intra and drain seconds."""
    if not events:
        return makespan_s, 0.0, 0.0, 0.0
    fill_s = events[0].start_s
    drain_s = makespan_s - events[-1].end_s
    turn = next((i for i, event in enumerate(events) if event.kind != "forward"), 0)
    switch_s = events[turn].start_s - events[turn - 1].end_s if turn else 0.0
    return fill_s, switch_s, makespan_s - busy_s - fill_s - switch_s - drain_s, drain_s
