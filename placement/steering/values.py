"""What the controller hears (events) and what it says (commands), as values.

Every event carries the time it is told at, in seconds on one clock of the shell's; the controller
has no other. Events of one node come in the order in which they happened. Events and commands are
made of what `placement.plain` knows, so that a log of them replays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from placement.stages import StagesPlan
from placement.topology import Device, Link


def _check(owner: str, **numbers: float) -> None:
    for name, value in numbers.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{owner}: {name} ({value}) must be 0 or more and finite")


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeJoined:
    """A node offers its devices; also a node that was lost, or whose figures changed."""

    at_s: float
    node: str
    devices: tuple[Device, ...]
    links: tuple[Link, ...] = ()
    """From and to it; a link that the controller knows already is replaced."""

    def __post_init__(self) -> None:
        _check(f"node {self.node}", at_s=self.at_s)
        for device in self.devices:
            if device.node != self.node:
                raise ValueError(
                    f"node {self.node} joins with device {device.id} of node {device.node}; "
                    f"every device must be on the node that joins"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeLost:
    """A node is gone, with all that its devices held."""

    at_s: float
    node: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceLost:
    """A stage died with its layers and KV; its node is there and may host another."""

    at_s: float
    device_id: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StageMeasurement:
    """One device in one window. A device without a stage may be probed and told like this too."""

    device_id: str
    steps: int
    busy_s: float
    predicted_s: float
    """By the cost model for the very same steps, on the device as it was profiled."""

    def __post_init__(self) -> None:
        _check(
            f"measurement of {self.device_id}",
            steps=self.steps,
            busy_s=self.busy_s,
            predicted_s=self.predicted_s,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StagesMeasured:
    """One window of serving. It is told in every window, also when nothing ran."""

    at_s: float
    """The end of the window."""
    epoch: int
    """In force through the whole window."""
    window_s: float
    tokens_per_s: float
    running: float
    """Mean sequences in flight."""
    stages: tuple[StageMeasurement, ...]

    def __post_init__(self) -> None:
        _check("a window", at_s=self.at_s, tokens_per_s=self.tokens_per_s, running=self.running)
        if not (math.isfinite(self.window_s) and self.window_s > 0):
            raise ValueError(f"window_s ({self.window_s}) must be above 0 and finite")


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkMeasured:
    """What one node can send to another now."""

    at_s: float
    source_node: str
    target_node: str
    bandwidth_bytes_per_s: float
    latency_s: float

    def __post_init__(self) -> None:
        self.to_link()

    def to_link(self) -> Link:
        """Return the link to plan with."""
        return Link(
            source_node=self.source_node,
            target_node=self.target_node,
            bandwidth_bytes_per_s=self.bandwidth_bytes_per_s,
            latency_s=self.latency_s,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRequested:
    """An operator asks to rebalance now."""

    at_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class DrainRequested:
    """A node shall hold nothing, while requests go on."""

    at_s: float
    node: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DrainCancelled:
    """A node that drains, or has been released, may be used again."""

    at_s: float
    node: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MoveDone:
    """The plan of this epoch is in force (after `Deploy` or `MoveLayers`)."""

    at_s: float
    epoch: int
    pause_s: float
    moved_bytes: int

    def __post_init__(self) -> None:
        _check("a move", at_s=self.at_s, pause_s=self.pause_s, moved_bytes=self.moved_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class MoveFailed:
    """The plan of this epoch is not in force; the one before is, but for what was lost."""

    at_s: float
    epoch: int
    reason: str
    lost_device_ids: tuple[str, ...] = ()
    """Their stages died, as by `DeviceLost`."""
    stands_still: bool = False
    """Nor is the one before: the lanes wait for another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LanesChanged:
    """As many lanes serve now (after `ChangeLanes`)."""

    at_s: float
    num_lanes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Tick:
    """Time passes."""

    at_s: float


Event = (
    NodeJoined
    | NodeLost
    | DeviceLost
    | StagesMeasured
    | LinkMeasured
    | PlanRequested
    | DrainRequested
    | DrainCancelled
    | MoveDone
    | MoveFailed
    | LanesChanged
    | Tick
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Deploy:
    """Build this plan from nothing: no stage of the plan in force is left, or there is none."""

    epoch: int
    plan: StagesPlan
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MoveLayers:
    """Go from the plan in force to this one while lanes go on.

    It takes the place of every command before it that is not done. Layers whose holder is lost are
    read from the checkpoint, and their KV is computed again.
    """

    epoch: int
    plan: StagesPlan
    reason: str
    is_recovery: bool
    is_roll_back: bool
    recompute_kv: bool
    """Sequences in flight are computed again, not their KV shipped: it is lost, or that is quicker.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class ChangeLanes:
    """Serve with this many lanes."""

    num_lanes: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ReleaseNode:
    """A node that drains holds nothing any more and is not used until the drain is cancelled."""

    node: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Halt:
    """No plan fits what is there: requests wait, or are refused with this reason."""

    reason: str


Command = Deploy | MoveLayers | ChangeLanes | ReleaseNode | Halt
