"""Keeps a deployment going: the controller's shell, the nodes it may use, and who is told.

The shell works on a thread of its own; what it says to the dispatcher is said on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.controller import ControllerShell, Counters, Hooks, ShellSettings
from actors.engine.requests import RequestError
from actors.experts_shell import ExpertHooks, ExpertShellSettings, ExpertsShell
from actors.fleet import Fleet
from actors.hosting import Host
from actors.moving import MoveReport
from actors.wire import Address, WireError
from cluster.backend import ControllerStatus
from cluster.config import MotleyConfig
from cluster.controller_log import (
    ControllerLog,
    ExpertLog,
    ExpertTraces,
    controller_log_file,
    expert_log_file,
)
from cluster.dispatch import Dispatcher
from cluster.inventory import find_hosts, find_joined
from cluster.link_probes import LinkProbes
from cluster.planning import serving_workload
from cluster.profile import LOCAL
from cluster.ray_session import joins_cluster
from cluster.steering import controller_document, controller_status, cut_of, experts_document
from placement.controller import Controller
from placement.errors import InfeasiblePlanError
from placement.sharding.decision import RebalanceSettings
from placement.sharding.expert_map import ExpertMap
from placement.sharding.log import ExpertOpening
from placement.sharding.rebalancer import ExpertRebalancer
from placement.sharding.recording import TraceRecording
from placement.sharding.recovery import check_slots
from placement.stages import StagesPlan
from placement.steering.log import Opening
from placement.steering.values import (
    DrainCancelled,
    DrainRequested,
    NodeJoined,
    NodeLost,
    PlanRequested,
)
from placement.topology import Topology
from placement.workload import ModelProfile

_log = logging.getLogger(__name__)
_LOOK_EVERY_S = 2.0
_PROBE_TIMEOUT_S = 10.0


class Supervisor:
    """Supervises one deployment. Create and use on the event loop."""

    def __init__(
        self,
        config: MotleyConfig,
        profile: ModelProfile,
        topology: Topology,
        plan: StagesPlan,
        fleet: Fleet,
        dispatcher: Dispatcher,
        expert_settings: RebalanceSettings | None = None,
    ) -> None:
        """With sharded experts, profile and topology are those of the stages, and
        `expert_settings` say when experts move."""
        self._config = config
        self._topology = topology
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._loop = asyncio.get_running_loop()
        self._cuts = {plan.epoch: cut_of(plan)}
        """Of all plans that have been in force, by epoch."""
        self._unix_offset_s = datetime.now(UTC).timestamp() - time.monotonic()
        self._may_grow = joins_cluster(config)
        self._away: set[str] = set()
        """Nodes that the controller was told are lost."""
        self._looking: asyncio.Task[None] | None = None
        self._halts: dict[str, str] = {}
        """Why stages, or experts, cannot be served."""
        self._giving_up: asyncio.TimerHandle | None = None
        settings = config.controller
        is_forced = config.plan.layer_counts is not None
        order = "given" if is_forced else config.plan.device_order
        if is_forced:
            settings = settings.model_copy(update={"rebalance": False})
        opening = Opening(
            profile=profile,
            topology=topology,
            workload=serving_workload(config),
            settings=settings.settings(
                config.plan.objective,
                order,
                config.plan.headroom_fraction,
                max_lanes=config.plan.max_lanes,
                block_tokens=config.engine.kv_block_tokens,
                start_timeout_s=config.ray.start_timeout_s,
            ),
            in_force=plan,
        )
        controller = Controller(
            opening.profile,
            opening.topology,
            opening.workload,
            opening.settings,
            in_force=opening.in_force,
        )
        self._log = ControllerLog(controller_log_file(config.served_name), opening)
        self._shell = ControllerShell(
            controller,
            fleet,
            Hooks(
                counters=self._counters,
                adapter_version=lambda: dispatcher.adapter().version,
                is_node_alive=self._is_node_alive,
                on_interrupted=partial(self._say, dispatcher.interrupted),
                on_plan=self._on_plan,
                on_lane=partial(self._say, self._use_lane),
                on_lane_retired=partial(self._say, dispatcher.drop_lane),
                on_resumed=partial(self._say, dispatcher.resumed),
                on_halt=partial(self._say, self._halt, "stages"),
                on_entry=self._log.write,
                on_fatal=partial(self._say, dispatcher.fail),
            ),
            ShellSettings(
                window_s=settings.window_s,
                start_timeout_s=config.ray.start_timeout_s,
            ),
        )

        self._expert_traces: ExpertTraces | None = None
        self._experts = self._experts_shell(expert_settings)
        self._links = LinkProbes(
            self._shell, fleet, topology, config.links, every_s=settings.link_probe_every_s
        )

    @property
    def fleet_turn(self) -> Any:
        """A lock to hold while the fleet is used."""
        return self._shell.turn

    def start(self) -> None:
        self._shell.start()
        self._links.start()
        if self._experts is not None:
            self._experts.start()
        self._looking = asyncio.create_task(self._look_at_nodes())

    async def stop(self) -> None:
        """Stop steering; the fleet is left as it is."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        if self._giving_up is not None:
            self._giving_up.cancel()
        await asyncio.to_thread(self._links.stop)
        if self._experts is not None:
            await asyncio.to_thread(self._experts.stop)
            self._expert_log.close()
            if self._expert_traces is not None:
                await asyncio.to_thread(self._expert_traces.close)
        await asyncio.to_thread(self._shell.stop)
        self._log.close()

    @property
    def experts(self) -> ExpertsShell | None:
        """What cares for sharded experts; None: they are in their stages."""
        return self._experts

    def _experts_shell(self, settings: RebalanceSettings | None) -> ExpertsShell | None:
        crew = self._fleet.experts
        if crew is None or settings is None:
            return None
        controller, dispatcher = self._config.controller, self._dispatcher
        opening = ExpertOpening(map=crew.map, settings=settings)
        self._expert_log = ExpertLog(expert_log_file(self._config.served_name), opening)
        if controller.expert_trace_steps:
            self._expert_traces = ExpertTraces(
                self._config.served_name,
                TraceRecording(
                    len(crew.spec.layers),
                    crew.map.num_experts,
                    top_k=crew.spec.profile.layers[crew.spec.layers[0]].experts_per_token,
                    max_steps=controller.expert_trace_steps,
                ),
            )
        return ExpertsShell(
            crew,
            ExpertRebalancer(opening.map, opening.settings),
            ExpertHooks(
                plan=lambda: self._fleet.plan,
                steps=self._last_stage_steps,
                is_node_alive=self._is_node_alive,
                on_interrupted=partial(self._say, dispatcher.interrupted),
                on_halted=partial(self._say, self._halt, "experts"),
                on_resumed=partial(self._say, self._go_on, "experts"),
                on_fatal=partial(self._say, dispatcher.fail),
                on_entry=self._expert_log.write,
                on_steps=None if self._expert_traces is None else self._expert_traces.add,
            ),
            ExpertShellSettings(
                window_s=controller.window_s,
                start_timeout_s=self._config.ray.start_timeout_s,
                silence_s=controller.silence_timeout_s,
                follows_load=controller.rebalance,
                phase="decode" if settings.objective == "activated" else "prefill",
            ),
        )

    def _last_stage_steps(self) -> int:
        last = self._fleet.plan.stages[-1].device_id
        return int(self._dispatcher.stage_reports().get(last, {}).get("steps", 0))

    def status(self) -> ControllerStatus:
        return controller_status(self._shell.state)

    def document(self) -> dict[str, Any]:
        links = self._links.measured()
        shown = controller_document(self._shell.state, self._cuts, links, self._unix_offset_s)
        if (shell := self._experts) is not None:
            crew = self._fleet.experts
            assert crew is not None, "a shell has a crew"
            shown["experts"] = experts_document(
                shell.rebalancer,
                crew.spec.layers,
                num_maps=shell.num_maps,
                changes=list(shell.changes),
                recoveries=list(shell.recoveries),
                guests={
                    device_id: report.get("guests", 0)
                    for device_id, report in self._dispatcher.expert_reports().items()
                },
                unix_offset_s=self._unix_offset_s,
            )
        return shown

    async def would_move(self) -> dict[str, object]:
        plan, verdict = await asyncio.to_thread(self._shell.what_if)
        return {"verdict": verdict, "cut": None if plan is None else cut_of(plan)}

    def rebalance(self) -> None:
        self._shell.tell(lambda now_s: PlanRequested(at_s=now_s))

    def drain(self, node: str, *, cancel: bool) -> None:
        nodes = {device.node for device in self._topology.devices}
        if node not in nodes:
            raise RequestError(
                f"no device is on node {node}; nodes: {', '.join(sorted(nodes))}", "node"
            )
        if not cancel and nodes == {node}:
            raise RequestError(
                f"all {len(self._topology.devices)} devices are on node {node}, so it cannot be "
                f"drained; start another node that joins, or stop the deployment",
                "node",
            )
        if self._experts is not None:
            if not cancel:
                self._check_experts_fit_without(node, self._experts.rebalancer.map)
            self._experts.drain(node, cancel=cancel)
        kind = DrainCancelled if cancel else DrainRequested
        self._shell.tell(lambda now_s: kind(at_s=now_s, node=node))

    def _check_experts_fit_without(self, node: str, held: ExpertMap) -> None:
        left = [device for device in held.devices if device.node != node]
        try:
            check_slots(left, held.num_experts)
        except InfeasiblePlanError as error:
            raise RequestError(f"experts on {node} fit nowhere else: {error}", "node") from None

    def _say(self, what: Callable[..., None], *arguments: Any) -> None:
        """Say something on the event loop; the shell calls from its own thread."""
        try:
            self._loop.call_soon_threadsafe(what, *arguments)
        except RuntimeError:  # the loop has closed: nobody is left to tell
            return

    def _counters(self) -> Counters:
        dispatcher = self._dispatcher
        lanes = dispatcher.lane_reports().values()
        return Counters(
            stages=dispatcher.stage_reports(),
            tokens=dispatcher.tokens_sent,
            running=sum(int(lane["running"]) for lane in lanes),
        )

    def _on_plan(self, plan: StagesPlan, report: MoveReport) -> None:
        _log.info(
            "plan %d is in force: pause %.1f ms, %d bytes of KV, weights after %.2f s",
            plan.epoch,
            report.pause_s * 1e3,
            report.kv_bytes,
            report.load_s,
        )
        self._say(self._use_plan, plan)

    def _use_plan(self, plan: StagesPlan) -> None:
        self._cuts[plan.epoch] = cut_of(plan)
        self._dispatcher.use_plan(plan)
        self._go_on("stages")

    def _use_lane(self, index: int, address: Address) -> None:
        try:
            self._dispatcher.use_lane(index, address)
        except WireError as error:
            self._dispatcher.fail(str(error))

    def _halt(self, what: str, reason: str) -> None:
        """Take nothing more, and give what is in flight some time."""
        self._halts[what] = reason
        self._dispatcher.refuse(reason)
        if self._giving_up is None:
            self._giving_up = self._loop.call_later(
                self._config.controller.recovery_timeout_s, self._dispatcher.end_all, reason
            )

    def _go_on(self, what: str) -> None:
        """Take requests again after `_halt`, unless something else cannot be served."""
        self._dispatcher.resumed()
        if self._halts.pop(what, None) is None or self._halts:
            return
        if self._giving_up is not None:
            self._giving_up.cancel()
            self._giving_up = None
        self._dispatcher.accept()

    def _is_node_alive(self, node: str) -> bool:
        """Ask a node to run something; Ray itself takes long to miss one that hangs."""
        if node == LOCAL:
            return True
        known = self._fleet.hosts[node]
        try:
            host = find_hosts().get(node)
        except RayError as error:
            _log.warning("cannot ask for node %s: %s", node, error)
            return False
        return host is not None and host.ray_node_id == known.ray_node_id and _answers(host)

    async def _look_at_nodes(self) -> None:
        """Tell of nodes that go, come back, or are new."""
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            try:
                hosts = await asyncio.to_thread(find_hosts, may_grow=self._may_grow)
                for node in sorted({device.node for device in self._topology.devices}):
                    await self._look_at(node, hosts.get(node))
                    await self._look_for_experts(node, hosts.get(node))
                if self._config.devices is None:
                    await self._find_new(hosts)
            except Exception as error:  # noqa: BLE001 - the next look may go better
                _log.warning("cannot look at the nodes: %r", error)

    async def _look_at(self, node: str, host: Host | None) -> None:
        known = self._fleet.hosts[node].ray_node_id
        if host is None or (host.ray_node_id != known and node not in self._away):
            if node not in self._away:
                self._away.add(node)
                reason = f"node {node} has left the cluster"
                self._shell.tell(lambda now_s: NodeLost(at_s=now_s, node=node, reason=reason))
        elif self._is_away(node) and await asyncio.to_thread(_answers, host):
            self._away.discard(node)
            self._fleet.hosts[node] = host
            self._join(node)

    async def _look_for_experts(self, node: str, host: Host | None) -> None:
        """Have a node hold experts again that did not answer for a while."""
        shell = self._experts
        if shell is None or node not in shell.nodes_away or host != self._fleet.hosts[node]:
            return
        if await asyncio.to_thread(_answers, host):
            shell.rejoin(node)

    def _is_away(self, node: str) -> bool:
        return node in self._away or node in self._shell.controller.away

    def _join(self, node: str) -> None:
        devices = tuple(device for device in self._topology.devices if device.node == node)
        links = tuple(
            link for link in self._topology.links if node in (link.source_node, link.target_node)
        )
        self._shell.tell(
            lambda now_s: NodeJoined(at_s=now_s, node=node, devices=devices, links=links)
        )
        self._links.rejoin(node, self._topology)

    async def _find_new(self, hosts: dict[str, Host]) -> None:
        """Take in nodes that nobody named, measured shortly."""
        before = self._topology
        grown = await asyncio.to_thread(find_joined, self._config, before, hosts)
        if grown is None:
            return
        new = grown.devices[len(before.devices) :]
        self._topology = grown
        self._fleet.hosts |= hosts
        self._fleet.devices |= {device.id: device for device in new}
        for node in sorted({device.node for device in new}):
            self._join(node)


@ray.remote(num_cpus=0, max_retries=0)
def _here() -> bool:
    return True


def _answers(host: Host) -> bool:
    affinity = NodeAffinitySchedulingStrategy(node_id=host.ray_node_id, soft=False)
    try:
        ray.get(_here.options(scheduling_strategy=affinity).remote(), timeout=_PROBE_TIMEOUT_S)
    except (GetTimeoutError, RayError):
        return False
    return True
