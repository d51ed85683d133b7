"""Replica weights: how many of an expert's rows each device that holds it takes, exactly.

For a given placement the least possible finish time of the slowest device is

    T* = max over sets A of experts of w(A) / s(N(A))

with w(A) the rows of A, N(A) the devices that hold some of A, and s(N(A)) their rows per second:
rows of A can go nowhere else, so no weights beat it, and the maximum-flow minimum-cut theorem
(Ford and Fulkerson, 1956) says that some weights meet it. The maximising A is returned with the
weights: two sums and a division check that they are optimal.

The search is the discrete Newton method on T (Dinkelbach, 1967): a flow within the devices' rows at
T either carries everything, or leaves a cut whose w(A) / s(N(A)) is the next, larger T. A few
rounds suffice, and the flow of one round is where the next starts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

SLACK = 1e-12
"""Rows, as a fraction of a layer's rows, below which an excess is rounding."""
FILL_ROUNDS = 2
"""Passes of `_pour` before the flow: they leave few paths to find, and level the devices that the
slowest one leaves free."""


class ReplicaWeights(NamedTuple):
    """The rows of every replica, the time they take, and why no weights take less."""

    rows: list[dict[int, float]]
    """Per expert: device -> rows it takes of that expert."""
    finish_s: list[float]
    """Per device."""
    bottleneck_s: float
    critical_devices: frozenset[int]
    """N(A) of the maximising A, which is every expert that these devices alone hold."""

    def shares(self) -> list[dict[int, float]]:
        """Return, per expert, device -> its share of the rows; equal ones where there are none."""
        return [_shares(rows) for rows in self.rows]


def _shares(rows: Mapping[int, float]) -> dict[int, float]:
    total = math.fsum(rows.values())
    if total <= 0:
        return dict.fromkeys(rows, 1.0 / len(rows))
    return {device: part / total for device, part in rows.items()}


def solve_weights(
    holders: Sequence[Sequence[int]], loads: Sequence[float], speeds: Sequence[float]
) -> ReplicaWeights:
    """Split every expert's rows over its holders so that the slowest device finishes earliest.

    `holders[expert]` are the devices that hold it, at least one each; `loads[expert]` its rows;
    `speeds[device]` rows per second. Exact up to rounding. O(paths x replicas) per Newton round.
    """
    flow = _Flow(holders, loads, speeds)
    target_s = sum(loads) / sum(speeds[device] for device in flow.used)
    critical = frozenset(flow.used)
    while stuck := flow.drain(target_s):
        # Nothing leaves `stuck`, so their rows are w(A) and they are N(A).
        next_s = sum(flow.rows_on[d] for d in stuck) / sum(speeds[d] for d in stuck)
        if next_s <= target_s:
            break
        target_s, critical = next_s, frozenset(stuck)
    finish_s = [rows / speed for rows, speed in zip(flow.rows_on, speeds, strict=True)]
    return ReplicaWeights(flow.rows, finish_s, max(finish_s), critical)


def cut_bound_s(
    holders: Sequence[Sequence[int]],
    loads: Sequence[float],
    speeds: Sequence[float],
    devices: frozenset[int],
) -> float:
    """Return w(A) / s(devices) with A the experts that `devices` alone hold.

    Every set of devices gives a bound that no weights of this placement beat; the
    `critical_devices` of `solve_weights` give the largest.
    """
    rows = sum(load for load, held in zip(loads, holders, strict=True) if devices.issuperset(held))
    return rows / sum(speeds[device] for device in devices)


class _Flow:
    """Rows on their way to devices; every change keeps each expert's rows whole."""

    def __init__(
        self, holders: Sequence[Sequence[int]], loads: Sequence[float], speeds: Sequence[float]
    ) -> None:
        self.speeds = speeds
        self.slack_rows = SLACK * sum(loads)
        self.rows: list[dict[int, float]] = [{} for _ in holders]
        self.rows_on = [0.0] * len(speeds)
        self.shared_on: list[list[int]] = [[] for _ in speeds]
        """Per device the experts that it shares with another."""
        self.used: list[int] = sorted({device for held in holders for device in held})
        shared = []
        for expert, held in enumerate(holders):
            if len(held) == 1:
                self.rows[expert] = {held[0]: loads[expert]}
                self.rows_on[held[0]] += loads[expert]
            else:
                shared.append(expert)
                for device in held:
                    self.shared_on[device].append(expert)
        shared.sort(key=lambda expert: -loads[expert])
        for _ in range(FILL_ROUNDS):
            for expert in shared:
                self._pour(expert, holders[expert], loads[expert])

    def _pour(self, expert: int, held: Sequence[int], load: float) -> None:
        """Spread an expert anew so that its holders finish level, as water finds its level."""
        rows, rows_on, speeds = self.rows[expert], self.rows_on, self.speeds
        for device, old_rows in rows.items():
            rows_on[device] -= old_rows
        by_level = sorted((rows_on[device] / speeds[device], device) for device in held)
        speed, water, level_s = 0.0, load, 0.0
        for base_s, device in by_level:
            if speed and base_s >= water / speed:
                break
            speed += speeds[device]
            water += rows_on[device]
        level_s = water / speed
        for _, device in by_level:
            new_rows = max(0.0, level_s * speeds[device] - rows_on[device])
            rows[device] = new_rows
            rows_on[device] += new_rows

    def drain(self, target_s: float) -> list[int]:
        """Move rows off the devices that finish after `target_s` onto others, by shortest paths.

        Return no device when none is late, else those that late rows can reach: none of them has
        room, and no expert with rows on them has a holder outside.
        """
        room = [
            target_s * speed - rows for speed, rows in zip(self.speeds, self.rows_on, strict=True)
        ]
        while late := [device for device in self.used if room[device] < -self.slack_rows]:
            came_from, end = self._reach(late, room)
            if end is None:
                return list(came_from)
            path = _path(came_from, end)
            moved = min(
                room[end], -room[path[0][1]], *(self.rows[expert][d] for expert, d, _ in path)
            )
            for expert, source, sink in path:
                self.rows[expert][source] -= moved
                self.rows[expert][sink] += moved
            for device, change in ((path[0][1], -moved), (end, moved)):
                self.rows_on[device] += change
                room[device] -= change
        return []

    def _reach(
        self, late: Sequence[int], room: Sequence[float]
    ) -> tuple[dict[int, tuple[int, int]], int | None]:
        """Search breadth first; return (expert, device before) per device, and one with room."""
        came_from = dict.fromkeys(late, (-1, -1))
        queue = list(late)
        seen_experts: set[int] = set()
        for device in queue:
            for expert in self.shared_on[device]:
                if expert in seen_experts or self.rows[expert][device] <= self.slack_rows:
                    continue
                seen_experts.add(expert)
                for other in self.rows[expert]:
                    if other not in came_from:
                        came_from[other] = (expert, device)
                        if room[other] > self.slack_rows:
                            return came_from, other
                        queue.append(other)
        return came_from, None


def _path(came_from: dict[int, tuple[int, int]], end: int) -> list[tuple[int, int, int]]:
    """Return the (expert, from, to) steps from a late device to `end`."""
    steps = []
    expert, before = came_from[end]
    while before >= 0:
        steps.append((expert, before, end))
        end = before
        expert, before = came_from[end]
    return steps[::-1]
