"""Times the links between nodes while a deployment serves, on a thread of its own.

One light probe actor a node, started with the first round that needs it and again after it was
lost. Each link takes its turn, so probes do not meet each other; what fails tells nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors import wire
from actors.controller import ControllerShell
from actors.fleet import Fleet
from actors.hosting import Host
from actors.link_probe import LinkProbeActor
from actors.link_timer import LIGHT, LinkTimes
from cluster.config import LinkSpec
from placement.steering.links import (
    LinkEstimates,
    Pair,
    other_pairs,
    pairs_around,
    pairs_in_use,
)
from placement.steering.values import LinkMeasured
from placement.topology import Link, Topology

_log = logging.getLogger(__name__)
_START_TIMEOUT_S = 60.0
_PROBE_TIMEOUT_S = 10.0
"""Enough for a light probe at 150 kbit/s."""
_LAST_WORDS_S = 5.0
"""For an end to say itself that its time was up."""
_STOP_TIMEOUT_S = 5.0
_LOOK_EVERY_S = 0.2
"""Whether to stop, while an answer is waited for."""


@dataclass(slots=True, eq=False)
class _Probe:
    """A node's probe actor."""

    actor: Any
    listening: Any
    """The reference that its address comes by."""
    address: wire.Address | None = None


class LinkProbes:
    """Probes a deployment's links and tells the controller what changed.

    Links that the configuration declares are taken as declared, and not timed.
    """

    def __init__(
        self,
        shell: ControllerShell,
        fleet: Fleet,
        topology: Topology,
        declared: Collection[LinkSpec],
        *,
        every_s: float,
    ) -> None:
        self._shell = shell
        self._fleet = fleet
        self._topology = topology
        self._declared = declared
        self._every_s = every_s
        self._estimates = LinkEstimates(topology)
        self._news: dict[Pair, Link] = {}
        """What the controller is to be told at the end of the round."""
        self._lock = threading.Lock()
        """Held while these two are used."""
        self._keys = wire.WireKeys.make()
        self._probes: dict[str, _Probe] = {}
        """By Ray node id."""
        self._failing: set[str] = set()
        """What was warned about, and has not gone well since."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="link-probes", daemon=True)

    def start(self) -> None:
        if self._every_s:
            self._thread.start()

    def stop(self) -> None:
        """Stop the probe actors; nothing is told after this. Safe to call twice."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(2 * _STOP_TIMEOUT_S)

    def rejoin(self, node: str, topology: Topology) -> None:
        """A node joins (again) with its links in `topology`; call it after the controller was
        told."""
        with self._lock:
            self._topology = topology
            self._estimates.rejoin(node, topology)
            self._news = {pair: link for pair, link in self._news.items() if node not in pair}

    def measured(self) -> tuple[Link, ...]:
        """Return what the links have shown lately."""
        with self._lock:
            return self._estimates.measured()

    def _run(self) -> None:
        round_number = 0
        try:
            while not self._stopping.wait(self._every_s):
                try:
                    self._probe_round(round_number)
                except Exception as error:  # noqa: BLE001 - serving goes on without
                    self._warn("round", f"the links could not be measured: {error!r}")
                round_number += 1
        finally:
            self._end(list(self._probes.values()))

    def _probe_round(self, round_number: int) -> None:
        """Time the links in use, some others, and those around whatever surprises; then tell all
        that is new at once."""
        hosts = dict(self._fleet.hosts)
        in_use = self._pairs_in_use(hosts)
        usable = {device.node for device in self._topology.devices}
        usable -= {*self._shell.controller.away, *self._shell.state.drains}
        queue = [*in_use, *other_pairs(usable, in_use, round_number)]
        seen: set[Pair] = set()
        while queue and not self._stopping.is_set():
            fresh = [pair for pair in dict.fromkeys(queue) if pair not in seen]
            todo = timed_pairs(fresh, hosts, self._topology, self._declared)
            seen |= set(fresh)
            self._start_probes({hosts[node].ray_node_id: hosts[node] for node in _nodes(todo)})
            surprises = [pair for pair in todo if self._probe(pair, hosts)]
            queue = [near for pair in surprises for near in pairs_around(pair, _nodes(in_use))]
        self._tell_news()

    def _pairs_in_use(self, hosts: Mapping[str, Host]) -> list[Pair]:
        """Return the links that steps take, by the names that plans use."""
        plan = self._shell.state.plan
        devices = {device.node for device in self._topology.devices}
        lane_node = name_among(self._fleet.spec.lane_node, devices, hosts)
        return pairs_in_use([stage.node for stage in plan.stages] if plan else [], lane_node)

    def _probe(self, pair: Pair, hosts: Mapping[str, Host]) -> bool:
        """Probe a link, where that can be; returns whether it is not as planned with."""
        caller, answerer = (self._probes.get(hosts[node].ray_node_id) for node in pair)
        if caller is None or answerer is None or not _are_apart(caller, answerer):
            return False
        times = None if self._stopping.is_set() else self._time(pair, caller, answerer)
        if times is None:
            return False
        with self._lock:
            finding = self._estimates.observe(
                *pair, rtt_s=times.rtt_s, bandwidth_bytes_per_s=times.bandwidth_bytes_per_s
            )
            if finding.link is not None:
                self._news[pair] = finding.link
        return finding.is_surprise

    def _tell_news(self) -> None:
        with self._lock:
            for link in self._news.values():
                _tell(self._shell, link)
            self._news.clear()

    def _start_probes(self, hosts: Mapping[str, Host]) -> None:
        """Have a probe listen on each of these nodes (by Ray id), where that can be."""
        for ray_node_id, host in hosts.items():
            if ray_node_id not in self._probes:
                affinity = NodeAffinitySchedulingStrategy(ray_node_id, soft=False)
                options = {"num_cpus": 0, "max_restarts": 0, "scheduling_strategy": affinity}
                actor: Any = LinkProbeActor.options(**options).remote()
                listening = actor.listen.remote(self._keys, host.address)
                self._probes[ray_node_id] = _Probe(actor, listening)
        waiting = {key: probe for key, probe in self._probes.items() if probe.address is None}
        self._wait([probe.listening for probe in waiting.values()], _START_TIMEOUT_S)
        for ray_node_id, probe in waiting.items():
            if not self._stopping.is_set():
                what = f"a link of node {hosts[ray_node_id].address}"
                probe.address = self._result(what, probe, probe.listening)

    def _time(self, pair: Pair, caller: _Probe, answerer: _Probe) -> LinkTimes | None:
        """Time one direction; None: it failed, and whoever is to blame is replaced."""
        # The answerer outlasts the caller, so that it is the caller that tells what went wrong.
        answering = answerer.actor.echo.remote(caller.address, _PROBE_TIMEOUT_S + 1)
        timing = caller.actor.time_link.remote(answerer.address, _PROBE_TIMEOUT_S, LIGHT)
        self._wait([timing, answering], _PROBE_TIMEOUT_S + _LAST_WORDS_S)
        if self._stopping.is_set():
            return None
        what = f"the link from {pair[0]} to {pair[1]}"
        times: LinkTimes | None = self._result(what, caller, timing)
        answered = self._result(what, answerer, answering)
        return None if answered is None else times

    def _wait(self, references: Sequence[Any], timeout_s: float) -> None:
        """Wait until all have an answer, the time is up, or the probes are to stop."""
        end_s = time.monotonic() + timeout_s
        left = list(references)
        while left and not self._stopping.is_set() and (left_s := end_s - time.monotonic()) > 0:
            _, left = ray.wait(
                left, num_returns=len(left), timeout=min(_LOOK_EVERY_S, left_s), fetch_local=False
            )

    def _result(self, what: str, probe: _Probe, reference: Any) -> Any:
        """Return a call's result; None: it failed. A probe that is lost or hangs is ended."""
        try:
            result = ray.get(reference, timeout=_LOOK_EVERY_S)
        except RayTaskError as error:
            self._warn(what, f"{what} could not be measured: {error.cause}")
            return None
        except (RayError, TimeoutError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._warn(what, f"{what} could not be measured, its probe is started again: {reason}")
            self._probes = {key: each for key, each in self._probes.items() if each is not probe}
            self._end([probe])
            return None
        self._failing.discard(what)
        return result

    def _end(self, probes: Sequence[_Probe]) -> None:
        """Stop probes: politely first, so that they remove their folders, then for certain."""
        stops = [probe.actor.stop.remote() for probe in probes]
        if stops:
            ray.wait(stops, num_returns=len(stops), timeout=_STOP_TIMEOUT_S, fetch_local=False)
        for probe in probes:
            ray.kill(probe.actor)
            if probe.address is not None:
                wire.remove_socket(probe.address)

    def _warn(self, what: str, message: str) -> None:
        """Say it once, until `what` has gone well."""
        if what not in self._failing:
            self._failing.add(what)
            _log.warning("%s", message)


def timed_pairs(
    pairs: Sequence[Pair],
    hosts: Mapping[str, Host],
    topology: Topology,
    declared: Collection[LinkSpec],
) -> list[Pair]:
    """Return those links that are there to be timed.

    Left out are names of one node, links that are declared (either direction declares both, and who
    declares a link knows it), and nodes that are declared not to reach each other.
    """
    known = {frozenset((link.source_node, link.target_node)) for link in declared}
    return [
        (source, target)
        for source, target in pairs
        if source in hosts
        and target in hosts
        and hosts[source].ray_node_id != hosts[target].ray_node_id
        and frozenset((source, target)) not in known
        and topology.rate(source, target) is not None
    ]


def name_among(node: str, names: Collection[str], hosts: Mapping[str, Host]) -> str:
    """Return the name among `names` of the node that is called `node`; without one, `node`."""
    same = [
        name
        for name in sorted(names)
        if name in hosts and hosts[name].ray_node_id == hosts[node].ray_node_id
    ]
    return node if node in names or not same else same[0]


def _nodes(pairs: Sequence[Pair]) -> list[str]:
    return list(dict.fromkeys(node for pair in pairs for node in pair))


def _are_apart(caller: _Probe, answerer: _Probe) -> bool:
    """Whether two probes are there, and on two machines: several Ray nodes may share one."""
    here, there = caller.address, answerer.address
    return here is not None and there is not None and here.machine != there.machine


def _tell(shell: ControllerShell, link: Link) -> None:
    _log.info(
        "the link from %s to %s does %.3g MB/s in %.3g ms",
        link.source_node,
        link.target_node,
        link.bandwidth_bytes_per_s / 1e6,
        link.latency_s * 1e3,
    )
    shell.tell(
        lambda now_s: LinkMeasured(
            at_s=now_s,
            source_node=link.source_node,
            target_node=link.target_node,
            bandwidth_bytes_per_s=link.bandwidth_bytes_per_s,
            latency_s=link.latency_s,
        )
    )
