"""`motley plan`: predict a deployment from its settings, without Ray, torch or a GPU."""

from __future__ import annotations

from rich.text import Text

from actors.engine.checkpoint import Checkpoint
from cluster.commands.output import Output
from cluster.commands.tables import plan_summary, plan_table
from cluster.config import MotleyConfig
from cluster.planning import best_single_device_plan, declared_devices, dtype_bytes, make_plan
from placement.stages import StagesPlan


def show_plan(config: MotleyConfig, output: Output) -> None:
    """Write the plan of a configuration that declares its devices."""
    devices = declared_devices(config)
    checkpoint = Checkpoint.open(
        config.model, allow_unverified=config.engine.allow_unverified_architectures
    )
    kinds = [device.kind for device in devices]
    profile = checkpoint.profile(dtype_bytes=dtype_bytes(config.engine, kinds))
    plan = make_plan(config, profile, devices)
    alone = best_single_device_plan(config, profile, devices)
    output.result(
        {"plan": plan.to_json(), "alone": None if alone is None else alone.to_json()},
        plan_table(plan),
        plan_summary(plan),
    )
    if alone is not None and len(plan.stages) > 1:
        output.note(_compare(plan, alone))


def _compare(plan: StagesPlan, alone: StagesPlan) -> Text:
    verdict = (
        "a single stream is slower when split"
        if alone.latency_s < plan.latency_s
        else "splitting is faster even for a single stream"
    )
    return Text(
        f"the whole model fits {alone.stages[0].device_id} alone: "
        f"{alone.predicted_tokens_per_s:.1f} tokens/s and {alone.latency_s * 1e3:.2f} ms a step "
        f"there, {plan.predicted_tokens_per_s:.1f} tokens/s and {plan.latency_s * 1e3:.2f} ms "
        f"split; {verdict}"
    )
