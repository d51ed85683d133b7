"""How many rows every expert gets, over a sliding window of steps: cheap enough to leave on.

A window is a ring of buckets of a few steps each, so that it slides by a bucket, its memory does
not depend on its length, and one step of one layer costs one addition over the experts. Prefill and
decode are counted apart: they prefer different experts, and a placement serves both.

What has changed is read from the window by comparing its older with its newer part, at every cut
between two buckets: half the L1 distance of the two distributions over experts, less what sampling
alone would show.

Shapes: L layers, E experts, B buckets (oldest first), D devices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Phase = Literal["prefill", "decode"]

DEFAULT_WINDOW_STEPS = 256
DEFAULT_BUCKETS = 16
CHANGE = 0.1
"""Drift from which the older part of a window no longer tells what comes: a tenth of all rows goes
to other experts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadSummary:
    """What a window has seen of some layers."""

    steps_L: NDArray[np.int64]
    """Steps in the window; 0: nothing is known of the layer."""
    mean_rows_LE: NDArray[np.float64]
    """Rows per step over the whole window."""
    recent_rows_LE: NDArray[np.float64]
    """Rows per step since the last change that the window shows, else as `mean_rows_LE`."""
    recent_steps_L: NDArray[np.int64]
    """Steps that `recent_rows_LE` is the mean of."""
    drift_L: NDArray[np.float64]
    """Share of the rows that went to other experts, between 0 and 1: the largest over all cuts."""

    @property
    def imbalance(self) -> NDArray[np.float64]:
        """[L] rows of the busiest expert over those of the mean one; 1: nothing is known."""
        mean_L = self.mean_rows_LE.mean(axis=1)
        return np.where(mean_L > 0, self.mean_rows_LE.max(axis=1) / np.maximum(mean_L, 1e-300), 1.0)


class LoadWindow:
    """Rows per layer and expert over the last `window_steps` steps, in one phase.

    Args:
        num_layers: Layers counted, each on its own: a stage counts those that it runs.
        num_experts: Of one layer.
        window_steps: Steps of one layer that are remembered.
        num_buckets: Buckets that divide them; the window slides by one.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        *,
        window_steps: int = DEFAULT_WINDOW_STEPS,
        num_buckets: int = DEFAULT_BUCKETS,
    ) -> None:
        if num_layers < 1 or num_experts < 1:
            raise ValueError(
                f"num_layers ({num_layers}) and num_experts ({num_experts}) must be at least 1"
            )
        if num_buckets < 2 or window_steps < num_buckets or window_steps % num_buckets:
            raise ValueError(
                f"num_buckets ({num_buckets}) must be at least 2 and divide "
                f"window_steps ({window_steps})"
            )
        self._bucket_steps = window_steps // num_buckets
        self._rows_BLE = np.zeros((num_buckets, num_layers, num_experts), dtype=np.int64)
        self._steps_BL = np.zeros((num_buckets, num_layers), dtype=np.int64)
        self._bucket_L = [0] * num_layers
        self._in_bucket_L = [0] * num_layers

    def add(self, layer: int, rows_E: NDArray[np.int64]) -> None:
        """Count one step of one layer. O(experts).

        Raises:
            ValueError: `rows_E` is not one count for each expert.
        """
        if rows_E.shape != self._rows_BLE.shape[2:]:
            raise ValueError(
                f"rows_E has shape {rows_E.shape}; give one count for each of "
                f"{self._rows_BLE.shape[2]} experts"
            )
        bucket = self._bucket_L[layer]
        if self._in_bucket_L[layer] == self._bucket_steps:
            bucket = self._bucket_L[layer] = (bucket + 1) % len(self._rows_BLE)
            self._rows_BLE[bucket, layer] = 0
            self._steps_BL[bucket, layer] = 0
            self._in_bucket_L[layer] = 0
        self._rows_BLE[bucket, layer] += rows_E
        self._steps_BL[bucket, layer] += 1
        self._in_bucket_L[layer] += 1

    def summary(self) -> LoadSummary:
        """Return what the window shows. O(buckets x layers x experts)."""
        num_buckets, num_layers = self._steps_BL.shape
        oldest = np.array(self._bucket_L) + 1
        order_BL = (oldest + np.arange(num_buckets)[:, None]) % num_buckets
        layers = np.arange(num_layers)
        return _summary(self._rows_BLE[order_BL, layers], self._steps_BL[order_BL, layers])


class ExpertLoads:
    """The windows of both phases."""

    def __init__(
        self, num_layers: int, num_experts: int, *, window_steps: int = DEFAULT_WINDOW_STEPS
    ) -> None:
        self.windows: dict[Phase, LoadWindow] = {
            phase: LoadWindow(num_layers, num_experts, window_steps=window_steps)
            for phase in ("prefill", "decode")
        }

    def add(self, phase: Phase, layer: int, rows_E: NDArray[np.int64]) -> None:
        """Count one step of one layer (see `LoadWindow.add`)."""
        self.windows[phase].add(layer, rows_E)


def choose_summaries(parts: Sequence[LoadSummary], part_L: Sequence[int]) -> LoadSummary:
    """Join what stages have counted, each of all layers: of layer l that of `parts[part_L[l]]`."""
    layers = np.arange(len(part_L))
    return LoadSummary(
        **{
            name: np.stack([getattr(part, name) for part in parts])[list(part_L), layers]
            for name in LoadSummary.__slots__
        }
    )


def stack_summaries(parts: Sequence[LoadSummary]) -> LoadSummary:
    """Join what stages have counted of their own layers, in the order of the layers."""
    return LoadSummary(
        **{
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in LoadSummary.__slots__
        }
    )


def balancedness(device_rows_D: NDArray[np.float64], speeds_D: NDArray[np.float64]) -> float:
    """Return the finish if every device were busy to the end over the finish of the slowest.

    1 is perfect, also on unequal devices; with equal ones it is mean over maximum rows.
    """
    slowest_s = float((device_rows_D / speeds_D).max())
    return float(device_rows_D.sum() / speeds_D.sum()) / slowest_s if slowest_s > 0 else 1.0


def _summary(rows_BLE: NDArray[np.int64], steps_BL: NDArray[np.int64]) -> LoadSummary:
    mean_LE, steps_L = _mean(rows_BLE.sum(axis=0), steps_BL.sum(axis=0))
    drift_CL = _drift_at_cuts(rows_BLE)
    cut_L = drift_CL.argmax(axis=0)
    drift_L = drift_CL.max(axis=0)
    is_newer_BL = np.arange(len(rows_BLE))[:, None] > np.where(drift_L >= CHANGE, cut_L, -1)
    recent_LE, recent_L = _mean(
        (rows_BLE * is_newer_BL[:, :, None]).sum(axis=0), (steps_BL * is_newer_BL).sum(axis=0)
    )
    return LoadSummary(
        steps_L=steps_L,
        mean_rows_LE=mean_LE,
        recent_rows_LE=recent_LE,
        recent_steps_L=recent_L,
        drift_L=drift_L,
    )


def _mean(
    rows_LE: NDArray[np.int64], steps_L: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    return rows_LE / np.maximum(steps_L, 1)[:, None], steps_L


def _drift_at_cuts(rows_BLE: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return [cuts, layers] what an older and a newer part differ by, beyond sampling noise.

    Two samples of n and m rows from one distribution p differ by half the sum over experts of
    sqrt(2 / pi) sqrt(p (1 - p) (1 / n + 1 / m)) in the mean (each difference is nearly normal).
    """
    older_CLE = np.cumsum(rows_BLE, axis=0)[:-1].astype(np.float64)
    newer_CLE = rows_BLE.sum(axis=0) - older_CLE
    n_CL1, m_CL1 = (part.sum(axis=2, keepdims=True) for part in (older_CLE, newer_CLE))
    is_known_CL = ((n_CL1 > 0) & (m_CL1 > 0))[:, :, 0]
    n_CL1, m_CL1 = np.maximum(n_CL1, 1.0), np.maximum(m_CL1, 1.0)
    differ_CL = 0.5 * np.abs(older_CLE / n_CL1 - newer_CLE / m_CL1).sum(axis=2)
    p_CLE = (older_CLE + newer_CLE) / (n_CL1 + m_CL1)
    variance_CLE = p_CLE * (1.0 - p_CLE) * (1.0 / n_CL1 + 1.0 / m_CL1)
    noise_CL = 0.5 * math.sqrt(2.0 / math.pi) * np.sqrt(variance_CLE).sum(axis=2)
    return np.where(is_known_CL, np.maximum(0.0, differ_CL - noise_CL), 0.0)
