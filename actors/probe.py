"""ProbeActor: measures one device, and the links of its node. Decides nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import ray
import torch

from actors import wire
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
from actors.link_timer import LinkTimes, answer, time_link
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


class ProbeWorker:
    """Hosts the measurements of one device; call its methods one at a time."""

    def __init__(self, kind: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._device = torch.device("cuda" if kind == "cuda" else "cpu")
        self._meter: LayerMeter | None = None
        self._inbox: wire.Inbox | None = None
        self._keys: wire.WireKeys | None = None

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

    def listen(self, keys: wire.WireKeys, host: str) -> wire.Address:
        """Open the probe's inbox on its node's own interface."""
        if self._inbox is None:
            self._inbox = wire.Inbox("probe", keys, host=host)
            self._keys = keys
        return self._inbox.address

    def echo(self, peer: wire.Address, timeout_s: float) -> int:
        """Answer the peer's messages until it says goodbye; returns how many there were."""
        inbox, outbox = self._ends(peer)
        return answer(inbox, outbox, timeout_s)

    def time_link(self, peer: wire.Address, timeout_s: float) -> LinkTimes:
        """Time messages to a peer that echoes.

        Raises:
            ProbeError: It did not answer in time.
        """
        inbox, outbox = self._ends(peer)
        return time_link(inbox, outbox, timeout_s)

    def stop(self) -> None:
        """Close the sockets. Safe to call twice."""
        if self._inbox is not None:
            self._inbox.close()
            self._inbox = None

    def _ends(self, peer: wire.Address) -> tuple[wire.Inbox, wire.Outbox]:
        assert self._inbox is not None
        assert self._keys is not None
        return self._inbox, wire.Outbox(peer, self._keys)


ProbeActor = ray.remote(ProbeWorker)
