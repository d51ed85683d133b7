"""`motley train` as a process of its own: its events as they come, and what is killed under it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from leftovers import actor_processes

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "deploy" / "checkpoints" / "tiny-qwen3"
DEADLINE_S = 180.0
GONE_DEADLINE_S = 150.0
"""Ray's processes look for a dead driver now and then; a minute has been seen."""

Event = dict[str, Any]
Victim = Literal["driver", "device", "weight host"]
_TITLES = {"device": b"ray::DeviceWorker", "weight host": b"ray::WeightHostWorker"}


class TrainCommand:
    """A running `motley train --json`."""

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        with log.open("a", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cluster", "train", "--json", *arguments],
                cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True,
            )  # fmt: skip
        self.events: list[Event] = []
        self._changed = threading.Condition()
        self._has_ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_for(self, name: str, is_wanted: Callable[[Event], bool] = lambda _: True) -> bool:
        """Wait for an event, past ones included; False: the output ended without it."""

        def has_come() -> bool:
            return any(event.get("event") == name and is_wanted(event) for event in self.events)

        with self._changed:
            in_time = self._changed.wait_for(lambda: self._has_ended or has_come(), DEADLINE_S)
            assert in_time, f"nothing for {DEADLINE_S:g} s after {self.events[-3:]}"
            return has_come()

    def wait(self) -> int:
        """Wait until it has ended and all it said is read; returns the exit code."""
        code = self.process.wait(DEADLINE_S)
        self._reader.join(DEADLINE_S)
        return code

    def of_kind(self, name: str) -> list[Event]:
        return [event for event in self.events if event.get("event") == name]

    def kill(self, victim: Victim, choose: Callable[[list[int]], int]) -> None:
        """Kill the command, or one of its actors as soon as there is one."""
        if victim == "driver":
            self.process.kill()
            return
        deadline_s = time.monotonic() + DEADLINE_S
        while True:
            # One that was found may end by itself before it is killed.
            pids = actor_processes(_TITLES[victim], root=self.process.pid)
            with suppress(ProcessLookupError):
                if pids:
                    os.kill(choose(sorted(pids)), signal.SIGKILL)
                    return
            assert time.monotonic() < deadline_s, f"there is no {victim}"
            time.sleep(0.05)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.events.append(json.loads(line))
                self._changed.notify_all()
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()


class TrainingFolder:
    """Settings, data and temporary files of runs, and a mark on their processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "train.log"
        self._temporary = folder / "tmp"  # short: Ray puts sockets there
        self._temporary.mkdir()
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MOTLEY_", "RAY_"))}
        self._mark = f"MOTLEY_TEST_RUN={folder}"
        self.environment = kept | {
            "MOTLEY_HOME": str(folder / "home"),
            "MOTLEY_TEST_RUN": str(folder),
            "TMPDIR": str(self._temporary),
            "RAY_AUTH_MODE": "token",
            "OMP_NUM_THREADS": "1",
        }
        self._data = folder / "data"
        self._data.mkdir()
        for number in range(6):
            lines = (f"line {i}: the quick fox counts to {i * number}" for i in range(60))
            (self._data / f"{number}.txt").write_text("\n".join(lines), encoding="utf-8")

    def config(self, output: Path, *, devices: int = 2, **training: Any) -> Path:
        """Write settings for equal devices and return their file."""
        tree = {
            "model": str(CHECKPOINT),
            "devices": [
                {
                    "id": f"cpu{i}", "kind": "cpu", "flops_per_s": 1e10,
                    "memory_bytes_per_s": 1e10, "memory_bytes": "1 GiB",
                }
                for i in range(devices)
            ],
            "training": {
                "data": {"train": [str(self._data)], "held_out_fraction": 0},
                "output": str(output),
                "sequence_tokens": 32,
                "micro_batches": 2,
                "rounds_per_step": 2,
            }
            | training,
        }  # fmt: skip
        path = self.folder / f"{output.name}.yaml"
        path.write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
        return path

    @contextmanager
    def train(self, config: Path, *arguments: str) -> Iterator[TrainCommand]:
        command = TrainCommand(["--config", str(config), *arguments], self.environment, self.log)
        try:
            yield command
        finally:
            if command.process.poll() is None:
                command.process.terminate()
            command.wait()

    def check_no_process_is_left(self) -> None:
        deadline_s = time.monotonic() + GONE_DEADLINE_S
        while left := self._processes():
            assert time.monotonic() < deadline_s, left
            time.sleep(0.2)

    def _processes(self) -> list[str]:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if self._mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                    found.append((process / "cmdline").read_text(encoding="utf-8"))
            except OSError:
                continue
        return found


@contextmanager
def training_folder() -> Iterator[TrainingFolder]:
    """A folder that is removed at the end, when no process of it is left."""
    path = Path(tempfile.mkdtemp(prefix="train-"))
    try:
        folder = TrainingFolder(path)
        yield folder
        folder.check_no_process_is_left()
    finally:
        shutil.rmtree(path, ignore_errors=True)
