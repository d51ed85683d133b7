"""Recording what a deployment asks of its experts, as traces that can be replayed.

Each stage counts the rows of its own layers, step by step; all run the same steps in the same
order, so the n-th step of one belongs to the n-th of another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from placement.sharding.loads import Phase
from placement.sharding.traces import ExpertTrace, TraceRecorder

PHASES: tuple[Phase, ...] = get_args(Phase)
Steps = Mapping[Phase, NDArray[np.int32]]
"""[steps, layers, experts] of each phase; of layers that are elsewhere no row."""


class TraceRecording:
    """Joins what holders of layers have counted, up to a number of steps of each phase."""

    def __init__(self, num_layers: int, num_experts: int, *, top_k: int, max_steps: int) -> None:
        self._shape = num_layers, num_experts
        self._recorders = {
            phase: TraceRecorder(
                num_layers, num_experts, phase=phase, top_k=top_k, max_steps=max_steps
            )
            for phase in PHASES
        }
        self._pending: dict[int, dict[Phase, NDArray[np.int32]]] = {}
        """Steps by holder that others have not told of yet."""

    @property
    def is_full(self) -> bool:
        """Further steps of either phase are not kept."""
        return all(recorder.is_full for recorder in self._recorders.values())

    def add(self, counted: Mapping[int, Steps]) -> None:
        """Take what each holder has counted since the last time.

        Where holders are others than before, what some have told and others never will is dropped.
        """
        if counted.keys() != self._pending.keys():
            none = np.zeros((0, *self._shape), dtype=np.int32)
            self._pending = {holder: dict.fromkeys(PHASES, none) for holder in counted}
        for phase in PHASES:
            told = {
                holder: np.concatenate([self._pending[holder][phase], steps[phase]])
                for holder, steps in counted.items()
            }
            num_steps = min((len(steps) for steps in told.values()), default=0)
            for step in range(num_steps):
                rows = sum(steps[step].astype(np.int64) for steps in told.values())
                self._recorders[phase].add(np.asarray(rows))
            for holder, steps in told.items():
                self._pending[holder][phase] = steps[num_steps:]

    def traces(self) -> list[ExpertTrace]:
        """Return what was kept, of the phases of which there is anything."""
        return [recorder.trace() for recorder in self._recorders.values() if recorder.num_steps]
