"""Which devices cannot hold their old layers and their new ones at once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from placement.moving.transit import tight_devices
from placement.stages import StagesPlan, plan_stages
from placement.topology import Device, Topology
from placement.workload import LayerCost, ModelProfile, ServingWorkload

MIB = 2**20
NUM_LAYERS = 8
KV_TOKENS = 1024
LAYER = LayerCost(flops_per_token=1e6, weight_bytes=10 * MIB, kv_bytes_per_token=2 * 1024)
"""12 MiB with its KV."""
SMALL = LayerCost(flops_per_token=0.0, weight_bytes=MIB)
PROFILE = ModelProfile(
    name="eight", embedding=SMALL, layers=(LAYER,) * NUM_LAYERS, head=SMALL,
    hidden_bytes_per_token=4,
)  # fmt: skip


def cut(counts: Sequence[int], memories_mib: Sequence[float]) -> StagesPlan:
    devices = tuple(
        Device(
            id=f"d{i}", node="n", kind="cpu", flops_per_s=1e9, memory_bytes_per_s=1e9,
            memory_bytes=int(mib * MIB / 0.9),
        )
        for i, mib in enumerate(memories_mib)
    )  # fmt: skip
    workload = ServingWorkload(
        lanes=1, sequences_per_lane=1, context_tokens_per_sequence=KV_TOKENS,
        kv_tokens=KV_TOKENS, step_tokens=1,
    )  # fmt: skip
    return plan_stages(PROFILE, Topology(devices=devices), workload=workload, layer_counts=counts)


CASES = [
    # d1 holds [4, 8) and gets [2, 8) or [3, 8): what it has stays, so the new part alone counts.
    ((4, 4), (2, 6), (200, 80), ()),
    # Disjoint parts count in full: d1 held [2, 4) and gets [4, 6).
    ((2, 2, 4), (4, 2, 2), (200, 49, 200), ()),
    ((2, 2, 4), (4, 2, 2), (200, 45, 200), ("d1",)),
    # Overlapping ones count once: d1 held [2, 5), gets [4, 6): [2, 6) in all.
    ((2, 3, 3), (4, 2, 2), (200, 49, 200), ()),
    ((2, 3, 3), (4, 2, 2), (200, 45, 200), ("d1",)),
    # A device that is new, or has nothing any more, holds one part alone.
    ((4, 4, 0), (0, 4, 4), (200, 110, 60), ()),
]


@pytest.mark.parametrize(("old", "new", "memories_mib", "expected"), CASES)
def test_both_parts_must_fit_each_layer_once(
    old: Sequence[int],
    new: Sequence[int],
    memories_mib: Sequence[float],
    expected: tuple[str, ...],
) -> None:
    before, after = cut(old, memories_mib), cut(new, memories_mib)
    assert tight_devices(before, after, PROFILE, kv_tokens=KV_TOKENS) == expected
