from __future__ import annotations

import itertools
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published_profiles import GPT_OSS_20B, QWEN3_1_7B, TIERS, PublishedProfile
from slot_executor import Run, SlotExecutor
from training_pools import pools

from placement.dispatch import Assignment, SlotDispatcher
from placement.errors import InfeasiblePlanError, NoDeviceError
from placement.pooling.averages import SlotAverages
from placement.simulate import simulate_slots, steady_state
from placement.train import TrainPlan, plan_cut, plan_train
from placement.training import RecomputeGrain, TrainingCosts, slots_from_counts

QUICK = 100_000


def planned(costs: TrainingCosts, **options: Any) -> TrainPlan:
    settings: dict[str, Any] = {"micro_batches": 9, "rounds_per_step": 2, "search_effort": QUICK}
    return plan_train(costs, **(settings | options))


def small(num_devices: int = 2, **changes: Any) -> tuple[TrainPlan, TrainingCosts]:
    """Three slots of 4, 4.5 and 8 s a micro-batch, two micro-batches a round."""
    costs = TrainingCosts.uniform(
        num_devices=num_devices, num_layers=4, forward_s=1.0, backward_s=1.0, head_forward_s=1.5,
        head_backward_s=3.0, hand_off_s=0.1, **changes,
    )  # fmt: skip
    slots = slots_from_counts([4], 0, [4])
    return plan_cut(costs, slots, micro_batches=2, rounds_per_step=2), costs


def simulated_s_per_round(plan: TrainPlan, costs: TrainingCosts, first: int, end: int) -> float:
    """What placement.simulate says of the same rounds."""
    ends_s: dict[int, float] = defaultdict(float)
    for event in simulate_slots(costs, plan.schedule(costs), rounds=end).events:
        ends_s[event.round_index] = max(ends_s[event.round_index], event.end_s)
    in_order = list(itertools.accumulate((ends_s[index] for index in range(end)), max))
    return (in_order[end - 1] - in_order[first - 1]) / (end - first)


# How good the dispatch is


@pytest.mark.parametrize("profile", [QWEN3_1_7B, GPT_OSS_20B], ids=lambda profile: profile.name)
def test_equal_devices_take_turns_exactly(profile: PublishedProfile) -> None:
    costs = profile.costs()
    plan = plan_cut(costs, profile.slots, micro_batches=9, rounds_per_step=2)

    run = SlotExecutor(plan, costs, SlotDispatcher(plan, costs)).run_until(10)

    num_slots = len(plan.slots)
    for round_index, slot, device_id in run.visits:
        assert device_id == f"gpu{(round_index * num_slots + slot) % 8}"
    assert all(run.is_round_robin)


@pytest.mark.parametrize("rounds_per_step", [1, 2, 4])
@pytest.mark.parametrize("profile", [QWEN3_1_7B, GPT_OSS_20B], ids=lambda profile: profile.name)
def test_four_tiers_run_as_fast_as_simulated_with_two_slots_a_device(
    profile: PublishedProfile, rounds_per_step: int
) -> None:
    costs = profile.costs(TIERS)
    plan = planned(costs, rounds_per_step=rounds_per_step)

    run = SlotExecutor(plan, costs, SlotDispatcher(plan, costs)).run_until(40)

    simulated_s = simulated_s_per_round(plan, costs, 8, 40)
    assert run.seconds_per_round(8, 40) <= 1.03 * simulated_s
    assert not any(run.is_round_robin)


@pytest.mark.parametrize("profile", [QWEN3_1_7B, GPT_OSS_20B], ids=lambda profile: profile.name)
def test_speeds_that_nobody_planned_are_found_out(profile: PublishedProfile) -> None:
    # Planned as equal, the devices have four speeds.
    believed, true = profile.costs(), profile.costs(TIERS)
    plan = plan_cut(believed, profile.slots, micro_batches=9, rounds_per_step=4)
    dispatcher = SlotDispatcher(plan, believed)

    run = SlotExecutor(plan, true, dispatcher).run_until(48)

    schedule = replace(plan.schedule(true), dispatch="earliest_finish")
    best_s = steady_state(true, schedule).seconds_per_round
    assert run.seconds_per_round(16, 48) <= 1.05 * best_s
    for index, speed in enumerate(TIERS):
        assert dispatcher.factor(f"gpu{index}") == pytest.approx(1 / speed, rel=0.05)


def slowed_from(first: int, end: float, factor: float) -> Callable[[int, str], float]:
    return lambda round_index, device_id: (
        factor if device_id == "gpu0" and first <= round_index < end else 1.0
    )


@pytest.mark.parametrize("factor", [2.0, 3.0, 4.0])
def test_a_device_that_slows_down_is_relieved_within_three_rounds(factor: float) -> None:
    costs = GPT_OSS_20B.costs(TIERS)
    plan = planned(costs)
    dispatcher = SlotDispatcher(plan, costs)
    executor = SlotExecutor(plan, costs, dispatcher, slow_down=slowed_from(20, math.inf, factor))

    run = executor.run_until(44)

    slower = costs.slowed({"gpu0": factor})
    replanned_s = planned(slower).seconds_per_round
    assert run.seconds_per_round(23, 43) <= 1.10 * replanned_s
    assert dispatcher.factor("gpu0") == pytest.approx(factor, rel=0.02)


def test_an_equal_pool_stops_taking_turns_when_a_device_slows_down_and_resumes() -> None:
    costs = QWEN3_1_7B.costs()
    plan = plan_cut(costs, QWEN3_1_7B.slots, micro_batches=9, rounds_per_step=2)
    dispatcher = SlotDispatcher(plan, costs)
    slow_down = slowed_from(16, 40, 3.0)

    run = SlotExecutor(plan, costs, dispatcher, slow_down=slow_down).run_until(80)

    modes: dict[int, set[bool]] = defaultdict(set)
    for (round_index, _, _), in_turn in zip(run.visits, run.is_round_robin, strict=True):
        modes[round_index].add(in_turn)
    assert all(modes[round_index] == {True} for round_index in range(16))
    assert all(modes[round_index] == {False} for round_index in range(20, 38))
    assert modes[79] == {True}
    assert run.seconds_per_round(76, 80) == pytest.approx(run.seconds_per_round(12, 16))


def test_a_device_that_was_given_nothing_any_more_is_tried_again() -> None:
    # With one round a step a slow device never finishes first, so nothing would be measured.
    costs = GPT_OSS_20B.costs()
    plan = planned(costs, rounds_per_step=1)
    dispatcher = SlotDispatcher(plan, costs)
    slow_down = slowed_from(16, 48, 3.0)

    run = SlotExecutor(plan, costs, dispatcher, slow_down=slow_down).run_until(96)

    used = Counter(round_index for round_index, _, device_id in run.visits if device_id == "gpu0")
    # Tried after 4, 8, 16, ... rounds, with a slot or two each.
    assert sum(used[round_index] for round_index in range(20, 48)) <= 8
    assert dispatcher.factor("gpu0") == pytest.approx(1.0, rel=0.02)
    assert run.seconds_per_round(88, 96) <= 1.01 * run.seconds_per_round(8, 16)


def test_jitter_and_outliers_leave_equal_devices_in_turn() -> None:
    costs = QWEN3_1_7B.costs()
    plan = plan_cut(costs, QWEN3_1_7B.slots, micro_batches=9, rounds_per_step=2)
    chance = random.Random(7)

    def jitter(_round: int, _device: str) -> float:
        return (8.0 if chance.random() < 0.02 else 1.0) * chance.uniform(0.95, 1.05)

    run = SlotExecutor(plan, costs, SlotDispatcher(plan, costs), slow_down=jitter).run_until(40)

    assert sum(run.is_round_robin) > 0.9 * len(run.is_round_robin)


# Running averages


def test_a_slot_that_was_not_run_yet_is_priced_by_its_device() -> None:
    averages = SlotAverages()

    for slot in ("a", "b"):
        averages.observe("gpu0", slot, planned_s=1.0, measured_s=2.0)

    assert averages.scale("gpu0", "c") == pytest.approx(2.0)
    assert averages.scale("gpu1", "c") == 1.0


def test_one_outlier_moves_no_device_and_two_in_a_row_do() -> None:
    averages = SlotAverages()
    for _ in range(5):
        averages.observe("gpu0", "a", planned_s=1.0, measured_s=1.0)

    averages.observe("gpu0", "a", planned_s=1.0, measured_s=10.0)
    assert averages.factor("gpu0") == pytest.approx(1.0)
    assert averages.scale("gpu0", "a") < 1.25
    averages.observe("gpu0", "a", planned_s=1.0, measured_s=1.0)
    assert averages.factor("gpu0") == pytest.approx(1.0, rel=0.02)

    for _ in range(2):
        averages.observe("gpu0", "b", planned_s=1.0, measured_s=10.0)
    assert averages.factor("gpu0") == pytest.approx(10.0, rel=0.2)


def test_a_slot_that_takes_longer_than_planned_on_a_device_does_not_slow_the_others() -> None:
    averages = SlotAverages()

    for _ in range(40):
        averages.observe("gpu0", "a", planned_s=1.0, measured_s=1.0)
        averages.observe("gpu0", "b", planned_s=1.0, measured_s=2.0)

    assert averages.scale("gpu0", "a") == pytest.approx(1.0, rel=0.05)
    assert averages.scale("gpu0", "b") == pytest.approx(2.0, rel=0.05)


@given(st.lists(st.floats(0.95, 1.05), min_size=1, max_size=30))
def test_averages_lie_between_the_plan_and_what_was_measured(measured: list[float]) -> None:
    averages = SlotAverages()

    for seconds in measured:
        averages.observe("gpu0", "a", planned_s=1.0, measured_s=seconds)

    values = [1.0, *measured]
    assert min(values) - 1e-9 <= averages.factor("gpu0") <= max(values) + 1e-9


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_a_measurement_must_be_a_time(seconds: float) -> None:
    plan, costs = small()
    dispatcher = SlotDispatcher(plan, costs)

    with pytest.raises(ValueError, match=r"measured seconds .* must be above 0 and finite"):
        dispatcher.observe(0, 0, "gpu0", seconds)


# By hand


def all_slots(plan: TrainPlan, rounds: int = 2) -> list[tuple[int, int]]:
    return [(r, s) for r in range(rounds) for s in range(len(plan.slots))]


def test_the_device_that_ends_first_gets_the_slot() -> None:
    plan, costs = small(speeds=[1.0, 0.5])
    dispatcher = SlotDispatcher(plan, costs)
    both = ("gpu0", "gpu1")

    # gpu0 ends the forward slot at 8, the head at 17, the rest at 33; gpu1 would end the head at
    # 4 + 0.1 + 2 x 9 = 22.1.
    assert dispatcher.choose(all_slots(plan), now_s=0.0, available=both) == (0, 0, "gpu0")
    dispatcher.dispatched(0, 0, "gpu0", now_s=0.0)
    assert dispatcher.choose(all_slots(plan)[1:], now_s=0.0, available=both) == (0, 1, "gpu0")
    dispatcher.dispatched(0, 1, "gpu0", now_s=0.0)
    # gpu0 has two slots. It would end the backward slot at 33, gpu1 at 8.6 + 32 at the earliest,
    # so that one waits; but the next round's first slot ends at 16 on gpu1.
    assert dispatcher.choose(all_slots(plan)[2:], now_s=0.0, available=both) == (1, 0, "gpu1")


def test_with_all_queues_full_there_is_nothing_to_dispatch_until_a_slot_has_finished() -> None:
    plan, costs = small(1)
    dispatcher = SlotDispatcher(plan, costs)
    dispatcher.dispatched(0, 0, "gpu0", now_s=0.0)
    dispatcher.dispatched(0, 1, "gpu0", now_s=0.0)

    assert dispatcher.choose([(0, 2)], now_s=1.0, available=["gpu0"]) is None
    dispatcher.progressed(0, 0, now_s=4.0)
    assert dispatcher.choose([(0, 2)], now_s=4.0, available=["gpu0"]) is None
    dispatcher.progressed(0, 0, now_s=8.0)
    dispatcher.finished(0, 0, now_s=8.0, micro_batch_s=4.0)
    assert dispatcher.choose([(0, 2)], now_s=8.0, available=["gpu0"]) == (0, 2, "gpu0")


def test_no_slot_stands_behind_a_later_one_that_waits_for_it() -> None:
    plan, costs = small(2)
    dispatcher = SlotDispatcher(plan, costs)
    # Somebody put the head on gpu0 while the forward slot before it is not dispatched.
    dispatcher.dispatched(0, 1, "gpu0", now_s=0.0)

    assert dispatcher.choose([(0, 0)], now_s=0.0, available=["gpu0", "gpu1"]) == (0, 0, "gpu1")
    with pytest.raises(
        NoDeviceError, match=r"every device .* waits for a later one, .* take back what waits"
    ):
        dispatcher.choose([(0, 0)], now_s=0.0, available=["gpu0"])
    dispatcher.forget(0, 1)
    assert dispatcher.choose([(0, 0)], now_s=0.0, available=["gpu0"]) == (0, 0, "gpu0")


def test_a_device_that_is_not_available_is_skipped_and_without_any_it_says_so() -> None:
    plan, costs = small(2)
    dispatcher = SlotDispatcher(plan, costs)

    assert dispatcher.choose([(0, 0)], now_s=0.0, available=["gpu1"]) == (0, 0, "gpu1")
    with pytest.raises(NoDeviceError, match="slot 0 may run on gpu0, gpu1, none of which"):
        dispatcher.choose([(0, 0)], now_s=0.0, available=["stranger"])


def test_kept_activations_hold_a_slot_to_its_device() -> None:
    costs = small(2)[1]
    slots = slots_from_counts([4], 0, [4])
    plan = plan_cut(costs, slots, micro_batches=2, rounds_per_step=2, grain="keep")
    dispatcher = SlotDispatcher(plan, costs)
    both = ("gpu0", "gpu1")
    dispatcher.dispatched(0, 0, "gpu1", now_s=0.0)

    # The next round's forward slot stays away from gpu1 until the first one's backward slot is in
    # its queue: there is memory for what one round keeps.
    assert dispatcher.choose([(1, 0)], now_s=0.0, available=both) == (1, 0, "gpu0")
    assert dispatcher.choose([(1, 0)], now_s=0.0, available=["gpu1"]) is None
    dispatcher.dispatched(0, 1, "gpu0", now_s=0.0)
    assert dispatcher.choose([(0, 2)], now_s=0.0, available=both) == (0, 2, "gpu1")
    with pytest.raises(NoDeviceError, match=r"it ran on gpu1, which is gone\. Run slot 0 again"):
        dispatcher.choose([(0, 2)], now_s=0.0, available=["gpu0"])


def test_a_slot_that_is_forgotten_when_done_holds_nothing_up() -> None:
    # As rounds do that are only evaluated: no backward slots, and nothing to learn from.
    plan, costs = small(1)
    dispatcher = SlotDispatcher(plan, costs)
    dispatcher.dispatched(0, 0, "gpu0", now_s=0.0)
    dispatcher.dispatched(0, 1, "gpu0", now_s=0.0)
    dispatcher.forget(0, 0)

    assert dispatcher.choose([(1, 0)], now_s=8.0, available=["gpu0"]) == (1, 0, "gpu0")


# Devices come and go, plans change


def test_after_a_loss_everything_runs_on_the_others_and_a_new_device_joins() -> None:
    costs = GPT_OSS_20B.costs(TIERS)
    plan = planned(costs)
    dispatcher = SlotDispatcher(plan, costs)
    executor = SlotExecutor(plan, costs, dispatcher)
    executor.run_until(8)

    executor.lose("gpu0")
    lost_at = executor.next_round
    run = executor.run_until(lost_at + 12)

    left = costs.in_order(range(1, 8))
    assert all(device_id != "gpu0" for r, _, device_id in run.visits if r >= lost_at)
    same_slots_s = steady_state(left, schedule_of(plan, costs, left)).seconds_per_round
    assert run.seconds_per_round(lost_at + 2, lost_at + 12) <= 1.05 * same_slots_s

    more = replace(costs, device_ids=("gpu8", *costs.device_ids[1:]))
    again = planned(more)
    executor.replan(again, more, more)
    joined_at = executor.next_round
    run = executor.run_until(joined_at + 16)
    assert any(device_id == "gpu8" for r, _, device_id in run.visits if r >= joined_at)
    assert run.seconds_per_round(joined_at + 2, joined_at + 16) <= 1.05 * again.seconds_per_round


def schedule_of(plan: TrainPlan, costs: TrainingCosts, left: TrainingCosts) -> Any:
    """The plan's slots on the devices that are left."""
    return replace(
        plan.schedule(costs), devices=(tuple(range(left.num_devices)),) * len(plan.slots)
    )


def test_measured_speeds_carry_over_to_another_plan() -> None:
    costs = GPT_OSS_20B.costs(TIERS)
    plan = planned(costs)
    dispatcher = SlotDispatcher(plan, costs)
    executor = SlotExecutor(plan, costs, dispatcher, slow_down=slowed_from(0, math.inf, 3.0))
    executor.run_until(8)

    corrected = costs.slowed({name: dispatcher.factor(name) for name in costs.device_ids})
    again = planned(corrected)
    executor.replan(again, corrected, costs)
    first = executor.next_round

    for slot in again.slots:
        for device_id, planned_s in zip(slot.device_ids, slot.micro_batch_s, strict=True):
            priced_s = dispatcher.slot_seconds(first, slot.index, device_id)
            assert priced_s == pytest.approx(planned_s, rel=0.02)
    run = executor.run_until(first + 16)
    assert run.seconds_per_round(first + 2, first + 16) <= 1.05 * again.seconds_per_round


def test_kept_slots_survive_the_loss_of_their_device() -> None:
    costs = small(3)[1]
    slots = slots_from_counts([2, 2], 0, [2, 2])
    plan = plan_cut(costs, slots, micro_batches=2, rounds_per_step=2, grain="keep")
    executor = SlotExecutor(plan, costs, SlotDispatcher(plan, costs))
    executor.run_until(3)

    executor.lose("gpu0")
    run = executor.run_until(10)

    assert_kept_on_one_device(run, plan)


def assert_kept_on_one_device(run: Run, plan: TrainPlan) -> None:
    """Backward slots follow their forward slots, and no device holds two rounds' activations."""
    held: dict[str, list[tuple[float, float, int]]] = defaultdict(list)
    for round_index, slot in run.ended_s:
        partner = plan.slots[slot].kept_with
        if partner is not None and slot < partner and (round_index, partner) in run.ended_s:
            device_id = run.device_of[round_index, slot]
            assert run.device_of[round_index, partner] == device_id
            span_s = run.began_s[round_index, slot], run.ended_s[round_index, partner]
            held[device_id].append((*span_s, round_index))
    for spans in held.values():
        for (_, end_s, before), (begin_s, _, after) in itertools.combinations(sorted(spans), 2):
            assert before == after or begin_s >= end_s - 1e-9


# Invariants


@st.composite
def problems(draw: st.DrawFn) -> tuple[TrainPlan, TrainingCosts]:
    costs = draw(pools())
    options: dict[str, Any] = {
        "micro_batches": draw(st.integers(1, 4)),
        "rounds_per_step": draw(st.integers(1, 3)),
    }
    synchronous = draw(st.booleans())
    if draw(st.booleans()) and costs.num_layers > 1:
        fused = draw(st.integers(0, costs.num_layers - 1))
        rest = costs.num_layers - fused
        first = draw(st.integers(0, rest - 1))
        counts = [first, rest - first] if first else [rest]
        slots = slots_from_counts(counts, fused, counts[::-1])
        free = replace(costs, memory_bytes=(10_000,) * costs.num_devices)
        grains: tuple[RecomputeGrain, ...] = ("stage", "keep")
        grain = draw(st.sampled_from(grains))
        plan = plan_cut(free, slots, **options, synchronous=synchronous, grain=grain)
        return plan, free
    try:
        return plan_train(costs, **options, synchronous=synchronous, search_effort=3_000), costs
    except InfeasiblePlanError:
        free = replace(costs, memory_bytes=(10_000,) * costs.num_devices)
        return plan_train(free, **options, synchronous=synchronous, search_effort=3_000), free


slow_downs = st.lists(st.sampled_from((0.5, 1.0, 1.0, 1.0, 2.0, 4.0)), min_size=1, max_size=12)


@settings(max_examples=80, deadline=None)
@given(problems(), slow_downs, st.data())
def test_every_slot_runs_once_on_a_device_that_is_there_and_fits_it(
    problem: tuple[TrainPlan, TrainingCosts], slow: list[float], data: st.DataObject
) -> None:
    plan, costs = problem

    def slow_down(round_index: int, device_id: str) -> float:
        return slow[(7 * round_index + costs.device_ids.index(device_id)) % len(slow)]

    runs = []
    loses = data.draw(st.booleans())
    for _ in range(2):
        executor = SlotExecutor(plan, costs, SlotDispatcher(plan, costs), slow_down=slow_down)
        run = executor.run_until(5)
        spare = [
            device_id
            for device_id in sorted(costs.device_ids)
            if all({*slot.device_ids} - {device_id} for slot in plan.slots)
        ]
        if loses and spare:
            executor.lose(spare[0])
            run = executor.run_until(9)
        runs.append(run)

    assert runs[0].visits == runs[1].visits
    for _, slot, device_id in runs[0].visits:
        assert device_id in plan.slots[slot].device_ids
    assert_kept_on_one_device(runs[0], plan)
    done = {at for at in runs[0].ended_s if at[0] < runs[0].num_done}
    assert len(done) == runs[0].num_done * len(plan.slots)


def test_what_is_pending_is_read_no_further_than_needed() -> None:
    plan, costs = small(2)
    read: list[tuple[int, int]] = []

    def endless() -> Iterator[tuple[int, int]]:
        for at in ((r, s) for r in itertools.count() for s in range(3)):
            read.append(at)
            yield at

    choice = SlotDispatcher(plan, costs).choose(endless(), now_s=0.0, available=["gpu0", "gpu1"])

    assert choice == Assignment(0, 0, "gpu0")
    assert len(read) <= 256
