"""Plans and statuses as tables for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from cluster.quantities import format_bytes
from placement.stages import StagesPlan


def plan_table(plan: StagesPlan) -> Table:
    """Show which device runs which layers, at what cost."""
    table = _table(f"{plan.model}: {len(plan.stages)} stages, plan {plan.epoch}")
    for heading in ("stage", "device", "node", "kind", "layers"):
        table.add_column(heading)
    for heading in ("weights", "KV", "ms a step", "busy"):
        table.add_column(heading, justify="right")
    for stage in plan.stages:
        table.add_row(
            str(stage.index),
            Text(stage.device_id),
            Text(stage.node),
            stage.kind,
            Text(f"[{stage.first_layer}, {stage.end_layer})"),
            format_bytes(stage.weight_bytes),
            format_bytes(stage.kv_bytes),
            f"{stage.step_s * 1e3:.2f}",
            f"{stage.share_of_bottleneck:.0%}",
        )
    return table


def plan_summary(plan: StagesPlan) -> Text:
    """Say what the plan predicts, how good it could be, and who stays out."""
    over = plan.bottleneck_s / plan.lower_bound_s - 1.0
    lines = [
        f"slowest stage {plan.bottleneck_s * 1e3:.2f} ms a step "
        f"(no cut is below {plan.lower_bound_s * 1e3:.2f} ms; this one is {over:.1%} above)",
        f"one step through all stages {plan.latency_s * 1e3:.2f} ms",
        f"predicted {plan.predicted_tokens_per_s:.1f} tokens/s at the planned load",
        f"room for {plan.kv_tokens_capacity} KV tokens",
    ]
    lines += [f"left out: {device} - {reason}" for device, reason in plan.left_out]
    return Text("\n".join(lines))


def status_table(stages: list[Mapping[str, Any]]) -> Table:
    """Show what each stage has done since it was placed."""
    table = _table("stages")
    for heading in ("stage", "device", "node", "layers", "state"):
        table.add_column(heading)
    for heading in ("steps", "busy s", "late s", "sent"):
        table.add_column(heading, justify="right")
    for stage in stages:
        loaded = float(stage.get("loaded_fraction", 0.0))
        table.add_row(
            str(stage["index"]),
            Text(str(stage["device"])),
            Text(str(stage["node"])),
            Text(f"[{stage['first_layer']}, {stage['end_layer']})"),
            "active" if stage["active"] else f"loading {loaded:.0%}",
            str(stage["steps"]),
            f"{stage['busy_s']:.2f}",
            f"{stage['late_s']:.2f}",
            format_bytes(stage["link_bytes"]),
        )
    return table


def lane_table(lanes: list[Mapping[str, Any]]) -> Table:
    """Show each lane's queue and blocks."""
    table = _table("lanes")
    headings = ("lane", "running", "waiting", "KV blocks", "preemptions", "prefix hits")
    for heading in headings:
        table.add_column(heading, justify="right")
    for lane in lanes:
        table.add_row(
            str(lane["index"]),
            str(lane["running"]),
            str(lane["waiting"]),
            f"{lane['blocks_in_use']}/{lane['num_blocks']}",
            str(lane["preemptions"]),
            str(lane["prefix_hit_tokens"]),
        )
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
