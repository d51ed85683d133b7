"""The controller against a fleet that joins, dies, slows down, and answers late or never."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from simulated_fleet import SimulatedFleet, check_plan, halts, plan_commands, toy_device, toy_model

from placement.controller import Controller
from placement.errors import InfeasiblePlanError
from placement.stages import StagePlacement, StagesPlan, plan_stages
from placement.steering.log import replay
from placement.steering.settings import ControllerSettings
from placement.steering.speeds import slowed
from placement.steering.values import DrainCancelled, DrainRequested, PlanRequested
from placement.topology import Device, Link, Topology
from placement.workload import DeviceOrder

NODES = ("u", "v", "w", "x", "y")
SETTINGS = ControllerSettings(backoff_s=20.0, move_deadline_s=20.0, device_loss_window_s=30.0)
MOST_MOVES_PER_DISTURBANCE = 2
GRID_FRACTION = 0.05
"""Plans are made with speeds in steps of 2 %, on the device that gains and the one that loses."""
SETTLE_S = 400.0
QUIET_S = 120.0

nodes = st.sampled_from(NODES)
indices = st.integers(0, 9)
figures = st.lists(
    st.tuples(st.sampled_from([5e4, 1e5, 2e5]), st.sampled_from([4000, 10**6, 10**6])),
    min_size=1,
    max_size=2,
)
"""(speed, memory) of the devices of a node."""
orders: st.SearchStrategy[DeviceOrder] = st.sampled_from(["given", "free"])
pauses = st.sampled_from([0.0, 0.5, 3.0, 12.0, 30.0])


def devices_of_node(node: str, part: list[tuple[float, int]]) -> list[Device]:
    return [
        toy_device(f"{node}{index}", speed, node=node, memory_bytes=memory_bytes)
        for index, (speed, memory_bytes) in enumerate(part)
    ]


class SteeredFleet(RuleBasedStateMachine):
    """Disturbances in any order, with time between them; then it has to come to rest."""

    fleet: SimulatedFleet

    @initialize(parts=st.lists(figures, min_size=2, max_size=5), order=orders)
    def deploy(self, parts: list[list[tuple[float, int]]], order: DeviceOrder) -> None:
        nodes = [devices_of_node(*part) for part in zip(NODES, parts, strict=False)]
        options = replace(SETTINGS, device_order=order)
        self.fleet = SimulatedFleet(nodes, settings=options, profile=toy_model(6))
        self.disturbances = 1
        self.fleet.run(3)

    def disturb(self) -> SimulatedFleet:
        self.disturbances += 1
        return self.fleet

    @rule(node=nodes, part=figures, then_s=pauses)
    def join(self, node: str, part: list[tuple[float, int]], then_s: float) -> None:
        known = [device for device in self.fleet.devices.values() if device.node == node]
        if not known or node in self.fleet.away:
            self.disturb().join(node, known or devices_of_node(node, part))
        self.fleet.run(then_s)

    @rule(index=indices, then_s=pauses)
    def lose(self, index: int, then_s: float) -> None:
        there = {d.node for d in self.fleet.devices.values()} - self.fleet.away
        if there:
            self.disturb().lose_node(sorted(there)[index % len(there)])
        self.fleet.run(then_s)

    @precondition(lambda self: self.fleet.serves)
    @rule(index=indices, then_s=pauses)
    def kill_stage(self, index: int, then_s: float) -> None:
        self.disturb().kill_stage(self.a_stage(index).device_id)
        self.fleet.run(then_s)

    @precondition(lambda self: self.fleet.serves)
    @rule(index=indices, factor=st.sampled_from([1.0, 1.1, 2.0, 8.0]), then_s=pauses)
    def slow(self, index: int, factor: float, then_s: float) -> None:
        self.disturb().slow(self.a_stage(index).device_id, factor)
        self.fleet.run(then_s)

    def a_stage(self, index: int) -> StagePlacement:
        assert self.fleet.plan is not None
        return self.fleet.plan.stages[index % len(self.fleet.plan.stages)]

    @rule(
        ends=st.lists(nodes, min_size=2, max_size=2, unique=True),
        bandwidth=st.sampled_from([20.0, 1e6]),
        latency=st.sampled_from([0.0, 1.0]),
        then_s=pauses,
    )
    def change_link(self, ends: list[str], bandwidth: float, latency: float, then_s: float) -> None:
        link = Link(
            source_node=ends[0],
            target_node=ends[1],
            bandwidth_bytes_per_s=bandwidth,
            latency_s=latency,
        )
        self.disturb().change_link(link)
        self.fleet.run(then_s)

    @rule(node=nodes, is_cancelled=st.booleans(), then_s=pauses)
    def drain(self, node: str, is_cancelled: bool, then_s: float) -> None:
        fleet = self.disturb()
        fleet.handle(DrainRequested(at_s=fleet.now_s, node=node))
        fleet.run(then_s)
        if is_cancelled:
            fleet = self.disturb()
            fleet.released.discard(node)
            fleet.handle(DrainCancelled(at_s=fleet.now_s, node=node))

    @rule(then_s=pauses)
    def ask(self, then_s: float) -> None:
        fleet = self.disturb()
        fleet.handle(PlanRequested(at_s=fleet.now_s))
        fleet.run(then_s)

    @rule(odd_rate=st.sampled_from([0.5, 1.0]), then_s=pauses)
    def misjudge(self, odd_rate: float, then_s: float) -> None:
        """Let the cost model be wrong about cuts whose first stage has an odd number of layers."""
        self.disturb().rate_of = lambda plan: odd_rate if plan.stages[0].num_layers % 2 else 1.0
        self.fleet.run(then_s)

    @rule(num=st.integers(1, 2), then_s=pauses)
    def drop_answers(self, num: int, then_s: float) -> None:
        self.disturbances += num
        self.fleet.answers_to_drop = num
        self.fleet.run(then_s)

    @rule(delay_s=st.sampled_from([0.0, 0.5, 3.0, 9.0]), work_s=st.sampled_from([0.5, 4.0]))
    def delay(self, delay_s: float, work_s: float) -> None:
        self.fleet.delay_s, self.fleet.work_s = delay_s, work_s

    @rule(running=st.sampled_from([0.0, 4.0, 8.0]))
    def change_load(self, running: float) -> None:
        self.disturb().running = running

    @invariant()
    def moves_are_bounded(self) -> None:
        # Plans that do not hold are refused as they are given: see `check_plan`.
        sent = len(plan_commands(command for _, command in self.fleet.commands))
        assert sent <= MOST_MOVES_PER_DISTURBANCE * self.disturbances

    def teardown(self) -> None:
        fleet = self.fleet
        fleet.rate_of = lambda _: 1.0
        fleet.delay_s, fleet.work_s, fleet.answers_to_drop, fleet.running = 0.0, 0.5, 0, 8.0
        fleet.run(SETTLE_S, step_s=2.0)
        quiet = fleet.run(QUIET_S, step_s=2.0)

        assert quiet == []
        self.is_at_rest()
        again = Controller(fleet.profile, fleet.opening.topology, fleet.workload, fleet.settings)
        assert replay(again, fleet.log) == ""

    def is_at_rest(self) -> None:
        """Either a plan is in force that holds, or none is possible and the controller said so."""
        fleet = self.fleet
        state = fleet.controller.state
        kept = [
            d
            for d in fleet.devices.values()
            if d.node not in fleet.away and d.node not in fleet.released
        ]
        if state.phase == "halted":
            assert halts(command for _, command in fleet.commands)
            assert self.best_over(kept) is None
            return
        assert state.phase == "idle"
        assert state.plan == fleet.plan
        assert fleet.serves
        assert fleet.plan is not None
        check_plan(fleet, fleet.plan)
        assert not any(stage.node in fleet.away for stage in fleet.plan.stages)
        undrained = [d for d in kept if d.node not in state.drains]
        best = self.best_over(undrained)
        if best is not None:
            assert not any(stage.node in state.drains for stage in fleet.plan.stages)
            self.is_nearly_best(best)

    def is_nearly_best(self, best: StagesPlan) -> None:
        """No gain is left lying, or the controller says what is wrong with the way to it."""
        assert self.fleet.plan is not None
        gain = self.fleet.true_figures(self.fleet.plan).objective_value / best.objective_value - 1
        why_not = self.fleet.controller.state.why_not
        assert gain < SETTINGS.min_gain_fraction + GRID_FRACTION or any(
            words in why_not for words in ("cannot be moved to", "does not pay")
        )

    def best_over(self, devices: list[Device]) -> StagesPlan | None:
        """Return the best plan over devices, at the speeds they were last seen to have."""
        if not devices:
            return None
        seen = self.fleet.controller.state.slowness
        topology = self.fleet.topology()
        try:
            return plan_stages(
                self.fleet.profile,
                Topology(
                    devices=tuple(slowed(d, seen.get(d.id, 1.0)) for d in devices),
                    links=topology.links,
                    default_link=topology.default_link,
                ),
                workload=self.fleet.workload,
                device_order=self.fleet.settings.device_order,
            )
        except InfeasiblePlanError:
            return None


def test_a_steered_fleet_comes_to_rest_whatever_happens() -> None:
    run_state_machine_as_test(
        SteeredFleet,
        settings=settings(
            max_examples=40,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
