"""Running averages of measured slot times, which price slots for the dispatch of a real run.

The price of a slot on a device is planned seconds x device factor x slot ratio:
- The factor says how much slower the whole device is than planned, and prices slots that it has not
  run yet.
- The ratio says how much slower this slot is than the device's others. A device that has not run
  the slot is taken to be like the mean of those that have: the plan misjudges a slot everywhere.

Both are exponential moving averages in logarithms, so that half as long and twice as long weigh
the same. The plan's 1 is their first value and bias is corrected by counts: the n-th measurement
weighs 1 / (n + 1) until that falls to the average's weight. A measurement that is off by more than
`OUTLIER` does not count, unless the device's next one is off the same way: then the device has
changed speed, and its factor starts again from these two. So one outlier, such as a slot with cold
weights, moves nothing, and two slots after a change all slots of the device are priced anew.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

FACTOR_WEIGHT = 0.1
RATIO_WEIGHT = 0.2
"""Of the newest measurement in a long average."""
SHORT = 0.05
"""A slot that is planned to take less than this share of its device's longest one says little of
the device: what is fixed in it weighs too much."""
OUTLIER = 1.25
"""By what factor a measurement may be off and still count at once; beyond what jitter does."""


@dataclass(slots=True)
class _Average:
    """Of logarithms."""

    weight: float
    value: float = 0.0
    count: int = 1

    def add(self, value: float) -> None:
        self.count += 1
        self.value += max(self.weight, 1.0 / self.count) * (value - self.value)


@dataclass(slots=True)
class _Device:
    factor: _Average
    suspect: float | None = None
    """The last measurement, when it was too far off to count."""
    longest_s: float = 0.0
    """Planned, of the slots that it ran."""
    fastest: float = math.inf
    """The lowest factor that at least two measurements agreed on."""

    def add(self, value: float) -> bool:
        """Take a measurement without its slot's ratio; return whether the device is as before."""
        off = value - self.factor.value
        before, self.suspect = self.suspect, None
        is_outlier = abs(off) > math.log(OUTLIER)
        if not is_outlier:
            self.factor.add(value)
        elif before is not None and (before - self.factor.value) * off > 0:
            self.factor = _Average(FACTOR_WEIGHT, (before + value) / 2, count=2)
        else:
            self.suspect = value
        if self.factor.count > 2 or (is_outlier and self.suspect is None):
            self.fastest = min(self.fastest, self.factor.value)
        return not is_outlier


class SlotAverages:
    """Measured over planned seconds, per device and per (device, slot)."""

    def __init__(self) -> None:
        self._devices: dict[str, _Device] = {}
        self._ratios: dict[Hashable, dict[str, _Average]] = {}
        """By slot, then device."""

    def factor(self, device_id: str) -> float:
        """Return by what factor the device is slower than planned."""
        return math.exp(self._log_factor(device_id))

    def scale(self, device_id: str, slot: Hashable) -> float:
        """Return what the slot's planned seconds are multiplied by on the device."""
        ratios = self._ratios.get(slot, {})
        if device_id in ratios:
            ratio = ratios[device_id].value
        else:
            ratio = sum(known.value for known in ratios.values()) / max(1, len(ratios))
        return math.exp(self._log_factor(device_id) + ratio)

    def slow_down(self, device_id: str) -> float:
        """Return by what factor the device is slower than it once was; 1 unless by more than
        `OUTLIER`."""
        device = self._devices.get(device_id)
        if device is None or device.factor.value <= device.fastest + math.log(OUTLIER):
            return 1.0
        return math.exp(device.factor.value - device.fastest)

    def seems_faster(self, device_id: str) -> bool:
        """The device's last measurement was too fast to be believed at once."""
        device = self._devices.get(device_id)
        return (
            device is not None
            and device.suspect is not None
            and device.suspect < device.factor.value
        )

    def observe(self, device_id: str, slot: Hashable, planned_s: float, measured_s: float) -> None:
        """Take the measured seconds of one micro-batch into account.

        Raises:
            ValueError: `measured_s` is not above 0 and finite.
        """
        if not (math.isfinite(measured_s) and measured_s > 0):
            raise ValueError(f"measured seconds ({measured_s}) must be above 0 and finite")
        off = math.log(measured_s / planned_s)
        ratios = self._ratios.setdefault(slot, {})
        ratio = ratios.setdefault(device_id, _Average(RATIO_WEIGHT))
        device = self._devices.setdefault(device_id, _Device(_Average(FACTOR_WEIGHT)))
        device.longest_s = max(device.longest_s, planned_s)
        if planned_s >= SHORT * device.longest_s:
            device.add(off - ratio.value)
        # Whatever is left, as far as one measurement is believed.
        left = off - ratio.value - device.factor.value
        limit = math.log(OUTLIER)
        ratio.add(ratio.value + min(max(left, -limit), limit))

    def _log_factor(self, device_id: str) -> float:
        device = self._devices.get(device_id)
        return device.factor.value if device else 0.0
