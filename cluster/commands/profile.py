"""`motley profile`: measure devices, links and the checkpoint's layers, and show what was found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import assert_never

from rich import box
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from actors.engine.checkpoint import Checkpoint
from cluster.commands.output import Output
from cluster.config import ConfigError, MotleyConfig
from cluster.planning import dtype_bytes
from cluster.profile_cache import write_profile
from cluster.profiling import (
    Measuring,
    OnEvent,
    ProfileEvent,
    ProfileOptions,
    Told,
    measure_profile,
)
from cluster.quantities import format_bytes
from placement.costs import layer_seconds
from placement.profiles import DeviceProfile, LayerTable, Profile
from placement.workload import ModelProfile

_SHOWN_ROWS = (1, 16, 256)
_SCALES = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))

Measurer = Callable[[MotleyConfig, Checkpoint, ProfileOptions, OnEvent], Profile]


def show_profile(
    config: MotleyConfig,
    options: ProfileOptions,
    file: Path | None,
    output: Output,
    measurer: Measurer = measure_profile,
) -> None:
    """Measure, keep the profile in the cache and in `file`, and write it."""
    checkpoint = Checkpoint.open(
        config.model, allow_unverified=config.engine.allow_unverified_architectures
    )
    with _narrator(output) as narrate:
        profile = measurer(config, checkpoint, options, narrate)
    if file is not None:
        write_profile(file, profile)
        output.note(Text(f"written to {file}"))
    kinds = [device.kind for device in profile.devices]
    model = checkpoint.profile(dtype_bytes=dtype_bytes(config.engine, kinds))
    measured = _shares(profile.devices)
    output.result(
        profile.to_json(),
        device_table(profile.devices),
        *(layer_table(devices, model) for devices in measured),
        link_table(profile),
        *(remark for devices in measured for remark in remarks(devices, model)),
    )


def parse_tokens(text: str) -> tuple[int, ...]:
    """Return the token counts of "1,8,32"."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--tokens: {text!r} is no list of counts; write 1,8,32") from None


@contextmanager
def _narrator(output: Output) -> Iterator[OnEvent]:
    """Show progress on stderr while the block runs."""
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        console=output.errors,
        transient=True,
    )
    tasks: list[TaskID] = []

    def narrate(event: ProfileEvent) -> None:
        match event:
            case Measuring():
                if not tasks:
                    tasks.append(bars.add_task("", total=event.total))
                bars.update(tasks[0], description=Text(event.what).markup, completed=event.done)
            case Told():
                output.note(Text(event.text))
            case _:
                assert_never(event)

    with bars:
        yield narrate


def device_table(devices: Sequence[DeviceProfile]) -> Table:
    """Show what each device does."""
    table = _table("devices: FLOP/s of products by rows, bytes/s of memory and from the host")
    for heading in ("device", "node", "kind", "name", "figures", "format"):
        table.add_column(heading, overflow="fold")
    for heading in (*(f"{rows} rows" for rows in _SHOWN_ROWS), "memory/s", "host/s", "memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for device in devices:
        rates = {rate.rows: rate.flops_per_s for rate in device.rates}
        # Declared: one rate at every size.
        shown = [rates.get(rows, None if rates else device.flops_per_s) for rows in _SHOWN_ROWS]
        table.add_row(
            Text(device.id),
            Text(device.node),
            device.kind,
            Text(device.name or "-"),
            device.source,
            device.dtype or "-",
            *("-" if rate is None else _scaled(rate) for rate in shown),
            _scaled(device.memory_bytes_per_s),
            "-" if device.host_bytes_per_s is None else _scaled(device.host_bytes_per_s),
            format_bytes(device.memory_bytes),
        )
    return table


def _shares(devices: Sequence[DeviceProfile]) -> list[list[DeviceProfile]]:
    """Group the devices whose layers are the same measurement: shares of one device."""
    groups: dict[tuple[LayerTable, ...], list[DeviceProfile]] = {}
    for device in devices:
        if device.layers:
            groups.setdefault(device.layers, []).append(device)
    return list(groups.values())


def layer_table(devices: Sequence[DeviceProfile], model: ModelProfile) -> Table:
    """Show a device's layers: milliseconds by token count, beside what the roofline says."""
    device = devices[0]
    table = _table(f"{_ids(devices)}: one layer in {device.dtype}, {device.source}")
    table.add_column("layers")
    headings = ("tokens", "context", "forward ms", "recompute ms", "backward ms", "kept")
    for heading in (*headings, "roofline ms", "measured / roofline"):
        table.add_column(heading, justify="right")
    for part in device.layers:
        for sample in part.samples:
            roofline_s = _roofline_s(device, model, part, sample.tokens)
            kept = sample.activation_bytes
            table.add_row(
                Text(_layers(part)),
                str(sample.tokens),
                str(sample.context_tokens),
                _ms(sample.forward_s),
                _ms(sample.recompute_s),
                _ms(sample.backward_s),
                "-" if kept is None else format_bytes(kept),
                _ms(roofline_s),
                "-" if roofline_s is None else f"{sample.forward_s / roofline_s:.2f}",
            )
    return table


def link_table(profile: Profile) -> Table:
    """Show every link in both directions."""
    table = _table("links")
    for heading in ("from", "to", "figures"):
        table.add_column(heading)
    for heading in ("round trip ms", "bandwidth B/s"):
        table.add_column(heading, justify="right")
    for link in profile.links:
        table.add_row(
            Text(link.source_node),
            Text(link.target_node),
            link.source,
            _ms(link.rtt_s),
            _scaled(link.bandwidth_bytes_per_s),
        )
    return table


def remarks(devices: Sequence[DeviceProfile], model: ModelProfile) -> list[Text]:
    """Say how far the plain roofline is from the layers, and how sure estimates are."""
    device, ids = devices[0], _ids(devices)
    told = []
    ratios = sorted(
        sample.forward_s / roofline_s
        for part in device.layers
        for sample in part.samples
        if (roofline_s := _roofline_s(device, model, part, sample.tokens)) is not None
    )
    if ratios:
        told.append(
            f"{ids}: layers take {ratios[0]:.2f} to {ratios[-1]:.2f} times the plain "
            f"roofline (peak rate and bandwidth alone); plans use what was measured"
        )
    if (estimate := device.estimate) is not None:
        told.append(
            f"{ids}: {estimate.samples} figures were measured, the others estimated from "
            f"{estimate.known_devices} known devices (rank {estimate.rank}); such estimates were "
            f"off by {estimate.median_error:.0%} in the median and {estimate.p90_error:.0%} at "
            f"the 90th percentile on the known ones"
        )
    return [Text(line) for line in told]


def _roofline_s(
    device: DeviceProfile, model: ModelProfile, part: LayerTable, tokens: int
) -> float | None:
    """Return the seconds by peak rate and bandwidth alone, at a sample's own shape."""
    costs = part.costs(model)
    if not costs:
        return None
    plain = layer_seconds(replace(device, layers=(), matmul_rates={}).to_device(None), costs[0])
    [sample] = [sample for sample in part.samples if sample.tokens == tokens]
    return plain.step_s(sample.tokens, sample.context_tokens, sample.pairs)


def _ids(devices: Sequence[DeviceProfile]) -> str:
    return ", ".join(device.id for device in devices)


def _layers(part: LayerTable) -> str:
    if len(part.layers) < 2:
        return part.name
    first, last = part.layers[0], part.layers[-1]
    between = "-" if last - first + 1 == len(part.layers) else ".."
    return f"layers {first}{between}{last}"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.3f}"


def _scaled(value: float) -> str:
    for prefix, scale in _SCALES:
        if value >= scale:
            return f"{value / scale:.1f} {prefix}"
    return f"{value:.1f}"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
