from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.experts import ExpertDevice
from placement.sharding.expert_map import weighted_layer
from placement.sharding.reactive import (
    ReactivePlan,
    ReactiveTerms,
    break_even_rows,
    plan_reactive,
)
from placement.sharding.routing import RoutingTable


def devices(nodes: str, speeds: tuple[float, ...] = ()) -> list[ExpertDevice]:
    speeds = speeds or (1.0,) * len(nodes)
    return [
        ExpertDevice(id=f"d{i}", node=node, rows_per_s=speed, slots_per_layer=8)
        for i, (node, speed) in enumerate(zip(nodes, speeds, strict=True))
    ]


def reactive(
    rows: list[int],
    held: list[set[int]],
    nodes: str,
    speeds: tuple[float, ...] = (),
    **changes: Any,
) -> ReactivePlan:
    fleet = devices(nodes, speeds)
    layer = weighted_layer(held, [1.0] * len(rows), [1.0] * len(held))
    table = RoutingTable.of_layer(layer, len(rows))
    fields: dict[str, Any] = {
        "num_dynamic": 2,
        "least_rows": 10,
        "copy_s": dict.fromkeys(nodes, 5.0),
    }
    rows_R = table.split(np.array(rows))
    return plan_reactive(table, rows_R, fleet, ReactiveTerms(**fields | changes))


def test_the_busiest_device_gives_its_largest_expert_to_the_idlest_of_its_node() -> None:
    plan = reactive([50, 40, 30, 10, 10, 5], [{0, 1, 2}, {3, 4, 5}], "xx", num_dynamic=2)
    [first, *_] = plan.moves
    assert (first.expert, first.source, first.target, first.rows) == (0, 0, 1, 50)
    assert max(plan.after_s) < max(plan.before_s)


def test_nothing_leaves_its_node() -> None:
    assert reactive([50, 40, 30, 10], [{0, 1, 2}, {3}], "xy").moves == ()


def test_few_rows_stay() -> None:
    rows, held = [50, 40, 30, 10, 10, 5], [{0, 1, 2}, {3, 4, 5}]
    assert reactive(rows, held, "xx", least_rows=51).moves == ()


def test_a_copy_that_does_not_hide_behind_static_work_is_not_made() -> None:
    rows, held = [50, 40, 30, 10, 10, 5], [{0, 1, 2}, {3, 4, 5}]
    # The idle device has 5 s of static work: expert 5.
    assert reactive(rows, held, "xx", copy_s={"x": 5.0}).moves
    assert not reactive(rows, held, "xx", copy_s={"x": 5.1}).moves
    assert not reactive(rows, held, "xx", copy_s={"x": 5.0}, plan_s=0.1).moves
    assert not reactive(rows, held, "xx", copy_s={}).moves


def test_break_even_is_that_of_the_published_table() -> None:
    def rows(width: int, weight_bytes: float) -> float:
        return break_even_rows(width, weight_bytes=weight_bytes, activation_bytes=2.0)

    assert (rows(768, 2.0), rows(2048, 2.0)) == (1152, 3072)
    assert (rows(768, 0.5), rows(2048, 0.5)) == (288, 768)
    assert rows(14336, 2.0) == pytest.approx(21_500, rel=1e-3)


@settings(deadline=None)
@given(st.data())
def test_moves_level_within_the_terms(data: st.DataObject) -> None:
    num_devices = data.draw(st.integers(1, 5))
    nodes = "".join(
        data.draw(st.lists(st.sampled_from("xy"), min_size=num_devices, max_size=num_devices))
    )
    held = [{3 * d, 3 * d + 1, 3 * d + 2} for d in range(num_devices)]
    rows = data.draw(
        st.lists(st.integers(0, 99), min_size=3 * num_devices, max_size=3 * num_devices)
    )
    speeds = tuple(data.draw(st.sampled_from([1.0, 3.0])) for _ in nodes)
    plan = reactive(rows, held, nodes, speeds, num_buffers=1)
    assert max(plan.after_s) <= max(plan.before_s) + 1e-9
    assert len({move.expert for move in plan.moves}) == len(plan.moves)
    for move in plan.moves:
        assert nodes[move.source] == nodes[move.target]
        assert move.rows == rows[move.expert] >= 10
    targets = [move.target for move in plan.moves]
    assert len(set(targets)) == len(targets)
    work = sum(second * speed for second, speed in zip(plan.after_s, speeds, strict=True))
    assert work == pytest.approx(sum(rows))


def test_terms_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"copy_s of x \(-1\.0\)"):
        ReactiveTerms(least_rows=1, copy_s={"x": -1.0})
    with pytest.raises(ValueError, match=r"num_buffers \(-1\)"):
        ReactiveTerms(least_rows=1, copy_s={}, num_buffers=-1)
