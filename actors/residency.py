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
from actors.pool_values import PoolDeviceSpec

_FROZEN = -1


class _Part(NamedTuple):
    """The trained part of a unit in one version, or its frozen part (`_FROZEN`)."""

    unit: str
    version: int


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
        self._users: dict[_Part, int] = {}
        self._placed: dict[str, int] = {}
        self.brought_bytes = 0

    def bring(self, versions: Mapping[str, int], weights: Mapping[str, tuple[Any, Any]]) -> None:
        """Bring what is not here yet; everything stays until `release`."""
        started_s = time.monotonic()
        brought_bytes = 0
        for unit, version in versions.items():
            trained, frozen = weights[unit]
            for part, reference in (
                (_Part(unit, version), trained),
                (_Part(unit, _FROZEN), frozen),
            ):
                if reference is not None:
                    brought_bytes += self._bring(part, reference)
        self.brought_bytes += brought_bytes
        if self._host_bytes_per_s:
            # A device with a declared host link takes at least the link's time.
            left_s = started_s + brought_bytes / self._host_bytes_per_s - time.monotonic()
            time.sleep(max(0.0, left_s))

    def place(self, versions: Mapping[str, int]) -> None:
        """Put the weights of a slot in force."""
        for unit, version in versions.items():
            if self._placed.get(unit) == version:
                continue
            with self._lock:
                trained = self._parts.get(_Part(unit, version))
                frozen = self._parts.get(_Part(unit, _FROZEN))
            self._model.place(unit, trained, frozen)
            self._placed[unit] = version

    def release(self, versions: Mapping[str, int]) -> None:
        """End a slot's claim; what is outdated goes, and what exceeds the room."""
        with self._lock:
            for unit, version in versions.items():
                for part in (_Part(unit, version), _Part(unit, _FROZEN)):
                    if part in self._parts:
                        self._users[part] -= 1
                        self._parts.move_to_end(part)
            newest: dict[str, int] = {}
            for unit, version in self._parts:
                newest[unit] = max(newest.get(unit, version), version)
            free = [part for part in self._parts if not self._users[part]]
            for part in free:
                if part.version not in (_FROZEN, newest[part.unit]):
                    self._drop(part)
            used_bytes = sum(upload.flat.nbytes for upload in self._parts.values())
            for part in free:
                if used_bytes <= self._cap_bytes:
                    break
                if part in self._parts:
                    used_bytes -= self._drop(part)

    def _bring(self, part: _Part, reference: Any) -> int:
        with self._lock:
            if part in self._parts:
                self._users[part] += 1
                return 0
        upload = self._model.upload(as_tensor(ray.get(reference), self._weight_dtype))
        with self._lock:
            self._parts[part] = upload
            self._users[part] = 1
        return upload.flat.nbytes

    def _drop(self, part: _Part) -> int:
        if self._placed.get(part.unit) == part.version or part.version == _FROZEN:
            self._model.remove(part.unit)
            self._placed.pop(part.unit, None)
        self._users.pop(part)
        return self._parts.pop(part).flat.nbytes
