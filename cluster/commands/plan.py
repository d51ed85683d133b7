"""`motley plan`: predict a deployment from its settings, without Ray, torch or a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from actors.engine.checkpoint import has_weights, planning_profile, read_configuration
from cluster.commands.output import Output
from cluster.commands.tables import (
    front_table,
    lanes_line,
    plan_summary,
    plan_table,
    shards_summary,
    training_summary,
    training_table,
)
from cluster.config import ConfigError, MotleyConfig
from cluster.forecast import Forecast, TrainingForecast, forecast, training_forecast
from cluster.planning import declared_topology, dtype_bytes, training_pool
from cluster.profile import (
    fingerprint,
    known_topology,
    load_cached,
    measured_topology,
    read_profile,
)
from placement.serving_schedule import serving_events, track_nodes
from placement.stages import StagesPlan
from placement.topology import DeviceKind, Topology
from placement.trace import chrome_trace
from placement.workload import ModelProfile


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """What to predict beside the serving plan, and which files to write."""

    shard_experts: bool = False
    training: bool = False
    plot: Path | None = None
    trace: Path | None = None
    profile: Path | None = None
    """Measured figures, as `motley profile --output` wrote them; None: those of the cache."""


def show_plan(config: MotleyConfig, output: Output, options: PlanOptions) -> None:
    """Write the plan of a configuration whose devices are declared or were measured."""
    profile, topology = _known(config, options.profile)
    predicted = forecast(config, profile, topology, shard_experts=options.shard_experts)
    value, shown = predicted.to_json(), _shown(predicted, config.plan.lanes)
    trace: Callable[[], dict[str, Any]] = partial(_serving_trace, predicted.plan, config.plan.lanes)
    if options.training:
        pool = training_pool(config, profile, topology)
        training = training_forecast(config, pool.profile, pool.topology)
        value["training"] = training.plan.to_json()
        shown += [training_table(training.plan), training_summary(training.plan)]
        trace = partial(_training_trace, training)
    if options.plot is not None:
        _plot(predicted, options.plot)
    if options.trace is not None:
        options.trace.write_text(json.dumps(trace()), encoding="utf-8")
    output.result(value, *shown)
    if not has_weights(config.model):
        output.note(Text(f"planned from config.json alone: no weights in {config.model}"))
    for file in (options.plot, options.trace):
        if file is not None:
            output.note(Text(f"wrote {file}"))


def _known(config: MotleyConfig, file: Path | None) -> tuple[ModelProfile, Topology]:
    """Return the model, and the devices and links as declared, or else as measured.

    Raises:
        ConfigError: A device has no figures, neither declared nor measured.
    """
    allow_unverified = config.engine.allow_unverified_architectures

    def model(kinds: Sequence[DeviceKind]) -> ModelProfile:
        width = dtype_bytes(config.engine, kinds)
        return planning_profile(config.model, dtype_bytes=width, allow_unverified=allow_unverified)

    specs = config.devices
    if file is None and specs is not None and not any(spec.missing_figures for spec in specs):
        return model([spec.kind for spec in specs]), known_topology(config)
    of_checkpoint = fingerprint(read_configuration(config.model))
    measured = (
        load_cached(config, of_checkpoint) if file is None else read_profile(file, of_checkpoint)
    )
    if measured is None:
        # Says which figures are missing.
        return model(["cpu"]), declared_topology(config)
    # What is planned over decides the width of a weight, not what else the file describes.
    planned = measured.devices if specs is None else specs
    profile = model([device.kind for device in planned])
    return profile, measured_topology(measured, config, profile)


def _shown(predicted: Forecast, lanes: int) -> list[RenderableType]:
    shown: list[RenderableType] = [
        plan_table(predicted.plan),
        plan_summary(predicted.plan),
        lanes_line(predicted.lanes, lanes),
        Text(predicted.verdict),
        Text(""),
        front_table(predicted.front),
    ]
    if predicted.shards is not None:
        shown.append(shards_summary(predicted.shards))
    return shown


def _plot(predicted: Forecast, path: Path) -> None:
    # Half a second to import, and few plans are drawn.
    from cluster.commands.front_plot import plot_front

    try:
        plot_front(predicted.front.plans, predicted.plan, path)
    except ValueError as error:
        raise ConfigError(f"--plot {path}: {error}") from error


def _serving_trace(plan: StagesPlan, lanes: int) -> dict[str, Any]:
    return chrome_trace(serving_events(plan, lanes=lanes), track_nodes(plan))


def _training_trace(training: TrainingForecast) -> dict[str, Any]:
    return chrome_trace(training.events(), training.nodes())
