"""Draws follow the law, keep transformers' own sets of tokens, and depend on nobody else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from actors.engine.batch import Draw
from actors.engine.sampling import FAN_OUT, _penalise, _truncate, logprobs, sample, uniforms

pytestmark = pytest.mark.engine

LOGITS_7 = torch.tensor([1.2, -0.3, 0.9, 2.0, -1.5, 0.4, 1.7])


def draw(position: int = 0, **how: Any) -> Draw:
    return Draw(**({"seed": 11, "position": position, "temperature": 1.0} | how))


def random_logits(rows: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3.0


def warpers(how: dict[str, Any]) -> LogitsProcessorList:
    """What `generate` builds of the same settings, in its order."""
    steps = LogitsProcessorList([TemperatureLogitsWarper(float(how.get("temperature", 1.0)))])
    if how.get("top_k"):
        steps.append(TopKLogitsWarper(how["top_k"]))
    if how.get("top_p", 1.0) < 1.0:
        steps.append(TopPLogitsWarper(how["top_p"]))
    if how.get("min_p"):
        steps.append(MinPLogitsWarper(how["min_p"]))
    return steps


# --- the law ----------------------------------------------------------------------------------


def test_the_uniform_numbers_are_these_for_ever() -> None:
    # A numpy that changed them would change every seeded reply.
    golden = {
        (0, 0): [0.011546754286331562, 0.5023796042735054],
        (0, 1): [0.21185954403345741, 0.7847420543536522],
        (1, 0): [0.3035680343067586, 0.9002684531124185],
        (2**63 - 1, 2**31): [0.0003848132633916812, 0.4104197589335572],
        (12345, 678): [0.6228780610983956, 0.7599848011641216],
    }
    assert {key: uniforms(*key, 5)[[0, 4]].tolist() for key in golden} == golden


def test_uniform_numbers_of_neighbouring_seeds_and_positions_are_uncorrelated() -> None:
    grid = np.array([[uniforms(seed, position, 6) for position in range(64)] for seed in range(64)])

    assert stats.kstest(grid.flatten(), "uniform").pvalue > 0.01
    turned = [np.roll(grid, 1, axis) for axis in range(3)]
    # The last of one position and the first of the next are not of one block of Philox.
    apart = [np.roll(grid, (1, shift), (1, 2)) for shift in range(1, 6)]
    for other in (*turned, *apart, grid.transpose(1, 0, 2)):
        assert abs(stats.pearsonr(grid.flatten(), other.flatten())[0]) < 0.05


@pytest.mark.parametrize(
    ("how", "count"),
    [
        ({}, 100_000),
        ({"temperature": 0.6}, 20_000),
        ({"temperature": 2.5}, 20_000),
        ({"top_k": 3}, 20_000),
        ({"top_p": 0.8}, 20_000),
        ({"min_p": 0.3}, 20_000),
        ({"top_k": 5, "top_p": 0.9, "min_p": 0.1, "temperature": 1.5}, 20_000),
    ],
    ids=str,
)
def test_frequencies_are_the_probabilities_of_the_kept_tokens(
    how: dict[str, Any], count: int
) -> None:
    drawn = sample(LOGITS_7.expand(count, 7), [draw(i, **how) for i in range(count)])

    expected = warpers(how)(torch.zeros(1, 1, dtype=torch.long), LOGITS_7[None]).softmax(-1)[0]
    counts = torch.bincount(torch.tensor(drawn), minlength=7)
    kept = expected > 0
    assert counts[~kept].sum() == 0
    expected_counts = (expected[kept].double() / expected[kept].double().sum()) * count
    assert stats.chisquare(counts[kept].numpy(), expected_counts.numpy()).pvalue > 0.01


@pytest.mark.parametrize("vocabulary", [1, 2, 7, 16, 17, 300, 5000])
def test_a_token_is_read_off_a_tree_of_cumulative_distributions(vocabulary: int) -> None:
    count = 200
    logits = random_logits(1, vocabulary, seed=3)

    drawn = sample(logits.expand(count, vocabulary), [draw(i) for i in range(count)])

    probabilities = logits[0].softmax(-1).tolist()
    assert drawn == [descended(probabilities, uniforms(11, i, 9).tolist()) for i in range(count)]


def descended(probabilities: Sequence[float], numbers: Sequence[float]) -> int:
    """The draw as plain recursion: (weight, first id) of every node, leaves first."""
    levels = [list(probabilities)]
    while len(levels[-1]) > 1:
        below = levels[-1]
        levels.append([sum(below[i : i + FAN_OUT]) for i in range(0, len(below), FAN_OUT)])
    node = 0
    for below, number in zip(reversed(levels[:-1]), numbers, strict=False):
        branches = below[node * FAN_OUT : (node + 1) * FAN_OUT]
        target, branch = number * sum(branches), 0
        while target >= branches[branch]:
            target -= branches[branch]
            branch += 1
        node = node * FAN_OUT + branch
    return node


def test_frequencies_hold_over_several_levels() -> None:
    count = 40_000
    logits = random_logits(1, 300, seed=5) / 3.0

    drawn = sample(logits.expand(count, 300), [draw(i) for i in range(count)])

    counts = torch.bincount(torch.tensor(drawn), minlength=300)
    expected = logits[0].double().softmax(-1) * count
    assert stats.chisquare(counts.numpy(), expected.numpy()).pvalue > 0.01


def test_rounding_parts_few_draws() -> None:
    # As much noise parts 28 of these draws from one cumulative distribution over the vocabulary.
    logits = random_logits(1, 4096, seed=7)
    noise = 1e-4 * torch.randn(1, 4096, generator=torch.Generator().manual_seed(8))
    batches = [[draw(i) for i in range(start, start + 500)] for start in range(0, 4000, 500)]

    one, other = (
        [token for draws in batches for token in sample(rows.expand(500, -1), draws)]
        for rows in (logits, logits + noise)
    )

    assert sum(a != b for a, b in zip(one, other, strict=True)) <= 2


# --- transformers' own sets -------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 1000},
        {"top_p": 0.05},
        {"top_p": 0.5},
        {"top_p": 0.95},
        {"top_p": 1e-9},
        {"min_p": 0.02},
        {"min_p": 0.5},
        {"min_p": 1.0},
        {"top_k": 20, "top_p": 0.7},
        {"top_p": 0.9, "min_p": 0.05},
        {"top_k": 30, "min_p": 0.01, "temperature": 1.7},
        {"top_k": 25, "top_p": 0.8, "min_p": 0.03, "temperature": 0.8},
    ],
    ids=str,
)
def test_the_kept_tokens_are_those_of_transformers(how: dict[str, Any]) -> None:
    logits = random_logits(64, 50)
    wanted = warpers(how)(torch.zeros(64, 1, dtype=torch.long), logits)

    probs = (logits / how.get("temperature", 1.0)).softmax(-1)
    kept = _truncate(probs, [draw(**how)] * 64)

    assert torch.equal(kept > 0, wanted > -torch.inf)
    torch.testing.assert_close(kept / kept.sum(-1, keepdim=True), wanted.softmax(-1))


def test_rows_of_one_call_are_truncated_each_by_its_own_settings() -> None:
    logits = random_logits(4, 50)
    hows: list[dict[str, Any]] = [{"top_k": 2}, {"top_p": 0.3}, {"min_p": 0.4}, {"top_k": 9}]

    kept = _truncate(logits.softmax(-1), [draw(**how) for how in hows])

    for i, how in enumerate(hows):
        wanted = warpers(how)(torch.zeros(1, 1, dtype=torch.long), logits[i : i + 1])[0]
        assert torch.equal(kept[i] > 0, wanted > -torch.inf)


def test_equal_logits_are_kept_by_lower_id_so_that_top_k_is_exactly_k() -> None:
    kept = _truncate(torch.full((1, 6), 1 / 6), [draw(top_k=2)])

    assert kept[0].nonzero().flatten().tolist() == [0, 1]


@pytest.mark.parametrize("penalty", [0.5, 1.3, 100.0])
def test_the_repetition_penalty_is_transformers_own(penalty: float) -> None:
    logits, history = random_logits(1, 50), [3, 3, 9, 41, 9, 0]
    wanted = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([history]), logits)

    got = logits[0].clone()
    _penalise(got, draw(repetition_penalty=penalty, history=tuple(history), num_prompt=4))

    torch.testing.assert_close(got, wanted[0])


def test_presence_and_frequency_count_the_output_alone() -> None:
    got = torch.zeros(6)

    # Prompt 1 1 4, output 2 2 2 5.
    _penalise(
        got,
        draw(presence_penalty=0.5, frequency_penalty=0.25, history=(1, 1, 4, 2, 2, 2, 5),
             num_prompt=3),
    )  # fmt: skip

    assert got.tolist() == [0.0, 0.0, -(0.5 + 3 * 0.25), 0.0, 0.0, -(0.5 + 0.25)]


def test_penalties_without_output_change_nothing() -> None:
    got = torch.zeros(6)

    _penalise(got, draw(presence_penalty=0.5, frequency_penalty=2.0, history=(1, 1), num_prompt=2))

    assert got.tolist() == [0.0] * 6


def test_penalties_come_before_the_choice_of_the_best() -> None:
    logits = torch.tensor([[2.0, 1.9, 0.0]])

    how: dict[str, Any] = {"temperature": 0.0, "history": (0,), "num_prompt": 0}
    assert sample(logits, [draw(**how, presence_penalty=0.2)]) == [1]
    assert sample(logits, [draw(**how, presence_penalty=0.05)]) == [0]
    assert logits.tolist() == [[2.0, pytest.approx(1.9), 0.0]]  # the caller's logits stay


# --- greedy, bans and edges -------------------------------------------------------------------


@pytest.mark.parametrize("banned", [(), (6,)])
def test_equally_good_tokens_give_the_lowest_id(banned: tuple[int, ...]) -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0, 5.0, 5.0, 2.0, 9.0 if banned else 0.0]])

    assert sample(logits, [draw(temperature=0.0, banned=banned)]) == [1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_banned_token_is_never_drawn(temperature: float) -> None:
    logits = torch.tensor([[0.0, 30.0, 1.0, 29.0, 2.0]]).expand(50, 5)

    drawn = sample(
        logits, [draw(i, temperature=temperature, banned=(1, 3), top_k=3) for i in range(50)]
    )

    assert not {1, 3} & set(drawn)


def test_a_banned_id_that_the_head_does_not_have_is_of_no_account() -> None:
    # generation_config.json may name end tokens of a larger vocabulary.
    assert sample(LOGITS_7[None], [draw(temperature=0.0, banned=(3, 7, 151_645))]) == [6]


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-46, 1e-40, 1e-20, 1e-6])
@pytest.mark.parametrize("how", [{}, {"top_k": 3}, {"top_p": 0.5, "min_p": 0.5}], ids=str)
def test_a_temperature_near_zero_is_greedy(temperature: float, how: dict[str, Any]) -> None:
    logits = random_logits(16, 50)

    drawn = sample(logits, [draw(i, temperature=temperature, **how) for i in range(16)])

    assert drawn == logits.argmax(-1).tolist()


def test_a_high_temperature_is_nearly_flat_and_still_obeys_top_k() -> None:
    drawn = sample(
        LOGITS_7.expand(300, 7), [draw(i, temperature=100.0, top_k=2) for i in range(300)]
    )

    assert set(drawn) == {3, 6}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_draw_is_a_token_of_a_large_vocabulary(dtype: torch.dtype) -> None:
    logits = torch.full((64, 150_000), -20.0)
    logits[:, 1000] = 0.0
    logits[:, -1] = -1.0

    drawn = sample(logits.to(dtype), [draw(i) for i in range(64)])

    assert all(0 <= token < 150_000 for token in drawn)
    assert {1000, 149_999} <= set(drawn)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_an_error_and_never_a_token(
    bad: float, temperature: float
) -> None:
    logits = torch.zeros(3, 7)
    logits[1, 4] = bad

    with pytest.raises(ValueError, match=r"1 of 3 rows.*engine\.dtype"):
        sample(logits, [draw(i, temperature=temperature) for i in range(3)])


# --- independence -----------------------------------------------------------------------------


def mixed_draws(count: int) -> list[Draw]:
    hows: Sequence[dict[str, Any]] = (
        {},
        {"temperature": 0.0},
        {"top_k": 5},
        {"top_p": 0.6, "temperature": 0.7},
        {"min_p": 0.2, "banned": (3, 4)},
        {"repetition_penalty": 1.4, "history": (1, 2, 3), "num_prompt": 1},
        {"temperature": 0.0, "presence_penalty": 1.0, "history": (1, 2, 3), "num_prompt": 1},
    )
    return [draw(i // 2, seed=i, **hows[i % len(hows)]) for i in range(count)]


def test_a_draw_does_not_depend_on_its_batch() -> None:
    draws, logits = mixed_draws(56), random_logits(56, 211)

    together = sample(logits, draws)
    alone = [sample(logits[i : i + 1], [draws[i]])[0] for i in range(56)]
    order = torch.randperm(56, generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = sample(logits[order], [draws[i] for i in order])

    assert together == alone
    assert shuffled == [together[i] for i in order]


def test_a_draw_depends_on_seed_and_position() -> None:
    logits = torch.zeros(1, 1000)

    drawn = {
        sample(logits, [draw(position, seed=seed)])[0] for seed in range(8) for position in range(8)
    }

    assert len(drawn) > 55


# --- log-probabilities ------------------------------------------------------------------------


def test_logprobs_are_the_log_softmax_of_the_unmodified_logits() -> None:
    logits = random_logits(3, 50)
    wanted = logits.log_softmax(-1)

    entries = logprobs(logits, [4, 9, 49], [3, -1, 0])

    first, second, third = entries
    assert second is None
    assert first is not None
    assert third is not None
    assert first.token_id == 4
    assert first.logprob == pytest.approx(wanted[0, 4].item())
    values, ids = wanted[0].topk(3)
    assert [pair[0] for pair in first.top] == ids.tolist()
    assert [pair[1] for pair in first.top] == pytest.approx(values.tolist())
    assert (third.token_id, third.top) == (49, ())
    assert third.logprob == pytest.approx(wanted[2, 49].item())


def test_more_logprobs_than_tokens_are_all_tokens() -> None:
    [entry] = logprobs(LOGITS_7[None], [3], [20])

    assert entry is not None
    assert sorted(pair[0] for pair in entry.top) == list(range(7))
    assert math.fsum(math.exp(pair[1]) for pair in entry.top) == pytest.approx(1.0, abs=1e-6)


def test_no_logprobs_wanted_are_none() -> None:
    assert logprobs(LOGITS_7.expand(2, 7), [1, 2], [-1, -1]) == [None, None]
