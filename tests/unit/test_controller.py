from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
from simulated_fleet import (
    WINDOW_S,
    WIRE,
    WORKLOAD,
    SimulatedFleet,
    check_plan,
    counts_of,
    halts,
    plan_commands,
    toy_device,
    toy_model,
)

from placement.controller import Controller
from placement.stages import StagesPlan, plan_stages
from placement.steering.log import LogEntry, Opening, replay
from placement.steering.settings import ControllerSettings
from placement.steering.speeds import Speeds, slowed
from placement.steering.values import (
    ChangeLanes,
    Command,
    Deploy,
    DeviceLost,
    DrainCancelled,
    DrainRequested,
    Event,
    Halt,
    LanesChanged,
    MoveDone,
    MoveFailed,
    MoveLayers,
    NodeJoined,
    NodeLost,
    PlanRequested,
    ReleaseNode,
    StageMeasurement,
    StagesMeasured,
    Tick,
)
from placement.topology import Device, Link, LinkRate, Topology
from placement.workload import ModelProfile


def fleet(*device_ids: str, **options: Any) -> SimulatedFleet:
    """Equal devices, each on a node of its own, that serve already."""
    built = SimulatedFleet([[toy_device(each)] for each in device_ids], **options)
    built.run(12)
    assert built.serves
    return built


def controller(
    *devices: Device, settings: ControllerSettings | None = None, is_deployed: bool = True
) -> Controller:
    """A controller of devices whose best plan is in force with epoch 1."""
    topology = Topology(devices=devices)
    in_force = replace(plan_stages(toy_model(), topology, workload=WORKLOAD), epoch=1)
    return Controller(toy_model(), topology, WORKLOAD, settings, in_force if is_deployed else None)


def window(
    at_s: float,
    epoch: int = 1,
    *,
    slowness: dict[str, float] | None = None,
    tokens_per_s: float = 10.0,
    running: float = 8.0,
    steps: int = 100,
) -> StagesMeasured:
    return StagesMeasured(
        at_s=at_s,
        epoch=epoch,
        window_s=2.0,
        tokens_per_s=tokens_per_s,
        running=running,
        stages=tuple(
            StageMeasurement(device_id=device_id, steps=steps, busy_s=factor, predicted_s=1.0)
            for device_id, factor in (slowness or {}).items()
        ),
    )


def done(at_s: float, epoch: int) -> MoveDone:
    return MoveDone(at_s=at_s, epoch=epoch, pause_s=0.05, moved_bytes=1000)


def feed(steered: Controller, *events: Event) -> list[Command]:
    """Return the commands after the last event; the others must be answered by none."""
    for event in events[:-1]:
        assert steered.handle(event) == []
    return steered.handle(events[-1])


def moved(commands: list[Command]) -> MoveLayers:
    [command] = commands
    assert isinstance(command, MoveLayers)
    return command


def layers(command: Command) -> dict[str, int]:
    assert isinstance(command, Deploy | MoveLayers)
    assert command.plan.epoch == command.epoch
    return counts_of(command.plan)


def phase(steered: Controller) -> str:
    return steered.state.phase


def slow_b(steered: Controller, *, from_s: float = 2.0) -> MoveLayers:
    """Let b run at half speed until layers move off it."""
    return moved(
        feed(
            steered,
            window(from_s, slowness={"a": 1.0, "b": 2.0}),
            window(from_s + 2, slowness={"a": 1.0, "b": 2.0}),
            window(from_s + 4, slowness={"a": 1.0, "b": 2.0}),
        )
    )


# Deployment.


def test_the_first_event_is_answered_by_a_deployment() -> None:
    steered = controller(toy_device("a"), toy_device("b"), is_deployed=False)

    [command] = steered.handle(Tick(at_s=0.0))

    assert isinstance(command, Deploy)
    assert command.epoch == 1
    assert layers(command) == {"a": 4, "b": 4}
    assert phase(steered) == "moving"
    assert feed(steered, Tick(at_s=1.0), done(2.0, 1)) == []
    assert phase(steered) == "idle"
    assert steered.state.plan == command.plan


def test_a_plan_that_runs_already_is_left_alone() -> None:
    steered = controller(toy_device("a"), toy_device("b"))

    assert feed(steered, Tick(at_s=0.0), *(window(at_s) for at_s in range(2, 40, 2))) == []
    assert "the plan in force is the best" in steered.state.why_not


def test_epochs_go_on_after_those_of_a_controller_before() -> None:
    topology = Topology(devices=(toy_device("a"),))
    in_force = replace(plan_stages(toy_model(), topology, workload=WORKLOAD), epoch=3)
    steered = Controller(toy_model(), topology, WORKLOAD, in_force=in_force, last_epoch=5)

    [command] = steered.handle(DeviceLost(at_s=1.0, device_id="a", reason="SIGKILL"))

    assert isinstance(command, Deploy)
    assert command.epoch == 6


# Slow devices.


def test_layers_move_off_a_slow_device_after_two_windows_that_agree() -> None:
    steered = controller(toy_device("a"), toy_device("b"))

    command = slow_b(steered)

    assert layers(command) == {"a": 6, "b": 2}
    assert not command.is_recovery
    assert not command.is_roll_back
    assert "+33" in command.reason
    assert steered.state.slowness["b"] == pytest.approx(2.0)


def test_a_device_at_half_speed_is_compensated_within_15_seconds() -> None:
    running = fleet("a", "b", "c", "d", profile=toy_model(24))
    running.run(0.5)
    running.slow("c", 2.0)
    running.run(15)

    best = plan_stages(running.profile, running.topology(), workload=WORKLOAD)
    assert running.tokens_per_s() >= 0.95 * best.predicted_tokens_per_s
    assert len(plan_commands(running.run(60))) == 0


def test_one_odd_window_moves_nothing() -> None:
    steered = controller(toy_device("a"), toy_device("b"))

    events = [
        window(float(at_s), slowness={"a": 1.0, "b": 5.0 if at_s % 10 == 0 else 1.0})
        for at_s in range(2, 60, 2)
    ]

    assert feed(steered, *events) == []


def test_too_few_steps_are_no_evidence() -> None:
    steered = controller(toy_device("a"), toy_device("b"))

    assert feed(steered, *(window(float(t), slowness={"b": 9.0}, steps=5) for t in (2, 4, 6))) == []
    assert steered.state.slowness == {}


def test_measurements_of_another_epoch_are_ignored() -> None:
    steered = controller(toy_device("a"), toy_device("b"))

    assert feed(steered, *(window(float(t), 7, slowness={"b": 2.0}) for t in (2, 4, 6))) == []
    assert steered.state.slowness == {}


def test_a_small_gain_is_not_worth_a_move_unless_asked_for() -> None:
    settings = ControllerSettings(min_gain_fraction=0.5)
    steered = controller(toy_device("a"), toy_device("b"), settings=settings)
    feed(steered, *(window(float(t), slowness={"b": 2.0}) for t in range(2, 20, 2)))
    assert "a move must gain 50.0% by itself (min_gain_fraction)" in steered.state.why_not

    plan, verdict = steered.what_if()
    assert plan is not None
    assert counts_of(plan) == {"a": 6, "b": 2}
    assert verdict.startswith("would move: 80.1 ms a step becomes 60.1 ms a step (+33.3%)")
    assert "by itself it waits" in verdict

    assert layers(moved(steered.handle(PlanRequested(at_s=21.0)))) == {"a": 6, "b": 2}


def test_a_request_to_rebalance_gains_or_nothing_happens() -> None:
    steered = controller(toy_device("a"), toy_device("b"))

    assert steered.handle(PlanRequested(at_s=1.0)) == []
    assert "the plan in force is the best" in steered.state.why_not
    assert steered.what_if()[1].startswith("would not move")


def test_a_gain_that_does_not_pay_for_its_pause_is_left() -> None:
    settings = ControllerSettings(horizon_s=0.05)
    steered = controller(toy_device("a"), toy_device("b"), settings=settings)

    assert feed(steered, *(window(float(t), slowness={"b": 2.0}) for t in range(2, 20, 2))) == []
    assert "which does not pay" in steered.state.why_not


def test_moves_keep_their_distance() -> None:
    steered = controller(toy_device("a"), toy_device("b"))
    slow_b(steered)
    steered.handle(done(7.0, 2))
    kept = feed(
        steered,
        window(9.0, 2, slowness={"a": 1.0, "b": 2.0}, tokens_per_s=13.0),
        window(11.0, 2, slowness={"a": 3.0, "b": 1.0}, tokens_per_s=13.0),
    )
    assert kept == []

    again = {"a": 3.0, "b": 1.0}
    assert feed(steered, window(13.0, 2, slowness=again), window(15.0, 2, slowness=again)) == []
    assert "cool-down of 10 s" in steered.state.why_not
    assert layers(moved(steered.handle(window(17.0, 2, slowness=again)))) == {"a": 2, "b": 6}


def test_moves_are_counted_by_the_hour() -> None:
    settings = ControllerSettings(max_moves_per_hour=1)
    steered = controller(toy_device("a"), toy_device("b"), settings=settings)
    slow_b(steered)
    back = [window(float(t), 2, slowness={"b": 1.0}, tokens_per_s=20.0) for t in range(9, 40, 2)]

    assert feed(steered, done(7.0, 2), *back) == []
    assert "max_moves_per_hour (1)" in steered.state.why_not


def test_half_the_way_comes_first_where_asked_for() -> None:
    settings = ControllerSettings(half_step=True)
    running = SimulatedFleet(
        [[toy_device("a")], [toy_device("b")]], settings=settings, profile=toy_model(16)
    )
    running.run(12)
    running.slow("b", 3.0)

    half, whole = plan_commands(running.run(40))

    assert layers(half) == {"a": 10, "b": 6}
    assert layers(whole) == {"a": 12, "b": 4}
    assert running.controller.state.moves[1].outcome == "kept"


# Trials.


def test_a_move_that_gains_is_kept_with_its_figures() -> None:
    steered = controller(toy_device("a"), toy_device("b"))
    slow_b(steered)

    feed(steered, done(7.0, 2))
    assert phase(steered) == "trial"
    feed(steered, window(9.0, 2, tokens_per_s=12.0), window(11.0, 2, tokens_per_s=14.0))

    [record] = steered.state.moves
    assert phase(steered) == "idle"
    assert record.outcome == "kept"
    assert record.measured_gain == pytest.approx(0.3)
    assert record.predicted_gain == pytest.approx(1 / 3, rel=1e-3)
    assert record.pause_s == 0.05
    assert record.predicted_pause_s == pytest.approx(0.02, rel=0.1)


def test_a_move_that_loses_is_rolled_back_and_not_tried_again_before_its_back_off_ends() -> None:
    steered = controller(toy_device("a"), toy_device("b"))
    slow_b(steered)
    steered.handle(done(7.0, 2))
    slow = {"a": 1.0, "b": 2.0}

    back = moved(
        feed(
            steered,
            window(9.0, 2, slowness=slow, tokens_per_s=8.0),
            window(11.0, 2, slowness=slow, tokens_per_s=8.0),
        )
    )
    assert back.is_roll_back
    assert layers(back) == {"a": 4, "b": 4}
    assert "10.0 tokens/s became 8.0 (-20.0%)" in back.reason

    quiet = [window(float(t), 3, slowness=slow) for t in range(14, 70, 2)]
    assert feed(steered, done(12.0, 3), *quiet) == []
    assert "this cut failed and is not tried again" in steered.state.why_not
    assert "this cut failed" in steered.what_if()[1]
    feed(steered, window(72.0, 3, slowness=slow))
    assert layers(moved(steered.handle(window(74.0, 3, slowness=slow)))) == {"a": 6, "b": 2}


def test_a_roll_back_that_fails_is_tried_again() -> None:
    steered = controller(toy_device("a"), toy_device("b"))
    slow_b(steered)
    steered.handle(done(7.0, 2))
    bad = [window(float(t), 2, tokens_per_s=8.0) for t in (9, 11)]
    assert moved(feed(steered, *bad)).epoch == 3

    assert steered.handle(MoveFailed(at_s=12.0, epoch=3, reason="copying took too long")) == []
    again = moved(steered.handle(Tick(at_s=13.0)))

    assert again.is_roll_back
    assert layers(again) == {"a": 4, "b": 4}


def test_the_back_off_doubles_with_every_failure_of_a_cut() -> None:
    running = fleet("a", "b")
    running.rate_of = lambda plan: 1.0 if counts_of(plan) == {"a": 4, "b": 4} else 0.5
    running.slow("b", 2.0)
    running.run(900)

    tried = [
        at_s for at_s, c in running.commands if isinstance(c, MoveLayers) and not c.is_roll_back
    ]
    waits_s = [later - sooner for sooner, later in itertools.pairwise(tried)]
    assert len(tried) == 4
    assert all(later > 1.5 * sooner for sooner, later in itertools.pairwise(waits_s))
    assert running.plan is not None
    assert counts_of(running.plan) == {"a": 4, "b": 4}


def test_windows_under_another_load_say_nothing() -> None:
    steered = controller(toy_device("a"), toy_device("b"))
    slow_b(steered)
    steered.handle(done(7.0, 2))

    idle = [window(float(t), 2, tokens_per_s=1.0, running=1.0) for t in range(9, 67, 2)]
    assert feed(steered, *idle) == []
    assert phase(steered) == "trial"
    assert steered.handle(Tick(at_s=68.0)) == []
    [record] = steered.state.moves
    assert record.outcome == "kept"
    assert record.measured_gain is None
    assert "kept unmeasured" in record.verdict


def test_a_window_that_began_before_the_move_was_done_is_not_held_against_it() -> None:
    steered = controller(toy_device("a"), toy_device("b"))
    slow_b(steered)

    bad, good = (
        [window(8.0, 2, tokens_per_s=0.0)],
        [window(10.0, 2, tokens_per_s=13.0), window(12.0, 2, tokens_per_s=13.0)],
    )
    assert feed(steered, done(7.5, 2), *bad, *good) == []
    assert steered.state.moves[0].measured_gain == pytest.approx(0.3)


def test_a_trial_is_void_when_a_device_that_kept_its_layers_changes_speed() -> None:
    devices = (toy_device("a"), toy_device("b"), toy_device("c"))
    steered = controller(*devices)
    slow = {"a": 1.0, "b": 2.0, "c": 1.0}
    command = moved(feed(steered, *(window(float(t), slowness=slow) for t in (2, 4, 6))))
    assert layers(command) == {"a": 3, "b": 2, "c": 3}
    steered.handle(done(7.0, 2))

    later = slow | {"c": 3.0}
    events = [window(float(t), 2, slowness=later, tokens_per_s=10.0) for t in (9, 11)]
    assert feed(steered, *events) == []

    [record] = steered.state.moves
    assert record.outcome == "kept"
    assert record.measured_gain is None
    assert "changed speed" in record.verdict


# Links.


def slowed_links(node: str, others: str, times: float) -> list[Link]:
    """Both directions of a node's links, so many times slower than the simulated wire."""
    return [
        Link(
            source_node=source,
            target_node=target,
            bandwidth_bytes_per_s=WIRE.bandwidth_bytes_per_s / times,
            latency_s=WIRE.latency_s,
        )
        for other in others
        for source, target in ((node, other), (other, node))
    ]


def wide_model() -> ModelProfile:
    """A row takes the wire 2 ms, less than any stage takes for it."""
    return replace(toy_model(), hidden_bytes_per_token=2000)


def test_a_link_that_gets_slow_is_crossed_no_more_after_windows_that_agree() -> None:
    running = fleet("a", "b", "c", profile=wide_model())
    assert running.plan is not None
    assert len(running.plan.stages) == 3
    for link in slowed_links("c", "ab", 50):
        running.change_link(link)

    assert running.run(WINDOW_S) == []
    move = moved(running.run(WINDOW_S))
    assert set(layers(move)) == {"a", "b"}
    running.run(60)
    assert [record.outcome for record in running.controller.state.moves][-1] == "kept"


def test_a_link_that_heals_is_crossed_again_and_then_nothing_moves() -> None:
    running = fleet("a", "b", "c", profile=wide_model())
    for link in slowed_links("c", "ab", 50):
        running.change_link(link)
    running.run(60)
    for link in slowed_links("c", "ab", 1):
        running.change_link(link)

    move = moved(running.run(60))
    assert set(layers(move)) == {"a", "b", "c"}
    assert running.run(600) == []


def test_a_link_that_changes_in_a_trial_does_not_wait_for_its_end() -> None:
    running = fleet("a", "b", "c", profile=wide_model())
    running.slow("b", 2.0)
    moved(running.run(6.0))
    running.run(1.0)
    running.running = 1.0  # a load that the trial cannot compare
    assert running.controller.state.phase == "trial"
    for link in slowed_links("c", "ab", 50):
        running.change_link(link)

    move = moved(running.run(running.settings.cool_down_s + 2 * WINDOW_S))
    assert set(layers(move)) == {"a", "b"}
    first, second = running.controller.state.moves[-2:]
    assert (first.outcome, first.verdict) == ("done", "not measured: a link changed")
    assert second.epoch == first.epoch + 1


def test_a_link_whose_figures_scatter_moves_nothing() -> None:
    running = fleet("a", "b", "c", profile=wide_model())
    for times in (1.3, 0.7, 1.4, 1.0, 0.8) * 4:
        for link in slowed_links("c", "ab", times):
            running.change_link(link)
        assert running.run(20) == []


# Joins, losses, failures.


def test_a_node_that_joins_is_used_when_it_pays() -> None:
    running = fleet("a", "b")
    running.join("c", [toy_device("c")])
    running.run(0.5)
    assert plan_commands(running.run(6.0))
    running.run(20)
    assert running.plan is not None
    assert counts_of(running.plan) == {"a": 2, "b": 3, "c": 3}

    running.join("snail", [toy_device("snail", 10.0)])
    assert plan_commands(running.run(60)) == []


def test_a_lost_node_is_planned_around_at_once() -> None:
    steered = controller(toy_device("a"), toy_device("b"), toy_device("c"))

    command = moved(steered.handle(NodeLost(at_s=1.0, node="c", reason="no heartbeat for 5 s")))

    assert command.is_recovery
    assert layers(command) == {"a": 4, "b": 4}
    assert command.reason == "stages were lost on c"
    assert steered.state.lost_devices == ("c",)


def test_a_stage_that_died_comes_back_where_it_was() -> None:
    steered = controller(toy_device("a"), toy_device("b"), toy_device("c"))

    command = moved(steered.handle(DeviceLost(at_s=1.0, device_id="b", reason="SIGKILL")))

    assert command.is_recovery
    assert layers(command) == {"a": 2, "b": 3, "c": 3}


def test_without_a_stage_left_alive_everything_is_deployed_anew() -> None:
    steered = controller(toy_device("a"), toy_device("b"))
    first = steered.handle(DeviceLost(at_s=1.0, device_id="a", reason="SIGKILL"))
    assert isinstance(first[0], MoveLayers)

    [second] = steered.handle(DeviceLost(at_s=1.1, device_id="b", reason="SIGKILL"))

    assert isinstance(second, Deploy)
    assert second.epoch == 3


def test_a_device_whose_stages_keep_dying_is_left_alone_for_a_while() -> None:
    running = fleet("a", "b", "c")
    for _ in range(3):
        running.kill_stage("b")
        running.run(4)

    assert running.plan is not None
    assert counts_of(running.plan) == {"a": 4, "c": 4}
    assert "3 stages died on it within 60 s" in running.controller.state.unused["b"]
    running.run(90)
    assert "b" in counts_of(running.plan)


def test_a_loss_in_the_middle_of_a_move_takes_its_place() -> None:
    steered = controller(toy_device("a"), toy_device("b"), toy_device("c"))
    slow = {"a": 1.0, "b": 2.0, "c": 1.0}
    move = moved(feed(steered, *(window(float(t), slowness=slow) for t in (2, 4, 6))))

    recovery = moved(steered.handle(NodeLost(at_s=6.5, node="c", reason="gone")))
    assert (move.epoch, recovery.epoch) == (2, 3)
    assert recovery.is_recovery
    assert layers(recovery) == {"a": 6, "b": 2}

    # What the move before says is void, however it ended.
    assert feed(steered, done(7.0, 2)) == []
    assert steered.handle(MoveFailed(at_s=7.0, epoch=2, reason="c is gone")) == []
    assert phase(steered) == "moving"
    assert steered.handle(done(8.0, 3)) == []
    assert steered.state.plan == recovery.plan
    assert [record.outcome for record in steered.state.moves] == ["superseded", "done"]


def test_a_loss_elsewhere_leaves_a_move_alone() -> None:
    steered = controller(toy_device("a"), toy_device("b"))
    snail = toy_device("snail", 10.0)
    steered.handle(NodeJoined(at_s=0.0, node="snail", devices=(snail,)))
    slow_b(steered)

    assert steered.handle(NodeLost(at_s=7.0, node="snail", reason="gone")) == []
    assert phase(steered) == "moving"


def test_a_move_for_gain_that_fails_is_backed_off() -> None:
    steered = controller(toy_device("a"), toy_device("b"))
    slow_b(steered)

    failed = MoveFailed(at_s=7.0, epoch=2, reason="copying took too long")
    again = [window(float(t), slowness={"b": 2.0}) for t in range(8, 60, 2)]

    assert feed(steered, failed, *again) == []
    assert steered.state.plan is not None
    assert steered.state.plan.epoch == 1
    assert steered.state.moves[0].verdict == "copying took too long"


def test_a_recovery_that_fails_is_tried_again_after_waits_that_double() -> None:
    steered = controller(toy_device("a"), toy_device("b"))
    steered.handle(NodeLost(at_s=0.0, node="b", reason="gone"))
    sent_s = []
    at_s, epoch = 0.0, 2
    for _ in range(4):
        assert steered.handle(MoveFailed(at_s=at_s, epoch=epoch, reason="disk full")) == []
        while not (commands := steered.handle(Tick(at_s=at_s))):
            at_s += 0.5
        epoch = moved(commands).epoch
        sent_s.append(at_s)

    assert sent_s == [1.0, 3.0, 7.0, 15.0]


def test_a_move_without_an_answer_is_settled_by_the_next_one() -> None:
    settings = ControllerSettings(move_deadline_s=30.0)
    steered = controller(toy_device("a"), toy_device("b"), settings=settings)
    slow_b(steered)

    assert steered.handle(Tick(at_s=36.0)) == []
    command = moved(steered.handle(Tick(at_s=36.5)))

    # Whether epoch 2 came about is not known: the cut before is asked for with an epoch of its own.
    assert command.epoch == 3
    assert layers(command) == {"a": 4, "b": 4}
    assert feed(steered, done(37.0, 2)) == []
    feed(steered, done(38.0, 3))
    assert phase(steered) == "idle"


def test_what_fits_nowhere_halts_with_the_bytes_and_goes_on_when_a_node_joins() -> None:
    small = [toy_device(each, memory_bytes=6000) for each in ("a", "b")]
    steered = controller(*small)

    [halt] = steered.handle(NodeLost(at_s=1.0, node="b", reason="no heartbeat for 5 s"))

    assert isinstance(halt, Halt)
    assert "8 layers need 8066 bytes" in halt.reason
    assert "1 devices offer 5400 bytes" in halt.reason
    assert "kv_tokens" in halt.reason
    assert "b is not used: its node b is lost: no heartbeat for 5 s" in halt.reason
    assert phase(steered) == "halted"
    assert feed(steered, Tick(at_s=2.0), Tick(at_s=30.0)) == []

    back = NodeJoined(at_s=31.0, node="b", devices=(small[1],))
    command = moved(steered.handle(back))
    assert command.is_recovery
    assert layers(command) == {"a": 4, "b": 4}
    assert phase(steered) == "moving"


def test_without_a_device_it_halts_and_says_what_is_needed() -> None:
    steered = controller(toy_device("a"))

    [halt] = steered.handle(NodeLost(at_s=1.0, node="a", reason="gone"))
    assert isinstance(halt, Halt)
    assert "8 layers need 8066 bytes (8002 of weights, 64 of KV for 8 tokens)" in halt.reason
    [command] = steered.handle(NodeJoined(at_s=2.0, node="a", devices=(toy_device("a"),)))
    assert isinstance(command, Deploy)


def test_a_node_that_joins_smaller_than_before_is_not_left_over_its_cap() -> None:
    steered = controller(toy_device("a"), toy_device("b"))
    smaller = toy_device("b", memory_bytes=3000)

    command = moved(steered.handle(NodeJoined(at_s=1.0, node="b", devices=(smaller,))))

    assert layers(command) == {"a": 6, "b": 2}
    assert "does not fit" in command.reason


def test_a_device_id_belongs_to_one_node() -> None:
    steered = controller(toy_device("a"))

    with pytest.raises(ValueError, match="device a, which is on node a; give every device its own"):
        steered.handle(NodeJoined(at_s=0.0, node="x", devices=(toy_device("a", node="x"),)))


# Drains.


def test_a_drained_node_is_released_when_it_holds_nothing() -> None:
    steered = controller(toy_device("a"), toy_device("b"), toy_device("c"))

    command = moved(steered.handle(DrainRequested(at_s=1.0, node="b")))
    assert not command.is_recovery
    assert layers(command) == {"a": 4, "c": 4}
    assert command.reason == "off b: its node b drains"
    assert steered.handle(Tick(at_s=1.5)) == []

    assert steered.handle(done(2.0, 2)) == [ReleaseNode(node="b")]
    assert feed(steered, Tick(at_s=3.0), *(window(float(t), 2) for t in range(4, 30, 2))) == []
    assert steered.state.drains == {"b": "released"}

    steered.handle(DrainCancelled(at_s=31.0, node="b"))
    joined = moved(feed(steered, window(32.0, 2), window(34.0, 2)))
    assert layers(joined) == {"a": 2, "b": 3, "c": 3}


def test_a_node_without_layers_is_released_at_once() -> None:
    steered = controller(toy_device("a"), toy_device("b"))
    steered.handle(NodeJoined(at_s=0.0, node="c", devices=(toy_device("c", 10.0),)))

    assert steered.handle(DrainRequested(at_s=1.0, node="c")) == [ReleaseNode(node="c")]
    assert steered.handle(DrainRequested(at_s=2.0, node="c")) == []
    assert steered.handle(DrainRequested(at_s=3.0, node="nowhere")) == []
    assert steered.state.why_not == "cannot drain nowhere: no such node is there"


def test_a_drain_waits_while_nothing_fits_without_the_node() -> None:
    small = [toy_device(each, memory_bytes=6000) for each in ("a", "b")]
    steered = controller(*small)

    assert feed(steered, DrainRequested(at_s=1.0, node="b"), Tick(at_s=2.0)) == []
    assert steered.state.drains["b"].startswith("waits: 8 layers need 8066 bytes")

    joined = NodeJoined(at_s=3.0, node="c", devices=(toy_device("c", memory_bytes=6000),))
    assert layers(moved(steered.handle(joined))) == {"a": 4, "c": 4}
    assert steered.handle(done(4.0, 2)) == [ReleaseNode(node="b")]


def test_a_drain_during_a_move_waits_for_it() -> None:
    steered = controller(toy_device("a"), toy_device("b"), toy_device("c"))
    slow = {"a": 1.0, "b": 2.0, "c": 1.0}
    feed(steered, *(window(float(t), slowness=slow) for t in (2, 4, 6)))

    assert steered.handle(DrainRequested(at_s=6.5, node="c")) == []
    command = moved(steered.handle(done(7.0, 2)))
    assert layers(command) == {"a": 6, "b": 2}


def test_a_node_that_is_lost_while_it_drains_is_used_again_when_it_comes_back() -> None:
    steered = controller(toy_device("a"), toy_device("b"))
    steered.handle(DrainRequested(at_s=1.0, node="b"))
    steered.handle(NodeLost(at_s=2.0, node="b", reason="switched off"))
    assert steered.state.drains == {}


# Lanes.


def test_lanes_follow_the_stages_where_allowed() -> None:
    settings = ControllerSettings(max_lanes=8, block_tokens=1)
    workload = replace(WORKLOAD, lanes=2, sequences_per_lane=4, step_tokens=8)
    # Bound by compute, and two layers to a device: four stages, of which two lanes keep two busy.
    devices = [replace(toy_device(each, memory_bytes=3000), flops_per_s=10.0) for each in "abcd"]
    steered = Controller(toy_model(), Topology(devices=tuple(devices)), workload, settings)
    steered.handle(Tick(at_s=0.0))

    [command] = steered.handle(done(1.0, 1))

    assert isinstance(command, ChangeLanes)
    assert command.num_lanes == 4
    assert "; 2 give" in command.reason
    assert steered.state.num_lanes == 2, "it is not known whether they came up"
    assert steered.handle(LanesChanged(at_s=1.5, num_lanes=4)) == []
    assert steered.state.num_lanes == 4
    assert feed(steered, *(window(float(t)) for t in range(2, 20, 2))) == []


def test_the_first_window_and_a_request_look_at_the_lanes_too() -> None:
    settings = ControllerSettings(max_lanes=8, block_tokens=1)
    workload = replace(WORKLOAD, lanes=2, sequences_per_lane=4, step_tokens=8)
    devices = [replace(toy_device(each, memory_bytes=3000), flops_per_s=10.0) for each in "abcd"]
    topology = Topology(devices=tuple(devices))
    in_force = replace(plan_stages(toy_model(), topology, workload=workload), epoch=1)
    steered = Controller(toy_model(), topology, workload, settings, in_force)

    [first] = steered.handle(window(2.0))
    assert isinstance(first, ChangeLanes)
    assert first.num_lanes == 4
    # They did not come up: not asked for in every window, but when somebody asks.
    assert steered.handle(LanesChanged(at_s=2.5, num_lanes=2)) == []
    assert feed(steered, *(window(float(t)) for t in range(4, 20, 2))) == []
    assert steered.handle(PlanRequested(at_s=21.0)) == [first]


# A move that leaves nothing in force.


def test_a_move_that_ends_half_way_is_made_good_at_once() -> None:
    steered = controller(toy_device("a"), toy_device("b"), toy_device("c"))
    slow = {"a": 1.0, "b": 2.0, "c": 1.0}
    moved(feed(steered, *(window(float(t), slowness=slow) for t in (2, 4, 6))))

    failed = MoveFailed(at_s=7.0, epoch=2, reason="too late", stands_still=True)
    command = moved(steered.handle(failed))

    assert command.epoch == 3
    assert command.is_recovery
    assert command.recompute_kv


# Ship KV, or compute it again.


@pytest.mark.parametrize(("bytes_per_s", "recomputes"), [(1e2, True), (1e9, False)])
def test_kv_is_computed_again_where_shipping_it_takes_longer(
    bytes_per_s: float, recomputes: bool
) -> None:
    workload = replace(WORKLOAD, context_tokens_per_sequence=50, kv_tokens=400, step_tokens=64)
    topology = Topology(
        devices=tuple(toy_device(each) for each in "abc"),
        default_link=LinkRate(bandwidth_bytes_per_s=bytes_per_s, latency_s=1e-5),
    )
    in_force = replace(plan_stages(toy_model(), topology, workload=workload), epoch=1)
    steered = Controller(toy_model(), topology, workload, ControllerSettings(), in_force)
    for at_s in (2, 4, 6):
        assert steered.handle(window(float(at_s))) == []

    command = moved(steered.handle(DrainRequested(at_s=7.0, node="c")))

    assert not command.is_recovery
    assert command.recompute_kv is recomputes


# Values.


def test_equal_devices_on_a_node_keep_their_layers_when_another_is_lost() -> None:
    devices = [toy_device(f"a{i}", node="a") for i in range(4)]
    settings = ControllerSettings(device_order="free")
    steered = controller(*devices, settings=settings)
    before = steered.state.plan
    assert before is not None

    command = moved(steered.handle(DeviceLost(at_s=1.0, device_id="a0", reason="SIGKILL")))

    assert [s.device_id for s in command.plan.stages] == [s.device_id for s in before.stages]


def test_a_slowed_device_takes_longer_for_everything_it_computes() -> None:
    device = toy_device("a")

    assert slowed(device, 1.0) is device
    assert slowed(device, 2.0).memory_bytes_per_s == device.memory_bytes_per_s / 2
    assert slowed(device, 2.0).flops_per_s == device.flops_per_s / 2


def test_slowness_takes_a_change_whole_and_smooths_noise() -> None:
    speeds = Speeds(ControllerSettings())

    def see(factor: float) -> float:
        seen = StageMeasurement(device_id="a", steps=100, busy_s=factor, predicted_s=1.0)
        speeds.observe(seen, now_s=0.0)
        return speeds.measured()["a"]

    assert see(2.0) == 1.0
    assert see(2.0) == 2.0
    assert see(2.2) == 2.0
    assert see(2.2) == pytest.approx(2.0 + 0.3 * 0.2)
    assert speeds.factor("unknown") == 1.0


def test_a_device_that_is_well_again_is_found_out_though_it_has_no_layers() -> None:
    it = fleet("a", "b", "c", settings=ControllerSettings(forgive_s=60.0))
    it.slow("c", 20.0)
    it.run(30)
    assert it.plan is not None
    assert "c" not in counts_of(it.plan)

    it.slow("c", 1.0)
    it.run(90)

    assert counts_of(it.plan)["c"] > 0


def test_a_device_that_stays_slow_is_tried_ever_more_seldom() -> None:
    it = fleet("a", "b", "c", settings=ControllerSettings(forgive_s=60.0, backoff_s=1.0))
    it.slow("c", 20.0)
    it.run(30)
    before = len(plan_commands(it.controller.handle(Tick(at_s=it.now_s)))) + len(it.commands)
    it.run(3600)

    # Waits of 60, 120, ... 1920 s: five of them pass in an hour, each with a way there and back.
    assert len(it.commands) - before <= 2 * 5
    assert it.plan is not None
    assert "c" not in counts_of(it.plan)


def test_a_log_replays_to_the_same_commands_after_json() -> None:
    running = SimulatedFleet([[toy_device("a")], [toy_device("b")], [toy_device("c")]])
    running.run(10)
    running.slow("b", 2.0)
    running.run(20)
    running.handle(DrainRequested(at_s=running.now_s, node="c"))
    running.run(5)
    running.lose_node("b")
    running.run(5)
    running.join("b", [toy_device("b")], [link("b", "a")])
    running.change_link(link("a", "b"))
    running.kill_stage("a")
    running.run(20)
    assert len(plan_commands(command for _, command in running.commands)) >= 5
    lines = [json.dumps(running.opening.to_json())]
    lines += [json.dumps(entry.to_json()) for entry in running.log]

    opening = Opening.from_json(json.loads(lines[0]))
    entries = [LogEntry.from_json(json.loads(line)) for line in lines[1:]]
    again = Controller(opening.profile, opening.topology, opening.workload, opening.settings)

    assert opening == running.opening
    assert entries == running.log
    assert replay(again, entries) == ""
    assert again.state == running.controller.state
    json.dumps(again.state.to_json())


def test_a_replay_names_the_first_difference() -> None:
    steered = controller(toy_device("a"), toy_device("b"), is_deployed=False)
    entry = LogEntry(event=Tick(at_s=1.0), commands=())

    assert replay(steered, [entry]) == (
        "entry 0 (Tick at 1 s) now gives ['Deploy'] and the log has none"
    )


def link(source_node: str, target_node: str) -> Link:
    return Link(
        source_node=source_node,
        target_node=target_node,
        bandwidth_bytes_per_s=2e6,
        latency_s=1e-4,
    )


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ({"kind": "Tock", "at_s": 1.0}, "unknown event 'Tock'; known are NodeJoined"),
        ({"kind": "Tick", "at_s": "now"}, r"Tick.at_s \('now'\) must be float"),
        ({"kind": "Tick", "at_s": 1.0, "x": 1}, r"unknown keys \['x'\]; known keys: at_s"),
        ({"kind": "Tick"}, "Tick lacks at_s"),
        ({"kind": "Tick", "at_s": float("inf")}, "must be float"),
        (
            {"kind": "NodeJoined", "at_s": 0.0, "node": "a", "devices": {}},
            "NodeJoined.devices is dict, not a list",
        ),
    ],
)
def test_an_event_that_cannot_be_is_refused(value: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        LogEntry.from_json({"event": value, "commands": []})


def test_a_command_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown command None"):
        LogEntry.from_json({"event": {"kind": "Tick", "at_s": 1.0}, "commands": [{}]})


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ({"objective": "speed"}, "objective .'speed'. must be one of throughput"),
        ({"cool_down_s": 0.0}, r"cool_down_s \(0.0\) must be above 0"),
        ({"confirm_windows": 0}, r"confirm_windows \(0\) must be at least 1"),
        ({"headroom_fraction": 0.05}, r"headroom_fraction \(0.05\) must be from 0.1 to 0.99"),
        ({"keep_fraction": 1.5}, r"keep_fraction \(1.5\) must be from 0 to 1"),
        ({"max_lanes": 0}, r"max_lanes \(0\) must be at least 1"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(setting: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ControllerSettings(**setting)


def test_a_node_joins_with_devices_of_its_own() -> None:
    with pytest.raises(ValueError, match="node x joins with device a of node a"):
        NodeJoined(at_s=0.0, node="x", devices=(toy_device("a"),))


def test_plans_over_devices_of_unknown_power_leave_them_out_of_the_energy_objective() -> None:
    frugal = replace(toy_device("a"), active_power_w=10.0)
    topology = Topology(devices=(frugal, toy_device("b")))
    settings = ControllerSettings(objective="energy")
    steered = Controller(toy_model(), topology, WORKLOAD, settings)

    [command] = steered.handle(Tick(at_s=0.0))

    assert layers(command) == {"a": 8}
    assert "active_power_w is not known" in steered.state.unused["b"]


def test_the_simulated_fleet_refuses_a_plan_over_a_cap() -> None:
    tight = SimulatedFleet([[toy_device("a", memory_bytes=100)]])
    roomy = Topology(devices=(toy_device("a"),))
    plan: StagesPlan = plan_stages(toy_model(), roomy, workload=WORKLOAD)

    with pytest.raises(AssertionError):
        check_plan(tight, plan)
    assert halts(tight.run(1.0))
