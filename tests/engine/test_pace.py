"""A paced device never finishes early, says by how much it was late, and costs what is declared."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import pytest

from actors.engine.batch import Rows, StepBatch
from actors.engine.pace import DeviceClock
from placement.costs import LayerSeconds, StageCost

pytestmark = pytest.mark.engine


@dataclass
class FakeTime:
    """A clock that moves only when someone works or sleeps."""

    now: float = 100.0
    slept: list[float] = field(default_factory=list)
    wakes_early: bool = False
    """Each sleep ends after half of what was asked, but never before a millisecond."""

    def now_s(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.slept.append(seconds)
        self.now += max(seconds / 2, min(seconds, 1e-3)) if self.wakes_early else seconds


def device(time_: FakeTime, *, is_paced: bool = True) -> DeviceClock:
    return DeviceClock(time_.now_s, time_.sleep, is_paced)


def declared(s_per_token: float) -> StageCost:
    """A stage that costs so much a row and nothing else."""
    layer = LayerSeconds(s_per_token, 0.0, 0.0, 0.0, 0.0, 0.0)
    return StageCost(embedding_s_per_token=0.0, layers=((1, layer),), head=None)


def test_waiting_for_others_is_neither_work_nor_part_of_the_declared_time() -> None:
    time_ = FakeTime()
    clock = device(time_)
    started_s = time_.now
    time_.now += 3.0

    occupied_s = clock.finish(batch(4), started_s, declared(1.0), elsewhere_s=2.5)

    assert time_.now == pytest.approx(started_s + 2.5 + 4.0)
    assert occupied_s == clock.busy_s == pytest.approx(4.0)


def batch(tokens: int) -> StepBatch:
    return StepBatch(0, 0, 0, [1] * tokens, [Rows(0, tokens, [0])])


def work(clock: DeviceClock, time_: FakeTime, seconds: float, tokens: int = 4) -> float:
    started_s = time_.now
    time_.now += seconds
    return clock.finish(batch(tokens), started_s, declared(0.5))


def test_a_step_done_early_waits_for_the_declared_time() -> None:
    time_ = FakeTime()
    clock = device(time_)

    occupied_s = work(clock, time_, 0.75)

    assert occupied_s == 2.0
    assert time_.slept == [1.25]
    assert time_.now == 102.0
    assert (clock.busy_s, clock.late_s, clock.late_steps, clock.steps) == (2.0, 0.0, 0, 1)


def test_a_sleep_that_ends_too_soon_is_followed_by_another() -> None:
    time_ = FakeTime(wakes_early=True)
    clock = device(time_)

    occupied_s = work(clock, time_, 0.75)

    assert occupied_s >= 2.0
    assert len(time_.slept) > 1
    assert clock.late_steps == 0


def test_a_step_slower_than_declared_is_late_by_the_difference_and_does_not_wait() -> None:
    time_ = FakeTime()
    clock = device(time_)

    occupied_s = work(clock, time_, 3.5)

    assert occupied_s == 3.5
    assert time_.slept == []
    assert (clock.busy_s, clock.late_s, clock.late_steps, clock.steps) == (3.5, 1.5, 1, 1)


def test_a_step_that_takes_exactly_the_declared_time_is_neither() -> None:
    time_ = FakeTime()
    clock = device(time_)

    work(clock, time_, 2.0)

    assert time_.slept == []
    assert (clock.late_s, clock.late_steps) == (0.0, 0)


def test_lateness_is_not_made_good_by_the_next_step() -> None:
    time_ = FakeTime()
    clock = device(time_)

    occupied = [work(clock, time_, seconds) for seconds in (3.0, 0.5, 2.5)]

    assert occupied == [3.0, 2.0, 2.5]
    assert (clock.busy_s, clock.late_s, clock.late_steps, clock.steps) == (7.5, 1.5, 2, 3)


def test_waiting_for_work_is_not_busy_time() -> None:
    time_ = FakeTime()
    clock = device(time_)
    work(clock, time_, 1.0)
    time_.now += 50.0
    work(clock, time_, 1.0)

    assert clock.busy_s == 4.0


def test_a_real_device_never_waits_and_is_never_late() -> None:
    time_ = FakeTime()
    clock = device(time_, is_paced=False)

    assert work(clock, time_, 3.5) == 3.5
    assert time_.slept == []
    assert (clock.busy_s, clock.late_s, clock.late_steps, clock.steps) == (3.5, 0.0, 0, 1)


def test_a_slowed_device_takes_a_multiple_of_what_is_declared_and_predicted() -> None:
    time_ = FakeTime()
    clock = device(time_)
    clock.slowness = 2.5

    assert work(clock, time_, 0.5) == 5.0
    assert (clock.predicted_s, clock.busy_s, clock.late_s) == (2.0, 5.0, 0.0)


def test_the_declared_time_is_that_of_the_steps_rows_context_and_head() -> None:
    layer = LayerSeconds(0.25, 0.125, 0.0, 0.0, 0.0, 0.0)
    head = LayerSeconds(1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    cost = StageCost(embedding_s_per_token=0.5, layers=((2, layer),), head=head)
    step = StepBatch(
        0, 0, 0, [1] * 5, [Rows(7, 1, [0]), Rows(0, 4, [1])], drawn=[0], draws=[]
    )  # 5 rows, 8 + 4 tokens of context, 1 row behind the head
    time_ = FakeTime()

    occupied_s = device(time_).finish(step, time_.now, cost)

    assert occupied_s == 5 * 0.5 + 2 * (5 * 0.25 + 12 * 0.125) + 1.0


def test_on_the_real_clock_a_paced_step_takes_at_least_the_declared_time() -> None:
    clock = DeviceClock(time.monotonic, time.sleep, is_paced=True)
    started_s = time.monotonic()

    occupied_s = clock.finish(batch(2), started_s, declared(0.02))

    assert time.monotonic() - started_s >= 0.04 - 1e-9
    assert occupied_s >= 0.04 - 1e-9


# --- work that nobody waits for ---------------------------------------------------------------


def test_booked_work_begins_when_the_work_before_it_ends() -> None:
    time_ = FakeTime()
    clock = device(time_)

    ends = [clock.book(100.0, 2.0), clock.book(100.5, 1.0)]
    time_.now = 110.0
    ends.append(clock.book(109.0, 3.0))

    assert ends == [102.0, 103.0, 112.0]
    assert time_.slept == []
    assert (clock.busy_s, clock.predicted_s, clock.steps) == (6.0, 6.0, 3)
    assert clock.late_steps == 0


def test_booked_work_that_took_longer_than_declared_is_late() -> None:
    time_ = FakeTime()
    clock = device(time_)
    time_.now = 105.0

    assert clock.book(100.0, 2.0) == 105.0
    assert (clock.late_s, clock.late_steps) == (3.0, 1)
    assert clock.book(105.0, 2.0) == 107.0
    clock.slowness = 2.0
    assert clock.book(105.0, 2.0) == 111.0


def test_booked_work_of_a_real_device_takes_what_it_took() -> None:
    time_ = FakeTime()
    clock = device(time_, is_paced=False)
    time_.now = 101.0

    assert clock.book(100.0, 50.0) == 101.0
    assert (clock.busy_s, clock.predicted_s, clock.late_s) == (1.0, 50.0, 0.0)
