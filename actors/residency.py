"""Which weights are on a device: brought ahead of the slot that needs them, kept while there is
room, so that frozen layers and the layers of repeated rounds are not sent again.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import ray
import torch

from actors.engine.arrays import as_tensor
from actors.engine.trainable import TrainableModel
from actors.engine.upload import Upload
from actors.pool_values import PoolDeviceSpec, SlotKey


class _Part(NamedTuple):
    """What is trained, or what is frozen, of a unit."""

    unit: str
    is_frozen: bool
    object_id: str
    """A version that is published again, after a weight host died, is another object."""
    version: int
    """0 for what is frozen."""


class Residency:
    """The weights of one device. `bring` runs beside the slot that computes; the rest does not."""

    def __init__(self, model: TrainableModel, spec: PoolDeviceSpec) -> None:
        self._model = model
        self._weight_dtype: torch.dtype = getattr(torch, spec.weight_dtype)
        self._cap_bytes = spec.weights_cap_bytes
        self._host_bytes_per_s = spec.device.host_bytes_per_s
        self._lock = threading.Lock()
        self._parts: OrderedDict[_Part, Upload] = OrderedDict()
        """Least recently used first."""
        self._claims: dict[SlotKey, list[_Part]] = {}
        """What slots need that have not ended."""
        self._newest: dict[tuple[str, bool], _Part] = {}
        self._placed: dict[str, frozenset[_Part]] = {}

    def bring(self, key: SlotKey, version: int, weights: Mapping[str, tuple[Any, Any]]) -> None:
        """Bring a slot's weights, (trained, frozen) references by unit, that are not here yet;
        everything stays until `release`."""
        self._forget_before(version - 1)
        started_s = time.monotonic()
        brought_bytes = 0
        for unit, references in weights.items():
            for is_frozen, reference in zip((False, True), references, strict=True):
                if reference is not None:
                    part = _Part(unit, is_frozen, reference.hex(), 0 if is_frozen else version)
                    brought_bytes += self._bring(key, part, reference)
        if self._host_bytes_per_s:
            # A device with a declared host link takes at least the link's time.
            left_s = started_s + brought_bytes / self._host_bytes_per_s - time.monotonic()
            time.sleep(max(0.0, left_s))

    def place(self, key: SlotKey) -> None:
        """Put the weights of a slot in force."""
        with self._lock:
            parts = {part: self._parts[part] for part in self._claims.get(key, ())}
        for unit in dict.fromkeys(part.unit for part in parts):
            own = frozenset(part for part in parts if part.unit == unit)
            if self._placed.get(unit) == own:
                continue
            uploads = {part.is_frozen: parts[part] for part in own}
            self._model.place(unit, uploads.get(False), uploads.get(True))
            self._placed[unit] = own

    def release(self, key: SlotKey) -> None:
        """End a slot's claim; what is outdated goes, and what exceeds the room."""
        with self._lock:
            for part in self._claims.pop(key, ()):
                if part in self._parts:
                    self._parts.move_to_end(part)
            free = self._unclaimed()
            for part in free:
                if self._newest[part.unit, part.is_frozen] != part:
                    self._drop(part)
            used_bytes = sum(upload.flat.nbytes for upload in self._parts.values())
            for part in free:
                if used_bytes <= self._cap_bytes:
                    break
                if part in self._parts:
                    used_bytes -= self._drop(part)

    def _unclaimed(self) -> list[_Part]:
        claimed = {part for parts in self._claims.values() for part in parts}
        return [part for part in self._parts if part not in claimed]

    def _forget_before(self, version: int) -> None:
        """Drop versions that no coming slot can ask for: on a CPU they are shared memory."""
        with self._lock:
            for part in self._unclaimed():
                if not part.is_frozen and part.version < version:
                    self._drop(part)

    def _bring(self, key: SlotKey, part: _Part, reference: Any) -> int:
        with self._lock:
            self._claims.setdefault(key, []).append(part)
            if part in self._parts:
                return 0
        upload = self._model.upload(as_tensor(ray.get(reference), self._weight_dtype))
        with self._lock:
            self._parts[part] = upload
            self._newest[part.unit, part.is_frozen] = part
        return upload.flat.nbytes

    def _drop(self, part: _Part) -> int:
        if part in self._placed.get(part.unit, ()):
            self._model.remove(part.unit)
            del self._placed[part.unit]
        return self._parts.pop(part).flat.nbytes
