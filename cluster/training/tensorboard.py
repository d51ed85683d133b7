"""Scalars of a run as TensorBoard event files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from cluster.training.events import (
    CheckpointSaved,
    Evaluated,
    HostBytes,
    HostsLost,
    StepDone,
    TrainingEvent,
    TrainingStarted,
)

_FLUSH_EVERY_S = 30


class Scalars:
    """Writes what changes from step to step.

    Steps that are done again, after a resume or when weights were lost, replace what was written
    of them. Files that cannot be written (a full disk) end the curves, not the training.
    """

    def __init__(self, folder: Path, note: Callable[[str], None]) -> None:
        """Write to `folder`; `note` is told, once, why the curves end early."""
        self._folder = folder
        self._note = note
        self._writer: SummaryWriter | None = None
        self._failed = False

    def handle(self, event: TrainingEvent) -> None:
        if self._failed:
            return
        try:
            self._write(event)
        except OSError as error:
            self._failed = True
            self._note(f"no more curves in {self._folder}: {error}; training goes on")

    def close(self) -> None:
        if self._writer is None or self._failed:
            return
        try:
            self._writer.close()
        except OSError as error:
            self._note(f"the last curves in {self._folder} are lost: {error}")
        self._writer = None

    def _write(self, event: TrainingEvent) -> None:
        match event:
            case TrainingStarted():
                self._open(event.first_step)
                self._host_bytes(event.host_bytes, event.first_step - 1)
            case HostsLost():
                self._open(event.from_step + 1)
            case StepDone():
                self._step(event)
            case Evaluated():
                self._add("loss/held_out", event.loss, event.step)
            case CheckpointSaved():
                if self._writer is not None:
                    self._writer.flush()
            case _:
                pass

    def _open(self, next_step: int) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = SummaryWriter(
            str(self._folder), purge_step=next_step, flush_secs=_FLUSH_EVERY_S
        )

    def _host_bytes(self, host: HostBytes, step: int) -> None:
        self._add("host/bytes_per_trained_parameter", host.per_trained_parameter, step)
        self._add("host/weight_bytes", host.weight_bytes, step)
        self._add("host/residual_bytes", host.residual_bytes, step)
        self._add("host/gradient_bytes", host.gradient_bytes, step)
        self._add("host/moment_bytes", host.moment_bytes, step)
        self._add("host/frozen_bytes", host.frozen_bytes, step)

    def _step(self, event: StepDone) -> None:
        scalars = {
            "loss/train": event.loss,
            "optimizer/learning_rate": event.learning_rate,
            "optimizer/gradient_norm": event.gradient_norm,
            "throughput/tokens_per_s": event.tokens_per_s,
        }
        if event.router_loss is not None:
            scalars["loss/router"] = event.router_loss
        for device_id, idle in event.idle_fractions.items():
            scalars[f"idle/{device_id}"] = idle
        for tag, value in scalars.items():
            self._add(tag, value, event.step)

    def _add(self, tag: str, value: float, step: int) -> None:
        if self._writer is not None:
            self._writer.add_scalar(tag, value, step)


@contextmanager
def scalars_in(folder: Path, note: Callable[[str], None]) -> Iterator[Scalars]:
    """Yield the scalars of a run, closed at the end."""
    scalars = Scalars(folder, note)
    try:
        yield scalars
    finally:
        scalars.close()
