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
from placement.stages import StagesPlan, plan_stages
from placement.steering.log import replay
from placement.steering.settings import ControllerSettings
from placement.steering.values import DrainCancelled, DrainRequested, PlanRequested
from placement.topology import Device, Link, Topology

NODES = ("u", "v", "w", "x", "y")
SETTINGS = ControllerSettings(backoff_s=20.0, move_deadline_s=20.0, device_loss_window_s=30.0)
MOST_MOVES_PER_DISTURBANCE = 4
SETTLE_S = 400.0
QUIET_S = 120.0

nodes = st.sampled_from(NODES)
speeds = st.sampled_from([2e4, 1e5, 3e5])
memories = st.sampled_from([2500, 4000, 10**6])


def devices_of_node(node: str, figures: list[tuple[float, int]]) -> list[Device]:
    return [
        toy_device(f"{node}{index}", speed, node=node, memory_bytes=memory_bytes)
        for index, (speed, memory_bytes) in enumerate(figures)
    ]


class SteeredFleet(RuleBasedStateMachine):
    """Disturbances in any order, with time between them; then it has to come to rest."""

    fleet: SimulatedFleet

    @initialize(
        figures=st.lists(
            st.lists(st.tuples(speeds, memories), min_size=1, max_size=2), min_size=2, max_size=5
        ),
        order=st.sampled_from(["given", "free"]),
    )
    def deploy(self, figures: list[list[tuple[float, int]]], order: str) -> None:
        parts = [devices_of_node(node, part) for node, part in zip(NODES, figures, strict=False)]
        options = replace(SETTINGS, device_order=order)  # type: ignore[arg-type]
        self.fleet = SimulatedFleet(parts, settings=options, profile=toy_model(6))
        self.disturbances = 1

    def disturb(self) -> SimulatedFleet:
        self.disturbances += 1
        return self.fleet

    @rule(node=nodes, figures=st.lists(st.tuples(speeds, memories), min_size=1, max_size=2))
    def join(self, node: str, figures: list[tuple[float, int]]) -> None:
        fleet = self.disturb()
        known = [device for device in fleet.devices.values() if device.node == node]
        if known and node not in fleet.away:
            return
        fleet.join(node, known or devices_of_node(node, figures))

    @rule(node=nodes)
    def lose(self, node: str) -> None:
        if node not in self.fleet.away and any(d.node == node for d in self.fleet.devices.values()):
            self.disturb().lose_node(node)

    @precondition(lambda self: self.fleet.plan is not None)
    @rule(index=st.integers(0, 9))
    def kill_stage(self, index: int) -> None:
        assert self.fleet.plan is not None
        stages = self.fleet.plan.stages
        stage = stages[index % len(stages)]
        if stage.node not in self.fleet.away:
            self.disturb().kill_stage(stage.device_id)

    @rule(index=st.integers(0, 9), factor=st.sampled_from([1.0, 1.1, 2.0, 8.0]))
    def slow(self, index: int, factor: float) -> None:
        device_ids = list(self.fleet.devices)
        self.disturb().slow(device_ids[index % len(device_ids)], factor)

    @rule(source=nodes, sink=nodes, bandwidth=st.sampled_from([20.0, 1e6]), latency=st.floats(0, 1))
    def change_link(self, source: str, sink: str, bandwidth: float, latency: float) -> None:
        if source != sink:
            link = Link(
                source_node=source,
                target_node=sink,
                bandwidth_bytes_per_s=bandwidth,
                latency_s=latency,
            )
            self.disturb().change_link(link)

    @rule(node=nodes)
    def drain(self, node: str) -> None:
        fleet = self.disturb()
        fleet.handle(DrainRequested(at_s=fleet.now_s, node=node))

    @rule(node=nodes)
    def cancel_drain(self, node: str) -> None:
        fleet = self.disturb()
        fleet.released.discard(node)
        fleet.handle(DrainCancelled(at_s=fleet.now_s, node=node))

    @rule()
    def ask(self) -> None:
        fleet = self.disturb()
        fleet.handle(PlanRequested(at_s=fleet.now_s))

    @rule(num=st.integers(0, 2))
    def drop_answers(self, num: int) -> None:
        self.disturbances += num
        self.fleet.answers_to_drop = num

    @rule(delay_s=st.sampled_from([0.0, 0.5, 3.0, 9.0]), work_s=st.sampled_from([0.5, 4.0, 15.0]))
    def delay(self, delay_s: float, work_s: float) -> None:
        # A move that takes longer than its deadline is one that fails again and again.
        self.fleet.delay_s, self.fleet.work_s = delay_s, work_s

    @rule(running=st.sampled_from([0.0, 4.0, 8.0]))
    def change_load(self, running: float) -> None:
        self.disturb().running = running

    @rule(seconds=st.sampled_from([0.5, 2.0, 7.0, 30.0]))
    def wait(self, seconds: float) -> None:
        self.fleet.run(seconds)

    @invariant()
    def moves_are_bounded(self) -> None:
        # Plans that do not hold are refused as they are given: see `check_plan`.
        sent = len(plan_commands(command for _, command in self.fleet.commands))
        waited_s = self.fleet.now_s
        overdue = waited_s / SETTINGS.move_deadline_s
        assert sent <= MOST_MOVES_PER_DISTURBANCE * self.disturbances + overdue

    def teardown(self) -> None:
        fleet = self.fleet
        fleet.delay_s, fleet.work_s, fleet.answers_to_drop, fleet.running = 0.0, 0.5, 0, 8.0
        fleet.run(SETTLE_S)
        quiet = fleet.run(QUIET_S)

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
            for d in fleet.topology().devices
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
        undrained = [d for d in kept if d.node not in state.draining]
        if self.best_over(undrained) is not None:
            assert not any(stage.node in state.draining for stage in fleet.plan.stages)

    def best_over(self, devices: list[Device]) -> StagesPlan | None:
        if not devices:
            return None
        topology = self.fleet.topology()
        try:
            return plan_stages(
                self.fleet.profile,
                Topology(
                    devices=tuple(devices),
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
