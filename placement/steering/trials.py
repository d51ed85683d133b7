"""Keep or roll back: what a move did to measured throughput, and which cuts wait for now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from placement.steering.settings import ControllerSettings
from placement.steering.targets import Cut
from placement.steering.values import StagesMeasured

_SLACK_FRACTION = 0.05
"""Of a window: the shell's clock reads its end a little late."""


class Load(NamedTuple):
    """What was served, and under how much load."""

    tokens_per_s: float
    running: float


class Verdict(NamedTuple):
    """How a trial ended."""

    keeps: bool
    measured_gain: float | None
    """Tokens/s after over before, less 1; None: not comparable."""
    reason: str


def load_of(windows: Sequence[StagesMeasured]) -> Load | None:
    """Return the mean over some windows; None: there are none."""
    total_s = sum(window.window_s for window in windows)
    if not total_s:
        return None
    return Load(
        sum(window.tokens_per_s * window.window_s for window in windows) / total_s,
        sum(window.running * window.window_s for window in windows) / total_s,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditions:
    """What the fleet is like for the stages that a move leaves as they are."""

    slowness: tuple[tuple[str, float], ...]

    def differ_from(self, other: Conditions, jump_fraction: float) -> bool:
        now, then = dict(self.slowness), dict(other.slowness)
        both = now.keys() & then.keys()
        return any(abs(now[d] / then[d] - 1.0) > jump_fraction for d in both)


class Trial:
    """The windows after a move, held against those before it."""

    def __init__(
        self,
        settings: ControllerSettings,
        *,
        origin: Cut,
        tried: Cut,
        epoch: int,
        since_s: float,
        before: Load,
        conditions: Conditions,
        is_half: bool,
    ) -> None:
        self._settings = settings
        self.origin = origin
        self.tried = tried
        self.epoch = epoch
        self.is_half = is_half
        self._since_s = since_s
        self._before = before
        self._conditions = conditions
        self._windows: list[StagesMeasured] = []

    def observe(self, window: StagesMeasured, conditions: Conditions) -> Verdict | None:
        """Take in a window of the new plan; returns the verdict once there is one."""
        if conditions.differ_from(self._conditions, self._settings.jump_fraction):
            return Verdict(
                True, None, "kept unmeasured: a device that the move left as it was changed speed"
            )
        slack_s = _SLACK_FRACTION * window.window_s
        if window.at_s - window.window_s >= self._since_s - slack_s and self._is_comparable(window):
            self._windows.append(window)
        measured_s = sum(seen.window_s for seen in self._windows)
        if measured_s >= self._settings.trial_window_s - slack_s:
            return self._verdict()
        return self.overdue(window.at_s)

    def overdue(self, now_s: float) -> Verdict | None:
        """Return a verdict when the load has stayed incomparable for too long."""
        waited_s = now_s - self._since_s
        if waited_s <= self._settings.trial_deadline_s:
            return None
        return Verdict(
            True,
            None,
            f"kept unmeasured: in {waited_s:.3g} s the load was comparable to "
            f"{self._before.running:.3g} sequences in flight for less than trial_window_s "
            f"({self._settings.trial_window_s:g})",
        )

    def _is_comparable(self, window: StagesMeasured) -> bool:
        allowed = self._settings.load_tolerance_fraction * self._before.running
        return abs(window.running - self._before.running) <= allowed

    def _verdict(self) -> Verdict:
        after = load_of(self._windows)
        assert after is not None
        gain = after.tokens_per_s / self._before.tokens_per_s - 1.0
        keeps = gain >= self._settings.keep_fraction - 1.0
        return Verdict(
            keeps,
            gain,
            f"{'kept' if keeps else 'rolled back'}: {self._before.tokens_per_s:.1f} tokens/s "
            f"became {after.tokens_per_s:.1f} ({gain:+.1%}); keep_fraction is "
            f"{self._settings.keep_fraction:g}",
        )


def doubled(first_s: float, times: int, most_s: float) -> float:
    """Return a wait that doubles a number of times, up to a limit."""
    return float(min(most_s, first_s * 2.0 ** min(times, 60)))
