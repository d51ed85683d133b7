from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from expert_vectors import EPLB_VECTORS, V1, EplbVector
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.packing.eplb import EplbPlacement, pack_balanced, rebalance_experts, replicate


def rebalance(vector: EplbVector) -> EplbPlacement:
    return rebalance_experts(
        vector.load_rows,
        num_slots=vector.num_slots,
        num_devices=vector.num_devices,
        num_nodes=vector.num_nodes,
        num_groups=vector.num_groups,
    )


def device_rows(vector: EplbVector, placement: EplbPlacement) -> Any:
    layers = np.arange(len(vector.loads))[:, None]
    rows = vector.load_rows / placement.num_replicas
    return (
        rows[layers, placement.expert_of_slot].reshape(layers.size, vector.num_devices, -1).sum(2)
    )


@pytest.mark.parametrize("vector", EPLB_VECTORS, ids=lambda vector: vector.name)
def test_the_published_placements_are_reproduced_slot_by_slot(vector: EplbVector) -> None:
    placement = rebalance(vector)

    assert placement.expert_of_slot.tolist() == [list(slots) for slots in vector.expert_of_slot]
    rows = device_rows(vector, placement)
    assert rows.max(axis=1).tolist() == list(vector.bottleneck_rows)
    if vector.device_rows:
        assert rows.tolist() == [list(layer) for layer in vector.device_rows]


def test_groups_stay_on_one_node() -> None:
    placement = rebalance(V1)

    for experts in placement.expert_of_slot.reshape(2, V1.num_nodes, -1):
        groups = [{int(expert) // 3 for expert in node} for node in experts]
        assert groups[0].isdisjoint(groups[1])


def test_the_way_back_leads_from_an_expert_to_its_slots() -> None:
    placement = rebalance(V1)

    for layer, experts in enumerate(placement.expert_of_slot):
        for expert in range(12):
            slots = placement.slots_of_expert[layer, expert]
            count = placement.num_replicas[layer, expert]
            assert slots[:count].tolist() == np.flatnonzero(experts == expert).tolist()
            assert set(slots[count:].tolist()) <= {-1}


@given(loads=st.lists(st.integers(0, 50), min_size=1, max_size=4), num_spare=st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_no_other_counts_have_fewer_rows_on_the_fullest_replica(
    loads: list[int], num_spare: int
) -> None:
    experts, counts = replicate([float(load) for load in loads], len(loads) + num_spare)

    assert sorted(experts) == sorted(e for e, count in enumerate(counts) for _ in range(count))
    others = itertools.product(range(1, num_spare + 2), repeat=len(loads))
    best = min(
        max(load / count for load, count in zip(loads, other, strict=True))
        for other in others
        if sum(other) == len(loads) + num_spare
    )
    assert max(load / count for load, count in zip(loads, counts, strict=True)) == best


@given(
    loads=st.lists(st.floats(0, 1e6), min_size=1, max_size=6).map(lambda x: [*x, *x, *x]),
    num_bins=st.sampled_from([1, 3]),
)
def test_every_bin_gets_as_many_items(loads: list[float], num_bins: int) -> None:
    bins = pack_balanced(loads, num_bins)

    assert np.bincount(bins).tolist() == [len(loads) // num_bins] * num_bins


def test_nodes_that_do_not_divide_the_groups_are_ignored() -> None:
    assert (
        rebalance_experts(
            V1.load_rows, num_slots=16, num_devices=8, num_nodes=2, num_groups=3
        ).expert_of_slot.tolist()
    ) == rebalance_experts(V1.load_rows, num_slots=16, num_devices=8).expert_of_slot.tolist()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_slots": 15, "num_devices": 8}, r"num_devices \(8\) must divide num_slots \(15\)"),
        ({"num_slots": 16, "num_devices": 8, "num_nodes": 3}, r"num_nodes \(3\) must divide"),
        ({"num_slots": 16, "num_devices": 8, "num_groups": 5}, r"num_groups \(5\) must divide"),
        ({"num_slots": 16, "num_devices": 0}, r"num_devices \(0\)"),
        ({"num_slots": 8, "num_devices": 8}, r"num_slots \(8\) must hold every one of 12 experts"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rebalance_experts(V1.load_rows, **sizes)
