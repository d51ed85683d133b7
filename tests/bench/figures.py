"""How every benchmark reports: a table for people, one JSON line a figure for machines."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

Kind = Literal["real", "paced", "simulated"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One measured figure beside its named baseline of the same run."""

    figure: str
    value: float
    baseline: float
    ratio: float
    target: str
    met: bool
    kind: Kind = "real"


def at_least(
    name: str, value: float, baseline: float, least: float, *, kind: Kind = "real"
) -> Figure:
    """A figure that should be at least `least` times its baseline (throughput)."""
    ratio = value / baseline
    return Figure(
        figure=name, value=value, baseline=baseline, ratio=ratio,
        target=f">= {least:g}x baseline", met=ratio >= least, kind=kind,
    )  # fmt: skip


def at_most(
    name: str, value: float, baseline: float, most: float, *, kind: Kind = "real"
) -> Figure:
    """A figure that should be at most `most` times its baseline (time)."""
    ratio = value / baseline
    return Figure(
        figure=name, value=value, baseline=baseline, ratio=ratio,
        target=f"<= {most:g}x baseline", met=ratio <= most, kind=kind,
    )  # fmt: skip


def report(figures: Sequence[Figure]) -> None:
    """Print the JSON lines; nothing may follow them."""
    for figure in figures:
        rounded = {
            key: float(f"{value:.5g}") if isinstance(value, float) else value
            for key, value in asdict(figure).items()
        }
        print(json.dumps(rounded), flush=True)


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)
