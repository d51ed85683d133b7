"""Keeps the file that tells others how far a training run is: events in, `TrainingState` out."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import assert_never

from cluster.training.events import (
    CheckpointFailed,
    CheckpointSaved,
    DeviceJoined,
    DeviceLost,
    Evaluated,
    HostsLost,
    SlotsTraced,
    StepDone,
    TrainingEvent,
    TrainingFinished,
    TrainingPlanned,
    TrainingStarted,
)
from cluster.trainstate import (
    MAX_POINTS,
    TrainingPhase,
    TrainingState,
    forget_old_runs,
    read_training,
    training_file,
    write_training,
)

_WRITE_EVERY_S = 1.0

Points = tuple[tuple[int, float | None], ...]


def after(state: TrainingState, event: TrainingEvent) -> TrainingState:
    """Return the state that an event leads to."""
    match event:
        case TrainingStarted():
            return replace(
                _rewound(state, event.first_step - 1), phase="running", num_steps=event.num_steps
            )
        case StepDone():
            return _stepped(state, event)
        case Evaluated():
            points = (*state.held_out, (event.step, _finite(event.loss)))
            return replace(state, held_out=_thinned(points))
        case HostsLost():
            return _rewound(state, event.from_step)
        case TrainingFinished():
            phase: TrainingPhase = "finished" if event.step >= state.num_steps else "interrupted"
            return replace(state, phase=phase, step=event.step, eta_s=None)
        case TrainingPlanned() | CheckpointSaved() | CheckpointFailed() | SlotsTraced():
            return state
        case DeviceLost() | DeviceJoined():
            return state  # the next step's idle shares name who is there
        case _:
            assert_never(event)


def _stepped(state: TrainingState, event: StepDone) -> TrainingState:
    loss, losses, stride = _finite(event.loss), state.losses, state.stride
    if event.step % stride == 0:
        losses = (*losses, (event.step, loss))
    while len(losses) > MAX_POINTS:
        stride *= 2
        losses = tuple(point for point in losses if point[0] % stride == 0)
    return replace(
        state,
        step=event.step,
        num_steps=event.num_steps,
        loss=loss,
        losses=losses,
        stride=stride,
        tokens_per_s=_finite(event.tokens_per_s),
        idle_fractions=dict(event.idle_fractions),
        eta_s=_finite(event.eta_s),
    )


def _rewound(state: TrainingState, step: int) -> TrainingState:
    """Return the state as it was after `step`: later steps are done again."""
    losses = tuple(point for point in state.losses if point[0] <= step)
    return replace(
        state,
        step=step,
        losses=losses,
        stride=state.stride if losses else 1,
        held_out=tuple(point for point in state.held_out if point[0] <= step),
    )


def _thinned(points: Points) -> Points:
    """Return every other point where there are too many; the last one stays."""
    return points if len(points) <= MAX_POINTS else points[1::2]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class TrainingTeller:
    """Writes the state after events, at most once a second but for the last ones."""

    def __init__(
        self,
        output: Path,
        num_steps: int,
        note: Callable[[str], None],
        *,
        monotonic_s: Callable[[], float] = time.monotonic,
        unix_s: Callable[[], float] = lambda: datetime.now(UTC).timestamp(),
    ) -> None:
        self._note = note
        self._monotonic_s = monotonic_s
        self._unix_s = unix_s
        self._next_write_s = -math.inf
        self._is_writable = True
        self._has_tidied = False
        # A run that is resumed goes on with its curve; one that starts cuts it off at step 0.
        before = read_training(training_file(output))
        self.state = TrainingState(
            name=output.name,
            pid=os.getpid(),
            output=str(output),
            started_unix_s=unix_s(),
            updated_unix_s=unix_s(),
            num_steps=num_steps,
            losses=() if before is None else before.losses,
            stride=1 if before is None else before.stride,
            held_out=() if before is None else before.held_out,
        )

    def handle(self, event: TrainingEvent) -> None:
        self.state = after(self.state, event)
        now_s = self._monotonic_s()
        if now_s >= self._next_write_s:
            self._next_write_s = now_s + _WRITE_EVERY_S
            self._write()

    def close(self, failure: BaseException | None = None) -> None:
        """Say how the run ended."""
        if isinstance(failure, Exception):
            self.state = replace(self.state, phase="failed", reason=str(failure), eta_s=None)
        elif not self.state.is_ended:
            self.state = replace(self.state, phase="interrupted", eta_s=None)
        self._write()

    def _write(self) -> None:
        if not self._is_writable:
            return
        try:
            write_training(replace(self.state, updated_unix_s=self._unix_s()))
            if not self._has_tidied:
                self._has_tidied = True
                forget_old_runs()
        except OSError as error:
            # Nobody can look on then, but the training itself is none the worse.
            self._is_writable = False
            self._note(f"the state of this run cannot be shown to others: {error}")


@contextmanager
def tell_others(
    output: Path, num_steps: int, note: Callable[[str], None]
) -> Iterator[TrainingTeller]:
    """Yield what keeps the run's file; it says at the end how the run ended."""
    teller = TrainingTeller(output, num_steps, note)
    try:
        yield teller
    except BaseException as error:
        teller.close(error)
        raise
    teller.close()
