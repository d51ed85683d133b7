"""What logs of decisions share: the values they are made of as JSON, and replaying them.

An incident is a list of events: a log replays to the same commands, or names the first that differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, Protocol, Self, TypeVar, get_args

from placement.plain import from_plain, to_plain

LOG_FORMAT = 1
E = TypeVar("E")
C = TypeVar("C")
E_co = TypeVar("E_co", covariant=True)
C_co = TypeVar("C_co", covariant=True)


class Opened:
    """A dataclass that is the first entry of a log."""

    __slots__ = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"format": LOG_FORMAT, **to_plain(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Rebuild what `to_json` wrote; raises ValueError for anything else."""
        if value.get("format") != LOG_FORMAT:
            raise ValueError(f"format ({value.get('format')!r}) must be {LOG_FORMAT}")
        return from_plain(cls, {name: part for name, part in value.items() if name != "format"})


def named(value: object) -> dict[str, Any]:
    """Return a dataclass as plain JSON, with its name under "kind"."""
    return {"kind": type(value).__name__, **to_plain(value)}


class Kinds(Generic[E]):
    """The dataclasses of a union, told apart by their names."""

    def __init__(self, what: str, union: Any) -> None:
        """`what` they are, for messages."""
        self._what = what
        self._by_name: dict[str, type[E]] = {kind.__name__: kind for kind in get_args(union)}

    def build(self, value: Mapping[str, Any]) -> E:
        """Rebuild what `named` wrote; raises ValueError for anything else."""
        kind = self._by_name.get(str(value.get("kind")))
        if kind is None:
            known = ", ".join(self._by_name)
            raise ValueError(f"unknown {self._what} {value.get('kind')!r}; known are {known}")
        return from_plain(kind, {name: part for name, part in value.items() if name != "kind"})


class Entry(Protocol[E_co, C_co]):
    """One event and what was answered."""

    @property
    def event(self) -> E_co: ...

    @property
    def commands(self) -> tuple[C_co, ...]: ...


def first_difference(
    handle: Callable[[E], Sequence[C]],
    entries: Iterable[Entry[E, C]],
    *,
    told: Callable[[E], str] = lambda event: type(event).__name__,
) -> str:
    """Handle the events of a log again; returns the first difference in words ("" without).

    `told` names an event.
    """
    for index, entry in enumerate(entries):
        commands = tuple(handle(entry.event))
        if commands != entry.commands:
            kinds = [type(command).__name__ for command in commands]
            logged = [type(command).__name__ for command in entry.commands]
            return (
                f"entry {index} ({told(entry.event)}) now gives {kinds or 'no commands'} and the "
                f"log has {logged or 'none'}" + (", with other contents" if kinds == logged else "")
            )
    return ""
