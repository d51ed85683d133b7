"""The settings of one deployment: a frozen tree, read once from YAML, never mutated.

Composes what others own (`EngineConfig`, `GatewaySettings`) with devices, links, planning and
Ray. Loads without torch, Ray or grpc. Every error names the file and the path in the tree.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections import Counter
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from actors.engine.adapter import CONFIG_FILE, AdapterError, is_adapter_folder, read_config
from actors.engine.config import EngineConfig
from cluster.controller_settings import ControllerConfig
from cluster.gateway.settings import GatewaySettings
from cluster.quantities import parse_bytes, parse_bytes_per_s, parse_flops_per_s
from cluster.training_settings import TrainingSettings
from placement.costs import LEAST_HEADROOM_FRACTION
from placement.topology import DEFAULT_LINK_BYTES_PER_S, DEFAULT_LINK_LATENCY_S, DeviceKind
from placement.workload import DeviceOrder, Objective

ByteCount = Annotated[int, BeforeValidator(parse_bytes)]
BytesPerS = Annotated[float, BeforeValidator(parse_bytes_per_s)]
FlopsPerS = Annotated[float, BeforeValidator(parse_flops_per_s)]

EMBEDDED_CONFIG = Path(__file__).resolve().parent.parent / "deploy" / "configs" / "embedded.yaml"
DEVICE_FIGURES = ("flops_per_s", "memory_bytes_per_s", "memory_bytes")


_MOST_LATENCY_S = 3600.0


class ConfigError(ValueError):
    """The settings cannot be used; the message names the file, the key and what would do."""


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DeviceSpec(_Settings):
    """One device that may host a stage."""

    id: str = Field(min_length=1)
    node: str = Field("local", min_length=1)
    """"local" is the node that runs `motley up`; else a Ray node's address, host name or node
    name, or NAME where Ray was started there with a resource `motley-node:NAME`."""
    kind: DeviceKind
    """cpu, cuda: real. paced: computes on the CPU and takes as long as its figures say."""
    flops_per_s: FlopsPerS | None = None
    memory_bytes_per_s: BytesPerS | None = None
    memory_bytes: ByteCount | None = None
    """For a real device the figures may be left out: `motley up` measures them."""
    active_power_w: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Watts above idle while it computes; every device needs it to plan for energy."""
    host_bytes_per_s: BytesPerS | None = None
    """Rate at which weights reach it from its node's memory when training; None: at once."""

    @property
    def missing_figures(self) -> tuple[str, ...]:
        return tuple(name for name in DEVICE_FIGURES if getattr(self, name) is None)

    @model_validator(mode="after")
    def _paced_is_declared(self) -> Self:
        if self.kind == "paced" and self.missing_figures:
            raise ValueError(
                f"device {self.id} is paced but has no {', '.join(self.missing_figures)}; "
                f"a paced device is what it is declared to be"
            )
        return self


class LinkSpec(_Settings):
    """What one node can send to another; the opposite direction is taken to be the same."""

    source_node: str = Field(min_length=1)
    target_node: str = Field(min_length=1)
    bandwidth_bytes_per_s: BytesPerS
    latency_s: float = Field(DEFAULT_LINK_LATENCY_S, ge=0, le=_MOST_LATENCY_S, allow_inf_nan=False)


class DefaultLinkSpec(_Settings):
    """What any two nodes can send each other where `links` says nothing."""

    bandwidth_bytes_per_s: BytesPerS = DEFAULT_LINK_BYTES_PER_S
    latency_s: float = Field(DEFAULT_LINK_LATENCY_S, ge=0, le=_MOST_LATENCY_S, allow_inf_nan=False)


class PlanSettings(_Settings):
    """What the cut is planned for."""

    objective: Objective = "throughput"
    """throughput: most tokens/s over all lanes. latency: shortest step, for a single stream.
    energy: fewest joules a token."""
    device_order: DeviceOrder = "free"
    """free: stages use the devices in the order that is best. given: in the order of `devices`,
    which a forced cut always keeps."""

    lanes: int = Field(2, ge=1, le=64)
    """Batches in flight; with fewer lanes than stages some stage always waits."""
    max_lanes: int | None = Field(None, ge=1, le=64)
    """The controller may serve with up to so many, each with its own share of the KV memory from
    the start; None: `lanes` stays."""
    sequences_per_lane: int = Field(8, ge=1)
    context_tokens: int = Field(512, ge=1)
    """Tokens of one sequence, prompt and output."""
    headroom_fraction: float = Field(LEAST_HEADROOM_FRACTION, ge=LEAST_HEADROOM_FRACTION, lt=1)
    """Share of each device's memory that the plan leaves alone; allocators fragment."""
    layer_counts: tuple[int, ...] | None = None
    """Force the cut: one layer count per device, 0 leaves it out (of experts it may hold some)."""
    experts: Literal["stages", "shards"] = "stages"
    """Of a mixture of experts. stages: experts are where their layer is. shards: they are spread
    over all devices by speed and memory, replicated where that helps, and follow the load."""
    spare_experts: int = Field(4, ge=1, le=4096)
    """Of shards: experts for which each device keeps room beside those it holds, so that experts
    can move while it serves."""
    spread_experts: int = Field(4, ge=0, le=4096)
    """Of shards: the hottest experts of each layer that are held on two nodes, where there is room:
    when a node is lost, their rows do not wait for anything to be read."""
    guest_experts: int = Field(4, ge=0, le=4096)
    """Of shards: experts for which devices that share a node keep room to take them in for one
    layer of a step, when the rows of a long prompt surprise the placement; 0: rows stay where their
    experts are."""

    @property
    def most_lanes(self) -> int:
        return self.lanes if self.max_lanes is None else self.max_lanes

    @model_validator(mode="after")
    def _check_lanes(self) -> PlanSettings:
        if self.most_lanes < self.lanes:
            raise ValueError(f"max_lanes ({self.max_lanes}) must be at least lanes ({self.lanes})")
        return self


class RaySettings(_Settings):
    """The Ray cluster to join, or the one to start here."""

    address: str | None = None
    """None starts a cluster on this node and stops it at the end; "auto" or host:port joins."""
    num_cpus: int | None = Field(None, ge=1)
    """Logical CPUs of a cluster started here; None: as many as there are stages and lanes."""
    object_store_bytes: ByteCount | None = None
    start_timeout_s: float = Field(180.0, gt=0)
    """Time for Ray, every stage and every lane to come up."""


class MotleyConfig(_Settings):
    """Everything `motley up` needs to know."""

    model: str = Field(min_length=1)
    """A checkpoint folder or a hub id. A relative folder is looked up in the working directory,
    then beside the configuration file. The folder of a PEFT adapter stands for its base model with
    that adapter."""
    adapter: str | None = Field(None, min_length=1)
    """The folder of a PEFT adapter that requests are answered with, until another is published."""
    name: str | None = Field(None, min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._-]+$")
    """What clients call the model and the command line the deployment; None: the name of the
    adapter's folder, or the model's."""
    engine: EngineConfig = EngineConfig()
    devices: tuple[DeviceSpec, ...] | None = Field(None, min_length=1)
    """None: every node's devices, measured."""
    links: tuple[LinkSpec, ...] = ()
    default_link: DefaultLinkSpec | None = DefaultLinkSpec()
    """Between nodes that no link joins: gigabit Ethernet. null: they cannot reach each other."""
    plan: PlanSettings = PlanSettings()
    training: TrainingSettings = TrainingSettings()
    controller: ControllerConfig = ControllerConfig()
    gateway: GatewaySettings = GatewaySettings()
    ray: RaySettings = RaySettings()

    @property
    def served_name(self) -> str:
        """The deployment's name: `name`, or the last part of the adapter or the model."""
        return self.name or Path(self.adapter or self.model).name

    @model_validator(mode="after")
    def _devices_are_told_apart(self) -> Self:
        for device_id, count in Counter(device.id for device in self.devices or ()).items():
            if count > 1:
                raise ValueError(f"devices: {count} are called {device_id}; give each its own id")
        return self

    @model_validator(mode="after")
    def _links_join_known_nodes(self) -> Self:
        nodes = {device.node for device in self.devices or ()}
        for link in self.links:
            for node in (link.source_node, link.target_node):
                if nodes and node not in nodes:
                    raise ValueError(
                        f"links: no device is on node {node}; nodes: {', '.join(sorted(nodes))}"
                    )
        pairs = Counter((link.source_node, link.target_node) for link in self.links)
        for (source, target), count in pairs.items():
            if count > 1:
                raise ValueError(f"links: {count} lead from {source} to {target}; keep one")
        return self

    @model_validator(mode="after")
    def _plan_fits_the_engine(self) -> Self:
        if self.plan.sequences_per_lane > self.engine.max_running:
            raise ValueError(
                f"plan.sequences_per_lane ({self.plan.sequences_per_lane}) must be at most "
                f"engine.max_running ({self.engine.max_running}), the lane's own limit"
            )
        counts = self.plan.layer_counts
        if counts is not None and self.devices and len(counts) != len(self.devices):
            raise ValueError(
                f"plan.layer_counts has {len(counts)} entries for {len(self.devices)} devices; "
                f"give one per device, 0 to leave it out"
            )
        return self


def load_config(path: Path | str) -> MotleyConfig:
    """Read a configuration file.

    Raises:
        ConfigError: Unreadable, not YAML, an unknown key, or a value that cannot be.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); name a YAML file") from None
    try:
        tree = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds {type(tree).__name__}, not keys; start with `model: ...`")
    config = _validate(tree, str(path))
    served = _resolve_served(config.model, config.adapter, path.resolve().parent, str(path))
    return config.model_copy(update=served)


def default_config() -> MotleyConfig:
    """Return the embedded default: a tiny checkpoint on three paced devices of this node."""
    return load_config(EMBEDDED_CONFIG)


def discovering_config(model: str) -> MotleyConfig:
    """Return the settings for serving `model` on whatever devices `motley up` finds."""
    tree = _resolve_served(model, None, Path.cwd(), "--model")
    return _validate(tree, "--model")


def with_overrides(
    config: MotleyConfig,
    *,
    model: str | None = None,
    name: str | None = None,
    http_port: int | None = None,
    grpc_port: int | None = None,
    objective: Objective | None = None,
) -> MotleyConfig:
    """Return the settings with the command line's flags laid over, validated again."""
    tree = config.model_dump()
    if model is not None:
        tree |= _resolve_served(model, None, Path.cwd(), "--model")
    if name is not None:
        tree["name"] = name
    if objective is not None:
        tree["plan"]["objective"] = objective
    for key, port in (("http_port", http_port), ("grpc_port", grpc_port)):
        if port is not None:
            tree["gateway"][key] = port
    return _validate(tree, "command line")


def _validate(tree: Mapping[str, Any], source: str) -> MotleyConfig:
    try:
        return MotleyConfig.model_validate(tree)
    except ValidationError as error:
        errors = error.errors()
        # A list whose only entry is wrong is called empty too; the entry's own error says it all.
        deeper = {details["loc"][:1] for details in errors if len(details["loc"]) > 1}
        lines = [
            f"{source}: {_explain(details)}"
            for details in errors
            if details["type"] != "too_short" or details["loc"] not in deeper
        ]
        raise ConfigError("\n".join(lines)) from None


def _explain(details: ErrorDetails) -> str:
    location = details["loc"]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    message = details["msg"].removeprefix("Value error, ")
    if details["type"] == "extra_forbidden":
        message = _unknown_key(location)
    elif details["type"] == "missing":
        message = "is required"
    elif not details["type"].startswith("value_error"):
        message = f"{message} (got {details['input']!r})"
    return f"{path.lstrip('.')}: {message}" if path else message


def _unknown_key(location: tuple[int | str, ...]) -> str:
    known = sorted(_model_at(location[:-1]).model_fields)
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    hint = f" did you mean {close[0]}?" if close else ""
    return f"unknown key;{hint} known keys: {', '.join(known)}"


def _model_at(location: tuple[int | str, ...]) -> type[BaseModel]:
    """Return the settings class at a path of the tree."""
    model: type[BaseModel] = MotleyConfig
    for part in location:
        if isinstance(part, str):
            [model] = _models_in(model.model_fields[part].annotation)
    return model


def _models_in(annotation: Any) -> set[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        return {m for part in typing.get_args(annotation) for m in _models_in(part)}
    return set()


def _resolve_served(
    model: str, adapter: str | None, folder: Path, source: str
) -> dict[str, str | None]:
    """Return where the base model and its adapter are; a `model` may be an adapter's folder."""
    found = _resolve_model(model, folder, source)
    if not is_adapter_folder(Path(found)):
        if adapter is not None:
            adapter = _resolve_model(adapter, folder, f"{source}: adapter")
            if not is_adapter_folder(Path(adapter)):
                raise ConfigError(f"{source}: adapter: {adapter} is no PEFT adapter's folder")
        return {"model": found, "adapter": adapter}
    if adapter is not None:
        raise ConfigError(
            f"{source}: model {found} is an adapter's folder, and adapter is set too; keep one"
        )
    return {"model": _base_of(Path(found)), "adapter": found}


def _base_of(adapter: Path) -> str:
    """Return the base model that an adapter's folder names."""
    source = f"{adapter / CONFIG_FILE}: base_model_name_or_path"
    knob = "; or give the base as `model` and this folder as `adapter` in a YAML file"
    try:
        base = read_config(adapter).get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise ConfigError(f"{source} ({base!r}) names no base model")
        found = _resolve_model(base, adapter, source)
    except (ConfigError, AdapterError) as error:
        raise ConfigError(f"{error}{knob}") from None
    if is_adapter_folder(Path(found)):
        raise ConfigError(f"{source}: {found} is itself an adapter; name a whole model{knob}")
    return found


def _resolve_model(model: str, folder: Path, source: str) -> str:
    """Return an absolute folder, or the hub id as it is."""
    written = Path(model).expanduser()
    tried = list(dict.fromkeys([Path.cwd() / written, folder / written]))
    for candidate in tried:
        if candidate.is_dir():
            return str(candidate.resolve())
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        places = ", ".join(str(candidate) for candidate in tried)
        raise ConfigError(
            f"{source}: model: no folder {model} (tried {places}); name a checkpoint folder, or a "
            f"hub id as owner/name"
        )
    return model


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML keeps the last of two equal keys without a word; this refuses them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)
