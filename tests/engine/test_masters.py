"""Bfloat16 weights and their residuals give every bit of the float32 weights back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.engine.masters import join_master, split_master


def split(master_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    published_C = torch.empty(len(master_C), dtype=torch.bfloat16)
    residual_C = torch.empty(len(master_C), dtype=torch.int16)
    split_master(master_C, published_C, residual_C, torch.empty(len(master_C), dtype=torch.int32))
    return published_C, residual_C


def join(published_C: torch.Tensor, residual_C: torch.Tensor) -> torch.Tensor:
    master_C = torch.empty(len(published_C))
    join_master(published_C, residual_C, master_C, torch.empty(len(master_C), dtype=torch.int32))
    return master_C


def bits(values: torch.Tensor) -> list[int]:
    listed: list[int] = values.view(torch.int32).tolist()
    return listed


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=80))
def test_any_bits_come_back(patterns: list[int]) -> None:
    master_C = torch.tensor(patterns, dtype=torch.int32).view(torch.float32)

    assert bits(join(*split(master_C))) == patterns


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=80))
def test_what_is_published_is_as_near_as_torchs_own_rounding(values: list[float]) -> None:
    master_C = torch.tensor(values)
    published_C, _ = split(master_C)

    distance_C = (published_C.double() - master_C.double()).abs().nan_to_num(0.0)
    nearest_C = (master_C.bfloat16().double() - master_C.double()).abs().nan_to_num(0.0)

    assert torch.equal(distance_C, nearest_C)


@pytest.mark.parametrize(
    "value",
    [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1.1754942e-38, 3.4028234e38, -3.4028234e38, math.pi],
)
def test_zero_subnormal_and_the_largest_numbers_come_back(value: float) -> None:
    master_C = torch.full((37,), value)

    assert bits(join(*split(master_C))) == bits(master_C)


def test_every_lower_half_comes_back_on_both_sides_of_zero() -> None:
    lower_C = torch.arange(1 << 16, dtype=torch.int32)
    for upper in (0x0000, 0x3F80, 0x7F7F, -0x8000, -0x4080):
        master_C = (lower_C + (upper << 16)).view(torch.float32)
        assert torch.equal(join(*split(master_C)).view(torch.int32), master_C.view(torch.int32))


def test_halves_are_rounded_away_from_zero() -> None:
    half = 1 + 2**-8  # Between 1 and the next bfloat16, 1 + 2^-7.
    published_C, residual_C = split(torch.tensor([half, -half]))

    assert published_C.tolist() == [1 + 2**-7, -(1 + 2**-7)]
    assert residual_C.tolist() == [-0x8000, -0x8000]
