"""Frozen experts of a training run, sharded over the machines whose devices train.

The same workers, map and rebalancer as in serving; experts move when a worker is lost or back, and
for nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping

import ray
from ray.exceptions import RayError

from actors import wire
from actors.expert_crew import ExpertCrew
from actors.experts_shell import ExpertHooks, ExpertShellSettings, ExpertsShell
from actors.hosting import FleetError, Host, end_for_certain
from actors.losses import Member, cause_of
from actors.trainer import EXPERT_GROUP, ExpertPlace
from cluster.expert_shards import crew_spec, rebalance_settings
from cluster.profile import LOCAL
from cluster.training.errors import TrainingError
from cluster.training.job import TrainingJob
from placement.sharding.rebalancer import ExpertRebalancer
from placement.shards import ExpertShards
from placement.stages import StagesPlan
from placement.topology import Device, Topology
from placement.workload import ModelProfile

_log = logging.getLogger(__name__)
_START_TIMEOUT_S = 120.0
_ANSWER_TIMEOUT_S = 120.0
"""Longest wait for a layer's rows; a worker that is lost is noticed long before."""
_POLL_S = 1.0
_STOP_TIMEOUT_S = 5.0


class TrainingExperts:
    """Workers with frozen experts, and who uses them; alive as long as the run."""

    def __init__(
        self,
        job: TrainingJob,
        shards: ExpertShards,
        profile: ModelProfile,
        topology: Topology,
        hosts: Mapping[str, Host],
        *,
        dtype: str,
        on_fatal: Callable[[str], None],
    ) -> None:
        """`profile` and `topology` are whole, `on_fatal` is called from another thread. `stop`
        closes what is opened here."""
        engine = job.config.engine.model_copy(update={"dtype": dtype})
        config = job.config.model_copy(update={"engine": engine})
        self._hosts = dict(hosts)
        self._keys = wire.WireKeys.make()
        self._inbox = wire.Inbox("training", self._keys, host=self._hosts[LOCAL].address)
        spec = crew_spec(
            config,
            job.checkpoint,
            profile,
            topology,
            shards,
            is_frozen=True,
            longest_s=_ANSWER_TIMEOUT_S,
        )
        self._crew = ExpertCrew(
            spec, self._hosts, self._keys, self._inbox.address, group=EXPERT_GROUP
        )
        self._shell = ExpertsShell(
            self._crew,
            ExpertRebalancer(spec.map, rebalance_settings(config, profile, shards)),
            ExpertHooks(
                plan=_no_plan,
                steps=lambda: 0,
                is_node_alive=lambda node: _is_there(self._hosts[node]),
                on_interrupted=lambda reason: _log.warning("experts: %s", reason),
                on_halted=lambda reason: _log.error("experts: %s", reason),
                on_resumed=lambda: _log.info("experts go on"),
                on_fatal=on_fatal,
            ),
            ExpertShellSettings(
                window_s=config.controller.window_s,
                start_timeout_s=_START_TIMEOUT_S,
                silence_s=config.controller.silence_timeout_s,
                follows_load=False,
                phase="prefill",
            ),
        )
        self._trainers: dict[str, Member] = {}
        """By device."""
        self._stopping = threading.Event()
        self._reader = threading.Thread(target=self._read, name="experts-inbox", daemon=True)

    @property
    def num_recoveries(self) -> int:
        """How often a lost worker was made good."""
        return len(self._shell.recoveries)

    async def start(self) -> None:
        """Start the workers; `stop` also what has half started.

        Raises:
            TrainingError: One of them does not come up.
        """
        self._reader.start()
        workers = self._crew.start()
        calls = [worker.actor.ready.remote() for worker in workers]
        for worker, call in zip(workers, calls, strict=True):
            try:
                worker.address = await asyncio.wait_for(call, _START_TIMEOUT_S)
            except (RayError, TimeoutError) as error:
                for other in workers:
                    await asyncio.to_thread(end_for_certain, other)
                raise TrainingError(f"{worker.name} did not start: {cause_of(error)}") from error
        await asyncio.to_thread(self._crew.admit, workers)
        self._shell.start()

    def place(self, device: Device) -> ExpertPlace:
        """Return how a device that trains reaches the experts."""
        host = self._hosts[device.node]
        access = self._crew.access(device.node)
        return ExpertPlace(
            access=access, keys=self._keys, host=host.address, beside=self._inbox.address
        )

    async def serve(self, actors: Mapping[str, object]) -> None:
        """Let devices that have started use the experts, by id.

        Raises:
            FleetError: One of them died, or did not answer in time.
        """
        members = [Member("trainer", device_id, actor) for device_id, actor in actors.items()]
        self._trainers |= {str(member.key): member for member in members}
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        await asyncio.to_thread(self._crew.serve, members, deadline_s)

    def forget(self, device_id: str) -> None:
        """A device that trained is lost."""
        if device_id in self._trainers:
            self._crew.forget(self._trainers.pop(device_id))

    def look_at_nodes(self, hosts: Mapping[str, Host]) -> None:
        """Use what is known of the nodes now: some may be back."""
        self._hosts |= hosts
        for node in self._shell.nodes_away & hosts.keys():
            self._shell.rejoin(node)

    def stop(self) -> None:
        """End all workers."""
        self._shell.stop()
        for worker in list(self._crew.members.values()):
            end_for_certain(worker)
        self._stopping.set()
        if self._reader.is_alive():
            self._reader.join(_STOP_TIMEOUT_S)
        self._inbox.close()

    def _read(self) -> None:
        """Take the workers' reports, which nobody shows, off their sockets."""
        while not self._stopping.is_set():
            self._inbox.receive(_POLL_S)


def _no_plan() -> StagesPlan:
    raise FleetError("a training run has no stages")


def _is_there(host: Host) -> bool:
    return any(
        node["Alive"] and node["NodeID"] == host.ray_node_id
        for node in ray.nodes()  # type: ignore[no-untyped-call]
    )
