"""`motley` as processes of their own: an environment that leaves the user's alone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "deploy" / "checkpoints" / "tiny-qwen3"
NAME = "cli-test"
DEADLINE_S = 180.0
GONE_DEADLINE_S = 60.0


class Machine:
    """An environment of its own: run-state folder, temporary folder, and a mark on processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.temporary = folder / "tmp"  # short: Ray puts sockets there
        self.temporary.mkdir()
        self.marker = f"MOTLEY_TEST_RUN={folder}"
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MOTLEY_", "RAY_"))}
        self.environment = kept | {
            "MOTLEY_HOME": str(folder / "home"),
            "MOTLEY_TEST_RUN": str(folder),
            "TMPDIR": str(self.temporary),
            "RAY_AUTH_MODE": "token",
            "OMP_NUM_THREADS": "1",
        }
        self.http_port, self.grpc_port = free_port(), free_port()

    def config(self, file: str = "config.yaml", **changes: Any) -> Path:
        """Write settings for three uneven paced devices and return their file."""
        tree: dict[str, Any] = {
            "model": str(CHECKPOINT),
            "name": NAME,
            "devices": [
                {
                    "id": f"paced{i}", "kind": "paced", "flops_per_s": 2e10,
                    "memory_bytes_per_s": 4e9, "memory_bytes": "64 MiB",
                }
                for i in range(3)
            ],
            "plan": {"layer_counts": [5, 2, 1]},
            "gateway": {"http_port": self.http_port, "grpc_port": self.grpc_port},
            "ray": {"object_store_bytes": "80 MB"},
        } | changes  # fmt: skip
        path = self.folder / file
        path.write_text(json.dumps(tree), encoding="utf-8")  # JSON is YAML
        return path

    def run(
        self, *arguments: str | Path, stdin: str = "", program: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        command = [*(program or (sys.executable, "-m", "cluster")), *map(str, arguments)]
        return subprocess.run(
            command, cwd=ROOT, env=self.environment, input=stdin, capture_output=True, text=True,
            check=False, timeout=DEADLINE_S,
        )  # fmt: skip

    def up(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """Start `up` as the leader of a process group, as a shell does."""
        with (self.folder / "up.log").open("a", encoding="utf-8") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "cluster", "up", "--json", *map(str, arguments)],
                cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, stderr=log, text=True,
                start_new_session=True,
            )  # fmt: skip

    def check_nothing_is_left(self) -> None:
        """No process, socket folder or state file of this environment."""
        self.check_no_process_is_left()
        folders = self.temporary.glob("motley-*")
        left = [*folders, *(self.folder / "home").rglob("*.json")]
        assert not left, [(str(path), os.listdir(path) if path.is_dir() else "") for path in left]

    def check_no_process_is_left(self, within_s: float = GONE_DEADLINE_S) -> None:
        deadline_s = time.monotonic() + within_s
        while left := self._processes():
            assert time.monotonic() < deadline_s, left
            time.sleep(0.2)

    def _processes(self) -> list[str]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.marker.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append((folder / "cmdline").read_text(encoding="utf-8"))
            except OSError:
                continue
        return found


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port: int = listener.getsockname()[1]
    return port


def event(up: subprocess.Popen[str], name: str) -> dict[str, Any]:
    """Read events up to the named one."""
    assert up.stdout is not None
    for line in up.stdout:
        value: dict[str, Any] = json.loads(line)
        if value["event"] == name:
            return value
    raise AssertionError(f"the output ended without {name}")


def end(up: subprocess.Popen[str]) -> None:
    """Stop a deployment that a failed test may have left."""
    if up.poll() is None:
        up.terminate()
    up.communicate(timeout=DEADLINE_S)
