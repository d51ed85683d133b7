"""The Pareto front of a plan as a picture: latency against tokens/s, joules a token as colour."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from placement.stages import StagesPlan

_WIDTH_IN, _HEIGHT_IN = 8.0, 5.0
_LABELS_AT_MOST = 12


def plot_front(front: Sequence[StagesPlan], chosen: StagesPlan, path: Path) -> None:
    """Write the front with the chosen plan marked; the suffix names the format (svg, png, pdf).

    Raises:
        OSError: The file cannot be written.
        ValueError: The suffix names no format that can be drawn.
    """
    # Equal plans give equal files.
    with mpl.rc_context({"svg.hashsalt": "motley", "svg.fonttype": "none"}):
        figure = Figure(figsize=(_WIDTH_IN, _HEIGHT_IN), layout="constrained")
        axes = figure.add_subplot()
        latencies_ms = [plan.latency_s * 1e3 for plan in front]
        rates = [plan.predicted_tokens_per_s for plan in front]
        energies = [plan.energy_j_per_token for plan in front]
        known = [energy for energy in energies if energy is not None]
        has_energy = len(known) == len(front)
        if not has_energy:
            # With energy as a third axis neighbours in latency need not be neighbours in rate.
            axes.plot(latencies_ms, rates, color="0.8", zorder=1)
        points = axes.scatter(latencies_ms, rates, c=known if has_energy else "C0", zorder=2)
        if has_energy:
            figure.colorbar(points, label="J a token")
        axes.scatter(
            [chosen.latency_s * 1e3],
            [chosen.predicted_tokens_per_s],
            s=160,
            facecolors="none",
            edgecolors="C3",
            label=f"chosen: {chosen.objective}",
            zorder=3,
        )
        if len(front) <= _LABELS_AT_MOST:
            for plan in front:
                axes.annotate(
                    "/".join(str(stage.num_layers) for stage in plan.stages),
                    (plan.latency_s * 1e3, plan.predicted_tokens_per_s),
                    textcoords="offset points",
                    xytext=(6, -10),
                    fontsize="small",
                )
        axes.set(
            title=f"{chosen.model}: plans that no other plan beats",
            xlabel="latency of a step (ms)",
            ylabel="tokens/s at the planned load",
        )
        axes.legend(loc="best")
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
