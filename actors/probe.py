"""ProbeActor: measures one device, and the links of its node. Decides nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import ray
import torch

from actors.engine.checkpoint import Checkpoint
from actors.engine.config import EngineConfig
from actors.engine.layer_meter import LayerKind, LayerMeter, LayerShape
from actors.engine.measure import (
    DeviceFigures,
    Effort,
    device_name,
    free_card_bytes,
    measure_device,
)
from actors.link_probe import LinkProbeWorker
from placement.measured import LayerSample


@dataclass(frozen=True, slots=True)
class Identity:
    """Which device a probe is on."""

    name: str
    index: int
    """Of a card on its node; 0 for a processor."""
    free_card_bytes: int | None
    """None: it computes in its node's memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeterSpec:
    """Which layers to time, and as what."""

    model: str
    kind: LayerKind
    engine: EngineConfig
    shape: LayerShape
    most_tokens: int
    effort: Effort


class ProbeWorker(LinkProbeWorker):
    """Hosts the measurements of one device; call its methods one at a time."""

    def __init__(self, kind: str, threads: int) -> None:
        super().__init__()
        torch.set_num_threads(threads)
        self._device = torch.device("cuda" if kind == "cuda" else "cpu")
        self._meter: LayerMeter | None = None

    def identity(self) -> Identity:
        """Return which device this is."""
        if self._device.type == "cpu":
            return Identity(device_name(self._device), 0, None)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
        # A part of a card has a UUID in place of a number.
        index = int(visible) if visible.isdecimal() else 0
        return Identity(device_name(self._device), index, free_card_bytes(self._device))

    def device(
        self,
        dtypes: Sequence[str],
        shapes: Sequence[tuple[int, int]],
        rows: Sequence[int],
        effort: Effort,
    ) -> DeviceFigures:
        """Measure the device itself."""
        return measure_device(self._device, dtypes, effort, shapes=shapes, rows=rows)

    def load(self, spec: MeterSpec) -> None:
        """Load one kind of layer, in place of the one before."""
        self._meter = None
        self._meter = LayerMeter(
            Checkpoint.open(
                spec.model, allow_unverified=spec.engine.allow_unverified_architectures
            ),
            spec.kind,
            config=spec.engine,
            device=self._device.type,
            shape=spec.shape,
            most_tokens=spec.most_tokens,
            effort=spec.effort,
        )

    def sample(self, tokens: int) -> LayerSample:
        """Time the loaded layers at a step of `tokens` rows."""
        assert self._meter is not None
        return self._meter.sample(tokens)


ProbeActor = ray.remote(ProbeWorker)
