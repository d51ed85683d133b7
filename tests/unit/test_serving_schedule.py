from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.serving_schedule import serving_events, track_nodes
from placement.stages import StagesPlan, plan_stages
from placement.topology import Device, LinkRate, Topology
from placement.trace import chrome_trace
from placement.workload import LayerCost, ModelProfile, ServingWorkload

END = LayerCost(flops_per_token=0, weight_bytes=1)


def plan(
    counts: list[int], rates: list[int], *, lanes: int, link: tuple[float, float] = (1e4, 0.01)
) -> StagesPlan:
    """A forced cut of equal layers over devices on nodes of their own."""
    layer = LayerCost(flops_per_token=1, weight_bytes=1000, kv_bytes_per_token=1)
    devices = tuple(
        Device(
            id=f"d{index}",
            node=f"n{index}",
            kind="paced",
            flops_per_s=1e9,
            memory_bytes_per_s=1000.0 * rate,
            memory_bytes=1 << 30,
        )
        for index, rate in enumerate(rates)
    )
    return plan_stages(
        ModelProfile(
            name="m",
            embedding=END,
            layers=(layer,) * sum(counts),
            head=END,
            hidden_bytes_per_token=100,
        ),
        Topology(
            devices=devices, default_link=LinkRate(bandwidth_bytes_per_s=link[0], latency_s=link[1])
        ),
        workload=ServingWorkload(
            lanes=lanes,
            sequences_per_lane=2,
            context_tokens_per_sequence=1,
            kv_tokens=2,
            step_tokens=2,
        ),
        layer_counts=counts,
    )


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=4),
    st.integers(1, 6),
    st.floats(100.0, 1e5),
    st.floats(0.0, 2.0),
)
def test_the_lanes_settle_into_the_period_that_the_plan_predicts(
    stages: list[tuple[int, int]], lanes: int, bandwidth_bytes_per_s: float, latency_s: float
) -> None:
    counts, rates = [count for count, _ in stages], [rate for _, rate in stages]
    planned = plan(counts, rates, lanes=lanes, link=(bandwidth_bytes_per_s, latency_s))
    steps = 60

    events = serving_events(planned, lanes=lanes, steps=steps)

    last = len(counts) - 1
    ends_s = sorted(event.end_s for event in events if event.stage == last)
    half = lanes * steps // 2
    measured_s = (ends_s[-1] - ends_s[-1 - half]) / half
    # A window may end within a burst of lanes: off by one turn of all lanes at most.
    assert measured_s == pytest.approx(planned.period_s, rel=2 / (steps // 2))


def test_no_stage_and_no_link_carries_two_steps_at_once() -> None:
    planned = plan([2, 1], [1, 1], lanes=3, link=(100.0, 0.5))

    events = serving_events(planned, lanes=3, steps=4)

    for track in track_nodes(planned):
        spans = sorted((e.start_s, e.end_s) for e in events if e.device_id == track)
        assert len(spans) == 12
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_a_trace_has_a_process_for_every_node_and_a_thread_for_every_stage_and_hop() -> None:
    planned = plan([1, 1], [1, 1], lanes=1)

    trace = chrome_trace(serving_events(planned, lanes=1, steps=1), track_nodes(planned))

    names = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "thread_name"]
    assert sorted(names) == ["d0", "d0 -> d1", "d1"]
    assert sum(e["ph"] == "X" for e in trace["traceEvents"]) == 3


def test_a_schedule_without_lanes_is_refused() -> None:
    with pytest.raises(ValueError, match="lanes \\(0\\)"):
        serving_events(plan([1], [1], lanes=1), lanes=0)
