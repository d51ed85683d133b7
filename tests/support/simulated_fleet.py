"""A fleet that obeys a controller: it hosts stages, measures, loses things, and answers late.

Time stands still between calls of `run`. What happens in the fleet is told to the controller after
a delay, in order for one node; commands and answers have delays of their own, and an answer may
never come. Throughput and busy seconds follow `placement.costs` on the devices as they really are.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from placement.controller import Controller
from placement.costs import memory_cap_bytes
from placement.stages import StagesPlan, plan_stages
from placement.steering.log import LogEntry, Opening
from placement.steering.settings import ControllerSettings
from placement.steering.speeds import slowed
from placement.steering.targets import Cut, cut_of
from placement.steering.values import (
    ChangeLanes,
    Command,
    Deploy,
    DeviceLost,
    Event,
    Halt,
    LanesChanged,
    LinkMeasured,
    MoveDone,
    MoveFailed,
    MoveLayers,
    NodeJoined,
    NodeLost,
    ReleaseNode,
    StageMeasurement,
    StagesMeasured,
    Tick,
)
from placement.topology import Device, Link, LinkRate, Topology
from placement.workload import LayerCost, ModelProfile, ServingWorkload

WINDOW_S = 2.0
STEP_S = 0.5
WIRE = LinkRate(bandwidth_bytes_per_s=1e6, latency_s=1e-4)
WORKLOAD = ServingWorkload(
    lanes=8, sequences_per_lane=1, context_tokens_per_sequence=1, kv_tokens=8, step_tokens=1
)


def toy_model(num_layers: int = 8, *, weight_bytes: int = 1000) -> ModelProfile:
    """Layers that take a device `weight_bytes` / its speed each."""
    return ModelProfile(
        name="toy",
        embedding=LayerCost(flops_per_token=0, weight_bytes=1),
        layers=(LayerCost(flops_per_token=1.0, weight_bytes=weight_bytes, kv_bytes_per_token=1),)
        * num_layers,
        head=LayerCost(flops_per_token=1.0, weight_bytes=1),
        hidden_bytes_per_token=1,
    )


def toy_device(
    device_id: str, speed: float = 1e5, *, node: str | None = None, memory_bytes: int = 10**6
) -> Device:
    """A device that reads `speed` bytes per second and is never bound by compute."""
    return Device(
        id=device_id,
        node=device_id if node is None else node,
        kind="paced",
        flops_per_s=1e12,
        memory_bytes_per_s=speed,
        memory_bytes=memory_bytes,
    )


@dataclass
class _Task:
    """A command on its way, or at work until `done_s`."""

    command: Deploy | MoveLayers
    done_s: float
    reason: str = ""


class SimulatedFleet:
    """Nodes, what they hold, and the controller that steers them."""

    def __init__(
        self,
        nodes: Iterable[Sequence[Device]],
        *,
        settings: ControllerSettings | None = None,
        profile: ModelProfile | None = None,
        workload: ServingWorkload = WORKLOAD,
        links: Sequence[Link] = (),
    ) -> None:
        self.profile = profile or toy_model()
        self.workload = workload
        self.settings = settings or ControllerSettings()
        self.devices = {device.id: device for devices in nodes for device in devices}
        self.links = {(link.source_node, link.target_node): link for link in links}
        self.away: set[str] = set()
        self.factors: dict[str, float] = {}
        self.rate_of: Callable[[StagesPlan], float] = lambda _: 1.0
        """What tokens/s are times what the cost model says: for cuts that it is wrong about."""
        self.running = 8.0

        self.delay_s = 0.0
        """Of news, commands and answers from now on."""
        self.answers_to_drop = 0
        self.work_s = 0.5

        self.plan: StagesPlan | None = None
        """That really serves."""
        self.dead: set[str] = set()
        """Devices whose stage of it is gone."""
        self._figures: dict[tuple[Cut, Topology], StagesPlan] = {}
        self._tasks: list[_Task] = []
        self._news: deque[tuple[float, Event]] = deque()
        self.now_s = 0.0
        self._next_window_s = WINDOW_S
        self.commands: list[tuple[float, Command]] = []
        self.log: list[LogEntry] = []
        self.released: set[str] = set()

        topology = Topology(
            devices=tuple(self.devices.values()), links=tuple(links), default_link=WIRE
        )
        self.opening = Opening(
            profile=self.profile, topology=topology, workload=workload, settings=self.settings
        )
        self.controller = Controller(self.profile, topology, workload, self.settings)

    # What happens to the fleet.

    def join(self, node: str, devices: Sequence[Device], links: Sequence[Link] = ()) -> None:
        self.away.discard(node)
        self.devices |= {device.id: device for device in devices}
        self.links |= {(link.source_node, link.target_node): link for link in links}
        self._tell(
            NodeJoined(at_s=self.now_s, node=node, devices=tuple(devices), links=tuple(links))
        )

    def lose_node(self, node: str) -> None:
        self.away.add(node)
        self.dead |= {device.id for device in self.devices.values() if device.node == node}
        self.released.discard(node)
        self._tell(NodeLost(at_s=self.now_s, node=node, reason="heartbeats stopped"))

    def kill_stage(self, device_id: str) -> None:
        self.dead.add(device_id)
        self._tell(DeviceLost(at_s=self.now_s, device_id=device_id, reason="killed"))

    def slow(self, device_id: str, factor: float) -> None:
        self.factors[device_id] = factor

    def change_link(self, link: Link) -> None:
        self.links[link.source_node, link.target_node] = link
        self._tell(
            LinkMeasured(
                at_s=self.now_s,
                source_node=link.source_node,
                target_node=link.target_node,
                bandwidth_bytes_per_s=link.bandwidth_bytes_per_s,
                latency_s=link.latency_s,
            )
        )

    # Time.

    def run(self, seconds: float, *, step_s: float = STEP_S) -> list[Command]:
        """Let time pass, with a tick every `step_s`; returns the commands given meanwhile."""
        first, end_s = len(self.commands), self.now_s + seconds
        while self.now_s < end_s - 1e-9:
            self.now_s += step_s
            self._work()
            while self._news and self._news[0][0] <= self.now_s:
                self.handle(self._news.popleft()[1])
            if self.now_s >= self._next_window_s:
                self._next_window_s += WINDOW_S
                self.handle(self._measured())
            self.handle(Tick(at_s=self.now_s))
        return [command for _, command in self.commands[first:]]

    def handle(self, event: Event) -> list[Command]:
        """Give the controller an event, and the fleet its commands."""
        commands = self.controller.handle(event)
        self.log.append(LogEntry(event=event, commands=tuple(commands)))
        for command in commands:
            self.commands.append((self.now_s, command))
            self._obey(command)
        return commands

    def _tell(self, event: Event) -> None:
        # In order: what is told later is not heard earlier.
        last_s = self._news[-1][0] if self._news else 0.0
        self._news.append((max(last_s, self.now_s + self.delay_s), event))

    def _obey(self, command: Command) -> None:
        if isinstance(command, Deploy | MoveLayers):
            check_plan(self, command.plan)
            self._tasks.append(_Task(command, self.now_s + self.delay_s + self.work_s))
        elif isinstance(command, ReleaseNode):
            assert command.node not in self.holding_nodes()
            self.released.add(command.node)
        elif isinstance(command, ChangeLanes):
            assert self.settings.max_lanes is not None
            assert 1 <= command.num_lanes <= self.settings.max_lanes
            self._tell(LanesChanged(at_s=self.now_s, num_lanes=command.num_lanes))

    def _work(self) -> None:
        ready = [task for task in self._tasks if task.done_s <= self.now_s]
        self._tasks = [task for task in self._tasks if task.done_s > self.now_s]
        for task in sorted(ready, key=lambda each: each.command.epoch):
            epoch, plan = task.command.epoch, task.command.plan
            if self.plan is not None and epoch <= self.plan.epoch:
                continue
            away = {s.device_id for s in plan.stages if not self.is_there(s.device_id)}
            if away:
                lost = tuple(sorted(away))
                failed = MoveFailed(
                    at_s=self.now_s,
                    epoch=epoch,
                    reason="gone",
                    lost_device_ids=lost,
                    stands_still=epoch % 2 == 0,
                )
                self._answer(failed)
                continue
            self.plan, self.dead = plan, set()
            self._answer(MoveDone(at_s=self.now_s, epoch=epoch, pause_s=0.05, moved_bytes=1))

    def _answer(self, event: Event) -> None:
        if self.answers_to_drop:
            self.answers_to_drop -= 1
        else:
            self._tell(event)

    # What is true.

    def is_there(self, device_id: str) -> bool:
        return self.devices[device_id].node not in self.away

    @property
    def serves(self) -> bool:
        return self.plan is not None and not self.dead & {s.device_id for s in self.plan.stages}

    def holding_nodes(self) -> set[str]:
        """Return the nodes with live stages of the plan that really serves."""
        stages = self.plan.stages if self.plan else ()
        return {stage.node for stage in stages if stage.device_id not in self.dead}

    def topology(self, *, slow: bool = True) -> Topology:
        """Return every device, as it really is."""
        return Topology(
            devices=tuple(
                slowed(device, self.factors.get(device.id, 1.0) if slow else 1.0)
                for device in self.devices.values()
            ),
            links=tuple(self.links.values()),
            default_link=WIRE,
        )

    def true_figures(self, plan: StagesPlan) -> StagesPlan:
        """Return a plan's cut with the figures it really has."""
        return self._priced(plan, slow=True)

    def _priced(self, plan: StagesPlan, *, slow: bool) -> StagesPlan:
        key = (cut_of(plan), self.topology(slow=slow))
        if key not in self._figures:
            self._figures[key] = self._price(plan, key[1])
        return self._figures[key]

    def _price(self, plan: StagesPlan, topology: Topology) -> StagesPlan:
        by_id = {device.id: device for device in topology.devices}
        cut = cut_of(plan)
        return plan_stages(
            self.profile,
            replace(topology, devices=tuple(by_id[device_id] for device_id, _, _ in cut)),
            workload=self.workload,
            layer_counts=[end - first for _, first, end in cut],
        )

    def tokens_per_s(self) -> float:
        if self.plan is None or not self.serves:
            return 0.0
        figures = self.true_figures(self.plan)
        return figures.predicted_tokens_per_s * self.rate_of(self.plan)

    def _measured(self) -> StagesMeasured:
        stages: tuple[StageMeasurement, ...] = ()
        if self.plan is not None and self.serves and self.running:
            steps = 1000
            stages = tuple(
                StageMeasurement(
                    device_id=real.device_id,
                    steps=steps,
                    busy_s=steps * real.step_s,
                    predicted_s=steps * profiled.step_s,
                )
                for real, profiled in zip(
                    self.true_figures(self.plan).stages,
                    self._priced(self.plan, slow=False).stages,
                    strict=True,
                )
            )
        return StagesMeasured(
            at_s=self.now_s,
            epoch=self.plan.epoch if self.plan else 0,
            window_s=WINDOW_S,
            tokens_per_s=self.tokens_per_s() if self.running else 0.0,
            running=self.running,
            stages=stages,
        )


def check_plan(fleet: SimulatedFleet, plan: StagesPlan) -> None:
    """Every layer once and in order, every device once, no cap exceeded."""
    edges = [0, *(stage.end_layer for stage in plan.stages)]
    assert [stage.first_layer for stage in plan.stages] == edges[:-1]
    assert edges[-1] == fleet.profile.num_layers
    assert all(first < end for first, end in itertools.pairwise(edges))
    ids = [stage.device_id for stage in plan.stages]
    assert len(set(ids)) == len(ids)
    for stage in plan.stages:
        device = fleet.devices[stage.device_id]
        cap_bytes = memory_cap_bytes(device.memory_bytes, fleet.settings.headroom_fraction)
        assert stage.node == device.node
        assert stage.memory_cap_bytes == cap_bytes
        assert stage.need_bytes <= cap_bytes
        assert stage.node not in fleet.released


def plan_commands(commands: Iterable[Command]) -> list[Deploy | MoveLayers]:
    return [command for command in commands if isinstance(command, Deploy | MoveLayers)]


def halts(commands: Iterable[Command]) -> list[Halt]:
    return [command for command in commands if isinstance(command, Halt)]


def counts_of(plan: StagesPlan) -> dict[str, int]:
    return {stage.device_id: stage.num_layers for stage in plan.stages}
