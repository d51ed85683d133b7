from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.costs import (
    LEAST_HEADROOM_FRACTION,
    layer_step_s,
    memory_cap_bytes,
    occupied_s,
    step_energy_j,
    transfer_s,
)
from placement.measured import LayerSample, MatmulRate, MeasuredLayer
from placement.topology import Device, LinkRate
from placement.training_costs import (
    layer_activation_bytes,
    layer_training_s,
    saved_activation_bytes,
    stage_training_bytes,
)
from placement.workload import LayerCost, ModelProfile, TrainingWorkload

LAYER = LayerCost(
    flops_per_token=2e6,
    weight_bytes=2_000_000,
    kv_bytes_per_token=100,
    attention_flops_per_context_token=1000.0,
    activation_bytes_per_token=50,
    score_bytes_per_token_pair=2,
)


def device(**changes: Any) -> Device:
    fields: dict[str, Any] = {
        "id": "a",
        "node": "n",
        "kind": "cpu",
        "flops_per_s": 1e9,
        "memory_bytes_per_s": 1e9,
        "memory_bytes": 1 << 30,
    }
    return Device(**(fields | changes))


def measured(*samples: LayerSample) -> Device:
    return device(measured_layers=(MeasuredLayer(layer=LAYER, samples=samples),))


def sample(tokens: int, forward_s: float, **changes: Any) -> LayerSample:
    return LayerSample(tokens=tokens, context_tokens=0, forward_s=forward_s, **changes)


def test_a_measured_point_is_predicted_exactly() -> None:
    measured_at = measured(sample(1, 0.01), sample(16, 0.5))

    assert layer_step_s(measured_at, LAYER, 1, 0) == pytest.approx(0.01)
    assert layer_step_s(measured_at, LAYER, 16, 0) == pytest.approx(0.5)


def test_between_two_points_the_ratio_to_the_roofline_is_interpolated_over_log_rows() -> None:
    # The roofline says 2 ms at one row (weights) and 32 ms at 16 (compute): ratios 5 and 10.
    measured_at = measured(sample(1, 0.01), sample(16, 0.32))

    # Four rows lie half way; their roofline is 8 ms.
    assert layer_step_s(measured_at, LAYER, 4, 0) == pytest.approx(0.008 * 7.5)
    # Beyond the ends the last ratio holds.
    assert layer_step_s(measured_at, LAYER, 64, 0) == pytest.approx(0.128 * 10)


def test_another_layer_is_not_bent_by_what_was_measured_of_this_one() -> None:
    other = LayerCost(flops_per_token=2e6, weight_bytes=1)

    assert layer_step_s(measured(sample(1, 9.0)), other, 1, 0) == pytest.approx(0.002)


def test_a_rate_measured_at_few_rows_slows_only_the_compute() -> None:
    slow = device(
        matmul_rates=(
            MatmulRate(rows=1, flops_per_s=1e8),
            MatmulRate(rows=100, flops_per_s=1e9),
        )
    )

    assert layer_step_s(slow, LAYER, 1, 0) == pytest.approx(2e6 / 1e8)
    assert layer_step_s(slow, LAYER, 100, 0) == pytest.approx(2e8 / 1e9)
    # Half way in the log of the rows: between a tenth of the speed and all of it.
    assert layer_step_s(slow, LAYER, 10, 0) == pytest.approx(2e7 / 1e9 * 5.5)


@given(
    st.lists(
        st.tuples(st.integers(1, 4096), st.floats(1e-6, 10.0)),
        min_size=1,
        max_size=6,
        unique_by=lambda pair: pair[0],
    ),
    st.integers(1, 8192),
)
def test_a_prediction_lies_between_the_ratios_of_its_neighbours(
    points: list[tuple[int, float]], tokens: int
) -> None:
    samples = [sample(*point) for point in sorted(points)]
    ratios = [s.forward_s / layer_step_s(device(), LAYER, s.tokens, 0) for s in samples]

    ratio = layer_step_s(measured(*samples), LAYER, tokens, 0) / layer_step_s(
        device(), LAYER, tokens, 0
    )

    assert min(ratios) * (1 - 1e-9) <= ratio <= max(ratios) * (1 + 1e-9)


def test_samples_out_of_order_or_without_a_real_time_are_refused() -> None:
    with pytest.raises(ValueError, match="token counts must ascend; 2 follows 4"):
        measured(sample(4, 1.0), sample(2, 1.0))
    with pytest.raises(ValueError, match="sample of 4 tokens: forward_s \\(nan\\)"):
        sample(4, math.nan)
    with pytest.raises(ValueError, match="sample of 4 tokens: backward_s \\(0\\)"):
        sample(4, 1.0, backward_s=0)
    with pytest.raises(ValueError, match="0 samples"):
        MeasuredLayer(layer=LAYER, samples=())
    with pytest.raises(ValueError, match="rows of matmul_rates must ascend; 1 follows 1"):
        device(matmul_rates=(MatmulRate(rows=1, flops_per_s=1), MatmulRate(rows=1, flops_per_s=2)))
    with pytest.raises(ValueError, match="at 2 rows: flops_per_s \\(-1\\)"):
        MatmulRate(rows=2, flops_per_s=-1)


def test_an_unmeasured_backward_pass_takes_two_forward_passes() -> None:
    # 8 rows over 36 pairs: 16e6 + 36e3 FLOPs at 1e9.
    seconds = layer_training_s(device(), LAYER, 8, 36)

    assert seconds == pytest.approx((0.016036, 0.016036, 0.032072))


def test_a_measured_backward_pass_is_used_and_interpolated() -> None:
    trained = measured(
        sample(1, 1.0, recompute_s=2.0, backward_s=3.0), sample(16, 1.0, backward_s=5.0)
    )

    at_four = layer_training_s(trained, LAYER, 4, 4)

    assert at_four.backward_s / at_four.forward_s == pytest.approx(4.0)
    assert at_four.recompute_s / at_four.forward_s == pytest.approx(2.0)


def test_activations_by_formula_and_by_measurement() -> None:
    assert layer_activation_bytes(device(), LAYER, 10, 55) == 10 * 50 + 2 * 55
    by_measure = measured(sample(8, 1.0, activation_bytes=800))
    assert layer_activation_bytes(by_measure, LAYER, 10, 55) == 1000


def test_saved_activations_are_pipers_twelve_bytes_a_number_when_every_head_has_its_own_keys() -> (
    None
):
    # 12 s d for attention, 2 s k (3 f + d) for the experts, per row.
    assert saved_activation_bytes(
        hidden_size=64,
        query_size=64,
        key_value_size=64,
        expert_size=32,
        experts_per_token=2,
        dtype_bytes=2,
    ) == 12 * 64 + 2 * 2 * (3 * 32 + 64)


def test_a_training_stage_holds_state_of_every_parameter_and_the_micro_batches_in_flight() -> None:
    layer = LayerCost(
        flops_per_token=1,
        weight_bytes=200,
        routed_bytes=120,
        num_experts=4,
        experts_per_token=1,
        activation_bytes_per_token=3,
    )
    end = LayerCost(flops_per_token=0, weight_bytes=20)
    profile = ModelProfile(
        name="m", embedding=end, layers=(layer,) * 2, head=end, hidden_bytes_per_token=2
    )

    # 2-byte weights, 16 bytes a parameter; experts over 2 shards; 3 micro-batches of 10 rows.
    assert (
        stage_training_bytes(profile, 0, 1, tokens=10, in_flight=3, expert_shards=2)
        == (80 + 60 + 20) * 8 + 3 * 30
    )
    assert stage_training_bytes(profile, 1, 2, tokens=10) == (200 + 20) * 8 + 30


def test_a_link_is_occupied_by_the_bytes_and_not_by_the_distance() -> None:
    link = LinkRate(bandwidth_bytes_per_s=100.0, latency_s=5.0)

    assert transfer_s(link, 50) == 5.5
    assert occupied_s(link, 50) == 0.5


def test_energy_is_power_above_idle_times_time() -> None:
    assert step_energy_j(device(active_power_w=50.0), 0.5) == 25.0
    assert step_energy_j(device(), 0.5) == 0.0
    with pytest.raises(ValueError, match="device a: active_power_w \\(-1\\)"):
        device(active_power_w=-1)


@pytest.mark.parametrize("headroom", [0.0, 0.0999, 1.0, math.nan])
def test_a_headroom_below_a_tenth_is_refused(headroom: float) -> None:
    with pytest.raises(ValueError, match=r"at least 0\.1 and below 1"):
        memory_cap_bytes(100, headroom)
    assert memory_cap_bytes(100, LEAST_HEADROOM_FRACTION) == 90


def test_a_training_load_counts_causal_pairs_and_refuses_nonsense() -> None:
    load = TrainingWorkload(micro_batches=4, sequences_per_micro_batch=2, sequence_tokens=3)

    assert (load.tokens, load.context_tokens) == (6, 12)
    with pytest.raises(ValueError, match="micro_batches \\(0\\)"):
        TrainingWorkload(micro_batches=0, sequences_per_micro_batch=1, sequence_tokens=1)
    with pytest.raises(ValueError, match=r"trained_fraction \(1\.5\)"):
        TrainingWorkload(
            micro_batches=1, sequences_per_micro_batch=1, sequence_tokens=1, trained_fraction=1.5
        )
