"""What a person, or a program, reads while a model trains: a live bar, plain lines, JSON lines.

A report is fed `TrainingEvent`s and knows nothing else: no clock, no torch, no Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

from cluster.quantities import format_bytes
from cluster.training.events import (
    CheckpointFailed,
    CheckpointSaved,
    DeviceJoined,
    DeviceLost,
    Evaluated,
    HostBytes,
    HostsLost,
    SlotsTraced,
    StepDone,
    TrainingEvent,
    TrainingFinished,
    TrainingPlanned,
    TrainingStarted,
    event_json,
)
from placement.train import PlannedSlot, TrainPlan

_LINE_EVERY_S = 2.0
"""Seconds of training between two plain lines of steps, at least."""
_SHOWN_SLOTS = 16
_NAMED_DEVICES = 4
_IDLE_DEVICES = 6
_LEFT_OUT = 4


class Report(Protocol):
    """Shows a run to somebody."""

    def handle(self, event: TrainingEvent) -> None: ...

    def close(self) -> None:
        """Leave the terminal as it was; also after a failure."""
        ...


class JsonReport:
    """One JSON document per event, but for `SlotsTraced`, which is for the trace file."""

    def __init__(self, write: Callable[[Mapping[str, Any]], None]) -> None:
        self._write = write

    def handle(self, event: TrainingEvent) -> None:
        if not isinstance(event, SlotsTraced):
            self._write(event_json(event))

    def close(self) -> None:
        pass


class LineReport:
    """Plain lines, for a log file: every event, and the steps at most every two seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._since_line_s = _LINE_EVERY_S
        self._held_out: Evaluated | None = None

    def handle(self, event: TrainingEvent) -> None:
        if isinstance(event, Evaluated):
            self._held_out = event
        if isinstance(event, StepDone):
            self._step(event)
        for line in notable(event):
            self._console.print(Text(line))

    def close(self) -> None:
        pass

    def _step(self, event: StepDone) -> None:
        self._since_line_s += event.seconds
        if self._since_line_s < _LINE_EVERY_S and event.step < event.num_steps:
            return
        self._since_line_s = 0.0
        parts = [
            f"step {event.step}/{event.num_steps}",
            *quality_parts(event, self._held_out),
            *speed_parts(event),
            idle_text(event.idle_fractions),
            f"ETA {format_duration(event.eta_s)}",
        ]
        self._console.print(Text("  ".join(part for part in parts if part)))


class LiveReport:
    """A bar at the foot of the terminal with the last step's figures; events as lines above."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._held_out: Evaluated | None = None
        self._last_step: StepDone | None = None
        self._bar = _Bar(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("ETA {task.fields[eta]}"),
            console=console,
            transient=True,
            expand=True,
        )
        self._task = self._bar.add_task("", total=1.0, eta="?")

    def handle(self, event: TrainingEvent) -> None:
        for line in notable(event):
            self._console.print(Text(line))
        match event:
            case TrainingStarted():
                self._bar.update(self._task, total=event.num_steps, completed=event.first_step - 1)
                self._bar.start()
            case StepDone():
                self._last_step = event
                self._show_step()
            case Evaluated():
                self._held_out = event
                self._show_step()
            case TrainingFinished():
                self.close()
            case _:
                pass

    def close(self) -> None:
        self._bar.stop()

    def _show_step(self) -> None:
        step = self._last_step
        if step is None:
            return
        lines = (
            "  ".join(quality_parts(step, self._held_out)),
            "  ".join(speed_parts(step)),
            idle_text(step.idle_fractions),
        )
        self._bar.figures = tuple(_folded(line) for line in lines if line)
        self._bar.update(
            self._task,
            total=step.num_steps,
            completed=step.step,
            eta=format_duration(step.eta_s),
        )


class _Bar(Progress):
    """A progress bar with lines of figures under it."""

    figures: tuple[Text, ...] = ()

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield from self.figures


def _folded(line: str) -> Text:
    # The console may be told to leave long lines alone, which would garble a live display.
    return Text(line, no_wrap=False, overflow="fold")


@contextmanager
def report_to(
    console: Console, write_json: Callable[[Mapping[str, Any]], None] | None
) -> Iterator[Report]:
    """Yield the report that suits: JSON lines if asked for, a bar on a terminal, else lines."""
    report: Report
    if write_json is not None:
        report = JsonReport(write_json)
    else:
        report = LiveReport(console) if console.is_terminal else LineReport(console)
    try:
        yield report
    finally:
        report.close()


def notable(event: TrainingEvent) -> list[str]:
    """Return the lines that say what happened; none for a step, which has figures instead."""
    match event:
        case TrainingPlanned():
            return plan_lines(event.plan)
        case TrainingStarted():
            return _started_lines(event)
        case TrainingFinished():
            return _finished_lines(event)
        case StepDone() | SlotsTraced():
            return []
        case _:
            return [_happened(event)]


def _happened(
    event: Evaluated | CheckpointSaved | CheckpointFailed | DeviceLost | DeviceJoined | HostsLost,
) -> str:
    match event:
        case Evaluated():
            return (
                f"step {event.step}: held-out loss {event.loss:.4f} "
                f"({event.tokens} tokens, {event.seconds:.1f} s)"
            )
        case CheckpointSaved():
            return f"step {event.step}: saved {event.path} ({event.seconds:.1f} s)"
        case CheckpointFailed():
            return f"step {event.step}: no checkpoint: {event.reason}. Those before it are kept"
        case DeviceLost():
            return (
                f"lost device {event.device_id}: {event.reason}; "
                f"{_count(event.num_slots, 'slot')} run again elsewhere"
            )
        case DeviceJoined():
            return f"device {event.device_id} joins from the next round on"
        case HostsLost():
            return f"lost the weights: {event.reason}; going on from step {event.from_step}"


def plan_lines(plan: TrainPlan) -> list[str]:
    """Say which slots a round has, who may run them, and what a step should cost."""
    rounds = plan.rounds_per_step or 1
    order = "synchronous" if plan.synchronous else "asynchronous"
    lines = [
        f"plan {plan.epoch}: {_count(len(plan.slots), 'slot')} a round, "
        f"{_count(plan.micro_batches, 'micro-batch', 'es')} a round, "
        f"{_count(rounds, 'round')} a step, {order}"
    ]
    used = [share.device_id for share in plan.devices if share.busy_s > 0]
    lines += [_slot_line(slot, used) for slot in plan.slots[:_SHOWN_SLOTS]]
    if len(plan.slots) > _SHOWN_SLOTS:
        lines.append(f"  and {len(plan.slots) - _SHOWN_SLOTS} more slots; --json has them all")
    lines.append(
        f"predicted {_seconds(plan.seconds_per_round * rounds)} a step "
        f"(lower bound {_seconds(plan.lower_bound_s * rounds)}); "
        f"the pool idles {plan.idle_fraction:.1%} of its aggregate speed"
    )
    lines += [f"left out: {device} - {reason}" for device, reason in plan.left_out[:_LEFT_OUT]]
    if len(plan.left_out) > _LEFT_OUT:
        lines.append(f"left out: {len(plan.left_out) - _LEFT_OUT} more; --json has them all")
    return lines


def _slot_line(slot: PlannedSlot, used: list[str]) -> str:
    layers = f"[{slot.first_layer}, {slot.end_layer})" + (" + head" * (slot.kind == "fused"))
    grain = "" if slot.grain == "none" else f"grain {slot.grain}"
    if set(used) <= set(slot.device_ids):
        where = "any device"
    else:
        named = ", ".join(slot.device_ids[:_NAMED_DEVICES])
        more = len(slot.device_ids) - _NAMED_DEVICES
        where = named + (f" and {more} more" if more > 0 else "")
    return f"  {slot.index:>3} {slot.kind:<8} {layers:<16} {grain:<11} on {where}"


def _started_lines(event: TrainingStarted) -> list[str]:
    came = "" if event.resumed_from is None else f", resumed from {event.resumed_from}"
    return [
        f"{_count(event.num_documents, 'document')} in "
        f"{_count(event.num_sequences, 'sequence')} to learn from",
        *_data_notes(event),
        *host_lines(event.host_bytes),
        f"step {event.first_step} of {event.num_steps} follows{came}",
    ]


def _data_notes(event: TrainingStarted) -> list[str]:
    notes = []
    if event.num_left_out:
        notes.append(f"{_count(event.num_left_out, 'record')} left out: nothing in them to learn")
    if event.num_cut:
        notes.append(
            f"{_count(event.num_cut, 'document')} longer than a sequence: cut, and later pieces do "
            "not see earlier ones"
        )
    return notes


def host_lines(host: HostBytes) -> list[str]:
    """Say what a trained parameter costs in host memory, and what all of them cost."""
    parts = [
        (host.weight_bytes, "weights"),
        (host.residual_bytes, "residual"),
        (host.moment_bytes, "moments"),
        (host.gradient_bytes, "gradients"),
    ]
    held = sum(size for size, _ in parts)
    each = ", ".join(
        f"{size / max(1, host.num_trained):.3g} {word}" for size, word in parts if size
    )
    frozen = (
        f", beside {host.num_frozen:,} frozen ({format_bytes(host.frozen_bytes)})"
        if host.num_frozen
        else ""
    )
    return [
        f"{host.per_trained_parameter:.1f} bytes of host memory a trained parameter: {each}",
        f"{host.num_trained:,} trained parameters ({format_bytes(held)}){frozen}",
    ]


def _finished_lines(event: TrainingFinished) -> list[str]:
    rate = f", {event.tokens / event.seconds:.0f} tokens/s" if event.seconds > 0 else ""
    lines = [
        f"ended after step {event.step}: {event.tokens} tokens in "
        f"{format_duration(event.seconds)}{rate}"
    ]
    if event.path is not None:
        lines.append(f"last checkpoint {event.path}")
    return lines


def quality_parts(step: StepDone, held_out: Evaluated | None) -> list[str]:
    """Say how well the model does."""
    parts = [f"loss {step.loss:.4f}"]
    if held_out is not None:
        parts.append(f"held-out loss {held_out.loss:.4f} (step {held_out.step})")
    if step.router_loss is not None:
        parts.append(f"router loss {step.router_loss:.4f}")
    return parts


def speed_parts(step: StepDone) -> list[str]:
    """Say how fast it goes, and how far weights move."""
    return [
        f"{step.tokens_per_s:.0f} tokens/s",
        f"gradient norm {step.gradient_norm:.3g}",
        f"learning rate {step.learning_rate:.2e}",
    ]


def idle_text(idle_fractions: Mapping[str, float]) -> str:
    """Name each device's idle share; of many, the mean and the idlest."""
    if not idle_fractions:
        return ""
    if len(idle_fractions) <= _IDLE_DEVICES:
        shares = ", ".join(f"{device} {idle:.0%}" for device, idle in idle_fractions.items())
        return f"idle {shares}"
    mean = sum(idle_fractions.values()) / len(idle_fractions)
    idlest = sorted(idle_fractions.items(), key=lambda pair: (-pair[1], pair[0]))
    shares = ", ".join(f"{device} {idle:.0%}" for device, idle in idlest[:_NAMED_DEVICES])
    return f"idle {mean:.0%} on average of {len(idle_fractions)} devices; most: {shares}"


def format_duration(seconds: float) -> str:
    """Return hours, minutes and seconds, as in "1:02:03" or "2:03"; "?" when not known."""
    if not 0 <= seconds < float("inf"):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s"


def _count(number: int, word: str, ending: str = "s") -> str:
    return f"{number} {word}{'' if number == 1 else ending}"
