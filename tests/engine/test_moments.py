"""Moments in 8 bits: how near, never stuck, never zero under a square root."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.engine.chunks import BLOCK_VALUES, Chunk, chunks_of
from actors.engine.moments import (
    FIRST_CODES_PER_OCTAVE,
    SECOND_CODES_PER_OCTAVE,
    SECOND_OCTAVES,
    EightBitMoments,
    EightBitScratch,
)

SCRATCH = EightBitScratch()


class OneChunk:
    """Moments of so few values that they are one chunk."""

    def __init__(self, num_values: int) -> None:
        [self.chunk] = chunks_of(num_values, num_values)
        self.moments = EightBitMoments(self.chunk.blocks.stop, SCRATCH)

    def write(self, first_C: torch.Tensor, second_C: torch.Tensor, step: int = 1) -> None:
        held = self.moments.read(self.chunk)
        held[0].copy_(first_C)
        held[1].copy_(second_C)
        self.moments.write(self.chunk, held, step)

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        first_C, second_C = self.moments.read(self.chunk)
        return first_C.clone(), second_C.clone()


def spread(num_values: int, octaves: float, seed: int = 0) -> torch.Tensor:
    """Positive values evenly spread over `octaves` below 1, the largest being 1 in each block."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.exp2(-octaves * torch.rand(num_values, generator=generator))
    values[::BLOCK_VALUES] = 1.0
    return values


def test_moments_start_at_zero() -> None:
    first_C, second_C = OneChunk(300).read()

    assert not first_C.any()
    assert not second_C.any()


@pytest.mark.parametrize("num_values", [1, 255, 256, 1000])
@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e6])
def test_magnitudes_are_held_to_a_few_percent_over_many_octaves(
    num_values: int, scale: float
) -> None:
    sign_C = torch.where(torch.arange(num_values) % 3 == 0, -1.0, 1.0)
    first_C = spread(num_values, 15.9) * sign_C * scale
    second_C = spread(num_values, 23.9, seed=1) * scale
    held = OneChunk(num_values)
    held.write(first_C, second_C)

    first_again_C, second_again_C = held.read()

    off_C = (first_again_C / first_C).log2().abs()
    assert off_C.max() <= 0.501 / FIRST_CODES_PER_OCTAVE  # To the nearest code: 4.5%.
    off_C = (second_again_C / second_C).log2().abs()
    assert off_C.max() <= 1.001 / SECOND_CODES_PER_OCTAVE  # To one of its two neighbours: 6.7%.


def test_small_first_moments_become_zero_and_small_second_moments_do_not() -> None:
    values_C = torch.ones(BLOCK_VALUES)
    values_C[1:] = 2.0**-40
    held = OneChunk(BLOCK_VALUES)
    held.write(values_C, values_C)

    first_C, second_C = held.read()

    assert first_C[1:].count_nonzero() == 0
    assert torch.equal(second_C[1:], torch.full((BLOCK_VALUES - 1,), 2.0**-SECOND_OCTAVES))


def test_blocks_do_not_disturb_each_other() -> None:
    values_C = torch.cat([torch.full((256,), 1e-12), torch.full((256,), 1e12), torch.zeros(40)])
    held = OneChunk(len(values_C))
    held.write(-values_C, values_C)

    first_C, second_C = held.read()

    assert torch.equal(first_C, -values_C)
    assert torch.equal(second_C, values_C)


def test_a_block_that_is_not_full_takes_its_scale_from_its_values_alone() -> None:
    held = OneChunk(3)
    held.write(torch.ones(3), torch.ones(3))
    tiny_C = torch.full((3,), 1e-12)
    held.write(tiny_C, tiny_C)

    first_C, second_C = held.read()

    assert torch.equal(first_C, tiny_C)
    assert torch.equal(second_C, tiny_C)


@settings(max_examples=25, deadline=None)
@given(fraction=st.floats(0.01, 0.99), octave=st.integers(0, 20), place=st.integers(1, 255))
def test_the_second_moment_is_right_on_average_over_steps(
    fraction: float, octave: int, place: int
) -> None:
    code = SECOND_CODES_PER_OCTAVE * octave + fraction
    values_C = torch.ones(BLOCK_VALUES)
    values_C[place] = 2.0 ** (-code / SECOND_CODES_PER_OCTAVE)
    held = OneChunk(BLOCK_VALUES)
    logs = []
    for step in range(200):
        held.write(values_C, values_C, step)
        logs.append(held.read()[1][place].log2().item())

    mean_codes = -sum(logs) / len(logs) * SECOND_CODES_PER_OCTAVE

    assert mean_codes == pytest.approx(code, abs=0.02)


def test_a_second_moment_follows_gradients_that_shrink_beside_one_that_does_not() -> None:
    """Each step changes it by 0.1%, and neighbouring codes differ by 6.7%."""
    held = OneChunk(BLOCK_VALUES)
    exact_C = torch.ones(BLOCK_VALUES)
    held.write(exact_C, exact_C)
    for step in range(2, 3002):
        _, second_C = held.read()
        for values_C in (second_C, exact_C):
            values_C[1:] *= 0.999
        held.write(exact_C, second_C, step)

    assert held.read()[1][1:].mean().item() == pytest.approx(exact_C[1].item(), rel=0.02)


def test_equal_steps_give_equal_codes() -> None:
    values_C = spread(1000, 20)
    states = []
    for _ in range(2):
        held = OneChunk(1000)
        held.write(values_C, values_C, step=7)
        states.append(held.moments.state())

    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_decayed_values_and_the_others_share_no_block() -> None:
    chunks = list(chunks_of(700, 300))

    assert chunks == [Chunk(0, 300, True, 0), Chunk(300, 700, False, 2)]
    assert [chunk.blocks for chunk in chunks] == [slice(0, 2), slice(2, 4)]
