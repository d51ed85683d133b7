"""`motley plan`: predict a deployment from its settings, without Ray, torch or a GPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from actors.engine.checkpoint import planning_profile
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
from cluster.forecast import Forecast, forecast, training_forecast
from cluster.planning import declared_devices, dtype_bytes
from placement.serving_schedule import serving_events, track_nodes
from placement.stages import StagesPlan
from placement.topology import Device
from placement.trace import chrome_trace
from placement.workload import ModelProfile


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """What to predict beside the serving plan, and which files to write."""

    shard_experts: bool = False
    training: bool = False
    plot: Path | None = None
    trace: Path | None = None


def show_plan(config: MotleyConfig, output: Output, options: PlanOptions) -> None:
    """Write the plan of a configuration whose devices are declared or were measured."""
    devices = declared_devices(config)
    kinds = [device.kind for device in devices]
    profile = planning_profile(
        config.model,
        dtype_bytes=dtype_bytes(config.engine, kinds),
        allow_unverified=config.engine.allow_unverified_architectures,
    )
    predicted = forecast(config, profile, devices, shard_experts=options.shard_experts)
    if options.plot is not None:
        _plot(predicted, options.plot)
    if options.trace is not None:
        _write_trace(predicted.plan, config.plan.lanes, options.trace)
    value, shown = predicted.to_json(), _shown(predicted, config.plan.lanes)
    if options.training:
        value |= _training(config, profile, devices, shown)
    output.result(value, *shown)
    for file in (options.plot, options.trace):
        if file is not None:
            output.note(Text(f"wrote {file}"))


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


def _training(
    config: MotleyConfig,
    profile: ModelProfile,
    devices: Sequence[Device],
    shown: list[RenderableType],
) -> dict[str, Any]:
    plan = training_forecast(config, profile, devices)
    shown += [training_table(plan), training_summary(plan)]
    return {"training": plan.to_json()}


def _plot(predicted: Forecast, path: Path) -> None:
    # Half a second to import, and few plans are drawn.
    from cluster.commands.front_plot import plot_front

    try:
        plot_front(predicted.front.plans, predicted.plan, path)
    except ValueError as error:
        raise ConfigError(f"--plot {path}: {error}") from error


def _write_trace(plan: StagesPlan, lanes: int, path: Path) -> None:
    trace = chrome_trace(serving_events(plan, lanes=lanes), track_nodes(plan))
    path.write_text(json.dumps(trace), encoding="utf-8")
