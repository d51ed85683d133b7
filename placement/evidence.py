"""Which units of an input are worth shipping: important and diverse ones, never over budget.

A unit is what can be shipped by itself: an image patch, a chunk of a text, a window of a sensor.
The server sees the chosen units alone, so what counts is what they tell together. `diverse` at its
defaults is the selection of SAGE (Choi and Park, arXiv 2604.19623): of the 2B most important units
it takes the most important one, then always the one that is least like all that have been taken.

Everything is deterministic, and of equals the lowest index is taken. Shapes: N units, D embedding,
L layers, H heads, T tokens (a class token before the N units).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Method = Literal["diverse", "balanced", "important", "grid", "random"]
Importance = Literal["attention", "rollout"]
Floats = npt.NDArray[np.floating]


@dataclass(frozen=True, slots=True, eq=False)
class Units:
    """What an edge knows of the units of one input."""

    importance_N: Floats
    """0 or more each."""
    embeddings_ND: Floats
    """A vector each; their directions are compared."""
    grid: tuple[int, int] | None = None
    """Rows and columns of patches, in row-major order; None: the units lie in one row."""

    def __post_init__(self) -> None:
        num_units = len(self.importance_N)
        if self.importance_N.ndim != 1 or self.embeddings_ND.ndim != 2:
            raise ValueError(
                f"units have importance of shape {self.importance_N.shape} and embeddings of shape "
                f"{self.embeddings_ND.shape}; they must be (N,) and (N, D)"
            )
        if len(self.embeddings_ND) != num_units:
            raise ValueError(f"{len(self.embeddings_ND)} embeddings are of {num_units} units")
        if self.grid is not None and self.grid[0] * self.grid[1] != num_units:
            raise ValueError(f"a grid of {self.grid[0]}x{self.grid[1]} is not of {num_units} units")
        if not (np.isfinite(self.importance_N).all() and (self.importance_N >= 0).all()):
            raise ValueError("the importance of a unit is negative or no number")
        if not np.isfinite(self.embeddings_ND).all():
            raise ValueError("the embedding of a unit is no number")

    def __len__(self) -> int:
        return len(self.importance_N)


@dataclass(frozen=True, kw_only=True, slots=True)
class Selector:
    """A way to choose units."""

    method: Method = "diverse"
    """diverse: importance, then farthest-point sampling. balanced: importance and diversity weighed
    at each choice (MMR). important: importance alone. grid, random: without a look at them."""
    importance: Importance = "attention"
    """attention: of the last layer. rollout: through the layers."""
    prefilter: float = 2.0
    """Of diverse: how many times the budget the most important units are that it chooses among; 1:
    importance alone, infinite: diversity alone."""
    importance_weight: float = 0.5
    """Of balanced: from 0 (diversity alone) to 1 (importance alone)."""
    seed: int = 0
    """Of random."""

    def __post_init__(self) -> None:
        if not self.prefilter >= 1.0:
            raise ValueError(f"prefilter ({self.prefilter}) must be 1 or more")
        if not 0.0 <= self.importance_weight <= 1.0:
            raise ValueError(f"importance_weight ({self.importance_weight}) must be from 0 to 1")


SAGE = Selector()
SELECTORS: dict[str, Selector] = {
    "sage": SAGE,
    "prefix": Selector(method="important"),
    "grid": Selector(method="grid"),
    "random": Selector(method="random"),
    "mmr": Selector(method="balanced"),
    "rollout": Selector(method="important", importance="rollout"),
    "rollout-mmr": Selector(method="balanced", importance="rollout"),
    "rollout-diverse": Selector(method="diverse", importance="rollout", prefilter=1.25),
}
"""By the names under which settings and benchmarks know them."""


def select(
    units: Units, budget: int, selector: Selector = SAGE, *, prices_N: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Return the indices of the chosen units, in the order in which they were chosen.

    With prices, the sum of those of the chosen units is at most the budget, in the same unit (bits,
    tokens); without, every unit costs 1. Nothing that still fits is left out.

    Raises:
        ValueError: The budget is negative, or a price is not positive.
    """
    prices = _prices(len(units), prices_N)
    if budget < 0:
        raise ValueError(f"the budget ({budget}) must be 0 or more")
    choose = _Choice(prices, budget)
    _METHODS[selector.method](units, selector, choose)
    return tuple(choose.taken)


def _prices(num_units: int, prices_N: Sequence[int] | None) -> npt.NDArray[np.int64]:
    if prices_N is None:
        return np.ones(num_units, dtype=np.int64)
    prices = np.asarray(prices_N, dtype=np.int64)
    if prices.shape != (num_units,) or (prices < 1).any():
        raise ValueError(f"prices must be {num_units} positive whole numbers")
    return prices


class _Choice:
    """What has been taken, and what may still be."""

    def __init__(self, prices: npt.NDArray[np.int64], budget: int) -> None:
        self.prices = prices
        self.left = budget
        self.taken: list[int] = []
        self._is_open = np.ones(len(prices), dtype=bool)

    def affordable(self, among: npt.NDArray[np.bool_] | None = None) -> npt.NDArray[np.bool_]:
        """Which units are not taken and fit what is left of the budget."""
        fits: npt.NDArray[np.bool_] = self._is_open & (self.prices <= self.left)
        return fits if among is None else fits & among

    def take(self, unit: int) -> None:
        self.taken.append(unit)
        self.left -= int(self.prices[unit])
        self._is_open[unit] = False

    def take_in_order(self, order: Sequence[int] | npt.NDArray[np.intp]) -> None:
        """Take what fits, one after the other."""
        for unit in order:
            if self._is_open[unit] and self.prices[unit] <= self.left:
                self.take(int(unit))


def _by_importance(units: Units) -> npt.NDArray[np.intp]:
    return np.argsort(-units.importance_N, kind="stable")


def _take_important(units: Units, _: Selector, choose: _Choice) -> None:
    choose.take_in_order(_by_importance(units))


def _take_diverse(units: Units, selector: Selector, choose: _Choice) -> None:
    candidates = _prefiltered(units, selector.prefilter, choose)
    _take_by_score(
        units, choose, candidates, lambda nearest_N: np.where(candidates, -nearest_N, -np.inf)
    )
    # Where prices differ the candidates may leave room that others fill.
    _take_important(units, selector, choose)


def _prefiltered(units: Units, ratio: float, choose: _Choice) -> npt.NDArray[np.bool_]:
    """The most important units, for `ratio` times what those cost that the budget buys alone."""
    order = _by_importance(units)
    alone = _Choice(choose.prices, choose.left)
    alone.take_in_order(order)
    cost = int(choose.prices[alone.taken].sum())
    is_candidate = np.zeros(len(units), dtype=bool)
    if math.isinf(ratio):
        is_candidate[:] = True
    else:
        # 1.15 * 20 is a little less than 23.
        within = np.cumsum(choose.prices[order]) <= ratio * cost * (1 + 1e-12)
        is_candidate[order[within]] = True
        is_candidate[alone.taken] = True
    return is_candidate


def _take_balanced(units: Units, selector: Selector, choose: _Choice) -> None:
    weight = selector.importance_weight
    most = float(units.importance_N.max(initial=0.0))
    importance_N = units.importance_N / most if most > 0 else units.importance_N
    everything = np.ones(len(units), dtype=bool)
    _take_by_score(
        units,
        choose,
        everything,
        lambda nearest_N: weight * importance_N - (1.0 - weight) * nearest_N,
    )


def _take_by_score(
    units: Units,
    choose: _Choice,
    among: npt.NDArray[np.bool_],
    score: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]],
) -> None:
    """Take the most important unit, then always the one of the highest score, which is told how
    alike (cosine) every unit is to the nearest that is taken."""
    directions_ND = _normalised(units.embeddings_ND)
    nearest_N = np.full(len(units), -np.inf)
    while (open_N := choose.affordable(among)).any():
        values_N = score(nearest_N) if choose.taken else units.importance_N
        unit = int(np.argmax(np.where(open_N, values_N, -np.inf)))
        if not open_N[unit]:  # all that are open have no finite score
            unit = int(np.argmax(open_N))
        choose.take(unit)
        np.maximum(nearest_N, directions_ND @ directions_ND[unit], out=nearest_N)


def _normalised(embeddings_ND: Floats) -> npt.NDArray[np.float64]:
    """Directions; that of a zero vector is zero, so it is like nothing."""
    own = embeddings_ND.astype(np.float64)
    norms = np.linalg.norm(own, axis=1, keepdims=True)
    return own / np.where(norms > 0, norms, 1.0)


def _take_grid(units: Units, _: Selector, choose: _Choice) -> None:
    rows, columns = units.grid or (1, len(units))
    budget = min(len(units), choose.left // max(1, int(choose.prices.max(initial=1))))
    choose.take_in_order(grid_units(rows, columns, budget))
    # Where prices differ there is room for more: every other place, as far apart as before.
    choose.take_in_order(grid_units(rows, columns, rows * columns))


def grid_units(rows: int, columns: int, count: int) -> list[int]:
    """Return `count` places of a grid (row-major indices), spread as evenly as rows allow."""
    if count <= 0:
        return []
    num_rows = min(rows, max(math.ceil(count / columns), round(math.sqrt(count * rows / columns))))
    num_rows = max(1, num_rows)
    places = []
    for number in range(num_rows):
        row = (2 * number + 1) * rows // (2 * num_rows)
        in_row = (number + 1) * count // num_rows - number * count // num_rows
        places += [
            row * columns + (2 * each + 1) * columns // (2 * in_row) for each in range(in_row)
        ]
    return places


def _take_random(units: Units, selector: Selector, choose: _Choice) -> None:
    draws = np.random.Generator(np.random.Philox(key=selector.seed))
    choose.take_in_order(draws.permutation(len(units)))


_METHODS: dict[Method, Callable[[Units, Selector, _Choice], None]] = {
    "diverse": _take_diverse,
    "balanced": _take_balanced,
    "important": _take_important,
    "grid": _take_grid,
    "random": _take_random,
}


def attention_importance(attention_HTT: Floats) -> npt.NDArray[np.float64]:
    """Importance (N,) by one layer's attention: from the class token to each unit, mean over heads,
    of sum 1."""
    return _shares(attention_HTT.astype(np.float64).mean(axis=0)[0, 1:])


def rollout_importance(attention_LHTT: Floats, first_layer: int = 0) -> npt.NDArray[np.float64]:
    """Importance (N,) by attention rollout (Abnar and Zuidema, arXiv 2005.00928) from a layer on.

    Each layer passes on half of a token as it is (the residual) and half by its mean attention.
    """
    means_LTT = attention_LHTT[first_layer:].astype(np.float64).mean(axis=1)
    class_T = np.zeros(means_LTT.shape[-1])
    class_T[0] = 1.0
    for layer_TT in means_LTT[::-1]:
        class_T = 0.5 * class_T + 0.5 * class_T @ layer_TT
    return _shares(class_T[1:])


def _shares(importance_N: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    total = importance_N.sum()
    return importance_N / total if total > 0 else importance_N
