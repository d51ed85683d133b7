"""The log of the experts' rebalancer: what it began with, then events with their commands.

An incident is a list of events: a log replays to the same commands, or names the first that differ.
Steps without consequence are one entry, for they come many times a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from placement.plain import from_plain, to_plain
from placement.sharding.decision import RebalanceSettings
from placement.sharding.expert_map import ExpertMap
from placement.sharding.rebalance_values import ExpertCommand, ExpertEvent, StepsDone
from placement.sharding.rebalancer import ExpertRebalancer

LOG_FORMAT = 1
_EVENTS: dict[str, type[ExpertEvent]] = {kind.__name__: kind for kind in get_args(ExpertEvent)}
_COMMANDS: dict[str, type[ExpertCommand]] = {
    kind.__name__: kind for kind in get_args(ExpertCommand)
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertOpening:
    """What a rebalancer is made of: the first entry of a log."""

    map: ExpertMap
    settings: RebalanceSettings

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"format": LOG_FORMAT, **to_plain(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ExpertOpening:
        """Rebuild what `to_json` wrote; raises ValueError for anything else."""
        if value.get("format") != LOG_FORMAT:
            raise ValueError(f"format ({value.get('format')!r}) must be {LOG_FORMAT}")
        return from_plain(cls, {name: part for name, part in value.items() if name != "format"})


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertEntry:
    """One event and what the rebalancer answered."""

    event: ExpertEvent
    commands: tuple[ExpertCommand, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"event": _named(self.event), "commands": [_named(each) for each in self.commands]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ExpertEntry:
        """Rebuild what `to_json` wrote; raises ValueError for anything else."""
        commands = [_built(_COMMANDS, each, "command") for each in value["commands"]]
        return cls(event=_built(_EVENTS, value["event"], "event"), commands=tuple(commands))


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
    for index, entry in enumerate(entries):
        commands = tuple(rebalancer.handle(entry.event))
        if commands != entry.commands:
            kinds = [type(command).__name__ for command in commands]
            logged = [type(command).__name__ for command in entry.commands]
            return (
                f"entry {index} ({type(entry.event).__name__}) now gives {kinds or 'no commands'} "
                f"and the log has {logged or 'none'}"
                + (", with other contents" if kinds == logged else "")
            )
    return ""


def _named(value: object) -> dict[str, Any]:
    return {"kind": type(value).__name__, **to_plain(value)}


def _built(kinds: Mapping[str, Any], value: Mapping[str, Any], what: str) -> Any:
    kind = kinds.get(value.get("kind", ""))
    if kind is None:
        raise ValueError(f"kind ({value.get('kind')!r}) is no {what}; known: {', '.join(kinds)}")
    return from_plain(kind, {name: part for name, part in value.items() if name != "kind"})
