"""Expert loads with known placements or optima, shared by the tests and the bench.

Sources: the example in the README of github.com/deepseek-ai/EPLB (V1; V2 is the same without groups
and nodes; V3 their exact optima); the counter-example of vllm-ascend pull request 3042 (V4); V1's
first layer on unequal devices (V5).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from placement.experts import ExpertDevice

README_LOADS = (
    (90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86),
    (20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27),
)
SKEWED_LOADS = ((600, 560, 120, 120, 20, 10, 10, 10),)
UNEQUAL_SPEEDS = (20.0, 12.0, 7.0, 7.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class EplbVector:
    """EPLB's input with its output."""

    name: str
    loads: tuple[tuple[int, ...], ...]
    num_slots: int
    num_devices: int
    num_nodes: int
    num_groups: int
    expert_of_slot: tuple[tuple[int, ...], ...]
    device_rows: tuple[tuple[float, ...], ...] = ()
    """Empty: not published."""
    bottleneck_rows: tuple[float, ...]

    @property
    def load_rows(self) -> NDArray[np.float64]:
        return np.array(self.loads, dtype=np.float64)


@dataclass(frozen=True, kw_only=True, slots=True)
class UnequalVector:
    """One layer on devices that differ, with what is known of its optimum."""

    name: str
    slots: tuple[int, ...]
    bound_s: float
    optimum_s: float

    @property
    def load_rows(self) -> NDArray[np.float64]:
        return np.array(README_LOADS[:1], dtype=np.float64)

    @property
    def devices(self) -> list[ExpertDevice]:
        return expert_devices(UNEQUAL_SPEEDS, self.slots)


def expert_devices(
    speeds: tuple[float, ...], slots: tuple[int, ...], *, num_nodes: int = 1
) -> list[ExpertDevice]:
    """Return devices d00, d01, ... in equal shares on nodes n0, n1, ..."""
    per_node = len(speeds) // num_nodes
    return [
        ExpertDevice(
            id=f"d{index:02d}",
            node=f"n{index // per_node}",
            rows_per_s=speed,
            slots_per_layer=count,
            expert_read_s=1.0 / speed,
        )
        for index, (speed, count) in enumerate(zip(speeds, slots, strict=True))
    ]


V1 = EplbVector(
    name="V1 README",
    loads=README_LOADS,
    num_slots=16,
    num_devices=8,
    num_nodes=2,
    num_groups=4,
    expert_of_slot=(
        (5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1),
        (7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1),
    ),
    device_rows=(
        (121.5, 86.5, 125.0, 113.0, 147.5, 131.5, 156.0, 152.0),
        (173.0, 179.5, 120.5, 172.0, 123.0, 152.0, 118.5, 117.5),
    ),
    bottleneck_rows=(156.0, 179.5),
)
V2 = EplbVector(
    name="V2 README without groups",
    loads=README_LOADS,
    num_slots=16,
    num_devices=8,
    num_nodes=1,
    num_groups=1,
    expert_of_slot=(
        (10, 6, 10, 7, 0, 2, 11, 4, 5, 9, 5, 4, 8, 3, 1, 1),
        (1, 10, 2, 4, 5, 11, 5, 0, 6, 7, 6, 3, 8, 8, 9, 7),
    ),
    bottleneck_rows=(138.5, 172.0),
)
V4 = EplbVector(
    name="V4 two hot experts",
    loads=SKEWED_LOADS,
    num_slots=16,
    num_devices=8,
    num_nodes=1,
    num_groups=1,
    expert_of_slot=((0, 1, 2, 1, 3, 1, 0, 4, 0, 5, 0, 6, 0, 7, 1, 1),),
    bottleneck_rows=(232.0,),
)
EPLB_VECTORS = (V1, V2, V4)

V3_OPTIMUM_ROWS = (129.25, 146.0)
"""V2's layers with free parts: the best HiGHS found in 100 s (its bounds: 129.125, 145.986)."""
V4_EQUAL_SPLIT_ROWS = 196.0 + 2.0 / 3.0
"""V4's exact optimum when an expert's replicas take equal parts."""
V4_OPTIMUM_ROWS = 181.25
"""V4's exact optimum with free parts: the mean."""
V4_EPLB_EXACT_WEIGHTS_ROWS = 200.0
"""EPLB's placement of V4 with the best weights."""
V4_FLASHLB_ROWS = 205.0
"""What FlashLB reaches on V4."""

V5_NO_REPLICA = UnequalVector(
    name="V5 no spare slot", slots=(5, 3, 2, 2), bound_s=1033.0 / 46.0, optimum_s=22.75
)
V5_LOOSE = UnequalVector(
    name="V5 ten spare slots", slots=(8, 6, 4, 4), bound_s=1033.0 / 46.0, optimum_s=1033.0 / 46.0
)
V5_FOUR_SPARE = UnequalVector(
    name="V5 four spare slots", slots=(6, 4, 3, 3), bound_s=1033.0 / 46.0, optimum_s=1033.0 / 46.0
)
UNEQUAL_VECTORS = (V5_NO_REPLICA, V5_LOOSE, V5_FOUR_SPARE)
