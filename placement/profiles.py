"""What was measured of devices and links for one checkpoint: the value behind `motley profile`.

Layers are known by their index, not by their cost figures: a plan may hold the same layers in
another number format, or count something more about them, and the seconds are still theirs.
Values only; who measures and where they are kept is not known here.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar, get_args

from placement.measured import LayerSample, MatmulRate, MeasuredLayer
from placement.topology import Device, DeviceKind, Link
from placement.workload import LayerCost, ModelProfile

PROFILE_FORMAT = 1
MEASURE_AGAIN = "measure again with `motley profile --refresh`"

Part = Literal["layer", "head"]
Source = Literal["measured", "estimated", "declared"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTable:
    """The samples of equal layers, or of the head."""

    part: Part
    layers: tuple[int, ...] = ()
    """Their indices; none for the head."""
    samples: tuple[LayerSample, ...]

    def __post_init__(self) -> None:
        if self.part not in get_args(Part):
            raise ValueError(f"part ({self.part!r}) must be one of {', '.join(get_args(Part))}")
        if (self.part == "layer") != bool(self.layers) or any(i < 0 for i in self.layers):
            raise ValueError(f"layers ({list(self.layers)}) are not those of a {self.part}")
        # Checks the samples' number and order.
        MeasuredLayer(layer=_NO_LAYER, samples=self.samples)

    @property
    def name(self) -> str:
        """What the table is called among those of its device: "layer 0" or "head"."""
        return f"layer {self.layers[0]}" if self.layers else self.part

    def costs(self, model: ModelProfile) -> list[LayerCost]:
        """Return the distinct costs that the table's layers have in a model."""
        if self.part == "head":
            return [model.head]
        return list(dict.fromkeys(model.layers[i] for i in self.layers if i < model.num_layers))


_NO_LAYER = LayerCost(flops_per_token=0, weight_bytes=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """How figures that were not measured came about, and how wrong such figures were elsewhere."""

    samples: int
    """Measured on this device; the rest follows from them."""
    known_devices: int
    rank: int
    median_error: float
    """Relative, over the known devices, each left out and estimated from as many samples."""
    p90_error: float

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("known_devices", 1), ("rank", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least {least}")
        for name in ("median_error", "p90_error"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} ({value}) must be 0 or more and finite")


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceProfile:
    """One device: who it is, what it does, and how long the checkpoint's layers take on it."""

    id: str
    node: str
    kind: DeviceKind
    source: Source
    host: str = ""
    """The node's own host name; with `kind`, `index` and `name` it identifies the device."""
    node_names: tuple[str, ...] = ()
    """Everything a configuration may call the node."""
    name: str = ""
    """The processor's or the card's."""
    index: int = 0
    """Which of the node's cards."""
    dtype: str = ""
    """The number format that layers were measured in."""
    threads: int = 0
    """Of a CPU."""
    versions: Mapping[str, str] = field(default_factory=dict)
    flops_per_s: float
    memory_bytes_per_s: float
    memory_bytes: int
    host_bytes_per_s: float | None = None
    active_power_w: float | None = None
    matmul_rates: Mapping[str, tuple[MatmulRate, ...]] = field(default_factory=dict)
    """By number format."""
    layers: tuple[LayerTable, ...] = ()
    estimate: Estimate | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("kind", get_args(DeviceKind)), ("source", get_args(Source))):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} ({getattr(self, name)!r}) must be one of {', '.join(allowed)}"
                )
        if (self.estimate is not None) != (self.source == "estimated"):
            raise ValueError(f"an estimate does not go with source {self.source!r}")
        names = [table.name for table in self.layers]
        if len(set(names)) < len(names):
            raise ValueError(f"layers: {', '.join(names)} name one table twice")
        indices = [index for table in self.layers for index in table.layers]
        if len(set(indices)) < len(indices):
            raise ValueError("layers: one layer is in two tables; keep one of them")
        self.to_device(None)

    @property
    def rates(self) -> tuple[MatmulRate, ...]:
        """The matmul rates in the device's own number format."""
        return self.matmul_rates.get(self.dtype, ())

    def table(self, name: str) -> LayerTable | None:
        """Return the table of that name."""
        return next((table for table in self.layers if table.name == name), None)

    def to_device(self, model: ModelProfile | None) -> Device:
        """Return the device to plan with; None: without a checkpoint's layers."""
        measured: dict[LayerCost, MeasuredLayer] = {}
        if model is not None:
            for table in self.layers:
                for cost in table.costs(model):
                    measured.setdefault(cost, MeasuredLayer(layer=cost, samples=table.samples))
        return Device(
            id=self.id,
            node=self.node,
            kind=self.kind,
            flops_per_s=self.flops_per_s,
            memory_bytes_per_s=self.memory_bytes_per_s,
            memory_bytes=self.memory_bytes,
            active_power_w=self.active_power_w,
            host_bytes_per_s=self.host_bytes_per_s,
            matmul_rates=self.rates,
            measured_layers=tuple(measured.values()),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkProfile:
    """What one node can send to another."""

    source_node: str
    target_node: str
    source: Source
    rtt_s: float
    bandwidth_bytes_per_s: float
    source_names: tuple[str, ...] = ()
    """Everything a configuration may call the node that sends."""
    target_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.source not in get_args(Source):
            raise ValueError(
                f"source ({self.source!r}) must be one of {', '.join(get_args(Source))}"
            )
        if not (math.isfinite(self.rtt_s) and self.rtt_s >= 0):
            raise ValueError(f"rtt_s ({self.rtt_s}) must be 0 or more and finite")
        self.to_link()

    @property
    def latency_s(self) -> float:
        """One way: half of the way there and back."""
        return self.rtt_s / 2

    def to_link(self) -> Link:
        """Return the link to plan with."""
        return Link(
            source_node=self.source_node,
            target_node=self.target_node,
            bandwidth_bytes_per_s=self.bandwidth_bytes_per_s,
            latency_s=self.latency_s,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """The devices and links that a configuration names, measured for its checkpoint."""

    checkpoint: str
    fingerprint: str
    """Of the checkpoint's configuration; layers of another do not take the same time."""
    devices: tuple[DeviceProfile, ...]
    links: tuple[LinkProfile, ...] = ()

    def __post_init__(self) -> None:
        if not self.devices:
            raise ValueError("devices: there are 0; a profile is of at least 1")
        ids = [device.id for device in self.devices]
        if len(set(ids)) < len(ids):
            raise ValueError(f"devices: two of {', '.join(ids)} have one id")
        ends = [(link.source_node, link.target_node) for link in self.links]
        for source, target in ends:
            if ends.count((source, target)) > 1:
                raise ValueError(f"links: two lead from {source} to {target}; keep one")

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "format": PROFILE_FORMAT,
            "checkpoint": self.checkpoint,
            "fingerprint": self.fingerprint,
            "devices": [plain_json(device) for device in self.devices],
            "links": [plain_json(link) for link in self.links],
        }

    @classmethod
    def from_json(cls, value: object, source: str) -> Profile:
        """Read what `to_json` wrote; `source` (a file) leads every complaint.

        Raises:
            ValueError: A key is unknown or missing, or a value cannot be; names both.
        """
        with _complaining(source):
            tree = _mapping(value, "the profile")
            if tree.get("format") != PROFILE_FORMAT or tree["format"] is True:
                raise ValueError(f"format ({tree.get('format')!r}) must be {PROFILE_FORMAT}")
            tree = {name: part for name, part in tree.items() if name != "format"}
            tree["devices"] = _each(tree.get("devices"), "devices", device_from_json)
            tree["links"] = _each(tree.get("links", []), "links", _link_from_json)
            return _build(cls, tree)


def plain_json(value: Any) -> Any:
    """Return a profile value as plain JSON, without the fields that say nothing."""
    if isinstance(value, Mapping):
        return {key: plain_json(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return [plain_json(part) for part in value]
    if not hasattr(value, "__dataclass_fields__"):
        return value
    parts = {part.name: getattr(value, part.name) for part in fields(value)}
    return {
        name: plain_json(part) for name, part in parts.items() if part not in (None, (), {}, "")
    }


def device_from_json(value: object, source: str = "") -> DeviceProfile:
    """Read one device; `source` (a file) leads every complaint, when there is one."""
    with _complaining(source):
        tree = _mapping(value, "a device")
        tree["node_names"] = tuple(_list(tree.get("node_names", []), "node_names"))
        tree["versions"] = _mapping(tree.get("versions", {}), "versions")
        tree["matmul_rates"] = {
            dtype: _each(rates, f"matmul_rates.{dtype}", lambda rate: _build(MatmulRate, rate))
            for dtype, rates in _mapping(tree.get("matmul_rates", {}), "matmul_rates").items()
        }
        tree["layers"] = _each(tree.get("layers", []), "layers", _table_from_json)
        if tree.get("estimate") is not None:
            with _within("estimate"):
                tree["estimate"] = _build(Estimate, tree["estimate"])
        return _build(DeviceProfile, tree)


def _table_from_json(value: object) -> LayerTable:
    tree = _mapping(value, "a table")
    tree["layers"] = tuple(_list(tree.get("layers", []), "layers"))
    tree["samples"] = _each(
        tree.get("samples"), "samples", lambda sample: _build(LayerSample, sample)
    )
    return _build(LayerTable, tree)


def _link_from_json(value: object) -> LinkProfile:
    tree = _mapping(value, "a link")
    for name in ("source_names", "target_names"):
        tree[name] = tuple(_list(tree.get(name, []), name))
    return _build(LinkProfile, tree)


def link_from_json(value: object, source: str) -> LinkProfile:
    """Read one link; `source` (a file) leads every complaint."""
    with _complaining(source):
        return _link_from_json(value)


def _build(kind: Callable[..., T], value: object) -> T:
    """Make a value of its fields: every one known, none missing, numbers where numbers belong."""
    tree = _mapping(value, "it")
    known = {part.name: part for part in fields(kind)}  # type: ignore[arg-type]
    for name, part in tree.items():
        if name not in known:
            raise ValueError(f"unknown key {name!r}; known keys: {', '.join(known)}")
        with _within(name):
            _check_type(part, str(known[name].type))
    try:
        return kind(**tree)
    except TypeError as error:
        raise ValueError(f"{error}; a key is missing") from None


def _check_type(value: object, annotation: str) -> None:
    """Refuse text where a number belongs and the like; ranges are the values' own business."""
    words = annotation.removesuffix(" | None")
    if value is None:
        if words == annotation:
            raise ValueError("is null, but must be given")
    elif words in ("int", "float"):
        _check_number(value, is_whole=words == "int")
    elif words in ("tuple[int, ...]", "tuple[str, ...]"):
        for part in _list(value, "it"):
            _check_type(part, words[len("tuple[") : -len(", ...]")])
    elif words == "Mapping[str, str]":
        for part in _mapping(value, "it").values():
            _check_type(part, "str")
    elif words in ("str", "Part", "Source", "DeviceKind") and not isinstance(value, str):
        raise ValueError(f"{value!r} is not text")


def _check_number(value: object, *, is_whole: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is not a number")
    # A whole number may be too large for a float, and then for every formula.
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise ValueError("a whole number larger than any float must be finite")
    if not math.isfinite(value):
        raise ValueError(f"{value} must be finite")
    if is_whole and not isinstance(value, int):
        raise ValueError(f"{value!r} is not a whole number")


def _each(value: object, name: str, read: Callable[[Any], T]) -> tuple[T, ...]:
    read_parts = []
    for index, part in enumerate(_list(value, name)):
        with _within(f"{name}[{index}]"):
            read_parts.append(read(part))
    return tuple(read_parts)


def _mapping(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} is {type(value).__name__}, not keys with values")
    return dict(value)


def _list(value: object, what: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{what} is {type(value).__name__}, not a list")
    return value


@contextmanager
def _within(place: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


@contextmanager
def _complaining(source: str) -> Iterator[None]:
    """Name the file in front and what to do behind; an inner complaint stays as it is."""
    try:
        yield
    except ValueError as error:
        if not source:
            raise
        raise ValueError(f"{source}: {error}; {MEASURE_AGAIN}") from None
