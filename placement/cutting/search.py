"""Exact search over the cuts of a model along devices in a fixed order, each free to stay out.

A cut is a path: the state is (device in use, its first layer), an edge runs layers [first, end) on
the device and hops to a later one. Costs along the path add up, so a backward sweep of min-plus
products over layers finds the cheapest, O(devices x (layers^2 + nodes x layers)), vectorised over
layers. The device last used matters only for the cost of the hop.

Throughput is not additive: the period of a step is the largest of the slowest stage, the busiest
link and latency / lanes, since a lane's next step cannot begin before its last one is done. Let
f(t) be the least latency of a cut none of whose stages and links takes more than t, over the
lanes. The least period is the least max(t, f(t)) over the values t that a stage or a link can
take; t rises and f falls, so the optimum is next to where they cross, found by bisection.

Ties: figures within a part in 10^9 count as equal. Then fewest devices, then least latency, then
the lexicographically smallest layer counts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from placement.cutting.pricing import Floats, Ints, StagePrices
from placement.workload import Objective

TIE = 1e-9
"""Values this close, in proportion, count as equal."""
UNCAPPED = float(np.finfo(np.float64).max)
"""A cap that excludes nothing but what is not allowed at all."""
_NOISE = 1e-12
"""Sums of the same numbers in another order differ by less, in proportion."""


class Costs(NamedTuple):
    """One additive cost: of stages and of the hops between them."""

    stage: Floats
    """[make, first layer, end layer]"""
    hop: Floats
    """[node, node]"""


class Line(NamedTuple):
    """Devices in the order in which stages may use them."""

    makes: Ints
    nodes: Ints


class _Sweep(NamedTuple):
    costs: Costs
    value: Floats
    """[position, first layer] the least cost of layers[first:] with this device first."""
    after: Floats
    """[position, end layer] the least cost of hopping on and running layers[end:]; 0 at the end."""


def line_of(prices: StagePrices, order: Sequence[int]) -> Line:
    """Return the makes and nodes of devices taken in this order."""
    positions = np.array(order, dtype=np.int64)
    return Line(prices.make_of[positions], prices.node_of[positions])


def latency_costs(prices: StagePrices, cap_s: float = UNCAPPED) -> Costs:
    """Return the seconds of stages and hops, without those that keep something busy over a cap."""
    return Costs(
        np.where(prices.steps_s <= cap_s, prices.steps_s, np.inf),
        np.where(prices.occupied_s <= cap_s, prices.hop_s, np.inf),
    )


def energy_costs(prices: StagePrices) -> Costs:
    """Return the joules of stages; hops cost none, but must exist.

    Raises:
        ValueError: Some device's power is not known.
    """
    joules = prices.steps_j
    if joules is None:
        unknown = [device.id for device in prices.devices if device.active_power_w is None]
        raise ValueError(
            f"energy cannot be planned: active_power_w is not set for {len(unknown)} of "
            f"{len(prices.devices)} devices ({', '.join(unknown)}); set it, or plan for "
            f"throughput or latency"
        )
    return Costs(joules, _free_hops(prices.hop_s))


def _free_hops(hop: Floats) -> Floats:
    return np.where(np.isfinite(hop), 0.0, np.inf)


def best_counts(
    prices: StagePrices, objective: Objective, floor_s: float = 0.0
) -> list[int] | None:
    """Return the optimal layer count of every device in its order; None: nothing fits.

    `floor_s` is a bottleneck that no cut is below: a better one saves sweeps.

    O(sweeps) of the module's docstring: about log2(layers^2 x makes) of them for throughput (few,
    where many lanes hide the latency), 2 for latency and energy. Throughput takes one more per
    stage when the cut with the fewest devices takes longer than lanes x period.

    Raises:
        ValueError: The objective is energy and some device's power is not known.
    """
    line = Line(prices.make_of, prices.node_of)
    if objective == "throughput":
        period_s = least_period_s(prices, line, floor_s)
        return None if np.isinf(period_s) else _counts_within(prices, line, period_s)
    costs = latency_costs(prices) if objective == "latency" else energy_costs(prices)
    least = least_cost(line, costs)
    if np.isinf(least):
        return None
    # A stage costs a little extra: a tie goes to the cut with fewer devices.
    extra = TIE * 1e-2 * least
    sweeps = _sweep(line, (Costs(costs.stage + extra, costs.hop), latency_costs(prices)))
    return _walk(line, prices.num_layers, itertools.repeat(sweeps))


def least_cost(line: Line, costs: Costs) -> float:
    """Return the least additive cost of any cut; infinite when none is allowed. 1 sweep.

    What `_sweep` finds by one criterion, without the tables that a cut is read from.
    """
    num_layers = costs.stage.shape[1]
    best_on = np.full((len(costs.hop), num_layers + 1), np.inf)
    for make, node in zip(line.makes[::-1].tolist(), line.nodes[::-1].tolist(), strict=True):
        after = (costs.hop[node][:, None] + best_on).min(axis=0)
        after[num_layers] = 0.0
        best = best_on[node, :num_layers]
        np.minimum(best, (costs.stage[make] + after).min(axis=1), out=best)
    return float(best_on[:, 0].min())


def least_period_s(
    prices: StagePrices, line: Line, floor_s: float, ceiling_s: float = np.inf
) -> float:
    """Return the least period of any cut along the line; infinite when none fits.

    No bottleneck is below `floor_s`; a period above `ceiling_s` is of no interest.
    """
    return crossing_s(
        prices,
        floor_s,
        is_feasible=lambda cap_s: UnderCap(prices, cap_s).reaches_the_end(line),
        latency_s=lambda cap_s: UnderCap(prices, cap_s).latency_s(line),
        ceiling_s=ceiling_s,
    )


def crossing_s(
    prices: StagePrices,
    floor_s: float,
    *,
    is_feasible: Callable[[float], bool],
    latency_s: Callable[[float], float],
    ceiling_s: float = np.inf,
) -> float:
    """Return the least max(t, latency_s(t) / lanes) over the values t of stages and links.

    No t below `floor_s` has a finite latency. Above `ceiling_s` nothing is looked for, and it is
    returned when nothing below is found. `is_feasible` may err towards yes only: it finds where
    latencies begin to be finite.
    """
    lanes = prices.workload.lanes
    begin_s = _least_feasible_s(prices, floor_s, is_feasible)
    if np.isinf(begin_s):
        return begin_s
    if begin_s >= ceiling_s:
        return ceiling_s
    best_s = max(begin_s, latency_s(begin_s) / lanes)
    if best_s == begin_s:
        return best_s
    best_s = min(best_s, ceiling_s)
    # A latency below this no cap reaches, so only the largest cap under it can be of use.
    least_s = latency_s(UNCAPPED) / lanes
    caps_s = _caps_between(prices, begin_s, best_s)
    caps_s = caps_s[max(0, int(np.searchsorted(caps_s, least_s)) - 1) :]
    low, high = -1, len(caps_s)
    while high - low > 1:
        middle = (low + high) // 2
        cap_s = float(caps_s[middle])
        value_s = latency_s(cap_s) / lanes
        best_s = min(best_s, max(cap_s, value_s))
        if value_s <= cap_s:
            high = middle
        else:
            low = middle
            high = min(high, int(np.searchsorted(caps_s, best_s, side="right")))
    return best_s


def _least_feasible_s(
    prices: StagePrices, floor_s: float, is_feasible: Callable[[float], bool]
) -> float:
    """Return the least value of a stage or link under which a cut exists; infinite: none."""
    if not (np.isfinite(floor_s) and is_feasible(UNCAPPED)):
        return np.inf
    low_s = high_s = max(floor_s, float(prices.steps_s.min()))
    while not is_feasible(high_s):
        low_s, high_s = high_s, high_s * 1.25
    caps_s = _caps_between(prices, low_s, high_s)
    low, high = -1, len(caps_s) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if is_feasible(float(caps_s[middle])):
            high = middle
        else:
            low = middle
    return float(caps_s[high])


def _caps_between(prices: StagePrices, low_s: float, high_s: float) -> Floats:
    """Return the distinct values of stages and links in [low, high], and high."""
    values = [array[(array >= low_s) & (array <= high_s)] for array in
              (prices.steps_s, prices.occupied_s)]  # fmt: skip
    return np.unique(np.concatenate([*values, [high_s]]))


def reach_under(prices: StagePrices, cap_s: float) -> Ints:
    """Return [make, layers done] how many layers are done after one more stage, at most.

    Starting later never reaches less far: a stage that begins later runs fewer layers. (Where a
    tied head is counted twice from layer 1 on, that is assumed; so this is never too small.)
    """
    ends = np.arange(prices.num_layers + 1)
    # The stages under a cap that begin at one layer end at all layers up to some one.
    more = np.count_nonzero(prices.steps_s <= cap_s, axis=2)
    reach: Ints = np.broadcast_to(ends, (len(more), len(ends))).copy()
    reach[:, :-1] += more
    return np.maximum.accumulate(reach, axis=1)


class UnderCap:
    """The cuts that keep every stage and link busy for at most `cap_s`, along any line."""

    def __init__(self, prices: StagePrices, cap_s: float) -> None:
        self._prices = prices
        self._cap_s = cap_s

    @cached_property
    def _reach(self) -> list[list[int]]:
        rows: list[list[int]] = reach_under(self._prices, self._cap_s).tolist()
        return rows

    @cached_property
    def _is_open(self) -> NDArray[np.bool_]:
        return self._prices.occupied_s <= self._cap_s

    @cached_property
    def _costs(self) -> Costs:
        return latency_costs(self._prices, self._cap_s)

    def latency_s(self, line: Line) -> float:
        """Return the least latency; infinite when there is no such cut. 1 sweep."""
        return least_cost(line, self._costs)

    def reaches_the_end(self, line: Line) -> bool:
        """Return whether there is such a cut: each stage takes as many layers as it can."""
        num_layers = self._prices.num_layers
        if self._is_open.all():
            done = 0
            for make in line.makes.tolist():
                done = self._reach[make][done]
            return done == num_layers
        done_on = np.zeros(len(self._is_open), dtype=np.int64)
        for make, node in zip(line.makes.tolist(), line.nodes.tolist(), strict=True):
            before = int(done_on[self._is_open[:, node]].max(initial=0))
            done_on[node] = max(done_on[node], self._reach[make][before])
        return bool(done_on.max() == num_layers)

    def has_period(self, line: Line) -> bool:
        """Return whether some such cut has a period of at most the cap too."""
        most_s = self._cap_s * self._prices.workload.lanes
        return self.reaches_the_end(line) and self.latency_s(line) <= most_s


def _sweep(
    line: Line, criteria: Sequence[Costs], following: Sequence[Floats] | None = None
) -> tuple[_Sweep, ...]:
    """Price every continuation, from the last device back, by each of the criteria.

    The first criterion decides, the next one among the equally cheap. `following` holds the
    values of cuts with one stage fewer; without it, stages may be any number.
    """
    num_layers = criteria[0].stage.shape[1]
    shape = (len(criteria), len(line.makes), num_layers + 1)
    value, after = np.full(shape, np.inf), np.full(shape, np.inf)
    source = value if following is None else following
    best_on = np.full((len(criteria), len(criteria[0].hop), num_layers + 1), np.inf)
    steps = zip(line.makes.tolist(), line.nodes.tolist(), strict=True)
    for at, (make, node) in reversed(list(enumerate(steps))):
        onward = [costs.hop[node][:, None] + b for costs, b in zip(criteria, best_on, strict=True)]
        for k, least in enumerate(least_of(onward, axis=0)):
            after[k, at] = least
        if following is None:
            after[:, at, num_layers] = 0.0
        stages = [costs.stage[make] + a for costs, a in zip(criteria, after[:, at], strict=True)]
        for k, least in enumerate(least_of(stages, axis=1)):
            value[k, at, :num_layers] = least
        offered = [np.stack((b[node], s[at])) for b, s in zip(best_on, source, strict=True)]
        for k, least in enumerate(least_of(offered, axis=0)):
            best_on[k, node] = least
    return tuple(_Sweep(*each) for each in zip(criteria, value, after, strict=True))


def least_of(values: Sequence[Floats], axis: int) -> list[Floats]:
    """Return the least of each value along an axis, among those least by the values before."""
    least = [values[0].min(axis=axis)]
    tied: NDArray[np.bool_] | None = None
    for earlier, value in itertools.pairwise(values):
        limit = np.expand_dims(least[-1], axis) * (1.0 + _NOISE)
        tied = (earlier <= limit) if tied is None else tied & (earlier <= limit)
        least.append(np.where(tied, value, np.inf).min(axis=axis))
    return least


def _counts_within(prices: StagePrices, line: Line, period_s: float) -> list[int]:
    """Return the counts with the fewest devices, then the least latency, within a period."""
    limit_s = period_s * (1.0 + TIE)
    latency = latency_costs(prices, limit_s)
    devices = Costs(np.where(np.isfinite(latency.stage), 1.0, np.inf), _free_hops(latency.hop))
    sweeps = _sweep(line, (devices, latency))
    budget_s = limit_s * prices.workload.lanes
    fewest = sweeps[0].value[:, 0] == sweeps[0].value[:, 0].min()
    if sweeps[1].value[fewest, 0].min() <= budget_s:
        return _walk(line, prices.num_layers, itertools.repeat(sweeps))
    return _walk(line, prices.num_layers, _exact_sweeps(line, latency, budget_s))


def _exact_sweeps(line: Line, latency: Costs, budget_s: float) -> list[tuple[_Sweep, ...]]:
    """Return the sweeps of the fewest stages within a latency: all of them first, one last."""
    num_layers = latency.stage.shape[1]
    none_left = np.full((len(line.makes), num_layers + 1), np.inf)
    none_left[:, num_layers] = 0.0
    value = np.full_like(none_left, np.inf)
    value[:, :num_layers] = latency.stage[line.makes, :, num_layers]
    sweeps: list[tuple[_Sweep, ...]] = [(_Sweep(latency, value, none_left),)]
    while sweeps[-1][0].value[:, 0].min() > budget_s:
        sweeps.append(_sweep(line, (latency,), (sweeps[-1][0].value,)))
    return sweeps[::-1]


def _walk(line: Line, num_layers: int, sweeps_of_stages: Iterable[Sequence[_Sweep]]) -> list[int]:
    """Follow the cheapest path; among equals the last device, then the fewest layers.

    That gives the lexicographically smallest counts: as many leading zeros as possible, then the
    smallest count.
    """
    counts = [0] * len(line.makes)
    first, begin = 0, 0
    stages = iter(sweeps_of_stages)
    while first < num_layers:
        sweeps = next(stages)
        values = [sweep.value[begin:, first] for sweep in sweeps]
        if begin:
            node, later = line.nodes[begin - 1], line.nodes[begin:]
            values = [v + s.costs.hop[node, later] for v, s in zip(values, sweeps, strict=True)]
        at = begin + int(np.flatnonzero(ties_of(values))[-1])
        make = line.makes[at]
        ends = [sweep.costs.stage[make, first] + sweep.after[at] for sweep in sweeps]
        end = int(np.flatnonzero(ties_of(ends))[0])
        counts[at], first, begin = end - first, end, at + 1
    return counts


def ties_of(values: Sequence[Floats]) -> NDArray[np.bool_]:
    """Return which entries are least by the first value, then by the next, but for rounding."""
    tied = np.ones(len(values[0]), dtype=np.bool_)
    for value in values:
        tied &= value <= value[tied].min() * (1.0 + _NOISE)
    return tied
