"""Fleets for replays: unequal devices whose memory goes with their speed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from placement.errors import InfeasiblePlanError
from placement.experts import ExpertDevice

HOME_LAB_ROWS_PER_S = (2e5, 2e5, 1e5, 1e5, 1e5, 1e5, 5e4, 5e4)
"""Eight devices of three generations."""
ROWS_PER_READ = 32
"""Rows that take as long as reading the expert's weights: what a device's compute over its memory
bandwidth comes to for a few rows more or less."""
DEVICES_PER_NODE = 2


def proportional_fleet(
    rows_per_s: Sequence[float], num_experts: int, *, spare_slots: int = 1
) -> list[ExpertDevice]:
    """Return devices with slots for one copy of every expert by speed, and spare ones each.

    Two neighbours share a node.

    Raises:
        ValueError: A speed is not positive, or `spare_slots` below 0.
        InfeasiblePlanError: There is no device.
    """
    if spare_slots < 0:
        raise ValueError(f"spare_slots ({spare_slots}) must be 0 or more")
    if not rows_per_s:
        raise InfeasiblePlanError("a fleet of 0 devices holds no expert; name at least 1 speed")
    for speed in rows_per_s:
        if not (math.isfinite(speed) and speed > 0):
            raise ValueError(f"rows_per_s ({speed}) must be above 0 and finite")
    quota = num_experts * np.array(rows_per_s) / sum(rows_per_s)
    slots = np.floor(quota).astype(np.int64)
    most_short = np.argsort(slots - quota, kind="stable")[: num_experts - int(slots.sum())]
    slots[most_short] += 1
    width = len(str(len(rows_per_s) - 1))
    return [
        ExpertDevice(
            id=f"device{index:0{width}}",
            node=f"node{index // DEVICES_PER_NODE:0{width}}",
            rows_per_s=speed,
            slots_per_layer=int(count) + spare_slots,
            expert_read_s=ROWS_PER_READ / speed,
        )
        for index, (speed, count) in enumerate(zip(rows_per_s, slots, strict=True))
    ]
