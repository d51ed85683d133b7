"""The running estimate of an uplink, and what safely fits into a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.uplink import Uplink

DECLARED = Uplink.declared(1e6, 0.05)


def test_what_was_declared_is_believed_with_a_large_error() -> None:
    assert DECLARED.safe_rate_bits_per_s(0.0) == 1e6
    assert DECLARED.safe_rate_bits_per_s(1.0) == pytest.approx(5e5)
    assert DECLARED.safe_rtt_s(2.0) == pytest.approx(0.1)


@pytest.mark.parametrize("rate", [5e4, 1e6, 2e7])
def test_deliveries_move_the_estimate_to_the_true_rate_and_its_error(rate: float) -> None:
    draws = np.random.default_rng(1)
    link = DECLARED
    for _ in range(200):
        true = rate * draws.uniform(0.9, 1.1)
        link = link.answered(0.02)
        link = link.delivered(200_000, 200_000 / true + 0.02)

    assert link.rtt_s == pytest.approx(0.02, rel=0.01)
    assert link.rate_bits_per_s == pytest.approx(rate, rel=0.05)
    assert 0.02 * rate < math.sqrt(link.rate_variance) < 0.12 * rate


def test_a_link_that_gets_slow_is_believed_after_few_messages() -> None:
    link = DECLARED
    for _ in range(50):
        link = link.delivered(100_000, 0.15)
    for _ in range(3):
        link = link.delivered(100_000, 1.05)

    # 0.1 Mbit/s, and with two deviations hardly anything is promised meanwhile.
    assert link.safe_rate_bits_per_s(2.0) < 1e5


def test_losses_cost_rate_and_are_forgotten() -> None:
    link = DECLARED.lost().lost()
    assert link.loss == pytest.approx(0.36)
    assert link.safe_rate_bits_per_s(0.0) == pytest.approx(0.64e6)
    for _ in range(30):
        link = link.delivered(100_000, 0.15)
    assert link.loss < 0.001


@given(
    rate=st.floats(1e3, 1e9), rtt=st.floats(0, 2), seconds=st.floats(0, 100),
    caution=st.floats(0, 1.9),
)  # fmt: skip
def test_what_fits_takes_no_longer(rate: float, rtt: float, seconds: float, caution: float) -> None:
    link = Uplink.declared(rate, rtt)
    bits = link.bits_within(seconds, caution)

    assert bits >= 0
    if bits:
        assert link.seconds_for(bits, caution) <= seconds * (1 + 1e-9)
    assert link.seconds_for(bits + 1 + math.ceil(2e-9 * bits), caution) >= seconds * (1 - 1e-9)


def test_nothing_is_promised_of_a_link_that_may_stand_still() -> None:
    assert DECLARED.bits_within(10.0, 2.0) == 0
    assert DECLARED.seconds_for(1, 2.0) == math.inf


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"rate_bits_per_s": -1.0}, "rate_bits_per_s"),
        ({"rtt_s": math.nan}, "rtt_s"),
        ({"loss": 1.5}, "loss"),
        ({"rate_variance": math.inf}, "rate_variance"),
    ],
)
def test_estimates_that_cannot_be_are_refused(change: dict[str, Any], complaint: str) -> None:
    fields = {"rate_bits_per_s": 1.0, "rate_variance": 0.0, "rtt_s": 0.0, "rtt_variance": 0.0}
    with pytest.raises(ValueError, match=complaint):
        Uplink(**(fields | change))


@pytest.mark.parametrize(("bits", "seconds"), [(0, 1.0), (8, 0.0), (8, math.nan), (8, -1.0)])
def test_deliveries_that_cannot_be_are_refused(bits: int, seconds: float) -> None:
    with pytest.raises(ValueError, match="no delivery"):
        DECLARED.delivered(bits, seconds)


def test_a_negative_round_trip_is_refused() -> None:
    with pytest.raises(ValueError, match="is none"):
        DECLARED.answered(-0.1)
