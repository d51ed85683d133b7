"""The logs of the controller and of the experts' rebalancer on disk, for replays of incidents.

JSON lines: what it began with, then every event with the commands that followed. Ticks are written
when something followed. Replay them with `placement.steering.log.replay` and
`placement.sharding.log.replay`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.runstate import run_folder
from placement.sharding.loads import Phase
from placement.sharding.log import ExpertEntry, ExpertOpening, Merging
from placement.sharding.recording import Steps, TraceRecording
from placement.steering.log import LogEntry, Opening
from placement.steering.values import Tick

_log = logging.getLogger(__name__)
MOST_BYTES = 64 * 2**20
"""Some weeks of a few stages; what comes after is not written, for a log replays from its start."""


def controller_log_file(deployment: str) -> Path:
    return run_folder() / f"{deployment}.controller.jsonl"


def expert_log_file(deployment: str) -> Path:
    return run_folder() / f"{deployment}.experts.jsonl"


def expert_trace_file(deployment: str, phase: Phase) -> Path:
    return run_folder() / f"{deployment}.experts-{phase}.npz"


class ExpertTraces:
    """Records what experts are asked for into a file a phase. Use from one thread."""

    def __init__(self, deployment: str, recording: TraceRecording) -> None:
        self._deployment = deployment
        self._recording = recording
        self._is_written = False

    def add(self, counted: Mapping[int, Steps]) -> None:
        """Take steps; once there are enough of both phases, they are written."""
        if not self._is_written:
            self._recording.add(counted)
            if self._recording.is_full:
                self.close()

    def close(self) -> None:
        """Write what there is, once."""
        if self._is_written:
            return
        self._is_written = True
        for trace in self._recording.traces():
            file = expert_trace_file(self._deployment, trace.phase)
            try:
                file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                file.write_bytes(trace.to_bytes())
            except OSError as error:
                _log.warning("the trace %s is not written: %s", file, error)
            else:
                _log.info("%d steps are recorded in %s", trace.num_steps, file)


class _EventLog:
    """One log, begun anew; the one before is kept beside it. Use from one thread."""

    def __init__(self, file: Path, opening: Mapping[str, Any], *, most_bytes: int) -> None:
        self._file = file
        self._left_bytes = most_bytes
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if file.exists():
            file.replace(file.with_suffix(file.suffix + ".1"))
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._stream = os.fdopen(descriptor, "w", encoding="utf-8")
        self._write(opening)

    def close(self) -> None:
        self._stream.close()

    def _write(self, value: Mapping[str, Any]) -> None:
        line = json.dumps(value, separators=(",", ":")) + "\n"
        if self._left_bytes <= 0 or self._stream.closed:
            return
        self._left_bytes -= len(line)
        try:
            self._stream.write(line)
            self._stream.flush()
        except OSError as error:
            _log.warning("the log %s ends here: %s", self._file, error)
            self._left_bytes = 0
        if self._left_bytes <= 0:
            _log.warning("the log %s is full; what follows is lost", self._file)


class ControllerLog(_EventLog):
    """The controller's."""

    def __init__(self, file: Path, opening: Opening, *, most_bytes: int = MOST_BYTES) -> None:
        super().__init__(file, opening.to_json(), most_bytes=most_bytes)

    def write(self, entry: LogEntry) -> None:
        """Add an event; a disk that is full costs the log, not the deployment."""
        if entry.commands or not isinstance(entry.event, Tick):
            self._write(entry.to_json())


class ExpertLog(_EventLog):
    """The experts'. Loads of a large model fill it within hours."""

    def __init__(self, file: Path, opening: ExpertOpening, *, most_bytes: int = MOST_BYTES) -> None:
        super().__init__(file, opening.to_json(), most_bytes=most_bytes)
        self._merging = Merging()

    def write(self, entry: ExpertEntry) -> None:
        """Add an event, or hold it back for the next one."""
        for each in self._merging.add(entry):
            self._write(each.to_json())

    def close(self) -> None:
        for each in self._merging.rest():
            self._write(each.to_json())
        super().close()


def read_log(file: Path) -> tuple[Opening, list[LogEntry]]:
    """Return what a log began with, and its entries.

    Raises:
        ValueError: It is no such log.
    """
    first, *lines = file.read_text(encoding="utf-8").splitlines()
    entries = [LogEntry.from_json(json.loads(line)) for line in lines]
    return Opening.from_json(json.loads(first)), entries


def read_expert_log(file: Path) -> tuple[ExpertOpening, list[ExpertEntry]]:
    """Return what a log of the experts began with, and its entries.

    Raises:
        ValueError: It is no such log.
    """
    first, *lines = file.read_text(encoding="utf-8").splitlines()
    entries = [ExpertEntry.from_json(json.loads(line)) for line in lines]
    return ExpertOpening.from_json(json.loads(first)), entries
