"""Probe actors on the nodes of devices that are to be measured, each call with a deadline."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors import wire
from actors.engine.config import EngineConfig
from actors.engine.measure import Effort
from actors.hosting import Host
from actors.link_timer import ProbeError
from actors.probe import ProbeActor
from cluster.config import DeviceSpec
from cluster.doctor_checks import available_memory_bytes
from cluster.profile import LOCAL, compute_dtype, compute_threads
from cluster.profile_cache import DeviceKey, own_versions
from placement.profiles import DeviceProfile, LinkProfile

_STOP_TIMEOUT_S = 5.0
_LAST_WORDS_S = 5.0
"""For a probe to say itself that its time was up."""


@dataclass(frozen=True, slots=True)
class Found:
    """A device that answered: who it is and how much of its memory is free."""

    key: DeviceKey
    node_names: tuple[str, ...]
    free_bytes: int


class Probes:
    """One probe for each distinct device of some specs; all are gone when the block ends.

    The devices of a node's processor are one: shares of it are not told apart. Cards are handed
    out by Ray in the order of the specs, as they are when stages are placed.
    """

    def __init__(
        self,
        specs: Sequence[DeviceSpec],
        hosts: Mapping[str, Host],
        engine: EngineConfig,
        timeout_s: float,
    ) -> None:
        self._hosts = hosts
        self._engine = engine
        self._timeout_s = timeout_s
        self._actors: list[Any] = []
        self._keys = wire.WireKeys.make()
        self._ends: dict[tuple[str, str], tuple[Any, wire.Address]] = {}
        self._of_device: dict[tuple[str, str, int], Any] = {}
        self._device_of: dict[str, tuple[str, str, int]] = {}
        self._first: dict[tuple[str, str, int], DeviceSpec] = {}
        seen: Counter[tuple[str, str]] = Counter()
        for spec in specs:
            place = (hosts[spec.node].ray_node_id, spec.kind)
            device = (*place, seen[place] if spec.kind == "cuda" else 0)
            seen[place] += 1
            self._device_of[spec.id] = device
            self._first.setdefault(device, spec)
            if device not in self._of_device:
                self._of_device[device] = self._start(spec.node, spec.kind)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        stops = [actor.stop.remote() for actor in self._actors]
        if stops:
            ray.wait(stops, num_returns=len(stops), timeout=_STOP_TIMEOUT_S)
        for actor in self._actors:
            ray.kill(actor)
        # One that hung could not remove its own.
        for _, address in self._ends.values():
            wire.remove_socket(address)

    def first_of(self, spec: DeviceSpec) -> DeviceSpec:
        """Return the first spec that is a share of the same device."""
        return self._first[self._device_of[spec.id]]

    def call(self, spec: DeviceSpec, what: str, method: str, *arguments: object) -> Any:
        """Have a device's probe do something.

        Raises:
            ProbeError: It failed, is gone, or took longer than the timeout; says what it did.
        """
        actor = self._of_device[self._device_of[spec.id]]
        return self._get(
            getattr(actor, method).remote(*arguments),
            f"device {spec.id} on node {spec.node}: {what}",
        )

    def find(self, spec: DeviceSpec) -> Found:
        """Ask who a device is."""
        names = self._names(spec.node)
        task = ray.remote(_node_facts).options(**self._options(spec.node))
        what = f"device {spec.id} on node {spec.node}: being asked for its memory"
        host, versions, free_bytes = self._get(task.remote(), what)
        identity = self.call(spec, "being asked for its name", "identity")
        key = DeviceKey(
            host=host,
            kind=spec.kind,
            index=identity.index,
            name=identity.name,
            dtype=compute_dtype(self._engine, spec.kind),
            threads=compute_threads(self._engine, spec.kind),
            versions=versions,
        )
        if identity.free_card_bytes is not None:
            free_bytes = identity.free_card_bytes
        if not free_bytes:
            raise ProbeError(
                f"device {spec.id} on node {spec.node} does not tell its free memory; declare "
                f"memory_bytes"
            )
        return Found(key, tuple(sorted({host, *names})), free_bytes)

    def measure(
        self,
        spec: DeviceSpec,
        found: Found,
        *,
        effort: Effort,
        rows: Sequence[int],
        shapes: Sequence[tuple[int, int]] = (),
        also_dtypes: Sequence[str] = (),
    ) -> DeviceProfile:
        """Measure a device itself: rates in its own and other number formats, and memory."""
        key = found.key
        dtypes = list(dict.fromkeys([key.dtype, *also_dtypes]))
        figures = self.call(spec, "measuring its rates", "device", dtypes, shapes, rows, effort)
        return DeviceProfile(
            id=spec.id,
            node=spec.node,
            kind=key.kind,
            source="measured",
            host=key.host,
            node_names=found.node_names,
            name=key.name,
            index=key.index,
            dtype=key.dtype,
            threads=key.threads,
            versions=key.versions,
            flops_per_s=max(rate.flops_per_s for rate in figures.matmul_rates[key.dtype]),
            memory_bytes_per_s=figures.memory_bytes_per_s,
            memory_bytes=found.free_bytes,
            host_bytes_per_s=figures.host_bytes_per_s,
            matmul_rates=figures.matmul_rates,
        )

    def time_link(self, source: str, target: str) -> LinkProfile:
        """Time one direction between two nodes, or between two processes of one.

        Raises:
            ProbeError: A node could not be reached in time.
        """
        what = f"link {source} -> {target}"
        caller, own_address = self._end("caller", source)
        answerer, address = self._end("answerer", target)
        # The answerer outlasts the caller, so that it is the caller that tells what went wrong.
        answering = answerer.echo.remote(own_address, 2 * self._timeout_s)
        timing = caller.time_link.remote(address, self._timeout_s)
        times = self._get(timing, what, extra_s=_LAST_WORDS_S)
        self._get(answering, f"{what}: the end that answers")
        names = [tuple(sorted(self._names(node))) for node in (source, target)]
        return LinkProfile(
            source_node=source,
            target_node=target,
            source="measured",
            rtt_s=times.rtt_s,
            bandwidth_bytes_per_s=times.bandwidth_bytes_per_s,
            source_names=names[0],
            target_names=names[1],
        )

    def _end(self, role: str, node: str) -> tuple[Any, wire.Address]:
        """Return a node's probe for links, one for each role: a node also talks to itself."""
        place = (role, self._hosts[node].ray_node_id)
        if place not in self._ends:
            actor = self._start(node, "cpu")
            listening = actor.listen.remote(self._keys, self._hosts[node].address)
            self._ends[place] = (actor, self._get(listening, f"node {node}: listening"))
        return self._ends[place]

    def _start(self, node: str, kind: str) -> Any:
        threads = 1 if kind == "cuda" else self._engine.cpu_threads
        options = self._options(node) | {"num_gpus": 1 if kind == "cuda" else 0, "max_restarts": 0}
        actor = ProbeActor.options(**options).remote(kind, threads)
        self._actors.append(actor)
        return actor

    def _options(self, node: str) -> dict[str, Any]:
        affinity = NodeAffinitySchedulingStrategy(self._hosts[node].ray_node_id, soft=False)
        return {"num_cpus": 0, "scheduling_strategy": affinity}

    def _names(self, node: str) -> set[str]:
        """Everything that a configuration may call a node, on whatever machine it is read."""
        wanted = self._hosts[node].ray_node_id
        return {
            name
            for name, host in self._hosts.items()
            if host.ray_node_id == wanted and name != LOCAL
        }

    def _get(self, reference: Any, what: str, *, extra_s: float = 0.0) -> Any:
        """Wait for an answer and say what it was about when there is none."""
        try:
            return ray.get(reference, timeout=self._timeout_s + extra_s)
        except GetTimeoutError as error:
            raise ProbeError(
                f"{what}: no answer in {self._timeout_s:.0f} s; raise --timeout, give fewer or "
                f"smaller --tokens, or declare the figures"
            ) from error
        except RayTaskError as error:
            raise ProbeError(f"{what}: {error.cause}") from error
        except RayError as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ProbeError(f"{what}: the node's probe is lost ({reason})") from error


def _node_facts() -> tuple[str, dict[str, str], int]:
    """Runs on the node: its host name, its versions, and the memory that is available."""
    return socket.gethostname(), own_versions(), available_memory_bytes() or 0
