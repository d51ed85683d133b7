"""What the visits of a round need, hand on and may forget; no Ray, no torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from actors.engine.training_values import LossScales, MicroBatch
from cluster.training.rounds import Boundary, Round, units_of
from placement.train import PlannedSlot
from placement.training import RecomputeGrain, slots_from_counts


def planned(
    forward: list[int], fused: int, backward: list[int], grain: RecomputeGrain = "stage"
) -> tuple[PlannedSlot, ...]:
    slots = slots_from_counts(forward, fused, backward)
    ranges = {(s.first_layer, s.end_layer): i for i, s in enumerate(slots) if s.kind == "forward"}

    def kept_with(index: int) -> int | None:
        slot = slots[index]
        if grain != "keep" or slot.kind == "fused":
            return None
        if slot.kind == "backward":
            return ranges[slot.first_layer, slot.end_layer]
        same = (slot.first_layer, slot.end_layer)
        return next(
            i
            for i, other in enumerate(slots)
            if other.kind == "backward" and (other.first_layer, other.end_layer) == same
        )

    return tuple(
        PlannedSlot(
            index=index,
            kind=slot.kind,
            first_layer=slot.first_layer,
            end_layer=slot.end_layer,
            grain=grain if slot.kind == "backward" else "none",
            weight_bytes=0,
            resident_bytes=0,
            device_ids=("a",),
            micro_batch_s=(1.0,),
            kept_with=kept_with(index),
        )
        for index, slot in enumerate(slots)
    )


def a_round(slots: tuple[PlannedSlot, ...], num_batches: int = 2, **options: Any) -> Round:
    rows = np.zeros((1, 4), dtype=np.int64)
    batches = tuple(MicroBatch(rows, rows, rows, rows) for _ in range(num_batches))
    return Round(
        index=0,
        step=0,
        number=0,
        slots=slots,
        batches=batches,
        batches_reference=None,
        first_micro_batch=0,
        scales=LossScales(1.0),
        version=0,
        **options,
    )


def finish(round_: Round, index: int) -> None:
    """What a device would hand on of a slot, for every micro-batch."""
    visit = round_.visits[index]
    slot = visit.slot
    for m in range(round_.num_micro_batches):
        if slot.kind == "forward":
            for layer in (*round_.saves(slot), slot.end_layer):
                round_.outputs[Boundary("hidden", layer), m] = f"hidden {layer} {m}"
        elif slot.first_layer:
            round_.outputs[Boundary("gradient", slot.first_layer), m] = "gradient"
        if slot.kind != "backward":
            round_.note(slot, m, None, 1.0 if slot.kind == "fused" else None)
    visit.is_done = True
    round_.forget_used()


class TestNeeds:
    def test_a_forward_slot_saves_what_backward_slots_begin_with(self) -> None:
        round_ = a_round(planned([4, 2], 2, [1, 3, 2]))
        assert [round_.saves(slot) for slot in round_.slots[:2]] == [(2,), (5,)]

    def test_at_layer_grain_every_layers_input_is_saved_but_the_slots_own(self) -> None:
        round_ = a_round(planned([3, 3], 0, [6], "layer"))
        assert [round_.saves(slot) for slot in round_.slots[:2]] == [(1, 2), (4, 5)]

    def test_kept_activations_need_no_saved_input(self) -> None:
        round_ = a_round(planned([3, 3], 2, [3, 3], "keep"))
        assert [visit.needs for visit in round_.visits[3:]] == [
            (Boundary("gradient", 6),),
            (Boundary("gradient", 3),),
        ]
        assert [round_.partner(slot) for slot in round_.slots[:2]] == [
            round_.visits[4],
            round_.visits[3],
        ]

    def test_the_slot_at_layer_0_begins_with_tokens(self) -> None:
        round_ = a_round(planned([4], 4, [4]))
        assert round_.visits[0].needs == ()
        assert round_.visits[2].needs == (Boundary("gradient", 4),)

    def test_evaluation_has_no_backward_slots(self) -> None:
        round_ = a_round(planned([4], 4, [4]), is_trained=False)
        assert [visit.slot.kind for visit in round_.visits] == ["forward", "fused"]
        assert round_.saves(round_.slots[0]) == ()


class TestFeeding:
    def test_a_visit_is_fed_when_its_inputs_exist(self) -> None:
        round_ = a_round(planned([4, 2], 2, [3, 3]))
        forward = round_.visits[1]
        assert not forward.has_next("hidden")
        finish(round_, 0)
        assert forward.has_next("hidden")
        forward.num_fed["hidden"] = 2
        assert forward.is_fed
        assert not forward.has_next("hidden")

    def test_a_recompute_does_not_wait_for_the_gradient(self) -> None:
        round_ = a_round(planned([4, 2], 2, [3, 3]))
        for index in range(2):
            finish(round_, index)
        backward = round_.visits[3]
        assert backward.has_next("hidden")
        assert not backward.has_next("gradient")
        finish(round_, 2)
        assert backward.has_next("gradient")


@pytest.mark.parametrize("grain", ["stage", "layer", "keep"])
def test_everything_is_forgotten_in_the_end_and_nothing_before_its_time(
    grain: RecomputeGrain,
) -> None:
    round_ = a_round(planned([3, 3], 2, [3, 3], grain))
    for index in range(len(round_.slots)):
        missing = [
            (boundary, m)
            for boundary in round_.visits[index].needs
            for m in range(2)
            if (boundary, m) not in round_.outputs
        ]
        assert not missing
        finish(round_, index)
    assert round_.is_done
    assert not round_.outputs


def test_a_kept_forward_visit_can_run_again_until_its_backward_visit_is_done() -> None:
    round_ = a_round(planned([3, 3], 2, [3, 3], "keep"))
    for index in range(3):
        round_.visits[index].device_id = "a"
        finish(round_, index)
    assert (Boundary("hidden", 3), 0) in round_.outputs
    assert round_.lost_with("a") == [round_.visits[0], round_.visits[1]]
    finish(round_, 3)
    assert round_.lost_with("a") == [round_.visits[0]]


def test_a_tied_head_needs_the_embedding_once() -> None:
    slots = planned([4], 4, [4])

    def units(slot: PlannedSlot) -> tuple[str, ...]:
        return units_of(slot, is_tied=True, head_unit="head")

    assert units(slots[0])[:2] == ("embedding", "layer 0")
    assert units(slots[1]) == ("embedding", *(f"layer {i}" for i in range(4, 8)), "head")
    [whole] = planned([], 8, [])
    assert units(whole).count("embedding") == 1
