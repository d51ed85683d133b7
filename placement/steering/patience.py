"""What a better cut has to wait for: enough gain, confirmation, the cool-down, its back-off."""

from __future__ import annotations

from collections import deque

from placement.steering.settings import ControllerSettings
from placement.steering.targets import Cut, Proposal, cut_of
from placement.steering.trials import doubled

_HOUR_S = 3600.0
LEAST_GAIN = 0.005
"""A smaller one is rounding of measurements, and not worth the bytes."""


class Patience:
    """The hysteresis of moves for gain."""

    def __init__(self, settings: ControllerSettings) -> None:
        self._settings = settings
        self._num_confirmed = 0
        self._cool_since_s: float | None = None
        self._moves_s: deque[float] = deque()
        self._num_rolled_back = 0
        """Trials in a row."""
        self._failures: dict[Cut, tuple[int, float]] = {}
        """Cut -> how often it failed, and until when it is not tried again."""

    def moved(self, now_s: float) -> None:
        """Any move was done: cool down, confirm anew."""
        self._cool_since_s, self._num_confirmed = now_s, 0

    def disturbed(self) -> None:
        """What was seen so far is void."""
        self._num_confirmed = 0

    def joined(self) -> None:
        """The fleet is another: failed trials say less."""
        self._num_rolled_back = 0

    def kept(self, *, is_half: bool) -> None:
        """A trial was kept; what was measured of a first half speaks for the second."""
        self._num_rolled_back = 0
        if is_half:
            self._cool_since_s = None
            self._num_confirmed = self._settings.confirm_windows - 1

    def rolled_back(self, cut: Cut, now_s: float) -> None:
        self._num_rolled_back += 1
        self.failed(cut, now_s)

    def failed(self, cut: Cut, now_s: float) -> None:
        """A cut is not tried again for a while, that doubles with every failure."""
        settings = self._settings
        times = self._failures.get(cut, (0, 0.0))[0]
        wait_s = doubled(settings.backoff_s, times, settings.max_backoff_s)
        self._failures[cut] = (times + 1, now_s + wait_s)

    def backoff_s(self, cut: Cut, now_s: float) -> float:
        """Return for how long a cut is not tried yet; 0: it may be."""
        return max(0.0, self._failures.get(cut, (0, 0.0))[1] - now_s)

    def confirm(self, *, gains: bool) -> None:
        """A window has shown a gain, or none."""
        self._num_confirmed = self._num_confirmed + 1 if gains else 0

    def begin(self, now_s: float) -> None:
        """A move for gain begins by itself."""
        self._moves_s.append(now_s)

    def no_gain(self, proposal: Proposal, now_s: float, *, is_requested: bool) -> str:
        """Say why a proposal is not worth a move; empty: it is. One that is asked for may gain
        less."""
        least = 0.0 if is_requested else self._settings.min_gain_fraction
        knob = "" if is_requested else " by itself (min_gain_fraction)"
        if proposal.gain_fraction < max(least, LEAST_GAIN):
            return f"{proposal.verdict}; a move must gain {max(least, LEAST_GAIN):.1%}{knob}"
        if not proposal.is_worth_it:
            return proposal.verdict
        left_s = self.backoff_s(cut_of(proposal.plan), now_s)
        if left_s:
            return f"{proposal.verdict}; this cut failed and is not tried again for {left_s:.3g} s"
        return ""

    def waits(self, now_s: float) -> str:
        """Say what holds back a move that gains; empty: nothing does."""
        settings = self._settings
        if self._num_confirmed < settings.confirm_windows:
            return (
                f"a gain was seen in {self._num_confirmed} of confirm_windows "
                f"({settings.confirm_windows}) windows"
            )
        if self._cool_since_s is not None:
            cool_s = doubled(settings.cool_down_s, self._num_rolled_back, settings.max_backoff_s)
            left_s = cool_s - (now_s - self._cool_since_s)
            if left_s > 0:
                return f"a gain waits for the cool-down of {cool_s:g} s, {left_s:.3g} s more"
        while self._moves_s and now_s - self._moves_s[0] >= _HOUR_S:
            self._moves_s.popleft()
        if len(self._moves_s) >= settings.max_moves_per_hour:
            return f"max_moves_per_hour ({settings.max_moves_per_hour}) moves were made"
        return ""
