"""Loads of experts that ask for another placement."""

from __future__ import annotations

import numpy as np

from placement.sharding.loads import LoadSummary


def hot(num_layers: int, num_experts: int, first: int) -> LoadSummary:
    """Loads of which nearly all go to a quarter of the experts."""
    rows_LE = np.full((num_layers, num_experts), 0.05)
    for i in range(num_experts // 4):
        rows_LE[:, (first + i) % num_experts] = 3.0
    steps_L = np.full(num_layers, 1000)
    return LoadSummary(
        steps_L=steps_L,
        mean_rows_LE=rows_LE,
        recent_rows_LE=rows_LE,
        recent_steps_L=steps_L,
        drift_L=np.ones(num_layers),
    )
