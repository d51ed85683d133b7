"""Where a running deployment says how to reach it: one private JSON file each.

`motley up` owns the file: it writes it when it starts, completes it when the gateway listens and
removes it at the end. The other commands read it. A file whose process is gone is stale and is
treated as absent. Folder: `$MOTLEY_HOME/run`, or `~/.motley/run`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path

_COMMAND = r"(-m cluster|motley|cluster/__main__\.py)\s(.*\s)?{verb}\b"
"""How a verb of `motley` looks in a process list, however it was started."""


class NotRunningError(RuntimeError):
    """No deployment to talk to; the message says what was looked for and where."""


class AmbiguousNameError(ValueError):
    """Several deployments run and none was named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """One deployment of this machine's user."""

    name: str
    pid: int
    started_unix_s: int
    config_path: str
    http_url: str = ""
    """Empty until the gateway listens; so are the next two."""
    grpc_target: str = ""
    token: str = field(default="", repr=False)
    tls_cert_file: str | None = None
    api_keys_file: str | None = None
    audit_file: str | None = None

    @property
    def is_ready(self) -> bool:
        return bool(self.http_url)


def run_folder() -> Path:
    """Return the folder of the run-state files, which need not exist."""
    home = os.environ.get("MOTLEY_HOME")
    return (Path(home) if home else Path.home() / ".motley") / "run"


def state_file(name: str) -> Path:
    """Return the file of a deployment; characters that a file name cannot hold become `_`."""
    return run_folder() / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}.json"


def log_file(name: str) -> Path:
    """Return the file that a deployment of `motley up --detach` logs to."""
    return state_file(name).with_suffix(".log")


def write_state(state: RunState) -> Path:
    """Write the deployment's file, which holds the token."""
    path = state_file(state.name)
    write_private(path, json.dumps(asdict(state)))
    return path


def write_private(path: Path, text: str) -> None:
    """Write a file whole and readable by its owner only; its folder is made if need be."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    draft.replace(path)


def remove_state(state: RunState) -> None:
    """Remove the deployment's file, unless another process has taken the name over."""
    path = state_file(state.name)
    current = _read(path)
    if current is not None and current.pid == state.pid:
        path.unlink(missing_ok=True)


def running_states() -> list[RunState]:
    """Return the live deployments by name; stale files are left for their next owner."""
    states = [_read(path) for path in sorted(run_folder().glob("*.json"))]
    return [state for state in states if state is not None and is_running(state)]


def find_state(name: str | None = None) -> RunState:
    """Return the named deployment, or the only one.

    Raises:
        NotRunningError: There is none.
        AmbiguousNameError: There are several and `name` is None.
    """
    states = running_states()
    if name is not None:
        states = [state for state in states if state.name == name]
    if not states:
        what = f"no deployment called {name} runs" if name else "no deployment runs"
        raise NotRunningError(f"{what} ({run_folder()}); start one with `motley up`")
    if len(states) > 1:
        names = ", ".join(state.name for state in states)
        raise AmbiguousNameError(f"{len(states)} deployments run ({names}); choose with --name")
    return states[0]


def is_running(state: RunState) -> bool:
    """Whether the process that wrote the file still lives."""
    return runs_verb(state.pid, "up")


def runs_verb(pid: int, verb: str) -> bool:
    """Whether a process runs that verb of `motley`: ids are reused, so its name is looked at."""
    return bool(re.search(_COMMAND.format(verb=verb), _command_line(pid)))


def _command_line(pid: int) -> str:
    """Return a process's command line; empty when it is gone or a zombie."""
    proc = Path(f"/proc/{pid}/cmdline")
    if Path("/proc/self").exists():
        try:
            return proc.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            return ""
    shown = subprocess.run(
        ["ps", "-o", "command=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return shown.stdout if shown.returncode == 0 and "<defunct>" not in shown.stdout else ""


def _read(path: Path) -> RunState | None:
    try:
        return RunState(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
