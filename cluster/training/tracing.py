"""What devices did lately, as a file for ui.perfetto.dev."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path

from cluster.training.events import SlotsTraced, TrainingEvent, TrainingPlanned
from placement.trace import Event, chrome_trace

MOST_EVENTS = 200_000
"""Kept of a run, about 50 MB; older ones are dropped."""


class SlotTrace:
    """Collects `SlotsTraced` events; of a long run the last `most_events` stay."""

    def __init__(self, most_events: int = MOST_EVENTS) -> None:
        self._events: deque[Event] = deque(maxlen=most_events)
        self._nodes: dict[str, str] = {}
        self._num_seen = 0

    @property
    def num_dropped(self) -> int:
        return self._num_seen - len(self._events)

    def handle(self, event: TrainingEvent) -> None:
        match event:
            case TrainingPlanned():
                # A device that was lost keeps its track.
                self._nodes |= event.nodes
            case SlotsTraced():
                self._events.extend(event.events)
                self._num_seen += len(event.events)
            case _:
                pass

    def write(self, path: Path) -> str:
        """Write the file and return what it holds, in words."""
        path.write_text(json.dumps(chrome_trace(self._events, self._nodes)), encoding="utf-8")
        rounds = [event.round_index for event in self._events]
        held = f"wrote {path}: {len(rounds)} micro-batches in slots"
        if rounds:
            held += f" of rounds {min(rounds)} to {max(rounds)}"
        if self.num_dropped:
            held += (
                f"; the {self.num_dropped} before them were dropped (at most {len(rounds)} kept)"
            )
        return held
