"""Gradients of a step: their order, their completeness, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from weight_shards import MODES, run, shard, unit, values

from actors.engine.optimizer import WrongStep
from actors.engine.training_config import OptimizerSettings


@settings(max_examples=60, deadline=None)
@given(data=st.data(), gradient_dtype=st.sampled_from(["float32", "bfloat16"]))
def test_sums_are_equal_to_the_bit_in_whatever_order_gradients_come(
    data: st.DataObject, gradient_dtype: str
) -> None:
    num_gradients = data.draw(st.integers(1, 6))
    arrivals = data.draw(st.permutations(range(num_gradients)))
    again = data.draw(st.lists(st.integers(0, num_gradients - 1), max_size=4))
    mode = OptimizerSettings.model_validate({"gradient_dtype": gradient_dtype})
    gradients = [values(790, seed=i) * 10.0 ** (i % 4) for i in range(num_gradients)]
    sorted_shard, mixed = shard(mode), shard(mode)
    for order, gradient in enumerate(gradients):
        sorted_shard.add("layer 0", 0, order, gradient, expected=num_gradients)

    for position, order in enumerate(arrivals):
        complete = mixed.add("layer 0", 0, order, gradients[order], expected=num_gradients)
        assert complete == (position == num_gradients - 1)
        for repeated in again:
            if repeated in arrivals[: position + 1]:
                rerun = gradients[repeated] + 1
                mixed.add("layer 0", 0, repeated, rerun, expected=num_gradients)

    assert mixed.squared_norm() == sorted_shard.squared_norm()
    stepped = [s.step("layer 0", learning_rate=1.0, scale=1.0) for s in (mixed, sorted_shard)]
    assert torch.equal(stepped[0], stepped[1])


@pytest.mark.parametrize("gradient_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arriving", [torch.float32, torch.bfloat16])
def test_gradients_are_added_in_float32_and_rounded_to_the_type_of_the_sum(
    gradient_dtype: str, arriving: torch.dtype
) -> None:
    made = shard(OptimizerSettings.model_validate({"gradient_dtype": gradient_dtype}))
    dtype = getattr(torch, gradient_dtype)
    expected = torch.zeros(790, dtype=dtype)
    for order in range(5):
        gradient = values(790, seed=order).to(arriving)
        made.add("layer 0", 0, order, gradient, expected=5)
        expected = (expected.float() + gradient.float()).to(dtype)

    assert made.squared_norm()["layer 0"] == pytest.approx(
        expected.double().square().sum().item(), rel=1e-12
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("gradient_dtype", ["float32", "bfloat16"])
def test_a_gradient_that_is_not_finite_shows_in_the_norm_of_its_unit(
    bad: float, gradient_dtype: str
) -> None:
    mode = OptimizerSettings.model_validate({"gradient_dtype": gradient_dtype})
    made = shard(mode, unit("layer 0"), unit("layer 1"))
    poisoned = values(790, seed=1)
    poisoned[500] = bad
    made.add("layer 0", 0, 0, values(790, seed=1), expected=1)
    made.add("layer 1", 0, 0, poisoned, expected=1)

    norms = made.squared_norm()

    assert math.isfinite(norms["layer 0"])
    assert not math.isfinite(norms["layer 1"])


@pytest.mark.parametrize(
    ("learning_rate", "scale"), [(1e-3, math.nan), (1e-3, math.inf), (math.nan, 1.0)]
)
def test_a_scale_that_is_not_finite_is_refused_and_nothing_changes(
    learning_rate: float, scale: float
) -> None:
    made = shard()
    made.add("layer 0", 0, 0, values(790, seed=1), expected=1)
    before = made.published("layer 0").clone()

    with pytest.raises(ValueError, match=rf"step 0 of layer 0 has scale {scale}.*must be finite"):
        made.step("layer 0", learning_rate=learning_rate, scale=scale)

    assert made.version("layer 0") == 0
    assert torch.equal(made.published("layer 0"), before)


@pytest.mark.parametrize("step", [0, 2, -1])
def test_a_gradient_of_another_step_is_refused(step: int) -> None:
    made = shard()
    run(made, range(1))

    with pytest.raises(WrongStep, match=rf"gradient of step {step} of layer 0 .* step 1 now"):
        made.add("layer 0", step, 0, values(790, seed=1), expected=1)


def test_gradients_that_do_not_fit_are_refused() -> None:
    made, gradient = shard(), values(790, seed=1)
    with pytest.raises(ValueError, match="shape \\(789,\\) is not one of 790 trained values"):
        made.add("layer 0", 0, 0, gradient[1:], expected=2)
    with pytest.raises(ValueError, match="gradient 2 of 2 does not fit"):
        made.add("layer 0", 0, 2, gradient, expected=2)
    made.add("layer 0", 0, 1, gradient, expected=2)
    with pytest.raises(ValueError, match=r"gradient 0 of 3 does not fit.* 2 gradients make"):
        made.add("layer 0", 0, 0, gradient, expected=3)
    with pytest.raises(ValueError, match="'layer 9' is not a unit of this shard"):
        made.add("layer 9", 0, 0, gradient, expected=2)


def test_a_step_waits_for_all_its_gradients() -> None:
    made = shard()
    with pytest.raises(ValueError, match="step 0 of layer 0 is not complete: no gradient"):
        made.squared_norm()
    made.add("layer 0", 0, 1, values(790, seed=1), expected=3)
    made.add("layer 0", 0, 0, values(790, seed=2), expected=3)
    for order in (0, 1):
        made.add("layer 0", 0, order, values(790, seed=3), expected=3)
    with pytest.raises(ValueError, match="not complete: 2 of 3 gradients have arrived"):
        made.step("layer 0", learning_rate=1e-3, scale=1.0)


def test_a_unit_that_trains_nothing_is_stepped_along() -> None:
    for mode in MODES:
        made = shard(mode, unit("embedding", 0, 0), unit())
        made.add("layer 0", 0, 0, values(790, seed=1), expected=1)
        assert made.squared_norm()["embedding"] == 0.0
        assert len(made.step("embedding", learning_rate=1e-3, scale=1.0)) == 0
        assert made.version("embedding") == 1
