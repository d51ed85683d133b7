"""Label-setting search for the Pareto front of cuts: period, latency and energy at once.

A label is what the layers from some one on cost when a device begins there: (bottleneck, latency,
energy). Longer cuts grow from shorter ones by max and plus, which keep dominance, so dominated
labels are dropped at every device and layer (Martins, "On a multicriteria shortest path problem",
1984). The period, max(bottleneck, latency / lanes), grows with both, so the front of labels holds
the front of periods.

Labels are compared on a logarithmic grid: one is dropped when another's cell is nowhere higher.
Cells are fixed, so drops do not add up within a stage, and a chain of at most n stages loses at
most a factor (1 + cell)^n. With epsilon 0 a cell is as wide as rounding. A label is also dropped
when the best that can become of it, with the layers before at their cheapest, is covered by a known
cut within some slack. Cells and slack may each lose the square root of 1 + epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from placement.cutting.pricing import Floats, Ints, StagePrices

_ROUNDING = 1e-11
_FEW = 48
"""Labels that are cheaper to compare each with each."""


Stages = tuple[tuple[int, int, int], ...]
"""(device or position, first layer, end layer) of each stage."""


class Chain(NamedTuple):
    """Which device may follow which: every chain of positions is an order of stages."""

    makes: Ints
    nodes: Ints
    following: tuple[tuple[int, ...], ...]
    """[position] later positions."""
    is_first: tuple[bool, ...]
    """[position] whether the first stage may be here."""
    is_later: tuple[bool, ...]
    """[position] whether another stage may be."""
    most_stages: int


class Cut(NamedTuple):
    """A cut and its period, latency and energy of a step."""

    values: tuple[float, float, float]
    stages: Stages


class _Labels(NamedTuple):
    values: Floats
    """[label, (bottleneck, latency, energy)]"""
    end: Ints
    """[label] where the stage ends."""
    position: Ints
    """[label] of the next stage; -1: none."""
    label: Ints
    """[label] of the next stage's."""

    def take(self, indices: Ints | NDArray[np.bool_]) -> _Labels:
        values, rest = self.values[indices], (self.end, self.position, self.label)
        return _Labels(values, *(array[indices] for array in rest))


class Question(NamedTuple):
    """What a search prices labels by."""

    prices: StagePrices
    joules: Floats
    """[make, first layer, end layer]; zeros where energy is no axis."""
    least_s: float
    """No period is below it, so no bottleneck needs to be told from it."""


def search_front(
    question: Question,
    chain: Chain,
    before: Floats,
    known: Sequence[tuple[float, float, float]],
    epsilon: float,
    budget: int,
) -> list[Cut] | None:
    """Return cuts, by position, that with the known ones cover all others.

    Within a factor 1 + epsilon on every axis; with 0 they hold the front itself. `before` is
    `cheapest_before` of the chain. None: more than `budget` labels would have been looked at.
    """
    num_layers = question.prices.num_layers
    half = math.log1p(epsilon) / 2.0
    cell = math.expm1(half / chain.most_stages) if epsilon else _ROUNDING
    cover = _Cover(question.prices.workload.lanes, before, known, math.exp(half))
    tables: dict[int, list[_Labels | None]] = {}
    for position in reversed(range(len(chain.makes))):
        onward = [_onward(question, chain, tables, position, end) for end in range(num_layers)]
        budget -= sum(len(labels.end) for labels in onward if labels is not None)
        onward.append(_finished(question.least_s))
        table: list[_Labels | None] = [None] * num_layers
        for first in range(num_layers):
            if not (chain.is_first[position] if first == 0 else chain.is_later[position]):
                continue
            labels = _begun(question, int(chain.makes[position]), first, onward)
            if labels is None:
                continue
            budget -= len(labels.end)
            if budget < 0:
                return None
            labels = labels.take(_undominated(labels.values, cell))
            table[first] = cover.uncovered(labels, position, first)
        tables[position] = table
    return _read(question, chain, tables)


def _finished(least_s: float) -> _Labels:
    none = np.array([-1], dtype=np.int64)
    return _Labels(np.array([[least_s, 0.0, 0.0]]), none, none, none)


def _onward(
    question: Question,
    chain: Chain,
    tables: dict[int, list[_Labels | None]],
    position: int,
    end: int,
) -> _Labels | None:
    """Return the labels of hopping on to any position that runs layers[end:]."""
    prices, node = question.prices, chain.nodes[position]
    parts = []
    for later in chain.following[position] if end else ():
        labels = tables[later][end]
        hop_s = prices.hop_s[node, chain.nodes[later]]
        if labels is None or np.isinf(hop_s):
            continue
        values = labels.values + np.array([0.0, hop_s, 0.0])
        np.maximum(values[:, 0], prices.occupied_s[node, chain.nodes[later]], out=values[:, 0])
        each = np.arange(len(values))
        parts.append(_Labels(values, each, np.full(len(values), later), each))
    if not parts:
        return None
    labels = _joined(parts)
    return labels.take(_undominated(labels.values, _ROUNDING)) if len(parts) > 1 else labels


def _begun(
    question: Question, make: int, first: int, onward: Sequence[_Labels | None]
) -> _Labels | None:
    """Return the labels of a stage from `first` to any end that fits."""
    parts = []
    for end in np.flatnonzero(np.isfinite(question.prices.steps_s[make, first])).tolist():
        labels = onward[end]
        if labels is None:
            continue
        step_s = question.prices.steps_s[make, first, end]
        values = labels.values + np.array([0.0, step_s, question.joules[make, first, end]])
        np.maximum(values[:, 0], step_s, out=values[:, 0])
        parts.append(_Labels(values, np.full(len(values), end), labels.position, labels.label))
    return _joined(parts) if parts else None


def _joined(parts: Sequence[_Labels]) -> _Labels:
    return _Labels(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


class _Cover:
    """Known cuts, against the best that a label can become."""

    def __init__(
        self,
        lanes: int,
        before: Floats,
        known: Sequence[tuple[float, float, float]],
        slack: float,
    ) -> None:
        self._lanes = lanes
        self._known = np.array(known).reshape(-1, 3)
        self._slack = slack
        self._before = before

    def uncovered(self, labels: _Labels, position: int, first: int) -> _Labels | None:
        bottleneck_s, latency_s, energy_j = self._before[:, position, first]
        totals = labels.values + np.array([0.0, latency_s, energy_j])
        np.maximum(totals[:, 0], bottleneck_s, out=totals[:, 0])
        np.maximum(totals[:, 0], totals[:, 1] / self._lanes, out=totals[:, 0])
        covered = (self._known[None] <= totals[:, None] * self._slack).all(axis=2).any(axis=1)
        left = labels.take(~covered)
        return left if len(left.end) else None


def cheapest_before(question: Question, chain: Chain) -> Floats:
    """Return [axis, position, first layer] what the stages before cost at least, each axis alone.

    Infinite where no chain of stages leads there. O(positions x (layers^2 + positions x layers)).
    """
    prices = question.prices
    before = np.full((3, len(chain.makes), prices.num_layers + 1), np.inf)
    before[:, list(chain.is_first), 0] = 0.0
    for position, (make, node) in enumerate(zip(chain.makes, chain.nodes, strict=True)):
        here = before[:, position, :-1, None]
        busy_s = np.maximum(here[0], prices.steps_s[make]).min(axis=0)
        latency_s = (here[1] + prices.steps_s[make]).min(axis=0)
        energy_j = (here[2] + question.joules[make]).min(axis=0)
        later = list(chain.following[position])
        hop_s = prices.hop_s[node, chain.nodes[later], None]
        hop_busy_s = prices.occupied_s[node, chain.nodes[later], None]
        is_open = np.where(np.isfinite(hop_s), 0.0, np.inf)
        onward = (np.maximum(busy_s, hop_busy_s), latency_s + hop_s, energy_j + is_open)
        before[:, later] = np.minimum(before[:, later], np.stack(onward))
    return before


def _undominated(values: Floats, cell: float) -> Ints:
    """Return the labels whose cell none other's is nowhere above, one for each cell.

    In the order of their values. O(n^2) for few, O(distinct first values x n) at worst for many.
    """
    logs = np.log(np.maximum(values, np.finfo(np.float64).tiny))
    cells = np.floor(logs / math.log1p(cell))
    order = np.lexsort((*values.T[::-1], *cells.T[::-1]))
    cells = cells[order]
    if len(order) <= _FEW:
        below = (cells[:, None] <= cells[None]).all(axis=2)
        # Sorted, so only an earlier label can be nowhere above.
        return order[~np.triu(below, k=1).any(axis=0)]
    starts = np.flatnonzero(np.diff(cells[:, 0], prepend=-np.inf))
    stairs, kept = np.empty((0, 2)), []
    for begin, end in zip(starts, [*starts[1:], len(cells)], strict=True):
        group = cells[begin:end, 1:]
        fresh = np.flatnonzero(_is_step(group))
        at = np.searchsorted(stairs[:, 0], group[fresh, 0], side="right") - 1
        above = np.where(at >= 0, stairs[at, 1] if len(stairs) else np.inf, np.inf)
        fresh = fresh[group[fresh, 1] < above]
        if len(fresh):
            kept.append(order[begin + fresh])
            merged = np.concatenate((stairs, group[fresh]))
            merged = merged[np.lexsort((merged[:, 1], merged[:, 0]))]
            stairs = merged[_is_step(merged)]
    return np.concatenate(kept)


def _is_step(pairs: Floats) -> NDArray[np.bool_]:
    """Return which of the pairs, sorted, have a second value below all before them."""
    least = np.minimum.accumulate(pairs[:, 1])
    return pairs[:, 1] < np.concatenate(([np.inf], least[:-1]))


def _read(question: Question, chain: Chain, tables: dict[int, list[_Labels | None]]) -> list[Cut]:
    lanes = question.prices.workload.lanes
    cuts = []
    for start in range(len(chain.makes)):
        labels = tables[start][0]
        for index in range(0 if labels is None else len(labels.end)):
            assert labels is not None
            bottleneck_s, latency_s, energy_j = labels.values[index].tolist()
            stages = _stages(tables, start, index)
            cuts.append(Cut((max(bottleneck_s, latency_s / lanes), latency_s, energy_j), stages))
    return cuts


def _stages(tables: dict[int, list[_Labels | None]], position: int, index: int) -> Stages:
    stages: list[tuple[int, int, int]] = []
    first = 0
    while position >= 0:
        labels = tables[position][first]
        assert labels is not None
        end = int(labels.end[index])
        stages.append((position, first, end))
        position, index, first = int(labels.position[index]), int(labels.label[index]), end
    return tuple(stages)


def front_of(cuts: Sequence[Cut]) -> list[Cut]:
    """Return the undominated cuts; among equals the fewest stages, then the first."""
    ranked = sorted(cuts, key=lambda cut: (len(cut.stages), cut.stages))
    values = np.array([cut.values for cut in ranked]).reshape(-1, 3)
    return [ranked[index] for index in _undominated(_snapped(values), _ROUNDING)]


def _snapped(values: Floats) -> Floats:
    """Give values that differ by rounding only the same value: that of the least."""
    snapped = values.copy()
    for column in snapped.T:
        order = np.argsort(column, kind="stable")
        ascending = column[order]
        fresh = np.diff(ascending, prepend=-np.inf) > 1e-9 * np.abs(ascending)
        column[order] = ascending[np.maximum.accumulate(np.where(fresh, np.arange(len(fresh)), 0))]
    return snapped
