"""Schedules as Chrome trace-event JSON, for ui.perfetto.dev or chrome://tracing.

Format: "Trace Event Format" (Google, 2016): complete events ("X") and metadata events ("M").
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """A device at work on one micro-batch of one stage (serving: one step of one lane)."""

    device_id: str
    start_s: float
    end_s: float
    kind: str
    """"forward", "fused" or "backward" in training; any word elsewhere."""
    stage: int
    """Index of the stage, or of the slot within its round."""
    micro_batch: int
    """Index within the round (serving: the lane)."""
    round_index: int = 0


def chrome_trace(events: Iterable[Event], nodes: Mapping[str, str]) -> dict[str, Any]:
    """Return the events as a JSON value: a process per node, a thread per device.

    `nodes` names the node of every device that may appear; devices without events keep an empty
    track. Times are microseconds, as the format wants. O(E log E).

    Raises:
        ValueError: An event is on a device that `nodes` lacks, or ends before it starts.
    """
    names = sorted(set(nodes.values()))
    processes = {node: index for index, node in enumerate(names)}
    threads = {device_id: index for index, device_id in enumerate(sorted(nodes))}
    trace = [_metadata("process_name", node, processes[node], 0) for node in names] + [
        _metadata("thread_name", device_id, processes[nodes[device_id]], thread)
        for device_id, thread in threads.items()
    ]
    for event in sorted(events, key=lambda e: (e.start_s, e.end_s, e.device_id)):
        if event.device_id not in nodes:
            raise ValueError(f"an event is on {event.device_id}, whose node is not in `nodes`")
        if not event.end_s >= event.start_s:
            raise ValueError(
                f"an event on {event.device_id} ends at {event.end_s} s, before its start "
                f"at {event.start_s} s"
            )
        process = processes[nodes[event.device_id]]
        trace.append(_complete(event, process, threads[event.device_id]))
    return {"traceEvents": trace, "displayTimeUnit": "ms"}


def _metadata(kind: str, name: str, process: int, thread: int) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}


def _complete(event: Event, process: int, thread: int) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": f"{event.kind} {event.stage}.{event.micro_batch}",
        "cat": event.kind,
        "pid": process,
        "tid": thread,
        "ts": event.start_s * 1e6,
        "dur": (event.end_s - event.start_s) * 1e6,
        "args": {
            "stage": event.stage,
            "micro_batch": event.micro_batch,
            "round": event.round_index,
        },
    }
