"""What driver and devices of a training pool tell each other. Loads without torch or Ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from actors.engine.training_config import LoraSettings
from actors.engine.training_values import LossScales, RouterLoads
from placement.topology import Device
from placement.training import RecomputeGrain, SlotKind

BoundaryName = tuple[str, int]
"""("hidden" or "gradient", layer): activations in front of a layer, or their gradient."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolDeviceSpec:
    """What a device of the pool is, and which model it runs slots of."""

    device: Device
    model: str
    allow_unverified: bool
    dtype: str
    weight_dtype: str
    """In which weights arrive."""
    lora: LoraSettings | None
    loss_chunk_tokens: int
    seed: int
    threads: int
    weights_cap_bytes: int
    """Weights that stay on the device although no slot needs them now."""
    outputs_cap_bytes: int
    """Of one slot's results that stay there for the slot that follows it."""
    wait_timeout_s: float


class SlotKey(NamedTuple):
    """Which visit, and which attempt at it."""

    step: int
    round: int
    slot: int
    attempt: int


class KeptKey(NamedTuple):
    """The activations that a forward slot keeps for the backward slot of the same layers."""

    step: int
    round: int
    first_layer: int
    end_layer: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotTask:
    """One visit of some layers to this device."""

    key: SlotKey
    kind: SlotKind
    first_layer: int
    end_layer: int
    grain: RecomputeGrain
    is_kept: bool
    """Keep a forward slot's activations for the backward slot of the same layers."""
    saves: tuple[int, ...]
    first_micro_batch: int
    scales: LossScales
    is_trained: bool
    version: int
    """Of the weights."""
    declared_s: float | None = None
    """What a paced device takes for one micro-batch."""
    declared_lead_s: float = 0.0
    """The part of it that needs no gradient: a recompute."""
    needs_saved: bool = True
    """A backward slot's saved inputs are sent; the one at layer 0 recomputes from tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatchReport:
    """What the driver is told after the results of one micro-batch."""

    micro_batch: int
    outputs: tuple[BoundaryName, ...]
    """Of the arrays that were streamed just before, in order."""
    is_left: bool = False
    """The slot that follows on this device finds its input there."""
    loads: RouterLoads | None
    """Of all layers up to the slot's end; after the fused slot, of all layers."""
    loss: float | None = None
    busy_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotReport:
    """The last word of a slot; gradients were streamed just before."""

    gradients: tuple[str, ...]
    """Units, in order."""
