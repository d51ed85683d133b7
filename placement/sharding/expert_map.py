"""The map of experts: which device holds which, and how an expert's rows are divided, as a value.

Every sender of rows and every holder of experts works by the same map, and a call names the version
it was sent under. A map is whole or it is not one: it cannot be built without a replica of every
expert of every layer. The next map differs by whole layers and has the next version.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any

from placement.experts import ExpertDevice, ExpertPlan
from placement.packing.weights import solve_weights
from placement.plain import from_plain, to_plain

WEIGHTS_SUM = 1e-6
"""How far an expert's weights may add up to other than 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerMap:
    """One layer: what every device of the map holds, and its part of each expert's rows."""

    experts: tuple[tuple[int, ...], ...]
    """[devices] the experts each holds, ascending."""
    weights: tuple[tuple[float, ...], ...]
    """The same shape; an expert's weights sum to 1."""

    def holders(self, num_experts: int) -> list[list[int]]:
        """Return, per expert, the positions of the devices that hold it, ascending."""
        holders: list[list[int]] = [[] for _ in range(num_experts)]
        for position, held in enumerate(self.experts):
            for expert in held:
                holders[expert].append(position)
        return holders


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertMap:
    """Who holds which experts of one checkpoint, in one version."""

    version: int
    checkpoint: str
    """Fingerprint of the weights; holders of another checkpoint refuse the map."""
    num_experts: int
    """Of every layer."""
    devices: tuple[ExpertDevice, ...]
    """In the order of the devices within every layer."""
    layers: tuple[LayerMap, ...]

    def __post_init__(self) -> None:
        if self.version < 0 or self.num_experts < 1:
            raise ValueError(
                f"version ({self.version}) must be 0 or more and num_experts "
                f"({self.num_experts}) at least 1"
            )
        if not self.layers or not self.devices:
            raise ValueError(
                f"map {self.version} has {len(self.layers)} layers on {len(self.devices)} devices; "
                f"it needs at least 1 of each"
            )
        for device_id, count in Counter(device.id for device in self.devices).items():
            if count > 1:
                raise ValueError(f"{count} devices are called {device_id}; give each its own id")
        for index, layer in enumerate(self.layers):
            _check_layer(f"map {self.version}, layer {index}", layer, self)

    @property
    def device_ids(self) -> tuple[str, ...]:
        return tuple(device.id for device in self.devices)

    def held(self, device_id: str) -> tuple[frozenset[int], ...]:
        """Return the experts of every layer that a device holds.

        Raises:
            ValueError: The map does not know the device.
        """
        if device_id not in self.device_ids:
            raise ValueError(
                f"map {self.version} has no device {device_id}; it has {', '.join(self.device_ids)}"
            )
        position = self.device_ids.index(device_id)
        return tuple(frozenset(layer.experts[position]) for layer in self.layers)

    def copies(self) -> frozenset[tuple[str, int, int]]:
        """Return (device, layer, expert) of all that is held."""
        return frozenset(
            (device.id, index, expert)
            for position, device in enumerate(self.devices)
            for index, layer in enumerate(self.layers)
            for expert in layer.experts[position]
        )

    def with_layers(self, changed: Mapping[int, LayerMap]) -> ExpertMap:
        """Return the next version, in which these layers are others."""
        layers = tuple(changed.get(index, layer) for index, layer in enumerate(self.layers))
        return replace(self, version=self.version + 1, layers=layers)

    def check_same_model(self, checkpoint: str, num_layers: int, num_experts: int) -> None:
        """Refuse to serve a map of another model.

        Raises:
            ValueError: The checkpoint, its layers or its experts differ.
        """
        theirs = (self.checkpoint, len(self.layers), self.num_experts)
        for name, mine, named in zip(
            ("checkpoint", "layers with experts", "experts a layer"),
            (checkpoint, num_layers, num_experts),
            theirs,
            strict=True,
        ):
            if mine != named:
                raise ValueError(
                    f"map {self.version} is for {name} {named} and {mine} is loaded; load the "
                    f"checkpoint the map was made for, or make a map for this one"
                )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        value: dict[str, Any] = to_plain(self)
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ExpertMap:
        """Rebuild a map from the values of `to_json`.

        Raises:
            ValueError: It is no such map, or one that cannot be (see the class).
        """
        return from_plain(cls, value)

    @classmethod
    def from_plan(
        cls, plan: ExpertPlan, devices: Sequence[ExpertDevice], *, checkpoint: str, version: int = 0
    ) -> ExpertMap:
        """Take a plan's holders and shares over.

        Raises:
            ValueError: A device of the plan is not among `devices`.
        """
        known = {device.id: device for device in devices}
        if unknown := [device_id for device_id in plan.device_ids if device_id not in known]:
            raise ValueError(
                f"the plan places experts on {', '.join(unknown)}, which are not among "
                f"{len(known)} devices ({', '.join(sorted(known))}); give the plan's devices"
            )
        return cls(
            version=version,
            checkpoint=checkpoint,
            num_experts=len(plan.holdings(0)),
            devices=tuple(known[device_id] for device_id in plan.device_ids),
            layers=tuple(
                LayerMap(experts=layer.experts, weights=layer.shares) for layer in plan.layers
            ),
        )


def weighted_layer(
    held: Sequence[AbstractSet[int]], loads: Sequence[float], speeds: Sequence[float]
) -> LayerMap:
    """Return a layer with the exact weights for `loads` (see `placement.packing.weights`).

    `held` [devices] experts; every one of the experts that `loads` counts on some device.
    """
    experts = tuple(tuple(sorted(here)) for here in held)
    layer = LayerMap(experts=experts, weights=experts)
    shares = solve_weights(layer.holders(len(loads)), loads, speeds).shares()
    weights = tuple(
        tuple(shares[expert][position] for expert in here) for position, here in enumerate(experts)
    )
    return replace(layer, weights=weights)


def _check_layer(owner: str, layer: LayerMap, of: ExpertMap) -> None:
    sums = [0.0] * of.num_experts
    has_replica = [False] * of.num_experts
    _check_shape(owner, layer, of)
    for device, experts, weights in zip(of.devices, layer.experts, layer.weights, strict=True):
        _check_held(f"{owner}: {device.id}", device, experts, of.num_experts)
        for expert, weight in zip(experts, weights, strict=True):
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(
                    f"{owner}: expert {expert} has weight {weight} on {device.id}; weights must "
                    f"be 0 or more and finite"
                )
            has_replica[expert] = True
            sums[expert] += weight
    missing = [expert for expert, has in enumerate(has_replica) if not has]
    if missing:
        raise ValueError(
            f"{owner}: {len(missing)} of {of.num_experts} experts have no replica (expert "
            f"{missing[0]} first); give each expert a slot on at least 1 device"
        )
    for expert, total in enumerate(sums):
        if abs(total - 1.0) > WEIGHTS_SUM:
            raise ValueError(f"{owner}: weights of expert {expert} sum to {total:.6g}, not to 1")


def _check_shape(owner: str, layer: LayerMap, of: ExpertMap) -> None:
    shapes = [tuple(map(len, part)) for part in (layer.experts, layer.weights)]
    if len(shapes[0]) != len(of.devices) or shapes[0] != shapes[1]:
        raise ValueError(
            f"{owner}: experts of {len(layer.experts)} devices and weights of "
            f"{len(layer.weights)}; give one list of each, equally long, for each of the "
            f"{len(of.devices)} devices"
        )


def _check_held(
    owner: str, device: ExpertDevice, experts: tuple[int, ...], num_experts: int
) -> None:
    if len(experts) > device.slots_per_layer:
        raise ValueError(
            f"{owner} holds {len(experts)} experts and has slots_per_layer "
            f"{device.slots_per_layer}; give it more slots or fewer experts"
        )
    for before, expert in zip((-1, *experts), experts, strict=False):
        if not 0 <= expert < num_experts:
            raise ValueError(
                f"{owner} holds expert {expert}; a layer has experts 0 to {num_experts - 1}"
            )
        if expert == before:
            raise ValueError(f"{owner} holds expert {expert} twice; one device needs one copy")
        if expert < before:
            raise ValueError(f"{owner} lists expert {expert} after {before}; list them ascending")
