"""A token bucket on a clock of its own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.rates import TokenBucket


def test_a_minutes_worth_is_there_at_once_and_then_it_is_the_rate() -> None:
    bucket = TokenBucket(60, 0.0)

    bucket.take(60, 0.0)

    assert bucket.wait_s(1, 0.0) == 1.0
    assert bucket.wait_s(10, 0.0) == 10.0
    assert bucket.wait_s(1, 0.5) == 0.5
    assert bucket.wait_s(1, 1.0) == 0.0


def test_no_more_than_a_minutes_worth_is_saved_up() -> None:
    bucket = TokenBucket(60, 0.0)
    bucket.take(60, 0.0)

    assert bucket.level(3600.0) == 60.0


def test_what_is_more_than_a_minutes_worth_waits_for_a_full_bucket_and_is_paid_for_afterwards() -> (
    None
):
    bucket = TokenBucket(60, 0.0)

    assert bucket.wait_s(600, 0.0) == 0.0
    bucket.take(600, 0.0)

    assert bucket.level(0.0) == -540.0
    assert bucket.wait_s(1, 0.0) == 541.0


def test_a_clock_that_goes_back_gives_nothing() -> None:
    bucket = TokenBucket(60, 100.0)
    bucket.take(60, 100.0)

    assert bucket.level(40.0) == 0.0
    assert bucket.level(101.0) == 1.0


@given(
    st.integers(1, 1000),
    st.lists(st.tuples(st.floats(0, 30), st.integers(1, 50)), max_size=40),
)
def test_over_any_time_no_more_is_taken_than_a_burst_and_the_rate(
    per_minute: int, wishes: list[tuple[float, int]]
) -> None:
    bucket = TokenBucket(per_minute, 0.0)
    now_s = taken = 0.0
    for passed_s, amount in wishes:
        now_s += passed_s
        if bucket.wait_s(amount, now_s) == 0:
            bucket.take(amount, now_s)
            taken += amount

    largest = max((amount for _, amount in wishes), default=0)
    burst = max(per_minute, largest)
    assert taken <= burst + per_minute * now_s / 60 + 1e-6 * (1 + taken)


@given(st.integers(1, 1000), st.integers(1, 2000), st.floats(0, 100))
def test_after_the_wait_it_is_there(per_minute: int, amount: int, start_s: float) -> None:
    bucket = TokenBucket(per_minute, start_s)
    bucket.take(per_minute, start_s)

    wait_s = bucket.wait_s(amount, start_s)

    assert wait_s > 0
    assert bucket.wait_s(amount, start_s + wait_s) < 1e-6 * (1 + wait_s)
