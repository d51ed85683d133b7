"""`motley up --detach`: start a deployment in a session of its own and wait until it serves.

The child is an ordinary `motley up --json`. Its events come through a file that has no name any
more, so that no token stays on the disk and the child can write its last event long after this
process has ended. What it logs goes to a private file beside the run-state file.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

from cluster.commands.errors import NotReadyError
from cluster.commands.output import Output
from cluster.commands.reporting import ExitCode
from cluster.commands.up import Narrator, check_name_is_free
from cluster.events import Ready, event_from_json
from cluster.runstate import log_file, run_folder, state_file

_ROOT = Path(__file__).resolve().parent.parent.parent
_POLL_S = 0.1
_STOP_TIMEOUT_S = 60.0
_SHOWN_LINES = 20


class DetachedError(RuntimeError):
    """The child ended before it was ready and did not say why."""


def up_command(*flags: tuple[str, Path | str | int | None]) -> list[str]:
    """Return the child's command line; a flag whose value is None is left out."""
    # Without -P a folder called `cluster` in the working directory would be run instead.
    command = [sys.executable, "-P", "-m", "cluster", "up", "--json"]
    for flag, value in flags:
        if value is not None:
            command += [flag, str(value)]
    return command


def bring_up_detached(
    command: Sequence[str], name: str, timeout_s: float, output: Output
) -> ExitCode:
    """Start the child, show what it tells until it is ready, and leave it running.

    Returns the child's exit code when it failed, after telling why.

    Raises:
        AlreadyRunningError: The name is taken.
        NotReadyError: It was not ready in time, and has been stopped.
    """
    check_name_is_free(name)
    deadline_s = time.monotonic() + timeout_s
    narrator = Narrator(output, name, stop_hint=f"stop with `motley down --name {name}`")
    with _started(command, name) as (child, events), contextlib.closing(narrator):
        try:
            for value in _values(child, events, deadline_s):
                if "event" not in value:
                    return _failed(child, value, name, output)
                event = event_from_json(value)
                narrator.handle(event)
                if isinstance(event, Ready):
                    _tell_where(child, name, output)
                    return ExitCode.OK
        except TimeoutError:
            _stop(child)
            raise NotReadyError(
                f"{name} was not ready after {timeout_s:g} s and has been stopped; wait longer "
                f"with --timeout, or see {log_file(name)}"
            ) from None
        except BaseException:
            _stop(child)
            raise
    _ended_without_a_word(child, name, output)


@contextlib.contextmanager
def _started(
    command: Sequence[str], name: str
) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """Start the child; yields it and what it writes to its standard output."""
    run_folder().mkdir(mode=0o700, parents=True, exist_ok=True)
    known = os.environ.get("PYTHONPATH")
    paths = os.pathsep.join([str(_ROOT), *([known] if known else [])])
    with contextlib.ExitStack() as stack:
        with tempfile.NamedTemporaryFile(dir=run_folder(), prefix=".events-") as written:
            # A file description of its own: the child's writing must not move this one's place.
            events = stack.enter_context(Path(written.name).open("rb"))
            with _new_log(name) as log:
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=written,
                    stderr=log,
                    env=os.environ | {"PYTHONPATH": paths},
                    start_new_session=True,
                )
        yield child, events


def _new_log(name: str) -> IO[bytes]:
    """Open an empty log that only its owner reads; the one before it is kept as `.log.1`."""
    path = log_file(name)
    if path.exists():
        path.replace(path.with_name(f"{path.name}.1"))
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600), "ab")


def _values(
    child: subprocess.Popen[bytes], events: IO[bytes], deadline_s: float
) -> Iterator[dict[str, Any]]:
    """Yield each JSON document that the child writes, until it has ended.

    Raises:
        TimeoutError: The deadline has passed.
    """
    begun = b""
    while True:
        # Asked first: what a child wrote before its end is then read below.
        has_ended = child.poll() is not None
        for line in events:
            begun += line
            if begun.endswith(b"\n"):
                yield json.loads(begun)
                begun = b""
        if has_ended:
            return
        if time.monotonic() > deadline_s:
            raise TimeoutError
        time.sleep(_POLL_S)


def _tell_where(child: subprocess.Popen[bytes], name: str, output: Output) -> None:
    where = {"pid": child.pid, "log": str(log_file(name)), "state": str(state_file(name))}
    if output.as_json:
        output.line({"event": "detached", **where})
    else:
        output.note(f"left running as process {child.pid}; log {where['log']}")
    # It goes on without us; Popen would warn that nobody waits for it.
    child.returncode = 0


def _failed(
    child: subprocess.Popen[bytes], value: dict[str, Any], name: str, output: Output
) -> ExitCode:
    """Pass on why the child failed; it has taken down what it started."""
    child.wait(_STOP_TIMEOUT_S)
    if output.as_json:
        output.failure(value)
    _show_log(name, output)
    return ExitCode(value["error"]["exit_code"])


def _ended_without_a_word(child: subprocess.Popen[bytes], name: str, output: Output) -> NoReturn:
    _show_log(name, output)
    code = child.returncode
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    raise DetachedError(f"{name} ended before it was ready ({how}); see {log_file(name)}")


def _show_log(name: str, output: Output) -> None:
    with log_file(name).open(encoding="utf-8", errors="replace") as file:
        lines = deque(file, _SHOWN_LINES)
    output.errors.print(f"-- the end of {log_file(name)}", markup=False)
    for line in lines:
        output.errors.print(line.rstrip("\n"), markup=False)


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Have the child take down what it started; after a minute, end it and its session."""
    child.terminate()
    try:
        child.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait(_STOP_TIMEOUT_S)
