from __future__ import annotations

import json

import pytest

from placement.trace import Event, chrome_trace


def event(device_id: str, start_s: float, end_s: float, stage: int = 0) -> Event:
    return Event(
        device_id=device_id, start_s=start_s, end_s=end_s, kind="forward", stage=stage,
        micro_batch=3,
    )  # fmt: skip


def test_nodes_become_processes_and_devices_threads_with_their_names() -> None:
    trace = chrome_trace([], {"gpu1": "b", "gpu0": "a", "gpu2": "b"})

    names = {(e["name"], e["pid"], e["tid"]): e["args"]["name"] for e in trace["traceEvents"]}
    assert names == {
        ("process_name", 0, 0): "a",
        ("process_name", 1, 0): "b",
        ("thread_name", 0, 0): "gpu0",
        ("thread_name", 1, 1): "gpu1",
        ("thread_name", 1, 2): "gpu2",
    }


def test_an_event_is_complete_in_microseconds_and_says_what_ran() -> None:
    trace = chrome_trace([event("gpu0", 0.5, 0.75, stage=2)], {"gpu0": "a"})

    [complete] = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert complete["ts"] == pytest.approx(500_000)
    assert complete["dur"] == pytest.approx(250_000)
    assert complete["name"] == "forward 2.3"
    assert complete["cat"] == "forward"
    assert complete["args"] == {"stage": 2, "micro_batch": 3, "round": 0}


def test_the_trace_does_not_depend_on_the_order_of_the_events() -> None:
    events = [event("gpu1", 0.0, 1.0), event("gpu0", 0.0, 1.0), event("gpu0", 1.0, 1.5)]
    nodes = {"gpu0": "a", "gpu1": "a"}

    trace = chrome_trace(events, nodes)

    assert chrome_trace(events[::-1], nodes) == trace
    assert json.loads(json.dumps(trace)) == trace


def test_an_event_on_a_device_without_a_node_is_refused() -> None:
    with pytest.raises(ValueError, match="on gpu9, whose node is not in"):
        chrome_trace([event("gpu9", 0.0, 1.0)], {"gpu0": "a"})


@pytest.mark.parametrize("end_s", [0.5, float("nan")])
def test_an_event_that_ends_before_it_starts_is_refused(end_s: float) -> None:
    with pytest.raises(ValueError, match="on gpu0 ends at"):
        chrome_trace([event("gpu0", 1.0, end_s)], {"gpu0": "a"})
