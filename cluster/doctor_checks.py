"""The doctor's checks, one function each. They look and never change anything.

Each ends in pass, warn or fail, with the fact, the number and the knob. None needs Ray or torch.
"""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from actors.engine.checkpoint import Checkpoint, CheckpointError
from cluster.config import ConfigError, MotleyConfig
from cluster.gateway.settings import GatewaySettings, is_loopback
from cluster.planning import dtype_bytes, plan_serving
from cluster.profile import known_topology
from cluster.quantities import format_bytes
from placement.errors import InfeasiblePlanError
from placement.stages import StagesPlan

Outcome = Literal["pass", "warn", "fail"]

ROOT = Path(__file__).resolve().parent.parent
TOP_LEVEL_PACKAGES = ("cluster", "actors", "placement", "protos")
NODE_PACKAGES = ("torch", "transformers", "ray")
"""What stages on different nodes must have in the same version."""
PROCESS_BYTES = 400 * 2**20
"""One stage or lane process before its weights: torch, transformers, ray and zmq imported are
270 MiB resident (measured), the rest is room for running them."""
DISK_FULL_FRACTION = 0.95
"""Ray's local_fs_capacity_threshold: on a fuller disk it refuses to create objects."""
DISK_LOW_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True)
class Check:
    """One finding."""

    name: str
    outcome: Outcome
    message: str


def check_imports(root: Path) -> list[Check]:
    """Our package names are common ones; something installed may hide the checkout's."""
    checks = []
    for name in TOP_LEVEL_PACKAGES:
        spec = importlib.util.find_spec(name)
        origin = None if spec is None or spec.origin is None else Path(spec.origin).resolve()
        if origin is not None and origin.is_relative_to(root):
            checks.append(Check(f"import {name}", "pass", str(origin.parent)))
        else:
            message = (
                f"resolves to {origin}, not to {root}; run `python -m cluster` from {root}, or "
                f"uninstall what else provides {name}"
            )
            checks.append(Check(f"import {name}", "fail", message))
    return checks


def declared_requirements() -> dict[str, SpecifierSet]:
    """Return the version ranges that Motley is tested with, "python" among them."""
    project = ROOT / "pyproject.toml"
    if project.exists():
        table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        python, lines = table["requires-python"], table["dependencies"]
    else:
        metadata = importlib.metadata.metadata("motley")
        python, lines = metadata["Requires-Python"], metadata.get_all("Requires-Dist") or []
    ranges = {"python": SpecifierSet(python)}
    for requirement in map(Requirement, lines):
        if requirement.marker is None:
            ranges[requirement.name] = requirement.specifier
    return ranges


def installed_versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Return the versions on this node, "python" among them; None: not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def check_versions(
    ranges: Mapping[str, SpecifierSet], versions: Mapping[str, str | None]
) -> list[Check]:
    """Compare what is installed here with the tested ranges."""
    checks = []
    for package, version in versions.items():
        wanted = ranges.get(package, SpecifierSet())
        if version is None:
            message = f"is not installed; `pip install '{package}{wanted}'`"
            checks.append(Check(package, "fail", message))
        elif wanted.contains(version, prereleases=True):
            checks.append(Check(package, "pass", version))
        else:
            message = f"{version} is outside {wanted}; install a version of that range"
            checks.append(Check(package, "fail", message))
    return checks


def check_ports(gateway: GatewaySettings) -> list[Check]:
    """Try to listen where the gateway will."""
    checks = []
    for name, port in (("http_port", gateway.http_port), ("grpc_port", gateway.grpc_port)):
        if port == 0:
            checks.append(Check(name, "pass", "0: a free port is picked"))
            continue
        error = _listen_error(gateway.host, port)
        if error is None:
            checks.append(Check(name, "pass", f"{gateway.host}:{port} is free"))
        else:
            message = f"cannot listen on {gateway.host}:{port} ({error}); set gateway.{name}"
            checks.append(Check(name, "fail", message))
    return checks


def check_checkpoint(config: MotleyConfig) -> tuple[Check, Checkpoint | None]:
    """Open the checkpoint: configuration and tensor headers, no weights."""
    allow = config.engine.allow_unverified_architectures
    try:
        checkpoint = Checkpoint.open(config.model, allow_unverified=allow)
    except CheckpointError as error:
        return Check("checkpoint", "fail", str(error)), None
    message = (
        f"{checkpoint.path}: {checkpoint.architecture}, {checkpoint.num_layers} layers, "
        f"{checkpoint.num_parameters} parameters"
    )
    return Check("checkpoint", "pass", message), checkpoint


def check_plan(
    config: MotleyConfig, checkpoint: Checkpoint | None
) -> tuple[Check, StagesPlan | None]:
    """Plan for the declared devices."""
    if checkpoint is None:
        return Check("plan", "warn", "not made: the checkpoint cannot be read"), None
    try:
        topology = known_topology(config)
    except ConfigError as error:
        return Check("plan", "warn", f"not made: {error}"), None
    kinds = [device.kind for device in topology.devices]
    profile = checkpoint.profile(dtype_bytes=dtype_bytes(config.engine, kinds))
    try:
        plan = plan_serving(config, profile, topology).stages
    except (ConfigError, InfeasiblePlanError) as error:
        return Check("plan", "fail", str(error)), None
    message = f"{len(plan.stages)} stages, slowest {plan.bottleneck_s * 1e3:.2f} ms a step"
    return Check("plan", "pass", message), plan


def check_memory(
    config: MotleyConfig, plan: StagesPlan | None, available_bytes: int | None
) -> Check:
    """Compare this node's free memory with the stages and lanes it will host."""
    if available_bytes is None:
        return Check("memory", "warn", "this system does not say how much memory is free")
    if plan is None:
        return Check("memory", "warn", f"{format_bytes(available_bytes)} free; no plan to compare")
    here = [stage for stage in plan.stages if stage.node == "local" or config.ray.address is None]
    held = sum(s.weight_bytes + s.kv_bytes for s in here if s.kind != "cuda")
    processes = len(here) + config.plan.lanes
    need_bytes = held + processes * PROCESS_BYTES
    message = (
        f"{format_bytes(available_bytes)} free; {format_bytes(held)} of weights and KV and "
        f"{processes} processes of about {format_bytes(PROCESS_BYTES)} need "
        f"{format_bytes(need_bytes)}"
    )
    if need_bytes <= available_bytes:
        return Check("memory", "pass", message)
    advice = "; free memory, lower plan.lanes or plan.context_tokens, or use fewer devices here"
    return Check("memory", "fail" if held > available_bytes else "warn", message + advice)


def check_disk(folder: Path) -> Check:
    """Compare the disk that Ray spills objects to with Ray's own threshold."""
    usage = shutil.disk_usage(folder)
    used = 1.0 - usage.free / usage.total
    message = f"{format_bytes(usage.free)} free under {folder} ({used:.0%} used)"
    advice = "; free some, or point RAY_TMPDIR at another disk"
    if used > DISK_FULL_FRACTION:
        limit = f"; Ray creates no objects above {DISK_FULL_FRACTION:.0%}"
        return Check("disk", "fail", message + limit + advice)
    if usage.free < DISK_LOW_BYTES:
        return Check("disk", "warn", message + advice)
    return Check("disk", "pass", message)


def check_ray_auth(address: str | None, environment: Mapping[str, str]) -> Check:
    """Whoever reaches a Ray cluster without token authentication can run any code on it."""
    mode = environment.get("RAY_AUTH_MODE", "").lower()
    if address is None and mode != "disabled":
        return Check("ray auth", "pass", "a cluster started here has token authentication")
    if mode == "token":
        return Check("ray auth", "pass", "RAY_AUTH_MODE=token")
    host = (address or "127.0.0.1").rsplit("/", 1)[-1].rsplit(":", 1)[0]
    outcome: Outcome = "warn" if is_loopback(host) else "fail"
    message = (
        f"RAY_AUTH_MODE is {mode or 'not set'} for {address or 'a local cluster'}: whoever reaches "
        f"Ray's ports can run any code; set RAY_AUTH_MODE=token on every node and here"
    )
    return Check("ray auth", outcome, message)


def available_memory_bytes() -> int | None:
    """Return the memory that processes could take without swapping; None: unknown."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def compare_nodes(versions_by_node: Mapping[str, Mapping[str, str | None]]) -> list[Check]:
    """Every node must run the same versions: stages exchange tensors, Ray its own messages."""
    packages: Sequence[str] = list(dict.fromkeys(p for v in versions_by_node.values() for p in v))
    checks = []
    for package in packages:
        nodes_of: dict[str, list[str]] = {}
        for node, versions in versions_by_node.items():
            nodes_of.setdefault(versions.get(package) or "missing", []).append(node)
        told = "; ".join(f"{version} on {', '.join(nodes)}" for version, nodes in nodes_of.items())
        if len(nodes_of) == 1 and "missing" not in nodes_of:
            checks.append(Check(f"{package} on every node", "pass", told))
        else:
            message = f"{told}; install one version on every node"
            checks.append(Check(f"{package} on every node", "fail", message))
    return checks


def _listen_error(host: str, port: int) -> str | None:
    try:
        [family, kind, protocol, _, address] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        return "already in use" if error.errno == errno.EADDRINUSE else str(error)
    return None
