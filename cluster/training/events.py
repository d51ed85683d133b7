"""What a training run tells whoever watches it: values, from the driver's loop to the reports."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from placement.trace import Event
from placement.train import TrainPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class HostBytes:
    """Host memory of the trained parameters, counted from the tensors that are held."""

    num_trained: int
    num_frozen: int
    weight_bytes: int
    """Every version that is held at once: two when asynchronous."""
    residual_bytes: int
    """What bfloat16 weights lack of their float32 masters."""
    gradient_bytes: int
    moment_bytes: int
    frozen_bytes: int

    @property
    def per_trained_parameter(self) -> float:
        """Bytes of weights, residuals, gradients and moments over the trained parameters."""
        held = self.weight_bytes + self.residual_bytes + self.gradient_bytes + self.moment_bytes
        return held / max(1, self.num_trained)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPlanned:
    """The slots that are used from the next round on: at the start, and when devices change."""

    plan: TrainPlan
    nodes: Mapping[str, str]
    """The node of every device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingStarted:
    """Weights are in host memory; the first step follows."""

    first_step: int
    num_steps: int
    host_bytes: HostBytes
    num_documents: int
    num_sequences: int
    num_left_out: int = 0
    """Records with nothing to learn."""
    num_cut: int = 0
    """Documents longer than a sequence: their later pieces do not see the earlier ones."""
    resumed_from: Path | None


@dataclass(frozen=True, kw_only=True, slots=True)
class StepDone:
    """One optimizer step; `step` counts from 1."""

    step: int
    num_steps: int
    loss: float
    """Mean cross-entropy over the step's target tokens, nats."""
    router_loss: float | None
    gradient_norm: float
    learning_rate: float
    tokens: int
    seconds: float
    """Since the step before ended."""
    idle_fractions: Mapping[str, float]
    """Per device, over the last steps."""
    eta_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """Held-out loss after `step` steps."""

    step: int
    loss: float
    tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSaved:
    step: int
    path: Path
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointFailed:
    """It could not be written (a full disk); the one before is untouched and training goes on."""

    step: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceLost:
    device_id: str
    reason: str
    num_slots: int
    """Slots that are run again elsewhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceJoined:
    """Used from the next round on."""

    device_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class HostsLost:
    """A weight host died: weights and optimizer state are loaded again from a checkpoint."""

    reason: str
    from_step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingFinished:
    step: int
    path: Path | None
    """The last checkpoint."""
    seconds: float
    tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotsTraced:
    """What devices did lately, when a trace was asked for."""

    events: tuple[Event, ...]


TrainingEvent = (
    TrainingPlanned
    | TrainingStarted
    | StepDone
    | Evaluated
    | CheckpointSaved
    | CheckpointFailed
    | DeviceLost
    | DeviceJoined
    | HostsLost
    | TrainingFinished
    | SlotsTraced
)


def event_json(event: TrainingEvent) -> dict[str, Any]:
    """Return plain JSON values, the event's name under "event"; null for what is not finite."""
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).lower()
    value: dict[str, Any] = {"event": name} | _plain(event)
    if isinstance(event, StepDone):
        value["tokens_per_s"] = _plain(event.tokens_per_s)
    if isinstance(event, TrainingStarted):
        value["host_bytes"]["per_trained_parameter"] = event.host_bytes.per_trained_parameter
    return value


def _plain(value: object) -> Any:
    if isinstance(value, TrainPlan):
        return _plain(value.to_json())
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(entry) for entry in value]
    # A loss that overflowed is no JSON number.
    return None if isinstance(value, float) and not math.isfinite(value) else value
