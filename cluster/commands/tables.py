"""Plans and statuses as tables for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from cluster.quantities import format_bytes
from cluster.training.report import format_duration
from cluster.trainstate import TrainingState
from placement.decode import DecodePlan
from placement.front import StageFront
from placement.shards import ShardsPlan
from placement.stages import StagesPlan
from placement.train import TrainPlan
from placement.training import RecomputeGrain

_FRONT_ROWS = 10
_TRAINING_ROWS = 24
_CUT = 6
"""Stages, or devices, that one line names."""
_NAMED_DEVICES = 4
_LEFT_OUT_LINES = 8
_RUNS = 8


def plan_table(plan: StagesPlan) -> Table:
    """Show which device runs which layers, at what cost."""
    table = _table(f"{plan.model}: {len(plan.stages)} stages, plan {plan.epoch}")
    for heading in ("stage", "device", "node", "kind", "layers"):
        table.add_column(heading)
    has_experts = any(stage.num_experts for stage in plan.stages)
    for heading in (*(["experts"] if has_experts else []), "weights", "KV", "of memory"):
        table.add_column(heading, justify="right")
    for heading in ("ms a step", "busy", "hop ms"):
        table.add_column(heading, justify="right")
    for stage in plan.stages:
        table.add_row(
            str(stage.index),
            Text(stage.device_id),
            Text(stage.node),
            stage.kind,
            Text(f"[{stage.first_layer}, {stage.end_layer})"),
            *([str(stage.num_experts)] if has_experts else []),
            format_bytes(stage.weight_bytes),
            format_bytes(stage.kv_bytes),
            f"{stage.need_bytes / stage.memory_cap_bytes:.0%}",
            f"{stage.step_s * 1e3:.2f}",
            f"{stage.share_of_bottleneck:.0%}",
            f"{stage.hop_s * 1e3:.2f}" if stage.hop_s else "",
        )
    return table


def plan_summary(plan: StagesPlan) -> Text:
    """Say what the plan predicts, how good it could be, and who stays out."""
    value, unit = _objective_figure(plan, plan.objective_value)
    bound, _ = _objective_figure(plan, plan.objective_lower_bound)
    order = "the order given" if plan.device_order == "given" else "any order"
    proof = "no other cut is better" if plan.is_exact else f"at most {plan.gap:.1%} above the best"
    lines = [
        f"planned for {plan.objective}, devices in {order}: {value} {unit} "
        f"(bound {bound} {unit}, gap {plan.gap:.1%}; {proof})",
        f"slowest stage {plan.bottleneck_s * 1e3:.2f} ms a step "
        f"(no cut is below {plan.lower_bound_s * 1e3:.2f} ms)",
        f"one step through all stages {plan.latency_s * 1e3:.2f} ms",
        f"predicted {plan.predicted_tokens_per_s:.1f} tokens/s at the planned load"
        + (f", {plan.energy_j_per_token:.3g} J a token" if plan.energy_j_per_token else ""),
        f"room for {plan.kv_tokens_capacity} KV tokens",
    ]
    lines += left_out_lines(plan.left_out)
    return Text("\n".join(lines))


def _objective_figure(plan: StagesPlan, value: float) -> tuple[str, str]:
    if plan.objective == "energy":
        return f"{value:.4g}", "J a token"
    return f"{value * 1e3:.3f}", "ms a step"


def left_out_lines(left_out: Sequence[tuple[str, str]]) -> list[str]:
    """Say why devices hold nothing; equal reasons share a line."""
    devices_of: dict[str, list[str]] = {}
    for device, reason in left_out:
        devices_of.setdefault(reason, []).append(device)
    lines = []
    for reason, devices in devices_of.items():
        named = ", ".join(devices[:_NAMED_DEVICES])
        more = len(devices) - _NAMED_DEVICES
        lines.append(f"left out: {named}{f' and {more} more' if more > 0 else ''} - {reason}")
    return lines[:_LEFT_OUT_LINES] + (
        [f"left out: {len(lines) - _LEFT_OUT_LINES} more reasons; --json has them all"]
        if len(lines) > _LEFT_OUT_LINES
        else []
    )


def front_table(front: StageFront) -> Table:
    """Show the plans that no other plan beats, thinned out to a page."""
    if front.epsilon is None:
        how = "some orders looked at"
    else:
        how = f"within {front.epsilon:.0%}" if front.epsilon else "exact"
    table = _table(f"the front: {len(front.plans)} plans that no other beats ({how})")
    table.add_column("layers by stage")
    for heading in ("ms a step", "tokens/s", "J a token"):
        table.add_column(heading, justify="right")
    for plan in _thinned(front.plans):
        cut = ", ".join(f"{stage.device_id} {stage.num_layers}" for stage in plan.stages[:_CUT])
        more = f", {len(plan.stages) - _CUT} more" if len(plan.stages) > _CUT else ""
        table.add_row(
            Text(cut + more),
            f"{plan.latency_s * 1e3:.2f}",
            f"{plan.predicted_tokens_per_s:.1f}",
            "" if plan.energy_j_per_token is None else f"{plan.energy_j_per_token:.3g}",
        )
    return table


def _thinned(plans: Sequence[StagesPlan]) -> list[StagesPlan]:
    if len(plans) <= _FRONT_ROWS:
        return list(plans)
    last = len(plans) - 1
    return [plans[round(i * last / (_FRONT_ROWS - 1))] for i in range(_FRONT_ROWS)]


def lanes_line(lanes: DecodePlan, planned: int) -> Text:
    """Say which number of lanes would decode the same sequences fastest."""
    best = len(lanes.lanes)
    figures = {count.lanes: count for count in lanes.alternatives}
    sequences = sum(lane.sequences for lane in lanes.lanes)
    text = (
        f"{sequences} sequences on these stages: {best} lanes give "
        f"{lanes.predicted_tokens_per_s:.1f} tokens/s, {lanes.lanes[0].kv_blocks} KV blocks each"
    )
    if planned != best and planned in figures:
        text += f" ({planned} give {figures[planned].tokens_per_s:.1f}; see plan.lanes)"
    return Text(text)


def shards_summary(shards: ShardsPlan) -> Text:
    """Say what sharding the experts over all devices would do."""
    experts = shards.experts
    busiest = max(shards.device_s, key=lambda pair: pair[1])
    lines = [
        f"experts sharded over {len(experts.device_ids)} devices (with plan.experts: shards): "
        f"{shards.predicted_tokens_per_s:.1f} tokens/s, "
        f"{shards.latency_s * 1e3:.2f} ms a step of which {shards.message_s * 1e3:.2f} ms messages",
        f"experts balanced by {experts.objective}: {experts.bottleneck_s * 1e3:.3f} ms "
        f"(bound {experts.lower_bound_s * 1e3:.3f} ms, gap {experts.gap:.2%}); busiest device "
        f"{busiest[0]} at {busiest[1] * 1e3:.2f} ms",
    ]
    for device, size in list(zip(experts.device_ids, experts.device_bytes, strict=True))[:_CUT]:
        lines.append(f"  {device}: {format_bytes(size)} of experts")
    return Text("\n".join(lines + left_out_lines(experts.left_out)))


def training_table(plan: TrainPlan) -> Table:
    """Show what each device of the pool is predicted to do in a round of training."""
    table = _table(
        f"training: {len(plan.slots)} slots a round of {plan.micro_batches} micro-batches, "
        f"{plan.dispatch}"
    )
    for heading in ("device", "node"):
        table.add_column(heading)
    kept_bytes = {
        share.device_id: sum(s.kept_bytes for s in plan.slots if share.device_id in s.device_ids)
        for share in plan.devices
    }
    keeps = any(kept_bytes.values())
    for heading in ("busy s", "busy", *(["kept"] if keeps else []), "peak", "of memory"):
        table.add_column(heading, justify="right")
    for share in plan.devices[:_TRAINING_ROWS]:
        table.add_row(
            Text(share.device_id),
            Text(share.node),
            f"{share.busy_s:.3f}",
            f"{share.busy_fraction:.0%}",
            *([format_bytes(kept_bytes[share.device_id])] if keeps else []),
            format_bytes(share.peak_bytes),
            f"{share.peak_bytes / share.memory_bytes:.0%}",
        )
    return table


def training_summary(plan: TrainPlan) -> Text:
    """Say how long a round takes and how good it could be."""
    forward = sum(slot.kind == "forward" for slot in plan.slots)
    lines = [
        f"{plan.seconds_per_round:.3f} s a round (bound {plan.lower_bound_s:.3f} s, gap "
        f"{plan.gap:.1%}); the pool idles {plan.idle_fraction:.1%} of its aggregate speed",
        f"{forward} forward slots, 1 fused, {len(plan.slots) - forward - 1} backward"
        f"{_grains(plan)}",
    ]
    return Text("\n".join(lines + left_out_lines(plan.left_out)))


def _grains(plan: TrainPlan) -> str:
    """Say what the backward slots repeat."""
    counts = Counter(slot.grain for slot in plan.slots if slot.kind == "backward")
    told: dict[RecomputeGrain, str] = {
        "stage": "recompute their stage at once",
        "layer": "recompute layer by layer",
        "keep": "use kept activations",
    }
    parts = [f"{counts[grain]} {what}" for grain, what in told.items() if counts[grain]]
    return f" ({', '.join(parts)})" if parts else ""


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


def runs_table(runs: Sequence[TrainingState]) -> Table:
    """Show how far the training runs of this machine are."""
    table = _table("training runs")
    table.add_column("run")
    table.add_column("state")
    for heading in ("step", "loss", "tokens/s", "ETA"):
        table.add_column(heading, justify="right")
    for run in runs[:_RUNS]:
        table.add_row(
            Text(run.name),
            run.phase,
            f"{run.step}/{run.num_steps}",
            "" if run.loss is None else f"{run.loss:.4f}",
            "" if run.tokens_per_s is None else f"{run.tokens_per_s:.0f}",
            "" if run.eta_s is None else format_duration(run.eta_s),
        )
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
