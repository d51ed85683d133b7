"""What the controller shows of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from placement.plain import to_plain
from placement.stages import StagesPlan

Phase = Literal["idle", "moving", "trial", "halted"]
Outcome = Literal["under way", "done", "on trial", "kept", "rolled back", "failed", "superseded"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MoveRecord:
    """One deployment or move, from its command to its end."""

    at_s: float
    epoch: int
    reason: str
    is_recovery: bool
    is_roll_back: bool
    outcome: Outcome
    verdict: str = ""
    """Of the trial, or why it failed."""
    predicted_gain: float | None = None
    """The old objective over the new, less 1; None: it was not moved for gain."""
    measured_gain: float | None = None
    """Tokens/s after over before, less 1; None: not measured."""
    predicted_pause_s: float | None = None
    pause_s: float | None = None
    moved_bytes: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ControllerState:
    """A snapshot for a status page."""

    plan: StagesPlan | None
    """In force; while one is moved to, the one before."""
    epoch: int
    """Of the plan in force, or of the one that is moved to."""
    phase: Phase
    halt_reason: str
    num_lanes: int
    lost_devices: tuple[str, ...]
    """Hold stages of the plan in force no more."""
    drains: Mapping[str, str]
    """Node -> how far its drain is."""
    unused: Mapping[str, str]
    """Device -> why it may not be used."""
    slowness: Mapping[str, float]
    """Measured over predicted seconds, by device."""
    moves: tuple[MoveRecord, ...]
    """The last ones, oldest first."""
    why_not: str
    """Why the last target was not taken, or what is waited for."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        value: dict[str, Any] = to_plain(self)
        return value
