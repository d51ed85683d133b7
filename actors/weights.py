"""WeightHostActor: masters, gradients and optimizer state of some units on one node.

Decides nothing. Calls run one at a time in the order in which the driver makes them, so gradients
of the next step wait behind a step of the optimizer. Weights are published as Ray objects: who
holds a reference reads that version whatever is published later, so nobody sees half of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import ray
import torch

from actors.engine.arrays import Array, as_tensor, to_array
from actors.engine.checkpoint import Checkpoint
from actors.engine.optimizer import HostBytes, WeightShard
from actors.engine.trainable import initial_weights, training_units
from actors.engine.training_config import LoraSettings, OptimizerSettings
from actors.engine.training_values import Unit


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightHostSpec:
    """Which units of which checkpoint a host keeps, and how they are stepped."""

    model: str
    allow_unverified: bool
    units: tuple[str, ...]
    lora: LoraSettings | None
    experts_elsewhere: bool = False
    """Routed experts are of no unit."""
    optimizer: OptimizerSettings
    seed: int
    threads: int = 1


class Published(NamedTuple):
    """One version of a unit's weights, in shared memory."""

    unit: str
    version: int
    trained: Any
    """Reference to the flat array; None: nothing of the unit is trained."""
    frozen: Any = None
    """The same of what is frozen; sent once, at version 0."""


class WeightHostWorker:
    """Hosts one `WeightShard`."""

    def __init__(self, spec: WeightHostSpec) -> None:
        torch.set_num_threads(spec.threads)
        self._spec = spec
        self._checkpoint = Checkpoint.open(spec.model, allow_unverified=spec.allow_unverified)
        every = {
            unit.name: unit
            for unit in training_units(
                self._checkpoint, spec.lora, experts_elsewhere=spec.experts_elsewhere
            )
        }
        self._units: dict[str, Unit] = {name: every[name] for name in spec.units}
        self._dtype: torch.dtype = getattr(torch, spec.optimizer.weight_dtype)
        self._shard = WeightShard(list(self._units.values()), spec.optimizer)
        self._trained = [name for name, unit in self._units.items() if unit.trained]
        largest = max((unit.num_trained for unit in self._units.values()), default=0)
        self._buffer = torch.empty(largest, dtype=self._dtype)
        """Where new weights are written before they go to shared memory."""
        self._frozen_bytes = 0
        self._references: dict[str, Any] = {}
        """The published version in force: it lives as long as this host needs it."""

    def ready(self) -> None:
        """Return once the constructor is done."""

    def load(self) -> Iterator[Published]:
        """Read every unit from the checkpoint and publish it as version 0."""
        for name, unit in self._units.items():
            # In float32, so that masters begin with all the bits that the checkpoint has.
            trained, frozen = initial_weights(
                self._checkpoint, unit, self._spec.lora, dtype=torch.float32, seed=self._spec.seed
            )
            frozen = frozen.to(self._dtype)
            reference = None
            if unit.trained:
                self._shard.load(name, trained)
                reference = self._publish(name)
            shared = ray.put(to_array(frozen)) if unit.frozen else None
            self._frozen_bytes += frozen.nbytes if unit.frozen else 0
            yield Published(name, 0, reference, shared)

    def restore(
        self, unit: str, version: int, published: Array, state: Mapping[str, Array]
    ) -> Published:
        """Put a unit back to what a checkpoint holds, and publish it."""
        tensors = {name: torch.from_numpy(array.copy()) for name, array in state.items()}
        self._shard.restore(unit, as_tensor(published, self._dtype), tensors)
        return Published(unit, version, self._publish(unit))

    def add(self, unit: str, step: int, order: int, gradient: Array, expected: int) -> None:
        """Add one of a step's `expected` gradients, flat float32."""
        tensor = as_tensor(gradient, torch.float32)
        self._shard.add(unit, step, order, tensor, expected=expected)

    def squared_norms(self) -> dict[str, float]:
        """Return the squared gradient norm of every unit, once all gradients are in."""
        return self._shard.squared_norm()

    def step(self, version: int, learning_rate: float, scale: float) -> Iterator[Published]:
        """Step unit by unit, the embedding first, and publish each as soon as it is done."""
        for name in self._trained:
            out = self._buffer[: self._units[name].num_trained]
            self._shard.step(name, learning_rate=learning_rate, scale=scale, out=out)
            yield Published(name, version, self._publish(name))

    def export(self, unit: str) -> tuple[Array, dict[str, Array]]:
        """Return a unit's published weights and the state that resuming needs."""
        state = {name: to_array(tensor) for name, tensor in self._shard.state(unit).items()}
        return to_array(self._shard.published(unit)), state

    def non_finite_units(self) -> list[str]:
        """Return the units whose weights are not all finite."""
        return [
            name for name in self._trained if not bool(self._shard.published(name).isfinite().all())
        ]

    def host_bytes(self) -> tuple[HostBytes, int]:
        """Return what is held for trained parameters, and the bytes of frozen ones."""
        return self._shard.host_bytes(), self._frozen_bytes

    def _publish(self, unit: str) -> Any:
        """Move the unit's weights to shared memory; the shard goes on from there."""
        reference = ray.put(to_array(self._shard.published(unit)))
        self._references[unit] = reference
        self._shard.adopt(unit, as_tensor(ray.get(reference), self._dtype))
        return reference


# `ready` is answered beside a step.
WeightHostActor = ray.remote(concurrency_groups={"control": 1})(  # type: ignore[call-overload]
    WeightHostWorker
)
