"""The replay of `motley bench experts`, and how its figures are shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from cluster.commands.output import Output
from cluster.config import ConfigError
from cluster.quantities import format_bytes, parse_bytes, parse_bytes_per_s
from placement.experts import ExpertDevice
from placement.sharding.decision import RebalanceSettings
from placement.sharding.fleets import HOME_LAB_ROWS_PER_S, proportional_fleet
from placement.sharding.replay import ReplayReport, replay
from placement.sharding.synthetic import REGIMES, TraceRecipe, make_trace
from placement.sharding.traces import ExpertTrace, gini


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetOptions:
    """The devices that a trace is replayed on."""

    rows_per_s: str | None
    """Comma-separated; None: eight unequal devices."""
    spare_slots: int
    expert_bytes: str
    copy_rate: str
    step_budget: str | None
    """None: one expert."""
    window_steps: int


def run_bench(
    trace: str | TraceRecipe, seed: int, fleet: FleetOptions, save: Path | None, output: Output
) -> None:
    """Make a trace or read one from a file, replay it, and write what every policy comes to."""
    with _usage():
        if isinstance(trace, TraceRecipe):
            # The last device of the fleet holds least: the others can take its experts.
            made = make_trace(trace, seed, lost_device=len(device_speeds(fleet)) - 1)
        else:
            made = read_trace(Path(trace))
        show_replay(made, fleet, output)
    if save is not None:
        save.write_bytes(made.to_bytes())
        output.note(Text(f"wrote {save}"))


@contextmanager
def _usage() -> Iterator[None]:
    """What the planners refuse here was asked for on the command line."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def read_trace(path: Path) -> ExpertTrace:
    """Read a trace file.

    Raises:
        ConfigError: There is none, or it is no trace.
    """
    try:
        return ExpertTrace.from_bytes(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(
            f"--trace {path}: there is no such file; made-up traces are called {', '.join(REGIMES)}"
        ) from None
    except ValueError as error:
        raise ConfigError(f"--trace {path}: {error}") from error


def show_replay(trace: ExpertTrace, fleet: FleetOptions, output: Output) -> None:
    """Replay a trace and write what every policy comes to."""
    devices = proportional_fleet(
        device_speeds(fleet), trace.num_experts, spare_slots=fleet.spare_slots
    )
    expert_bytes = parse_bytes(fleet.expert_bytes)
    settings = RebalanceSettings(
        expert_bytes=expert_bytes,
        copy_bytes_per_s=parse_bytes_per_s(fleet.copy_rate),
        step_budget_bytes=parse_bytes(fleet.step_budget) if fleet.step_budget else expert_bytes,
    )
    runs = replay(trace, devices, settings, window_steps=fleet.window_steps)
    reports = [run.report() for run in runs]
    load_E = trace.rows_SLE.sum(axis=0).astype(float)
    skew = sum(gini(layer_E) for layer_E in load_E) / trace.num_layers
    output.result(
        _to_json(trace, devices, reports, skew),
        _table(trace, reports),
        Text(_about(trace, devices, skew)),
    )


def _to_json(
    trace: ExpertTrace,
    devices: Sequence[ExpertDevice],
    reports: Sequence[ReplayReport],
    skew: float,
) -> dict[str, Any]:
    return {
        "kind": "simulated",
        "trace": {
            "name": trace.name,
            "phase": trace.phase,
            "steps": trace.num_steps,
            "layers": trace.num_layers,
            "experts": trace.num_experts,
            "top_k": trace.top_k,
            "gini": skew,
            "losses": [list(loss) for loss in trace.losses],
        },
        "devices": [
            {
                "device": device.id,
                "node": device.node,
                "rows_per_s": device.rows_per_s,
                "slots_per_layer": device.slots_per_layer,
            }
            for device in devices
        ],
        "policies": [report.to_json() for report in reports],
    }


def _table(trace: ExpertTrace, reports: Sequence[ReplayReport]) -> Table:
    table = Table(
        title=f"{trace.name}, {trace.phase}: simulated",
        title_justify="left",
        box=box.SIMPLE,
        pad_edge=False,
    )
    table.add_column("policy")
    for heading in ("balanced", "p50", "p5", "straggler ms", "regret", "moved", "pause ms"):
        table.add_column(heading, justify="right")
    for report in reports:
        table.add_row(
            report.policy,
            f"{report.balancedness:.3f}",
            f"{report.balancedness_p50:.3f}",
            f"{report.balancedness_p5:.3f}",
            f"{report.straggler_s * 1e3:.3f}",
            f"{report.regret:.1%}",
            format_bytes(report.moved_bytes),
            f"{report.pause_s * 1e3:.1f}",
        )
    return table


def _about(trace: ExpertTrace, devices: Sequence[ExpertDevice], skew: float) -> str:
    slots = ", ".join(str(device.slots_per_layer) for device in devices)
    lines = [
        f"{trace.num_steps} steps, {trace.num_layers} layers of {trace.num_experts} experts, "
        f"{trace.top_k} a token, Gini {skew:.2f}; {len(devices)} devices with {slots} slots",
        "balanced: work over the speed of all devices, over the slowest (1 is perfect); "
        "straggler: what the slowest takes longer, per step; regret: over the best placement "
        "for each single step",
        "eplb: vLLM's default window and interval, 1000 and 3000 steps, the first at 750; equal "
        "slots on every device, whatever its memory; its exchange counts as a pause",
    ]
    lines += [
        f"{devices[device].id} is lost before step {step}"
        for step, device in trace.losses
        if device < len(devices)
    ]
    return "\n".join(lines)


def device_speeds(fleet: FleetOptions) -> tuple[float, ...]:
    if fleet.rows_per_s is None:
        return HOME_LAB_ROWS_PER_S
    try:
        return tuple(float(part) for part in fleet.rows_per_s.split(","))
    except ValueError as error:
        raise ConfigError(
            f"--rows-per-s {fleet.rows_per_s}: write one number for each device, as 2e5,1e5 "
            f"({error})"
        ) from error
