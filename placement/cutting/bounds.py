"""Lower bounds on what any cut can do, in any order of the devices.

Each docstring proves its bound. They are compared with plans as certificates, and start searches.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from placement.cutting.pricing import Floats, StagePrices

_HALVINGS = 16


class Bounds(NamedTuple):
    """What no cut in any order is below; infinite where no stage fits at all."""

    bottleneck_s: float
    """Of the slowest stage."""
    period_s: float
    latency_s: float
    energy_j: float
    """Of one step; 0 when some device's power is not known."""


def bounds_of(prices: StagePrices) -> Bounds:
    """Return the bounds of every objective.

    One device that holds the whole model is priced exactly; every other cut hops at least once.
    So a bound is the smaller of the two cases: see `_split_latency_bound_s`; a split period is at
    least the largest of `bottleneck_bound_s`, the least time that some link is busy, and the split
    latency over the lanes. O(makes x layers^2 x log(1 / precision) + devices log devices).
    """
    bottleneck_s = bottleneck_bound_s(prices)
    alone_s = float(prices.steps_s[:, 0, -1].min())
    latency_s = _split_latency_bound_s(prices)
    busy_s = float(prices.occupied_s[_pairs(prices)].min(initial=np.inf))
    period_s = max(bottleneck_s, busy_s, latency_s / prices.workload.lanes)
    steps_j, watts = prices.steps_j, prices.watts
    energy_j = (
        _sum_bound(prices, steps_j, prices.units_s * watts[:, None])
        if steps_j is not None and watts is not None
        else 0.0
    )
    figures = (bottleneck_s, min(alone_s, period_s), min(alone_s, latency_s), energy_j)
    return Bounds(*map(float, figures))


def bottleneck_bound_s(prices: StagePrices) -> float:
    """Return a time that the slowest stage of no cut can beat, in any order of the devices.

    For any weights w >= 0 of the layers let m[d](t) be the largest weight of consecutive layers
    that device d runs within t and within its memory. A cut whose slowest stage takes t gives
    every layer to some device, so the sum over d of m[d](t) is at least the sum of w. The bound
    is the largest of the least such t for three choices of w:
    - one layer counts, the others do not: a layer cannot be split;
    - all layers count 1. With c[d][n] the least time of n consecutive layers on d, the sum
      reaches L layers exactly at the L-th smallest of all c[d][n];
    - layer l counts min over d of (t[d][l] / T[d]), its share of device d's time for all layers.
      As m[d](t) <= t / T[d], this is never below total work over combined speed.
    Infinite where memory alone rules out every cut.
    """
    usable = prices.holds_a_layer
    if not usable.any():
        return np.inf
    # The least over all stages that contain a layer: the layer alone, but for a tied head.
    around = np.minimum.accumulate(prices.steps_s.min(axis=0), axis=0)
    around = np.minimum.accumulate(around[:, ::-1], axis=1)[:, ::-1]
    largest_s = float(np.diagonal(around, offset=1).max())
    counted_s = _counting_bound_s(prices)
    low_s = max(largest_s, counted_s)
    return low_s if np.isinf(low_s) else _sharing_bound_s(prices, _shares(prices), low_s)


def _shares(prices: StagePrices) -> Floats:
    units = prices.units_s[prices.holds_a_layer]
    shares: Floats = (units / units.sum(axis=1, keepdims=True)).min(axis=0)
    return shares


def _counting_bound_s(prices: StagePrices) -> float:
    last = prices.num_layers
    first, count = np.arange(last)[:, None], np.arange(1, last + 1)[None, :]
    end = np.where(first + count <= last, first + count, 0)
    least_s: Floats = prices.steps_s[:, first, end].min(axis=1)
    # n + 1 layers contain n; only a tied head counted twice could say otherwise.
    least_s = np.minimum.accumulate(least_s[:, ::-1], axis=1)[:, ::-1]
    every = least_s[prices.make_of].ravel()
    return float(np.partition(every, last - 1)[last - 1])


def _sharing_bound_s(prices: StagePrices, weights: Floats, low_s: float) -> float:
    """Raise a bound as far as the weights prove: the low end of every halving is proven."""
    steps_s = prices.steps_s
    inside = _range_sums(weights)
    number_of = np.bincount(prices.make_of)
    target = float(weights.sum()) * (1.0 - 1e-12)

    def is_ruled_out(cap_s: float) -> bool:
        most = np.where(steps_s <= cap_s, inside, 0.0).max(axis=(1, 2))
        return bool(most @ number_of < target)

    high_s = low_s
    while is_ruled_out(high_s):
        low_s, high_s = high_s, 2.0 * high_s
        if high_s > steps_s[np.isfinite(steps_s)].max():
            break
    for _ in range(_HALVINGS if high_s > low_s else 0):
        middle_s = (low_s + high_s) / 2.0
        low_s, high_s = (
            (middle_s, high_s) if is_ruled_out(middle_s) else (low_s, middle_s)
        )  # fmt: skip
    return low_s


def _range_sums(weights: Floats) -> Floats:
    """Return [first, end] sums; 0 where end <= first."""
    sums = np.concatenate(([0.0], np.cumsum(weights)))
    inside: Floats = np.maximum(sums[None, :] - sums[:-1, None], 0.0)
    return inside


def _split_latency_bound_s(prices: StagePrices) -> float:
    """Return a time that no cut into two stages or more can beat, in any order of the devices.

    The larger of two. The steps take at least `_sum_bound`; with the devices that hold most, at
    least s of them are needed, and of the nodes n: so there are at least s - 1 hops and at least
    one, n - 1 of them between nodes, each at least as long as the quickest of its sort.

    And for any F: every stage but the last hops on, for at least its device's quickest hop; so
    the stages with a fee each of that hop, but at most F, cost at least `_sum_bound`, and F of it
    is too much. F is the quickest hop of all, or the median of the devices' quickest.
    """
    pairs = _pairs(prices)
    onward_s = np.where(pairs, prices.hop_s, np.inf).min(axis=1, initial=np.inf)[prices.node_of]
    hop_s = float(onward_s.min())
    if np.isinf(hop_s):
        return np.inf
    apart = ~np.eye(len(prices.nodes), dtype=np.bool_)
    between_s = float(prices.hop_s[apart].min(initial=np.inf))
    held = most_layers(prices)[prices.make_of]
    of_node = np.bincount(prices.node_of, weights=held).astype(np.float64)
    between = _fewest(of_node, prices.num_layers) - 1
    hops = max(1, _fewest(held, prices.num_layers) - 1)
    hops_s = hop_s * (hops - between) + (between_s * between if between else 0.0)
    bound_s = _sum_bound(prices, prices.steps_s, prices.units_s) + hops_s
    for most_s in (hop_s, float(np.median(onward_s[np.isfinite(onward_s)]))):
        fees = np.minimum(onward_s, most_s)
        bound_s = max(bound_s, _sum_bound(prices, prices.steps_s, prices.units_s, fees) - most_s)
    return bound_s


def _sum_bound(
    prices: StagePrices, costs: Floats, units: Floats, fees: Floats | None = None
) -> float:
    """Return what the stages of no cut cost less than, in sum, each with its device's fee on top.

    The larger of two. Every layer costs at least the least over the devices that hold any, and
    there is a stage. And for layer weights w: device d's stage costs at least r[d] times its
    weight, r[d] being the least ratio over the stages that fit, and weighs at most m[d], so its fee
    is at least fee[d] / m[d] times its weight; all stages weigh W together. So the sum is at least
    that of filling W from the devices of the least r[d] + fee[d] / m[d] on, each up to m[d] (a
    fractional knapsack).
    """
    usable = prices.holds_a_layer
    if not usable.any():
        return np.inf
    fees = np.zeros(len(prices.devices)) if fees is None else fees
    total = float(units[usable].min(axis=0).sum() + fees.min())
    for weights in (np.ones(prices.num_layers), _shares(prices)):
        inside = _range_sums(weights)
        ratio = (costs / np.where(inside > 0.0, inside, 1.0)).min(axis=(1, 2))[prices.make_of]
        most = np.where(np.isfinite(costs), inside, 0.0).max(axis=(1, 2))[prices.make_of]
        ratio = np.where(most > 0.0, ratio + fees / np.where(most > 0.0, most, 1.0), np.inf)
        total = max(total, _filled(ratio, most, float(weights.sum())))
    # Rounding alone could put the bound a hair above an optimum that meets it.
    return total * (1.0 - 1e-12)


def _filled(ratio: Floats, most: Floats, weight: float) -> float:
    """Return the least sum of ratio x share with shares up to `most` that add up to `weight`."""
    order = np.argsort(ratio, kind="stable")
    before = np.concatenate(([0.0], np.cumsum(most[order])[:-1]))
    shares = np.clip(weight - before, 0.0, most[order])
    used = shares > 0.0
    return float((ratio[order][used] * shares[used]).sum())


def most_layers(prices: StagePrices) -> Floats:
    """Return [make] how many consecutive layers fit at most."""
    spans = np.arange(prices.num_layers + 1.0)[None, :] - np.arange(prices.num_layers)[:, None]
    most: Floats = np.where(np.isfinite(prices.steps_s), spans, 0.0).max(axis=(1, 2))
    return most


def _fewest(held: Floats, num_layers: int) -> int:
    """Return how many holders must at least be used: those of the most layers first."""
    enough = np.flatnonzero(np.cumsum(np.sort(held)[::-1]) >= num_layers)
    return int(enough[0]) + 1 if len(enough) else len(held)


def _pairs(prices: StagePrices) -> NDArray[np.bool_]:
    """Return [node, node] which pairs two different devices can be on."""
    pairs = np.ones_like(prices.hop_s, dtype=np.bool_)
    np.fill_diagonal(pairs, np.bincount(prices.node_of) > 1)
    return pairs
