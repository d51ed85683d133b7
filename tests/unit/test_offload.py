"""Where an input is answered: never over a limit, and nothing is shipped that does not help."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.offload import (
    HERE,
    Calibration,
    Limits,
    Route,
    _isotonic,
    decide,
    min_entropy_bits,
)
from placement.uplink import Uplink

SURE = Uplink(rate_bits_per_s=1e6, rate_variance=0.0, rtt_s=0.1, rtt_variance=0.0)
CURVE = Calibration(
    bounds=(1.0,), edge=(0.95, 0.4), budgets=(0, 8, 16, 32, 64),
    server=((0.1, 0.2, 0.6, 0.9, 0.96), (0.1, 0.2, 0.5, 0.7, 0.7)),
)  # fmt: skip


def route(**changes: Any) -> Route:
    fields: dict[str, Any] = {
        "name": "patches", "kind": "units", "num_units": 64, "unit_bits": 100, "header_bits": 50,
        "calibration": CURVE,
    }  # fmt: skip
    return Route(**(fields | changes))


def limits(**changes: Any) -> Limits:
    return Limits(**({"time_left_s": 10.0, "bits": 10**6} | changes))


# --- confidence -------------------------------------------------------------------------------


def test_min_entropy_is_in_bits() -> None:
    assert min_entropy_bits([0.5, 0.25, 0.25]) == 1.0
    assert min_entropy_bits([1.0]) == 0.0
    assert min_entropy_bits(np.full(8, 1 / 8)) == pytest.approx(3.0)


@pytest.mark.parametrize("bad", [[], [[0.5, 0.5]], [0.0, 0.0], [math.nan, 1.0], [-0.1, 1.1], [2.0]])
def test_what_is_no_probability_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="probabilit"):
        min_entropy_bits(bad)


# --- calibration ------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_isotonic_values_are_the_closest_that_do_not_fall(values: list[float]) -> None:
    fitted = _isotonic(np.array(values))

    assert (np.diff(fitted) >= -1e-12).all()
    error = ((fitted - values) ** 2).sum()
    # Brute force over all ways to pool neighbours whose means do not fall.
    for cuts in itertools.product([False, True], repeat=len(values) - 1):
        ends = [i + 1 for i, is_cut in enumerate(cuts) if is_cut]
        parts = np.split(np.array(values), ends)
        means = [part.mean() for part in parts]
        if all(a <= b for a, b in itertools.pairwise(means)):
            other = sum(((part - part.mean()) ** 2).sum() for part in parts)
            assert error <= other + 1e-9


def test_a_calibration_finds_who_is_right_when() -> None:
    draws = np.random.default_rng(0)
    entropies = draws.uniform(0, 3, 8000)
    edge = draws.random(8000) < 0.95 - 0.25 * entropies
    budgets = (0, 4, 16)
    server = draws.random((8000, 3)) < np.array([0.1, 0.4, 0.8])

    fitted = Calibration.fit(entropies, edge, budgets, server)

    assert len(fitted.edge) == 8
    for entropy in (0.2, 1.5, 2.8):
        assert fitted.edge_accuracy(entropy) == pytest.approx(0.95 - 0.25 * entropy, abs=0.06)
        for units, accuracy in ((0, 0.1), (3, 0.1), (4, 0.4), (15, 0.4), (16, 0.8), (64, 0.8)):
            assert fitted.server_accuracy(entropy, units) == pytest.approx(accuracy, abs=0.06)
    assert all((np.diff(row) >= 0).all() for row in fitted.server)


def test_few_inputs_are_drawn_to_the_mean_of_all() -> None:
    entropies = [0.1] * 50 + [2.0]
    fitted = Calibration.fit(entropies, [1] * 50 + [0], (0,), [[1]] * 50 + [[0]], num_bins=60)

    assert 0.7 < fitted.edge_accuracy(2.0) < fitted.edge_accuracy(0.1) <= 1.0


def test_the_fewest_units_that_are_as_good_are_enough() -> None:
    assert CURVE.enough_units(2.0, 64) == 32
    assert CURVE.enough_units(2.0, 31) == 16
    assert CURVE.enough_units(0.5, 64) == 64
    assert CURVE.enough_units(2.0, 5) == 0


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"bounds": ()}, "2 bins has 0 bounds"),
        ({"budgets": (8, 0, 16, 32, 64)}, "must ascend"),
        ({"server": ((0.1,), (0.1,))}, "not of 5 budgets"),
        ({"edge": (0.5, 1.5)}, "not from 0 to 1"),
    ],
)
def test_calibrations_that_cannot_be_are_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Calibration(**(CURVE.to_json() | {"bounds": (1.0,)} | change))


# --- routes -----------------------------------------------------------------------------------


@given(
    num_units=st.integers(1, 300), unit_bits=st.integers(1, 10**5), header=st.integers(0, 10**4),
    budget=st.integers(0, 10**7),
)  # fmt: skip
def test_most_units_are_as_many_as_fit(
    num_units: int, unit_bits: int, header: int, budget: int
) -> None:
    way = route(num_units=num_units, unit_bits=unit_bits, header_bits=header)
    most = way.most_units(budget)

    assert most == 0 or way.bits(most) <= budget
    # A whole input needs no list of what is in it, so it may cost less than one unit fewer.
    fitting = [n for n in range(1, num_units + 1) if way.bits(n) <= budget]
    assert most == max(fitting, default=0)


def test_all_units_may_cost_less_than_all_but_one() -> None:
    way = route(unit_bits=1, header_bits=0)
    assert way.bits(64) < way.bits(63)
    assert way.most_units(way.bits(64)) == 64


def test_which_units_they_are_is_a_bitmap_or_a_list() -> None:
    way = route(unit_bits=1, header_bits=0)
    assert way.bits(3) == 3 + 3 * 6
    assert way.bits(40) == 40 + 64
    assert way.bits(64) == 64


def test_a_cut_goes_whole_or_not_at_all() -> None:
    way = route(kind="features")
    assert way.most_units(way.bits(64) - 1) == 0
    assert way.most_units(way.bits(64)) == 64


# --- decisions --------------------------------------------------------------------------------


def test_a_sure_edge_answers_itself_and_an_unsure_one_ships_what_helps() -> None:
    sure = decide(0.5, [route()], SURE, limits(), here=0.97)
    assert (sure.route, sure.num_units, sure.most_bits) == (HERE, 0, 0)

    unsure = decide(2.0, [route()], SURE, limits(), here=0.4)
    assert (unsure.route, unsure.num_units) == ("patches", 32)
    assert unsure.expected_accuracy == 0.7
    assert unsure.most_bits == route().bits(32)


def test_where_the_budget_makes_the_server_worse_nothing_is_shipped() -> None:
    tight = limits(bits=route().bits(10))

    decision = decide(2.0, [route()], SURE, tight, here=0.4)

    assert decision.route == HERE
    assert "nothing that fits is expected to be right more often" in decision.reason


def test_what_misses_the_deadline_is_no_way() -> None:
    # 3250 + 64 bits at 1 Mbit/s and 0.1 s there and back.
    assert decide(2.0, [route()], SURE, limits(time_left_s=0.2), here=0.4).route == "patches"
    late = decide(2.0, [route(server_s=0.1)], SURE, limits(time_left_s=0.2), here=0.4)
    assert late.route == HERE
    assert late.reason == "no route fits 1000000 bits and 0.2 s"


def test_energy_is_a_limit_of_bits() -> None:
    poor = limits(joules=1.0, joules_per_bit=1.0 / route().bits(16))
    assert decide(2.0, [route()], SURE, poor, here=0.4).num_units == 16
    spent = decide(2.0, [route(prepare_joules=1.5)], SURE, limits(joules=1.0), here=0.4)
    assert spent.route == HERE


def test_a_gain_that_is_asked_for_must_be_there() -> None:
    assert decide(2.0, [route()], SURE, limits(least_gain=0.3), here=0.4).route == HERE
    assert decide(2.0, [route()], SURE, limits(least_gain=0.29), here=0.4).route == "patches"


def test_of_equally_good_ways_the_cheapest_is_taken() -> None:
    dear, cheap = route(name="raw", unit_bits=800), route(name="small", unit_bits=90)
    for routes in ([dear, cheap], [cheap, dear]):
        assert decide(2.0, routes, SURE, limits(), here=0.4).route == "small"


@settings(max_examples=300)
@given(
    entropy=st.floats(0, 4), here=st.floats(0, 1), bits=st.integers(0, 10**5),
    time=st.floats(0, 5), rate=st.floats(1e3, 1e7), deviation=st.floats(0, 1e6),
    joules=st.floats(0, 2), seed=st.integers(0, 1000),
)  # fmt: skip
def test_no_limit_is_ever_passed(
    entropy: float, here: float, bits: int, time: float, rate: float, deviation: float,
    joules: float, seed: int,
) -> None:  # fmt: skip
    draws = np.random.default_rng(seed)
    kinds = ("units", "features", "everything")
    routes = [
        route(
            name=f"r{i}", kind=kinds[i % 3], unit_bits=int(draws.integers(1, 2000)),
            header_bits=int(draws.integers(0, 500)), prepare_s=float(draws.uniform(0, 0.2)),
            server_s=float(draws.uniform(0, 0.2)),
        )
        for i in range(4)
    ]  # fmt: skip
    link = Uplink(rate_bits_per_s=rate, rate_variance=deviation**2, rtt_s=0.05, rtt_variance=1e-4)
    asked = limits(bits=bits, time_left_s=time, joules=joules, joules_per_bit=1e-5)

    decision = decide(entropy, routes, link, asked, here=here)

    if decision.route == HERE:
        assert (decision.num_units, decision.most_bits) == (0, 0)
        assert decision.expected_accuracy == here
        return
    chosen = next(each for each in routes if each.name == decision.route)
    assert decision.expected_accuracy > here
    assert decision.most_bits == chosen.bits(decision.num_units) <= bits
    seconds = link.seconds_for(decision.most_bits, asked.caution)
    assert chosen.prepare_s + seconds + chosen.server_s <= time * (1 + 1e-9)
    assert decision.most_bits * asked.joules_per_bit <= joules * (1 + 1e-9)
