"""The controller's log: what it began with, then every event and the commands that followed.

An incident is a list of events: a log replays to the same commands, or names the first that differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from placement.plain import from_plain, to_plain
from placement.stages import StagesPlan
from placement.steering.settings import ControllerSettings
from placement.steering.values import Command, Event, command_from_json, event_from_json
from placement.topology import Topology
from placement.workload import ModelProfile, ServingWorkload

LOG_FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Opening:
    """What a controller is made of: the first entry of a log."""

    profile: ModelProfile
    topology: Topology
    workload: ServingWorkload
    settings: ControllerSettings
    in_force: StagesPlan | None = None
    last_epoch: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"format": LOG_FORMAT, **to_plain(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Opening:
        """Rebuild what `to_json` wrote; raises ValueError for anything else."""
        if value.get("format") != LOG_FORMAT:
            raise ValueError(f"format ({value.get('format')!r}) must be {LOG_FORMAT}")
        return from_plain(cls, {name: part for name, part in value.items() if name != "format"})


@dataclass(frozen=True, kw_only=True, slots=True)
class LogEntry:
    """One event and what the controller answered."""

    event: Event
    commands: tuple[Command, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "event": self.event.to_json(),
            "commands": [command.to_json() for command in self.commands],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LogEntry:
        """Rebuild what `to_json` wrote; raises ValueError for anything else."""
        return cls(
            event=event_from_json(value["event"]),
            commands=tuple(command_from_json(command) for command in value["commands"]),
        )


class Handler(Protocol):
    """A controller, as far as a replay needs it."""

    def handle(self, event: Event) -> list[Command]:
        """Return what to do about an event."""


def replay(controller: Handler, entries: Iterable[LogEntry]) -> str:
    """Handle the events of a log again; returns the first difference in words ("" without)."""
    for index, entry in enumerate(entries):
        commands = controller.handle(entry.event)
        if tuple(commands) != entry.commands:
            kinds = [type(command).__name__ for command in commands]
            logged = [type(command).__name__ for command in entry.commands]
            return (
                f"entry {index} ({type(entry.event).__name__} at {entry.event.at_s:g} s) now gives "
                f"{kinds or 'no commands'} and the log has {logged or 'none'}"
                + (", with other contents" if kinds == logged else "")
            )
    return ""
