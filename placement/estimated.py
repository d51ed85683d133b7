"""A device's layer tables, completed from the few samples that were taken of it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from placement.fewshot import FewShotModel, fit_latency_model
from placement.measured import LayerSample
from placement.profiles import DeviceProfile, Estimate, LayerTable

QUANTITIES = ("forward_s", "recompute_s", "backward_s")


class LayerProbe(NamedTuple):
    """One figure of one table."""

    table: str
    tokens: int
    quantity: str


def probe_seconds(tables: Sequence[LayerTable]) -> dict[LayerProbe, float]:
    """Return every measured figure of some tables."""
    return {
        LayerProbe(table.name, sample.tokens, quantity): getattr(sample, quantity)
        for table in tables
        for sample in table.samples
        for quantity in QUANTITIES
        if getattr(sample, quantity) is not None
    }


def fit_layer_model(
    known: Mapping[str, DeviceProfile], *, num_samples: int
) -> FewShotModel[LayerProbe]:
    """Fit the layers' seconds over known devices; raises like `fit_latency_model`."""
    tables = {name: probe_seconds(device.layers) for name, device in known.items()}
    return fit_latency_model(tables, num_samples=num_samples)


def complete_tables(
    model: FewShotModel[LayerProbe],
    known: Sequence[DeviceProfile],
    measured: Sequence[LayerTable],
) -> tuple[tuple[LayerTable, ...], Estimate]:
    """Return the tables of the known devices with this device's seconds.

    Samples taken here stay as they are. What a layer keeps for its backward pass does not depend
    on the speed of a device: the median over the known ones is taken.
    """
    taken = {(table.name, sample.tokens): sample for table in measured for sample in table.samples}
    samples = {p: s for p, s in probe_seconds(measured).items() if p in set(model.probes)}
    predicted = model.predict(samples)
    wanted = {(probe.table, probe.tokens) for probe in model.probes}
    tables = []
    for table in known[0].layers:
        rows = tuple(
            taken.get((table.name, sample.tokens))
            or _estimated(table.name, sample, predicted, known)
            for sample in table.samples
            if (table.name, sample.tokens) in wanted
        )
        if rows:
            tables.append(replace(table, samples=rows))
    estimate = Estimate(
        samples=len(samples),
        known_devices=model.known_devices,
        rank=model.rank,
        median_error=model.median_error,
        p90_error=model.p90_error,
    )
    return tuple(tables), estimate


def _estimated(
    table: str,
    like: LayerSample,
    predicted: Mapping[LayerProbe, float],
    known: Sequence[DeviceProfile],
) -> LayerSample:
    seconds = {
        quantity: predicted.get(LayerProbe(table, like.tokens, quantity)) for quantity in QUANTITIES
    }
    kept = [
        sample.activation_bytes
        for device in known
        for other in device.layers
        if other.name == table
        for sample in other.samples
        if sample.tokens == like.tokens and sample.activation_bytes is not None
    ]
    # None where no figure was asked for, never where one is missing: a probe is shared by all.
    return replace(
        like,
        **seconds,  # type: ignore[arg-type]
        activation_bytes=int(statistics.median(kept)) if kept else None,
    )
