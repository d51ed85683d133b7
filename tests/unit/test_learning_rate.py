"""The learning rate of every step, and clipping, worked by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.engine.schedule import clip_scale, learning_rate
from actors.engine.training_config import OptimizerSettings


def settings(**changes: float) -> OptimizerSettings:
    return OptimizerSettings.model_validate(
        {"learning_rate": 1.0, "warmup_steps": 0, "final_fraction": 0.1} | changes
    )


def rates(num_steps: int, **changes: float) -> list[float]:
    return [learning_rate(settings(**changes), step, num_steps) for step in range(num_steps)]


def test_it_warms_up_in_equal_parts_then_falls_along_a_cosine_to_the_final_fraction() -> None:
    quarter = 0.9 * (1 + math.sqrt(0.5)) / 2

    assert rates(8, warmup_steps=3) == pytest.approx(
        [0.25, 0.5, 0.75, 1.0, 0.1 + quarter, 0.55, 1.0 - quarter, 0.1]
    )


def test_without_warm_up_the_first_step_has_the_peak_and_the_last_the_final_fraction() -> None:
    assert rates(3) == pytest.approx([1.0, 0.55, 0.1])
    assert rates(5, final_fraction=1.0) == [1.0] * 5
    assert rates(2, final_fraction=0.0) == [1.0, 0.0]


def test_a_run_of_one_step_has_the_peak() -> None:
    assert rates(1) == [1.0]


def test_a_run_that_is_all_warm_up_stays_below_the_peak() -> None:
    assert rates(3, warmup_steps=3) == pytest.approx([0.25, 0.5, 0.75])


@given(
    num_steps=st.integers(1, 50),
    warmup_steps=st.integers(0, 50),
    final_fraction=st.floats(0, 1),
    peak=st.floats(1e-8, 10),
)
def test_it_rises_to_the_peak_and_falls_no_lower_than_the_final_fraction(
    num_steps: int, warmup_steps: int, final_fraction: float, peak: float
) -> None:
    values = rates(
        num_steps, learning_rate=peak, warmup_steps=warmup_steps, final_fraction=final_fraction
    )

    assert values[: warmup_steps + 1] == sorted(values[: warmup_steps + 1])
    assert values[warmup_steps:] == sorted(values[warmup_steps:], reverse=True)
    assert values[0] > 0
    assert max(values) <= peak
    assert all(value >= peak * final_fraction * (1 - 1e-9) for value in values[warmup_steps:])


@pytest.mark.parametrize("step", [-1, 10])
def test_a_step_outside_the_run_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match=f"step {step} is not one of a run of 10 steps"):
        learning_rate(settings(), step, 10)


def test_clipping_scales_a_larger_norm_down_and_leaves_a_smaller_one() -> None:
    assert clip_scale(4.0, 1.0) == pytest.approx(0.25, rel=1e-6)
    assert clip_scale(0.5, 1.0) == 1.0
    assert clip_scale(0.0, 1.0) == 1.0
    assert clip_scale(1e9, None) == 1.0


@pytest.mark.parametrize("norm", [math.nan, math.inf])
@pytest.mark.parametrize("clip_norm", [1.0, None])
def test_a_norm_that_is_not_finite_is_refused(norm: float, clip_norm: float | None) -> None:
    with pytest.raises(ValueError, match=rf"norm is {norm}.*lower optimizer\.learning_rate"):
        clip_scale(norm, clip_norm)
