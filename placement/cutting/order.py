"""The order in which devices take their stages, where it is free.

Exact over all orders up to 12 devices, more where devices are alike (`placement.cutting.subsets`).
Beyond that a local search, which says how far it is above a proven bound. Devices enter sorted by
id, so the result does not depend on the order they came in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

from placement.cutting.bounds import Bounds, most_layers
from placement.cutting.pricing import Floats, StagePrices
from placement.cutting.search import (
    TIE,
    Costs,
    UnderCap,
    energy_costs,
    latency_costs,
    least_cost,
    least_period_s,
    line_of,
)
from placement.cutting.subsets import Groups, best_order_of_few
from placement.workload import Objective

_MOST_TRIED = 48
"""Orders that the local search tries."""
_POOL = 128
"""Devices that the local search takes in at first: those with the most room and speed."""


class FoundOrder(NamedTuple):
    """Devices in the order of their stages (empty: no cut was found), and whether it is proven."""

    order: tuple[int, ...]
    is_exact: bool


def best_order(prices: StagePrices, objective: Objective, bounds: Bounds) -> FoundOrder:
    """Return an order of devices along which the best cut is the best over all orders, or nearly.

    Up to 12 different devices O(states x groups x (layers^2 + groups x layers)) a sweep, see
    `placement.cutting.subsets`; beyond, at most `_MOST_TRIED` sweeps along orders of at most
    `_POOL` devices.

    Raises:
        ValueError: The objective is energy and some device's power is not known.
    """
    if np.isinf(bounds.bottleneck_s):
        return FoundOrder((), True)
    usable = np.flatnonzero(prices.holds_a_layer[prices.make_of]).tolist()
    pool = _pool(prices, usable, objective)
    found, value = _search(prices, pool, objective, bounds)
    if len(pool) == len(usable):
        return found
    if not found.order:
        return _search(prices, usable, objective, bounds)[0]
    # What the pool leaves out is worth one look.
    every, _ = _Judge(prices, objective, bounds).best([tuple(usable)], beats=value)
    return FoundOrder(every, False) if every else found


def _search(
    prices: StagePrices, devices: Sequence[int], objective: Objective, bounds: Bounds
) -> tuple[FoundOrder, float]:
    """Search among some devices; also return the objective of the best order tried."""
    part = prices.only(devices)
    groups, judge = Groups(part), _Judge(part, objective, bounds)
    order, value = judge.best(_seeds(part, objective))
    if np.isfinite(value):
        order, value = _improved(part, judge, order, value)
    is_proven = value <= judge.bound * (1.0 + TIE)
    if groups.is_small:
        is_proven = len(devices) == int(prices.holds_a_layer[prices.make_of].sum())
        order = best_order_of_few(part, groups, objective, bounds.bottleneck_s, value)
    return FoundOrder(tuple(devices[position] for position in order), is_proven), value


class _Judge:
    """What the best cut along an order is worth; for energy, in joules per step."""

    def __init__(self, prices: StagePrices, objective: Objective, bounds: Bounds) -> None:
        self._prices = prices
        self._costs: Costs | None = None
        self._floor_s = bounds.bottleneck_s
        self._last_cap_s, self._last = np.inf, UnderCap(prices, np.inf)
        self.bound = bounds.period_s
        if objective == "latency":
            self._costs, self.bound = latency_costs(prices), bounds.latency_s
        elif objective == "energy":
            self._costs, self.bound = energy_costs(prices), bounds.energy_j

    def value(self, order: Sequence[int], beats: float = np.inf) -> float:
        """Return the objective along an order; infinite unless it is below `beats`."""
        line = line_of(self._prices, order)
        if self._costs is not None:
            cost = least_cost(line, self._costs)
            return cost if cost < beats * (1.0 - TIE) else np.inf
        if np.isfinite(beats) and not self._under(beats * (1.0 - TIE)).has_period(line):
            return np.inf
        return least_period_s(self._prices, line, self._floor_s, beats)

    def _under(self, cap_s: float) -> UnderCap:
        """Return the cuts under a cap: many orders are held against the same one."""
        if self._last_cap_s != cap_s:
            self._last_cap_s, self._last = cap_s, UnderCap(self._prices, cap_s)
        return self._last

    def best(
        self, orders: Iterable[tuple[int, ...]], beats: float = np.inf
    ) -> tuple[tuple[int, ...], float]:
        """Return the first of the best orders and its value; empty unless it is below `beats`."""
        best: tuple[int, ...] = ()
        best_value = beats
        for order in orders:
            value = self.value(order, best_value)
            if value < best_value:
                best, best_value = order, value
            if best_value <= self.bound * (1.0 + TIE):
                break
        return best, best_value


def _pool(prices: StagePrices, devices: Sequence[int], objective: Objective) -> Sequence[int]:
    """Return the devices worth ordering: the cheapest and the roomiest, ranked alternately."""
    if len(devices) <= _POOL:
        return devices
    cost, held = _cost_and_room(prices, objective)
    by_cost = sorted(devices, key=lambda device: (cost[device], device))
    by_room = sorted(devices, key=lambda device: (-held[device], cost[device], device))
    ranked = dict.fromkeys(each for pair in zip(by_cost, by_room, strict=True) for each in pair)
    return sorted(list(ranked)[:_POOL])


def _cost_and_room(prices: StagePrices, objective: Objective) -> tuple[Floats, Floats]:
    """Return [device] seconds or joules of all layers, and the most layers that fit."""
    watts = prices.watts if objective == "energy" else None
    cost = prices.units_s.sum(axis=1) * (1.0 if watts is None else watts)
    return cost[prices.make_of], most_layers(prices)[prices.make_of]


def _seeds(prices: StagePrices, objective: Objective) -> Iterator[tuple[int, ...]]:
    """Yield orders to start from; a node's devices are adjacent in most."""
    pool = range(len(prices.devices))
    cost, held = _cost_and_room(prices, objective)
    node_of = prices.node_of.tolist()
    nodes: dict[int, list[int]] = {}
    for device in sorted(pool, key=lambda device: (cost[device], -held[device], device)):
        nodes.setdefault(node_of[device], []).append(device)
    worth_of = {n: float((1.0 / cost[devices]).sum()) for n, devices in nodes.items()}
    by_worth = sorted(nodes, key=lambda node: (-worth_of[node], node))
    for start in by_worth[:3]:
        chain = _nearest_first(prices.hop_s, start, by_worth)
        yield tuple(device for node in chain for device in nodes[node])
    yield tuple(device for node in by_worth for device in nodes[node])
    yield tuple(device for node in reversed(by_worth) for device in reversed(nodes[node]))
    yield tuple(sorted(pool, key=lambda device: (cost[device], device)))
    yield tuple(sorted(pool, key=lambda device: (-held[device], device)))
    yield tuple(pool)


def _nearest_first(hop_s: Floats, start: int, nodes: Sequence[int]) -> list[int]:
    """Return a chain of nodes in which each is followed by the quickest to reach of the rest."""
    chain, left = [start], [node for node in nodes if node != start]
    while left:
        nearest = int(np.argmin(hop_s[chain[-1], left]))
        chain.append(left.pop(nearest))
    return chain


def _improved(
    prices: StagePrices, judge: _Judge, order: tuple[int, ...], value: float
) -> tuple[tuple[int, ...], float]:
    """Follow improving moves until none is left, or enough have been tried."""
    moves = _moves(prices, order)
    for _ in range(_MOST_TRIED):
        candidate = next(moves, None)
        if candidate is None or value <= judge.bound * (1.0 + TIE):
            break
        found = judge.value(candidate, value)
        if found < value:
            order, value = candidate, found
            moves = _moves(prices, order)
    return order, value


def _moves(prices: StagePrices, order: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield neighbours: turned round, nodes swapped, one device to an end, two swapped."""
    yield order[::-1]
    node_of = prices.node_of.tolist()
    runs = [tuple(run) for _, run in groupby(order, key=lambda device: node_of[device])]
    for at in range(len(runs) - 1):
        swapped = [*runs[:at], runs[at + 1], runs[at], *runs[at + 2 :]]
        yield tuple(device for run in swapped for device in run)
    for device in order:
        rest = tuple(other for other in order if other != device)
        yield (device, *rest)
        yield (*rest, device)
    for apart in range(1, len(order)):
        for at in range(len(order) - apart):
            swapped_pair = list(order)
            swapped_pair[at], swapped_pair[at + apart] = order[at + apart], order[at]
            yield tuple(swapped_pair)
