"""How much slower than profiled every device is now, from measured windows.

A window's slowness is its busy seconds over those that the cost model predicts for the very same
steps. Of the last three windows the median counts, so that one odd window moves nothing. A small
change enters a running average; a large one is taken whole, as half a correction would be planned
for as if it were the truth.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, deque
from collections.abc import Collection
from dataclasses import replace

from placement.steering.settings import ControllerSettings
from placement.steering.trials import doubled
from placement.steering.values import StageMeasurement
from placement.topology import Device

GRID = math.log(1.02)
"""Plans are made with slowness in steps of 2 %, so that noise below asks for no new plan."""
_MOST = 1e6
"""A device that hangs is lost, not infinitely slow."""


def slowed(device: Device, factor: float) -> Device:
    """Return the device with everything it computes taking `factor` times as long."""
    if factor == 1.0:
        return device
    return replace(
        device,
        flops_per_s=device.flops_per_s / factor,
        memory_bytes_per_s=device.memory_bytes_per_s / factor,
        matmul_rates=tuple(
            replace(rate, flops_per_s=rate.flops_per_s / factor) for rate in device.matmul_rates
        ),
        measured_layers=tuple(
            replace(
                measured,
                samples=tuple(
                    replace(
                        sample,
                        forward_s=sample.forward_s * factor,
                        recompute_s=_times(sample.recompute_s, factor),
                        backward_s=_times(sample.backward_s, factor),
                    )
                    for sample in measured.samples
                ),
            )
            for measured in device.measured_layers
        ),
    )


def _times(seconds: float | None, factor: float) -> float | None:
    return None if seconds is None else seconds * factor


class Speeds:
    """The slowness of every device that was measured; others run as profiled."""

    def __init__(self, settings: ControllerSettings) -> None:
        self._settings = settings
        self._factors: dict[str, float] = {}
        self._windows: dict[str, deque[float]] = {}
        self._seen_s: dict[str, float] = {}
        """When each was measured last."""
        self._num_forgiven: Counter[str] = Counter()

    def observe(self, measurement: StageMeasurement, now_s: float) -> None:
        """Take in one window of one device, if it is evidence."""
        if measurement.steps < self._settings.least_steps:
            return
        if not (measurement.predicted_s > 0 and measurement.busy_s > 0):
            return
        window = min(_MOST, max(1 / _MOST, measurement.busy_s / measurement.predicted_s))
        known = self._factors.get(measurement.device_id, 1.0)
        windows = self._windows.setdefault(measurement.device_id, deque([known, known], maxlen=3))
        windows.append(window)
        median = statistics.median(windows)
        is_jump = abs(median / known - 1.0) > self._settings.jump_fraction
        weight = 1.0 if is_jump else self._settings.smoothing_fraction
        self._factors[measurement.device_id] = known + weight * (median - known)
        self._seen_s[measurement.device_id] = now_s

    def forgive(self, idle: Collection[str], now_s: float) -> list[str]:
        """Take slowed devices as profiled again that have run nothing for a while, as nothing else
        would show that they are well again; returns them. The while doubles every time."""
        settings = self._settings
        forgiven = []
        for device_id in sorted(set(idle) & self._seen_s.keys()):
            times = self._num_forgiven[device_id]
            wait_s = doubled(settings.forgive_s, times, settings.max_forgive_s)
            is_slow = self._factors[device_id] > 1.0 + settings.min_gain_fraction
            if is_slow and now_s - self._seen_s[device_id] >= wait_s:
                self.forget(device_id)
                self._num_forgiven[device_id] = times + 1
                forgiven.append(device_id)
        return forgiven

    def forget(self, device_id: str) -> None:
        """Take a device as profiled again."""
        self._factors.pop(device_id, None)
        self._windows.pop(device_id, None)
        self._seen_s.pop(device_id, None)

    def factor(self, device_id: str) -> float:
        """Return the slowness to plan with: 1 as profiled, 2 at half the speed."""
        factor = self._factors.get(device_id, 1.0)
        return math.exp(GRID * round(math.log(factor) / GRID))

    def measured(self) -> dict[str, float]:
        """Return the running averages, by device."""
        return dict(sorted(self._factors.items()))
