"""`motley up`: launch, narrate, keep the run-state file, and return when all is gone."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import assert_never

from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn
from rich.text import Text

from cluster.audit import default_audit_file
from cluster.commands.output import Output
from cluster.commands.tables import plan_summary, plan_table
from cluster.config import MotleyConfig
from cluster.events import LaunchEvent, Planned, Ready, StageProgress, Stopped, event_json
from cluster.runstate import (
    RunState,
    remove_state,
    running_states,
    state_file,
    write_state,
)


class AlreadyRunningError(RuntimeError):
    """The name is taken by a live deployment."""


Launcher = Callable[[MotleyConfig, Callable[[LaunchEvent], None]], None]
"""Brings a deployment up, reports, blocks until told to stop, and tears everything down."""


def bring_up(config: MotleyConfig, config_path: str, output: Output, launcher: Launcher) -> None:
    """Run a deployment until it is told to stop."""
    name = config.served_name
    check_name_is_free(name)
    gateway = config.gateway
    state = RunState(
        name=name,
        pid=os.getpid(),
        started_unix_s=int(datetime.now(UTC).timestamp()),
        config_path=config_path,
        tls_cert_file=_absolute(gateway.tls_cert_file),
        api_keys_file=_absolute(gateway.api_keys_file),
        audit_file=_absolute(gateway.audit_file or default_audit_file()),
    )
    write_state(state)
    stop_hint = f"stop with Ctrl-C or `motley down --name {name}`"
    narrator = Narrator(output, name, stop_hint=stop_hint)

    def handle(event: LaunchEvent) -> None:
        if isinstance(event, Ready):
            write_state(
                replace(
                    state,
                    http_url=event.http_url,
                    grpc_target=event.grpc_target,
                    token=event.token,
                )
            )
        narrator.handle(event)

    try:
        launcher(config, handle)
    finally:
        narrator.close()
        remove_state(state)


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.resolve())


def check_name_is_free(name: str) -> None:
    """Raise `AlreadyRunningError` when a live deployment has the name."""
    for other in running_states():
        if other.name == name:
            raise AlreadyRunningError(
                f"{name} already runs as process {other.pid}; stop it with `motley down --name "
                f"{name}`, or start another with --name"
            )


class Narrator:
    """Turns launch events into JSON lines or a display."""

    def __init__(self, output: Output, name: str, *, stop_hint: str) -> None:
        self._output = output
        self._name = name
        self._stop_hint = stop_hint
        self._planned: Planned | None = None
        self._tasks: dict[int, TaskID] = {}
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            console=output.errors,
            transient=True,
        )

    def handle(self, event: LaunchEvent) -> None:
        if self._output.as_json:
            self._output.line(event_json(event))
        else:
            self._show(event)

    def close(self) -> None:
        self._bars.stop()

    def _show(self, event: LaunchEvent) -> None:
        match event:
            case Planned():
                self._planned = event
                self._bars.start()
                for stage in event.plan.stages:
                    title = Text(f"stage {stage.index} on {stage.device_id}").markup
                    self._tasks[stage.index] = self._bars.add_task(title, total=1.0)
            case StageProgress():
                if event.index in self._tasks:
                    self._bars.update(self._tasks[event.index], completed=event.loaded_fraction)
            case Ready():
                self._bars.stop()
                if self._planned is not None:
                    plan, verdict = self._planned.plan, Text(self._planned.verdict)
                    self._output.note(plan_table(plan), plan_summary(plan), verdict)
                self._output.note(self._how_to_reach(event))
            case Stopped():
                self._bars.stop()
                self._output.note(Text(f"stopped: {event.reason}"))
            case _:
                assert_never(event)

    def _how_to_reach(self, ready: Ready) -> Text:
        # A log file outlives the deployment and is read by others; a terminal is the user's own.
        token = ready.token if self._output.errors.is_terminal else "in the file below"
        return Text(
            f"ready after {ready.seconds:.1f} s\n"
            f"  OpenAI HTTP  {ready.http_url}/v1\n"
            f"  gRPC         {ready.grpc_target}\n"
            f"  dashboard    {ready.http_url}/  (see `motley dashboard`)\n"
            f"  token        {token}\n"
            f"  state        {state_file(self._name)}\n"
            f"{self._stop_hint}"
        )
