"""Values of the expert planner: devices that can hold experts, and plans that place them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertDevice:
    """A device that can hold experts, with the rates that matter to them."""

    id: str
    node: str
    rows_per_s: float
    """Rows that go through one expert per second."""
    slots_per_layer: int
    """Experts of one layer that it can hold (see `slots_from_memory`); 0 leaves it out."""
    expert_read_s: float | None = None
    """Seconds to read one expert's weights; the objective `activated` needs it."""

    def __post_init__(self) -> None:
        if not self.id:
            raise ValueError("an expert device has an empty id; give every device a name")
        rates = {"rows_per_s": self.rows_per_s}
        if self.expert_read_s is not None:
            rates["expert_read_s"] = self.expert_read_s
        for field, value in rates.items():
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"device {self.id}: {field} ({value}) must be above 0 and finite")
        if self.slots_per_layer < 0:
            raise ValueError(
                f"device {self.id}: slots_per_layer ({self.slots_per_layer}) must be 0 or more"
            )


class Holding(NamedTuple):
    """One replica of an expert."""

    device_id: str
    share: float
    """Of the expert's rows (of the steps that activate it, under the objective `activated`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerExperts:
    """One layer: what every device of the plan holds and what that should cost."""

    experts: tuple[tuple[int, ...], ...]
    """[devices of the plan] the experts each holds, ascending, none twice."""
    shares: tuple[tuple[float, ...], ...]
    """The same shape: that expert's share of rows on that device; an expert's shares sum to 1."""
    device_s: tuple[float, ...]
    """[devices of the plan] predicted finish."""
    bottleneck_s: float
    lower_bound_s: float
    """No placement has a bottleneck below this (see `placement.packing.bounds`)."""
    weights_bound_s: float
    """No shares over these holders have a bottleneck below this (see `critical_devices`)."""
    critical_devices: tuple[str, ...]
    """The rows of the experts that they alone hold, over their speed, are `weights_bound_s`."""
    not_spread: tuple[int, ...] = ()
    """Experts that should be on two nodes and for which no slot was found."""

    @property
    def gap(self) -> float:
        """How far above the lower bound the bottleneck is, as a fraction of the bound."""
        return _gap(self.bottleneck_s, self.lower_bound_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertPlan:
    """Which device holds which experts, what that should cost, and how good it could be."""

    epoch: int = 0
    mode: str
    objective: str
    device_ids: tuple[str, ...]
    """By node, then id; the order of the devices within every layer."""
    layers: tuple[LayerExperts, ...]
    left_out: tuple[tuple[str, str], ...]
    """(device id, why it holds no expert)."""
    bottleneck_s: float
    """Summed over the layers: each waits for its slowest device."""
    lower_bound_s: float
    device_bytes: tuple[int, ...]
    """[devices] weights of the experts it holds, all layers."""

    @property
    def gap(self) -> float:
        """How far above the lower bound the plan is, as a fraction of the bound."""
        return _gap(self.bottleneck_s, self.lower_bound_s)

    def holdings(self, layer: int) -> tuple[tuple[Holding, ...], ...]:
        """Return, per expert of a layer, its replicas in the order of `device_ids`."""
        placed = self.layers[layer]
        by_expert: dict[int, list[Holding]] = {}
        for device_id, experts, shares in zip(
            self.device_ids, placed.experts, placed.shares, strict=True
        ):
            for expert, share in zip(experts, shares, strict=True):
                by_expert.setdefault(expert, []).append(Holding(device_id, share))
        return tuple(tuple(by_expert[expert]) for expert in sorted(by_expert))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        value = asdict(self)
        value["device_ids"] = list(self.device_ids)
        value["device_bytes"] = list(self.device_bytes)
        value["left_out"] = [list(pair) for pair in self.left_out]
        value["layers"] = [_layer_to_json(layer) for layer in self.layers]
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ExpertPlan:
        """Rebuild a plan from the values of `to_json`."""
        fields = dict(value)
        fields["device_ids"] = tuple(value["device_ids"])
        fields["device_bytes"] = tuple(value["device_bytes"])
        fields["left_out"] = tuple((pair[0], pair[1]) for pair in value["left_out"])
        fields["layers"] = tuple(_layer_from_json(layer) for layer in value["layers"])
        return cls(**fields)


def slots_from_memory(
    free_bytes: int, expert_bytes: int, num_layers: int, *, headroom_fraction: float = 0.1
) -> int:
    """Return how many experts of every layer fit into `free_bytes` after headroom.

    Raises:
        ValueError: A size is not positive, or the headroom leaves nothing.
    """
    if free_bytes < 0 or expert_bytes < 1 or num_layers < 1:
        raise ValueError(
            f"free_bytes ({free_bytes}) must be 0 or more; expert_bytes ({expert_bytes}) and "
            f"num_layers ({num_layers}) at least 1"
        )
    if not 0.0 <= headroom_fraction < 1.0:
        raise ValueError(f"headroom_fraction ({headroom_fraction}) must be at least 0 and below 1")
    return int(free_bytes * (1.0 - headroom_fraction)) // (expert_bytes * num_layers)


def _layer_to_json(layer: LayerExperts) -> dict[str, Any]:
    value = asdict(layer)
    for field in ("experts", "shares"):
        value[field] = [list(row) for row in value[field]]
    for field in ("device_s", "critical_devices", "not_spread"):
        value[field] = list(value[field])
    return value


def _layer_from_json(value: Mapping[str, Any]) -> LayerExperts:
    fields = dict(value)
    for field in ("experts", "shares"):
        fields[field] = tuple(tuple(row) for row in value[field])
    for field in ("device_s", "critical_devices", "not_spread"):
        fields[field] = tuple(value[field])
    return LayerExperts(**fields)


def _gap(value: float, bound: float) -> float:
    return value / bound - 1.0 if bound > 0 else 0.0
