"""Answer here, or ship what raises the server's chance of being right: the decision of an edge.

An answer here costs nothing more. Everything else is a route: units that are chosen, features of a
cut, or the whole input. What a route is worth for an input of this confidence and with as many
units as the budget allows has been calibrated on held-out inputs; so with a tight budget, where the
server would do worse than the edge, nothing is shipped.

Confidence is min-entropy, -log2 of the likeliest class's probability, in bits (0: certain).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from placement.uplink import Uplink

RouteKind = Literal["units", "features", "everything"]
HERE = "here"
_PRIOR_INPUTS = 4.0
"""A bin's accuracy is drawn to that of all bins as if by so many inputs more."""
Floats = npt.NDArray[np.float64]


def min_entropy_bits(probabilities_C: npt.ArrayLike) -> float:
    """-log2 of the largest probability.

    Raises:
        ValueError: They are no probabilities.
    """
    values = np.asarray(probabilities_C, dtype=np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all() or values.min() < 0:
        raise ValueError("probabilities must be one row of numbers from 0 to 1")
    most = float(values.max())
    if not 0 < most <= 1 + 1e-6:
        raise ValueError(f"the largest probability is {most}, not above 0 and at most 1")
    return max(0.0, -math.log2(most))


@dataclass(frozen=True, slots=True)
class Calibration:
    """How often edge and server are right, by the edge's confidence and the number of units."""

    bounds: tuple[float, ...]
    """Min-entropies that part the bins, ascending: one fewer than bins."""
    edge: tuple[float, ...]
    """The edge's accuracy in each bin."""
    budgets: tuple[int, ...]
    """Numbers of units, ascending, from 0 on."""
    server: tuple[tuple[float, ...], ...]
    """The server's accuracy in each bin at each of these budgets; not falling with the budget."""

    def __post_init__(self) -> None:
        num_bins = len(self.edge)
        if num_bins < 1 or len(self.bounds) != num_bins - 1 or len(self.server) != num_bins:
            raise ValueError(
                f"a calibration of {num_bins} bins has {len(self.bounds)} bounds and "
                f"{len(self.server)} rows of the server"
            )
        if list(self.budgets) != sorted(set(self.budgets)) or not self.budgets:
            raise ValueError(f"budgets {self.budgets} must ascend")
        if any(len(row) != len(self.budgets) for row in self.server):
            raise ValueError(f"a row of the server is not of {len(self.budgets)} budgets")
        if list(self.bounds) != sorted(self.bounds):
            raise ValueError(f"bounds {self.bounds} must ascend")
        if not all(0 <= value <= 1 for row in (self.edge, *self.server) for value in row):
            raise ValueError("an accuracy is not from 0 to 1")

    @classmethod
    def fit(
        cls,
        entropies_S: npt.ArrayLike,
        edge_right_S: npt.ArrayLike,
        budgets: Sequence[int],
        server_right_SB: npt.ArrayLike,
        *,
        num_bins: int = 8,
    ) -> Calibration:
        """Calibrate on held-out inputs (S) whose answers are known, at these budgets.

        Bins hold equally many inputs. The server's accuracy is made not to fall with the budget by
        isotonic regression.
        """
        entropies = np.asarray(entropies_S, dtype=np.float64)
        edge_right = np.asarray(edge_right_S, dtype=np.float64)
        server_right = np.asarray(server_right_SB, dtype=np.float64)
        if server_right.shape != (len(entropies), len(budgets)) or not len(entropies):
            raise ValueError(
                f"{len(entropies)} inputs at {len(budgets)} budgets are not of shape "
                f"{server_right.shape}"
            )
        quantiles = np.quantile(entropies, np.arange(1, num_bins) / num_bins)
        bounds = np.unique(quantiles)
        bin_S = np.searchsorted(bounds, entropies, side="right")
        num_found = len(bounds) + 1
        edge, server = [], []
        for each in range(num_found):
            inside = bin_S == each
            edge.append(_drawn(edge_right[inside], edge_right.mean()))
            row = [
                _drawn(server_right[inside, column], server_right[:, column].mean())
                for column in range(len(budgets))
            ]
            server.append(tuple(_isotonic(np.array(row)).tolist()))
        return cls(tuple(bounds.tolist()), tuple(edge), tuple(budgets), tuple(server))

    def edge_accuracy(self, entropy_bits: float) -> float:
        """How likely the edge is right."""
        return self.edge[self._bin(entropy_bits)]

    def server_accuracy(self, entropy_bits: float, num_units: int) -> float:
        """How likely the server is right on so many units; between budgets, what the lower one is
        good for."""
        row = self.server[self._bin(entropy_bits)]
        column = int(np.searchsorted(self.budgets, num_units, side="right")) - 1
        return row[column] if column >= 0 else 0.0

    def enough_units(self, entropy_bits: float, most_units: int) -> int:
        """The fewest units that are as good as `most_units`."""
        best = self.server_accuracy(entropy_bits, most_units)
        row = self.server[self._bin(entropy_bits)]
        good = (b for b, value in zip(self.budgets, row, strict=True) if value >= best)
        return min(next(good, most_units), most_units)

    def _bin(self, entropy_bits: float) -> int:
        return int(np.searchsorted(self.bounds, entropy_bits, side="right"))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "bounds": list(self.bounds),
            "edge": list(self.edge),
            "budgets": list(self.budgets),
            "server": [list(row) for row in self.server],
        }


def _drawn(right: Floats, overall: float) -> float:
    value = (right.sum() + _PRIOR_INPUTS * overall) / (len(right) + _PRIOR_INPUTS)
    return float(np.clip(value, 0.0, 1.0))


def _isotonic(values: Floats) -> Floats:
    """The closest values (least squares) that do not fall: pool adjacent violators."""
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, count = float(value), 1
        while pools and pools[-1][0] > mean:
            other, others = pools.pop()
            mean, count = (mean * count + other * others) / (count + others), count + others
        pools.append((mean, count))
    return np.concatenate([np.full(count, mean) for mean, count in pools])


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """A way to have the server answer."""

    name: str
    kind: RouteKind
    num_units: int
    """Of the input; a cut and a whole input are shipped with all of them."""
    unit_bits: int
    header_bits: int
    calibration: Calibration
    prepare_s: float = 0.0
    """On the edge, before anything is sent."""
    server_s: float = 0.0
    """Until the server has answered, once it has everything."""
    prepare_joules: float = 0.0

    def bits(self, num_units: int) -> int:
        """Bits of a message with so many units: header, which ones they are, and themselves."""
        return self.header_bits + self._index_bits(num_units) + num_units * self.unit_bits

    def most_units(self, budget_bits: int) -> int:
        """How many units a message of at most so many bits holds; 0 where none is of use."""
        # All of them need no list, and may cost less than all but one.
        if self.bits(self.num_units) <= budget_bits:
            return self.num_units
        if self.kind != "units":
            return 0
        low, high = 0, self.num_units
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.bits(middle) <= budget_bits else (low, middle - 1)
        return low

    def _index_bits(self, num_units: int) -> int:
        """A bitmap, or a list of indices where that is shorter; nothing where all are sent."""
        if num_units == self.num_units:
            return 0
        return min(self.num_units, num_units * max(1, (self.num_units - 1).bit_length()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one request may cost."""

    time_left_s: float
    """Until its deadline."""
    bits: int
    """The least of what is allowed for a request and what is left of the day."""
    joules: float = math.inf
    """What is left of the energy."""
    joules_per_bit: float = 0.0
    caution: float = 2.0
    """Standard deviations of rate and round trip that are kept in reserve."""
    least_gain: float = 0.0
    """Of expected accuracy, for which anything is shipped; it must be more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """Where an input is answered."""

    route: str
    """A route's name, or `HERE`."""
    num_units: int
    most_bits: int
    """Hard: what is sent for it has at most so many."""
    expected_accuracy: float
    accuracy_here: float
    reason: str
    """In words."""


def decide(
    entropy_bits: float, routes: Sequence[Route], uplink: Uplink, limits: Limits, *, here: float
) -> Decision:
    """Choose the way with the highest expected accuracy that keeps every limit.

    Of equally good ways the one of the fewest bits is chosen, so the edge answers itself unless
    another gains.

    Args:
        here: How likely the edge is right, as calibrated.
    """
    best = Decision(
        route=HERE, num_units=0, most_bits=0, expected_accuracy=here, accuracy_here=here,
        reason="nothing that fits is expected to be right more often",
    )  # fmt: skip
    fits_any = False
    for route in routes:
        budget = _budget_bits(route, uplink, limits)
        most = route.most_units(budget)
        if most < 1:
            continue
        fits_any = True
        calibration = route.calibration
        units = calibration.enough_units(entropy_bits, most) if route.kind == "units" else most
        expected = calibration.server_accuracy(entropy_bits, units)
        bits = route.bits(units)
        least = max(best.expected_accuracy, here + limits.least_gain)
        is_cheaper = expected == best.expected_accuracy and bits < best.most_bits
        if units >= 1 and (expected > least or is_cheaper):
            best = Decision(
                route=route.name, num_units=units, most_bits=bits, expected_accuracy=expected,
                accuracy_here=here,
                reason=f"right {expected:.1%} of the time with {units} units, {here:.1%} here",
            )  # fmt: skip
    if not fits_any:
        reason = f"no route fits {limits.bits} bits and {limits.time_left_s:.3g} s"
        return Decision(
            route=HERE, num_units=0, most_bits=0, expected_accuracy=here, accuracy_here=here,
            reason=reason,
        )  # fmt: skip
    return best


def _budget_bits(route: Route, uplink: Uplink, limits: Limits) -> int:
    """The bits that a route may send: of the request, of the time left, of the energy left."""
    sending_s = limits.time_left_s - route.prepare_s - route.server_s
    budget = min(limits.bits, uplink.bits_within(sending_s, limits.caution))
    joules = limits.joules - route.prepare_joules
    if joules < 0:
        return 0
    if limits.joules_per_bit > 0 and math.isfinite(joules):
        budget = min(budget, math.floor(joules / limits.joules_per_bit))
    return budget
