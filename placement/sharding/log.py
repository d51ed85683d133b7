"""The log of the experts' rebalancer: what it began with, then events with their commands.

Steps without consequence are one entry, for they come many times a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from placement.event_log import Kinds, Opened, first_difference, named
from placement.sharding.decision import RebalanceSettings
from placement.sharding.expert_map import ExpertMap
from placement.sharding.rebalance_values import ExpertCommand, ExpertEvent, StepsDone
from placement.sharding.rebalancer import ExpertRebalancer

_EVENTS: Kinds[ExpertEvent] = Kinds("event", ExpertEvent)
_COMMANDS: Kinds[ExpertCommand] = Kinds("command", ExpertCommand)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertOpening(Opened):
    """What a rebalancer is made of: the first entry of a log."""

    map: ExpertMap
    settings: RebalanceSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertEntry:
    """One event and what the rebalancer answered."""

    event: ExpertEvent
    commands: tuple[ExpertCommand, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"event": named(self.event), "commands": [named(each) for each in self.commands]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ExpertEntry:
        """Rebuild what `to_json` wrote; raises ValueError for anything else."""
        commands = tuple(_COMMANDS.build(each) for each in value["commands"])
        return cls(event=_EVENTS.build(value["event"]), commands=commands)


@dataclass(slots=True)
class Merging:
    """Makes one entry of steps that followed each other without consequence."""

    _steps: int = field(default=0, init=False)

    def add(self, entry: ExpertEntry) -> list[ExpertEntry]:
        """Return the entries that can be written now, in their order."""
        if isinstance(entry.event, StepsDone) and not entry.commands:
            self._steps += entry.event.steps
            return []
        return [*self.rest(), entry]

    def rest(self) -> list[ExpertEntry]:
        """Return the steps that were held back."""
        steps, self._steps = self._steps, 0
        return [ExpertEntry(event=StepsDone(steps=steps), commands=())] if steps else []


def replay(opening: ExpertOpening, entries: Iterable[ExpertEntry]) -> str:
    """Handle the events of a log again; returns the first difference in words ("" without)."""
    rebalancer = ExpertRebalancer(opening.map, opening.settings)
    return first_difference(rebalancer.handle, entries)
