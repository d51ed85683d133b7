"""Which replica takes which rows: derived from a map's layer, alike by everyone who has the map.

No leader tells senders where rows go. An expert's n rows are divided over its replicas by their
weights with the largest remainders (Hamilton's method; ties to the first device), in whole rows,
and in the order of the rows: the first rows go to the first device. The same map and the same
counts give the same answer everywhere.

For many rows a sender may first weigh the replicas anew for the very rows of its step
(`RoutingTable.balanced_rows`), which is deterministic too.

Shapes: N rows, E experts, R replicas of one layer (by expert, then device), D devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from placement.packing.weights import solve_weights
from placement.sharding.expert_map import LayerMap

Rows = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingTable:
    """A layer's replicas as arrays; made once for each version of the layer."""

    expert_R: Rows
    device_R: Rows
    """Position of the device in the map."""
    weight_R: NDArray[np.float64]
    first_E: Rows
    """[experts + 1] where each expert's replicas begin."""
    num_devices: int

    @classmethod
    def of_layer(cls, layer: LayerMap, num_experts: int) -> RoutingTable:
        """Lay the replicas of a layer out."""
        copies = sorted(
            (expert, position, weight)
            for position, (experts, weights) in enumerate(
                zip(layer.experts, layer.weights, strict=True)
            )
            for expert, weight in zip(experts, weights, strict=True)
        )
        expert, device, weight = zip(*copies, strict=True)
        counts_E = np.bincount(expert, minlength=num_experts)
        expert_R = np.array(expert, dtype=np.int64)
        # A map's weights sum to nearly 1; divided rows must sum exactly.
        sum_E = np.bincount(expert_R, weights=weight, minlength=num_experts)
        return cls(
            expert_R=expert_R,
            device_R=np.array(device, dtype=np.int64),
            weight_R=np.array(weight) / sum_E[expert_R],
            first_E=np.concatenate(([0], np.cumsum(counts_E))),
            num_devices=len(layer.experts),
        )

    def holders(self) -> list[list[int]]:
        """Return, per expert, the devices that hold it."""
        return [part.tolist() for part in np.split(self.device_R, self.first_E[1:-1])]

    def split(self, rows_E: Rows) -> Rows:
        """Return [R] how many of each expert's rows every replica takes. O(R log R)."""
        return self._apportion(rows_E, rows_E[self.expert_R] * self.weight_R)

    def balanced_rows(self, rows_E: Rows, speeds: Sequence[float]) -> Rows:
        """Return [R] rows of every replica so that the slowest device finishes first.

        Exact for these very rows, but for rounding to whole rows. A fraction of a millisecond for
        128 experts, so for steps of many rows.
        """
        is_shared_E = np.diff(self.first_E) > 1
        quota_R = rows_E[self.expert_R].astype(np.float64)
        # What has no choice is one load on each device.
        fixed_D = self.device_rows(np.where(is_shared_E[self.expert_R], 0, rows_E[self.expert_R]))
        shared = np.flatnonzero(is_shared_E)
        spans = [slice(int(self.first_E[e]), int(self.first_E[e + 1])) for e in shared]
        holders = [self.device_R[span].tolist() for span in spans]
        solved = solve_weights(
            [[device] for device in range(self.num_devices)] + holders,
            fixed_D.tolist() + rows_E[shared].tolist(),
            speeds,
        ).rows[self.num_devices :]
        for span, held, rows in zip(spans, holders, solved, strict=True):
            quota_R[span] = [rows[device] for device in held]
        return self._apportion(rows_E, quota_R)

    def devices_of_rows(self, expert_N: Rows, rows_R: Rows) -> Rows:
        """Return [N] the device that takes every row, given how the rows are divided.

        `rows_R` sums over an expert's replicas to its rows in `expert_N`. O(N log N).
        """
        order_N = np.argsort(expert_N, kind="stable")
        device_N = np.empty(len(expert_N), dtype=np.int64)
        device_N[order_N] = np.repeat(self.device_R, rows_R)
        return device_N

    def device_rows(self, rows_R: NDArray[np.generic]) -> NDArray[np.float64]:
        """Return [D] the rows of every device."""
        rows_D = np.bincount(self.device_R, weights=rows_R, minlength=self.num_devices)
        return rows_D.astype(np.float64)

    def _apportion(self, rows_E: Rows, quota_R: NDArray[np.float64]) -> Rows:
        whole_R = np.floor(quota_R).astype(np.int64)
        left_E = rows_E - np.add.reduceat(whole_R, self.first_E[:-1])
        # By expert, the largest remainder first, then the first device.
        order_R = np.lexsort((self.device_R, whole_R - quota_R, self.expert_R))
        rank_R = np.arange(len(order_R)) - self.first_E[self.expert_R[order_R]]
        extra_R = np.empty_like(whole_R)
        extra_R[order_R] = rank_R < left_E[self.expert_R[order_R]]
        return whole_R + extra_R
