"""`motley down`: ask a deployment's own process to stop, and wait until it has."""

from __future__ import annotations

import os
import signal
import time

from cluster.commands.output import Output
from cluster.runstate import find_state, is_running, remove_state

_POLL_S = 0.1


class StillRunningError(RuntimeError):
    """The process did not stop in time."""


def bring_down(name: str | None, timeout_s: float, output: Output) -> None:
    """Stop one deployment; its process tears down everything it started."""
    state = find_state(name)
    output.note(f"stopping {state.name} (process {state.pid})")
    began_s = time.monotonic()
    os.kill(state.pid, signal.SIGTERM)
    while is_running(state):
        if time.monotonic() - began_s > timeout_s:
            raise StillRunningError(
                f"process {state.pid} still runs {timeout_s:.0f} s after SIGTERM; wait longer with "
                f"--timeout, or end it with `kill -KILL {state.pid}`"
            )
        time.sleep(_POLL_S)
    # It removes its file itself, unless it was killed before it could.
    remove_state(state)
    seconds = time.monotonic() - began_s
    output.result(
        {"name": state.name, "pid": state.pid, "stopped": True, "seconds": round(seconds, 3)},
        f"stopped {state.name} in {seconds:.1f} s",
    )
