from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.costs import (
    ACTIVATION_ROWS,
    LOGIT_BYTES,
    LOGIT_COPIES,
    layer_read_bytes,
    layer_step_s,
    stage_activation_bytes,
    stage_cost,
    stage_kv_bytes,
    stage_step_s,
    stage_weight_bytes,
    transfer_s,
)
from placement.topology import Device, Link
from placement.workload import LayerCost, ModelProfile, ServingWorkload

DENSE = LayerCost(
    flops_per_token=2000.0,
    weight_bytes=1000,
    kv_bytes_per_token=4,
    attention_flops_per_context_token=10.0,
)
SPARSE = LayerCost(
    flops_per_token=600.0, weight_bytes=900, routed_bytes=800, num_experts=8, experts_per_token=2
)
DEVICE = Device(
    id="d", node="n", kind="paced", flops_per_s=1e6, memory_bytes_per_s=1e5, memory_bytes=1 << 20
)


def profile(*layers: LayerCost, **changes: Any) -> ModelProfile:
    fields: dict[str, Any] = {
        "name": "toy",
        "embedding": LayerCost(flops_per_token=0, weight_bytes=640),
        "layers": layers or (DENSE, DENSE, DENSE),
        "head": LayerCost(flops_per_token=1280.0, weight_bytes=640),
        "hidden_bytes_per_token": 64,
    }
    return ModelProfile(**(fields | changes))


def test_a_small_step_is_bound_by_memory_and_a_large_one_by_compute() -> None:
    # 1 row: 2 ms of FLOPs, 10 ms of weights. 100 rows: 200 ms of FLOPs.
    assert layer_step_s(DEVICE, DENSE, 1, 0) == pytest.approx(0.010)
    assert layer_step_s(DEVICE, DENSE, 100, 0) == pytest.approx(0.200)


def test_context_adds_to_both_sides_of_the_roofline() -> None:
    assert layer_step_s(DEVICE, DENSE, 1, 500) == pytest.approx((1000 + 4 * 500) / 1e5)
    assert layer_step_s(DEVICE, DENSE, 100, 500) == pytest.approx((200_000 + 10 * 500) / 1e6)


def test_no_rows_cost_nothing() -> None:
    assert layer_step_s(DEVICE, DENSE, 0, 100) == 0.0
    assert layer_read_bytes(DENSE, 0) == 0.0
    assert stage_step_s(DEVICE, profile(), 0, 3, tokens=0, context_tokens=9) == 0.0


def test_dense_weights_are_read_once_however_many_rows() -> None:
    assert layer_read_bytes(DENSE, 1) == layer_read_bytes(DENSE, 1000) == 1000


def test_experts_read_follow_the_expected_distinct_hits() -> None:
    assert layer_read_bytes(SPARSE, 1) == pytest.approx(100 + 800 * 2 / 8)
    assert layer_read_bytes(SPARSE, 2) == pytest.approx(100 + 800 * (1 - 0.75**2))
    assert layer_read_bytes(SPARSE, 1000) == pytest.approx(900)


def test_expected_distinct_experts_match_a_simulation() -> None:
    rng = random.Random(0)
    tokens, trials = 5, 4000
    hits = sum(
        len({expert for _ in range(tokens) for expert in rng.sample(range(8), 2)})
        for _ in range(trials)
    )

    simulated = 100 + 800 * hits / trials / 8
    assert layer_read_bytes(SPARSE, tokens) == pytest.approx(simulated, rel=0.02)


def test_the_first_stage_looks_up_rows_and_the_last_runs_the_head() -> None:
    toy = profile()
    layer_s = layer_step_s(DEVICE, DENSE, 4, 100)
    head_s = layer_step_s(DEVICE, toy.head, 4, 0)

    steps = [
        stage_step_s(DEVICE, toy, first, first + 1, tokens=4, context_tokens=100)
        for first in range(3)
    ]

    assert steps == pytest.approx([layer_s + 4 * 64 / 1e5, layer_s, layer_s + head_s])


def test_the_head_prices_sampled_rows_only() -> None:
    toy = profile()

    def last_stage_s(head_tokens: int | None) -> float:
        return stage_step_s(
            DEVICE, toy, 2, 3, tokens=100, context_tokens=0, head_tokens=head_tokens
        )

    without_head = layer_step_s(DEVICE, DENSE, 100, 0)
    assert last_stage_s(0) == pytest.approx(without_head)
    assert last_stage_s(1) == pytest.approx(without_head + layer_step_s(DEVICE, toy.head, 1, 0))
    assert last_stage_s(None) == last_stage_s(100)


@given(
    tokens=st.integers(1, 600),
    context=st.integers(0, 10_000),
    cut=st.tuples(st.integers(0, 3), st.integers(1, 4)).filter(lambda pair: pair[0] < pair[1]),
)
def test_a_prepared_cost_is_the_sum_of_its_layers(
    tokens: int, context: int, cut: tuple[int, int]
) -> None:
    toy = profile(DENSE, SPARSE, DENSE, SPARSE)
    first, end = cut

    step_s = stage_cost(DEVICE, toy, first, end).step_s(tokens, context, min(tokens, 3))

    expected = sum(layer_step_s(DEVICE, layer, tokens, context) for layer in toy.layers[first:end])
    expected += tokens * 64 / 1e5 if first == 0 else 0.0
    expected += layer_step_s(DEVICE, toy.head, min(tokens, 3), 0) if end == 4 else 0.0
    assert math.isclose(step_s, expected, rel_tol=1e-12)


def test_a_transfer_takes_its_latency_and_its_bytes() -> None:
    link = Link(source_node="a", target_node="b", bandwidth_bytes_per_s=1e6, latency_s=0.5)

    assert transfer_s(link, 250_000) == pytest.approx(0.75)


def test_weights_count_embedding_and_head_where_they_live() -> None:
    assert stage_weight_bytes(profile(), 0, 3) == 640 + 3000 + 640
    assert stage_weight_bytes(profile(), 0, 1) == 640 + 1000
    assert stage_weight_bytes(profile(), 1, 2) == 1000
    assert stage_weight_bytes(profile(), 2, 3) == 1000 + 640


def test_a_tied_head_is_held_once_by_a_stage_that_owns_both() -> None:
    tied = profile(head_is_embedding=True)

    assert stage_weight_bytes(tied, 0, 3) == 640 + 3000
    assert stage_weight_bytes(tied, 1, 3) == 2000 + 640


def test_kv_and_activations_follow_tokens() -> None:
    assert stage_kv_bytes(profile(), 0, 2, 100) == 2 * 4 * 100
    assert (
        stage_activation_bytes(profile(), 0, 2, step_tokens=10, head_tokens=5)
        == ACTIVATION_ROWS * 64 * 10
    )
    # The toy's vocabulary: 640 bytes of head over 64 bytes a row.
    assert (
        stage_activation_bytes(profile(), 2, 3, step_tokens=10, head_tokens=5)
        == ACTIVATION_ROWS * 64 * 10 + LOGIT_COPIES * LOGIT_BYTES * 10 * 5
    )


@pytest.mark.parametrize(("first", "end"), [(-1, 2), (2, 2), (2, 1), (0, 4)])
def test_a_range_outside_the_model_is_refused(first: int, end: int) -> None:
    with pytest.raises(ValueError, match=rf"layers \[{first}, {end}\) are not a part of toy's 3"):
        stage_cost(DEVICE, profile(), first, end)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flops_per_token": -1}, "flops_per_token"),
        ({"flops_per_token": math.nan}, "flops_per_token"),
        ({"routed_bytes": 2000}, "routed_bytes .2000. is a part of weight_bytes .1000."),
        ({"experts_per_token": 2}, "experts_per_token .2. must be at most num_experts .0."),
        ({"routed_bytes": 10}, "routed_bytes is 10 but experts_per_token is 0"),
    ],
)
def test_an_impossible_layer_is_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerCost(**({"flops_per_token": 1.0, "weight_bytes": 1000} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": ()}, "0 layers"),
        ({"layers": (LayerCost(flops_per_token=1, weight_bytes=0),)}, "layer 0 has 0 weight_bytes"),
        ({"hidden_bytes_per_token": 0}, "hidden_bytes_per_token"),
        ({"embedding": DENSE}, "embedding.flops_per_token"),
        ({"head": DENSE}, "head.kv_bytes_per_token"),
    ],
)
def test_an_impossible_profile_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        profile(**changes)


def test_a_workload_is_at_least_one_of_everything() -> None:
    fields = {"lanes": 1, "sequences_per_lane": 4, "context_tokens_per_sequence": 8}
    with pytest.raises(ValueError, match=r"kv_tokens .0. must be at least 1"):
        ServingWorkload(**fields, kv_tokens=0, step_tokens=4)
    with pytest.raises(ValueError, match=r"step_tokens .3. must be at least sequences_per_lane"):
        ServingWorkload(**fields, kv_tokens=1, step_tokens=3)
