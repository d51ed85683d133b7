"""`motley train` as a process of its own: its events as they come, and what is killed under it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from leftovers import actor_processes

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "deploy" / "checkpoints" / "tiny-qwen3"
PROGRAM = (sys.executable, "-m", "cluster")
DEADLINE_S = 240.0
GONE_DEADLINE_S = 150.0
"""Ray's processes look for a dead driver now and then; a minute has been seen."""

Event = dict[str, Any]
Victim = Literal["driver", "device", "weight host"]
_TITLES = {"device": b"ray::DeviceWorker", "weight host": b"ray::WeightHostWorker"}


class Command:
    """A running command of the program that writes events, one a line."""

    def __init__(self, arguments: tuple[str, ...], environment: dict[str, str], log: Path) -> None:
        with log.open("a", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                [*PROGRAM, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
                stderr=errors, text=True,
            )  # fmt: skip
        self.events: list[Event] = []
        self._changed = threading.Condition()
        self._has_ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_for(self, name: str, is_wanted: Callable[[Event], bool] = lambda _: True) -> bool:
        """Wait for an event, past ones included; False: the output ended without it."""

        def has_come() -> bool:
            return any(map(is_wanted, self.of_kind(name)))

        with self._changed:
            in_time = self._changed.wait_for(lambda: self._has_ended or has_come(), DEADLINE_S)
            assert in_time, f"no {name} within {DEADLINE_S:g} s; the last was {self.events[-1:]}"
            return has_come()

    def wait(self) -> int:
        """Wait until it has ended and all it said is read; returns the exit code."""
        code = self.process.wait(DEADLINE_S)
        self._reader.join(DEADLINE_S)
        return code

    def end(self) -> None:
        """Stop it if it still runs."""
        if self.process.poll() is None:
            self.process.terminate()
        self.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def of_kind(self, name: str) -> list[Event]:
        return [event for event in self.events if event.get("event") == name]

    def kill(self, victim: Victim, choose: Callable[[list[int]], int]) -> None:
        """Kill the command, or one of its actors as soon as there is one."""
        if victim == "driver":
            self.process.kill()
            return
        deadline_s = time.monotonic() + DEADLINE_S
        while True:
            pids = sorted(actor_processes(_TITLES[victim], root=self.process.pid))
            # One that was found may end by itself before it is killed.
            with suppress(ProcessLookupError):
                if pids:
                    os.kill(choose(pids), signal.SIGKILL)
                    return
            assert time.monotonic() < deadline_s, f"there is no {victim}"
            time.sleep(0.05)

    def _read(self) -> None:
        assert self.process.stdout is not None
        try:
            for line in self.process.stdout:
                with self._changed:
                    self.events.append(json.loads(line))
                    self._changed.notify_all()
        finally:
            with self._changed:
                self._has_ended = True
                self._changed.notify_all()


class TrainingFolder:
    """Settings, data and temporary files of runs, and a mark on their processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._log = folder / "errors.log"
        temporary = folder / "tmp"  # short: Ray puts sockets there
        temporary.mkdir()
        self._mark = f"MOTLEY_TEST_RUN={folder}"
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MOTLEY_", "RAY_"))}
        self._environment = kept | {
            "MOTLEY_HOME": str(folder / "home"),
            "MOTLEY_TEST_RUN": str(folder),
            "TMPDIR": str(temporary),
            "RAY_AUTH_MODE": "token",
            "OMP_NUM_THREADS": "1",
        }
        self._data = folder / "data"
        self._data.mkdir()
        for number in range(6):
            lines = (f"line {i}: the quick fox counts to {i * number}" for i in range(60))
            (self._data / f"{number}.txt").write_text("\n".join(lines), encoding="utf-8")

    @property
    def errors(self) -> str:
        """What all commands wrote to stderr."""
        return self._log.read_text(encoding="utf-8")

    def write_config(self, name: str, **changes: Any) -> Path:
        """Write settings for two equal devices and return their file."""
        device = {
            "kind": "cpu", "flops_per_s": 1e10, "memory_bytes_per_s": 1e10,
            "memory_bytes": "1 GiB",
        }  # fmt: skip
        tree = {
            "model": str(CHECKPOINT),
            "devices": [device | {"id": "cpu0"}, device | {"id": "cpu1"}],
        } | changes
        path = self.folder / f"{name}.yaml"
        path.write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
        return path

    def training_config(self, output: Path, **training: Any) -> Path:
        """Write settings of a short run and return their file."""
        changes = {
            "data": {"train": [str(self._data)], "held_out_fraction": 0},
            "output": str(output),
            "sequence_tokens": 32,
            "micro_batches": 2,
            "rounds_per_step": 2,
        } | training
        return self.write_config(output.name, training=changes)

    def serving_config(self, model: Path) -> Path:
        """Write settings of a deployment and return their file."""
        gateway = {"http_port": _free_port(), "grpc_port": _free_port()}
        return self.write_config("served", model=str(model), gateway=gateway)

    @contextmanager
    def start(self, verb: str, config: Path, *arguments: str) -> Iterator[Command]:
        """Start a command, and stop it at the end if it still runs."""
        everything = (verb, "--json", "--config", str(config), *arguments)
        command = Command(everything, self._environment, self._log)
        try:
            yield command
        finally:
            command.end()

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            [*PROGRAM, *arguments], cwd=ROOT, env=self._environment, capture_output=True,
            text=True, check=False, timeout=DEADLINE_S,
        )  # fmt: skip

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
    """Make a folder for runs; at its end no process of theirs may be left."""
    path = Path(tempfile.mkdtemp(prefix="train-"))
    try:
        folder = TrainingFolder(path)
        yield folder
        folder.check_no_process_is_left()
    finally:
        shutil.rmtree(path, ignore_errors=True)


class SmallDisk:
    """A disk in memory; of a few bytes, at first."""

    def __init__(self, folder: Path, num_bytes: int) -> None:
        """Mount it.

        Raises:
            PermissionError: This machine does not let us.
        """
        folder.mkdir()
        self.folder = folder
        self._mount("-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs")

    def resize(self, num_bytes: int) -> None:
        self._mount("-o", f"remount,size={num_bytes}")

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)

    def _mount(self, *arguments: str) -> None:
        command = ["mount", *arguments, str(self.folder)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            raise PermissionError(f"a disk cannot be mounted here: {ran.stderr.strip()}")


def _free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port: int = listener.getsockname()[1]
    return port
