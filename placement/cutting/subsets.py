"""Exact search over the orders of a few devices: dynamic programming over the sets in use.

Devices with equal figures on one node are interchangeable, so a state counts how many of each such
group are in use: at most 2^devices states, fewer where devices are alike. Per state and last group
the table holds, for every number of layers done, the least cost to get there (Held and Karp, "A
dynamic programming approach to sequencing problems", 1962, with a min-plus product over layers for
each step). O(states x groups x (layers^2 + groups x layers)) time a sweep.

Every stage of a cut takes one device, so the states of m devices are the cuts with m stages.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from placement.cutting.pricing import Floats, Ints, StagePrices
from placement.cutting.search import (
    TIE,
    UNCAPPED,
    Costs,
    crossing_s,
    energy_costs,
    latency_costs,
    least_of,
    reach_under,
    ties_of,
)
from placement.workload import Objective

MOST_STATES = 4096
"""Twelve different devices."""


class Groups:
    """Interchangeable devices, and the states that count how many of each are in use."""

    def __init__(self, prices: StagePrices) -> None:
        members: dict[tuple[int, int], list[int]] = {}
        pairs = zip(prices.make_of.tolist(), prices.node_of.tolist(), strict=True)
        usable = prices.holds_a_layer
        for device, (make, node) in enumerate(pairs):
            if usable[make]:
                members.setdefault((make, node), []).append(device)
        self.members = tuple(tuple(devices) for devices in members.values())
        """[group] device positions, ascending."""
        self.makes: Ints = np.array([make for make, _ in members], dtype=np.int64)
        self.nodes: Ints = np.array([node for _, node in members], dtype=np.int64)
        sizes = [len(devices) for devices in self.members]
        self.num_states = int(np.prod([float(size + 1) for size in sizes]).clip(max=2**62))
        self._sizes = sizes

    @property
    def is_small(self) -> bool:
        return self.num_states <= MOST_STATES

    @property
    def strides(self) -> Ints:
        """[group] state number of one device of that group alone."""
        products = itertools.accumulate([size + 1 for size in self._sizes], operator.mul, initial=1)
        return np.array(list(products)[:-1], dtype=np.int64)

    @property
    def digits(self) -> Ints:
        """[state, group] devices in use."""
        sizes = np.array(self._sizes, dtype=np.int64) + 1
        return np.arange(self.num_states)[:, None] // self.strides % sizes

    def named(self, sequence: Sequence[int]) -> tuple[int, ...]:
        """Return devices for a sequence of groups: each group's in ascending order."""
        left = [iter(members) for members in self.members]
        return tuple(next(left[group]) for group in sequence)


class _Table(NamedTuple):
    criteria: tuple[Costs, ...]
    """Per group instead of per make and node."""
    value: Floats
    """[criterion, state, last group, layers done]"""


def best_order_of_few(
    prices: StagePrices, groups: Groups, objective: Objective, floor_s: float, limit: float
) -> tuple[int, ...]:
    """Return the devices of an optimal cut in the order of its stages; empty: nothing fits.

    No bottleneck is below `floor_s`. `limit` is the objective of some cut, for energy per step;
    infinite: none is known. States beyond it are dropped. Ties: fewest devices, then least
    latency, then the smallest state, last group and layers done, read from the last stage to the
    first.

    Raises:
        ValueError: The objective is energy and some device's power is not known.
    """
    if objective == "throughput":
        period_s = _least_period_s(prices, groups, floor_s, limit)
        if np.isinf(period_s):
            return ()
        cap_s = period_s * (1.0 + TIE)
        budget = cap_s * prices.workload.lanes
        most_done = _most_done(groups, prices.units_s, budget)
        return _fewest(groups, _sweep(groups, (latency_costs(prices, cap_s),), most_done), budget)
    units = prices.units_s
    criteria: tuple[Costs, ...] = (latency_costs(prices),)
    if objective == "energy":
        watts = prices.watts
        assert watts is not None
        criteria, units = (energy_costs(prices), *criteria), units * watts[:, None]
    table = _sweep(groups, criteria, _most_done(groups, units, limit))
    least = float(table.value[0, :, :, -1].min())
    return () if np.isinf(least) else _fewest(groups, table, least * (1.0 + TIE))


def _least_period_s(prices: StagePrices, groups: Groups, floor_s: float, limit_s: float) -> float:
    most_done = _most_done(groups, prices.units_s, limit_s * prices.workload.lanes)

    def latency_s(cap_s: float) -> float:
        table = _sweep(groups, (latency_costs(prices, cap_s),), most_done)
        return float(table.value[0, :, :, -1].min())

    levels = _levels(groups)
    return crossing_s(
        prices,
        floor_s,
        is_feasible=lambda cap_s: _reaches_the_end(prices, groups, levels, cap_s),
        latency_s=latency_s,
        ceiling_s=limit_s,
    )


def _levels(groups: Groups) -> list[tuple[Ints, Ints]]:
    """Return, by devices in use, the states and [state, group] those before (-1: none)."""
    digits = groups.digits
    before = np.where(digits > 0, np.arange(len(digits))[:, None] - groups.strides, -1)
    in_use = digits.sum(axis=1)
    states = [np.flatnonzero(in_use == count) for count in range(1, int(in_use.max()) + 1)]
    return [(level, before[level]) for level in states]


def _reaches_the_end(
    prices: StagePrices, groups: Groups, levels: Sequence[tuple[Ints, Ints]], cap_s: float
) -> bool:
    """Return whether stages under a cap can run every layer; more layers done are never worse."""
    reach = reach_under(prices, cap_s)[groups.makes]
    is_open = (prices.occupied_s <= cap_s)[np.ix_(groups.nodes, groups.nodes)]
    each = np.arange(len(groups.makes))
    done = np.full((groups.num_states, len(each)), -1)
    done[groups.strides, each] = reach[:, 0]
    for states, before in levels[1:]:
        # [state, added group, group before it]
        arrive = np.where(is_open.T & (before[:, :, None] >= 0), done[before], -1).max(axis=2)
        done[states] = np.where(arrive >= 0, reach[each, arrive], -1)
    return bool(done.max() == prices.num_layers)


def _sweep(groups: Groups, criteria: Sequence[Costs], most_done: Floats) -> _Table:
    """Price every way to have some layers done.

    Ways that cost more than `most_done` [layers done] by the first criterion are dropped.
    """
    by_group = tuple(
        Costs(costs.stage[groups.makes], costs.hop[np.ix_(groups.nodes, groups.nodes)])
        for costs in criteria
    )
    num_layers = by_group[0].stage.shape[1]
    shape = (len(by_group), groups.num_states, len(groups.makes), num_layers + 1)
    value = np.full(shape, np.inf)
    each = np.arange(len(groups.makes))
    for k, costs in enumerate(by_group):
        value[k, groups.strides, each] = costs.stage[:, 0]
    digits, strides = groups.digits, groups.strides
    for state in np.flatnonzero(digits.sum(axis=1) > 1).tolist():
        added = np.flatnonzero(digits[state])
        source = value[:, state - strides[added]]
        source[0][source[0] > most_done] = np.inf
        alive = np.isfinite(source[0]).any(axis=(1, 2))
        if alive.any():
            _extend(by_group, value[:, state], added[alive], source[:, alive])
    return _Table(by_group, value)


def _most_done(groups: Groups, units: Floats, limit: float) -> Floats:
    """Return [layers done] what a cut within the limit may have cost by then.

    The layers still to do cost at least the least over the groups, each.
    """
    least = units[groups.makes].min(axis=0) * (1.0 - TIE)
    to_go = np.concatenate((np.cumsum(least[::-1])[::-1], [0.0]))
    return np.minimum(limit * (1.0 + TIE) - to_go, UNCAPPED)


def _extend(criteria: Sequence[Costs], value: Floats, added: Ints, source: Floats) -> None:
    """Add one device of each group in `added` to the sets that `source` prices."""
    num_layers = value.shape[2] - 1
    arrive = [
        source[k] + costs.hop[:, added].T[:, :, None] for k, costs in enumerate(criteria)
    ]  # fmt: skip
    arrived = least_of(arrive, axis=1)
    run = [
        arrived[k][:, :num_layers, None] + costs.stage[added] for k, costs in enumerate(criteria)
    ]
    for k, least in enumerate(least_of(run, axis=1)):
        value[k, added] = least


def _fewest(groups: Groups, table: _Table, budget: float) -> tuple[int, ...]:
    """Return the order of the cut with the fewest stages within a budget of the first criterion."""
    ends = table.value[:, :, :, -1]
    in_use = groups.digits.sum(axis=1)
    fewest = in_use[(ends[0] <= budget).any(axis=1)].min()
    states = np.flatnonzero(in_use == fewest)
    at = _first_tied([end[states] for end in ends])
    return _walk_back(groups, table, int(states[at[0]]), at[1])


def _first_tied(values: Sequence[Floats]) -> tuple[int, int]:
    flat = int(np.flatnonzero(ties_of([value.ravel() for value in values]))[0])
    return flat // values[0].shape[1], flat % values[0].shape[1]


def _walk_back(groups: Groups, table: _Table, state: int, group: int) -> tuple[int, ...]:
    strides, sequence = groups.strides, [group]
    done = table.value.shape[3] - 1
    num_layers = done
    while state != strides[group]:
        before = state - strides[group]
        values = [
            table.value[k, before, :, :num_layers]
            + costs.hop[:, group][:, None]
            + costs.stage[group, :, done]
            for k, costs in enumerate(table.criteria)
        ]
        state, (group, done) = int(before), _first_tied(values)
        sequence.append(group)
    return groups.named(sequence[::-1])
