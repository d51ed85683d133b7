"""The rebalancer of experts, alone and against a fleet that fails at random."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from placement.experts import ExpertDevice, plan_experts
from placement.moving.moves import Move, Piece, Release
from placement.sharding.decision import RebalanceSettings
from placement.sharding.expert_map import ExpertMap
from placement.sharding.loads import LoadSummary
from placement.sharding.rebalance_values import (
    CopyDone,
    CopyFailed,
    ExpertCommand,
    ExpertDeviceJoined,
    ExpertDeviceLeaving,
    ExpertDeviceLost,
    HaltExperts,
    LoadsMeasured,
    MapInForce,
    MapRefused,
    RebalanceRequested,
    StepsDone,
    UseMap,
)
from placement.sharding.rebalancer import ExpertRebalancer

NUM_LAYERS, NUM_EXPERTS, EXPERT_BYTES, BUDGET_BYTES = 2, 8, 100, 130
ZIPF = 100.0 / np.arange(1, NUM_EXPERTS + 1)


def device(name: str, *, slots: int = 5, speed: float = 1.0, node: str = "x") -> ExpertDevice:
    return ExpertDevice(id=name, node=node, rows_per_s=speed, slots_per_layer=slots)


FLEET = [device("a", speed=2.0), device("b", node="y"), device("c", node="y", slots=4)]
"""Two of them hold a copy of every expert."""


def measured(rows_LE: Any, *, drift: float = 0.0, steps: int = 100) -> LoadsMeasured:
    rows = np.array(rows_LE, dtype=np.float64)
    num_steps = np.full(len(rows), steps)
    return LoadsMeasured(
        summary=LoadSummary(
            steps_L=num_steps,
            mean_rows_LE=rows,
            recent_rows_LE=rows,
            recent_steps_L=num_steps,
            drift_L=np.full(len(rows), drift),
        )
    )


def rebalancer(**changes: Any) -> ExpertRebalancer:
    rows = np.array([ZIPF] * NUM_LAYERS)
    plan = plan_experts(rows, FLEET, expert_bytes=EXPERT_BYTES)
    fields: dict[str, Any] = {
        "expert_bytes": EXPERT_BYTES,
        "copy_bytes_per_s": 1e6,
        "step_budget_bytes": BUDGET_BYTES,
        "cool_down_steps": 10,
    }
    current = ExpertMap.from_plan(plan, FLEET, checkpoint="c", version=7)
    return ExpertRebalancer(current, RebalanceSettings(**fields | changes))


class Fleet:
    """Does what it is told, in memory."""

    def __init__(self, of: ExpertRebalancer) -> None:
        self.of = of
        self.bytes_of: dict[tuple[str, Piece], int] = {
            (device_id, Piece(part="expert", layer=layer, expert=expert)): EXPERT_BYTES
            for device_id in of.map.device_ids
            for layer, experts in enumerate(of.map.held(device_id))
            for expert in experts
        }
        self.moves: list[Move] = []
        self.told: UseMap | None = None
        self.commands: list[ExpertCommand] = []

    def tell(self, event: Any) -> list[ExpertCommand]:
        commands = self.of.handle(event)
        self.commands += commands
        for command in commands:
            match command:
                case Move():
                    self.moves.append(command)
                case Release():
                    self.bytes_of.pop((command.device_id, command.piece), None)
                    self.moves = [
                        move
                        for move in self.moves
                        if (move.target, move.piece) != (command.device_id, command.piece)
                    ]
                case UseMap():
                    self.told = command
                case HaltExperts():
                    self.told = None
        return commands

    def copy(self, move: Move) -> list[ExpertCommand]:
        self.moves.remove(move)
        key = (move.target, move.piece)
        assert move.source is None or self.bytes_of.get((move.source, move.piece)) == EXPERT_BYTES
        assert self.bytes_of.get(key, 0) == move.first_byte
        self.bytes_of[key] = move.first_byte + move.num_bytes
        return self.tell(CopyDone(move=move))

    def use_map(self) -> list[ExpertCommand]:
        assert self.told is not None
        told, self.told = self.told, None
        return self.tell(MapInForce(version=told.map.version))

    def settle(self, most_steps: int = 200) -> None:
        for _ in range(most_steps):
            while self.moves:
                self.copy(self.moves[0])
            if self.told:
                self.use_map()
            elif not self.of.is_moving:
                return
            else:
                self.tell(StepsDone())
        raise AssertionError("the rebalancing does not end")


def test_a_rebalancing_swaps_layer_by_layer_and_ends_near_the_bound() -> None:
    fleet = Fleet(rebalancer())
    later = [ZIPF, ZIPF[::-1]]
    assert fleet.tell(measured(later)) == []
    fleet.settle()
    maps = [command.map for command in fleet.commands if isinstance(command, UseMap)]
    assert [made.version for made in maps] == list(range(8, 8 + len(maps)))
    assert all(made.layers[0] == maps[0].layers[0] for made in maps)
    assert fleet.of.last_decision is not None
    moved = sum(command.num_bytes for command in fleet.commands if isinstance(command, Move))
    assert moved == fleet.of.last_decision.moved_bytes
    fleet.tell(StepsDone(steps=10))
    fleet.tell(measured(later))
    assert fleet.of.last_decision.imbalance < 1.05


def test_a_step_copies_no_more_than_its_budget() -> None:
    fleet = Fleet(rebalancer())
    fleet.tell(measured([ZIPF[::-1], ZIPF[::-1]]))
    first = fleet.tell(StepsDone())
    assert sum(move.num_bytes for move in first if isinstance(move, Move)) <= BUDGET_BYTES
    # Nothing more until what was asked for is there.
    assert fleet.tell(StepsDone()) == []


def test_a_failed_copy_keeps_the_map_and_releases_what_came() -> None:
    fleet = Fleet(rebalancer(staging_slots=2))
    before = fleet.of.map
    fleet.tell(measured([ZIPF[::-1], ZIPF]))
    fleet.tell(StepsDone())
    *_, last = fleet.moves
    commands = fleet.tell(CopyFailed(move=last, reason="the link broke"))
    assert commands
    assert all(isinstance(command, Release) for command in commands)
    assert (fleet.of.map, fleet.of.is_moving) == (before, False)
    # And not again at once.
    fleet.tell(measured([ZIPF[::-1], ZIPF]))
    assert not fleet.of.is_moving


def test_a_refused_map_leaves_the_one_before() -> None:
    fleet = Fleet(rebalancer())
    before = fleet.of.map
    fleet.tell(measured([ZIPF[::-1], ZIPF]))
    while not fleet.told:
        fleet.tell(StepsDone())
        while fleet.moves:
            fleet.copy(fleet.moves[0])
    told = fleet.told.map.version
    fleet.tell(MapRefused(version=told, reason="another checkpoint"))
    assert (fleet.of.map, fleet.of.is_moving) == (before, False)
    # A version is never used twice.
    [command] = fleet.tell(ExpertDeviceLost(device_id="c", reason="killed"))
    assert isinstance(command, UseMap)
    assert command.map.version > told


def test_a_lost_device_gives_a_map_at_once_and_reloads_from_the_checkpoint() -> None:
    fleet = Fleet(rebalancer())
    lost = fleet.of.map.held("a")
    fleet.bytes_of = {key: size for key, size in fleet.bytes_of.items() if key[0] != "a"}
    [told] = fleet.tell(ExpertDeviceLost(device_id="a", reason="killed"))
    assert isinstance(told, UseMap)
    assert told.is_recovery
    assert told.map.device_ids == ("b", "c")
    missing = fleet.of.missing
    assert missing
    commands = fleet.use_map()
    moves = [command for command in commands if isinstance(command, Move)]
    assert {(move.target, move.piece) for move in moves} == set(missing)
    assert all(move.source is None and move.is_last for move in moves)
    assert {piece.expert for _, piece in missing} <= lost[0] | lost[1]
    fleet.settle()
    assert fleet.of.missing == ()


def test_too_few_slots_halt_until_a_device_joins() -> None:
    fleet = Fleet(rebalancer())
    fleet.tell(ExpertDeviceLost(device_id="a", reason="killed"))
    fleet.bytes_of = {key: size for key, size in fleet.bytes_of.items() if key[0] == "c"}
    [halt] = fleet.tell(ExpertDeviceLost(device_id="b", reason="killed"))
    assert isinstance(halt, HaltExperts)
    assert "1 expert devices offer 4 slots a layer" in halt.reason
    [told] = fleet.tell(ExpertDeviceJoined(device=device("d", slots=4)))
    assert isinstance(told, UseMap)
    fleet.settle()
    assert fleet.of.halted is None
    assert fleet.of.missing == ()


def test_other_rates_give_other_weights_and_a_plan() -> None:
    fleet = Fleet(rebalancer())
    before = fleet.of.map
    slow = device("a", speed=0.5)
    [told] = fleet.tell(ExpertDeviceJoined(device=slow))
    assert isinstance(told, UseMap)
    assert not told.is_recovery
    assert "a has other figures; 0 experts are read again" in told.reason
    assert told.map.devices[0] == slow
    assert [layer.experts for layer in told.map.layers] == [
        layer.experts for layer in before.layers
    ]
    fleet.use_map()
    # Planned anew, though nothing else asks for it.
    fleet.tell(measured([ZIPF] * NUM_LAYERS))
    assert fleet.of.last_decision is not None
    assert "copies in" in fleet.of.last_decision.reason


def test_a_refused_join_leaves_the_fleet_as_it_was() -> None:
    fleet = Fleet(rebalancer())
    [told] = fleet.tell(ExpertDeviceJoined(device=device("d")))
    assert isinstance(told, UseMap)
    assert fleet.tell(MapRefused(version=told.map.version, reason="d is of another version")) == []
    assert fleet.of.halted is None
    [again] = fleet.tell(ExpertDeviceLost(device_id="c", reason="killed"))
    assert isinstance(again, UseMap)
    assert again.map.device_ids == ("a", "b")


def test_a_device_whose_map_was_refused_for_another_ones_sake_is_asked_again() -> None:
    fleet = Fleet(rebalancer())
    fleet.tell(ExpertDeviceLost(device_id="c", reason="killed"))
    fleet.bytes_of = {key: size for key, size in fleet.bytes_of.items() if key[0] != "c"}
    fleet.use_map()
    fleet.settle()
    [told] = fleet.tell(ExpertDeviceJoined(device=FLEET[2]))
    assert isinstance(told, UseMap)
    # While it is prepared another one dies.
    fleet.told = None
    fleet.tell(MapRefused(version=told.map.version, reason="b is gone"))
    fleet.tell(ExpertDeviceLost(device_id="b", reason="killed"))
    fleet.bytes_of = {key: size for key, size in fleet.bytes_of.items() if key[0] != "b"}

    assert fleet.of.halted is None
    fleet.settle()
    assert set(fleet.of.map.device_ids) == {"a", "c"}


def test_a_device_whose_maps_are_always_refused_is_asked_a_few_times() -> None:
    fleet = Fleet(rebalancer())
    fleet.tell(ExpertDeviceJoined(device=device("d")))
    num_offers = 0
    for _ in range(20):
        if fleet.told and "d" in fleet.told.map.device_ids:
            num_offers += 1
            version, fleet.told = fleet.told.map.version, None
            fleet.tell(MapRefused(version=version, reason="d is of another version"))
        else:
            fleet.tell(ExpertDeviceJoined(device=device("a", speed=1.0 + 0.1 * num_offers)))
            fleet.use_map()
    assert num_offers == 4


def test_a_device_that_is_back_gets_experts_though_no_loads_are_measured() -> None:
    fleet = Fleet(rebalancer())
    fleet.tell(ExpertDeviceLost(device_id="c", reason="killed"))
    fleet.bytes_of = {key: size for key, size in fleet.bytes_of.items() if key[0] != "c"}
    fleet.use_map()
    fleet.settle()
    fleet.tell(ExpertDeviceJoined(device=FLEET[2]))
    fleet.use_map()
    assert not any(device_id == "c" for device_id, _ in fleet.bytes_of)

    fleet.tell(StepsDone(steps=20))
    fleet.settle()

    assert any(device_id == "c" for device_id, _ in fleet.bytes_of)


def test_a_reload_that_keeps_failing_gives_its_device_up() -> None:
    fleet = Fleet(rebalancer(max_reload_attempts=2))
    fleet.tell(ExpertDeviceLost(device_id="a", reason="killed"))
    move = next(command for command in fleet.use_map() if isinstance(command, Move))
    [again] = fleet.tell(CopyFailed(move=move, reason="bad disk"))
    assert again == move
    [halt] = fleet.tell(CopyFailed(move=move, reason="bad disk"))
    assert isinstance(halt, HaltExperts)
    assert "could not be loaded 2 times" in halt.reason


def reloading() -> Fleet:
    """Survivors that read again what was lost, when a device joins that can hold it."""
    fleet = Fleet(rebalancer())
    fleet.tell(ExpertDeviceLost(device_id="a", reason="killed"))
    fleet.bytes_of = {key: size for key, size in fleet.bytes_of.items() if key[0] != "a"}
    assert any(isinstance(command, Move) for command in fleet.use_map())
    fleet.tell(ExpertDeviceJoined(device=device("j", slots=6)))
    for each in ("b", "c"):
        fleet.tell(ExpertDeviceJoined(device=device(each, slots=2)))
    return fleet


def test_a_reload_that_is_not_wanted_any_more_is_given_up_when_it_comes() -> None:
    fleet = reloading()
    fleet.use_map()
    fleet.settle()
    for each in ("b", "c"):
        assert sum(1 for held in fleet.bytes_of if held[0] == each) <= 2 * NUM_LAYERS
    assert not fleet.of.missing


def test_a_reload_that_is_not_wanted_any_more_may_fail() -> None:
    fleet = reloading()
    missing = set(fleet.of.missing)
    stale = [move for move in fleet.moves if (move.target, move.piece) not in missing]
    assert stale
    for move in stale:
        fleet.moves.remove(move)
        assert fleet.tell(CopyFailed(move=move, reason="failed")) == []


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_device_that_leaves_serves_until_others_have_what_it_holds(name: str) -> None:
    fleet = Fleet(rebalancer())
    fleet.tell(ExpertDeviceLeaving(device_id=name))
    versions = []
    while fleet.told or fleet.moves:
        # No expert is ever missing, and no step has to be done for it.
        assert fleet.of.missing == ()
        if fleet.moves:
            fleet.copy(fleet.moves[0])
        else:
            assert fleet.told is not None
            assert not fleet.told.is_recovery
            versions.append(fleet.told.map.version)
            fleet.use_map()

    assert fleet.of.leaving == frozenset()
    assert name not in fleet.of.map.device_ids
    assert not any(device_id == name for device_id, _ in fleet.bytes_of)
    assert versions == sorted(set(versions))
    # It is not used again, whatever the load, until it joins.
    fleet.tell(measured([ZIPF[::-1], ZIPF]))
    fleet.settle()
    assert name not in fleet.of.map.device_ids
    fleet.tell(ExpertDeviceJoined(device=next(one for one in FLEET if one.id == name)))
    fleet.use_map()
    assert name in fleet.of.map.device_ids


def test_a_device_stays_while_the_others_cannot_hold_every_expert() -> None:
    fleet = Fleet(rebalancer())
    fleet.tell(ExpertDeviceLeaving(device_id="a"))
    fleet.settle()
    assert fleet.tell(ExpertDeviceLeaving(device_id="b")) == []
    assert (fleet.of.halted, fleet.of.leaving) == (None, frozenset({"b"}))
    # Another one joins.
    fleet.tell(ExpertDeviceJoined(device=device("d", slots=4)))
    while fleet.told or fleet.moves:
        fleet.use_map() if fleet.told else fleet.copy(fleet.moves[0])
    assert set(fleet.of.map.device_ids) == {"c", "d"}


def test_a_device_that_leaves_and_is_wanted_after_all_stays() -> None:
    fleet = Fleet(rebalancer())
    before = fleet.of.map
    fleet.tell(ExpertDeviceLeaving(device_id="a"))
    assert fleet.moves
    fleet.tell(ExpertDeviceJoined(device=FLEET[0]))
    fleet.settle()
    assert fleet.of.leaving == frozenset()
    assert set(fleet.of.map.device_ids) == set(before.device_ids)


def test_a_failed_copy_is_tried_again_for_a_device_that_leaves() -> None:
    fleet = Fleet(rebalancer())
    fleet.tell(ExpertDeviceLeaving(device_id="a"))
    failed = fleet.moves.pop(0)
    fleet.tell(CopyFailed(move=failed, reason="the disk is slow"))
    assert fleet.of.leaving == frozenset({"a"})
    assert not fleet.of.is_moving
    # After a while, and not at once.
    assert fleet.tell(StepsDone(steps=9)) == []
    fleet.tell(StepsDone())
    fleet.settle()
    assert "a" not in fleet.of.map.device_ids


def test_loads_are_not_believed_before_enough_steps_nor_when_malformed() -> None:
    one = rebalancer()
    one.handle(measured([ZIPF[::-1], ZIPF], steps=3))
    assert one.last_decision is None
    with pytest.raises(ValueError, match=r"loads have shape \(1, 8\); the map has 2 layers"):
        one.handle(measured([ZIPF]))


def test_weights_follow_a_small_change_without_moving_a_byte() -> None:
    fleet = Fleet(rebalancer(least_imbalance=10.0))
    [told] = fleet.tell(measured([ZIPF, ZIPF * np.where(np.arange(NUM_EXPERTS) == 0, 1.4, 1.0)]))
    assert isinstance(told, UseMap)
    assert [layer.experts for layer in told.map.layers] == [
        layer.experts for layer in fleet.of.map.layers
    ]


class RebalancingMachine(RuleBasedStateMachine):
    """Loads, losses, joins and failures in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.fleet = Fleet(rebalancer(cool_down_steps=1))
        self.of = self.fleet.of
        self.alive = {one.id: one for one in FLEET}
        self.leaving: set[str] = set()
        self.refused: dict[str, ExpertDevice] = {}
        """Alive, and not in use since their map was refused; they are asked for again."""
        self.num_joined = 0
        self.step_bytes = 0
        self.versions = [self.of.map.version]

    def note(self, commands: list[ExpertCommand]) -> None:
        for command in commands:
            if isinstance(command, UseMap):
                # Validated as a whole by its type; versions only grow.
                assert command.map.version > self.versions[-1]
                self.versions.append(command.map.version)
                named = set(command.map.device_ids)
                for each in named & self.refused.keys():
                    self.alive[each] = self.refused.pop(each)
                assert self.alive.keys() - self.leaving <= named <= self.alive.keys()
            if isinstance(command, Move):
                assert command.target in self.alive
                is_reload = (command.target, command.piece) in self.of.missing
                is_urgent = is_reload or bool(self.of.leaving)
                self.step_bytes += 0 if is_urgent else command.num_bytes
        assert self.step_bytes <= BUDGET_BYTES

    @rule(seed=st.integers(0, 99), drift=st.sampled_from([0.0, 0.5]))
    def measure(self, seed: int, drift: float) -> None:
        rows = np.random.default_rng(seed).permuted([ZIPF] * NUM_LAYERS, axis=1)
        self.note(self.fleet.tell(measured(rows, drift=drift)))

    @rule()
    def request(self) -> None:
        self.note(self.fleet.tell(RebalanceRequested()))

    @rule()
    def step(self) -> None:
        self.step_bytes = 0
        self.note(self.fleet.tell(StepsDone()))

    @rule(cycles=st.integers(1, 12))
    def go_on(self, cycles: int) -> None:
        """Steps in which nothing fails."""
        for _ in range(cycles):
            self.step()
            for move in tuple(self.fleet.moves):
                self.note(self.fleet.copy(move))
            if self.fleet.told:
                self.note(self.fleet.use_map())
            self.every_expert_of_the_map_in_force_is_whole_or_on_its_way()
            self.memory_holds_slots_and_staging()

    @precondition(lambda self: self.fleet.moves)
    @rule(data=st.data())
    def copy(self, data: st.DataObject) -> None:
        self.note(self.fleet.copy(data.draw(st.sampled_from(self.fleet.moves))))

    @precondition(lambda self: self.fleet.moves)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        move = data.draw(st.sampled_from(self.fleet.moves))
        self.fleet.moves.remove(move)
        before = self.of.map
        is_reload = (move.target, move.piece) in self.of.missing
        if is_reload:
            # Given up as a device: the executor sees it in the next map.
            commands = self.fleet.tell(CopyFailed(move=move, reason="failed"))
            if any(isinstance(command, UseMap | HaltExperts) for command in commands):
                self.forget(move.target)
            self.note(commands)
        else:
            self.note(self.fleet.tell(CopyFailed(move=move, reason="failed")))
            assert self.of.map == before

    @precondition(lambda self: self.fleet.told)
    @rule()
    def use(self) -> None:
        self.note(self.fleet.use_map())

    @precondition(lambda self: self.fleet.told and not self.fleet.told.is_recovery)
    @rule()
    def refuse(self) -> None:
        assert self.fleet.told is not None
        told, self.fleet.told = self.fleet.told, None
        before = self.of.map
        self.note(self.fleet.tell(MapRefused(version=told.map.version, reason="refused")))
        assert self.of.map == before
        # Devices that joined with it are not part of the fleet, and rates are those of before.
        gone = self.leaving - set(before.device_ids)
        others = {i: one for i, one in self.alive.items() if i not in before.device_ids}
        self.refused |= {i: one for i, one in others.items() if i not in gone}
        self.alive = {i: one for i, one in others.items() if i in gone} | {
            one.id: one for one in before.devices
        }

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        lost = data.draw(st.sampled_from(sorted(self.alive)))
        self.forget(lost)
        self.note(self.fleet.tell(ExpertDeviceLost(device_id=lost, reason="killed")))

    def forget(self, lost: str) -> None:
        del self.alive[lost]
        fleet = self.fleet
        fleet.bytes_of = {key: size for key, size in fleet.bytes_of.items() if key[0] != lost}
        fleet.moves = [move for move in fleet.moves if lost not in (move.target, move.source)]

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        left = data.draw(st.sampled_from(sorted(self.alive)))
        self.leaving.add(left)
        self.note(self.fleet.tell(ExpertDeviceLeaving(device_id=left)))

    @precondition(lambda self: len(self.alive) < 4)
    @rule(
        slots=st.integers(3, 6), speed=st.sampled_from([0.5, 1.0, 3.0]), node=st.sampled_from("xy")
    )
    def join(self, slots: int, speed: float, node: str) -> None:
        self.num_joined += 1
        new = device(f"j{self.num_joined}", slots=slots, speed=speed, node=node)
        self.alive[new.id] = new
        self.note(self.fleet.tell(ExpertDeviceJoined(device=new)))

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), speed=st.sampled_from([0.3, 1.0, 4.0]), slots=st.integers(3, 6))
    def remeasure(self, data: st.DataObject, speed: float, slots: int) -> None:
        old = self.alive[data.draw(st.sampled_from(sorted(self.alive)))]
        new = device(old.id, slots=slots, speed=speed, node=old.node)
        self.alive[new.id] = new
        self.leaving.discard(new.id)
        self.note(self.fleet.tell(ExpertDeviceJoined(device=new)))

    @invariant()
    def every_expert_of_the_map_in_force_is_whole_or_on_its_way(self) -> None:
        if self.of.halted or self.of.newest is not self.of.map:
            return
        missing = set(self.of.missing)
        asked = {(move.target, move.piece) for move in self.fleet.moves}
        for device_id in self.of.map.device_ids:
            for layer, experts in enumerate(self.of.map.held(device_id)):
                for expert in experts:
                    key = (device_id, Piece(part="expert", layer=layer, expert=expert))
                    is_whole = self.fleet.bytes_of.get(key) == EXPERT_BYTES
                    assert is_whole != (key in missing)
                    assert is_whole or key in asked

    @invariant()
    def what_is_held_is_what_the_fleet_holds(self) -> None:
        whole: dict[tuple[str, int], set[int]] = defaultdict(set)
        for (device_id, piece), size in self.fleet.bytes_of.items():
            if size == EXPERT_BYTES:
                whole[device_id, piece.layer].add(piece.expert)
        for device_id in self.alive:
            for layer in range(NUM_LAYERS):
                assert self.of.holds(device_id, layer) == whole[device_id, layer]

    @invariant()
    def memory_holds_slots_and_staging(self) -> None:
        # A told map counts with the one before: calls in flight still use that one.
        if self.of.halted or self.of.newest is not self.of.map or self.of.missing:
            return
        for one in self.alive.values():
            held = sum(1 for key in self.fleet.bytes_of if key[0] == one.id)
            assert held <= one.slots_per_layer * NUM_LAYERS + 1

    @invariant()
    def nothing_half_loaded_is_left_behind(self) -> None:
        if not self.of.is_moving and not self.fleet.moves:
            assert set(self.fleet.bytes_of.values()) <= {EXPERT_BYTES}

    @invariant()
    def it_halts_exactly_when_the_slots_do_not_hold_every_expert(self) -> None:
        in_use = [one for one in self.of._devices if one.id in self.alive]
        num_slots = sum(one.slots_per_layer for one in in_use)
        assert self.alive.keys() - self.leaving <= {one.id for one in in_use}
        assert bool(self.of.halted) == (num_slots < NUM_EXPERTS)


RebalancingMachine.TestCase.settings = hypothesis_settings(
    max_examples=60, stateful_step_count=40, deadline=None
)
TestRebalancing = RebalancingMachine.TestCase
