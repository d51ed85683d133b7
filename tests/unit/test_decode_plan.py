from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.costs import memory_cap_bytes, stage_activation_bytes, stage_cost, stage_kv_bytes
from placement.decode import DecodePlan, plan_decode
from placement.errors import InfeasiblePlanError
from placement.stages import StagesPlan, plan_stages
from placement.topology import Device, Link, LinkRate, Topology
from placement.workload import LayerCost, ModelProfile, ServingWorkload

INSTANT = LinkRate(bandwidth_bytes_per_s=1e15, latency_s=0.0)


def model(
    num_layers: int, *, flops: float = 1.0, kv_bytes: int = 0, weight_bytes: int = 1000
) -> ModelProfile:
    return ModelProfile(
        name="toy",
        embedding=LayerCost(flops_per_token=0, weight_bytes=1),
        layers=(
            LayerCost(
                flops_per_token=flops, weight_bytes=weight_bytes, kv_bytes_per_token=kv_bytes
            ),
        )
        * num_layers,
        head=LayerCost(flops_per_token=0.0, weight_bytes=1),
        hidden_bytes_per_token=1,
    )


def device(
    device_id: str,
    *,
    node: str = "",
    speed: float = 1000.0,
    flops: float = 1e15,
    memory_bytes: int = 10**9,
) -> Device:
    return Device(
        id=device_id,
        node=node or device_id,
        kind="paced",
        flops_per_s=flops,
        memory_bytes_per_s=speed,
        memory_bytes=memory_bytes,
    )


def topology(
    devices: Sequence[Device], links: Sequence[Link] = (), default: LinkRate | None = INSTANT
) -> Topology:
    return Topology(devices=tuple(devices), links=tuple(links), default_link=default)


def instant(node: str) -> Link:
    """A message within a node that takes no time."""
    return Link(source_node=node, target_node=node, bandwidth_bytes_per_s=1e15, latency_s=0.0)


def stages_of(profile: ModelProfile, where: Topology, counts: Sequence[int]) -> StagesPlan:
    workload = ServingWorkload(
        lanes=1, sequences_per_lane=1, context_tokens_per_sequence=1, kv_tokens=1, step_tokens=1
    )
    return plan_stages(profile, where, workload=workload, layer_counts=counts)


def plan(
    profile: ModelProfile,
    where: Topology,
    counts: Sequence[int],
    *,
    sequences: int = 4,
    context: int = 1,
    **options: Any,
) -> DecodePlan:
    return plan_decode(
        profile,
        where,
        stages_of(profile, where, counts),
        sequences=sequences,
        context_tokens_per_sequence=context,
        **{"block_tokens": 1} | options,
    )


def test_lanes_beyond_one_per_stage_only_read_the_weights_more_often() -> None:
    where = topology([device("a"), device("b")], [instant("a"), instant("b")])

    decode = plan(model(2), where, [1, 1])

    # Reading 1000 bytes takes 1 s on each stage whatever the rows, and looking a row up in the
    # embedding 1 ms on the first. One lane of 4 rows makes a step in 2.005 s; two lanes of 2 make
    # one each in 2.004 s; three and four lanes take their seconds on the first stage.
    assert [count.sequences_per_lane for count in decode.alternatives] == [4, 2, 2, 1]
    assert [count.tokens_per_s for count in decode.alternatives] == pytest.approx(
        [4 / 2.005, 4 / 2.004, 4 / 3.004, 4 / 4.004]
    )
    assert [lane.sequences for lane in decode.lanes] == [2, 2]
    assert decode.latency_s == pytest.approx(2.003)
    # The bound is the latency's: 4 sequences that each wait for one row's way through.
    assert decode.bound_tokens_per_s == pytest.approx(4 / 2.002)


@pytest.mark.parametrize("sequences", range(2, 16))
def test_among_equally_fast_numbers_of_lanes_the_fewest_wins(sequences: int) -> None:
    where = topology([device("a", speed=1e15, flops=0.7)], [instant("a")])

    decode = plan(model(1), where, [1], sequences=sequences)

    # Equal but for the rounding of sums.
    assert len(decode.alternatives) == sequences
    assert len(decode.lanes) == 1


def test_stages_bound_by_compute_are_kept_busy_by_one_lane_each() -> None:
    where = topology([device(name, speed=1e12, flops=1.0) for name in "abc"])

    decode = plan(model(3), where, [1, 1, 1], sequences=6)

    # A row takes 1 s a stage, so lanes cost nothing and three of them fill three stages.
    assert [lane.sequences for lane in decode.lanes] == [2, 2, 2]
    assert decode.period_s == pytest.approx(2.0)
    assert decode.cycle_s == pytest.approx(6.0)
    assert decode.predicted_tokens_per_s == pytest.approx(1.0)
    assert decode.gap == pytest.approx(0.0, abs=1e-6)


def test_a_slow_link_sets_the_period_and_more_lanes_do_not_help() -> None:
    link = Link(source_node="a", target_node="b", bandwidth_bytes_per_s=0.1, latency_s=0.0)
    where = topology([device("a"), device("b")], [link])

    decode = plan(model(2), where, [1, 1], sequences=2)

    # One row takes 10 s on the wire and 1 s on each stage: 2 rows need 22 s in one lane, 20 in two.
    assert decode.period_s == pytest.approx(10.0, rel=0.01)
    assert len(decode.lanes) == 2
    assert decode.bound_tokens_per_s == pytest.approx(0.1)


def test_two_hops_between_the_same_nodes_share_the_wire() -> None:
    slow = LinkRate(bandwidth_bytes_per_s=0.1, latency_s=0.0)
    nodes = ["x", "y", "x", "y"]
    devices = [device(f"d{index}", node=node) for index, node in enumerate(nodes)]

    decode = plan(model(4), topology(devices, default=slow), [1, 1, 1, 1], sequences=1)
    both_ways = [
        Link(source_node=a, target_node=b, bandwidth_bytes_per_s=rate, latency_s=0.0)
        for a, b, rate in (("x", "y", 0.1), ("y", "x", 1e15))
    ]
    many = plan(model(4), topology(devices, both_ways), [1, 1, 1, 1], sequences=8)

    assert decode.period_s == pytest.approx(34.0, rel=0.01)
    # Two of the three hops go from x to y, 10 s each.
    assert len(many.lanes) > 1
    assert many.predicted_tokens_per_s == pytest.approx(0.05)
    assert many.bound_tokens_per_s == pytest.approx(0.05)


def test_hops_within_a_node_do_not_wait_for_each_other() -> None:
    inside = Link(source_node="n", target_node="n", bandwidth_bytes_per_s=0.1, latency_s=0.0)
    devices = [device(name, node="n") for name in "abc"]

    decode = plan(model(3), topology(devices, [inside]), [1, 1, 1], sequences=8)

    assert decode.predicted_tokens_per_s == pytest.approx(0.1)


def test_the_way_to_and_from_the_lane_is_part_of_the_latency() -> None:
    links = [
        Link(source_node="lane", target_node="a", bandwidth_bytes_per_s=1.0, latency_s=3.0),
        Link(source_node="b", target_node="lane", bandwidth_bytes_per_s=1.0, latency_s=5.0),
    ]
    where = topology([device("a"), device("b")], links)

    decode = plan(model(2), where, [1, 1], lane_nodes=["lane"], sequences=1)

    assert decode.latency_s == pytest.approx(1.0 + 1.0 + 3.0 + 5.0, rel=0.01)
    assert decode.period_s == decode.latency_s


def test_lanes_sit_where_the_round_trip_is_shortest_and_take_turns_on_equal_nodes() -> None:
    far = LinkRate(bandwidth_bytes_per_s=1e15, latency_s=1.0)
    names = ["b", "a", "c"]
    devices = [device(name, speed=1e12, flops=1.0) for name in names]
    where = topology(devices, default=far)

    decode = plan(model(3), where, [1, 1, 1], sequences=6)
    named = plan(model(3), where, [1, 1, 1], sequences=6, lane_nodes=["z", "c"])

    # From b or c one way is within the node; a, in the middle, pays for both.
    assert len(decode.lanes) > 2
    assert [lane.node for lane in decode.lanes[:4]] == ["b", "c", "b", "c"][: len(decode.lanes)]
    assert {lane.node for lane in named.lanes} == {"c"}


def test_lane_nodes_that_cannot_reach_the_stages_are_refused() -> None:
    link = Link(source_node="a", target_node="b", bandwidth_bytes_per_s=1.0, latency_s=0.0)
    where = topology([device("a"), device("b")], [link], default=None)

    assert {lane.node for lane in plan(model(2), where, [1, 1]).lanes} <= {"a", "b"}
    with pytest.raises(InfeasiblePlanError, match=r"none of 1 lane nodes \(x\) reaches a"):
        plan(model(2), where, [1, 1], lane_nodes=["x"])
    with pytest.raises(ValueError, match="lane_nodes names 0 nodes"):
        plan(model(2), where, [1, 1], lane_nodes=[])


def test_blocks_fill_what_the_tightest_stage_has_left() -> None:
    devices = [device("a", memory_bytes=10_000), device("b", memory_bytes=2_000)]
    where = topology(devices)
    profile = model(2, kv_bytes=10)

    decode = plan(profile, where, [1, 1], sequences=2, context=4, block_tokens=4, step_tokens=3)

    # b: 1800 under the cap, 1001 of weights; 17 bytes of activations a row and 8 a logit.
    activations = stage_activation_bytes(
        profile, 1, 2, step_tokens=3, head_tokens=decode.lanes[0].sequences
    )
    assert [lane.sequences for lane in decode.lanes] == [1, 1]
    assert {lane.kv_blocks for lane in decode.lanes} == {(1800 - 1001 - activations) // 40 // 2}


def test_a_model_without_kv_gets_the_blocks_its_load_fills() -> None:
    decode = plan(model(1), topology([device("a")]), [1], context=5, block_tokens=2, sequences=3)

    assert [lane.kv_blocks for lane in decode.lanes] == [9]


def test_kv_that_fits_no_number_of_lanes_states_bytes_and_knobs() -> None:
    where = topology([device("a"), device("b", memory_bytes=2_000)])

    with pytest.raises(InfeasiblePlanError) as caught:
        plan(model(2, kv_bytes=100), where, [1, 1], sequences=2, context=8, block_tokens=4)

    message = str(caught.value)
    assert "2 sequences in 2 lanes need 1600 bytes of KV on b" in message
    assert "(2 blocks of 400 bytes for each)" in message
    assert "left for KV under its cap of 1800 (headroom 10%)" in message
    assert "Lower sequences (2), context_tokens_per_sequence or step_tokens (1)" in message


def test_weights_that_do_not_fit_are_refused_even_without_kv() -> None:
    big, small = topology([device("a")]), topology([device("a", memory_bytes=1_000)])
    stages = stages_of(model(1), big, [1])

    with pytest.raises(InfeasiblePlanError, match="it has -1"):
        plan_decode(
            model(1), small, stages, sequences=1, context_tokens_per_sequence=1, block_tokens=1
        )


@pytest.mark.parametrize(
    "name", ["sequences", "context_tokens_per_sequence", "block_tokens", "max_lanes", "step_tokens"]
)
def test_a_count_below_one_is_refused(name: str) -> None:
    where = topology([device("a")])
    counts = {"sequences": 1, "context_tokens_per_sequence": 1, "block_tokens": 1} | {name: 0}

    with pytest.raises(ValueError, match=rf"{name} \(0\) must be at least 1"):
        plan_decode(model(1), where, stages_of(model(1), where, [1]), **counts)  # type: ignore[arg-type]


def test_stages_of_another_model_or_topology_are_refused() -> None:
    where = topology([device("a")])
    stages = stages_of(model(1), where, [1])
    options = {"sequences": 1, "context_tokens_per_sequence": 1, "block_tokens": 1}

    with pytest.raises(ValueError, match="cover 1 layers and toy has 2"):
        plan_decode(model(2), where, stages, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"the topology lacks \(a\)"):
        plan_decode(model(1), topology([device("b")]), stages, **options)  # type: ignore[arg-type]


def test_a_plan_survives_json() -> None:
    decode = plan(model(2, kv_bytes=1), topology([device("a"), device("b")]), [1, 1])

    assert DecodePlan.from_json(json.loads(json.dumps(decode.to_json()))) == decode


def test_the_order_of_nodes_and_links_does_not_matter() -> None:
    links = [
        Link(source_node=a, target_node=b, bandwidth_bytes_per_s=50.0, latency_s=0.5)
        for a, b in itertools.permutations("ab", 2)
    ]
    devices = [device("a"), device("b")]

    plans = [
        plan(model(2), topology(devices, order), [1, 1], lane_nodes=nodes)
        for order in (links, links[::-1])
        for nodes in (["a", "b"], ["b", "a"])
    ]

    assert all(each == plans[0] for each in plans)


def simulated_cycle_s(
    rows: Sequence[int],
    home: str,
    profile: ModelProfile,
    where: Topology,
    stages: StagesPlan,
    *,
    context: int,
) -> float:
    """Let the lanes go round, first come first served, until every cycle takes the same time."""
    devices = {each.id: each for each in where.devices}
    costs = [
        stage_cost(devices[s.device_id], profile, s.first_layer, s.end_layer) for s in stages.stages
    ]
    # Servers in order: a stage (no delay after), then the link to the next (its latency after).
    names = [stage.node for stage in stages.stages]
    links = [where.link(a, b) for a, b in itertools.pairwise(names)]
    lane_s = where.link(home, names[0]).latency_s + where.link(names[-1], home).latency_s

    def services(lane: int) -> list[tuple[float, float]]:
        each: list[tuple[float, float]] = []
        for index, cost in enumerate(costs):
            each.append((cost.step_s(rows[lane], rows[lane] * context), 0.0))
            if index < len(links):
                link = links[index]
                each.append((rows[lane] / link.bandwidth_bytes_per_s, link.latency_s))
        return each

    free_s = [0.0] * (len(costs) + len(links))
    ready_s = [0.0] * len(rows)
    warm, rounds, at_warm_s = 60, 60, 0.0
    for turn in range(warm + rounds):
        for lane in range(len(rows)):
            at_s = ready_s[lane]
            for server, (busy_s, delay_s) in enumerate(services(lane)):
                free_s[server] = at_s = max(at_s, free_s[server]) + busy_s
                at_s += delay_s
            ready_s[lane] = at_s + lane_s
        if turn == warm - 1:
            at_warm_s = ready_s[0]
    return (ready_s[0] - at_warm_s) / rounds


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([200.0, 1000.0, 3000.0]), st.sampled_from([1.0, 5.0, 1e9])),
        min_size=1,
        max_size=3,
    ),
    st.integers(1, 9),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.3, 4.0]),
    st.sampled_from([0.5, 2.0, 1e9]),
    st.lists(st.integers(1, 5), max_size=4),
)
def test_lanes_that_go_round_keep_the_predicted_cycle_and_never_beat_the_bound(
    figures: list[tuple[float, float]],
    sequences: int,
    max_lanes: int,
    latency_s: float,
    bandwidth: float,
    uneven: list[int],
) -> None:
    profile = model(len(figures), kv_bytes=10)
    devices = [device(f"d{i}", speed=speed, flops=f) for i, (speed, f) in enumerate(figures)]
    default = LinkRate(bandwidth_bytes_per_s=bandwidth, latency_s=latency_s)
    where = topology(devices, default=default)
    counts = [1] * len(devices)
    stages = stages_of(profile, where, counts)

    decode = plan(profile, where, counts, sequences=sequences, context=7, max_lanes=max_lanes)

    home, rows = decode.lanes[0].node, [lane.sequences for lane in decode.lanes]
    cycle_s = simulated_cycle_s(rows, home, profile, where, stages, context=7)
    assert cycle_s <= decode.cycle_s * (1 + 1e-6)
    if len(set(rows)) == 1:
        assert cycle_s == pytest.approx(decode.cycle_s, rel=1e-6)
    assert sequences / cycle_s <= decode.bound_tokens_per_s * (1 + 1e-6)
    assert decode.gap >= 0.0
    if sum(uneven) < sequences:
        uneven = [*uneven, sequences - sum(uneven)]
        cycle_s = simulated_cycle_s(uneven, home, profile, where, stages, context=7)
        assert sequences / cycle_s <= decode.bound_tokens_per_s * (1 + 1e-6)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(2000, 4000), st.integers(1, 2)), min_size=1, max_size=3),
    st.integers(1, 8),
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(1, 20),
)
def test_no_stage_goes_over_its_cap_and_no_other_number_of_lanes_is_faster(
    figures: list[tuple[int, int]], sequences: int, context: int, block_tokens: int, step: int
) -> None:
    profile = model(sum(n for _, n in figures), kv_bytes=3, weight_bytes=700)
    devices = [device(f"d{i}", memory_bytes=memory) for i, (memory, _) in enumerate(figures)]
    where, counts = topology(devices), [n for _, n in figures]
    try:
        decode = plan(
            profile, where, counts, sequences=sequences, context=context,
            block_tokens=block_tokens, step_tokens=step,
        )  # fmt: skip
    except InfeasiblePlanError:
        return

    blocks = sum(lane.kv_blocks for lane in decode.lanes)
    rows = decode.lanes[0].sequences
    assert sum(lane.sequences for lane in decode.lanes) == sequences
    assert all(
        lane.kv_blocks >= lane.sequences * -(-context // block_tokens) for lane in decode.lanes
    )
    for stage, each in zip(stages_of(profile, where, counts).stages, devices, strict=True):
        first, end = stage.first_layer, stage.end_layer
        used = (
            stage.weight_bytes
            + stage_kv_bytes(profile, first, end, blocks * block_tokens)
            + stage_activation_bytes(
                profile, first, end, step_tokens=max(step, rows), head_tokens=rows
            )
        )
        assert used <= memory_cap_bytes(each.memory_bytes, 0.1)
    for count in decode.alternatives:
        if count.fits:
            assert count.tokens_per_s <= decode.predicted_tokens_per_s * (1 + 1e-6)
            if count.lanes < len(decode.lanes):
                assert count.tokens_per_s < decode.predicted_tokens_per_s
