"""What an edge knows of its uplink: a running estimate with its error, and what fits into a time.

Rates are of whole messages as sent, in bits a second; times are in seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

_WEIGHT = 0.2
"""Of one more observation."""
_FIRST_ERROR = 0.5
"""Of a rate that has been seen once, as a share of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Uplink:
    """Moving averages of rate, round trip and loss, each with the variance of what was seen."""

    rate_bits_per_s: float
    rate_variance: float
    rtt_s: float
    rtt_variance: float
    loss: float = 0.0
    """The share of messages that came to nothing."""

    def __post_init__(self) -> None:
        for name in ("rate_bits_per_s", "rate_variance", "rtt_s", "rtt_variance", "loss"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} ({value}) must be 0 or more and finite")
        if self.loss > 1:
            raise ValueError(f"loss ({self.loss}) must be at most 1")

    @classmethod
    def declared(cls, rate_bits_per_s: float, rtt_s: float) -> Uplink:
        """What is believed before anything has been sent."""
        return cls(
            rate_bits_per_s=rate_bits_per_s,
            rate_variance=(_FIRST_ERROR * rate_bits_per_s) ** 2,
            rtt_s=rtt_s,
            rtt_variance=(_FIRST_ERROR * rtt_s) ** 2,
        )

    def delivered(self, bits: int, seconds: float) -> Uplink:
        """A message of so many bits took so long, from its first bit sent to its receipt heard.

        What the round trip does not explain is taken for the rate's.
        """
        if bits < 1 or not (math.isfinite(seconds) and seconds > 0):
            raise ValueError(f"{bits} bits in {seconds} s are no delivery")
        # A message that is mostly round trip says little of the rate but that it is no lower.
        sending_s = max(seconds - self.rtt_s, 0.1 * seconds)
        rate, rate_variance = _moved(self.rate_bits_per_s, self.rate_variance, bits / sending_s)
        return replace(
            self,
            rate_bits_per_s=rate,
            rate_variance=rate_variance,
            loss=self.loss * (1 - _WEIGHT),
        )

    def answered(self, seconds: float) -> Uplink:
        """A message of hardly any bits was answered after so long."""
        if not (math.isfinite(seconds) and seconds >= 0):
            raise ValueError(f"a round trip of {seconds} s is none")
        rtt_s, rtt_variance = _moved(self.rtt_s, self.rtt_variance, seconds)
        return replace(self, rtt_s=rtt_s, rtt_variance=rtt_variance)

    def lost(self) -> Uplink:
        """A message came to nothing in its time."""
        return replace(self, loss=self.loss + _WEIGHT * (1 - self.loss))

    def safe_rate_bits_per_s(self, caution: float) -> float:
        """The rate less `caution` times its standard deviation, and less what is lost."""
        rate = self.rate_bits_per_s - caution * math.sqrt(self.rate_variance)
        return max(0.0, rate) * (1 - self.loss)

    def safe_rtt_s(self, caution: float) -> float:
        """The round trip and `caution` times its standard deviation."""
        return self.rtt_s + caution * math.sqrt(self.rtt_variance)

    def bits_within(self, seconds: float, caution: float) -> int:
        """How many bits are delivered and receipted in a time, at most; 0: none safely."""
        left_s = seconds - self.safe_rtt_s(caution)
        return max(0, math.floor(self.safe_rate_bits_per_s(caution) * left_s)) if left_s > 0 else 0

    def seconds_for(self, bits: int, caution: float) -> float:
        """How long a message takes, at most; infinite where nothing is safely delivered."""
        rate = self.safe_rate_bits_per_s(caution)
        return self.safe_rtt_s(caution) + bits / rate if rate > 0 else math.inf


def _moved(mean: float, variance: float, value: float) -> tuple[float, float]:
    """Exponentially weighted mean and variance (West, 1979) after one more value."""
    difference = value - mean
    return mean + _WEIGHT * difference, (1 - _WEIGHT) * (variance + _WEIGHT * difference**2)
