"""The controller's log: what it began with, then every event and the commands that followed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from placement.event_log import Kinds, Opened, first_difference, named
from placement.stages import StagesPlan
from placement.steering.settings import ControllerSettings
from placement.steering.values import Command, Event
from placement.topology import Topology
from placement.workload import ModelProfile, ServingWorkload

_EVENTS: Kinds[Event] = Kinds("event", Event)
_COMMANDS: Kinds[Command] = Kinds("command", Command)


@dataclass(frozen=True, kw_only=True, slots=True)
class Opening(Opened):
    """What a controller is made of: the first entry of a log."""

    profile: ModelProfile
    topology: Topology
    workload: ServingWorkload
    settings: ControllerSettings
    in_force: StagesPlan | None = None
    last_epoch: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class LogEntry:
    """One event and what the controller answered."""

    event: Event
    commands: tuple[Command, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"event": named(self.event), "commands": [named(each) for each in self.commands]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LogEntry:
        """Rebuild what `to_json` wrote; raises ValueError for anything else."""
        commands = tuple(_COMMANDS.build(each) for each in value["commands"])
        return cls(event=_EVENTS.build(value["event"]), commands=commands)


class Handler(Protocol):
    """A controller, as far as a replay needs it."""

    def handle(self, event: Event) -> list[Command]:
        """Return what to do about an event."""


def replay(controller: Handler, entries: Iterable[LogEntry]) -> str:
    """Handle the events of a log again; returns the first difference in words ("" without)."""
    return first_difference(
        controller.handle,
        entries,
        told=lambda event: f"{type(event).__name__} at {event.at_s:g} s",
    )
