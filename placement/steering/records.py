"""The last moves, as a status page shows them."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any

from placement.steering.state import MoveRecord, Outcome

_MOST_KEPT = 32


class Records:
    """The last moves, oldest first."""

    def __init__(self) -> None:
        self._moves: deque[MoveRecord] = deque(maxlen=_MOST_KEPT)

    def add(self, record: MoveRecord) -> None:
        self._moves.append(record)

    def end(self, epoch: int, outcome: Outcome, **figures: Any) -> None:
        """Note how the move of an epoch went on; nothing, when it is no longer kept."""
        for index, record in enumerate(self._moves):
            if record.epoch == epoch:
                self._moves[index] = replace(record, outcome=outcome, **figures)

    def all(self) -> tuple[MoveRecord, ...]:
        return tuple(self._moves)
