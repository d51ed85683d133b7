"""Search for the cut whose simulated rounds are shortest.

Evened cuts of many shapes, roughly; then, from the best of them, other shapes as long as they
help; then moves of single layers as long as they help: hill climbing with the simulator as its
objective. The effort is a number of priced (slot, device) pairs, not a time, so equal inputs give
equal plans on any machine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from placement.pooling.cuts import (
    NUM_ORDERS,
    Cut,
    LayerWeights,
    Shape,
    all_cuts,
    is_possible,
    neighbours,
    seed_shapes,
    shaped,
    similar_shapes,
)
from placement.pooling.pool import Pool, SlotOption
from placement.pooling.slot_memory import SlotNeed, devices_of_slots, keeping_needs, slot_need
from placement.pooling.slot_prices import SlotPrices
from placement.pooling.steady import measure
from placement.training import RecomputeGrain, Slot, SlotSchedule, TrainingCosts


class Precision(NamedTuple):
    """How long one cut is simulated, unless its state recurs before."""

    visits: int
    least_rounds: int


EXHAUSTIVE_LAYERS = 4
"""Models of so few layers have fewer than 100 cuts: all are tried, whatever the effort."""
COARSE = Precision(visits=256, least_rounds=8)
"""To tell promising shapes from others."""
FINE = Precision(visits=512, least_rounds=12)
"""To climb from promising shapes."""
NUM_STARTS = 24
"""Most promising shapes from which others are tried."""
NUM_FINALISTS = 8
"""Best cuts whose rounds the caller may want to measure for longer."""
SEED_SHARE, SHAPE_SHARE = 0.35, 0.7
"""Of the effort, up to where seeds and then other shapes are tried; the rest is for moves."""
GOLDEN = (math.sqrt(5) - 1) / 2
GAIN = 1e-6
"""Share by which a move must shorten the round."""


@dataclass(frozen=True, slots=True)
class Objective:
    """How the rounds follow each other; see `plan_train`."""

    micro_batches: int
    rounds_per_step: int | None
    synchronous: bool


class CutSimulator:
    """Prices cuts on one pool of devices, remembering slots and cuts it has met."""

    def __init__(self, costs: TrainingCosts, objective: Objective) -> None:
        self.costs = costs
        self.objective = objective
        self.prices = SlotPrices(costs)
        self.effort = 0
        """(slot, device) pairs priced so far."""
        self._is_uniform = costs.is_uniform
        self._needs: dict[Slot, SlotNeed] = {}
        self._options: dict[tuple[Slot, RecomputeGrain], tuple[SlotOption, ...]] = {}
        self._seconds: dict[tuple[Cut, Precision], float] = {}

    def need(self, slot: Slot) -> SlotNeed:
        """Return the slot's grain and bytes."""
        if slot not in self._needs:
            self._needs[slot] = slot_need(self.prices, slot)
        return self._needs[slot]

    def schedule(self, cut: Cut) -> SlotSchedule | None:
        """Return the cut as a schedule, or None where memory holds some slot nowhere."""
        slots = cut.slots
        needs = [self.need(slot) for slot in slots]
        if cut.kept:
            needs = keeping_needs(
                self.prices, slots, needs, cut.kept_pairs, self.objective.micro_batches
            )
        devices = devices_of_slots(needs, self.costs.memory_bytes)
        if devices is None:
            return None
        everywhere = all(len(allowed) == self.costs.num_devices for allowed in devices)
        return SlotSchedule(
            slots=slots,
            micro_batches=self.objective.micro_batches,
            dispatch="round_robin"
            if self._is_uniform and everywhere and not cut.kept
            else "earliest_finish",
            grains=tuple(need.grain for need in needs),
            devices=devices,
            rounds_per_step=self.objective.rounds_per_step,
            staleness=0 if self.objective.synchronous else 1,
        )

    def seconds(self, cut: Cut, precision: Precision) -> float:
        """Return the predicted seconds per round; infinite where memory does not hold the cut."""
        # An isolated step is simulated whole.
        key = cut, FINE if self.objective.synchronous else precision
        if key not in self._seconds:
            schedule = self.schedule(cut)
            self.effort += 2 * cut.num_slots * self.costs.num_devices
            self._seconds[key] = (
                math.inf if schedule is None else self._simulated_s(schedule, precision)
            )
        return self._seconds[key]

    def _simulated_s(self, schedule: SlotSchedule, precision: Precision) -> float:
        rows = [
            self._row(slot, grain)
            for slot, grain in zip(schedule.slots, schedule.grain_list, strict=True)
        ]
        assert schedule.devices is not None
        options = [
            row if len(row) == len(devices) else tuple(row[device] for device in devices)
            for row, devices in zip(rows, schedule.devices, strict=True)
        ]
        pool = Pool(self.costs.hand_off_s, schedule)
        if self.objective.synchronous:
            rounds = self.objective.rounds_per_step or 1
            for _ in range(rounds):
                pool.run_round(options)
            seconds = max(pool.free_s) / rounds
        else:
            speeds = [
                1.0 / (schedule.micro_batches * sum(option.total_s for option in column))
                for column in zip(*rows, strict=True)
            ]
            max_rounds = max(precision.visits // len(rows), precision.least_rounds)
            steady = measure(pool, options, speeds, schedule, max_rounds)
            seconds = steady.seconds_per_round
        # What surrounds the innermost loop costs about as much as one more device.
        per_round = 1 + (1 if schedule.dispatch == "round_robin" else self.costs.num_devices)
        self.effort += pool.num_rounds * len(rows) * per_round
        return seconds

    def _row(self, slot: Slot, grain: RecomputeGrain) -> tuple[SlotOption, ...]:
        if (slot, grain) not in self._options:
            self._options[slot, grain] = self.prices.options(slot, grain)
        return self._options[slot, grain]


def best_cuts(simulator: CutSimulator, effort: int) -> list[Cut]:
    """Return up to `NUM_FINALISTS` cuts with the shortest rounds found; none that memory cannot
    hold.

    Ties: the fewest slots, then the smallest layer counts in order.
    """
    num_layers = simulator.costs.num_layers
    if num_layers <= EXHAUSTIVE_LAYERS:
        climbed = list(all_cuts(num_layers))
    else:
        climbed = _searched_cuts(simulator, effort)
    finalists = ranked(simulator, climbed, FINE)[:NUM_FINALISTS]
    return [cut for cut in finalists if math.isfinite(simulator.seconds(cut, FINE))]


def _searched_cuts(simulator: CutSimulator, effort: int) -> list[Cut]:
    num_layers = simulator.costs.num_layers
    weights = reference_weights(simulator.costs)
    # The finest cut needs the least memory, so it is tried even when the effort is spent.
    shapes = {Cut((1,) * num_layers, 0, (1,) * num_layers): Shape(0, num_layers, num_layers)}
    for shape in _in_turn(seed_shapes(weights)):
        if simulator.effort >= SEED_SHARE * effort:
            break
        cut = shaped(weights, shape)
        simulator.seconds(cut, COARSE)
        shapes.setdefault(cut, shape)
    # One start per shape but for the order: those mostly climb to the same cut.
    distinct: dict[Shape, Shape] = {}
    for cut in ranked(simulator, shapes, COARSE):
        distinct.setdefault(shapes[cut]._replace(forward_order=0, backward_order=0), shapes[cut])
    starts = list(distinct.values())[:NUM_STARTS]
    reached = [_climb_shapes(simulator, weights, start, SHAPE_SHARE * effort) for start in starts]
    # Moves lead from some starts to cuts that no evened shape is near.
    bases = [*reached, *(shaped(weights, start) for start in starts)]
    return [climb(simulator, cut, neighbours, effort) for cut in ranked(simulator, bases, FINE)]


def _in_turn(seeds: Sequence[Shape]) -> Iterator[Shape]:
    """Yield the seeds in their order, in turn with others from all over; then their other orders.

    The order of the seeds is a rough estimate, and the effort may not last for all: multiples of
    the golden ratio leave no large gap wherever they stop.
    """
    spread = sorted(range(len(seeds)), key=lambda index: (index * GOLDEN % 1.0, index))
    for index, other in enumerate(spread):
        yield seeds[index]
        yield seeds[other]
    for shape in seeds:
        for orders in itertools.product(range(NUM_ORDERS), repeat=2):
            yield shape._replace(forward_order=orders[0], backward_order=orders[1])


def reference_weights(costs: TrainingCosts) -> LayerWeights:
    """Return each layer's seconds, averaged over the devices.

    Every device counts by its speed, so that a layer's share of the work is what its slot is
    worth; devices that are alike but for speed all say the same.
    """
    alone = [
        sum(f) + sum(r) + sum(b) + head_f + head_b
        for f, r, b, head_f, head_b in zip(
            costs.forward_s, costs.recompute_s, costs.backward_s,
            costs.head_forward_s, costs.head_backward_s, strict=True,
        )
    ]  # fmt: skip

    def mean(values: Sequence[float]) -> float:
        return sum(value / seconds for value, seconds in zip(values, alone, strict=True))

    forward = [mean(column) for column in zip(*costs.forward_s, strict=True)]
    recompute = [mean(column) for column in zip(*costs.recompute_s, strict=True)]
    backward = [mean(column) for column in zip(*costs.backward_s, strict=True)]
    return LayerWeights(
        forward=tuple(forward),
        backward=tuple(r + b for r, b in zip(recompute, backward, strict=True)),
        fused=tuple(f + b for f, b in zip(forward, backward, strict=True)),
        head=mean(costs.head_forward_s) + mean(costs.head_backward_s),
    )


def ranked(simulator: CutSimulator, cuts: Iterable[Cut], precision: Precision) -> list[Cut]:
    """Return distinct cuts, the shortest rounds first; ties as in `best_cuts`."""

    def rank(cut: Cut) -> tuple[float, int, Cut]:
        return simulator.seconds(cut, precision), cut.num_slots, cut

    return sorted(set(cuts), key=rank)


def _climb_shapes(
    simulator: CutSimulator, weights: LayerWeights, shape: Shape, effort: float
) -> Cut:
    """Take the first similar shape that helps, again and again, while the effort lasts."""
    cut = shaped(weights, shape)
    is_better = True
    while is_better:
        is_better = False
        for other in similar_shapes(shape, len(weights.forward)):
            if simulator.effort >= effort:
                return cut
            if not is_possible(other, len(weights.forward)):
                continue
            moved = shaped(weights, other)
            if simulator.seconds(moved, FINE) < simulator.seconds(cut, FINE) * (1.0 - GAIN):
                shape, cut, is_better = other, moved, True
                break
    return cut


def climb(
    simulator: CutSimulator, cut: Cut, moves: Callable[[Cut], Iterator[Cut]], effort: float
) -> Cut:
    """Take the first move that helps, again and again, while the effort lasts."""
    is_better = True
    while is_better:
        is_better = False
        for moved in moves(cut):
            if simulator.effort >= effort:
                return cut
            if simulator.seconds(moved, FINE) < simulator.seconds(cut, FINE) * (1.0 - GAIN):
                cut, is_better = moved, True
                break
    return cut
