"""How a sender divides rows over replicas: whole for few rows, by load for many, always alike."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from placement.experts import ExpertDevice
from placement.sharding.division import Part, RowDivision
from placement.sharding.expert_map import ExpertMap, weighted_layer
from placement.sharding.reactive import ReactiveTerms

NUM_EXPERTS = 4


def device(name: str, node: str, *, rows_per_s: float = 1000.0) -> ExpertDevice:
    """An expert is read in the time of 4 rows."""
    return ExpertDevice(
        id=name, node=node, rows_per_s=rows_per_s, slots_per_layer=4, expert_read_s=4 / rows_per_s
    )


DEVICES = (device("a", "x"), device("b", "y", rows_per_s=3000.0))
BOTH = [frozenset(range(NUM_EXPERTS))] * 2
APART = [frozenset({0, 1}), frozenset({2, 3})]


def division(held: list[frozenset[int]], *, node: str = "x") -> RowDivision:
    layer = weighted_layer(held, [1.0] * NUM_EXPERTS, [d.rows_per_s for d in DEVICES])
    made = ExpertMap(
        version=3, checkpoint="c", num_experts=NUM_EXPERTS, devices=DEVICES, layers=(layer,)
    )
    return RowDivision(made, node, {"x": 0.001, "y": 0.001})


def test_few_rows_go_whole_to_one_replica_each() -> None:
    parts = division(BOTH).divide(0, [3, 0, 2, 4])

    assert [(part.expert, part.rows) for part in parts] == [(0, 3), (2, 2), (3, 4)]


def test_few_rows_stay_on_the_senders_node_while_that_is_quicker() -> None:
    # One read takes 4 ms on a, and 1.3 ms on b besides 1.2 ms of message and way.
    assert division(BOTH, node="y").divide(0, [1, 0, 0, 0]) == [Part("b", 0, 1)]
    assert division(BOTH, node="x").divide(0, [1, 0, 0, 0]) == [Part("b", 0, 1)]
    slow_link = RowDivision(division(BOTH).map, "x", {"y": 0.1})
    assert slow_link.divide(0, [1, 0, 0, 0]) == [Part("a", 0, 1)]


def test_many_rows_are_divided_so_that_all_devices_end_together() -> None:
    parts = division(BOTH).divide(0, [100, 100, 100, 100])

    rows: Counter[str] = Counter()
    for part in parts:
        rows[part.device_id] += part.rows
    assert rows == {"a": 100, "b": 300}


def test_rows_of_experts_without_replicas_go_where_they_are() -> None:
    for counts in ([100, 0, 100, 7], [1, 1, 0, 1]):
        parts = division(APART).divide(0, counts)
        assert [(part.expert, part.rows) for part in parts] == [
            (expert, rows) for expert, rows in enumerate(counts) if rows
        ]
        assert all(part.device_id == ("a" if part.expert < 2 else "b") for part in parts)


def surprised(**changes: Any) -> RowDivision:
    """Two alike devices of one node, of which the first gets most of the rows."""
    fleet = (device("a", "x"), device("b", "x"))
    held = [frozenset({0, 1, 2}), frozenset({3, 4, 5})]
    layer = weighted_layer(held, [1.0] * 6, [1000.0] * 2)
    made = ExpertMap(version=3, checkpoint="c", num_experts=6, devices=fleet, layers=(layer,))
    terms: dict[str, Any] = {"num_dynamic": 1, "least_rows": 50, "copy_s": {"x": 0.03}} | changes
    return RowDivision(made, "x", {}, ReactiveTerms(**terms))


def test_experts_that_surprise_the_map_are_guests_elsewhere_on_the_node() -> None:
    counts = [90, 70, 60, 20, 20, 10]
    made = surprised()

    stay = [Part("aaabbb"[expert], expert, rows) for expert, rows in enumerate(counts)]
    assert made.divide(0, counts) == [Part("b", 0, 90, is_guest=True), *stay[1:]]
    assert made.divide(0, counts, with_guests=False) == stay
    assert surprised(least_rows=91).divide(0, counts) == stay
    assert surprised(copy_s={"x": 0.031}).divide(0, counts) == stay, "static work ends before"


@given(
    counts=st.lists(st.integers(0, 40), min_size=NUM_EXPERTS, max_size=NUM_EXPERTS),
    held=st.sampled_from([BOTH, APART, [frozenset({0, 1, 2}), frozenset({1, 2, 3})]]),
    node=st.sampled_from(["x", "y"]),
)
def test_every_row_goes_once_to_a_holder_in_order(
    counts: list[int], held: list[frozenset[int]], node: str
) -> None:
    parts = division(held, node=node).divide(0, counts)

    given_rows = Counter({e: n for e, n in enumerate(counts) if n})
    assert Counter([p.expert for p in parts for _ in range(p.rows)]) == given_rows
    assert [part.expert for part in parts] == sorted(part.expert for part in parts)
    assert len({part[:2] for part in parts}) == len(parts)
    position = {device.id: index for index, device in enumerate(DEVICES)}
    assert all(part.expert in held[position[part.device_id]] for part in parts)
    assert parts == division(held, node=node).divide(0, counts), "another sender says the same"


def test_no_row_at_all_is_no_part() -> None:
    assert division(BOTH).divide(0, [0] * NUM_EXPERTS) == []


def test_a_device_without_read_seconds_never_has_few_rows() -> None:
    plain = tuple(
        ExpertDevice(id=d.id, node=d.node, rows_per_s=d.rows_per_s, slots_per_layer=4)
        for d in DEVICES
    )
    made = division(BOTH).map
    alike = ExpertMap(
        version=0, checkpoint="c", num_experts=NUM_EXPERTS, devices=plain, layers=made.layers
    )

    parts = RowDivision(alike, "x", {}).divide(0, [4, 0, 0, 0])

    assert parts == [Part("a", 0, 1), Part("b", 0, 3)]
