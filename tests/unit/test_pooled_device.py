"""When a device of the training pool counts as hung."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cluster.training.pooled_device import PooledDevice


@dataclass
class FakeVisit:
    is_fed: bool = True
    is_prepared: bool = True


def device(visit: Any, *, heard_s: float) -> PooledDevice:
    made = PooledDevice(device=None, actor=None, heard_s=heard_s)  # type: ignore[arg-type]
    made.queue.append(visit)
    return made


def test_a_device_that_was_silent_for_too_long_twice_hangs() -> None:
    silent = device(FakeVisit(), heard_s=100.0)
    asked_s = (150.0, 161.0, 163.0)
    assert [silent.hangs(now_s, expected_s=1.0) for now_s in asked_s] == [False, False, True]


def test_a_word_between_the_two_takes_the_suspicion_away() -> None:
    slow = device(FakeVisit(), heard_s=100.0)
    assert not slow.hangs(170.0, expected_s=1.0)
    slow.heard_s = 171.0
    assert not slow.hangs(172.0, expected_s=1.0)
    assert not slow.hangs(240.0, expected_s=1.0)


def test_a_device_that_waits_for_inputs_does_not_hang() -> None:
    waiting = device(FakeVisit(is_fed=False), heard_s=0.0)
    assert not any(waiting.hangs(now_s, expected_s=1.0) for now_s in (1000.0, 2000.0))


def test_a_slot_that_takes_long_may_be_silent_for_long() -> None:
    long = device(FakeVisit(), heard_s=0.0)
    asked_s = (100.0, 199.0, 201.0, 203.0)
    assert [long.hangs(now_s, expected_s=10.0) for now_s in asked_s] == [False, False, False, True]


def test_a_device_whose_weights_are_on_their_way_has_ten_minutes() -> None:
    waiting = device(FakeVisit(is_prepared=False), heard_s=0.0)
    asked_s = (599.0, 601.0, 603.0)
    assert [waiting.hangs(now_s, expected_s=1.0) for now_s in asked_s] == [False, False, True]
