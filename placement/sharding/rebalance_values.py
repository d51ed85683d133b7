"""What the rebalancer of experts hears and says, as values.

Copies and releases are those of `placement.moving.moves`, of pieces of the kind "expert".
"""

from __future__ import annotations

from dataclasses import dataclass

from placement.experts import ExpertDevice
from placement.moving.moves import Move, Release
from placement.sharding.expert_map import ExpertMap
from placement.sharding.loads import LoadSummary


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadsMeasured:
    """What the windows of all layers show, of the phase that is balanced for."""

    summary: LoadSummary


@dataclass(frozen=True, kw_only=True, slots=True)
class StepsDone:
    """Steps are done; as many budgets of bytes may be copied during the next ones."""

    steps: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps ({self.steps}) must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyDone:
    """A `Move` is done: its bytes are on the target."""

    move: Move


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyFailed:
    """A `Move` is not done and will not be."""

    move: Move
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MapInForce:
    """Everyone sends by this version, and no call under an older one is in flight."""

    version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MapRefused:
    """Nobody sends by this version; the one before is in force."""

    version: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertDeviceLost:
    """A device is gone with the experts it held."""

    device_id: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertDeviceJoined:
    """A device offers slots and holds nothing; or one that is known has other rates or slots, or is
    to leave no more.

    A known one keeps what it holds (tell that it is lost first if it does not), and a rebalancing
    that goes on is given up: tell rates that changed much, not every measurement.
    """

    device: ExpertDevice


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertDeviceLeaving:
    """A device is to hold nothing, and will not be used again until it joins.

    It serves until others have what it holds, and is then named by no map.
    """

    device_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RebalanceRequested:
    """An operator asks to plan at the next loads, whatever the thresholds say."""


ExpertEvent = (
    LoadsMeasured
    | StepsDone
    | CopyDone
    | CopyFailed
    | MapInForce
    | MapRefused
    | ExpertDeviceLost
    | ExpertDeviceJoined
    | ExpertDeviceLeaving
    | RebalanceRequested
)


@dataclass(frozen=True, kw_only=True, slots=True)
class UseMap:
    """Send by this map from the next step on; calls in flight end by the one they began with.

    It takes the place of every map before it. Answered by `MapInForce` or `MapRefused`.
    """

    map: ExpertMap
    reason: str
    is_recovery: bool = False
    """Devices of the map before are gone, so no step goes on by it: who brings this one into force
    may give up what only maps before need. What devices have not read by then is asked for once it
    is in force, and rows for it wait."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HaltExperts:
    """The devices that are left cannot hold the experts: requests wait, or are refused."""

    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceMadeGood:
    """A lost worker, and how long rows waited for its experts."""

    device_id: str
    seconds: float
    """From when it was noticed."""
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MapChange:
    """A map that came into force."""

    at_s: float
    version: int
    reason: str
    copies: tuple[tuple[str, int, int], ...]
    """(device, layer of the map, expert) of those that the map before had not."""


ExpertCommand = Move | Release | UseMap | HaltExperts
