from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from placement.errors import InfeasiblePlanError
from placement.experts import ExpertDevice
from placement.sharding.decision import RebalanceSettings
from placement.sharding.fleets import HOME_LAB_ROWS_PER_S, proportional_fleet
from placement.sharding.policies import EplbPolicy
from placement.sharding.replay import ReplayRun, replay
from placement.sharding.synthetic import TraceRecipe, make_trace
from placement.sharding.traces import ExpertTrace

EXPERT_BYTES = 1000
SETTINGS = RebalanceSettings(
    expert_bytes=EXPERT_BYTES,
    copy_bytes_per_s=1e6,
    step_budget_bytes=EXPERT_BYTES,
    staging_slots=2,
    cool_down_steps=32,
)
WINDOW_STEPS = 64
RECIPE = TraceRecipe(num_steps=320, num_layers=1, num_experts=32, top_k=4, tokens=512, zipf=0.8)


def replayed(recipe: TraceRecipe, *, lost_device: int = 0) -> dict[str, ReplayRun]:
    fleet = proportional_fleet(HOME_LAB_ROWS_PER_S[::2], recipe.num_experts, spare_slots=2)
    trace = make_trace(recipe, seed=2, lost_device=lost_device)
    runs = replay(trace, fleet, SETTINGS, window_steps=WINDOW_STEPS, measure_every_steps=8)
    return {run.policy: run for run in runs}


def test_a_static_load_is_level_once_it_was_measured() -> None:
    runs = replayed(RECIPE)
    settled = runs["motley"].regret(2 * WINDOW_STEPS, RECIPE.num_steps)
    assert settled < 0.03
    for other in ("none", "eplb"):
        assert runs[other].regret(2 * WINDOW_STEPS, RECIPE.num_steps) > 0.2
    report = runs["motley"].report()
    assert report.balancedness_p50 > 0.95
    assert report.moved_bytes < 32 * EXPERT_BYTES
    assert report.pause_s == 0.0
    assert json.loads(json.dumps(report.to_json()))["policy"] == "motley"


def test_a_swap_of_the_hot_experts_is_made_good_within_a_window() -> None:
    run = replayed(replace(RECIPE, regime="swap"))["motley"]
    half = RECIPE.num_steps // 2
    assert run.regret(half, half + 8) > 0.1
    assert run.regret(half + WINDOW_STEPS, RECIPE.num_steps) < 0.05
    moved = int(run.moved_S[-1] - run.moved_S[half])
    assert 0 < moved < 16 * EXPERT_BYTES


def test_a_lost_device_is_made_good_by_all_and_counted_as_a_pause() -> None:
    runs = replayed(replace(RECIPE, regime="device-loss"), lost_device=3)
    half = RECIPE.num_steps // 2
    for run in runs.values():
        assert run.pause_s > 0
        assert (run.slowest_S[half:] >= run.optimum_S[half:] * (1 - 1e-9)).all()
    assert runs["motley"].regret(half + WINDOW_STEPS, RECIPE.num_steps) < 0.05


def test_no_policy_beats_the_optimum_of_a_step() -> None:
    for recipe in (RECIPE, replace(RECIPE, phase="decode", tokens=4)):
        for run in replayed(recipe).values():
            if run.policy != "eplb":  # its slots are not those of the fleet
                assert (run.slowest_S >= run.optimum_S * (1 - 1e-9)).all()
            assert (run.optimum_S >= run.ideal_S * (1 - 1e-9)).all()


def test_decoding_chooses_replicas_by_reads() -> None:
    recipe = replace(RECIPE, phase="decode", tokens=8, num_steps=200)
    runs = replayed(recipe)
    assert runs["motley"].report().regret < runs["none"].report().regret
    assert runs["motley"].report().regret < runs["eplb"].report().regret


def test_eplb_replans_as_vllm_does_by_default() -> None:
    fleet = proportional_fleet(HOME_LAB_ROWS_PER_S, 32)
    policy = EplbPolicy(fleet, 1, 32, SETTINGS)
    rows_LE = np.arange(32)[None]
    replanned = []
    for step in range(1, 4001):
        before = policy.moved_bytes
        # Hot experts change places, so that every plan moves something.
        policy.step_done(rows_LE if step < 2000 else rows_LE[:, ::-1])
        if policy.moved_bytes > before:
            replanned.append(step)
    assert replanned == [750, 3750]
    assert policy.pause_s > 0


def test_a_fleet_has_slots_by_speed_and_spare_ones() -> None:
    fleet = proportional_fleet((2.0, 1.0, 1.0), 9, spare_slots=1)
    assert [device.slots_per_layer for device in fleet] == [6, 3, 3]
    assert sum(device.slots_per_layer for device in fleet) == 9 + 3
    assert [device.node for device in fleet] == ["node0", "node0", "node1"]
    with pytest.raises(ValueError, match=r"spare_slots \(-1\)"):
        proportional_fleet((1.0,), 4, spare_slots=-1)
    with pytest.raises(InfeasiblePlanError, match="a fleet of 0 devices"):
        proportional_fleet((), 4)


def test_traces_that_do_not_fit_the_fleet_are_refused() -> None:
    rows = np.ones((4, 1, 8), dtype=np.int64)
    fleet = proportional_fleet((1.0, 1.0), 8)

    def trace(*losses: tuple[int, int]) -> ExpertTrace:
        return ExpertTrace(name="t", phase="prefill", top_k=1, rows_SLE=rows, losses=losses)

    with pytest.raises(ValueError, match=r"loses devices \[2\] and the fleet has devices 0 to 1"):
        replay(trace((1, 2)), fleet, SETTINGS)
    with pytest.raises(InfeasiblePlanError, match="1 expert devices offer 5 slots"):
        replay(trace((1, 0)), fleet, SETTINGS)
    no_reads = [
        ExpertDevice(id=d.id, node=d.node, rows_per_s=1.0, slots_per_layer=8) for d in fleet
    ]
    decode = ExpertTrace(name="t", phase="decode", top_k=1, rows_SLE=rows)
    with pytest.raises(ValueError, match="has no expert_read_s"):
        replay(decode, no_reads, SETTINGS)
