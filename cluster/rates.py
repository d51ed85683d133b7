"""How much of something a client may have each minute: a token bucket, with the clock an argument.

A bucket holds at most one minute's worth and fills evenly. It may be overdrawn, by what nobody
knew beforehand (tokens that are being generated); the next taking waits until that is paid back.
"""

from __future__ import annotations

_MINUTE_S = 60.0


class TokenBucket:
    """One limit of one client; full at first."""

    def __init__(self, per_minute: int, now_s: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at_s = now_s

    def level(self, now_s: float) -> float:
        """Return what is in it; below 0: what is owed. A clock that goes back adds nothing."""
        passed_s = max(0.0, now_s - self._at_s)
        self._at_s = max(self._at_s, now_s)
        filled = self._level + passed_s * self.per_minute / _MINUTE_S
        self._level = min(float(self.per_minute), filled)
        return self._level

    def wait_s(self, amount: float, now_s: float) -> float:
        """Return the seconds until `amount` is there, or until it is full if that is less; 0: now.

        So what is larger than a minute's worth is let through, and paid for afterwards.
        """
        lacking = min(amount, self.per_minute) - self.level(now_s)
        return max(0.0, lacking * _MINUTE_S / self.per_minute)

    def take(self, amount: float, now_s: float) -> None:
        """Take `amount`, whether it is there or not."""
        self._level = self.level(now_s) - amount
