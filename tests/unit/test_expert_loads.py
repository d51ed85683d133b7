from __future__ import annotations

import numpy as np
import pytest

from placement.sharding.loads import (
    ExpertLoads,
    LoadWindow,
    balancedness,
    stack_summaries,
)

ZIPF = 1.0 / np.arange(1, 33) ** 0.8


def fill(window: LoadWindow, rows: np.ndarray, steps: int, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        window.add(0, rng.multinomial(2048, rows / rows.sum()))


def test_a_window_forgets_what_is_older_than_its_steps() -> None:
    window = LoadWindow(2, 3, window_steps=8, num_buckets=4)
    for _ in range(20):
        window.add(1, np.array([9, 0, 0]))
    for _ in range(8):
        window.add(1, np.array([0, 2, 4]))
    summary = window.summary()
    assert summary.mean_rows_LE[1].tolist() == [0.0, 2.0, 4.0]
    assert summary.steps_L.tolist() == [0, 8]
    assert summary.imbalance.tolist() == [1.0, 2.0]


def test_layers_of_one_window_advance_on_their_own() -> None:
    window = LoadWindow(2, 2, window_steps=4, num_buckets=2)
    window.add(0, np.array([1, 3]))
    for step in range(7):
        window.add(1, np.array([step, 0]))
    summary = window.summary()
    assert summary.mean_rows_LE[0].tolist() == [1.0, 3.0]
    # Two steps of the bucket before, one of the bucket that fills.
    assert summary.mean_rows_LE[1].tolist() == [5.0, 0.0]
    assert summary.steps_L.tolist() == [1, 3]


def test_drift_is_nearly_none_while_loads_stay_and_the_moved_share_after_a_change() -> None:
    window = LoadWindow(1, 32, window_steps=256)
    fill(window, ZIPF, 256)
    assert window.summary().drift_L[0] < 0.02
    fill(window, ZIPF[::-1], 128)
    moved = 0.5 * float(np.abs(ZIPF - ZIPF[::-1]).sum() / ZIPF.sum())
    summary = window.summary()
    assert summary.drift_L[0] == pytest.approx(moved, abs=0.03)
    assert summary.recent_steps_L[0] == 128
    recent = summary.recent_rows_LE[0] / summary.recent_rows_LE[0].sum()
    assert recent == pytest.approx(ZIPF[::-1] / ZIPF.sum(), abs=0.01)


def test_recent_rows_are_the_mean_while_nothing_changes() -> None:
    window = LoadWindow(1, 32, window_steps=64)
    fill(window, ZIPF, 64)
    summary = window.summary()
    assert (summary.recent_rows_LE == summary.mean_rows_LE).all()


def test_phases_are_counted_apart() -> None:
    loads = ExpertLoads(1, 2)
    loads.add("prefill", 0, np.array([5, 1]))
    loads.add("decode", 0, np.array([0, 1]))
    assert loads.windows["prefill"].summary().mean_rows_LE.tolist() == [[5.0, 1.0]]
    assert loads.windows["decode"].summary().mean_rows_LE.tolist() == [[0.0, 1.0]]


def test_summaries_of_stages_stack_by_layer() -> None:
    windows = [LoadWindow(1, 2), LoadWindow(2, 2)]
    windows[1].add(1, np.array([4, 2]))
    stacked = stack_summaries([window.summary() for window in windows])
    assert stacked.mean_rows_LE.tolist() == [[0, 0], [0, 0], [4, 2]]
    assert stacked.drift_L.tolist() == [0, 0, 0]


def test_balancedness_weighs_devices_by_speed() -> None:
    assert balancedness(np.array([20.0, 10.0]), np.array([2.0, 1.0])) == 1.0
    assert balancedness(np.array([15.0, 15.0]), np.array([2.0, 1.0])) == pytest.approx(2 / 3)
    assert balancedness(np.zeros(2), np.ones(2)) == 1.0


def test_malformed_counts_and_windows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\); give one count for each of 2 experts"):
        LoadWindow(1, 2).add(0, np.zeros(3, dtype=np.int64))
    with pytest.raises(ValueError, match=r"num_buckets \(3\) must be at least 2 and divide"):
        LoadWindow(1, 2, window_steps=8, num_buckets=3)
    with pytest.raises(ValueError, match=r"num_experts \(0\)"):
        LoadWindow(1, 0)
