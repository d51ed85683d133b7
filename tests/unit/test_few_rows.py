from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.sharding.few_rows import (
    MOST_OPTIONAL_NODES,
    StepCosts,
    choose_replicas,
    layer_s,
)


def costs(
    nodes: str, *, read_s: tuple[float, ...] = (), message_s: float = 0.0, latency_s: float = 0.0
) -> StepCosts:
    """Devices by the letters of their nodes; node "a" is the sender's."""
    return StepCosts(
        nodes=tuple(nodes),
        read_s=read_s or (1.0,) * len(nodes),
        latency_s=tuple(0.0 if node == "a" else latency_s for node in nodes),
        message_s={node: message_s for node in nodes if node != "a"},
    )


def test_activated_experts_are_balanced_not_devices_held() -> None:
    # All three could go to device 0; a chain of reassignments levels them.
    chosen = choose_replicas([0, 1, 2], [[0, 1], [0, 2], [0]], costs("aaa"))
    assert sorted(chosen.values()) == [0, 1, 2]


def test_a_fast_device_reads_more_experts() -> None:
    holders = [[0, 1]] * 3
    chosen = choose_replicas([0, 1, 2], holders, costs("aa", read_s=(1.0, 2.0)))
    assert sorted(chosen.values()) == [0, 0, 1]


def test_a_message_that_costs_more_than_it_saves_is_not_sent() -> None:
    holders = [[0, 1]] * 4
    assert set(choose_replicas([0, 1, 2, 3], holders, costs("ab", message_s=3.0)).values()) == {0}
    assert set(choose_replicas([0, 1, 2, 3], holders, costs("ab", message_s=0.5)).values()) == {
        0,
        1,
    }


def test_a_node_that_is_written_to_anyway_takes_more() -> None:
    chosen = choose_replicas([0, 1], [[1], [1, 2]], costs("abc", message_s=2.0))
    assert chosen == {0: 1, 1: 1}


def test_no_expert_is_activated() -> None:
    assert choose_replicas([], [[0]], costs("a")) == {}


@settings(deadline=None)
@given(st.data())
def test_no_choice_takes_less(data: st.DataObject) -> None:
    num_devices = data.draw(st.integers(1, 4))
    nodes = "".join(
        data.draw(st.lists(st.sampled_from("abcd"), min_size=num_devices, max_size=num_devices))
    )
    read_s = tuple(data.draw(st.sampled_from([1.0, 2.0, 3.5])) for _ in nodes)
    priced = costs(
        nodes,
        read_s=read_s,
        message_s=data.draw(st.sampled_from([0.0, 0.5, 2.0])),
        latency_s=data.draw(st.sampled_from([0.0, 1.0])),
    )
    one = st.sets(st.integers(0, num_devices - 1), min_size=1).map(sorted)
    holders = data.draw(st.lists(one, min_size=1, max_size=6))
    experts = range(len(holders))
    chosen = choose_replicas(experts, holders, priced)
    assert all(chosen[expert] in holders[expert] for expert in experts)
    best = min(layer_s(choice, priced) for choice in itertools.product(*holders))
    assert layer_s(chosen.values(), priced) == pytest.approx(best)


def test_many_optional_nodes_are_given_up_one_by_one() -> None:
    nodes = "abcdefgh"
    assert len(nodes) - 1 > MOST_OPTIONAL_NODES
    holders = [[0, device] for device in range(1, len(nodes))]
    priced = costs(nodes, message_s=10.0)
    assert set(choose_replicas(range(len(holders)), holders, priced).values()) == {0}


def test_malformed_costs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 nodes, 1 read_s and 2 latency_s"):
        costs("aa", read_s=(1.0,))
    with pytest.raises(ValueError, match=r"read_s \(-1\.0\) must be 0 or more"):
        costs("a", read_s=(-1.0,))
