"""A device's time: real, or paced to declared figures.

A paced device computes the true result, then waits until the declared roofline time has passed. It
never finishes early; when the real work was slower than declared it says by how much. Waiting
costs no CPU, so one small machine can stand in for several devices with true numerics and true
schedule behaviour. The declared time is `placement.costs`', the one that planners predict with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from actors.engine.batch import StepBatch
from placement.costs import StageCost


@dataclass(slots=True)
class DeviceClock:
    """Accounts for a device's steps and, when the device is paced, paces them.

    `now_s` and `sleep` are arguments so that tests need no real time.
    """

    now_s: Callable[[], float]
    sleep: Callable[[float], None]
    is_paced: bool = False
    slowness: float = 1.0
    """Of a paced device: how many times as long as declared it takes; to try what a slow one does
    to a plan."""
    predicted_s: float = 0.0
    """What the cost model says for the steps so far."""
    busy_s: float = 0.0
    """Time the device was occupied: real work, or the declared time when that is longer."""
    late_s: float = 0.0
    """Paced only: by how much the real work outlasted the declared time, summed over steps."""
    late_steps: int = 0
    steps: int = 0
    booked_until_s: float = -math.inf
    """When work that was booked ends."""

    def finish(
        self, batch: StepBatch, started_s: float, cost: StageCost, *, elsewhere_s: float = 0.0
    ) -> float:
        """End the step that began at `started_s`; returns the seconds it occupied the device.

        `elsewhere_s` of it the device has waited for others, which is no work of its own.
        """
        started_s += elsewhere_s
        declared_s = cost.step_s(batch.num_tokens, batch.context_tokens, batch.num_head_rows)
        self.predicted_s += declared_s
        if self.is_paced:
            self._wait_until(started_s + declared_s * self.slowness)
        occupied_s = self.now_s() - started_s
        self.busy_s += occupied_s
        self.steps += 1
        return occupied_s

    def book(self, arrived_s: float, declared_s: float) -> float:
        """Account for work that has just been computed, and do not wait; returns when it ends.

        It begins when it arrived, or when what was booked before ends.
        """
        started_s, end_s = max(arrived_s, self.booked_until_s), self.now_s()
        if self.is_paced:
            declared_end_s = started_s + declared_s * self.slowness
            self._note_late(declared_end_s - end_s)
            end_s = max(end_s, declared_end_s)
        self.predicted_s += declared_s
        self.busy_s += end_s - started_s
        self.steps += 1
        self.booked_until_s = end_s
        return end_s

    def _note_late(self, left_s: float) -> None:
        if left_s < 0:
            self.late_s -= left_s
            self.late_steps += 1

    def _wait_until(self, end_s: float) -> None:
        left_s = end_s - self.now_s()
        self._note_late(left_s)
        while left_s > 0:
            self.sleep(left_s)
            left_s = end_s - self.now_s()
