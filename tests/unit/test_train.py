from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published_profiles import GPT_OSS_20B, PROFILES, QWEN3_1_7B, QWEN3_235B, TIERS
from published_profiles import PublishedProfile as Profile
from training_pools import pools

from cluster.commands.tables import training_summary, training_table
from cluster.quantities import format_bytes
from placement.errors import InfeasiblePlanError
from placement.pooling.cuts import Cut, all_cuts, even_counts, least_stages, neighbours
from placement.pooling.keeping import kept_neighbours
from placement.pooling.search import EXHAUSTIVE_LAYERS, FINE, CutSimulator, Objective
from placement.pooling.slot_prices import SlotPrices
from placement.simulate import simulate_slots, steady_state
from placement.topology import Device, LinkRate, Topology
from placement.train import TrainPlan, plan_cut, plan_train
from placement.training import Slot, SlotSchedule, TrainingCosts, slots_from_counts
from placement.training_costs import training_costs
from placement.workload import LayerCost, ModelProfile, TrainingWorkload

QUICK = 20_000
"""Search effort for tests that do not ask how good a plan is."""


def costs_of(num_devices: int = 2, num_layers: int = 4, **changes: Any) -> TrainingCosts:
    values = {
        "forward_s": 1.0, "backward_s": 2.0, "head_forward_s": 0.5, "head_backward_s": 1.0,
        "hand_off_s": 0.1,
    } | changes  # fmt: skip
    return TrainingCosts.uniform(num_devices=num_devices, num_layers=num_layers, **values)


def heavy(memory_bytes: tuple[int, ...], num_layers: int = 4, **changes: Any) -> TrainingCosts:
    """Layers of 100 bytes of weights, 100 of gradients and 50 of activations; a head of 80."""
    costs = costs_of(
        len(memory_bytes), num_layers, layer_weight_bytes=100, layer_gradient_bytes=100,
        head_weight_bytes=80, head_gradient_bytes=80, layer_activation_bytes=50,
        boundary_bytes=5, **changes,
    )  # fmt: skip
    return replace(costs, memory_bytes=memory_bytes)


def layers_of(plan: TrainPlan, kind: str) -> list[tuple[int, int]]:
    return [(slot.first_layer, slot.end_layer) for slot in plan.slots if slot.kind == kind]


# How good plans are


@pytest.mark.parametrize(("profile", "percent"), [(QWEN3_1_7B, 2.0), (GPT_OSS_20B, 2.0)])
def test_eight_equal_devices_are_less_idle_than_with_hand_made_stages(
    profile: Profile, percent: float
) -> None:
    costs = profile.costs()
    by_hand = SlotSchedule(slots=profile.slots, micro_batches=9, dispatch="round_robin")

    plan = plan_train(costs, micro_batches=9)

    hand_made = steady_state(costs, by_hand)
    assert plan.dispatch == "round_robin"
    assert 100 * plan.idle_fraction <= percent < profile.steady_idle_percent[9]
    assert plan.idle_fraction < hand_made.idle_fraction
    assert plan.seconds_per_round < 0.97 * hand_made.seconds_per_round
    assert plan.rounds_in_flight <= 2


@pytest.mark.parametrize("profile", [QWEN3_1_7B, GPT_OSS_20B], ids=["1.7B", "20B"])
def test_a_synchronous_step_beats_the_published_one(profile: Profile) -> None:
    costs = profile.costs()

    plan = plan_train(costs, micro_batches=8, rounds_per_step=2, synchronous=True)

    schedule = plan.schedule(costs)
    step = simulate_slots(costs, schedule, rounds=2)
    assert 2 * plan.seconds_per_round == pytest.approx(step.makespan_s)
    # The published simulation lets the head's forward pass run before its input is there.
    as_published = simulate_slots(costs, replace(schedule, fused_forward_overlaps=True), rounds=2)
    assert 100 * as_published.idle_fraction < profile.bubble_percent["roundpipe"]
    assert 1e3 * as_published.makespan_s < profile.makespan_ms["roundpipe"]


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.name)
def test_four_tiers_of_speed_are_almost_never_idle(profile: Profile) -> None:
    costs = profile.costs(TIERS)
    in_turn = SlotSchedule(slots=profile.slots, micro_batches=9, dispatch="round_robin")

    plan = plan_train(costs, micro_batches=9, rounds_per_step=None, search_effort=700_000)

    assert steady_state(costs, in_turn).idle_fraction > 0.65
    assert plan.dispatch == "earliest_finish"
    assert plan.idle_fraction < 0.02


def test_more_rounds_per_step_leave_unequal_devices_less_idle() -> None:
    costs = GPT_OSS_20B.costs(TIERS)

    one, four = (
        plan_train(costs, micro_batches=9, rounds_per_step=rounds, search_effort=500_000)
        for rounds in (1, 4)
    )

    assert one.rounds_in_flight <= 2 < four.rounds_in_flight <= 8
    assert one.idle_fraction < 0.15
    assert four.idle_fraction < 0.04
    assert four.seconds_per_round < one.seconds_per_round


def test_ninety_four_layers_are_planned_on_the_default_effort() -> None:
    plan = plan_train(QWEN3_235B.costs(), micro_batches=9)

    assert plan.idle_fraction < 0.0019
    assert plan.gap < 0.002


def test_where_everything_fits_and_steps_are_rare_each_device_takes_whole_rounds() -> None:
    plan = plan_train(costs_of(2, 4), micro_batches=4, rounds_per_step=2)

    [slot] = plan.slots
    assert (slot.kind, slot.first_layer, slot.end_layer, slot.grain) == ("fused", 0, 4, "none")
    # 4 micro-batches of 4 x 3 s and a head of 1.5 s, over two devices.
    assert plan.seconds_per_round == pytest.approx(4 * 13.5 / 2)
    assert plan.lower_bound_s == pytest.approx(plan.seconds_per_round)
    assert plan.idle_fraction == pytest.approx(0.0)
    assert plan.gap == pytest.approx(0.0)


def test_one_device_runs_all_slots_without_idling() -> None:
    plan = plan_train(costs_of(1, 3), micro_batches=2)

    assert plan.idle_fraction == pytest.approx(0.0)
    assert [share.busy_fraction for share in plan.devices] == [pytest.approx(1.0)]


def test_a_faster_way_back_is_taken_by_the_device_that_has_it() -> None:
    # Device 0 is quick forward, device 1 quick backward, beyond what one speed can say.
    costs = replace(
        costs_of(2, 6),
        forward_s=((1.0,) * 6, (9.0,) * 6),
        recompute_s=((1.0,) * 6, (1.0,) * 6),
        backward_s=((20.0,) * 6, (2.0,) * 6),
    )

    plan = plan_train(costs, micro_batches=4, rounds_per_step=4)

    assert plan.seconds_per_round >= plan.lower_bound_s
    events = simulate_slots(costs, plan.schedule(costs), rounds=40).events
    forward = [event.device_id for event in events if event.kind == "forward"]
    backward = [event.device_id for event in events if event.kind == "backward"]
    assert forward.count("gpu0") > 0.9 * len(forward)
    assert backward.count("gpu1") > 0.7 * len(backward)


# Memory


def test_a_device_too_small_for_any_slot_is_left_out_with_its_bytes() -> None:
    plan = plan_train(heavy((10_000, 100)), micro_batches=2, search_effort=QUICK)

    [(device_id, reason)] = plan.left_out
    assert device_id == "gpu1"
    # The head alone: 2 x 80 of weights, 80 of gradients, 4 x 5 of boundaries; a forward layer
    # 2 x 100, 50 and 20.
    assert reason.startswith("its 100 bytes hold no slot; the smallest (the head) needs 260")
    assert all(slot.device_ids == ("gpu0",) for slot in plan.slots)
    assert plan.devices[1].busy_s == 0.0


def test_small_devices_take_the_slots_that_fit_them() -> None:
    # A forward layer needs 270 bytes with the next layer's weights, a backward one 370.
    costs = heavy((10_000, 300))

    plan = plan_train(costs, micro_batches=4, rounds_per_step=4)

    taken = [slot for slot in plan.slots if "gpu1" in slot.device_ids]
    assert taken
    assert {slot.kind for slot in taken} <= {"forward", "fused"}
    assert plan.devices[1].peak_bytes <= 300
    assert plan.devices[1].busy_s > 0


def test_little_memory_makes_backward_slots_recompute_layer_by_layer() -> None:
    # One backward layer needs 2 x 100 + 100 + 20 + 500 = 820 bytes; two at stage grain 1620.
    costs = replace(heavy((1400,)), layer_activation_bytes=(500,) * 4)
    roomy = replace(costs, memory_bytes=(2000,))
    pair = Slot(kind="backward", first_layer=0, end_layer=2)

    prices = SlotPrices(costs)

    assert prices.alone_bytes(pair, "stage") == 2 * 200 + 200 + 20 + 1000
    assert prices.alone_bytes(pair, "layer") == 2 * 200 + 200 + 20 + 500
    tight_plan = plan_train(costs, micro_batches=2, search_effort=QUICK)
    roomy_plan = plan_train(roomy, micro_batches=2, search_effort=QUICK)
    grains = {s.grain for s in tight_plan.slots if s.kind == "backward" and s.end_layer > 1}
    assert grains <= {"layer", "stage"}
    assert all(
        slot.grain == "layer"
        for slot in tight_plan.slots
        if slot.kind == "backward" and slot.end_layer - slot.first_layer > 1
    )
    assert all(
        slot.grain == "stage"
        for slot in roomy_plan.slots
        if slot.kind == "backward" and slot.end_layer - slot.first_layer <= 2
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layer_weight_bytes": (100, 100, 5000, 100)},
            "layer 2, backward needs 10170 bytes .* 2 devices, gpu1, offers 900 after headroom",
        ),
        ({"head_weight_bytes": 700}, "the head needs 1500 bytes"),
        ({"layer_activation_bytes": (50, 900, 50, 50)}, "layer 1, backward needs 1220 bytes"),
    ],
)  # fmt: skip
def test_a_layer_that_fits_nowhere_is_named_with_bytes_and_knobs(
    changes: dict[str, Any], message: str
) -> None:
    costs = replace(heavy((800, 900)), **changes)

    with pytest.raises(InfeasiblePlanError, match=message) as caught:
        plan_train(costs, micro_batches=2, search_effort=QUICK)

    assert "lower headroom_fraction" in str(caught.value)


def test_no_room_for_the_next_weights_is_infeasible_and_says_so() -> None:
    # Alone each fits 900 bytes: a backward layer of 100 + 100 + 20 + 50 + 100, the head of
    # 400 + 80 + 20 + 400; but beside the head's 400 no layer with 600 of activations fits.
    costs = replace(
        heavy((900,)), head_weight_bytes=400, layer_activation_bytes=(500, 500, 500, 500)
    )

    with pytest.raises(InfeasiblePlanError, match="also has room for the next slot's weights"):
        plan_train(costs, micro_batches=2, search_effort=QUICK)


def test_a_head_that_fits_only_beside_little_pins_a_device() -> None:
    # Two such devices: one keeps to the head and what fits beside it, the other to the layers.
    costs = replace(
        heavy((900, 900)), head_weight_bytes=400, layer_activation_bytes=(500, 500, 500, 500)
    )

    plan = plan_train(costs, micro_batches=2, search_effort=QUICK)

    [head] = [slot for slot in plan.slots if slot.kind == "fused"]
    assert len(head.device_ids) == 1
    assert all(
        head.device_ids[0] not in slot.device_ids for slot in plan.slots if slot.kind == "backward"
    )


def test_four_tiers_of_speed_and_memory_are_hardly_ever_idle() -> None:
    # GPT-OSS-20B in bfloat16 on 24, 24, 16 and 12 GB cards, two each, over PCIe at 12 GB/s.
    gb = 10**9
    layer_bytes, head_bytes = 1_740_000_000, 1_160_000_000
    costs = replace(
        GPT_OSS_20B.costs(TIERS),
        weight_upload_s=((layer_bytes / 12e9,) * 24,) * 8,
        layer_weight_bytes=(layer_bytes,) * 24,
        layer_gradient_bytes=(layer_bytes,) * 24,
        head_weight_bytes=head_bytes,
        head_gradient_bytes=head_bytes,
        layer_activation_bytes=(gb // 2,) * 24,
        boundary_bytes=16_000_000,
        memory_bytes=(*[22 * gb] * 4, *[14 * gb] * 2, *[11 * gb] * 2),
    )

    plan = plan_train(costs, micro_batches=9, rounds_per_step=4)

    assert plan.idle_fraction < 0.03
    assert plan.left_out == ()
    assert all(share.peak_bytes <= share.memory_bytes for share in plan.devices)


# Kept activations


def roomy(
    num_devices: int,
    memory_gb: int,
    *,
    speeds: Sequence[float] | None = None,
    activation_bytes: int = 10**8,
) -> TrainingCosts:
    """24 layers of 435 MB that 8 micro-batches leave 800 MB of, over PCIe at 12 GB/s."""
    layer_bytes, head_bytes = 435_000_000, 600_000_000
    costs = costs_of(
        num_devices, 24, forward_s=0.02, backward_s=0.045, head_forward_s=0.02,
        head_backward_s=0.04, hand_off_s=0.003, speeds=speeds, layer_weight_bytes=layer_bytes,
        layer_gradient_bytes=layer_bytes, head_weight_bytes=head_bytes,
        head_gradient_bytes=head_bytes, layer_activation_bytes=activation_bytes,
        boundary_bytes=16_000_000, memory_bytes=memory_gb * 10**9,
    )  # fmt: skip
    return replace(costs, weight_upload_s=((layer_bytes / 12e9,) * 24,) * num_devices)


@pytest.mark.parametrize("num_devices", [1, 2])
def test_with_room_for_activations_some_layers_are_not_recomputed(num_devices: int) -> None:
    costs = roomy(num_devices, 24)
    options: dict[str, Any] = {"micro_batches": 8, "rounds_per_step": 4, "search_effort": 500_000}

    plan = plan_train(costs, **options)

    without = plan_train(costs, grains="recompute", **options)
    assert all(slot.grain != "keep" for slot in without.slots)
    kept = [slot for slot in plan.slots if slot.grain == "keep"]
    assert kept
    assert plan.seconds_per_round < 0.98 * without.seconds_per_round
    assert all(share.peak_bytes <= share.memory_bytes for share in plan.devices)
    events = simulate_slots(costs, plan.schedule(costs), rounds=6).events
    device_of = {(event.round_index, event.stage): event.device_id for event in events}
    for slot in kept:
        for round_index in range(6):
            source = device_of[round_index, slot.kept_with or 0]
            assert device_of[round_index, slot.index] == source
    assert TrainPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_nothing_is_kept_without_room_or_where_nobody_knows_what_that_takes() -> None:
    tight = plan_train(roomy(1, 3), micro_batches=8, search_effort=QUICK)
    unknown = plan_train(roomy(1, 24, activation_bytes=0), micro_batches=8, search_effort=QUICK)

    for plan in (tight, unknown):
        assert all(slot.kept_with is None for slot in plan.slots)


def test_only_devices_with_room_keep_activations() -> None:
    # Each of two layers keeps 100 + 2 x 50 bytes. Without that the fused slot fits gpu1, at 680
    # and the next slot's 280 bytes; beside it only the layers do, which are less work.
    slots = slots_from_counts([1, 1], 2, [1, 1])
    costs = heavy((10_000, 1_000))

    plan = plan_cut(costs, slots, micro_batches=2, rounds_per_step=4, grain="keep")

    kept = [slot for slot in plan.slots if slot.kept_with is not None]
    assert len(kept) == 4
    assert {slot.device_ids for slot in kept} == {("gpu0",)}
    assert plan.slots[2].device_ids == ("gpu0", "gpu1")
    assert [slot.kept_bytes for slot in kept] == [200, 200, 0, 0]
    assert [slot.weight_bytes for slot in kept] == [100, 100, 0, 0]
    roomier = plan_cut(
        heavy((10_000, 10_000)), slots, micro_batches=2, rounds_per_step=4, grain="keep"
    )
    assert {slot.device_ids for slot in roomier.slots} == {("gpu0", "gpu1")}


def test_a_backward_slot_without_a_forward_slot_of_its_layers_cannot_keep() -> None:
    with pytest.raises(ValueError, match=r"no forward slot holds just the layers \[0, 2\)"):
        plan_cut(costs_of(), slots_from_counts([1, 1], 2, [2]), micro_batches=2, grain="keep")


@given(st.integers(1, 5), st.data())
def test_every_move_of_kept_stages_leads_to_a_cut_that_can_keep(
    num_layers: int, data: st.DataObject
) -> None:
    cut = data.draw(st.sampled_from([cut for cut in all_cuts(num_layers) if mirrors(cut)]))
    kept = data.draw(st.integers(1, mirrors(cut)))

    for moved in kept_neighbours(cut._replace(kept=kept)):
        assert moved.slots[len(moved.forward)].end_layer == num_layers
        assert 1 <= moved.kept <= mirrors(moved)


def mirrors(cut: Cut) -> int:
    """How many stages next to the fused slot are the same forward and backward."""
    pairs = zip(reversed(cut.forward), cut.backward, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def test_the_table_says_what_is_kept_and_the_summary_what_is_repeated() -> None:
    slots = slots_from_counts([1, 1], 2, [1, 1])
    plan = plan_cut(heavy((9_999,)), slots, micro_batches=2, grain="keep")
    plain = plan_cut(heavy((9_999,)), slots, micro_batches=2)

    assert "(2 use kept activations)" in training_summary(plan).plain
    assert "(2 recompute their stage at once)" in training_summary(plain).plain
    headings = [str(column.header) for column in training_table(plan).columns]
    assert "kept" in headings
    [kept] = training_table(plan).columns[headings.index("kept")].cells
    assert kept == format_bytes(400)
    assert "kept" not in [column.header for column in training_table(plain).columns]


# Hand-offs


def test_a_hand_off_takes_at_least_what_the_control_plane_does() -> None:
    layer = LayerCost(flops_per_token=1e9, weight_bytes=1000, kv_bytes_per_token=1)
    end = LayerCost(flops_per_token=0.0, weight_bytes=1000, kv_bytes_per_token=0)
    profile = ModelProfile(
        name="tiny", embedding=end, layers=(layer,), head=end, hidden_bytes_per_token=100
    )
    topology = Topology(
        devices=tuple(
            Device(
                id=name, node=node, kind="cpu", flops_per_s=1e12, memory_bytes_per_s=1e11,
                memory_bytes=1 << 30,
            )
            for name, node in (("a", "x"), ("b", "x"), ("c", "y"))
        ),
        default_link=LinkRate(bandwidth_bytes_per_s=1e5, latency_s=0.0),
    )  # fmt: skip
    load = TrainingWorkload(micro_batches=1, sequences_per_micro_batch=1, sequence_tokens=10)

    free = training_costs(profile, topology, load).hand_off_s
    costs = training_costs(profile, topology, load, hand_off_s=0.003).hand_off_s

    # 1000 bytes take 10 ms from x to y, and next to nothing within x.
    assert free[0][1] < 0.003 < free[0][2] == pytest.approx(0.01)
    assert costs == ((0.0, 0.003, free[0][2]), (0.003, 0.0, free[1][2]), (*free[2][:2], 0.0))
    with pytest.raises(ValueError, match=r"hand_off_s \(-1\) must be 0 or more"):
        training_costs(profile, topology, load, hand_off_s=-1)


# Bytes


def test_layer_0_brings_the_embedding_and_gradients_are_float32() -> None:
    layer = LayerCost(flops_per_token=1e9, weight_bytes=1000)
    profile = ModelProfile(
        name="tiny",
        embedding=LayerCost(flops_per_token=0.0, weight_bytes=600),
        layers=(layer,) * 2,
        head=LayerCost(flops_per_token=1.0, weight_bytes=620),
        hidden_bytes_per_token=100,
        head_is_embedding=True,
    )
    device = Device(
        id="a", node="x", kind="cuda", flops_per_s=1e12, memory_bytes_per_s=1e11,
        memory_bytes=1 << 30, host_bytes_per_s=100.0,
    )  # fmt: skip
    load = TrainingWorkload(
        micro_batches=1, sequences_per_micro_batch=1, sequence_tokens=10, trained_fraction=0.5
    )

    costs = training_costs(profile, Topology(devices=(device,)), load, weight_dtype_bytes=2)

    # 2 bytes a weight, 4 a gradient, and half of the weights are trained.
    assert costs.layer_weight_bytes == costs.layer_gradient_bytes == (1600, 1000)
    assert costs.head_weight_bytes == costs.head_gradient_bytes == 620
    assert costs.weight_upload_s == ((16.0, 10.0),)
    everything = Slot(kind="fused", first_layer=0, end_layer=2)
    assert SlotPrices(costs).option(everything, "none", 0).upload_s == pytest.approx(32.2)


# Invariants


def planned(costs: TrainingCosts, search_effort: int = 5_000, **options: Any) -> TrainPlan | None:
    """A quick plan, or None where there is none."""
    try:
        return plan_train(costs, search_effort=search_effort, **options)
    except InfeasiblePlanError:
        return None


step_options = st.fixed_dictionaries(
    {
        "micro_batches": st.integers(1, 5),
        "rounds_per_step": st.integers(1, 3),
        "synchronous": st.booleans(),
    }
)


@settings(max_examples=60, deadline=None)
@given(pools(), step_options)
def test_slots_cover_every_layer_in_order_and_fit_every_device_they_may_go_to(
    costs: TrainingCosts, options: dict[str, Any]
) -> None:
    plan = planned(costs, **options)
    if plan is None:
        return

    forward, backward = layers_of(plan, "forward"), layers_of(plan, "backward")
    [(first_fused, end_fused)] = layers_of(plan, "fused")
    assert end_fused == costs.num_layers
    assert [slot.kind for slot in plan.slots] == [
        *["forward"] * len(forward), "fused", *["backward"] * len(backward)
    ]  # fmt: skip
    assert [x for first, end in forward for x in range(first, end)] == [*range(first_fused)]
    assert [x for first, end in reversed(backward) for x in range(first, end)] == [
        *range(first_fused)
    ]
    caps = dict(zip(costs.device_ids, costs.memory_bytes, strict=True))
    for device_id, cap in caps.items():
        own = [slot for slot in plan.slots if device_id in slot.device_ids]
        kept_bytes = sum(slot.kept_bytes for slot in own)
        for slot in own:
            for following in own:
                assert slot.resident_bytes + following.weight_bytes + kept_bytes <= cap
    prices = SlotPrices(costs)
    for slot in plan.slots:
        assert slot.device_ids
        value = Slot(kind=slot.kind, first_layer=slot.first_layer, end_layer=slot.end_layer)
        assert slot.resident_bytes == prices.resident_bytes(value, slot.grain)
        assert (slot.grain == "none") == (slot.kind != "backward")
        if slot.kind == "forward" and slot.kept_with is not None:
            user = plan.slots[slot.kept_with]
            assert (user.grain, user.kept_with) == ("keep", slot.index)
            assert (user.first_layer, user.end_layer) == (slot.first_layer, slot.end_layer)
            assert user.device_ids == slot.device_ids
            assert slot.kept_bytes == prices.kept_bytes(value, options["micro_batches"])
        else:
            assert slot.kept_bytes == 0
            assert (slot.kept_with is None) == (slot.grain != "keep")


@settings(max_examples=60, deadline=None)
@given(pools(), step_options)
def test_a_plan_keeps_its_bound_and_its_own_prediction(
    costs: TrainingCosts, options: dict[str, Any]
) -> None:
    plan = planned(costs, **options)
    if plan is None:
        return

    assert plan.seconds_per_round >= plan.lower_bound_s > 0
    assert -1e-6 <= plan.idle_fraction < 1
    assert all(share.busy_fraction <= 1 + 1e-6 for share in plan.devices)
    assert {device_id for device_id, _ in plan.left_out} == {
        share.device_id for share in plan.devices if share.busy_s == 0
    }
    able = [i for i, d in enumerate(costs.device_ids) if any(d in s.device_ids for s in plan.slots)]
    if options["synchronous"] and len(able) == costs.num_devices:
        order = sorted(range(costs.num_devices), key=lambda d: costs.device_ids[d])
        ordered = costs.in_order(order)
        step = simulate_slots(ordered, plan.schedule(ordered), rounds=options["rounds_per_step"])
        assert step.makespan_s == pytest.approx(plan.seconds_per_round * options["rounds_per_step"])


@settings(max_examples=40, deadline=None)
@given(pools(), step_options, st.data())
def test_the_order_of_the_devices_does_not_change_the_plan(
    costs: TrainingCosts, options: dict[str, Any], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(costs.num_devices)))

    assert planned(costs.in_order(order), **options) == planned(costs, **options)


@settings(max_examples=20, deadline=None)
@given(pools(), step_options)
def test_a_plan_survives_json(costs: TrainingCosts, options: dict[str, Any]) -> None:
    plan = planned(costs, **options)
    if plan is not None:
        assert TrainPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def compositions(total: int) -> list[tuple[int, ...]]:
    if not total:
        return [()]
    return [(head, *rest) for head in range(1, total + 1) for rest in compositions(total - head)]


# The same examples every time: the search is a heuristic beyond the smallest models.
@settings(max_examples=40, deadline=None, derandomize=True)
@given(pools(max_layers=6), st.integers(1, 4), st.integers(1, 2))
def test_on_small_models_the_plan_is_close_to_the_best_of_all_cuts(
    costs: TrainingCosts, micro_batches: int, rounds: int
) -> None:
    options: dict[str, Any] = {
        "micro_batches": micro_batches, "rounds_per_step": rounds, "synchronous": True,
    }  # fmt: skip
    plan = planned(costs, search_effort=200_000, **options)
    if plan is None:
        return

    ordered = costs.in_order(
        sorted(range(costs.num_devices), key=lambda device: costs.device_ids[device])
    )
    simulator = CutSimulator(ordered, Objective(micro_batches, rounds, synchronous=True))
    best_s = min(simulator.seconds(cut, FINE) for cut in all_cuts(costs.num_layers))
    share = 1e-6 if costs.num_layers <= EXHAUSTIVE_LAYERS else 0.05
    assert plan.seconds_per_round <= best_s * (1 + share)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(1, 60))
def test_the_least_stages_are_the_fewest_of_all_cuts(weights: list[int], limit: int) -> None:
    def fits(counts: tuple[int, ...]) -> bool:
        ends = itertools.accumulate(counts)
        sums = [sum(weights[end - count : end]) for count, end in zip(counts, ends, strict=True)]
        return all(total <= limit or count == 1 for total, count in zip(sums, counts, strict=True))

    fewest = min(len(counts) for counts in compositions(len(weights)) if fits(counts))

    assert least_stages(weights, limit) == fewest


@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.data())
def test_evened_counts_hold_every_layer_and_equal_layers_differ_by_one(
    weights: list[int], data: st.DataObject
) -> None:
    num_stages = data.draw(st.integers(1, len(weights)))

    counts = even_counts(weights, num_stages)
    equal = even_counts([1.0] * len(weights), num_stages)

    assert (len(counts), sum(counts)) == (num_stages, len(weights))
    assert min(counts) >= 1
    assert max(equal) - min(equal) <= 1


@given(st.integers(1, 7), st.data())
def test_every_move_leads_to_a_cut_of_all_layers(num_layers: int, data: st.DataObject) -> None:
    cut = data.draw(st.sampled_from(list(all_cuts(num_layers))))

    for moved in neighbours(cut):
        assert moved != cut
        slots = moved.slots
        assert slots[len(moved.forward)].end_layer == num_layers


def test_an_unbounded_plan_survives_json() -> None:
    plan = plan_train(costs_of(), micro_batches=2, rounds_per_step=None, search_effort=QUICK)

    assert TrainPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert math.isfinite(plan.gap)


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batches": 0}, r"micro_batches \(0\) must be at least 1"),
        ({"micro_batches": 2, "rounds_per_step": 0}, r"rounds_per_step \(0\) must be at least 1"),
        ({"micro_batches": 2, "search_effort": 0}, r"search_effort \(0\) must be at least 1"),
        (
            {"micro_batches": 2, "rounds_per_step": None, "synchronous": True},
            "a synchronous plan needs rounds_per_step",
        ),
    ],
)
def test_counts_below_one_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_train(costs_of(), **options)


def test_a_plan_for_other_devices_is_refused() -> None:
    plan = plan_train(costs_of(3), micro_batches=2, search_effort=QUICK)

    with pytest.raises(ValueError, match=r"lack the plan's devices \['gpu2'\]"):
        plan.schedule(costs_of(2))
