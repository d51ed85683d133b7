"""Which units are shipped: exactly the published selection, never a bit over budget."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.evidence import (
    SAGE,
    SELECTORS,
    Selector,
    Units,
    attention_importance,
    grid_units,
    rollout_importance,
    select,
)


def random_units(num_units: int, seed: int, *, dimension: int = 6, steps: int = 0) -> Units:
    """Units of random directions; with `steps` importance takes that many values, so it ties."""
    draws = np.random.default_rng(seed)
    importance = draws.random(num_units)
    if steps:
        importance = np.floor(importance * steps) / steps
    return Units(importance, draws.normal(size=(num_units, dimension)))


def published(units: Units, budget: int, k: float) -> list[int]:
    """SAGE as its paper writes it: top floor(kB) by importance, then farthest points."""
    importance = units.importance_N.tolist()
    order = sorted(range(len(units)), key=lambda unit: (-importance[unit], unit))
    candidates = order if math.isinf(k) else order[: math.floor(k * budget)]
    directions = units.embeddings_ND / np.linalg.norm(units.embeddings_ND, axis=1, keepdims=True)
    chosen = candidates[:1]
    while len(chosen) < min(budget, len(candidates)):
        rest = sorted(set(candidates) - set(chosen))
        chosen.append(
            min(
                rest, key=lambda unit: (max(directions[unit] @ directions[s] for s in chosen), unit)
            )
        )
    return chosen[:budget]


@given(
    num_units=st.integers(1, 30),
    budget=st.integers(0, 35),
    k=st.sampled_from([1.0, 1.25, 1.5, 2.0, 3.0, math.inf]),
    seed=st.integers(0, 10_000),
    steps=st.sampled_from([0, 1, 4]),
)
def test_the_selection_is_the_published_one(
    num_units: int, budget: int, k: float, seed: int, steps: int
) -> None:
    units = random_units(num_units, seed, steps=steps)
    if budget > num_units:
        k = math.inf  # everything is taken; only the order is a question of k

    chosen = select(units, budget, Selector(prefilter=k))

    assert list(chosen) == published(units, budget, k)


@given(num_units=st.integers(1, 40), budget=st.integers(0, 45), seed=st.integers(0, 10_000))
def test_importance_alone_is_a_prefilter_of_one(num_units: int, budget: int, seed: int) -> None:
    units = random_units(num_units, seed, steps=5)

    diverse = select(units, budget, Selector(prefilter=1.0))

    assert set(diverse) == set(select(units, budget, SELECTORS["prefix"]))


@pytest.mark.parametrize("name", SELECTORS)
@given(
    num_units=st.integers(0, 30),
    budget=st.integers(0, 400),
    seed=st.integers(0, 10_000),
    has_prices=st.booleans(),
)
def test_a_choice_is_never_over_budget_and_leaves_nothing_that_fits(
    name: str, num_units: int, budget: int, seed: int, has_prices: bool
) -> None:
    units = random_units(num_units, seed)
    prices = np.random.default_rng(seed).integers(1, 60, num_units).tolist()
    selector = SELECTORS[name]

    chosen = select(units, budget, selector, prices_N=prices if has_prices else None)

    assert len(set(chosen)) == len(chosen)
    assert chosen == select(units, budget, selector, prices_N=prices if has_prices else None)
    if not has_prices:
        assert len(chosen) == min(budget, num_units)
        return
    left = budget - sum(prices[unit] for unit in chosen)
    assert left >= 0
    assert all(prices[unit] > left for unit in range(num_units) if unit not in chosen)


@pytest.mark.parametrize("name", SELECTORS)
@given(num_units=st.integers(1, 30), budget=st.integers(0, 30), seed=st.integers(0, 10_000))
def test_equal_prices_change_nothing(name: str, num_units: int, budget: int, seed: int) -> None:
    units = random_units(num_units, seed)
    selector, price = SELECTORS[name], 6144
    dearer = select(units, budget * price + price - 1, selector, prices_N=[price] * num_units)

    assert dearer == select(units, budget, selector)


def test_importance_and_diversity_are_weighed_at_each_choice() -> None:
    units = Units(
        np.array([1.0, 0.9, 0.6, 0.1]),
        np.array([[1.0, 0.0], [1.0, 0.05], [0.6, 0.8], [-1.0, 0.0]]),
    )

    def of(weight: float) -> tuple[int, ...]:
        return select(units, 3, Selector(method="balanced", importance_weight=weight))

    # 1 is nearly what 0 is, 2 partly, 3 the opposite: .45 - .5, .3 - .3 and .05 + .5.
    assert of(0.5) == (0, 3, 2)
    assert of(1.0) == (0, 1, 2)
    assert of(0.0) == (0, 3, 2)


# --- what diversity is for --------------------------------------------------------------------


def clusters(noise: int = 0) -> tuple[Units, np.ndarray[Any, np.dtype[np.int64]]]:
    """Four clusters of near-duplicates; nearly all importance is in the first. Noise units lie
    anywhere, and are as important as the clusters' less important units."""
    draws = np.random.default_rng(3)
    centres = np.eye(4, 32)
    of_cluster = np.repeat(np.arange(4), 4)
    embeddings = centres[of_cluster] + 0.01 * draws.normal(size=(16, 32))
    importance = np.where(of_cluster == 0, 1.0, 0.3) + 0.001 * draws.random(16)
    if noise:
        embeddings = np.vstack([embeddings, draws.normal(size=(noise, 32))])
        importance = np.concatenate([importance, np.full(noise, 0.05)])
        of_cluster = np.concatenate([of_cluster, np.full(noise, -1)])
    return Units(importance, embeddings), of_cluster


def covered(chosen: tuple[int, ...], of_cluster: Any) -> int:
    return len({int(of_cluster[unit]) for unit in chosen} - {-1})


def test_diversity_hits_every_cluster_where_importance_hits_one() -> None:
    units, of_cluster = clusters()

    assert covered(select(units, 4, SELECTORS["prefix"]), of_cluster) == 1
    assert covered(select(units, 4, Selector(prefilter=4.0)), of_cluster) == 4


def test_noise_above_the_filter_spoils_diversity_alone_and_not_both_weighed() -> None:
    units, of_cluster = clusters(noise=16)

    assert covered(select(units, 4, Selector(prefilter=math.inf)), of_cluster) < 4
    assert covered(select(units, 4, SELECTORS["mmr"]), of_cluster) == 4


# --- the others -------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 9), (4, 4), (3, 7), (8, 8), (14, 14)])
def test_a_grid_is_spread_evenly(rows: int, columns: int) -> None:
    for count in range(rows * columns + 1):
        places = grid_units(rows, columns, count)

        assert len(set(places)) == count
        assert all(0 <= place < rows * columns for place in places)
    # 16 of 64 are one of each 2 x 2.
    cells = {(place // 8 // 2, place % 8 // 2) for place in grid_units(8, 8, 16)}
    assert len(cells) == 16


def test_random_choices_depend_on_the_seed_alone() -> None:
    units = random_units(30, 1)
    seeds = {select(units, 5, Selector(method="random", seed=seed)) for seed in range(20)}

    assert len(seeds) == 20


# --- importance -------------------------------------------------------------------------------


def attentions(layers: int, heads: int, tokens: int, seed: int = 0) -> Any:
    values = np.random.default_rng(seed).random((layers, heads, tokens, tokens))
    return values / values.sum(-1, keepdims=True)


def test_importance_is_the_class_tokens_attention() -> None:
    attention = attentions(1, 3, 6)[0]

    importance = attention_importance(attention)

    by_hand = attention.mean(0)[0, 1:]
    assert importance == pytest.approx(by_hand / by_hand.sum())


def test_rollout_is_the_product_of_the_layers() -> None:
    attention = attentions(4, 2, 5)
    for first in range(4):
        product = np.eye(5)
        for layer in attention[first:]:
            product = (0.5 * np.eye(5) + 0.5 * layer.mean(0)) @ product

        by_hand = product[0, 1:]
        assert rollout_importance(attention, first) == pytest.approx(by_hand / by_hand.sum())


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("importance", "embeddings", "grid", "complaint"),
    [
        (np.ones(3), np.ones((2, 4)), None, "2 embeddings are of 3 units"),
        (np.ones((3, 1)), np.ones((3, 4)), None, "must be"),
        (np.ones(3), np.ones((3, 4)), (2, 2), "a grid of 2x2 is not of 3 units"),
        (np.array([1.0, -1.0]), np.ones((2, 4)), None, "negative or no number"),
        (np.array([1.0, np.nan]), np.ones((2, 4)), None, "negative or no number"),
        (np.ones(1), np.array([[np.inf]]), None, "the embedding of a unit is no number"),
    ],
)
def test_units_that_cannot_be_are_refused(
    importance: Any, embeddings: Any, grid: tuple[int, int] | None, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        Units(importance, embeddings, grid)


@pytest.mark.parametrize("change", [{"prefilter": 0.5}, {"prefilter": math.nan},
                                    {"importance_weight": 1.5}])  # fmt: skip
def test_selectors_that_cannot_be_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        Selector(**change)


def test_a_negative_budget_and_a_free_unit_are_refused() -> None:
    units = random_units(3, 0)
    with pytest.raises(ValueError, match="budget"):
        select(units, -1)
    with pytest.raises(ValueError, match="3 positive"):
        select(units, 1, prices_N=[1, 0, 2])
    with pytest.raises(ValueError, match="3 positive"):
        select(units, 1, prices_N=[1, 2])


def test_zero_vectors_are_like_nothing() -> None:
    units = Units(np.array([1.0, 0.5, 0.4]), np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]))

    assert select(units, 2, SAGE) == (0, 2)


def test_farthest_points_are_within_twice_the_best_radius() -> None:
    # The guarantee of greedy k-centre, by brute force, in angles.
    for seed in range(5):
        units = random_units(9, seed, dimension=3)
        directions = units.embeddings_ND / np.linalg.norm(
            units.embeddings_ND, axis=1, keepdims=True
        )
        angles = np.arccos(np.clip(directions @ directions.T, -1, 1))

        def radius(chosen: tuple[int, ...], angles: Any = angles) -> float:
            return float(angles[:, list(chosen)].min(axis=1).max())

        best = min(radius(chosen) for chosen in combinations(range(9), 3))
        assert radius(select(units, 3, Selector(prefilter=math.inf))) <= 2 * best + 1e-9
