"""How eagerly the controller moves layers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import get_args

from placement.costs import LEAST_HEADROOM_FRACTION
from placement.moving.moves import CopyTerms
from placement.workload import DeviceOrder, Objective


@dataclass(frozen=True, kw_only=True, slots=True)
class ControllerSettings:
    """The controller's knobs. With the defaults and windows of 2 s, a device that slows to half
    its speed is answered by a move within 8 s."""

    objective: Objective = "throughput"
    device_order: DeviceOrder = "given"
    headroom_fraction: float = 0.1

    moves_for_gain: bool = True
    """False: layers move for losses, drains and requests alone."""
    min_gain_fraction: float = 0.1
    """A cut is worth looking at when old over new objective exceeds 1 by this much."""
    confirm_windows: int = 2
    """Successive windows that must show the gain."""
    cool_down_s: float = 10.0
    """Since the last move; doubled for every trial in a row that was rolled back."""
    max_moves_per_hour: int = 60
    """Moves for gain; losses, drains and requested moves are not counted."""
    half_step: bool = False
    """Where one slowed device is all the evidence, go half the way first."""
    horizon_s: float = 300.0
    """For how long a gain is expected to last; a move must save more seconds than it costs."""
    slowdown_fraction: float = 0.1
    """Share of serving that background copies cost."""
    copy_terms: CopyTerms = field(default_factory=lambda: CopyTerms(switch_s=0.02))

    trial_window_s: float = 4.0
    """Seconds measured after a move, at comparable load, before it is judged."""
    trial_deadline_s: float = 60.0
    """A move whose load stays incomparable is kept after this."""
    keep_fraction: float = 0.95
    """Roll back when measured tokens/s fall below this share of those before the move."""
    load_tolerance_fraction: float = 0.25
    """Windows are comparable when their sequences in flight differ by no more than this."""
    backoff_s: float = 60.0
    """A cut that failed is not tried again before; doubled with every failure of the same cut."""
    max_backoff_s: float = 3600.0

    least_steps: int = 20
    """Steps of a device in a window that count as evidence of its speed."""
    smoothing_fraction: float = 0.3
    """Weight of a new window in the running average of a device's slowness."""
    jump_fraction: float = 0.2
    """A slowness that two of three windows put further off than this is taken at once."""

    forgive_s: float = 300.0
    """A slowed device that has run nothing for so long is planned with as profiled again; doubled
    every time."""
    max_forgive_s: float = 7200.0

    move_deadline_s: float = 300.0
    """A move that is not answered by then counts as failed."""
    retry_s: float = 1.0
    """Before a failed recovery is tried again; doubled with every failure in a row."""
    max_retry_s: float = 60.0
    max_device_losses: int = 3
    """Stages lost on a device within `device_loss_window_s` after which it is left alone, unless
    nothing fits without it."""
    device_loss_window_s: float = 60.0

    max_lanes: int | None = None
    """Most lanes to ask for; None: the number of lanes never changes. What number suits is looked
    at with the first window, when a move has come to stay, and on request."""
    block_tokens: int = 16
    """Tokens of a KV block, to work out how many lanes fit."""

    def __post_init__(self) -> None:
        for name, allowed in (("objective", Objective), ("device_order", DeviceOrder)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(
                    f"{name} ({getattr(self, name)!r}) must be one of "
                    f"{', '.join(get_args(allowed))}"
                )
        self._check_fractions()
        for name in _SECONDS:
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} ({value}) must be above 0 and finite")
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.max_lanes is not None and self.max_lanes < 1:
            raise ValueError(f"max_lanes ({self.max_lanes}) must be at least 1, or None")

    def _check_fractions(self) -> None:
        for name, least, most in _FRACTIONS:
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"{name} ({value}) must be from {least:g} to {most:g}")


_SECONDS = (
    "cool_down_s",
    "horizon_s",
    "trial_window_s",
    "trial_deadline_s",
    "backoff_s",
    "max_backoff_s",
    "forgive_s",
    "max_forgive_s",
    "move_deadline_s",
    "retry_s",
    "max_retry_s",
    "device_loss_window_s",
)
_COUNTS = (
    "confirm_windows",
    "max_moves_per_hour",
    "least_steps",
    "max_device_losses",
    "block_tokens",
)
_FRACTIONS = (
    ("headroom_fraction", LEAST_HEADROOM_FRACTION, 0.99),
    ("min_gain_fraction", 0.001, 10.0),
    ("slowdown_fraction", 0.0, 1.0),
    ("keep_fraction", 0.0, 1.0),
    ("load_tolerance_fraction", 0.0, 1.0),
    ("smoothing_fraction", 0.01, 1.0),
    ("jump_fraction", 0.01, 10.0),
)
