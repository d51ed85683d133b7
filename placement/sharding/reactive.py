"""A prefill whose rows surprise the placement: experts change devices for one step, inside a node.

After FEPLB (arXiv 2604.19654): a device computes its static experts first; meanwhile the weights of
a few dynamic experts are copied to devices of the same node that have less to do, into buffers kept
for that. Whole experts move, rows and all, so that no multiplication gets smaller. A copy costs
nothing as long as it ends before the static work beside it does.

Every sender derives the same plan from the same counts; nobody is asked.

Moving the weights instead of the rows pays from n* rows on, which are as many bytes, there and
back, as the expert has: n* = 1.5 f b_w / b_a for the three matrices of a gated expert of width f,
with b_w bytes a weight and b_a bytes an activation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from placement.experts import ExpertDevice
from placement.sharding.routing import RoutingTable

GATED_MATRICES_OVER_TWO_WAYS = 1.5
"""Three matrices of d x f weights, against a row of d activations that goes and comes back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReactiveTerms:
    """What may move, and what that costs."""

    num_dynamic: int = 4
    """Experts of each device that may leave it; the others are its static work."""
    num_buffers: int = 8
    """Experts that a device can take in for a step."""
    least_rows: int
    """An expert with fewer rows stays (tau); see `break_even_rows`."""
    copy_s: Mapping[str, float]
    """By node: seconds to copy one expert between two of its devices."""
    plan_s: float = 0.0
    """Seconds until the first copy begins, which static work must hide too."""

    def __post_init__(self) -> None:
        for name in ("num_dynamic", "num_buffers", "least_rows", "plan_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be 0 or more")
        for node, seconds in self.copy_s.items():
            if not (math.isfinite(seconds) and seconds >= 0):
                raise ValueError(f"copy_s of {node} ({seconds}) must be 0 or more and finite")


@dataclass(frozen=True, kw_only=True, slots=True)
class ReactiveMove:
    """One replica's rows of this step, and the weights, go to another device of the node."""

    expert: int
    source: int
    """Position of the device in the map."""
    target: int
    rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ReactivePlan:
    """What changes devices for one step of one layer."""

    moves: tuple[ReactiveMove, ...]
    before_s: tuple[float, ...]
    """[devices] finish as the map has it."""
    after_s: tuple[float, ...]


def break_even_rows(expert_width: int, *, weight_bytes: float, activation_bytes: float) -> float:
    """Return n*: with more rows than that, an expert's weights are fewer bytes than its rows.

    Args:
        expert_width: f, the width between the expert's matrices.
        weight_bytes: Of one weight as it travels: 2 in bfloat16, 0.5 in 4 bits.
        activation_bytes: Of one number of a row.
    """
    return GATED_MATRICES_OVER_TWO_WAYS * expert_width * weight_bytes / activation_bytes


def plan_reactive(
    table: RoutingTable,
    rows_R: NDArray[np.int64],
    devices: Sequence[ExpertDevice],
    terms: ReactiveTerms,
) -> ReactivePlan:
    """Level the devices of every node for one step, as far as copies hide.

    The device that ends last gives its largest dynamic expert that has not moved to the device of
    its node that would end first with it, if that is before it would have itself; repeated until
    it has none to give. `rows_R` are the rows of each replica. Ties go to the lower position.
    O(moves x devices x experts that may move).
    """
    work = _Work(table, rows_R, devices, terms)
    before_s = tuple(work.finish_s.tolist())
    moves = []
    while move := work.best_move(int(work.finish_s.argmax())):
        work.apply(move)
        moves.append(move)
    return ReactivePlan(
        moves=tuple(moves), before_s=before_s, after_s=tuple(work.finish_s.tolist())
    )


class _Work:
    """Who has what to do, while moves are added."""

    def __init__(
        self,
        table: RoutingTable,
        rows_R: NDArray[np.int64],
        devices: Sequence[ExpertDevice],
        terms: ReactiveTerms,
    ) -> None:
        self._devices, self._terms = devices, terms
        self._speeds = np.array([device.rows_per_s for device in devices])
        self.finish_s = table.device_rows(rows_R) / self._speeds
        self._held: list[set[int]] = [
            set(table.expert_R[table.device_R == d].tolist()) for d in range(len(devices))
        ]
        self._dynamic = [self._largest(table, rows_R, d) for d in range(len(devices))]
        """Per device (rows, expert) that may still leave it, largest first."""
        self._static_s = [
            self.finish_s[d] - sum(rows for rows, _ in self._dynamic[d]) / self._speeds[d]
            for d in range(len(devices))
        ]
        self._copying_s = [terms.plan_s] * len(devices)
        """When the last copy from or to each device ends."""
        self._num_taken = [0] * len(devices)

    def _largest(
        self, table: RoutingTable, rows_R: NDArray[np.int64], device: int
    ) -> list[tuple[int, int]]:
        here = np.flatnonzero(table.device_R == device)
        sized = sorted((-int(rows_R[r]), int(table.expert_R[r])) for r in here)
        return [(-rows, expert) for rows, expert in sized[: self._terms.num_dynamic]]

    def best_move(self, source: int) -> ReactiveMove | None:
        for rows, expert in self._dynamic[source]:
            if rows < max(1, self._terms.least_rows):
                return None
            targets = [d for d in range(len(self._devices)) if self._can_take(d, source, expert)]
            if not targets:
                continue
            target = min(targets, key=lambda d: self.finish_s[d] + rows / self._speeds[d])
            if self.finish_s[target] + rows / self._speeds[target] < self.finish_s[source]:
                return ReactiveMove(expert=expert, source=source, target=target, rows=rows)
        return None

    def _can_take(self, target: int, source: int, expert: int) -> bool:
        if target == source or self._devices[target].node != self._devices[source].node:
            return False
        if expert in self._held[target] or self._num_taken[target] >= self._terms.num_buffers:
            return False
        hidden_s = min(self._static_s[source], self._static_s[target])
        return bool(self._copied_s(source, target) <= hidden_s)

    def _copied_s(self, source: int, target: int) -> float:
        """Return when one more copy would end: a device takes part in one at a time."""
        copy_s = self._terms.copy_s.get(self._devices[target].node, math.inf)
        return max(self._copying_s[source], self._copying_s[target]) + copy_s

    def apply(self, move: ReactiveMove) -> None:
        source, target = move.source, move.target
        self._copying_s[source] = self._copying_s[target] = self._copied_s(source, target)
        self._num_taken[target] += 1
        self._held[target].add(move.expert)
        self._dynamic[source].remove((move.rows, move.expert))
        self.finish_s[source] -= move.rows / self._speeds[source]
        self.finish_s[target] += move.rows / self._speeds[target]
