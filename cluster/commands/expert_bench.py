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
from placement.sharding.traces import MOST_BYTES, ExpertTrace, gini

LEAST_ROWS_PER_S, MOST_ROWS_PER_S = 1e-3, 1e12
_MOST_SHOWN = 500


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
        if save is not None:
            check_save(save)
        if isinstance(trace, TraceRecipe):
            # The last device of the fleet holds least: the others can take its experts.
            made = make_trace(trace, seed, lost_device=len(device_speeds(fleet)) - 1)
        else:
            made = read_trace(Path(trace))
        show_replay(made, fleet, output)
    if save is not None:
        save.write_bytes(made.to_bytes())
        output.note(Text(f"wrote {_shown(save)}"))


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
    shown = _shown(path)
    try:
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "no regular file"
            raise ValueError(f"it is {kind}; give 1 file")
        if (num_bytes := path.stat().st_size) > MOST_BYTES:
            raise ValueError(f"it has {num_bytes} bytes; at most {MOST_BYTES} are read")
        return ExpertTrace.from_bytes(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(
            f"--trace {shown}: there is no such file; made-up traces are called "
            f"{', '.join(REGIMES)}"
        ) from None
    except OSError as error:
        raise ConfigError(f"--trace {shown}: {error.strerror}; name a file to read") from error
    except ValueError as error:
        raise ConfigError(f"{shown} is no expert trace: {_shown(error)}") from error


def check_save(path: Path) -> None:
    """Find out whether a file can be written, and leave all as it was.

    Raises:
        ConfigError: It cannot.
    """
    try:
        # What a link points to, so that taking the file away again leaves the link.
        target = path.resolve()
        is_there = target.exists()
        with target.open("ab"):
            pass
        if not is_there:
            target.unlink()
    except (OSError, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"--save {_shown(path)}: {why}; name a file in a folder that exists and may be "
            f"written to"
        ) from error


def _shown(foreign: object) -> str:
    """Return text that leaves a terminal as it is, in one line of some length."""
    text = "".join(part if part.isprintable() else "\N{REPLACEMENT CHARACTER}" for part in
                   str(foreign))  # fmt: skip
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _check_losses(trace: ExpertTrace, num_devices: int) -> None:
    lost = {device for _, device in trace.losses}
    if lost >= set(range(num_devices)):
        raise ConfigError(
            f"trace {_shown(trace.name)} loses {len(lost)} devices and the fleet has "
            f"{num_devices}: none is left for its last steps; name more devices with --rows-per-s"
        )


def show_replay(trace: ExpertTrace, fleet: FleetOptions, output: Output) -> None:
    """Replay a trace and write what every policy comes to."""
    if fleet.spare_slots > trace.num_experts:
        raise ConfigError(
            f"--spare-slots {fleet.spare_slots} must be from 0 to the trace's "
            f"{trace.num_experts} experts"
        )
    devices = proportional_fleet(
        device_speeds(fleet), trace.num_experts, spare_slots=fleet.spare_slots
    )
    _check_losses(trace, len(devices))
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
        # As text: a string would be read as markup.
        title=Text(f"{_shown(trace.name)}, {trace.phase}: simulated", style="table.title"),
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
    shown = f"--rows-per-s {_shown(fleet.rows_per_s)}"
    try:
        speeds = tuple(float(part) for part in fleet.rows_per_s.split(","))
    except ValueError as error:
        raise ConfigError(
            f"{shown}: write one number for each device, as 2e5,1e5 ({_shown(error)})"
        ) from error
    for speed in speeds:
        # Written so that NaN is refused too.
        if not LEAST_ROWS_PER_S <= speed <= MOST_ROWS_PER_S:
            raise ConfigError(
                f"{shown}: rows_per_s ({speed}) must be from {LEAST_ROWS_PER_S:g} to "
                f"{MOST_ROWS_PER_S:g}"
            )
    return speeds
